"""Deduplication against earlier curations: `remember` keeps hash and signature of all that pass it, `seen` drops what is among them.

    seen: keys of each shard, keys of each file of the index -> pairs of each part -> drops of each shard

Near duplicates are verified by the agreement of signatures: the earlier texts need not be there any more.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import xxhash
from numba import njit
from pydantic import Field

from gristmill.core.config import FilePath, Section
from gristmill.core.errors import InputError
from gristmill.core.io import read_json, write_json
from gristmill.curate.dedup.duplicates import NEIGHBOURS, PAIRS, Signature
from gristmill.curate.io import shards
from gristmill.curate.outcome import Outcome, split
from gristmill.curate.text.text_column import TextColumn
from gristmill.curate.text.words import VERSION
from gristmill.data.minhash import band_keys

DESCRIPTION = "index.json"


class Remember(Signature):
    """Build a deduplication index: put what passes here into the run's `index/`, for a later curation."""

    step: Literal["remember"] = "remember"


class Seen(Section):
    """Drop what an earlier curation remembered, and what is near to it."""

    step: Literal["seen"] = "seen"
    index: FilePath = Field(description="the `index` folder of an earlier run")
    threshold: float = Field(0.7, ge=0, le=1, description="min share of a signature that agrees; 1 drops only equal texts")


def described(index: Path) -> Remember:
    """How an index was made.

    Raises:
        InputError: there is none, or it was made by a version that took other words.
    """
    try:
        settings = read_json(index / DESCRIPTION)
        version = settings.pop("words", 1)
        how = Remember.model_validate(settings)
    except (OSError, ValueError, AttributeError) as e:
        raise InputError(f"{index} is no index of an earlier curation: give the `index` folder of a run with the step `remember`.") from e
    if version != VERSION:
        raise InputError(
            f"{index} holds signatures of other words (version {version}) than this gristmill makes ({VERSION}): "
            "run the recipe with the step `remember` again, on the documents of that run."
        )
    return how


def describe(index: Path, how: Remember) -> None:
    """Write down how an index was made."""
    write_json(index / DESCRIPTION, how.model_dump(mode="json") | {"words": VERSION})


def _sketched(table: pa.Table, how: Remember) -> pa.Table:
    """id, hash (16 bytes), signature (bytes; null of a text without shingles)."""
    texts = TextColumn.of(table["text"])
    signature, counts = how.of(texts)
    hashes = [xxhash.xxh3_128_digest(texts.bytes_of(i)) for i in range(len(texts))]
    flat = [signature[i].tobytes() if counts[i] else None for i in range(len(texts))]
    return pa.table(
        {"id": table["id"], "hash": pa.array(hashes, pa.binary(16)), "signature": pa.array(flat, pa.binary(4 * how.bands * how.rows))}
    )


def remember(source: Path, out: Path, how: Remember) -> dict[str, Any]:
    """A shard's part of the index."""
    shards.write(out, _sketched(shards.read(source), how))
    return {}


def sketch(source: Path, out: Path, index: Path) -> dict[str, Any]:
    """A new shard as the index would hold it."""
    shards.write(out, _sketched(shards.read(source), described(index)))
    return {}


def keys(shard: int, sketched: Path, out: Path, parts: int, index: Path) -> dict[str, Any]:
    """(key, number) of one file of sketches: a key for the hash, and one for each band."""
    how, table = described(index), shards.read(sketched)
    hashes = np.frombuffer(b"".join(table["hash"].to_pylist()), np.uint64).reshape(-1, 2)
    some = np.flatnonzero(table["signature"].is_valid().to_numpy(zero_copy_only=False))
    signature = np.frombuffer(b"".join(table["signature"].drop_null().to_pylist()), np.uint32).reshape(-1, how.bands * how.rows)
    bands = band_keys(np.ascontiguousarray(signature), how.bands, how.rows)
    key = np.concatenate([hashes[:, 0], bands.ravel()])
    rows = np.concatenate([np.arange(len(hashes)), np.repeat(some, how.bands)])
    found = pa.table({"key": key, "number": shards.number(shard, rows)})
    shards.write_parts(out, found, (key % np.uint64(parts)).astype(np.int64), num_parts=parts)
    return {}


def pairs(part: int, new: Sequence[Path], old: Sequence[Path], out: Path, num_shards: int) -> dict[str, Any]:
    """(new, old) documents that share a key, of one part; of many old ones the first few."""
    columns = []
    for paths in (new, old):
        table = shards.read_part(paths, part)
        key, number = table["key"].to_numpy(), table["number"].to_numpy()
        order = np.lexsort((number, key))
        columns += [key[order], number[order]]
    new_key, new_number, old_key, old_number = columns
    left, right = _joined(new_key, new_number, old_key, old_number, NEIGHBOURS)
    table = pa.table({"left": left, "right": right}, schema=PAIRS)
    shards.write_parts(out, table, shards.shard_of(left), num_parts=num_shards)
    return {}


@njit(cache=True, nogil=True)
def _joined(new_key, new_number, old_key, old_number, max_old):  # type: ignore[no-untyped-def]
    left, right = [np.int64(0) for _ in range(0)], [np.int64(0) for _ in range(0)]
    at = 0
    for i in range(len(new_key)):
        while at < len(old_key) and old_key[at] < new_key[i]:
            at += 1
        for k in range(at, min(at + max_old, len(old_key))):
            if old_key[k] != new_key[i]:
                break
            left.append(new_number[i])
            right.append(old_number[k])
    return np.array(left, np.int64), np.array(right, np.int64)


def unseen(
    shard: int, source: Path, sketches: Sequence[Path], old: Sequence[Path], found: Sequence[Path], how: Seen
) -> tuple[pa.Table, Outcome]:
    """A shard, and it without what the index holds."""
    table = shards.read(source)
    pairs_ = shards.read_part(found, shard)
    left, right = pairs_["left"].to_numpy(), pairs_["right"].to_numpy()
    mine, theirs = (
        [shards.column_of(paths, side, name).to_pylist() for name in ("hash", "signature")]
        for paths, side in ((sketches, left), (old, right))
    )
    best: dict[int, tuple[float, int]] = {}
    for i, row in enumerate(shards.row_of(left).tolist()):
        figure = 1.0 if mine[0][i] == theirs[0][i] else _agreement(mine[1][i], theirs[1][i])
        if (figure >= how.threshold and (how.threshold < 1 or mine[0][i] == theirs[0][i])) and figure > best.get(row, (-1.0, 0))[0]:
            best[row] = (figure, int(right[i]))
    reasons: list[str | None] = [None] * len(table)
    figures = np.zeros(len(table))
    rows = sorted(best)
    names = shards.column_of(old, np.array([best[row][1] for row in rows], np.int64), "id").to_pylist()
    for row, name in zip(rows, names, strict=True):
        reasons[row], figures[row] = f"seen before as {name}", best[row][0]
    return table, split(table, "seen", reasons, figures, np.full(len(table), how.threshold))


def _agreement(left: bytes | None, right: bytes | None) -> float:
    if left is None or right is None:
        return 0.0
    return float((np.frombuffer(left, np.uint32) == np.frombuffer(right, np.uint32)).mean())
