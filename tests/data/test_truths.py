"""Truths in the forms of published data sets, and the ones that no answer can meet or miss."""

import json
from pathlib import Path
from typing import Any

import pytest

from gristmill.core.errors import InputError
from gristmill.data.readers import read_prompts
from gristmill.data.truths import read_truth
from gristmill.verify.verify import check_truth, verify

SOLUTION = "Each box holds 6 / 2 = <<6/2=3>>3 cups.\nSo there are 3 * 24 = <<3*24=72>>72.\n#### "


@pytest.mark.parametrize(
    ("answer", "kind", "value"),
    [
        (SOLUTION + "72", "number", "72"),
        (SOLUTION + "1,234", "number", "1,234"),
        (SOLUTION + "$5.50\n", "number", "$5.50"),
        ("3 + 4 = 7 #### 7", "number", "7"),
        ("Long talk.\nMore of it.\n#### Paris", "math", "Paris"),
        ("We find\n$x = 3$, so $\\boxed{\\frac{1}{2}}$.", "math", "\\frac{1}{2}"),
        ("\\frac{3}{4}", "math", "\\frac{3}{4}"),
        ("Paris", "math", "Paris"),
        ("3 1/2", "number", "3 1/2"),
        ("\u00bd", "number", "\u00bd"),
        (72, "number", "72"),
        (0, "number", "0"),
        ("5 km", "math", "5 km"),
        ("3:30", "math", "3:30"),
        ("[1, 2)", "math", "[1, 2)"),
        ("B", "choice", "B"),
    ],
)
def test_answers(answer: object, kind: str, value: str) -> None:
    truth = read_truth({"answer": answer})
    assert truth == {"kind": kind, "value": value}
    check_truth(truth)


@pytest.mark.parametrize(
    "record",
    [
        {"expected_answer": "7", "generated_solution": "3 + 4"},
        {"ground_truth": "7", "dataset": "gsm8k"},
        {"reward_model": {"style": "rule", "ground_truth": "7"}},
        {"answer": 7, "final_answer": "#### 7"},
    ],
)
def test_known_answers_under_other_names(record: dict[str, Any]) -> None:
    assert read_truth(record) == {"kind": "number", "value": "7"}
    assert read_truth({"solution": "So \\boxed{\\frac12}."}) == {"kind": "math", "value": "\\frac12"}
    assert read_truth({"answerKey": "B"}) == {"kind": "choice", "value": "B"} and read_truth({"solution": "Long."}) is None


def test_ifevals_columns() -> None:
    kwargs = [{"num_words": 30, "relation": "less than", "keyword": None}, {}]
    record = {"key": 7, "instruction_id_list": ["length_constraints:number_words", "punctuation:no_comma"], "kwargs": kwargs}
    checks = [
        {"id": "length_constraints:number_words", "num_words": 30, "relation": "less than"},
        {"id": "punctuation:no_comma"},
    ]
    for given in (record, record | {"kwargs": json.dumps(kwargs)}):  # as some tables hold them
        truth = read_truth(given)
        assert truth == {"kind": "instructions", "checks": checks}
        check_truth(truth)
    for wrong in ({"kwargs": [{}]}, {"kwargs": {}}, {"instruction_id_list": "punctuation"}, {"kwargs": [1, {}]}):
        with pytest.raises(InputError, match="instruction_id_list|kwargs"):
            read_truth(record | wrong)


@pytest.mark.parametrize(
    "record",
    [
        {"answer": ""},
        {"answer": "  \n"},
        {"answer": "First this.\nThen that."},
        {"answer": "one " * 30},
        {"answer": ["a", "b"]},
        {"answer": float("nan")},
        {"answer": True},
        {"answer": "N/A"},
        {"answer": "None"},
        {"answer": "\\boxed{}"},
        {"ground_truth": '{"func_name": "validate_lowercase"}'},
        {"answer": "7", "expected_answer": "8"},
        {"answer": 1, "question": "Which?", "prompt": None, "choices": ["Oats", "Rye"]},
        {"truth": {}},
        {"truth": "72"},
        {"truth": {"kind": "exact", "value": ""}},
        {"truth": {"kind": "exact", "value": "a\nb"}},
        {"truth": {"kind": "exact", "value": ["a"]}},
        {"truth": {"kind": "choice", "value": "Paris"}},
        {"truth": {"kind": "choice", "value": ""}},
        {"truth": {"kind": "number", "value": "many"}},
        {"truth": {"kind": "instructions", "checks": []}},
        {"instruction_id_list": ["length_constraints:number_words"], "kwargs": [{"relation": "at least", "num_words": 0}]},
        {"truth": {"kind": "schema", "schema": {}}},
        {"truth": {"kind": "list", "n": 3, "words": ["a", "b"], "shape": "commas", "extras": []}},
        {"truth": {"kind": "number", "value": 3, "reference": "It is 4."}},
        {"test": "def check(candidate):\n    assert candidate(1) == 2\n"},
        {"test_list": []},
        {"tests": ""},
        {"tests": "import pytest\npytest.skip('later', allow_module_level=True)\nassert f(1) == 2"},
        {"input_output": '{"inputs": ["1"], "outputs": []}'},
        {"public_test_cases": '[{"input": "1", "output": "2", "testtype": "functional"}]'},
    ],
)
def test_truths_that_tell_nothing_are_refused(record: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "?", **record}) + "\n")
    with pytest.raises(InputError, match=r"^Row 1 of "):
        read_prompts(tmp_path / "p.jsonl", "human", truth=True)


