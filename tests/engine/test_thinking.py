"""Thinking budget: the closing tag is forced at the budget's end, and nowhere else."""

from pathlib import Path

import pytest

from gristmill.data.chat import Message
from gristmill.data.find_format import find_format
from gristmill.engine.engine import Engine
from gristmill.engine.speculative import SpeculativeConfig
from gristmill.engine.thinking import ThinkingBudget, ThinkingTags
from gristmill.generation.api import Completion, Request, SamplingParams
from gristmill.model.convert import add_thinking_tokens, resize_embeddings
from gristmill.model.hf import load_model


def engine_of(folder: Path, speculative: SpeculativeConfig | None = None) -> Engine:
    model, tokenizer = load_model(folder)
    return Engine(model, tokenizer, find_format("auto", tokenizer), name="m", max_batch=8, speculative=speculative)


@pytest.fixture(scope="module", params=["a token each", "several tokens"])
def folder(request: pytest.FixtureRequest, random_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that never closes its thinking."""
    if request.param == "several tokens":
        return random_base
    out: Path = tmp_path_factory.mktemp("tags") / "model"
    assert add_thinking_tokens(random_base, out)["num_added"] == 2 and add_thinking_tokens(out, out.with_name("again"))["num_added"] == 0
    return out


def answers(engine: Engine, prompt: str, limit: int | None, temperature: float = 1.0) -> list[Completion]:
    sampling = SamplingParams(temperature=temperature, max_tokens=30, n=3, max_thinking_tokens=limit)
    ((_, out),) = engine.generate([Request("r", (), sampling, prompt_ids=tuple(engine.tokenizer.encode(prompt)))])
    return out


@pytest.mark.parametrize("limit", [0, 5])
def test_thinking_that_the_prompt_begins_is_closed_at_its_budget(folder: Path, limit: int) -> None:
    engine = engine_of(folder)
    close = engine.tokenizer.encode("</think>")
    engine.stop_V[:] = False  # the random model shall not end before
    free, bound = answers(engine, "a<think>", None), answers(engine, "a<think>", limit)
    for one, other in zip(bound, free, strict=True):
        assert one.forced == tuple(range(limit, limit + len(close))) and not other.forced
        assert list(one.tokens[limit : limit + len(close)]) == close and one.tokens[:limit] == other.tokens[:limit]
        assert one.num_tokens == 30
        whole = engine.tokenizer.encode("a<think>") + list(one.tokens)
        told = engine.prompt_logprobs(whole, 0)[0][-30:]
        assert one.logprobs == pytest.approx(told, abs=1e-4), "of forced tokens too they are the model's own"


def test_a_closing_tag_that_is_a_control_token_is_forced_as_one(random_base: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(random_base)
    tokenizer = tokenizer.with_tokens(["<think>", "</think>"])
    resize_embeddings(model, tokenizer.max_id + 1, [tokenizer.special_id(tag) for tag in ("<think>", "</think>")])
    engine = Engine(model, tokenizer, find_format("auto", tokenizer), name="m", max_batch=8)
    engine.stop_V[:] = False
    sampling = SamplingParams(max_tokens=6, max_thinking_tokens=3)
    ((_, (answer,)),) = engine.generate([Request("r", (), sampling, prompt_ids=(1, tokenizer.special_id("<think>")))])
    assert answer.forced == (3,) and answer.tokens[3] == tokenizer.special_id("</think>")


def test_what_does_not_think_is_left_alone_and_drafts_change_nothing(folder: Path) -> None:
    engine = engine_of(folder)
    assert all(not one.forced for one in answers(engine, "a", 0))
    assert [one.tokens for one in answers(engine, "a", 0)] == [one.tokens for one in answers(engine, "a", None)]
    drafting = engine_of(folder, SpeculativeConfig())
    assert [one.tokens for one in answers(drafting, "a<think>", 4, 0.0)] == [one.tokens for one in answers(engine, "a<think>", 4, 0.0)]


def test_an_answer_that_goes_on_in_the_midst_of_thinking_has_the_budget_too(folder: Path) -> None:
    engine = engine_of(folder)
    engine.stop_V[:] = False
    close = engine.tokenizer.encode("</think>")
    for said, forced in (("<think>a long thought", 3), ("<think>a</think>b", None), ("b", None)):
        talk = (Message("user", "a"), Message("assistant", said))
        prompt = engine.chat_format.render_turns(talk, engine.tokenizer, continue_final_message=True)
        sampling = SamplingParams(max_tokens=20, max_thinking_tokens=3)
        ((_, (answer,)),) = engine.generate([Request("r", talk, sampling, prompt_ids=tuple(prompt))])
        assert answer.forced == (() if forced is None else tuple(range(forced, forced + len(close))))


def letters(ids: object) -> str:
    return "".join(map(chr, ids))  # type: ignore[arg-type]


def forced(said: str, limit: int, prompt: str = "") -> list[str | None]:
    """The character that is forced after each one that is said, of tags of a token a character."""
    budget = ThinkingBudget(ThinkingTags(tuple(map(ord, "</think>")), letters), limit, list(map(ord, prompt)))
    out: list[str | None] = []
    for character in said:
        budget.accept_token(ord(character))
        token = budget.forced_token()
        out.append(None if token is None else chr(token))
    return out


def test_a_tag_that_the_model_has_begun_is_gone_on_with() -> None:
    assert forced("<think>ab", 2)[-1] == "<" and forced("\n <think>ab", 2)[-1] == "<"
    assert forced("<think>a</", 2)[-2:] == ["/", "t"]
    assert forced("<think>ab</think>c", 12) == [None] * 18, "closed by itself"
    assert forced("<think>ab</think>cdefghijklmnop", 12)[-5:] == [None] * 5
    assert forced("So <think>abcdef", 2) == [None] * 16, "a tag within an answer opens nothing"
    assert forced("ab", 1, prompt="<think>\n") == ["<", "<"] and forced("ab", 1, prompt="<think></think>") == [None, None]
