import random
import time
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gristmill.core.errors import InputError
from gristmill.miniature import lists
from gristmill.verify.verify import check_truth, last_number, verify

# ---- number ----


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("18", 18),
        ("The answer is 18.", 18),
        ("1,234,567.50 coins", Fraction(2469135, 2)),
        ("so 3/4", Fraction(3, 4)),
        ("1.5/2", Fraction(3, 4)),
        ("$\\boxed{42}$", 42),
        ("**42**", 42),
        ("1, 2, 3", 3),
        ("1,2", 2),
        ("12,34,5", 5),
        ("1,2345", 2345),
        ("100,", 100),
        ("50 %", 50),
        (".5", Fraction(1, 2)),
        ("-.5", Fraction(-1, 2)),
        ("well...5", 5),
        ("2e3", 2000),
        ("1.5E-2", Fraction(3, 200)),
        ("-7", -7),
        ("x = -7", -7),
        ("(-7)", -7),
        ("\u22127", -7),
        ("-$7.25", Fraction(-29, 4)),
        ("$-7", -7),
        ("20-13", 13),
        ("20 - 13 = 7", 7),
        ("(20)-13", 13),
        ("COVID-19", 19),
        ("It is \u00bd.", Fraction(1, 2)),
        ("3\u00bd cups", Fraction(7, 2)),
        ("3 \u00bd", Fraction(7, 2)),
        ("3 1/2", Fraction(7, 2)),
        ("2 5/2", Fraction(5, 2)),
        ("\\frac{3}{4}", Fraction(3, 4)),
        ("$3\\frac12$", Fraction(7, 2)),
        ("The answer is not 4.\nIt is 5", 5),
        ("5, not 4", 5),
        ("5 rather than 4", 5),
        ("1 000 000", 10**6),
        ("1\u202f000 and 1'500", 1500),
        ("$1{,}000$", 1000),
        ("1.5 \u00d7 10^3", 1500),
        ("$1.5 \\times 10^{-3}$", Fraction(3, 2000)),
        ("10\u00b3", 1000),
        ("5 m^2", 5),
        ("5 cm\u00b2", 5),
        ("the answer is minus 3", -3),
        ("negative 3", -3),
        ("20 minus 13", 13),
        ("05", 5),
        ("It costs 1.234.567 in all", 1234567),
        ("1.234,50", Fraction(2469, 2)),
    ],
)
def test_last_number(text: str, number: Fraction | int) -> None:
    assert last_number(text) == number


@pytest.mark.parametrize(
    "text", ["", "none", "-", ".", "$", "3/0", "5 and then 3/0", "The answer is not 4.", "It isn't 4", "it can't be 4", "never $4$"]
)
def test_no_number(text: str) -> None:
    assert last_number(text) is None


@given(
    st.integers(-(10**12), 10**12),
    st.sampled_from(["{}", "{}.", "It is {} apples.", "1 + 2 = {}\n", "**{}**"]),
)
def test_integers_plain_and_with_commas(n: int, frame: str) -> None:
    assert verify({"kind": "number", "value": n}, frame.format(n))
    assert verify({"kind": "number", "value": f"{n:,}"}, frame.format(n))
    assert verify({"kind": "number", "value": n}, frame.format(f"{n:,}"))
    assert not verify({"kind": "number", "value": n + 1}, frame.format(n))


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_float_is_its_own_truth(x: float) -> None:
    assert verify({"kind": "number", "value": x}, f"The answer is {x!r}.")


@given(st.text(alphabet="0123456789,.-/$eE() x", max_size=40))
def test_any_text_is_read(text: str) -> None:
    assert last_number(text) is None or isinstance(last_number(text), Fraction)


@pytest.mark.parametrize("text", ["9" * 300_000, "1," * 150_000, "1e999999999", "1/" * 150_000, "-$" * 150_000])
def test_hostile_numbers_are_read_at_once(text: str) -> None:
    started = time.process_time()
    last_number(text)
    assert time.process_time() - started < 20


