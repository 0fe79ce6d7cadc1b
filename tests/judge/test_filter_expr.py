"""Conditions mean what Python's own operators make of the same tree, and a text that is none says where it goes wrong."""

import math
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gristmill.core.errors import InputError
from gristmill.data.rows import Rating
from gristmill.judge.filter_expr import MAX_DEPTH, NAMES, FilterExpr
from gristmill.model.reward import ATTRIBUTES

ROW = asdict(Rating(3.0, 3.5, 4.0, 1.0, 2.0)) | {"score": 4.25}

# A tree is ("<", side, side), ("not", tree), ("and", tree, tree, ...) or ("or", tree, tree, ...).
Tree = tuple[Any, ...]
numbers = st.sampled_from([0.0, 1.0, 2.5, -1.0, 3.0, 1e-7, 1e22]) | st.floats(allow_nan=False, allow_infinity=False)
values = st.fixed_dictionaries({name: st.sampled_from([0.0, 1.0, 2.5, 3.0, math.nan]) for name in NAMES})
leaves = st.tuples(st.sampled_from(["<", "<=", ">", ">=", "=="]), st.sampled_from(NAMES) | numbers, st.sampled_from(NAMES) | numbers)
trees = st.recursive(
    leaves,
    lambda inner: (
        st.tuples(st.just("not"), inner)
        | st.builds(lambda word, parts: (word, *parts), st.sampled_from(["and", "or"]), st.lists(inner, min_size=2, max_size=4))
    ),
    max_leaves=12,
)


def truth(tree: Tree, row: Mapping[str, float]) -> bool:
    word, *parts = tree
    if word == "not":
        return not truth(parts[0], row)
    if word in ("and", "or"):
        held = [truth(part, row) for part in parts]
        return all(held) if word == "and" else any(held)
    a, b = (row[part] if isinstance(part, str) else part for part in parts)
    return {"<": a < b, "<=": a <= b, ">": a > b, ">=": a >= b, "==": a == b}[word]


def text_of(tree: Tree, space: str, spare: bool, outer: str = "or") -> str:
    """With the brackets that the order of binding asks for; with `spare` ones too if wished."""
    word, *parts = tree
    if word == "not":
        text = f"not {space}{text_of(parts[0], space, spare, 'not')}"
    elif word in ("and", "or"):
        text = f" {space}{word} ".join(text_of(part, space, spare, word) for part in parts)
    else:
        text = f"{parts[0]}{space}{word}{space}{parts[1]}"
    order = ["or", "and", "not"]
    return f"({space}{text}{space})" if spare or (word in order and order.index(word) < order.index(outer)) else text


@given(trees, values, st.sampled_from(["", " ", "\n  "]), st.booleans())
def test_a_condition_holds_where_its_tree_does(tree: Tree, row: dict[str, float], space: str, spare: bool) -> None:
    assert FilterExpr.parse(text_of(tree, space, spare)).holds(row) == truth(tree, row)


@given(trees, values)
def test_the_normal_form_is_the_same_condition_and_its_own_normal_form(tree: Tree, row: dict[str, float]) -> None:
    plain, spare = (FilterExpr.parse(text_of(tree, "", brackets)) for brackets in (False, True))
    assert plain == spare and str(plain) == str(spare)
    assert FilterExpr.parse(str(plain)) == plain and hash(FilterExpr.parse(str(plain))) == hash(plain)
    assert str(FilterExpr.parse(str(plain))) == str(plain)


def test_the_names_are_those_of_the_reward_model() -> None:
    assert tuple(NAMES) == (*ATTRIBUTES, "score")


