"""Repair of answers: what comes out passes the verifier that failed it, keeps the answer's words, and says when nothing can be done."""

import json
import random
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gristmill.core.errors import InputError
from gristmill.core.response_text import repetition
from gristmill.verify.ifeval import CHECKS, check_instructions
from gristmill.verify.instruction_edits import EDITS
from gristmill.verify.repair import instructions_of, repair
from gristmill.verify.text_edits import MAX_REPETITION
from gristmill.verify.verify import verify

WORDS = re.findall(
    r"\w+",
    "moon tide water coast boat harbour stone wind people morning salt ferry lamp bridge garden of the and to a in is with on",
)
ESSAY = """Tides are caused by the pull of the moon, and they move the water of the oceans. The moon is closer, so it has more influence.

Here are some facts:

1. **Moon**: It pulls the water on the near side.
2. **Sun**: It has about half the influence of the moon.
3. **Earth**: It rotates, and the bulge seems to travel.

In the Bay of Fundy, the range is more than 16 meters. NASA measures sea levels, and the USA runs gauges. People use tides for trade."""
PLAIN = (
    "The water rises twice a day. Fishermen plan their trips around it. It is a slow rhythm that shapes whole coasts, from mud flats to "
    "harbours. Children collect shells when the water is low. Engineers build barrages to make power from it."
)
OTHER = "Every harbour lives by the hours of high water. Pilots know them by heart. Printed tables list them for a year ahead."


def kwargs_of(name: str, rng: random.Random) -> dict[str, Any]:
    """Random arguments that a text of some sentences can meet."""
    num, relation = rng.randint(2, 5), rng.choice(["at least", "less than"])
    return {
        "change_case:capital_word_frequency": {"capital_frequency": num, "capital_relation": relation},
        "combination:repeat_prompt": {"prompt_to_repeat": rng.choice(["Write a riddle about a mill.", "Why?"])},
        "detectable_content:number_placeholders": {"num_placeholders": rng.randint(1, 15)},
        "detectable_content:postscript": {"postscript_marker": rng.choice(["P.S.", "P.P.S", "PS:"])},
        "detectable_format:multiple_sections": {"num_sections": num, "section_spliter": rng.choice(["SECTION", "Part", "Day"])},
        "detectable_format:number_bullet_lists": {"num_bullets": rng.randint(1, 6)},
        "detectable_format:number_highlighted_sections": {"num_highlights": num},
        "keywords:existence": {"keywords": rng.sample(["mill", "stone", "correlated", "le", "moon"], 2)},
        "keywords:forbidden_words": {"forbidden_words": rng.sample(["moon", "salt", "field"], 2)},
        "keywords:frequency": {"keyword": rng.choice(["moon", "mill"]), "frequency": num, "relation": relation},
        "keywords:letter_frequency": {"letter": rng.choice("eq!"), "let_frequency": 4 * num, "let_relation": relation},
        "language:response_language": {"language": "en"},
        "length_constraints:nth_paragraph_first_word": {
            "num_paragraphs": num, "nth_paragraph": rng.randint(1, num), "first_word": rng.choice(["stones", "however", "moon"])
        },
        "length_constraints:number_paragraphs": {"num_paragraphs": num},
        "length_constraints:number_sentences": {"num_sentences": num, "relation": relation},
        "length_constraints:number_words": {"num_words": rng.randint(15, 80), "relation": relation},
        "startend:end_checker": {"end_phrase": rng.choice(["Is there anything else?", "Peace!", "that is all"])},
    }.get(name, {})  # fmt: skip


def random_text(rng: random.Random) -> str:
    """Sentences, lists, headings and odd marks in any order."""
    out = []
    for _ in range(rng.randint(1, 12)):
        words = rng.choices(WORDS, k=rng.randint(1, 14))
        line = " ".join(words).capitalize() + rng.choice([".", ".", "!", "", ":", ",", " ...", '"', " **x**."])
        out.append(rng.choice(["", "", "* ", "- ", "1. ", "# ", '"', "*"]) + line + rng.choice([" ", "\n", "\n\n", "\n***\n"]))
    return "".join(out)


