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


def paired(before: Sequence[bool], after: Sequence[bool]) -> dict[str, Any]:
    """Difference of two models on the same prompts, with a 95 % interval from the per-prompt differences."""
    differences = [float(b) - float(a) for a, b in zip(before, after, strict=True)]
    n = len(differences)
    if n == 0:
        return {"mean": 0.0, "ci95": [-1.0, 1.0], "n": 0}
    mean = sum(differences) / n
    variance = sum((d - mean) ** 2 for d in differences) / (n - 1) if n > 1 else 0.0
    half = Z * math.sqrt(variance / n)
    return {"mean": round(mean, 4), "ci95": [round(mean - half, 4), round(mean + half, 4)], "n": n}
