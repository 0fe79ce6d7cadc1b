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
    start = time.process_time()
    for text in ("- " * 100_000, "1. " * 100_000, "[" * 100_000, "\n" * 200_000, "```\n" * 50_000, "(" * 200_000):
        parse_list(text)
    assert time.process_time() - start < 30


def test_duplicates_differ_in_more_than_case_and_punctuation() -> None:
    assert unique(["C", "C++", "C#", "c"]) == ["C", "C++", "C#"] and len(unique(["What is 3 + 4?", "What is 3 - 4?"])) == 2
    assert len(unique(["\U0001f600", "\U0001f601"])) == 2
    assert unique(["Bread!", "bread", "Bread and salt", "\u00c9t\u00e9", "\u00e9t\u00e9"]) == ["Bread!", "Bread and salt", "\u00c9t\u00e9"]


def test_yes_and_no_stand_at_the_beginning() -> None:
    assert parse_yes_no("Yes, it does.") and parse_yes_no("**YES**") and parse_yes_no(" yes") and parse_yes_no("No.") is False
    assert parse_yes_no("<think>No?</think>\n**Answer:** yes") and parse_yes_no("<think>yes") is None
    assert parse_yes_no("Judgment: yes") and parse_yes_no("1. Yes") and parse_yes_no("Result: no") is False
    assert parse_yes_no("The answer is no.") is False and parse_yes_no("\\boxed{Yes}") and parse_yes_no("Yes/No: no") is None
    assert parse_yes_no("Maybe yes") is None and parse_yes_no("Nothing") is None and parse_yes_no("") is None


@pytest.mark.parametrize(
    "text",
    [
        "<think>\n1. no\n2. neither\n</think>\n1. Oats\n2. Rye",
        "1. no\n2. neither\n</think>\n\n- Oats\n- Rye",
        "**1. Oats**\n**2. Rye**",
        "**1.** Oats\n**2.** Rye",
        "__1) Oats__\n__2) Rye__",
        "### 1. Oats\n### 2. **Rye**",
        "> 1. Oats\n> 2. Rye",
        "1\\. Oats\n2\\. Rye",
        "[1] Oats\n[2] Rye",
        "Topic 1: Oats\nTopic 2: Rye",
        "Topic 1\nOats\n\nTopic 2\nRye",
        "Certainly! 1. Oats\n2. Rye",
        "#1 Oats\n#2 Rye",
        "1\u00ba Oats\n2\u00ba Rye",
        "\u2160. Oats\n\u2161. Rye",
        '"Oats",\n"Rye"',
        '[\n  "Oats"\n  "Rye"\n]',
        '[\n  "Oats",  # sown in spring\n  "Rye",  // in autumn\n]',
        "<crops>\nOats\nRye\n</crops>",
        "1\uff0e Oats\n2\uff0e Rye",
        "- [ ] Oats\n- [x] Rye",
        "\u25cf Oats\n\u25cf Rye",
        "### Grain\n1. Oats\n\n### More grain\n2. Rye\n\n---\nAnything else?",
        "**Grain**\n- Oats\n\n**More grain**\n- Rye",
        "# Grain\n\nOats\nRye",
        "## Oats\n## Rye",
        "**Oats**\n**Rye**",
        "```\nOats\nRye\n```",
        '```json\n[\n  "Oats",\n  "Rye",\n]\n```',
        '~~~\n["Oats", "Rye"]\n~~~',
        '```json\n["Oats", "Rye"]',
        '["Oats",\n "Rye"',
        "['Oats', 'Rye',]",
        "[\u201cOats\u201d, \u201cRye\u201d]",
        'grains = ["Oats", "Rye"]',
        'Here they are: ["Oats", "Rye"].\nAnything else?',
        "[{'topic': 'Oats'}, {'topic': 'Rye'},]",
        '[\n  // the first\n  "Oats",\n  "Rye"\n]',
        "***1. Oats***\n***2. Rye***",
        "<ol>\n<li>Oats</li>\n<li>Rye</li>\n</ol>",
        '{"grains": ["Oats", "Rye"]}',
        '{"1": "Oats", "2": "Rye"}',
        '{"topic": "Oats"}\n{"topic": "Rye"}',
        '{"questions": {"q1": "Oats", "q2": "Rye"}}',
        "<topics>\n<topic>Oats</topic>\n<topic>Rye</topic>\n</topics>",
        "1. *Oats*\n2. _Rye_",
        "> 1. Oats\n>\n> 2. Rye",
        "I. Oats\nII. Rye",
        "i) Oats\nii) Rye",
        "1\ufe0f\u20e3 Oats\n2\ufe0f\u20e3 Rye",
        "\u2460 Oats\n\u2461 Rye",
        "\uff11\u3001Oats\n\uff12\u3001Rye",
        "\uff081\uff09Oats\n\uff082\uff09Rye",
        "\u4e00\u3001Oats\n\u4e8c\u3001Rye",
        "\u2705 Oats\n\u2192 Rye",
        "\u30fbOats\n\u30fbRye",
        "Step 1: Oats\nStep 2: Rye",
        "Q1: Oats\nQ2: Rye",
        "1 - Oats\n2 - Rye",
        "1.Oats\n2.Rye",
        '[{"id": "a", "title": "Oats", "why": "x"}, {"id": "b", "title": "Rye", "why": "y"}]',
    ],
)
def test_marks_fences_and_thinking_are_no_part_of_an_item(text: str) -> None:
    assert parse_list(text) == ["Oats", "Rye"]


