"""Exact and fuzzy (MinHash, LSH) deduplication across all shards.

Each is a chain of tasks over shards and over parts of a key's range; between them only (key, document) rows travel, in files. Nothing but
the list of verified pairs is ever held whole.

    exact: keys of each shard -> groups of each part -> drops
    fuzzy: sketches of each shard -> pairs of each part -> verified pairs of each shard -> clusters -> resolved clusters -> drops
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

import numpy as np
import pyarrow as pa
import xxhash
from numba import njit
from pydantic import Field, model_validator

from gristmill.core.config import Section
from gristmill.curate.dedup import minhash
from gristmill.curate.io import shards
from gristmill.curate.outcome import Outcome, split
from gristmill.curate.text.text_column import TextColumn
from gristmill.data.minhash import band_keys, jaccard

KEYS_A_PART = 4_000_000
NEIGHBOURS = 8  # documents before it in a bucket that each is paired with, beside the first
DROPS = pa.schema([("number", pa.int64()), ("keeper", pa.int64()), ("figure", pa.float64())])
PAIRS = pa.schema([("left", pa.int64()), ("right", pa.int64())])


class Exact(Section):
    """Exact deduplication: keep the first of documents whose texts are the same."""

    step: Literal["exact"] = "exact"


class Signature(Section):
    """MinHash signature and its LSH bands."""

    shingle: Literal["words", "characters"] = "words"
    size: int = Field(0, ge=0, description="of a shingle; 0: 5 words or 24 characters")
    bands: int = Field(20, gt=0)
    rows: int = Field(13, gt=0, description="hashes of a band")
    seed: int = 0

    @model_validator(mode="after")
    def _small_enough(self) -> Self:
        if self.bands * self.rows > 4096:
            raise ValueError("bands * rows must be at most 4096")
        return self

    @property
    def words(self) -> bool:
        return self.shingle == "words"

    @property
    def shingle_size(self) -> int:
        return self.size or (5 if self.words else 24)

    def of(self, texts: TextColumn) -> tuple[np.ndarray, np.ndarray]:
        """`minhash.signatures` of texts."""
        return minhash.signatures(texts, self.words, self.shingle_size, num_hashes=self.bands * self.rows, seed=self.seed)


class Fuzzy(Signature):
    """Fuzzy deduplication: MinHash, LSH, and every drop verified against the document that is kept for it."""

    step: Literal["fuzzy"] = "fuzzy"
    threshold: float = Field(0.7, ge=0, le=1, description="min Jaccard similarity of a near duplicate and the document kept for it")
    verify: Literal["exact", "estimate"] = Field("exact", description="by shingles, or by agreement of the signatures")
    keep: Literal["longest", "first"] = "longest"


def num_parts(documents: int, keys_each: int) -> int:
    """Parts of the keys' range, so that one fits into memory."""
    return max(1, -(-documents * keys_each // KEYS_A_PART))


# ---- exact ----


def exact_keys(shard: int, source: Path, out: Path, parts: int) -> dict[str, int]:
    """Hashes (xxh3, 128 bits) of a shard's texts."""
    texts = TextColumn.of(shards.read(source)["text"])
    digests = b"".join([xxhash.xxh3_128_digest(texts.bytes_of(i)) for i in range(len(texts))])
    high, low = np.frombuffer(digests, ">u8").astype(np.uint64).reshape(-1, 2).T
    table = pa.table({"high": high, "low": low, "number": shards.number(shard, np.arange(len(texts)))})
    shards.write_parts(out, table, (low % np.uint64(parts)).astype(np.int64), num_parts=parts)
    return {}


def exact_groups(part: int, keys: Sequence[Path], out: Path, num_shards: int) -> dict[str, int]:
    """All but the first of each group of one part."""
    table = shards.read_part(keys, part)
    high, low, numbers = (table[name].to_numpy() for name in ("high", "low", "number"))
    order = np.lexsort((numbers, high, low))
    high, low, numbers = high[order], low[order], numbers[order]
    first = np.ones(len(numbers), bool)
    first[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
    keeper = numbers[np.maximum.accumulate(np.where(first, np.arange(len(numbers)), 0))]
    write_drops(out, numbers[~first], keeper[~first], figures=np.ones((~first).sum()), num_shards=num_shards)
    return {}


def write_drops(out: Path, numbers: np.ndarray, keepers: np.ndarray, *, figures: np.ndarray, num_shards: int) -> None:
    """Documents to drop, each with the one kept for it, by shards."""
    table = pa.table({"number": numbers, "keeper": keepers, "figure": figures}, schema=DROPS)
    shards.write_parts(out, table, shards.shard_of(numbers), num_parts=num_shards)


def drop(shard: int, sources: Sequence[Path], drops: Sequence[Path], step: str, limit: float) -> Outcome:
    """A shard without the documents that are to be dropped; the reason names the document kept for each."""
    table = shards.read(sources[shard])
    gone = shards.read_part(drops, shard)
    rows, keepers = shards.row_of(gone["number"].to_numpy()), gone["keeper"].to_numpy()
    reasons: list[str | None] = [None] * len(table)
    figures = np.zeros(len(table))
    figures[rows] = gone["figure"].to_numpy()
    words = "same text as" if step == "exact" else "near duplicate of"
    for row, name in zip(rows.tolist(), shards.column_of(sources, keepers, "id").to_pylist(), strict=True):
        reasons[row] = f"{words} {name}"
    return split(table, step, reasons, figures, np.full(len(table), limit))


# ---- fuzzy ----


def sketch(shard: int, source: Path, keys: Path, signatures: Path, parts: int, how: Fuzzy) -> dict[str, int]:
    """LSH band keys of a shard, and its MinHash signatures where pairs are verified by them."""
    texts = TextColumn.of(shards.read(source)["text"])
    signature, counts = how.of(texts)
    some = np.flatnonzero(counts > 0)  # a text without words is like no other
    key_NB = band_keys(signature[some], how.bands, how.rows)
    table = pa.table({"key": key_NB.ravel(), "number": np.repeat(shards.number(shard, some), how.bands)})
    shards.write_parts(keys, table, (key_NB.ravel() % np.uint64(parts)).astype(np.int64), num_parts=parts)
    if how.verify == "estimate":
        shards.write(signatures, pa.table({"signature": shards.packed(signature)}))
    return {}


def pairs(part: int, keys: Sequence[Path], out: Path, num_shards: int) -> dict[str, int]:
    """Candidate pairs of one part of the keys: each document with the first of its bucket and with those just before it."""
    table = shards.read_part(keys, part)
    key, number = table["key"].to_numpy(), table["number"].to_numpy()
    order = np.lexsort((number, key))
    found = _pairs(key[order], number[order], NEIGHBOURS)
    left, right = _unique(*found)
    shards.write_parts(out, pa.table({"left": left, "right": right}, schema=PAIRS), shards.shard_of(left), num_parts=num_shards)
    return {"pairs": len(found[0])}


@njit(cache=True, nogil=True)
def _pairs(key, number, neighbours):  # type: ignore[no-untyped-def]
    left, right = [], []
    first = 0
    for i in range(1, len(key)):
        if key[i] != key[first]:
            first = i
            continue
        for j in range(max(first, i - neighbours), i):
            left.append(number[j])
            right.append(number[i])
        if i - neighbours > first:
            left.append(number[first])
            right.append(number[i])
    return np.array(left, np.int64), np.array(right, np.int64)


def _unique(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Different pairs, sorted."""
    order = np.lexsort((right, left))
    left, right = left[order], right[order]
    new = np.ones(len(left), bool)
    new[1:] = (left[1:] != left[:-1]) | (right[1:] != right[:-1])
    return left[new], right[new]


class Similar:
    """Jaccard similarity of documents by their numbers; the last one asked for on the left is kept at hand."""

    def __init__(self, sources: Sequence[Path], signatures: Sequence[Path], how: Fuzzy) -> None:
        self.sources, self.signatures, self.how = sources, signatures, how
        self._number, self._sketch = -1, np.empty(0, np.uint64)

    def __call__(self, left: int, right: int) -> float:
        if left != self._number:
            self._number, self._sketch = left, self._read(left)
        other = self._read(right)
        if self.how.verify == "exact":
            return float(jaccard(self._sketch, other))
        return float((self._sketch == other).mean())

    def _read(self, number: int) -> np.ndarray:
        if self.how.verify == "exact":
            return minhash.shingle_set(shards.text_of(self.sources, number), self.how.words, self.how.shingle_size)
        row = shards.column_of(self.signatures, np.array([number]), "signature")[0].as_buffer()
        return np.frombuffer(row, np.uint32)


def verify(shard: int, found: Sequence[Path], sources: Sequence[Path], signatures: Sequence[Path], out: Path, how: Fuzzy) -> dict[str, int]:
    """Verified pairs: candidates whose first document is in this shard, and that are similar enough."""
    table = shards.read_part(found, shard)
    left, right = _unique(table["left"].to_numpy(), table["right"].to_numpy())  # from several bands
    similar = Similar(sources, signatures, how)
    kept = [(a, b) for a, b in zip(left.tolist(), right.tolist(), strict=True) if similar(a, b) >= how.threshold]
    a, b = np.array(kept, np.int64).reshape(-1, 2).T
    shards.write(out, pa.table({"left": a, "right": b}, schema=PAIRS))
    return {"pairs": len(left), "verified": len(kept)}


def clusters(verified: Sequence[Path], out: Path, parts: int) -> dict[str, int]:
    """Connected components of the verified pairs: (cluster, number), by parts."""
    tables = [shards.read(path) for path in verified]
    left, right = (np.concatenate([table[name].to_numpy() for table in tables] or [np.empty(0, np.int64)]) for name in ("left", "right"))
    nodes, places = np.unique(np.concatenate([left, right]), return_inverse=True)
    root = _components(len(nodes), places[: len(left)].astype(np.int64), places[len(left) :].astype(np.int64))
    table = pa.table({"cluster": root, "number": nodes})
    shards.write_parts(out, table, root % parts, num_parts=parts)
    return {"clusters": len(np.unique(root))}


@njit(cache=True, nogil=True)
def _components(count, left, right):  # type: ignore[no-untyped-def]
    parent = np.arange(count)
    for i in range(len(left)):
        a, b = left[i], right[i]
        while parent[a] != a:
            parent[a] = parent[parent[a]]
            a = parent[a]
        while parent[b] != b:
            parent[b] = parent[parent[b]]
            b = parent[b]
        if a < b:
            parent[b] = a
        else:
            parent[a] = b
    for i in range(count):
        parent[i] = parent[parent[i]]  # parents come first
    return parent


def resolve_clusters(part: int, found: Path, sources: Sequence[Path], signatures: Sequence[Path], out: Path, how: Fuzzy) -> dict[str, int]:
    """Keep the best of each cluster and drop what is similar to it; then the best of the rest, and so on.

    So nothing is dropped for a document that it is not like, however long the chain between them.
    """
    table = shards.read_part([found], part)
    cluster, number = table["cluster"].to_numpy(), table["number"].to_numpy()
    order = np.lexsort((number, cluster))
    cluster, number = cluster[order], number[order]
    similar = Similar(sources, signatures, how)
    dropped: list[tuple[int, int, float]] = []
    for members in np.split(number, np.flatnonzero(np.diff(cluster)) + 1):
        rest = members.tolist()
        if how.keep == "longest":
            rest.sort(key=lambda one: (-len(shards.text_of(sources, one)), one))
        while len(rest) > 1:
            best, others = rest[0], rest[1:]
            figures = [similar(best, other) for other in others]
            dropped += [(other, best, figure) for other, figure in zip(others, figures, strict=True) if figure >= how.threshold]
            rest = [other for other, figure in zip(others, figures, strict=True) if figure < how.threshold]
    columns = list(zip(*dropped, strict=True)) or [(), (), ()]
    numbers, keepers = (np.array(column, np.int64) for column in columns[:2])
    write_drops(out, numbers, keepers, figures=np.array(columns[2], np.float64), num_shards=len(sources))
    return {}