def test_an_answer_without_a_number_is_wrong() -> None:
    assert not verify({"kind": "number", "value": 0}, "no idea")


def test_a_remark_behind_the_box_is_no_answer() -> None:
    text = "\\boxed{5}. I used 3 steps."
    assert verify({"kind": "number", "value": 5}, text) and not verify({"kind": "number", "value": 3}, text)


# ---- exact, mention, choice ----


def test_exact_ignores_case_and_white_space_only() -> None:
    truth = {"kind": "exact", "value": "Not  now"}
    assert verify(truth, "  not NOW\n")
    assert not verify(truth, "not now.") and not verify(truth, "notnow") and not verify(truth, "")
    assert verify({"kind": "exact", "value": 12}, "12")
    assert verify({"kind": "exact", "value": "don't: caf\u00e9, -1"}, "don\u2019t: cafe\u0301, \u22121")
    assert not verify({"kind": "exact", "value": "C#"}, "C") and not verify({"kind": "exact", "value": "C"}, "C++")


@pytest.mark.parametrize(
    ("value", "wrong", "answer", "right"),
    [
        ("gold", ["red"], "The flag is GOLD.", True),
        ("gold", ["red"], "The flag is golden.", False),
        ("gold", ["red"], "gold, or maybe red", False),
        ("gold", ["red"], "It is coloured.", False),
        ("gold", ["red"], "a gold-rimmed one", True),
        ("red", [], "hundred", False),
        ("New York", ["York"], "It is New York.", True),
        ("New York", ["York"], "New\nYork", True),
        ("New  York", [], "new york", True),
        ("New York", ["York"], "New York, not York", False),
        ("York", ["New York"], "It is York.", True),
        ("York", ["New York"], "It is New York.", False),
        ("C++", ["C"], "Use C++!", True),
        ("a.b", [], "a-b", False),
        ("gold", [""], "gold", True),
    ],
)
def test_mention(value: str, wrong: list[str], answer: str, right: bool) -> None:
    assert verify({"kind": "mention", "value": value, "not": wrong}, answer) is right


def test_mention_needs_no_wrong_values() -> None:
    assert verify({"kind": "mention", "value": "gold"}, "gold and red")


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("**B**", "B"),
        ("A or B? B, I think.", "B"),
        ("The answer is B. I hope this helps.", "B"),
        ("The answer is B. A cat has four legs.", "B"),
        ("The answer is (B), since A and C fail", "B"),
        ("Answer: C\nAnswer: B", "B"),
        ("Not A. The answer is:\n B", "B"),
        ("Option A is wrong, so B", "B"),
        ("I am sure that A is right", "A"),
        ("I'm for C", "C"),
        ("I", "I"),
        ("It is \\boxed{D}", "D"),
        ("\\boxed{\\text{B}}, for A is too long", "B"),
        ("b", "B"),
        ("(b)", "B"),
        ("b) Paris", "B"),
        ("B. Paris, as C is wrong", "B"),
        ("The answer is (b).", "B"),
        ("The correct option is B, since C is too small.", "B"),
        ("The answer is option B. D is wrong.", "B"),
        ("I choose B over D. D is too long.", "B"),
        ("The answer is B and A is wrong", "B"),
        ("The answer is not A. It is B.", "B"),
        ("\uff22", "B"),
        ("\u24b7", "B"),
        ("B\n\nA is wrong, C is wrong.", "B"),
        ("A) Paris\nB) Rome\n\nAnswer: B", "B"),
        ("The answer is b) Paris", "B"),
        ("I think it is B because A is too long", "B"),
        ("B is the answer, A is not.", "B"),
        ("\u6b63\u786e\u7b54\u6848\u4e3aB\u3002A\u4e0d\u5bf9", "B"),
        ("B<|im_end|>\n<|im_start|>user\nAnd A?", "B"),
    ],
)
def test_choice(answer: str, letter: str) -> None:
    assert verify({"kind": "choice", "value": letter}, answer)
    assert verify({"kind": "choice", "value": letter.lower()}, answer)
    assert not verify({"kind": "choice", "value": "Z"}, answer)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "none of them",
        "ABBA",
        "I think so",
        "A good question",
        "A or B",
        "The answer is A or B.",
        "Both (A) and (B)",
        "It is not A.",
        "(A) and (B)",
    ],
)
def test_an_answer_without_a_letter_is_wrong(answer: str) -> None:
    for letter in "ABI":
        assert not verify({"kind": "choice", "value": letter}, answer)


