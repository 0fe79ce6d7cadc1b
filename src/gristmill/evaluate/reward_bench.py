"""Reward-model benchmark: accuracy on easy and hard pairs by category, and correlation with annotators by attribute."""

import math
from collections.abc import Sequence
from typing import Any

from gristmill.data.rows import ATTRIBUTES, Rated, Rating, Response
from gristmill.evaluate.stats import accuracy
from gristmill.judge.pairwise import Comparison, Verdict

EASY_GAP = 4.0  # consensus helpfulness points between the answers of an easy pair: the whole scale


def easy_pairs(rows: Sequence[Rated]) -> list[tuple[Rated, Rated]]:
    """(better, worse) held-out human-rated answers to one prompt, at least `EASY_GAP` apart in helpfulness."""
    groups: dict[str, list[Rated]] = {}
    for row in rows:
        groups.setdefault(row.pair, []).append(row)
    out = []
    for group in groups.values():
        if len(group) == 2 and None not in (group[0].labels[0], group[1].labels[0]):
            worse, better = sorted(group, key=lambda r: r.labels[0] or 0.0)
            if (better.labels[0] or 0.0) - (worse.labels[0] or 0.0) >= EASY_GAP:
                out.append((better, worse))
    return out


def hard_pairs(rows: Sequence[Response], per_task: int) -> list[tuple[Response, Response]]:
    """(right, wrong) answers that one model gave to one prompt: errors that the model itself finds plausible."""
    groups: dict[str, list[Response]] = {}
    for row in rows:
        groups.setdefault(row.prompt, []).append(row)
    out: list[tuple[Response, Response]] = []
    count: dict[str, int] = {}
    for group in groups.values():
        right, wrong = [r for r in group if r.good], [r for r in group if not r.good]
        if right and wrong and count.get(group[0].task, 0) < per_task:
            out.append((right[0], wrong[0]))
            count[group[0].task] = count.get(group[0].task, 0) + 1
    return out


def pair_accuracy(tasks: Sequence[str], right: Sequence[bool]) -> dict[str, Any]:
    """Accuracy overall and by category."""
    by_task = {t: accuracy([ok for task, ok in zip(tasks, right, strict=True) if task == t]) for t in dict.fromkeys(tasks)}
    return {"overall": accuracy(list(right)), **by_task}


def judge_accuracy(tasks: Sequence[str], comparisons: Sequence[Comparison], verdicts: dict[str, Verdict]) -> dict[str, Any]:
    """An LLM judge on the same pairs (the better answer is always `first`): a tie or an unparsed reply counts half."""
    points = [1.0 if verdicts[c.id] == "first" else 0.0 if verdicts[c.id] == "second" else 0.5 for c in comparisons]
    n = len(points)
    mean = sum(points) / n if n else 0.0
    half = 1.96 * math.sqrt(sum((p - mean) ** 2 for p in points) / max(1, n - 1) / max(1, n))
    kinds = {v: sum(x == v for x in verdicts.values()) for v in ("first", "second", "tie", "unparsed")}
    by_task = {}
    for t in dict.fromkeys(tasks):
        mine = [p for task, p in zip(tasks, points, strict=True) if task == t]
        by_task[t] = {"mean": round(sum(mine) / len(mine), 4), "n": len(mine)}
    overall = {"mean": round(mean, 4), "ci95": [round(max(0.0, mean - half), 4), round(min(1.0, mean + half), 4)], "n": n}
    return {"overall": overall, "verdicts": kinds, **by_task}


def correlations(rows: Sequence[Rated], ratings: Sequence[Rating]) -> dict[str, float | None]:
    """Pearson correlation of each predicted attribute with the annotators' consensus; None when either never varies."""
    out: dict[str, float | None] = {}
    for column, name in enumerate(ATTRIBUTES):
        known = [(r.labels[column], getattr(rating, name)) for r, rating in zip(rows, ratings, strict=True)]
        pairs = [(a, b) for a, b in known if a is not None]
        out[name] = _pearson(pairs)
    return out


def _pearson(pairs: Sequence[tuple[float, float]]) -> float | None:
    n = len(pairs)
    if n < 2:
        return None
    mean_a, mean_b = sum(a for a, _ in pairs) / n, sum(b for _, b in pairs) / n
    cov = sum((a - mean_a) * (b - mean_b) for a, b in pairs)
    var_a, var_b = sum((a - mean_a) ** 2 for a, _ in pairs), sum((b - mean_b) ** 2 for _, b in pairs)
    return round(cov / math.sqrt(var_a * var_b), 4) if var_a and var_b else None