@pytest.mark.parametrize(
    ("text", "normal", "holds"),
    [
        ("correctness >= 3 and verbosity <= 2", "correctness >= 3 and verbosity <= 2", True),
        ("correctness>3.5", "correctness > 3.5", False),
        ("(correctness<3)or(( score>4 ))", "correctness < 3 or score > 4", True),
        ("helpfulness == 3.0", "helpfulness == 3", True),
        ("2 < helpfulness", "2 < helpfulness", True),
        ("correctness > helpfulness", "correctness > helpfulness", True),
        ("score>-1e0", "score > -1", True),
        ("score > +.5", "score > 0.5", True),
        ("score >= -0", "score >= 0", True),
        ("not correctness >= 3 and score > 0", "not correctness >= 3 and score > 0", False),
        ("not (correctness >= 3 and score > 9)", "not (correctness >= 3 and score > 9)", True),
        ("not not score > 0", "not not score > 0", True),
        ("score > 0 or score > 1 and score > 9", "score > 0 or score > 1 and score > 9", True),
        ("(score > 0 or score > 1) and score > 9", "(score > 0 or score > 1) and score > 9", False),
        ("score > 0 and (score > 1 and (score > 2))", "score > 0 and score > 1 and score > 2", True),
    ],
)
def test_examples(text: str, normal: str, holds: bool) -> None:
    condition = FilterExpr.parse(text)
    assert str(condition) == normal
    assert condition.holds(ROW) is holds


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("corectness >= 3", "at character 1, has the unknown name 'corectness': did you mean 'correctness'"),
        ("score > 1 and verbose < 2", "at character 15, has the unknown name 'verbose': did you mean 'verbosity'"),
        ("Helpfulness > 1", "did you mean 'helpfulness'"),
        ("quality > 1", "has the unknown name 'quality': use one of helpfulness, correctness, coherence"),
        ("", "at character 1, has its end where a name or a number is due"),
        ("score", "at character 6, has its end where one of < <= > >= == is due"),
        ("score >", "at character 8, has its end where a name or a number is due"),
        ("score = 3", "at character 7, has '=' where one of < <= > >= == is due"),
        ("score != 3", "at character 7, has '!' where one of"),
        ("score >= 3 verbosity < 2", "at character 12, has 'verbosity' where 'and', 'or' or the end is due"),
        ("1 < score < 3", "at character 11, has '<' where 'and', 'or' or the end is due"),
        ("(score > 3", "at character 11, has its end where '\\)', 'and' or 'or' is due"),
        ("score > 3)", "at character 10, has '\\)' where 'and', 'or' or the end is due"),
        ("score > 3 and", "at character 14, has its end where a name"),
        ("score > and", "at character 9, has 'and' where a name"),
        ("score > 3 AND score < 4", "has 'AND' where 'and', 'or'"),
        ("not", "at character 4, has its end"),
        ("score > 1e999", "at character 9, has a number that is too large"),
        ("score > nan", "unknown name 'nan'"),
        ("score > 1_0", "has '_0' where"),
        ("score > \u0663", "has '\u0663' where a name"),
        ("__import__('os').system('true')", "unknown name '__import__'"),
    ],
)
def test_what_is_no_condition_says_where(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        FilterExpr.parse(text)


def test_a_value_that_decides_must_be_there() -> None:
    condition = FilterExpr.parse("correctness > 1 and score > 2")
    with pytest.raises(InputError, match="needs 'score', and the answer has only correctness"):
        condition.holds({"correctness": 2.0})
    assert not condition.holds({"correctness": 0.0}), "the score decides nothing"


@pytest.mark.parametrize("piece", ["(", "not ", "((score > 1) and "])
def test_nesting_has_an_end(piece: str) -> None:
    with pytest.raises(InputError, match=f"more than {MAX_DEPTH} brackets"):
        FilterExpr.parse(piece * 10_000)
    assert FilterExpr.parse("(" * MAX_DEPTH + "score > 1" + ")" * MAX_DEPTH) == FilterExpr.parse("score > 1")
    beside = " and ".join(["not (score < 1)"] * 2 * MAX_DEPTH)
    assert str(FilterExpr.parse(beside)).count("score") == 2 * MAX_DEPTH, "what stands beside each other is not nested"


@pytest.mark.parametrize(
    "text", ["score > 1 and " * 5_000 + "score > 1", "score > " + "9" * 100_000, "a" * 100_000, "%" * 100_000, "score > 1 and " * 100_000]
)
def test_a_long_text_takes_no_time_and_a_short_message(text: str) -> None:
    start = time.process_time()
    try:
        assert FilterExpr.parse(text).holds(ROW)
    except InputError as e:
        assert len(str(e)) < 400
    assert time.process_time() - start < 20
