"""Scores of tasks and groups: means with intervals, micro and macro, perplexities; by hand."""

import math

import pytest

from gristmill.evaluate.benchmark_scores import Outcome, group, margin, mean_score, perplexity, score
from gristmill.evaluate.stats import wilson


def test_means_with_their_intervals() -> None:
    found = mean_score([1.0, 0.0, 1.0, 1.0])
    assert found["value"] == 0.75 and found["n"] == 4
    assert found["stderr"] == pytest.approx(math.sqrt(0.75 / 3 / 4))  # squares of .25 thrice and .75: .75
    assert found["ci95"] == [round(bound, 4) for bound in wilson(3, 4)]
    shares = mean_score([0.2, 0.4, 0.9, 0.5])
    assert shares["ci95"][0] < 0.5 == shares["value"] < shares["ci95"][1] and shares["ci95"][0] > 0.2
    assert mean_score([0.5])["stderr"] is None and mean_score([])["value"] is None


def test_perplexity_is_of_all_words() -> None:
    found = perplexity([(-10.0, 4), (-2.0, 2)])
    assert found["value"] == pytest.approx(math.exp(2)) and found["n"] == 6
    assert found["ci95"][0] <= found["value"] <= found["ci95"][1]
    assert perplexity([(-3.0, 3)])["ci95"] is None


def test_groups_are_micro_and_macro() -> None:
    parts = {"a": [Outcome(0, {"acc": 1.0}), Outcome(1, {"acc": 1.0})], "b": [Outcome(i, {"acc": 0.0}) for i in range(6)]}
    scores = {name: score(outcomes) for name, outcomes in parts.items()}
    found = group(parts, scores)["acc"]
    assert (found["value"], found["macro"], found["subsets"], found["n"]) == (0.25, 0.5, 2, 8)
    assert found["stderr"] == 0.0  # pooled from subsets without variance, as the harness has it
    assert found["ci95"] == [round(bound, 4) for bound in wilson(2, 8)]


def test_instructions_are_counted_one_by_one() -> None:
    outcomes = [Outcome(0, clusters={"inst": [True, False]}), Outcome(1, clusters={"inst": [True]})]
    assert score(outcomes)["inst"]["value"] == pytest.approx(2 / 3) and score(outcomes)["inst"]["n"] == 3
    assert margin([-3.0, -1.0, -1.5]) == 0.5 and margin([-1.0]) is None
