"""Result of a step on a shard: kept documents, dropped ones with their reasons, counts and metrics; and helpers that steps share."""

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

# A document, wherever it is in the pipeline. `meta` is JSON.
DOCUMENT = pa.schema([("id", pa.string()), ("text", pa.large_string()), ("source", pa.string()), ("meta", pa.string())])
# A document that was dropped: the rule, what was measured, and the limit that it broke.
DROPPED = pa.schema([*DOCUMENT, ("step", pa.string()), ("reason", pa.string()), ("figure", pa.float64()), ("limit", pa.float64())])


@dataclass(frozen=True)
class Metric:
    """Values of a metric, and the range that documents are held to.

    Attributes:
        values_N: float64; NaN where nothing was measured.
        min, max: the limits that keep a document; None for no limit.
        of_input: the values are of the documents that came in, in their order, so that some can be shown.
    """

    values_N: np.ndarray
    min: float | None = None
    max: float | None = None
    description: str = ""
    of_input: bool = True

    @property
    def within_N(self) -> np.ndarray:
        """bool [N]: measured, and neither below nor above."""
        low, high = -np.inf if self.min is None else self.min, np.inf if self.max is None else self.max
        return (self.values_N >= low) & (self.values_N <= high)


@dataclass(frozen=True)
class Outcome:
    """Result of a step on a shard.

    Attributes:
        kept, dropped: in the order they came in; the latter of schema DROPPED.
        counts: of what was changed, by kind.
        metrics: what was measured, by name.
    """

    kept: pa.Table
    dropped: pa.Table
    counts: dict[str, int] = field(default_factory=dict)
    metrics: dict[str, Metric] = field(default_factory=dict)


def split(table: pa.Table, step: str, reasons: list[str | None], figures: np.ndarray, limits: np.ndarray) -> Outcome:
    """Part the documents that have a reason to be dropped from those that have none.

    Args:
        reasons: of each document; None keeps it.
        figures, limits: float64 of each document, read where there is a reason; NaN where nothing was measured.
    """
    keep = pa.array([reason is None for reason in reasons], pa.bool_())
    gone = np.array([i for i, reason in enumerate(reasons) if reason is not None], np.int64)
    dropped = table.select(DOCUMENT.names).take(pa.array(gone))
    columns = (
        pa.array([step] * len(gone), pa.string()),
        pa.array([reasons[i] for i in gone.tolist()], pa.string()),
        pa.array(np.asarray(figures, np.float64)[gone], from_pandas=True),  # NaN is null
        pa.array(np.asarray(limits, np.float64)[gone], from_pandas=True),
    )
    for name, column in zip(("step", "reason", "figure", "limit"), columns, strict=True):
        dropped = dropped.append_column(name, column)
    return Outcome(table.filter(keep), dropped.cast(DROPPED))


def in_meta(record: str | None, key: str) -> Any:
    """What a document's `meta` says under a key; None if it says nothing, or cannot be read."""
    if not record or (key not in record and "\\" not in record):  # a key may be written with escapes
        return None
    try:
        values = json.loads(record)
    except (ValueError, RecursionError):  # also numbers of thousands of digits, and deep nesting
        return None
    return values.get(key) if isinstance(values, dict) else None


def hash_uniform(ids: pa.ChunkedArray, seed: int, purpose: str) -> np.ndarray:
    """uint64 [N]: a uniform number made of a document's id, the seed and the purpose, whatever shard the document is in."""
    salt = xxhash.xxh3_64_intdigest(f"{seed} {purpose}".encode())
    return np.array([xxhash.xxh3_64_intdigest((id_ or "").encode(), salt) for id_ in ids.to_pylist()], np.uint64)


def none_dropped() -> pa.Table:
    """The table of no dropped document."""
    return DROPPED.empty_table()


def with_text(table: pa.Table, texts: pa.Array) -> pa.Table:
    """The same documents with other texts."""
    return table.set_column(table.schema.get_field_index("text"), DOCUMENT.field("text"), texts.cast(pa.large_string()))