@pytest.mark.parametrize("name", CHECKS)
def test_a_repaired_answer_passes(name: str) -> None:
    rng = random.Random(name)
    num_failing = num_repaired = 0
    for _ in range(30):
        checks = [{"id": name, **kwargs_of(name, rng)}]
        answer = rng.choice([ESSAY, PLAIN])
        if all(check_instructions(checks, answer)):
            continue
        num_failing += 1
        done = repair({"kind": "instructions", "checks": checks}, answer, [OTHER, ESSAY if answer is PLAIN else PLAIN])
        if done is not None:
            num_repaired += 1
            assert all(check_instructions(checks, done.text)) and done.edits == (name,)
            assert repetition(done.text) <= MAX_REPETITION and len(done.text.split()) >= 3
    if name not in ("language:response_language", "keywords:letter_frequency"):  # English is; and a text keeps its letters
        assert num_repaired >= 0.9 * num_failing and num_failing > 0


@given(st.integers(0, 10**6))
def test_whatever_the_text_what_comes_back_passes_and_is_stable(seed: int) -> None:
    rng = random.Random(seed)
    checks = [{"id": name, **kwargs_of(name, rng)} for name in rng.sample(list(CHECKS), rng.randint(1, 3))]
    truth = {"kind": "instructions", "checks": checks, "loose": rng.random() < 0.2}
    answer, others = random_text(rng), [random_text(rng) for _ in range(rng.randint(0, 3))]
    before = check_instructions(checks, answer, loose=truth["loose"])
    done = repair(truth, answer, others)
    assert done == repair(truth, answer, others)
    if all(before):
        assert done is not None and (done.text, done.edits, done.sources) == (answer, (), ())
    elif done is not None:
        assert verify(truth, done.text) and done.text.strip()
        assert set(done.edits) == {check["id"] for check, ok in zip(checks, before, strict=True) if not ok}
        assert all(0 <= place < len(others) for place in done.sources)
        again = repair(truth, done.text, others)
        assert again is not None and again.text == done.text


@given(st.text(max_size=80), st.sampled_from(sorted(CHECKS)))
def test_any_characters(text: str, name: str) -> None:
    truth = {"kind": "instructions", "checks": [{"id": name, **kwargs_of(name, random.Random(text))}]}
    done = repair(truth, text)
    assert done is None or verify(truth, done.text)


def test_every_instruction_has_its_edit() -> None:
    assert set(EDITS) == set(CHECKS)


@pytest.mark.parametrize(
    ("checks", "shape"),
    [
        (["startend:quotation", "punctuation:no_comma", "detectable_format:title"], r'"<<.+>>\n[^,"]+"'),
        (["change_case:english_lowercase", "combination:two_responses"], r"[^A-Z]+\n\*{6}\n[^A-Z]+"),
        (["combination:repeat_prompt", "startend:end_checker"], r"(Write a riddle about a mill\.|Why\?)\n.*"),
        (["detectable_format:json_format", "change_case:english_capital"], r'\{\n  "ANSWER": .*\}'),
        (["detectable_format:json_format", "startend:quotation"], r'".*"'),
        (["length_constraints:number_paragraphs", "detectable_content:postscript"], r".*\*\*\*.*\n\n(P\.S\.|P\.P\.S|PS:) .*"),
    ],
)
def test_instructions_of_one_prompt_are_repaired_together(checks: list[str], shape: str) -> None:
    rng = random.Random(1)
    truth = {"kind": "instructions", "checks": [{"id": name, **kwargs_of(name, rng)} for name in checks]}
    done = repair(truth, PLAIN, [OTHER])
    assert done is not None and verify(truth, done.text) and re.fullmatch(shape, done.text, re.S), done


def test_a_limit_on_words_leaves_room_for_what_is_added_later() -> None:
    checks = [
        {"id": "length_constraints:number_words", "num_words": 30, "relation": "less than"},
        {"id": "startend:end_checker", "end_phrase": "Is there anything else that I can help you with today?"},
    ]
    done = repair({"kind": "instructions", "checks": checks}, PLAIN)
    assert done is not None and done.text.startswith("The water rises twice a day.") and "." in done.text[:-60]


