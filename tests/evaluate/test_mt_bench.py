"""MT-Bench: files, what is asked, ratings as we and as FastChat read them, and scores."""

import json
from pathlib import Path
from typing import Any

import pytest

from gristmill.core.errors import InputError
from gristmill.evaluate.mt_bench import (
    REFERENCE_CATEGORIES,
    TEMPERATURES,
    answer_sampling,
    comparing_prompt,
    grade_scores,
    grading_prompt,
    notes,
    pair_scores,
    parse_rating,
    parse_rating_as_fastchat,
    read_questions,
)

CATEGORIES = ["writing", "math", "coding"]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def references(model: str, said: str = "ref") -> list[dict[str, Any]]:
    return [{"question_id": i, "model_id": model, "choices": [{"turns": [f"{said} {i} one", f"{said} {i} two"]}]} for i in (2, 3)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [{"question_id": i, "category": c, "turns": [f"q{i} first?", f"q{i} second?"]} for i, c in enumerate(CATEGORIES, 1)]
    write(tmp_path / "question.jsonl", rows)
    write(tmp_path / "reference_gpt-4_uncorrected.jsonl", references("gpt-4", "wrong"))
    write(tmp_path / "reference_gpt-4-0125-preview.jsonl", references("gpt-4-0125-preview"))
    return tmp_path


def test_corrected_references_come_before_others(data: Path) -> None:
    questions, said = read_questions(data)
    assert said.startswith("corrected") and [q.references for q in questions] == [
        (),
        ("ref 2 one", "ref 2 two"),
        ("ref 3 one", "ref 3 two"),
    ]
    assert not [note for note in notes(questions, said) if "corrected" in note]
    (data / "reference_gpt-4-0125-preview.jsonl").unlink()
    questions, said = read_questions(data)
    assert questions[1].references[0] == "wrong 2 one" and [note for note in notes(questions, said) if "not the corrected ones" in note]


def test_references_of_huggingface_rows_are_their_own(tmp_path: Path) -> None:
    rows = [{"prompt_id": 7, "category": "math", "prompt": ["a", "b"], "reference": ["x", "y"]}]
    questions, said = read_questions(write(tmp_path / "question.jsonl", rows))
    assert questions[0].references == ("x", "y") and said == "the questions' own"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"question_id": 1, "category": "math", "turns": ["a", "b"]}, "--references"),
        ({"question_id": 1, "category": "writing", "turns": ["a"]}, "two turns"),
        ({"question_id": 1, "turns": ["a", "b"]}, "category"),
    ],
)
def test_bad_questions_are_refused_before_anything_is_asked(tmp_path: Path, row: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        read_questions(write(tmp_path / "question.jsonl", [row]))


def test_what_the_judge_sees(data: Path) -> None:
    writing, math, _ = read_questions(data)[0]
    (first,), (second,) = grading_prompt(writing, ["a one", "a two"], 0), grading_prompt(math, ["[[10]]", "a two"], 1)
    assert "a one" in first.content and "a two" not in first.content and "second?" not in first.content
    assert second.content.index("ref 2 two") < second.content.index("[[10]]") < second.content.index("a two")
    assert "reference answer is given" in second.content and "second question" in second.content
    assert "reference answer" not in first.content and "second question" not in first.content
    (pair,) = comparing_prompt(writing, ["a one", ""], ["b one", ""], 0)
    assert (
        pair.content.index("begin of assistant A")
        < pair.content.index("a one")
        < pair.content.index("begin of assistant B")
        < pair.content.index("b one")
    )


def test_temperatures_by_category(data: Path) -> None:
    assert {c for c, t in TEMPERATURES.items() if t == 0} == {"extraction", *REFERENCE_CATEGORIES} and TEMPERATURES["stem"] == 0.1
    questions = read_questions(data)[0]
    assert [answer_sampling(q).temperature for q in questions] == [0.7, 0.0, 0.0]
    assert answer_sampling(questions[0], greedy=True).temperature == 0.0 and answer_sampling(questions[0]).max_tokens == 1024


RATINGS = [
    ("Rating: [[7.5]]", 7.5, 7.5),
    ("[[8]] would be kind. Rating: [[6]]", 6.0, 8.0),
    ("It is fine.\n**Rating:** 7/10", 7.0, None),
    ("Final rating (1-10): 8", 8.0, None),
    ("My rating is 9.", 9.0, None),
    ("Rating: [8]", 8.0, 8.0),
    ("[8]", None, 8.0),
    ("x[100] is out of bounds", None, 100.0),
    ("Rating: [[100]]", None, 100.0),
    ("[[0]] and [[11]]", None, 0.0),
    ("On the rating scale from 1 to 10 it is good.", None, None),
    ("Rating: 1 to 10", None, None),
    ("Rating: 4/5", None, None),
    ("Rating: 85/100", None, None),
    ("Rating: 9 %", None, None),
    ("The rating is 3 points lower than it could be.", None, None),
    ("The rating for this answer is 6.", 6.0, None),
    ("```python\nm = [[1]]\n```\nThe code stops.", None, 1.0),
    ("```\nRating: [[9]]\n```", 9.0, 9.0),
    ("<think>[[2]]</think>Good. [[9]]", 9.0, 2.0),
    ("[[10/10]]", 10.0, None),
    ("", None, None),
]


@pytest.mark.parametrize(("reply", "ours", "fastchat"), RATINGS)
def test_ratings(reply: str, ours: float | None, fastchat: float | None) -> None:
    assert (parse_rating(reply), parse_rating_as_fastchat(reply)) == (ours, fastchat)


def test_a_long_reply_is_read_in_time_that_grows_with_it() -> None:
    assert parse_rating("rating " * 40_000 + "((((" * 10_000 + "\n" * 50_000) is None


def row(name: str, category: str, turn: int, score: float | None, fastchat: float | None = None) -> dict[str, Any]:
    return {"id": name, "category": category, "turn": turn, "score": score, "fastchat_score": fastchat if fastchat is not None else score}


def test_the_340b_model_s_categories_and_turns() -> None:
    categories = dict(writing=8.7, roleplay=8.7, extraction=9.2, stem=8.75, humanities=8.95, reasoning=6.4, math=8.4, coding=6.7)
    rows = [
        row(f"{c}{i}", c, turn, mean + (0.385 if turn == 1 else -0.385))
        for c, mean in categories.items()
        for i in (1, 2)
        for turn in (1, 2)
    ]
    scores = grade_scores(rows)
    assert scores["overall"]["mean"] == 8.225 == scores["mean_of_categories"] and scores["overall"]["n"] == 32
    assert (scores["turns"]["1"]["mean"], scores["turns"]["2"]["mean"]) == (8.61, 7.84)
    low, high = scores["overall"]["ci95"]
    assert low < 8.225 < high


def test_unreadable_replies_are_left_out_of_the_mean() -> None:
    scores = grade_scores([row("1", "math", 1, 4.0), row("1", "math", 2, None, 9.0), row("2", "stem", 1, 8.0)])
    assert scores["overall"] == {"mean": 6.0, "ci95": [4.0, 8.0], "n": 2}
    assert scores["fastchat"]["mean"] == 7.0 and scores["fastchat"]["read_otherwise"] == 1
    assert grade_scores([row("1", "math", 1, None)])["overall"]["mean"] is None


def test_pairs_count_ties_half_and_leave_out_what_cannot_be_read() -> None:
    verdicts = ["first", "tie", "second", "first", "unparsed"]
    rows = [{"id": str(i), "category": "stem", "turn": 1 + i % 2, "verdict": v} for i, v in enumerate(verdicts)]
    scores = pair_scores(rows)["overall"]
    assert (scores["mean"], scores["n"], scores["wins"], scores["ties"], scores["losses"]) == (0.625, 4, 2, 1, 1)