# ---- code ----


def test_code_is_handed_to_the_sandbox_and_never_run_here() -> None:
    seen: list[tuple[str, str]] = []

    def run_code(program: str, tests: str) -> bool:
        seen.append((program, tests))
        return len(seen) == 1

    truth = {"kind": "code", "tests": "assert f(1) == 1"}
    program = "raise SystemExit('run outside the sandbox')"
    assert verify(truth, f"```python\n{program}\n```", run_code)
    assert not verify(truth, program, run_code)
    assert seen == [(program + "\n", truth["tests"]), (program, truth["tests"])]
    with pytest.raises(InputError, match="sandbox"):
        verify(truth, program)


def test_an_error_of_the_sandbox_is_not_taken_for_a_bad_truth() -> None:
    def broken(program: str, tests: str) -> bool:
        raise KeyError("program")

    with pytest.raises(KeyError):
        verify({"kind": "code", "tests": "assert f"}, "x", broken)


# ---- list ----


def list_truth(shape: str = "commas", extras: tuple[str, ...] = (), n: int = 2) -> dict[str, Any]:
    return {"kind": "list", "n": n, "words": ["fig", "pear", "plum"], "shape": shape, "extras": list(extras)}


@pytest.mark.parametrize(
    ("shape", "extras", "answer", "right"),
    [
        ("commas", (), "fig, plum", True),
        ("commas", (), " Plum, FIG\n", True),
        ("commas", (), "fig,plum", False),
        ("commas", (), "fig, plum.", False),
        ("commas", (), "fig, plum, pear", False),
        ("commas", (), "fig", False),
        ("commas", (), "", False),
        ("commas", (), "fig, fig", False),
        ("commas", (), "fig, Fig", False),
        ("commas", (), "fig, rock", False),
        ("commas", (), "fig / plum", False),
        ("slashes", (), "fig / plum", True),
        ("dashes", (), "- fig\n- plum", True),
        ("dashes", (), "- fig - plum", False),
        ("dashes", (), "* fig\n* plum", False),
        ("numbered", (), "1. fig\n2. plum", True),
        ("numbered", (), "1. fig\n1. plum", False),
        ("numbered", (), "2. fig\n1. plum", False),
        ("brackets", (), "[fig] [plum]", True),
        ("brackets", (), "[fig], [plum]", False),
        ("commas", ("upper",), "FIG, PLUM", True),
        ("commas", ("upper",), "FIG, Plum", False),
        ("commas", ("sorted",), "fig, plum", True),
        ("commas", ("sorted",), "Fig, Plum", True),
        ("commas", ("sorted",), "plum, fig", False),
        ("commas", ("end",), "fig, plum stop", True),
        ("commas", ("end",), "fig, plum STOP", False),
        ("commas", ("end",), "fig, plum", False),
        ("commas", ("end",), "stop", False),
        ("commas", ("start",), "here fig, plum", True),
        ("commas", ("start",), "fig, plum", False),
        ("commas", ("start",), "HERE fig, plum", False),
        ("commas", ("upper", "start", "end"), "HERE FIG, PLUM STOP", True),
        ("commas", ("upper", "start", "end"), "here FIG, PLUM stop", True),
        ("numbered", ("sorted", "start", "end"), "here 1. fig\n2. plum stop", True),
    ],
)
def test_list(shape: str, extras: tuple[str, ...], answer: str, right: bool) -> None:
    assert verify(list_truth(shape, extras), answer) is right


