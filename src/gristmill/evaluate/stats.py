"""Confidence intervals (95 %) of accuracies and of paired differences."""

import math
from collections.abc import Sequence
from typing import Any

Z = 1.959963984540054


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Wilson score interval of a proportion (holds at 0 and 1, unlike the normal one)."""
    if n == 0:
        return 0.0, 1.0
    p, z2 = successes / n, Z * Z
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def accuracy(outcomes: Sequence[bool]) -> dict[str, Any]:
    """Mean, 95 % interval and n of right/wrong outcomes."""
    low, high = wilson(sum(outcomes), len(outcomes))
    mean = sum(outcomes) / len(outcomes) if outcomes else 0.0
    return {"mean": round(mean, 4), "ci95": [round(low, 4), round(high, 4)], "n": len(outcomes)}


def paired(before: Sequence[float], after: Sequence[float]) -> dict[str, Any]:
    """Difference of two models on the same prompts, with a 95 % interval from the per-prompt differences."""
    differences = [float(b) - float(a) for a, b in zip(before, after, strict=True)]
    n = len(differences)
    if n == 0:
        return {"mean": 0.0, "ci95": [-1.0, 1.0], "n": 0}
    mean = sum(differences) / n
    variance = sum((d - mean) ** 2 for d in differences) / (n - 1) if n > 1 else 0.0
    half = Z * math.sqrt(variance / n)
    return {"mean": round(mean, 4), "ci95": [round(mean - half, 4), round(mean + half, 4)], "n": n}


def clustered(outcomes: Sequence[Sequence[bool]]) -> dict[str, Any]:
    """Mean of right/wrong outcomes that come in clusters (a prompt's instructions), with a 95 % interval by the clusters' residuals."""
    found = _ratio([(float(sum(cluster)), len(cluster)) for cluster in outcomes], (0.0, 1.0))
    if found["mean"] in (0.0, 1.0):  # nothing varies, and yet nothing is certain
        found["ci95"] = [round(bound, 4) for bound in wilson(round(found["mean"] * len(outcomes)), len(outcomes))]
    return found


def paired_clustered(before: Sequence[Sequence[bool]], after: Sequence[Sequence[bool]]) -> dict[str, Any]:
    """Difference of two models on the same clustered outcomes, with a 95 % interval from the clusters' differences."""
    return _ratio([(float(sum(b) - sum(a)), len(a)) for a, b in zip(before, after, strict=True)], (-1.0, 1.0))


def _ratio(clusters: Sequence[tuple[float, int]], bounds: tuple[float, float]) -> dict[str, Any]:
    """Sum over size of clusters: the ratio estimator, with its linearized variance."""
    n, size = len(clusters), sum(num for _, num in clusters)
    low, high = bounds
    if n < 2 or not size:
        mean = sum(value for value, _ in clusters) / size if size else 0.0
        return {"mean": round(mean, 4), "ci95": [low, high], "n": size}
    mean = sum(value for value, _ in clusters) / size
    half = Z * math.sqrt(n / (n - 1) * sum((value - mean * num) ** 2 for value, num in clusters)) / size
    return {"mean": round(mean, 4), "ci95": [round(max(low, mean - half), 4), round(min(high, mean + half), 4)], "n": size}


def bootstrap(clusters: Sequence[Sequence[float]], *, seed: int = 0, rounds: int = 1000) -> dict[str, Any]:
    """Bootstrap interval (95 %, percentiles) of the mean of scores that come in clusters (a question's turns): clusters are drawn anew."""
    import numpy as np

    sums, sizes = np.array([sum(c) for c in clusters], float), np.array([len(c) for c in clusters], float)
    n = int(sizes.sum())
    if not n:
        return {"mean": None, "ci95": None, "n": 0}
    drawn = np.random.default_rng(seed).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=rounds)
    totals = drawn @ sizes
    low, high = np.percentile((drawn @ sums)[totals > 0] / totals[totals > 0], [2.5, 97.5])
    return {"mean": round(float(sums.sum() / n), 4), "ci95": [round(float(low), 4), round(float(high), 4)], "n": n}
