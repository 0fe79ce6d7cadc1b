"""Lists out of answers in every form that models give them."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gristmill.synth.parsing import normalize, parse_list, parse_yes_no, unique

ITEMS = ["Tides and moon", "Bees in winter", "The price of bread"]
FORMS = {
    "numbers": "1. Tides and moon\n2. Bees in winter\n3. The price of bread",
    "brackets": "(1) Tides and moon\n(2) Bees in winter\n(3) The price of bread",
    "closing": "1) Tides and moon\n2) Bees in winter\n3) The price of bread",
    "dashes": "Here are three topics:\n\n- Tides and moon\n- Bees in winter\n- The price of bread\n\nI hope this helps!",
    "stars": "* **Tides and moon**\n* **Bees in winter**\n* **The price of bread**",
    "json": json.dumps(ITEMS),
    "fenced json": 'Sure:\n```json\n["Tides and moon", "Bees in winter", "The price of bread"]\n```\nDone.',
    "objects": json.dumps([{"topic": item} for item in ITEMS]),
    "yaml": '```yaml\n- "Tides and moon"\n- Bees in winter\n- The price of bread\n```',
    "lines": "Topics:\nTides and moon\nBees in winter\nThe price of bread",
    "blank lines": "1. Tides and moon\n\n2. Bees in winter\n\n3. The price of bread",
    "quotes": "1. \u201cTides and moon\u201d\n2. 'Bees in winter'\n3. `The price of bread`",
    "bullets": "\u2022 Tides and moon\n\u2022 Bees in winter\n\u2022 The price of bread",
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_items(form: str) -> None:
    assert parse_list(FORMS[form]) == ITEMS


def test_what_follows_a_marker_belongs_to_its_item() -> None:
    text = "1. Write a plan\n   that has two lines\n2. Choose:\n   - red\n   - green\n3. Last\n\nGood luck."
    assert parse_list(text) == ["Write a plan\nthat has two lines", "Choose:\n- red\n- green", "Last"]
    assert parse_list("1. First\n- a detail\n2. Second") == ["First\n- a detail", "Second"]


@pytest.mark.parametrize("text", ["", "A single sentence without a list.", "[1, 2, 3", "Yes."])
def test_no_list_is_no_list(text: str) -> None:
    assert parse_list(text) == []


words = st.text(st.characters(categories=["L"]), min_size=1, max_size=8)
items = st.lists(st.lists(words, min_size=1, max_size=5).map(" ".join), min_size=2, max_size=9, unique_by=normalize)


@given(items, st.sampled_from(["{n}. {item}", "{n}) {item}", "- {item}", "* {item}"]))
def test_a_marked_list_comes_back(found: list[str], form: str) -> None:
    text = "\n".join(form.format(n=n, item=item) for n, item in enumerate(found, 1))
    assert parse_list(text) == parse_list(f"Here you are:\n\n{text}\n\nAnything else?") == [item.strip() for item in found]
    assert parse_list(json.dumps(found)) == [item.strip() for item in found]


@given(st.text(max_size=300))
def test_no_text_breaks_the_parser(text: str) -> None:
    assert all(isinstance(item, str) and item.strip() for item in parse_list(text))


def test_hostile_lists_take_no_time() -> None:
    start = time.monotonic()
    for text in ("- " * 100_000, "1. " * 100_000, "[" * 100_000, "\n" * 200_000, "```\n" * 50_000, "(" * 200_000):
        parse_list(text)
    assert time.monotonic() - start < 10


def test_duplicates_differ_in_more_than_case_and_punctuation() -> None:
    assert unique(["C", "C++", "C#", "c"]) == ["C", "C++", "C#"] and len(unique(["What is 3 + 4?", "What is 3 - 4?"])) == 2
    assert len(unique(["\U0001f600", "\U0001f601"])) == 2
    assert unique(["Bread!", "bread", "Bread and salt", "\u00c9t\u00e9", "\u00e9t\u00e9"]) == ["Bread!", "Bread and salt", "\u00c9t\u00e9"]


def test_yes_and_no_stand_at_the_beginning() -> None:
    assert parse_yes_no("Yes, it does.") and parse_yes_no("**YES**") and parse_yes_no(" yes") and parse_yes_no("No.") is False
    assert parse_yes_no("Maybe yes") is None and parse_yes_no("Nothing") is None and parse_yes_no("") is None