def test_length_comes_from_whole_sentences_of_other_answers() -> None:
    truth = {"kind": "instructions", "checks": [{"id": "length_constraints:number_words", "num_words": 60, "relation": "at least"}]}
    done = repair(truth, PLAIN, ["la la " * 100, OTHER])
    assert done is not None and done.sources == (1,) and done.text == f"{PLAIN}\n\n{OTHER}"
    assert repair(truth, PLAIN) is None, "and without them there is no filler"
    assert repair(truth, PLAIN, [PLAIN]) is None, "what says nothing new is not joined"


def test_own_words_stay() -> None:
    for name in ("change_case:english_lowercase", "startend:quotation", "detectable_format:title", "detectable_content:postscript"):
        done = repair({"kind": "instructions", "checks": [{"id": name, **kwargs_of(name, random.Random(0))}]}, ESSAY)
        assert done is not None
        assert set(re.findall(r"\w+", ESSAY.lower())) <= set(re.findall(r"\w+", done.text.lower()))


def test_what_cannot_be_repaired() -> None:
    english = {"kind": "instructions", "checks": [{"id": "language:response_language", "language": "fr"}]}
    assert repair(english, PLAIN) is None, "there is no translation"
    both = [{"id": "change_case:english_capital"}, {"id": "change_case:english_lowercase"}]
    assert repair({"kind": "instructions", "checks": both}, PLAIN) is None
    for empty in ("", " \n", "<think>Well, hm"):
        assert (
            repair({"kind": "instructions", "checks": [{"id": "punctuation:no_comma"}, {"id": "detectable_format:title"}]}, empty) is None
        )
    for solution in ({"kind": "number", "value": 4}, {"kind": "code", "tests": "assert f() == 1"}, {"kind": "exact", "value": "x"}):
        assert repair(solution, "It is 5.") is None and not list(instructions_of(solution))
    with pytest.raises(InputError, match="no known id"):
        repair({"kind": "instructions", "checks": [{"id": "no:such"}]}, PLAIN)


def test_thinking_is_left_as_it_is() -> None:
    truth = {"kind": "instructions", "checks": [{"id": "change_case:english_lowercase"}]}
    done = repair(truth, f"<think>Hm, The Case.</think>\n{PLAIN}")
    assert done is not None and done.text.startswith("<think>Hm, The Case.</think>\n") and verify(truth, done.text)


@pytest.mark.parametrize("shape", ["commas", "slashes", "brackets", "dashes", "numbered"])
@pytest.mark.parametrize("extras", [[], ["upper", "sorted"], ["start", "end"], ["upper", "end", "start", "sorted"]])
def test_lists(shape: str, extras: list[str]) -> None:
    truth = {"kind": "list", "n": 3, "words": ["oak", "elm", "ash", "fir"], "shape": shape, "extras": extras}
    done = repair(truth, "I like the oak, the fir, the oak and the stone; also Ash and elm.")
    assert done is not None and verify(truth, done.text) and done.edits == ("list",)
    assert repair(truth, "I like the oak.") is None, "what the answer does not name is not made up"


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "size": {"type": "integer"}, "tags": {"type": "array", "items": {"type": "string"}}},
    "required": ["name", "size"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    "answer",
    [
        '{"name": "mill", "size": "3",}',
        "Sure: {'name': 'mill', 'size': 3}",
        '```json\n{"name": "mill", "size": 3, "why": "because"}\n```',
        '[{"name": "mill", "size": 3, "tags": "old"}]',
    ],
)
def test_json_for_a_schema(answer: str) -> None:
    truth = {"kind": "schema", "schema": SCHEMA}
    assert not verify(truth, answer)
    done = repair(truth, answer)
    assert done is not None and done.edits == ("schema",)
    value = json.loads(done.text)
    assert value["name"] == "mill" and value["size"] == 3
    assert repair(truth, '{"name": "mill"}') is None and repair(truth, "mill") is None
