"""Scores of benchmark tasks with their intervals: from what each document's answer was worth to a task's and a group's figures."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gristmill.evaluate.stats import clustered, wilson

NUM_RESAMPLES = 1000
CLOSE = 1e-5  # nats between two choices that another machine's arithmetic may rank otherwise


@dataclass
class Outcome:
    """What one document's answer was worth.

    Attributes:
        scores: by column, as "acc", "exact_match,strict-match" or "own".
        clusters: by column, of what is counted within a document (IFEval's instructions).
        sums: by column, a log-likelihood and what it is divided by (words, bytes).
        unparsed: columns in whose way of reading the answer says nothing.
    """

    number: int
    scores: dict[str, float] = field(default_factory=dict)
    clusters: dict[str, list[bool]] = field(default_factory=dict)
    sums: dict[str, tuple[float, int]] = field(default_factory=dict)
    unparsed: list[str] = field(default_factory=list)
    margin: float | None = None
    contaminated: bool = False


def score(outcomes: Sequence[Outcome]) -> dict[str, dict[str, Any]]:
    """Metrics of a task: by column {value, stderr, ci95, n}. Shares have Wilson's interval, others a bootstrap's."""
    out: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(column for outcome in outcomes for column in outcome.scores):
        out[name] = mean_score([outcome.scores[name] for outcome in outcomes if name in outcome.scores])
    for name in dict.fromkeys(column for outcome in outcomes for column in outcome.clusters):
        groups = [outcome.clusters[name] for outcome in outcomes if name in outcome.clusters]
        found = clustered(groups)
        flat = [ok for group in groups for ok in group]
        out[name] = {"value": sum(flat) / len(flat) if flat else 0.0, "stderr": None, "ci95": found["ci95"], "n": len(flat)}
    for name in dict.fromkeys(column for outcome in outcomes for column in outcome.sums):
        out[name] = perplexity([outcome.sums[name] for outcome in outcomes if name in outcome.sums])
    return out


def mean_score(values: Sequence[float]) -> dict[str, Any]:
    """Mean of scores, its standard error (sample deviation by the root of n), 95 % interval and n."""
    n = len(values)
    if not n:
        return {"value": None, "stderr": None, "ci95": None, "n": 0}
    mean = sum(values) / n
    stderr = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n) if n > 1 else None
    if all(value in (0.0, 1.0) for value in values):
        low, high = wilson(round(sum(values)), n)
    else:
        low, high = _bootstrap(np.array(values, np.float64)[:, None], lambda sums: sums[:, 0] / n)
    return {"value": mean, "stderr": stderr, "ci95": [round(low, 4), round(high, 4)], "n": n}


def perplexity(sums: Sequence[tuple[float, int]]) -> dict[str, Any]:
    """Perplexity of texts: exp of minus all log-likelihoods by all words (or bytes), its interval from resampled texts."""
    table = np.array(sums, np.float64)
    value = float(np.exp(-table[:, 0].sum() / table[:, 1].sum()))
    low, high = _bootstrap(table, lambda totals: np.exp(-totals[:, 0] / totals[:, 1])) if len(table) > 1 else (0.0, math.inf)
    bounds = [round(bound, 4) if math.isfinite(bound) else None for bound in (low, high)]
    return {"value": value, "stderr": None, "ci95": bounds if len(table) > 1 else None, "n": int(table[:, 1].sum())}


def _bootstrap(table: np.ndarray, statistic: Any) -> tuple[float, float]:
    """Percentile interval of a statistic of column sums, over documents drawn again."""
    draw = np.random.default_rng(0)
    n = len(table)
    weights = np.stack([np.bincount(draw.integers(0, n, n), minlength=n) for _ in range(NUM_RESAMPLES)])
    found = statistic(weights @ table)
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)


def group(parts: Mapping[str, Sequence[Outcome]], scores: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Metrics of a task of several subsets: micro (over all documents, as the harness) and macro (mean of the subsets)."""
    micro = score([outcome for outcomes in parts.values() for outcome in outcomes])
    for name, one in micro.items():
        values = [scores[part][name]["value"] for part in parts if name in scores[part]]
        one["macro"] = sum(values) / len(values)
        one["subsets"] = len(values)
        sizes = [scores[part][name]["n"] for part in parts if name in scores[part]]
        errors = [scores[part][name]["stderr"] for part in parts if name in scores[part]]
        if all(error is not None for error in errors) and sum(sizes) > len(sizes):  # pooled, as the harness
            pooled = sum((size - 1) * error**2 * size for size, error in zip(sizes, errors, strict=True)) / (sum(sizes) - len(sizes))
            one["stderr"] = math.sqrt(pooled / sum(sizes))
    return micro


def margin(values: Sequence[float]) -> float | None:
    """How far the best choice is before the second."""
    best = sorted(values, reverse=True)
    return best[0] - best[1] if len(best) > 1 else None
