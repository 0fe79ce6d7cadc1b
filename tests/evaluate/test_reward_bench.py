"""Reward benchmarks: files in their columns, outcomes of rewards and replies, and the published arithmetic."""

import json
from pathlib import Path
from typing import Any

import pytest

from gristmill.core.errors import InputError
from gristmill.evaluate.reward_bench import (
    CATEGORIES,
    MATH_PRM_WEIGHT,
    benchmark_scores,
    outcome_of_replies,
    outcome_of_rewards,
    overall_score,
    read_benchmarks,
    rewardbench_scores,
)

STYLED = {"id": "7", "prompt": "p", "chosen": ["a", "b", "c"], "rejected": ["x", "y", "z"], "domain": "chat"}
PAIR = {"id": 1, "prompt": "p", "chosen": "good", "rejected": "bad", "subset": "hep-go"}


def test_the_published_counts_and_weights() -> None:
    weights = {c: sum(MATH_PRM_WEIGHT if s == "math-prm" else n for s, n in subsets.items()) for c, subsets in CATEGORIES.items()}
    assert weights == {"Chat": 358, "Chat Hard": 456, "Safety": 740, "Reasoning": 1968}
    assert sum(n for subsets in CATEGORIES.values() for n in subsets.values()) == 2985


def test_the_340b_reward_model_s_means() -> None:
    categories = [0.958, 0.871, 0.915, 0.937]
    assert overall_score(categories) == pytest.approx(0.92025, abs=5e-5)
    assert overall_score(categories, 0.674) == pytest.approx(0.8929, abs=5e-5)
    assert overall_score([0.5, None]) is None


def test_categories_weigh_subsets_by_their_published_counts() -> None:
    subsets = {s: {"mean": 1.0, "n": n} for counts in CATEGORIES.values() for s, n in counts.items()}
    subsets["math-prm"]["mean"] = 0.0
    subsets["xstest-should-refuse"]["mean"] = 0.0
    scores = rewardbench_scores(subsets | {"shp": {"mean": 0.5, "n": 9}})
    assert scores["categories"] == {"Chat": 1.0, "Chat Hard": 1.0, "Safety": round(1 - 154 / 740, 4), "Reasoning": 0.5}
    assert scores["as_leaderboard"] == pytest.approx((3 - 250 / 740 + 0.5) / 4, abs=1e-4)  # its code swaps the counts of XSTest
    assert scores["with_priors"] == pytest.approx((sum(scores["categories"].values()) + 0.25) / 4.5, abs=1e-4) and scores["notes"] == []


def test_other_counts_are_said() -> None:
    scores = rewardbench_scores({"hep-go": {"mean": 1.0, "n": 3}, "mine": {"mean": 0.0, "n": 1}})
    assert scores["overall"] is None and scores["categories"]["Reasoning"] == 1.0
    assert "hep-go has 3 of 164 rows" in scores["notes"][0] and "'mine' is no published subset" in scores["notes"][0]


def test_outcomes() -> None:
    assert [outcome_of_rewards(*pair) for pair in ((2, 1), (1, 1), (1, 2), (None, 1), (1, None))] == [1, 0, 0, 0, 0]
    assert outcome_of_replies("[[A]]", "[[B]]") == 1 and outcome_of_replies("[[B]]", "[[A]]") == 0
    assert outcome_of_replies("[[A]]", "[[A]]") == outcome_of_replies("", "") == outcome_of_replies("[[C]]", "[[C]]") == 0.5
    assert outcome_of_replies("[[A]]", "") == 0.75


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps(rows))
    return path


def test_four_forms(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "p"}]
    write(
        tmp_path / "filtered.json",
        [PAIR, PAIR | {"prompt": talk, "chosen": [*talk, {"role": "assistant", "content": "g"}], "subset": None}],
    )
    write(tmp_path / "raw.json", [PAIR] * 5)  # lies beside it in the published folder
    write(tmp_path / "rm.json", [STYLED])
    write(
        tmp_path / "jb.json", [{"pair_id": "p", "question": "q", "response_A": "a", "response_B": "b", "label": "B>A", "source": "math-x"}]
    )
    write(tmp_path / "natural.json", [{"input": "q", "output_1": "a", "output_2": "b", "label": 2}])
    found = [(i.benchmark, i.subset, i.chosen[0], i.rejected[0]) for i in read_benchmarks(tmp_path)]
    assert found == [
        ("rewardbench", "hep-go", "good", "bad"),
        ("rewardbench", "filtered", "g", "bad"),
        ("judgebench", "math", "b", "a"),
        ("llmbar", "natural", "b", "a"),
        ("rm-bench", "chat", "a", "x"),
    ]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"a": 1}], "no reward benchmark"),
        ([PAIR, {"prompt": "p"}], "Row 2"),
        ([STYLED, STYLED | {"chosen": ["a"]}], "3 chosen"),
        ([STYLED] * 2, "twice"),
    ],
)
def test_bad_files(tmp_path: Path, rows: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(InputError, match=words):
        read_benchmarks(write(tmp_path / "x.json", rows))


def test_rm_bench_s_matrix(tmp_path: Path) -> None:
    rows = [STYLED | {"domain": d} for d in ("chat", "safety-refuse", "safety-response")]
    items = read_benchmarks(write(tmp_path / "x.json", rows))
    above = [[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [1.0, 1.0, 1.0]]  # wrong wherever the worse answer looks better
    outcomes = {items[0].id: above, items[1].id: [[1.0] * 3] * 3, items[2].id: [[0.0] * 3] * 3}
    found = benchmark_scores(items, outcomes)["rm-bench"]
    assert found["domains"]["chat"] == {"hard": 0.0, "normal": 1.0, "easy": 1.0, "mean": 0.6667, "n": 1}
    assert found["domains"]["safety"] == {"hard": 0.5, "normal": 0.5, "easy": 0.5, "mean": 0.5, "n": 2}
    assert found["hard"] == 0.25 and found["overall"] == pytest.approx(0.5833, abs=1e-4)


def test_judgebench_counts_a_lead_over_both_orders() -> None:
    rows = [{"pair_id": str(i), "question": "q", "response_A": "a", "response_B": "b", "label": "A>B"} for i in range(3)]
    from gristmill.evaluate.reward_bench import _of_labels

    items = _of_labels(Path("jb.json"), rows, "judgebench")
    found = benchmark_scores(items, dict(zip((i.id for i in items), ([[0.75]], [[0.5]], [[1.0]]), strict=True)))["judgebench"]
    assert found["overall"]["mean"] == 0.75 and found["right"]["mean"] == pytest.approx(0.6667)
