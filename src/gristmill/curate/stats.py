"""Statistics of a step: documents in and out, reasons, a histogram of every metric, sample documents. Those of shards add up.

A histogram has the same bins for every metric, so that shards need not know each other's range: steps of 1/50 between 0 and 1, four to an
octave beyond, the same below 0. Bin b is (edge(b - 1), edge(b)], and bin 0 is 0 itself.
"""

import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gristmill.curate.outcome import Metric, Outcome

Facts = dict[str, Any]
BINS_TO_ONE, BINS_PER_OCTAVE = 50, 4
MAX_SAMPLES = 2  # of a reason, or of a metric
MAX_REASONS = 40  # with samples
SAMPLE_CHARACTERS = 600
MAX_COMPARED = 100_000  # characters, to find the first change
WITH_ID = ("same text as ", "near duplicate of ", "seen before as ")  # reasons that name a document
BEFORE_CHANGE = 100  # characters of a sample that is shown from where it was changed


def edge(number: int) -> float:
    """The end of a bin that lies farther from 0."""
    size = abs(number)
    value = size / BINS_TO_ONE if size <= BINS_TO_ONE else 2.0 ** ((size - BINS_TO_ONE) / BINS_PER_OCTAVE)
    return value if number >= 0 else -value


def histogram(values_N: np.ndarray) -> dict[str, int]:
    """Number of values in each bin that has some, by the bin's number; NaN is in none."""
    values_N = values_N[~np.isnan(values_N)].astype(np.float64).clip(-1e300, 1e300)
    size_N = np.abs(values_N)
    beyond_N = BINS_TO_ONE + BINS_PER_OCTAVE * np.log2(np.maximum(size_N, 1))
    bin_N = np.copysign(np.ceil(np.where(size_N <= 1, BINS_TO_ONE * size_N, beyond_N)), values_N).astype(np.int64)
    if not len(bin_N):
        return {}
    lowest = int(bin_N.min())
    count_B = np.bincount(bin_N - lowest)
    return {str(lowest + b): int(count_B[b]) for b in np.flatnonzero(count_B).tolist()}


def num_bytes(table: pa.Table) -> int:
    """Of all texts, UTF-8."""
    return pc.sum(pc.binary_length(table["text"])).as_py() or 0


def of_step(step: Any, before: pa.Table, outcome: Outcome, seconds: float = 0.0) -> Facts:
    """What a step did to a shard.

    Args:
        step: its settings; the first line of their class's docstring says what it does.
        seconds: that it took.
    """
    reasons = [_general(reason) for reason in outcome.dropped["reason"].to_pylist()]
    return {
        "step": step.step,
        "description": (type(step).__doc__ or "").splitlines()[0],
        "documents_in": len(before),
        "bytes_in": num_bytes(before),
        "documents_out": len(outcome.kept),
        "bytes_out": num_bytes(outcome.kept),
        "reasons": dict(Counter(reasons)),
        "changed": dict(outcome.counts),
        "metrics": {name: _of_metric(metric) for name, metric in outcome.metrics.items()},
        "samples": {"dropped": _dropped_samples(outcome.dropped, reasons), "kept": _kept_samples(before, outcome)},
        "seconds": seconds,
    }


def _general(reason: str) -> str:
    """A reason without the id that is in it."""
    if reason.startswith(WITH_ID):
        return next(f"{words}another" for words in WITH_ID if reason.startswith(words))
    return reason


def _of_metric(metric: Metric) -> Facts:
    within_N, known_N = metric.within_N, ~np.isnan(metric.values_N)
    return {
        "description": metric.description,
        "min": None if metric.min is None else float(metric.min),
        "max": None if metric.max is None else float(metric.max),
        "documents": int(known_N.sum()),
        "outside": int((known_N & ~within_N).sum()),
        "bins": histogram(metric.values_N),
    }


def _dropped_samples(dropped: pa.Table, reasons: Sequence[str]) -> Facts:
    """The first documents of each reason."""
    rows: dict[str, list[int]] = {}
    for row, reason in enumerate(reasons):
        if reason in rows or len(rows) < MAX_REASONS:
            found = rows.setdefault(reason, [])
            if len(found) < MAX_SAMPLES:
                found.append(row)
    return {reason: _samples(dropped, found, "reason", "figure", "limit") for reason, found in rows.items()}


