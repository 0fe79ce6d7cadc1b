"""Truths of users' rows: what an answer is checked against, in our form and in the forms of published data sets.

| columns | read as |
|---|---|
| truth | a truth as verify/verify.py lists them, or its JSON |
| answer, expected_answer, ground_truth, final_answer, answerKey, reward_model (verl) | GSM8K's worked solution (`#### 72`): the number; \
a number; a capital letter: a choice; else the final answer, as of mathematics (`5 km`, `(1, 2)`, `Paris`) |
| test or tests, entry_point | HumanEval's tests; what the row's prompt begins, an answer may continue |
| test_list, test_setup_code, test_imports, challenge_test_list | MBPP's tests |
| input_output | the cases of APPS: arguments of `fn_name`, else standard input and output |
| instruction_id_list, kwargs | IFEval's instructions, each with its kwargs; keys that are null count as absent |
| public_test_cases | the cases of LiveCodeBench that can be read: the private ones are pickled, and nothing is unpickled |

A reference solution (canonical_solution, code, solution, reference) is kept in the truth, which must accept it.
"""

import ast
import json
import math
import re
from typing import Any

from gristmill.core.errors import InputError
from gristmill.verify.final_answer import extract_answer
from gristmill.verify.verify import NUMBER, plain_numbers

FINAL = re.compile(r"####[ \t]*(\S[^\n]*)")
MAX_EXACT_WORDS = 20
MISSING = ("n/a", "na", "nan", "none", "null", "nil", "tbd", "todo", "-", "--", "?", "...", "unknown")  # of tables, not answers
ANSWERS = ("answer", "expected_answer", "ground_truth", "final_answer", "answerKey", "reward_model")
REFERENCES = ("reference", "canonical_solution", "reference_solution", "solution", "code")
TESTS = ("test", "tests", "entry_point", "test_list", "test_setup_code", "test_imports", "challenge_test_list")
CASES = ("input_output", "public_test_cases", "private_test_cases")
INSTRUCTIONS = ("instruction_id_list", "kwargs")
TRUTH_COLUMNS = ("truth", *ANSWERS, *INSTRUCTIONS, *TESTS, *CASES, *REFERENCES)
LATEX = re.compile(r"\\[A-Za-z]+|\$.+\$")


def read_truth(record: dict[str, Any]) -> dict[str, Any] | None:
    """The truth of a row; None where it has none.

    Raises:
        InputError: the columns say nothing that can be checked.
    """
    if record.get("truth") is not None:
        return _given(record["truth"])
    if record.get("instruction_id_list") is not None:
        return _ifeval(record)
    tests = _tests(record)
    if tests is not None:
        return tests
    given = [name for name in ANSWERS if record.get(name) is not None]
    found = [_answer(record[name]) for name in given]
    if any(str(other["value"]) != str(found[0]["value"]) for other in found[1:]):
        raise InputError(f"{' and '.join(f'`{name}`' for name in given)} are different answers: keep one.")
    if not found and isinstance(record.get("solution"), str) and "\\boxed" in record["solution"]:
        found = [_answer(record["solution"])]
    return found[0] if found else None


def _given(truth: Any) -> dict[str, Any]:
    if isinstance(truth, str):
        try:
            truth = json.loads(truth)
        except ValueError as e:
            raise InputError(
                f"`truth` is the text {truth[:100]!r} and lacks the field 'kind': give an object, or `answer` for a final answer."
            ) from e
    if not isinstance(truth, dict):
        raise InputError(f"`truth` is {str(truth)[:100]} and lacks the field 'kind': give an object, or `answer` for a final answer.")
    return {k: v for k, v in truth.items() if v is not None}  # tables fill what other rows have with None


def _ifeval(record: dict[str, Any]) -> dict[str, Any]:
    """IFEval's columns: ids of instructions, and as many sets of kwargs."""
    names, given = (_json(record.get(column), column) for column in INSTRUCTIONS)
    kwargs = given if given is not None else [{}] * len(names) if isinstance(names, list) else None
    if not isinstance(names, list) or not isinstance(kwargs, list) or len(names) != len(kwargs):
        raise InputError("`instruction_id_list` and `kwargs` are no lists of one length: give the kwargs of each instruction.")
    for name, values in zip(names, kwargs, strict=True):
        if not isinstance(name, str) or not isinstance(values, dict | type(None)):
            raise InputError(f"`kwargs` has {str(values)[:100]} for the instruction {str(name)[:100]}: give an object of its values.")
    return {
        "kind": "instructions",
        "checks": [
            {"id": name, **{key: value for key, value in (values or {}).items() if value is not None}}
            for name, values in zip(names, kwargs, strict=True)
        ],
    }


