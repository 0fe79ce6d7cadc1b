import time
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gristmill.core.errors import InputError
from gristmill.verify.ifeval import CHECKS, LANGUAGES, check_instructions, detect_language

FIRST_WORD = "length_constraints:nth_paragraph_first_word"
WORDS = ["mill", "stone", "flour", "river", "wheel", "grain", "sack", "baker"]

# Ids with kwargs as the benchmark has them.
KWARGS: dict[str, dict[str, Any]] = {
    "change_case:capital_word_frequency": {"capital_frequency": 3, "capital_relation": "at least"},
    "change_case:english_capital": {},
    "change_case:english_lowercase": {},
    "combination:repeat_prompt": {"prompt_to_repeat": "Write a riddle about a mill."},
    "combination:two_responses": {},
    "detectable_content:number_placeholders": {"num_placeholders": 2},
    "detectable_content:postscript": {"postscript_marker": "P.S."},
    "detectable_format:constrained_response": {},
    "detectable_format:json_format": {},
    "detectable_format:multiple_sections": {"num_sections": 2, "section_spliter": "SECTION"},
    "detectable_format:number_bullet_lists": {"num_bullets": 3},
    "detectable_format:number_highlighted_sections": {"num_highlights": 2},
    "detectable_format:title": {},
    "keywords:existence": {"keywords": ["mill", "stone"]},
    "keywords:forbidden_words": {"forbidden_words": ["sack", "rye"]},
    "keywords:frequency": {"keyword": "flour", "frequency": 2, "relation": "at least"},
    "keywords:letter_frequency": {"letter": "q", "let_frequency": 2, "let_relation": "less than"},
    "language:response_language": {"language": "de"},
    FIRST_WORD: {"num_paragraphs": 3, "nth_paragraph": 2, "first_word": "stones"},
    "length_constraints:number_paragraphs": {"num_paragraphs": 3},
    "length_constraints:number_sentences": {"num_sentences": 3, "relation": "at least"},
    "length_constraints:number_words": {"num_words": 5, "relation": "less than"},
    "punctuation:no_comma": {},
    "startend:end_checker": {"end_phrase": "Is there anything else?"},
    "startend:quotation": {},
}