def _kept_samples(before: pa.Table, outcome: Outcome) -> Facts:
    """Of each metric with a limit the documents within it that come nearest to it; of a step without such, some that it changed or kept."""
    found: Facts = {}
    for name, metric in outcome.metrics.items():
        limits = [limit for limit in (metric.min, metric.max) if limit is not None]
        if not limits or not metric.of_input:
            continue
        distance_N = np.min([np.abs(metric.values_N - limit) for limit in limits], axis=0)
        distance_N[~metric.within_N] = np.inf
        nearest = np.argpartition(distance_N, MAX_SAMPLES)[:MAX_SAMPLES] if len(before) > MAX_SAMPLES else np.arange(len(before))
        rows = [row for row in nearest.tolist() if distance_N[row] < np.inf]
        samples = _samples(before, rows)
        for sample, row in zip(samples, rows, strict=True):
            sample |= {"figure": float(metric.values_N[row]), "distance": float(distance_N[row])}
        if samples:
            found[name] = samples
    if found or not len(outcome.kept):
        return found
    changed = _changed_samples(before, outcome) if outcome.counts else []
    return {"": changed or _samples(outcome.kept, range(min(MAX_SAMPLES, len(outcome.kept))))}


def _changed_samples(before: pa.Table, outcome: Outcome) -> list[Facts]:
    """Kept documents with other texts than before, from about where they were changed; none where rows do not tell which is which."""
    same = before.filter(pc.invert(pc.is_in(before["id"], outcome.dropped["id"].combine_chunks()))) if len(outcome.dropped) else before
    kept = outcome.kept
    if not same["id"].equals(kept["id"]):
        return []
    rows = np.flatnonzero(pc.not_equal(same["text"], kept["text"]).to_numpy(zero_copy_only=False))[:MAX_SAMPLES].tolist()
    out = []
    for row in rows:
        old, new = same["text"][row].as_py(), kept["text"][row].as_py()
        begin = max(0, len(os.path.commonprefix([old[:MAX_COMPARED], new[:MAX_COMPARED]])) - BEFORE_CHANGE)
        text = ("..." if begin else "") + new[begin : begin + SAMPLE_CHARACTERS]
        out.append({"id": kept["id"][row].as_py(), "text": text})
    return out


def _samples(table: pa.Table, rows: Sequence[int], *columns: str) -> list[Facts]:
    taken = table.select(["id", "text", *columns]).take(pa.array(rows, pa.int64()))
    text = pc.utf8_slice_codeunits(taken["text"], 0, SAMPLE_CHARACTERS)
    return taken.set_column(1, "text", text).to_pylist()


def add(shards: Sequence[Facts]) -> Facts:
    """The facts of one step over all shards."""
    total: Facts = {name: shards[0][name] for name in ("step", "description")}
    for name in ("documents_in", "bytes_in", "documents_out", "bytes_out", "seconds"):
        total[name] = sum(one[name] for one in shards)
    for name in ("reasons", "changed"):
        total[name] = dict(sum((Counter(one[name]) for one in shards), Counter()).most_common())
    metrics: Facts = {}
    for name, metric in (item for one in shards for item in one["metrics"].items()):
        if name not in metrics:
            metrics[name] = {**metric, "bins": Counter(metric["bins"])}
            continue
        metrics[name]["bins"].update(metric["bins"])
        for count in ("documents", "outside"):
            metrics[name][count] += metric[count]
    total["metrics"] = {name: {**metric, "bins": dict(sorted(metric["bins"].items(), key=_number))} for name, metric in metrics.items()}
    return total


def _number(item: tuple[str, int]) -> int:
    return int(item[0])


def add_samples(shards: Sequence[Facts]) -> Facts:
    """The samples of one step over all shards: the first ones, but of a metric the nearest to its limit."""
    total: Facts = {"dropped": {}, "kept": {}}
    for one in shards:
        for kind in ("dropped", "kept"):
            for name, samples in one["samples"][kind].items():
                total[kind].setdefault(name, []).extend(samples)
    for kind in total:
        for name, samples in total[kind].items():
            total[kind][name] = sorted(samples, key=lambda sample: sample.get("distance", 0.0))[:MAX_SAMPLES]
    return total