def _answer(value: Any) -> dict[str, Any]:
    """A known final answer: a number or a choice where it is one, else what is compared as mathematics is."""
    if isinstance(value, dict) and "ground_truth" in value:  # of verl's reward_model
        value = value["ground_truth"]
    if isinstance(value, (list, dict, bool)) or (isinstance(value, float) and not math.isfinite(value)):
        raise InputError(f"`answer` is {str(value)[:100]}: give the final answer as one text or number, or a `truth`.")
    text = str(value).strip()
    if text.startswith(("{", "[{")) and text.endswith(("}", "]")) and '"' in text:
        raise InputError(f"`answer` is the JSON {text[:80]!r}: give the final answer, or a `truth` of another kind.")
    if final := FINAL.findall(text):
        return _answer(final[-1])
    if not text.strip("# "):
        raise InputError("`answer` is empty, so that an empty answer would be right: give the final answer, or leave the column out.")
    if NUMBER.fullmatch(text) or (not LATEX.search(text) and NUMBER.fullmatch(plain_numbers(text).strip())):
        return {"kind": "number", "value": text}
    if text.lower() in MISSING:
        raise InputError(f"`answer` is {text!r}, which says that there is none: leave such rows out, or give a `truth` of kind 'exact'.")
    if "\\boxed" in text:
        if (value := extract_answer(text)) is None:
            raise InputError(f"`answer` is {text[:80]!r}, with nothing in its box: give the final answer.")
        return {"kind": "math", "value": value}
    if len(text.splitlines()) > 1 or len(text.split()) > MAX_EXACT_WORDS:
        raise InputError(
            f"`answer` is the text {text[:80]!r}..., which no answer repeats word by word: give the final answer alone (or after a "
            "last `####`), or a `truth` of another kind."
        )
    if re.fullmatch("[A-J]", text):
        return {"kind": "choice", "value": text}
    return {"kind": "math", "value": text}


def _tests(record: dict[str, Any]) -> dict[str, Any] | None:
    """The tests of a program, in any of the published forms."""
    truth: dict[str, Any] = {"kind": "code"}
    entry_point = record.get("entry_point")
    if record.get("test_list") is not None:
        tests = [*_texts(record["test_list"]), *_texts(record.get("challenge_test_list"))]
        setup = "\n".join([*_texts(record.get("test_imports")), *_texts(record.get("test_setup_code"))])
        truth |= {"tests": tests} | ({"setup": setup} if setup.strip() else {})
    elif record.get("input_output") is not None:
        truth |= _apps(record["input_output"])
    elif record.get("public_test_cases") is not None:
        truth |= _live_code(record)
    elif isinstance(given := record.get("tests", record.get("test")), (str, list)):
        truth["tests"] = _listed(given)
    else:
        return None
    if entry_point:
        truth["entry_point"] = str(entry_point)
        prompt = record.get("prompt")
        if (
            isinstance(prompt, str)
            and re.search(rf"^[ \t]*(?:def|class) {re.escape(truth['entry_point'])}\b", prompt, re.M)
            and _is_code(prompt)
        ):
            truth["prefix"] = prompt
    reference = next((record[name] for name in REFERENCES if isinstance(record.get(name), str) and record[name].strip()), None)
    if reference is not None:
        truth["reference"] = reference
    return truth


def _listed(tests: str | list[str]) -> str | list[str]:
    """Tests that are written as the JSON of a list, as that list."""
    try:
        found = json.loads(tests) if isinstance(tests, str) and tests.lstrip().startswith("[") else tests
    except (ValueError, RecursionError):
        return tests
    return found if isinstance(found, list) and all(isinstance(test, str) for test in found) else tests


def _is_code(prompt: str) -> bool:
    """Whether a prompt is the beginning of a program, and not text about one."""
    try:
        ast.parse(prompt)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        try:
            ast.parse(prompt.rstrip() + "\n    pass\n")
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return False
    return True


def _texts(value: Any) -> list[str]:
    if value is None:
        return []
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(t, str) for t in texts):
        raise InputError(f"The tests {str(value)[:100]} are no list of texts: give Python code.")
    return texts


def _json(value: Any, column: str) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError as e:
        raise InputError(f"`{column}` is not JSON ({e}): give the cases.") from e


def _apps(value: Any) -> dict[str, Any]:
    given = _json(value, "input_output")
    if not isinstance(given, dict) or not isinstance(given.get("inputs"), list) or not isinstance(given.get("outputs"), list):
        raise InputError("`input_output` has no lists `inputs` and `outputs`: give both.")
    if len(given["inputs"]) != len(given["outputs"]):
        raise InputError(f"`input_output` has {len(given['inputs'])} inputs and {len(given['outputs'])} outputs: give one to each.")
    name = given.get("fn_name")
    pairs = zip(given["inputs"], given["outputs"], strict=True)
    if name:  # in most rows the output stands in a list of its own
        cases = [{"input": i, "output": o} | ({"also": o[0]} if isinstance(o, list) and len(o) == 1 else {}) for i, o in pairs]
        return {"cases": cases, "entry_point": name}
    joined = [("\n".join(v) if isinstance(v, list) and all(isinstance(x, str) for x in v) else v for v in pair) for pair in pairs]
    return {"cases": [dict(zip(("input", "output"), pair, strict=True)) for pair in joined]}


def _live_code(record: dict[str, Any]) -> dict[str, Any]:
    given = _json(record["public_test_cases"], "public_test_cases")
    if not isinstance(given, list) or not all(isinstance(c, dict) and {"input", "output"} <= c.keys() for c in given):
        raise InputError("`public_test_cases` is no list of objects with input and output: give the cases.")
    if all(c.get("testtype") != "functional" for c in given):
        return {"cases": [{"input": c["input"], "output": c["output"]} for c in given]}
    metadata = _json(record.get("metadata") or "{}", "metadata")
    name = metadata.get("func_name") or record.get("entry_point")
    if not name:
        raise InputError("The test cases call a function, and neither `metadata` (func_name) nor `entry_point` names it: give the name.")
    try:
        cases = [
            {"input": [json.loads(line) for line in str(c["input"]).splitlines() if line.strip()], "output": json.loads(c["output"])}
            for c in given
        ]
    except ValueError as e:
        raise InputError(f"The arguments in `public_test_cases` are not JSON ({e}): give one a line.") from e
    return {"cases": cases, "entry_point": name}