# id -> answers that follow KWARGS[id], answers that do not
EXAMPLES: dict[str, tuple[list[str], list[str]]] = {
    "change_case:capital_word_frequency": (
        [
            "THE MILL IS old.",
            "A mill. I grind. OK",
            "WELL-MADE U.S. A1",
            "it CAN'T be SO",
            "I CANNOT",
            "*NOW* [OR] (NEVER)",
            "AND, OR: NOT",
            "A--B C",
        ],
        ["Two WORDS Here.", "The Mill Is Old", "1 2 3 $ 4 * 5", "AND/OR ELSE", "A:1B C"],
    ),
    "change_case:english_capital": (
        ["THE MILL IS OLD.", "IT IS 1 OF 2: A MILL!"],
        ["THE MILL is OLD.", "the mill is old.", "DIE M\u00dcHLE IST ALT UND DAS RAD IST NEU.", "123"],
    ),
    "change_case:english_lowercase": (
        ["the mill is old.", "mills turn; 1 of 2"],
        ["The mill is old.", "die m\u00fchle ist alt und das rad ist neu.", "123"],
    ),
    "combination:repeat_prompt": (
        ["Write a riddle about a mill.\nWhat turns?", "\n write a RIDDLE about a mill. It turns."],
        ["Sure! Write a riddle about a mill.", "Write a riddle.", '"Write a riddle about a mill."'],
    ),
    "combination:two_responses": (
        ["One.\n******\nTwo.", "******One.******Two.******"],
        ["One.", "One.******One.", "One.******Two.******Three.", "One.******\n******Two.", "One.***Two."],
    ),
    "detectable_content:number_placeholders": (
        ["Dear [name] of [town],", "[a][b]", "[[a] [b]", "[] [x y]", "[a]] [b]"],
        ["Dear [name],", "[a\nb] [c]", "]a[ b]", "[a [b [c]", ""],
    ),
    "detectable_content:postscript": (
        ["Bye.\nP.S. Write soon.", "bye p. s. write", "Bye. P.P.S. Write"],
        ["Bye. PS: write", "P.S write", "Postscript"],
    ),
    "detectable_format:constrained_response": (
        ["My answer is yes.", " Well. My answer is maybe. I think.\n"],
        ["My answer is Yes.", "Yes.", "My answer is perhaps."],
    ),
    "detectable_format:json_format": (
        ['{"a": [1, 2]}', '```json\n{"a": 1}\n```', '```\n"text"\n```', "```Json [1]```", "```JSON [1]```", " 7 "],
        ["{'a': 1}", '{"a": 1', 'Here: {"a": 1}', '```python\n{"a": 1}\n```', "```\n```"],
    ),
    "detectable_format:multiple_sections": (
        ["SECTION 1\nOne.\nSECTION 2\nTwo.", "SECTION1 SECTION22", "# SECTION 7: x **SECTION 8**"],
        ["SECTION 1\nOne.", "Section 1\nOne.\nSection 2\nTwo.", "SECTION A SECTION B", "SECTION  1 SECTION 2"],
    ),
    "detectable_format:number_bullet_lists": (
        ["* a\n* b\n* c", "- a\n  - b\n*c", "Three:\n\n\n* a\n\n - b\n\t* c\nDone.", "* a\n* b\n---", "*\n* a\n* b\n- c"],
        ["* a\n* b", "* a\n* b\n* c\n* d", "** a\n** b\n** c", "1. a\n2. b\n3. c", "a * b\nc - d\ne * f"],
    ),
    "detectable_format:number_highlighted_sections": (
        ["*one* and *two*", "**one** and **two**", "*a b* **c**"],
        ["*one*", "**one**", "* one\n* two\n* three", "** ** ***", "*a\nb* *c\nd"],
    ),
    "detectable_format:title": (
        ["<<Song of the mill>>\nLa.", "a <<b>> c", "<<<a>>>", "<<a>> <<b>>"],
        ["<Song>", "<<>>", "<< >>", "<<a\nb>>", ">>a<<", "<<<>>>", "<<a>"],
    ),
    "keywords:existence": (["The Millstones turn.", "stone and mill"], ["The mill turns.", "A stone.", "m ill st one"]),
    "keywords:forbidden_words": (["The sacks are full of dryest meal.", "flour"], ["A SACK of meal.", "rye-bread", "'rye'"]),
    "keywords:frequency": (["Flour, flour.", "flourflour FLOUR"], ["Flour.", "Fl our flou r"]),
    "keywords:letter_frequency": (["Queen", "mill"], ["Queen Quiet", "qQ"]),
    "language:response_language": (
        ["Die M\u00fchle steht an dem Fluss.", "123 !"],
        ["The mill is at the river.", "Le moulin est sur la rive."],
    ),
    FIRST_WORD: (
        ["One.\n\nStones grind.\n\nThree.", 'One\n\n"Stones", he said\n\n3', "One\n\n\tSTONES.\n\nThree\n\n", "1\n\nstones\n\n3\n\n\n\n"],
        [
            "One.\n\nStones grind.",
            "One\n\nMillstones\n\n3",
            "One\nstones\n\ntwo\n\nthree",
            "One\n\n\n\nStones\n\nThree",
            "stones\n\n2\n\n3",
            "*",
        ],
    ),
    "length_constraints:number_paragraphs": (
        ["One.\n***\nTwo.\n***\nThree.", "***\nOne.***Two.***Three.\n***\n"],
        ["One.\n\nTwo.\n\nThree.", "One.***Two.", "1***2***3***4", "1***\n***2***3", "***"],
    ),
    "length_constraints:number_sentences": (
        ["One. Two. Three.", "One! two? three", 'He said "go." She went. "Why?"', "1. Mill. 2.", "One. Two!!", "One.\n\n*Two.* Three."],
        [
            "One. Two.",
            "Mr. Mill of the U.S. Navy pays 3.50 at 9 a.m. sharp.",
            "One\n\nTwo\n\nThree",
            "E.g. this, i.e. J. S. Bach. Yes.",
            '"',
        ],
    ),
    "length_constraints:number_words": (["one two three four", "a-b c's", "..."], ["one two three four five", "a-b-c d's", "1 2 3 4.5"]),
    "punctuation:no_comma": (["One two; three", "\u4e00\u3001\u4e8c"], ["One, two", ","]),
    "startend:end_checker": (
        ["Yes. Is there anything else?", 'Yes. "is there ANYTHING else?" \n', "Is there anything else?"],
        ["Is there anything else? No.", "Is there anything else", "Is there anything else?*"],
    ),
    "startend:quotation": (['"Yes."', ' "a" and "b"\n', '""'], ['"Yes.', "'Yes.'", '"', "\u201cYes.\u201d", 'He said "yes"']),
}


