import math
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gristmill.data.chat import Message
from gristmill.data.rows import Prompt
from gristmill.evaluate.runner import evaluate_model
from gristmill.evaluate.stats import accuracy, clustered, paired, paired_clustered, wilson
from gristmill.generation.api import Completion, Request

# ---- intervals ----


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(5, 10, 0.2366, 0.7634), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (1, 10, 0.0179, 0.4042)],
)
def test_wilson_against_published_values(successes: int, n: int, low: float, high: float) -> None:
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_bounds_solve_the_score_equation(case: tuple[int, int]) -> None:
    """At either end p0 of the interval the observed share lies 1.96 standard errors (of p0) away."""
    successes, n = case
    low, high = wilson(successes, n)
    share = successes / n
    assert 0 <= low <= share + 1e-12 and share - 1e-12 <= high <= 1
    for p0 in (low, high):
        if 0 < p0 < 1:
            assert abs(share - p0) == pytest.approx(1.959964 * math.sqrt(p0 * (1 - p0) / n), rel=1e-3, abs=1e-6)


def test_wilson_covers_95_percent_on_average() -> None:
    n, coverage = 40, []
    intervals = [wilson(k, n) for k in range(n + 1)]
    for step in range(1, 100):
        p = step / 100
        chance = [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
        coverage.append(sum(c for c, (low, high) in zip(chance, intervals, strict=True) if low <= p <= high))
    assert 0.94 < sum(coverage) / len(coverage) < 0.97


def test_nothing_measured_is_nothing_known() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    assert accuracy([]) == {"mean": 0.0, "ci95": [0.0, 1.0], "n": 0}


def test_accuracy() -> None:
    assert accuracy([True, False, True, True, False] * 2) == {"mean": 0.6, "ci95": [0.3127, 0.8318], "n": 10}


def test_paired_by_hand() -> None:
    got = paired([False, False, True, True], [True, True, True, False])
    # Differences 1, 1, 0, -1: mean 1/4, variance 11/12, half width 1.96 sqrt(11/48).
    half = 1.959964 * math.sqrt(11 / 48)
    assert got["mean"] == 0.25 and got["n"] == 4
    assert got["ci95"] == pytest.approx([0.25 - half, 0.25 + half], abs=1e-4)


def test_paired_is_narrower_than_two_intervals_when_the_models_agree_on_most_prompts() -> None:
    before = [True, False] * 50
    after = [True, False] * 45 + [True, True] * 5
    low, high = paired(before, after)["ci95"]
    assert 0 < low < 0.05 < high
    assert accuracy(before)["ci95"][1] > accuracy(after)["ci95"][0], "unpaired, the two overlap"


def test_nothing_paired_is_nothing_known() -> None:
    assert paired([], []) == {"mean": 0.0, "ci95": [-1.0, 1.0], "n": 0}


def test_paired_needs_the_same_prompts() -> None:
    with pytest.raises(ValueError, match="zip"):
        paired([True], [True, False])


def test_paired_covers_95_percent() -> None:
    rng, hits = random.Random(0), 0
    for _ in range(400):
        before = [rng.random() < 0.4 for _ in range(120)]
        after = [b or rng.random() < 0.25 for b in before]  # the true difference is .6 x .25
        low, high = paired(before, after)["ci95"]
        hits += low <= 0.15 <= high
    assert 0.91 < hits / 400 < 0.98


# ---- score ----


def prompt(name: str, task: str, truth: dict[str, Any] | None) -> Prompt:
    return Prompt(name, task, (Message("user", name),), "human", (), truth)


def test_score_asks_each_prompt_twice_and_keeps_answers_with_their_prompts() -> None:
    prompts = [
        prompt("p-greedy", "sums", {"v": "1"}),
        prompt("q", "facts", {"v": "2"}),
        prompt("r", "sums", {"v": "3"}),
    ]
    right = {("p-greedy", 0.0), ("p-greedy", 1.0), ("q", 0.0), ("r", 1.0)}
    asked: list[Request] = []

    def generate(requests: list[Request]) -> dict[str, list[Completion]]:
        asked.extend(requests)
        truth = {"p-greedy": "1", "q": "2", "r": "3"}
        out = {}
        for request in reversed(requests):  # answers come in no particular order
            name = request.messages[0].content
            text = truth[name] if (name, request.sampling.temperature) in right else "wrong"
            out[request.id] = [Completion(text, 1, (-0.5,), "stop")]
        return out

    got = evaluate_model(prompts, generate, lambda cases: [t["v"] == answer for t, answer in cases], max_tokens=7, seed=11)
    assert len(asked) == 6 and len({r.id for r in asked}) == 6
    assert {(r.sampling.temperature, r.sampling.max_tokens, r.seed) for r in asked} == {
        (0.0, 7, 11),
        (1.0, 7, 11),
    }
    assert got["outcomes"] == {
        "greedy": {"p-greedy": True, "q": True, "r": False},
        "sampled": {"p-greedy": True, "q": False, "r": True},
    }
    assert got["greedy"] == {
        "overall": accuracy([True, True, False]),
        "sums": accuracy([True, False]),
        "facts": accuracy([True]),
    }
    assert got["sampled"]["sums"]["mean"] == 1.0 and got["sampled"]["facts"]["mean"] == 0.0


def test_score_gives_the_checker_an_empty_truth_where_there_is_none() -> None:
    seen: list[dict[str, Any]] = []

    def check(cases: list[tuple[dict[str, Any], str]]) -> list[bool]:
        seen.extend(truth for truth, _ in cases)
        return [False] * len(cases)

    evaluate_model([prompt("a", "t", None)], lambda rs: {r.id: [Completion("", 0, (), "stop")] for r in rs}, check, max_tokens=5, seed=0)
    assert seen == [{}, {}]


# ---- clusters ----


def test_clusters_of_one_are_single_outcomes() -> None:
    before, after = [True, False, False, True, False], [True, True, False, True, True]
    assert paired_clustered([[x] for x in before], [[x] for x in after]) == paired(before, after)


def test_outcomes_that_go_together_say_less() -> None:
    """Derived by hand: of 4 prompts with 2 instructions each, 2 hold whole. Mean 1/2, residuals +-1, variance 4/3 * 4 / 8^2."""
    together = clustered([[True, True], [True, True], [False, False], [False, False]])
    half = 1.959964 * math.sqrt(4 / 3 * 4 / 64)
    assert together["mean"] == 0.5 and together["n"] == 8
    assert together["ci95"] == pytest.approx([max(0, 0.5 - half), min(1, 0.5 + half)], abs=1e-4)
    apart = clustered([[True, False]] * 4)
    assert apart["ci95"] == [0.5, 0.5], "where every prompt has one of two, clusters do not differ"


def test_clusters_without_variation_are_not_certain() -> None:
    low, high = clustered([[False, False]] * 10)["ci95"]
    assert (low, high) == pytest.approx(wilson(0, 10), abs=1e-4)
    assert clustered([]) == {"mean": 0.0, "ci95": [0.0, 1.0], "n": 0}