def test_list_words_may_be_capitalised_in_the_truth() -> None:
    assert verify({**list_truth(), "words": ["Fig", "Plum"]}, "fig, plum")


@given(st.integers(0, 10**6), st.sampled_from(["drop", "repeat", "swap case", "foreign", "other shape"]))
def test_lists_of_the_miniature_world_are_right_and_spoilt_ones_wrong(seed: int, spoil: str) -> None:
    problem = lists.sample(random.Random(seed))
    truth, answer = problem.truth, problem.answer
    assert verify(truth, answer)
    items = [w for w in truth["words"] if w in answer.lower().replace("here ", "")]
    if spoil == "drop":
        truth = {**truth, "n": truth["n"] + 1}
    elif spoil == "repeat":
        first = items[0].upper() if "upper" in truth["extras"] else items[0]
        last = items[1].upper() if "upper" in truth["extras"] else items[1]
        answer = answer.replace(last, first)
    elif spoil == "swap case":
        answer, truth = answer.lower(), {**truth, "extras": ["upper"]}
    elif spoil == "foreign":
        truth = {**truth, "words": [w for w in truth["words"] if w != items[0]]}
    else:
        shapes = [s for s in lists.SHAPES if s != truth["shape"]]
        truth = {**truth, "shape": random.Random(seed).choice(shapes)}
    assert not verify(truth, answer)


# ---- bad truths ----


@pytest.mark.parametrize(
    ("truth", "message"),
    [
        ({}, "lacks the field 'kind'"),
        ("18", "lacks the field 'kind'"),
        ({"kind": "sum"}, "unknown kind"),
        ({"kind": "number"}, "lacks the field 'value'"),
        ({"kind": "number", "value": "many"}, "no number"),
        ({"kind": "exact"}, "lacks the field 'value'"),
        ({"kind": "mention"}, "lacks the field 'value'"),
        ({"kind": "mention", "value": " "}, "empty value"),
        ({"kind": "choice"}, "lacks the field 'value'"),
        ({"kind": "code"}, "lacks the field 'tests'"),
        ({"kind": "list", "n": 2}, "lacks the field 'words'"),
        (list_truth("rows"), "unknown shape"),
        (list_truth("commas", ("bold",)), "unknown shape or extra"),
    ],
)
def test_a_bad_truth_is_named(truth: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        verify(truth, "B 18", lambda program, tests: True)


@pytest.mark.parametrize("steps", ["3 + 4 = 7", ["3 plus 4"], ["3 + 4 = 7."], [7]])
def test_steps_that_are_no_equations_are_named(steps: Any) -> None:
    truth = {"kind": "number", "value": 7}
    check_truth(truth | {"steps": ["3 + 4 = 7"]})
    with pytest.raises(InputError, match="write each as '3 \\+ 4 = 7'"):
        check_truth(truth | {"steps": steps})


@pytest.mark.parametrize(
    ("truth", "answer"),
    [
        ({"kind": "number", "value": 5}, "5"),
        ({"kind": "exact", "value": "gold"}, "gold"),
        ({"kind": "mention", "value": "gold", "not": ["red"]}, "It is gold."),
        ({"kind": "choice", "value": "B"}, "B"),
        ({"kind": "math", "value": "5"}, "The answer is 5."),
        ({"kind": "schema", "schema": {"type": "array"}}, "[1]"),
        ({"kind": "instructions", "checks": [{"id": "punctuation:no_comma"}]}, "no comma"),
    ],
)
def test_what_is_thought_is_no_part_of_the_answer(truth: dict[str, Any], answer: str) -> None:
    drafts = "red, 7, {} (C) \\boxed{4}"
    assert verify(truth, f"<think>\n{drafts}\n</think>\n\n{answer}") and verify(truth, f"{drafts}\n</think>\n{answer}")
    assert not verify(truth, f"<think>{answer} {drafts}") or truth["kind"] == "instructions"