def check(name: str, answer: str, loose: bool = False, **kwargs: Any) -> bool:
    """The verdict on one instruction; kwargs replace those of the table."""
    return check_instructions([{"id": name, **KWARGS[name], **kwargs}], answer, loose=loose)[0]


def test_the_25_instructions() -> None:
    assert set(CHECKS) == set(KWARGS) == set(EXAMPLES)
    assert len(CHECKS) == 25


@pytest.mark.parametrize("name", KWARGS)
def test_examples(name: str) -> None:
    right, wrong = EXAMPLES[name]
    assert [a for a in right if not check(name, a)] == []
    assert [a for a in wrong if check(name, a)] == []
    assert CHECKS[name](right[0], **KWARGS[name])


@pytest.mark.parametrize("loose", [False, True])
@pytest.mark.parametrize("name", KWARGS)
def test_an_empty_answer_follows_nothing(name: str, loose: bool) -> None:
    limits = {"relation": "less than", "let_relation": "less than", "capital_relation": "less than"}
    few = {key: value for key, value in limits.items() if key in KWARGS[name]}
    assert not any(check(name, empty, loose, **few) for empty in ["", " ", "\n\n", "\t\n"])


def test_relations_are_opposite() -> None:
    for relation, verdicts in {"at least": [True, True, False], "less than": [False, False, True]}.items():
        assert [check("length_constraints:number_words", "a b c", num_words=n, relation=relation) for n in (2, 3, 4)] == verdicts


def test_postscript_markers() -> None:
    name = "detectable_content:postscript"
    assert check(name, "Bye. P.P.S. Write", postscript_marker="P.P.S")
    assert check(name, "bye p. p. s write", postscript_marker="P.P.S")
    assert not check(name, "Bye. P.S. Write", postscript_marker="P.P.S")
    assert check(name, "Bye. ps: write", postscript_marker="PS:")
    assert not check(name, "Bye. Nota", postscript_marker="N.t")


def test_kwargs_are_no_patterns() -> None:
    assert not check("keywords:existence", "axb", keywords=["a.b"])
    assert check("keywords:existence", "a (b", keywords=["(b"])
    assert check("keywords:forbidden_words", "mill", forbidden_words=["m.ll"])
    assert not check("keywords:frequency", "ab", keyword="[ab]", frequency=1)
    assert check("detectable_format:multiple_sections", "* 1 * 2", section_spliter="*")


def test_any_character_is_a_letter() -> None:
    """The benchmark asks for `#` and `!` too."""
    name = "keywords:letter_frequency"
    for sign in ("#", "!", "A"):
        assert check(name, f"a{sign}b{sign}".replace("a", "."), letter=sign, let_frequency=2, let_relation="at least")
        assert not check(name, sign + "..", letter=sign, let_frequency=2, let_relation="at least")


def test_repeated_prompt_defaults_to_the_prompt() -> None:
    assert check_instructions([{"id": "combination:repeat_prompt"}], "Grind! Yes.", prompt="grind!") == [True]
    assert check_instructions([{"id": "combination:repeat_prompt", "prompt_to_repeat": None}], "Yes.", prompt="grind!") == [False]


