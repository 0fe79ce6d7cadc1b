"""Guided decoding: responses keep to their grammars, whatever the model would rather say."""

import json
import re
from pathlib import Path

import pytest

from gristmill.core.errors import InputError
from gristmill.data.chat import Message
from gristmill.data.chat_format import FORMATS
from gristmill.engine.engine import Engine
from gristmill.engine.grammar import choice_grammar, json_schema_grammar, regex_grammar
from gristmill.generation.api import Completion, Request, SamplingParams
from gristmill.model.hf import load_model

SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["egg", "nut"]}, "count": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "count"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def engine(tiny_base: Path) -> Engine:
    return Engine(*load_model(tiny_base), FORMATS["nemotron"], name="tiny", max_batch=8, cache_tokens=1024)


def say(engine: Engine, grammar: str, **sampling: object) -> list[Completion]:
    values = {"n": 6, "max_tokens": 80, "temperature": 1.5} | sampling
    request = Request("r", (Message("user", "Name a land."),), SamplingParams(grammar=grammar, **values))  # type: ignore[arg-type]
    ((_, outs),) = engine.generate([request])
    return outs


def test_json_by_its_schema(engine: Engine) -> None:
    for out in say(engine, json_schema_grammar(SCHEMA)):
        if out.finish == "stop":
            found = json.loads(out.text)
            assert set(found) == {"name", "count"} and found["name"] in ("egg", "nut") and 0 <= found["count"] <= 99
    assert any(out.finish == "stop" for out in say(engine, json_schema_grammar(SCHEMA)))


def test_a_regular_expression_and_a_choice(engine: Engine) -> None:
    for out in say(engine, regex_grammar(r"[a-c]{3}-\d{2}")):
        assert re.fullmatch(r"[a-c]{3}-\d{2}", out.text) and out.finish == "stop"
    for temperature in (0.0, 2.0):
        assert {out.text for out in say(engine, choice_grammar(["yes", 'no "x"']), temperature=temperature)} <= {"yes", 'no "x"'}


def test_neighbours_say_what_they_want(engine: Engine) -> None:
    free = Request("free", (Message("user", "Name a land."),), SamplingParams(max_tokens=20, n=3))
    bound = Request("bound", free.messages, SamplingParams(max_tokens=20, grammar=choice_grammar(["yes"])))
    alone = dict((r.id, outs) for r, outs in engine.generate([free]))
    together = dict((r.id, outs) for r, outs in engine.generate([bound, free, bound]))
    assert [o.text for o in together["free"]] == [o.text for o in alone["free"]] and together["bound"][0].text == "yes"


NONSENSE = json_schema_grammar({"type": "nonsense"})


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        (regex_grammar("(("), "cannot be used"),
        (NONSENSE, "nonsense"),
        ("x" * 200_000, "at most"),
    ],
)
def test_what_is_no_grammar_is_refused_before_work(engine: Engine, grammar: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        say(engine, grammar)


def test_a_choice_needs_texts() -> None:
    for choices in ([], [""]):
        with pytest.raises(InputError, match="texts to choose from"):
            choice_grammar(choices)


def test_a_grammar_is_built_once_and_its_copies_go_their_own_ways(engine: Engine) -> None:
    grammar = choice_grammar(["left", "right", "upwards"])
    engine.grammar_backend.validate(grammar)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(engine.grammar_backend), "_build", lambda *_: pytest.fail("built again"))
        assert {out.text for out in say(engine, grammar, n=8)} <= {"left", "right", "upwards"}


def test_a_grammar_that_takes_too_long_is_refused(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gristmill.engine.grammar.MAX_GRAMMAR_SECONDS", 0.0)
    for _ in range(2):  # the refusal is known the second time
        with pytest.raises(InputError, match="too long"):
            say(engine, choice_grammar(["never", "built"]))


def test_sizes_are_checked_before_any_work() -> None:
    for make in (lambda: regex_grammar("a" * 200_000), lambda: choice_grammar(["x" * 100] * 2000)):
        with pytest.raises(InputError, match="at most 100,000"):
            make()