@pytest.mark.parametrize(
    "items",
    [
        ['Say what f(["a", "b"]) gives.', "Sort it."],
        ['Take the list\n["a", "b"]\nand turn it round.', "Sort it."],
        ["Write this:\n```python\ndef f():\n    # - x\n    return []\n```", "Sort it."],
        ["What does __init__ do?", "__slots__ and memory", "2 ** 3 ** 4", "**Kwargs"],
        ["Bees: the winter", "It's a hive"],
    ],
)
def test_arrays_code_and_stars_within_an_item_stay(items: list[str]) -> None:
    assert parse_list("\n".join(f"{n}. " + item.replace("\n", "\n   ") for n, item in enumerate(items, 1))) == items
    assert parse_list("\n\n".join("- " + item.replace("\n", "\n  ") for item in items) + "\n\nThat is all.") == items
    assert parse_list(json.dumps(items)) == items


def test_titles_lose_their_emphasis_and_quotes_within_an_array_stay() -> None:
    assert parse_list("1. **Bees**: the winter\n2. **Oats:** the price") == ["Bees: the winter", "Oats: the price"]
    assert parse_list("['It's here', 'say \"hi\" now']") == ["It's here", 'say "hi" now']


@pytest.mark.parametrize("text", ["[1, 2,\n 3]", '{\n "a": 1\n}', "[Oats, Rye]", "[[\n1],\n[2]]"])
def test_brackets_and_numbers_are_no_items(text: str) -> None:
    assert parse_list(text) == []


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("a) Bees\nb) Ants\n   of the wood\nc) Cats", ["Bees", "Ants\nof the wood", "Cats"]),
        ("(A) Bees\n(B) Ants", ["Bees", "Ants"]),
        ("**a.** Bees\n**b.** Ants", ["Bees", "Ants"]),
        ("1. Which?\n   a) Bees\n   b) Ants\n2. Why?", ["Which?\na) Bees\nb) Ants", "Why?"]),
        ("I. Newton wrote this,\nand more", ["I. Newton wrote this,", "and more"]),
        ("1. Bees 2. Ants 3. Cats", ["Bees", "Ants", "Cats"]),
        ("1. Bees\n2. Ants\n\nNote: 3. is missing", ["Bees", "Ants"]),
        ("1. What step 2. does", ["What step 2. does"]),
        ("1.5 is what?\n2.5 is what?", ["1.5 is what?", "2.5 is what?"]),
        ("1 - 3 = ?\n2 - 5 = ?", ["1 - 3 = ?", "2 - 5 = ?"]),
        ("1984. A novel\n2001. A film", ["1984. A novel", "2001. A film"]),
        ("A: Hello\nB: Good day", ["A: Hello", "B: Good day"]),
        (
            "\n".join(f"{c}\u3001x{c}" for c in ["一", "二", "三", "四", "五", "六", "七", "八", "九", "十", "十一"]),
            [f"x{c}" for c in ["一", "二", "三", "四", "五", "六", "七", "八", "九", "十", "十一"]],
        ),
        ("Here:\n\n| # | Topic | Why |\n|---|:---:|---|\n| 1 | Bees | honey |\n| 2 | **Ants** | work |\n\nBye", ["Bees", "Ants"]),
        ("Animal | Legs\n--- | ---\nCat \\| dog | 4\nBird | 2", ["Cat | dog", "Bird"]),
    ],
)
def test_letters_that_run_on_and_tables_are_lists(text: str, items: list[str]) -> None:
    assert parse_list(text) == items