@pytest.mark.parametrize(
    ("text", "num"),
    [
        ("Dr. Mill met Mrs. Stone. They ground.", 2),
        ("We sell oats, rye, etc. The mill is old.", 2),
        ("We sell oats, rye, etc. in sacks.", 1),
        ("Open till 5 p.m. We close then.", 2),
        ("It costs 3.50 or 1,000. That is all.", 2),
        ("1. Grind\n2. Bake", 3),
        ("Wait... what?", 1),
        ("Wait... What?", 2),
        ("Really?! Yes.", 2),
        ("Really?!", 2),
        ("(One.) Two.", 2),
        ("(One.)(Mr.) Two.", 1),
        ("They came in 3. place.", 1),
        ("\u201cOne.\u201d \u201cTwo.\u201d", 2),
        ("**One.** Two.", 2),
        ("**One.**", 2),
        ("One. two. three.", 3),
        ("a line without an end\n\nand another", 1),
        ("See www.mill.org for more.", 1),
        ("...", 1),
    ],
)
def test_sentences(text: str, num: int) -> None:
    name = "length_constraints:number_sentences"
    assert [check(name, text, num_sentences=n) for n in (num, num + 1)] == [True, False]


# ---- Answers with a known count, on both sides of the limit ----

some = st.integers(1, 12)
seeds = st.randoms(use_true_random=True)


def at_least(name: str, answer: str, key: str, num: int, **kwargs: Any) -> bool:
    """Whether a check that wants at least so many draws the line between `num` and one more."""
    return check(name, answer, **{key: num}, **kwargs) and not check(name, answer, **{key: num + 1}, **kwargs)


def both(name: str, answer: str, key: str, relation: str, num: int, **kwargs: Any) -> bool:
    """The same for a check that takes a relation, in both of its forms."""
    less = [check(name, answer, **{key: n, relation: "less than"}, **kwargs) for n in (num, num + 1)]
    return at_least(name, answer, key, num, **{relation: "at least"}, **kwargs) and less == [False, True]


def phrase(rng: Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, 5)))


@given(some, seeds)
def test_counted_words(num: int, rng: Random) -> None:
    answer = "".join(rng.choice(WORDS) + rng.choice([" ", ", ", "\n\n", " - ", "."]) for _ in range(num))
    assert both("length_constraints:number_words", answer, "num_words", "relation", num)


@given(some, seeds)
def test_counted_sentences(num: int, rng: Random) -> None:
    sentences = [phrase(rng).capitalize() + rng.choice([".", "!", "?", '."', ".)"]) for _ in range(num)]
    assert both("length_constraints:number_sentences", rng.choice([" ", "\n\n"]).join(sentences), "num_sentences", "relation", num)


@given(some, seeds)
def test_counted_keywords(num: int, rng: Random) -> None:
    words = rng.choices(["oat", "OAT", "Oats", "oatmeal"], k=num) + rng.choices(WORDS, k=5)
    rng.shuffle(words)
    assert both("keywords:frequency", " ".join(words), "frequency", "relation", num, keyword=" oat")


@given(some, seeds)
def test_counted_letters(num: int, rng: Random) -> None:
    letters = rng.choices("zZ", k=num) + list(phrase(rng))
    rng.shuffle(letters)
    assert both("keywords:letter_frequency", "".join(letters), "let_frequency", "let_relation", num, letter="z")


@given(some, seeds)
def test_counted_capitals(num: int, rng: Random) -> None:
    words = [f"{rng.choice(['', '(', '*', chr(34)])}{w.upper()}{rng.choice(['', '.', ',', '!', ')'])}" for w in rng.choices(WORDS, k=num)]
    words += [w.capitalize() for w in rng.choices(WORDS, k=5)] + ["4", "-"]
    rng.shuffle(words)
    assert both("change_case:capital_word_frequency", " ".join(words), "capital_frequency", "capital_relation", num)


@given(some, seeds)
def test_counted_placeholders(num: int, rng: Random) -> None:
    answer = "".join(phrase(rng) + rng.choice([" ", "\n"]) + f"[{phrase(rng)}]" for _ in range(num)) + rng.choice(["", " [", "]"])
    assert at_least("detectable_content:number_placeholders", answer, "num_placeholders", num)