@pytest.mark.parametrize(
    ("value", "right", "wrong"),
    [
        ("5 km", ["5 km", "It is 5 km.", "The answer is 5."], ["5 m", "The answer is 6 km."]),
        ("25%", ["25%", "It is 25\\%."], ["25", "24%"]),
        ("3:30", ["3:30", "At 3:30."], ["4:30", "30"]),
        ("(1, 2)", ["(1, 2)", "So the answer is $(1,2)$."], ["(2, 1)", "2"]),
        ("B", ["B", "The answer is (B).", "B) Rye"], ["C", "The answer is C, not B."]),
        ("Paris", ["Paris", "paris.", "**Paris**", "The answer is Paris.", "\\boxed{Paris}"], ["Rome", "The answer is not Paris.", ""]),
        ("July 4, 1776", ["July 4, 1776", "The answer is July 4, 1776."], ["July 5, 1776", "1776"]),
    ],
)
def test_what_a_known_answer_accepts(value: str, right: list[str], wrong: list[str]) -> None:
    truth = read_truth({"answer": value})
    assert truth is not None
    assert [verify(truth, answer) for answer in right] == [True] * len(right)
    assert not any(verify(truth, answer) for answer in wrong)


def test_published_forms_of_tests() -> None:
    def passes(record: dict[str, Any], answer: str, tests: str) -> bool:
        truth = read_truth(record)
        assert truth is not None
        check_truth(truth)
        return verify(truth, answer, lambda program, check: tests in check and "def f" in program)

    prompt = "import math\n\ndef f(x):\n    '''One more.'''\n"
    human_eval = {"prompt": prompt, "test": "def check(candidate):\n    assert candidate(1) == 2\n", "entry_point": "f"}
    assert passes(human_eval, "    return x + 1", "check(f)")
    assert read_truth(human_eval | {"canonical_solution": "    return x + 1"})["reference"] == "    return x + 1"  # type: ignore[index]
    mbpp = {"text": "?", "code": "def f(x): return x + 1", "test_list": ["assert f(1) == y"], "test_setup_code": "y = 2"}
    assert passes(mbpp, "def f(x): pass", "y = 2\nassert f(1) == y")
    apps = {"input_output": json.dumps({"inputs": [[1]], "outputs": [2], "fn_name": "f"})}
    assert passes(apps, "def f(x): pass", "__entry__(*[1])")
    wrapped = {"input_output": {"inputs": [[1]], "outputs": [[2]], "fn_name": "f"}}
    assert passes(wrapped, "def f(x): pass", "== [2] or (list(__got__) if type(__got__) is tuple else __got__) == 2")
    script = {"input_output": {"inputs": ["1\n"], "outputs": ["2\n"]}}
    assert passes(script, "def f(x): pass", "__run_script__('1\\n')")
    assert read_truth({"tests": json.dumps(["assert f(1) == 2"])}) == {"kind": "code", "tests": ["assert f(1) == 2"]}
    leet = {"test": "def check(candidate):\n    assert candidate(x=1) == 2\n", "entry_point": "Solution().f"}
    assert passes(leet, "class Solution:\n    def f(self, x): pass", "check(Solution().f)")
    live = {"public_test_cases": '[{"input": "[1, 2]\\n3", "output": "6", "testtype": "functional"}]', "metadata": '{"func_name": "f"}'}
    assert passes(live, "def f(x): pass", "__entry__(*[[1, 2], 3])")