@given(some, seeds)
def test_counted_highlights(num: int, rng: Random) -> None:
    answer = "".join(f"{phrase(rng)} {stars}{phrase(rng)}{stars}\n" for stars in rng.choices(["*", "**"], k=num))
    assert at_least("detectable_format:number_highlighted_sections", answer, "num_highlights", num)


@given(some, seeds)
def test_counted_sections(num: int, rng: Random) -> None:
    answer = "".join(f"{rng.choice(['', '# ', '**'])}Day {i}{rng.choice([' ', ': ', chr(10)])}{phrase(rng)}\n" for i in range(1, num + 1))
    assert at_least("detectable_format:multiple_sections", answer, "num_sections", num, section_spliter="Day")


def exactly(name: str, answer: str, key: str, num: int) -> bool:
    return [check(name, answer, **{key: n}) for n in (num - 1, num, num + 1)] == [False, True, False]


@given(some, seeds)
def test_counted_bullets(num: int, rng: Random) -> None:
    lines = [rng.choice(["* ", "- ", "  * ", "\t- "]) + phrase(rng) for _ in range(num)] + ["", phrase(rng), "**bold** " + phrase(rng)]
    rng.shuffle(lines)
    assert exactly("detectable_format:number_bullet_lists", "\n".join(lines), "num_bullets", num)


@given(some, seeds)
def test_counted_paragraphs(num: int, rng: Random) -> None:
    answer = rng.choice(["\n***\n", "***", "\n\n*** \n"]).join(phrase(rng) + "\n\n" + phrase(rng) for _ in range(num))
    answer = rng.choice(["", "***\n"]) + answer + rng.choice(["", "\n***"])
    assert exactly("length_constraints:number_paragraphs", answer, "num_paragraphs", num)


@given(some, seeds)
def test_first_words(num: int, rng: Random) -> None:
    nth = rng.randint(1, num)
    paragraphs = [phrase(rng) + ".\n" + phrase(rng) for _ in range(num)]
    paragraphs[nth - 1] = rng.choice(["Rye", "rye,", '"RYE"']) + " " + paragraphs[nth - 1]
    for wanted, count, verdict in [("rye", num, True), ("oats", num, False), ("rye", num + 1, False)]:
        answer = "\n\n".join(paragraphs)
        assert check(FIRST_WORD, answer, num_paragraphs=count, nth_paragraph=nth, first_word=wanted) is verdict


@given(st.text(alphabet="ab.*\n\"[]<>-1 ,'", max_size=40), st.sampled_from(sorted(KWARGS)))
def test_loose_accepts_what_strict_accepts(answer: str, name: str) -> None:
    assert check(name, answer, loose=True) or not check(name, answer)


# ---- Loose form ----


@pytest.mark.parametrize(
    ("name", "answer", "kwargs"),
    [
        ("startend:quotation", 'Sure:\n"The mill."', {}),
        ("startend:quotation", '"The mill."\nHope it helps!', {}),
        ("startend:quotation", 'Sure:\n"The mill."\nHope it helps!', {}),
        ("startend:quotation", '*"The mill."*', {}),
        ("startend:quotation", 'Sure, *here*:\n\n*"The mill."*\n\nHope it helps!', {}),
        ("startend:end_checker", "**Is there anything else?**", {}),
        ("combination:repeat_prompt", "Sure!\n**Write a riddle about a mill.** What turns?", {}),
        ("detectable_format:json_format", 'Here it is:\n```json\n{"a": 1}\n```', {}),
        ("punctuation:no_comma", "Sure, here:\nThe mill turns.", {}),
        ("length_constraints:number_words", "one two\nthree four five", {}),
    ],
)
def test_loose(name: str, answer: str, kwargs: dict[str, Any]) -> None:
    assert [check(name, answer, loose, **kwargs) for loose in (False, True)] == [False, True]


def test_loose_is_no_free_pass() -> None:
    assert not check("startend:quotation", 'One\nTwo\n"The mill."\nThree', loose=True)
    assert not check("punctuation:no_comma", "a\nb, c\nd", loose=True)


def test_each_instruction_may_hold_in_a_variant_of_its_own() -> None:
    checks = [{"id": "punctuation:no_comma"}, {"id": "detectable_format:number_highlighted_sections", "num_highlights": 1}]
    assert check_instructions(checks, "*Sure*, here:\nThe mill.") == [False, True]
    assert check_instructions(checks, "*Sure*, here:\nThe mill.", loose=True) == [True, True]


# ---- Language ----

TEXTS = {
    "ar": (
        "\u0647\u0630\u0647 \u0645\u062f\u064a\u0646\u0629 \u0642\u062f\u064a\u0645\u0629 \u0639\u0644\u0649 "
        "\u0627\u0644\u0646\u0647\u0631 \u0648\u0641\u064a\u0647\u0627 \u0633\u0648\u0642 \u0643\u0628\u064a\u0631"
    ),
    "bg": (
        "\u0422\u043e\u0432\u0430 \u0435 \u0441\u0442\u0430\u0440\u0430 \u043c\u0435\u043b\u043d\u0438\u0446\u0430 \u0438 \u0442\u044f "
        "\u0441\u0435 \u043d\u0430\u043c\u0438\u0440\u0430 \u0434\u043e \u0440\u0435\u043a\u0430\u0442\u0430, \u0437\u0430 "
        "\u0434\u0430 \u043c\u0435\u043b\u0438 \u0436\u0438\u0442\u043e."
    ),
    "bn": "\u098f\u099f\u09bf \u098f\u0995\u099f\u09bf \u09aa\u09c1\u09b0\u09be\u09a8\u09cb \u0995\u09b2",
    "de": "Das ist eine alte M\u00fchle und sie steht am Fluss.",
    "en": "This is an old mill and it stands by the river.",
    "es": "Este es un molino viejo que est\u00e1 en la orilla del r\u00edo.",
    "fa": (
        "\u0627\u06cc\u0646 \u06cc\u06a9 \u0634\u0647\u0631 \u0642\u062f\u06cc\u0645\u06cc \u0627\u0633\u062a \u06a9\u0647 "
        "\u062f\u0631 \u06a9\u0646\u0627\u0631 \u0631\u0648\u062f\u062e\u0627\u0646\u0647 \u0642\u0631\u0627\u0631 "
        "\u062f\u0627\u0631\u062f"
    ),
    "fi": "T\u00e4m\u00e4 on vanha mylly ja se on joen rannalla.",
    "fr": "Ce moulin est vieux et il est sur la rive du fleuve.",
    "gu": "\u0a86 \u0a8f\u0a95 \u0a9c\u0ac2\u0aa8\u0ac0 \u0aae\u0abf\u0ab2 \u0a9b\u0ac7",
    "he": "\u05d6\u05d5 \u05d8\u05d7\u05e0\u05d4 \u05d9\u05e9\u05e0\u05d4",
    "hi": (
        "\u092f\u0939 \u0928\u0926\u0940 \u0915\u0947 \u0915\u093f\u0928\u093e\u0930\u0947 \u0915\u0940 \u090f\u0915 "
        "\u092a\u0941\u0930\u093e\u0928\u0940 \u091a\u0915\u094d\u0915\u0940 \u0939\u0948"
    ),
    "it": "Questo \u00e8 un vecchio mulino che si trova sulla riva del fiume.",
    "ja": "\u3053\u308c\u306f\u53e4\u3044\u6c34\u8eca\u5c0f\u5c4b\u3067\u3059",
    "kn": "\u0c87\u0ca6\u0cc1 \u0cb9\u0cb3\u0cc6\u0caf \u0c97\u0cbf\u0cb0\u0ca3\u0cbf",
    "ko": "\uc774\uac83\uc740 \uc624\ub798\ub41c \ubc29\uc557\uac04\uc785\ub2c8\ub2e4",
    "ml": "\u0d07\u0d24\u0d4d \u0d12\u0d30\u0d41 \u0d2a\u0d34\u0d2f \u0d2e\u0d3f\u0d32\u0d4d\u0d32\u0d3e\u0d23\u0d4d",
    "mr": (
        "\u0939\u0940 \u0928\u0926\u0940\u0915\u093e\u0920\u091a\u0940 \u091c\u0941\u0928\u0940 \u0917\u093f\u0930\u0923\u0940 "
        "\u0906\u0939\u0947 \u0906\u0923\u093f \u0924\u0940 \u092e\u094b\u0920\u0940 \u0906\u0939\u0947"
    ),
    "ne": (
        "\u092f\u094b \u0928\u0926\u0940 \u0915\u093f\u0928\u093e\u0930\u0915\u094b \u092a\u0941\u0930\u093e\u0928\u094b "
        "\u0918\u091f\u094d\u091f \u0939\u094b \u0930 \u092f\u094b \u0920\u0942\u0932\u094b \u091b"
    ),
    "pa": "\u0a07\u0a39 \u0a07\u0a71\u0a15 \u0a2a\u0a41\u0a30\u0a3e\u0a23\u0a40 \u0a1a\u0a71\u0a15\u0a40 \u0a39\u0a48",
    "pl": "To jest stary m\u0142yn, kt\u00f3ry stoi nad rzek\u0105.",
    "pt": "Este \u00e9 um moinho velho que fica na margem do rio e n\u00e3o para.",
    "ru": (
        "\u042d\u0442\u043e \u0441\u0442\u0430\u0440\u0430\u044f \u043c\u0435\u043b\u044c\u043d\u0438\u0446\u0430, "
        "\u043a\u043e\u0442\u043e\u0440\u0430\u044f \u0441\u0442\u043e\u0438\u0442 \u0443 \u0440\u0435\u043a\u0438."
    ),
    "sw": "Hii ni kinu cha zamani na kipo karibu na mto.",
    "ta": "\u0b87\u0ba4\u0bc1 \u0b92\u0bb0\u0bc1 \u0baa\u0bb4\u0bc8\u0baf \u0b86\u0bb2\u0bc8",
    "te": "\u0c07\u0c26\u0c3f \u0c2a\u0c3e\u0c24 \u0c2e\u0c3f\u0c32\u0c4d\u0c32\u0c41",
    "th": "\u0e19\u0e35\u0e48\u0e04\u0e37\u0e2d\u0e42\u0e23\u0e07\u0e2a\u0e35\u0e40\u0e01\u0e48\u0e32",
    "uk": (
        "\u0426\u0435 \u0441\u0442\u0430\u0440\u0438\u0439 \u043c\u043b\u0438\u043d, \u044f\u043a\u0438\u0439 "
        "\u0441\u0442\u043e\u0457\u0442\u044c \u0431\u0456\u043b\u044f \u0440\u0456\u0447\u043a\u0438."
    ),
    "ur": (
        "\u06cc\u06c1 \u062f\u0631\u06cc\u0627 \u06a9\u06d2 \u06a9\u0646\u0627\u0631\u06d2 \u0627\u06cc\u06a9 "
        "\u067e\u0631\u0627\u0646\u06cc \u0686\u06a9\u06cc \u06c1\u06d2"
    ),
    "vi": "\u0110\u00e2y l\u00e0 m\u1ed9t c\u1ed1i xay c\u0169 \u1edf b\u00ean b\u1edd s\u00f4ng.",
    "zh": "\u8fd9\u662f\u4e00\u5ea7\u8001\u78e8\u574a",
}


def test_languages() -> None:
    assert set(TEXTS) == LANGUAGES
    assert {code: detect_language(text) for code, text in TEXTS.items()} == {code: code for code in TEXTS}
    assert {code: detect_language(text.upper()) for code, text in TEXTS.items()} == {code: code for code in TEXTS}
    for code, text in TEXTS.items():
        verdicts = {other for other in LANGUAGES if check("language:response_language", text, language=other)}
        assert verdicts == {code}


@pytest.mark.parametrize("text", ["", "42 + 1!", "\U0001f600 \u2764\ufe0f"])
def test_no_language(text: str) -> None:
    assert detect_language(text) is None
    assert check("language:response_language", text, language="hi") is bool(text)


def test_other_languages() -> None:
    assert detect_language("\u0395\u03bb\u03bb\u03ac\u03b4\u03b1") == "other"
    assert detect_language("Xyzzy") == "en"


def test_mixed_scripts() -> None:
    assert detect_language(TEXTS["zh"] + TEXTS["zh"] + "\u306e") == "zh"
    assert detect_language("\u6771\u4eac\u90fd\u6c34\u9053\u5c40\u306e\u767a\u8868") == "ja"
    assert detect_language("\u0915\u093f \u0915\u093f mil") == "hi"  # vowel signs count as the letters that they are
    assert detect_language("\u0915\u093f \u0915\u093f mills") == "en"


# ---- Errors ----


@pytest.mark.parametrize(
    ("entry", "named"),
    [
        ({"id": "keywords:nonsense"}, "keywords:nonsense"),
        ({"id": ["startend:quotation"]}, "no known id"),
        ({"num_words": 3}, "no known id"),
        ("startend:quotation", "no known id"),
        ({"id": "length_constraints:number_words", "num_words": 3}, "number_words lacks relation"),
        ({"id": "length_constraints:number_words", "num_words": None, "relation": "at least"}, "lacks num_words"),
        ({"id": "startend:quotation", "mark": "'"}, "no use for mark"),
        ({"id": "length_constraints:number_words", "num_words": 3, "relation": "at most"}, "relation 'at most'"),
        ({"id": "length_constraints:number_words", "num_words": -1, "relation": "at least"}, "num_words -1"),
        ({"id": "length_constraints:number_words", "num_words": "3", "relation": "at least"}, "num_words '3'"),
        ({"id": "length_constraints:number_words", "num_words": True, "relation": "at least"}, "num_words True"),
        ({"id": "keywords:letter_frequency", "letter": "ab", "let_frequency": 1, "let_relation": "at least"}, "letter 'ab'"),
        ({"id": "keywords:letter_frequency", "letter": " ", "let_frequency": 1, "let_relation": "at least"}, "letter ' '"),
        ({"id": "keywords:letter_frequency", "letter": "a", "let_frequency": 0.5, "let_relation": "at least"}, "let_frequency 0.5"),
        ({"id": "keywords:existence", "keywords": []}, "keywords []"),
        ({"id": "keywords:existence", "keywords": "mill"}, "keywords 'mill'"),
        ({"id": "keywords:forbidden_words", "forbidden_words": ["mill", ""]}, "forbidden_words"),
        ({"id": "language:response_language", "language": "xx"}, "language 'xx'"),
        ({"id": "language:response_language", "language": ["de"]}, "language"),
        ({"id": "combination:repeat_prompt"}, "lacks prompt_to_repeat"),
        ({"id": "startend:end_checker", "end_phrase": " "}, "end_phrase ' '"),
        ({"id": FIRST_WORD, "num_paragraphs": 2, "nth_paragraph": 3, "first_word": "a"}, "beyond"),
        ({"id": FIRST_WORD, "num_paragraphs": 2, "nth_paragraph": 0, "first_word": "a"}, "nth_paragraph 0"),
    ],
)
@pytest.mark.parametrize("answer", ["The mill.", ""])
def test_errors(entry: Any, named: str, answer: str) -> None:
    with pytest.raises(InputError) as error:
        check_instructions([{"id": "startend:quotation"}, entry], answer)
    assert named in str(error.value)


def test_kwargs_that_are_none_are_ignored() -> None:
    """Some copies of the benchmark give every instruction every kwarg."""
    every = dict.fromkeys(key for kwargs in KWARGS.values() for key in kwargs)
    for name, kwargs in KWARGS.items():
        assert check_instructions([{"id": name, **every, **kwargs}], EXAMPLES[name][0][0]) == [True]


# ---- Hostile text ----


@pytest.mark.parametrize("piece", ["*", "[", "<", " ", "\n", "<<a", ". ", "a", "- \n", "```", "{", "'", "p. ", "SECTION 1"])
def test_hostile_text_costs_no_time(piece: str) -> None:
    answer = (piece * 200_000)[:200_000] + "x"
    for name, kwargs in KWARGS.items():
        start = time.process_time()
        CHECKS[name](answer, **kwargs)
        assert time.process_time() - start < 10, name  # of minutes, where it goes wrong
