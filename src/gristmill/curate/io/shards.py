"""Arrow shards on disk, and the shuffle between them: rows sorted by the part that shall read them.

A shard is an Arrow file, uncompressed, so that single documents can be read from it through a memory map. A document is known by a number:
shard * 2^32 + row.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gristmill.core.io import replacing

ROW_BITS = 32


def write(path: Path, table: pa.Table) -> None:
    """Write a shard whole or not at all."""
    _write(path, table.schema, table.combine_chunks().to_batches())


def _write(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    with replacing(path) as temporary, pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


def read(path: Path) -> pa.Table:
    """A shard, through a memory map."""
    return _opened(path).read_all()


def _opened(path: Path) -> pa.RecordBatchFileReader:
    return pa.ipc.open_file(pa.memory_map(str(path), "r"))


def packed(rows: np.ndarray) -> pa.Array:
    """A two-dimensional array as a column: its rows as so many bytes each."""
    data = pa.py_buffer(np.ascontiguousarray(rows).tobytes())
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(rows.itemsize * rows.shape[1]), len(rows), [None, data])


def write_parts(path: Path, table: pa.Table, part_N: np.ndarray, *, num_parts: int) -> None:
    """Shuffle write: rows in the order of their parts, one record batch a part."""
    order = np.argsort(part_N, kind="stable")
    ends = np.searchsorted(part_N[order], np.arange(num_parts), side="right")
    ordered = table.take(pa.array(order)).combine_chunks()
    batches = []
    for begin, end in zip([0, *ends[:-1]], ends, strict=True):
        piece = ordered.slice(begin, end - begin)
        batches.append(
            pa.RecordBatch.from_arrays(
                [column.combine_chunks() if column.num_chunks != 1 else column.chunk(0) for column in piece.columns], schema=table.schema
            )
        )
    _write(path, table.schema, batches)


def read_part(paths: Sequence[Path], part: int) -> pa.Table:
    """Shuffle read: the rows of a part from all files that such rows were written to."""
    batches = []
    for path in paths:  # one after the other: shards may be more than the files that a process may hold open
        with pa.OSFile(str(path), "rb") as file:
            batches.append(pa.ipc.open_file(file).get_batch(part))
    return pa.Table.from_batches(batches)


def number(shard: int, rows: np.ndarray) -> np.ndarray:
    """Numbers of a shard's documents, int64."""
    return (np.int64(shard) << ROW_BITS) + rows.astype(np.int64)


def shard_of(numbers: np.ndarray) -> np.ndarray:
    return numbers >> ROW_BITS


def row_of(numbers: np.ndarray) -> np.ndarray:
    return numbers & ((1 << ROW_BITS) - 1)


@lru_cache(maxsize=128)  # each holds a file open
def _mapped(path: Path) -> pa.Table:
    return read(path)


def column_of(paths: Sequence[Path], numbers: np.ndarray, column: str) -> pa.Array:
    """A column of documents anywhere, by their numbers, in their order: single rows through memory maps."""
    shards = shard_of(numbers)
    order = np.argsort(shards, kind="stable")
    pieces = []
    for shard in np.unique(shards).tolist():
        rows = row_of(numbers[order][shards[order] == shard])
        pieces.append(pc.take(_mapped(paths[shard])[column], pa.array(rows)).combine_chunks())
    if not pieces:
        return pa.array([], read(paths[0]).schema.field(column).type if paths else pa.string())
    joined = pa.concat_arrays([piece.combine_chunks() if isinstance(piece, pa.ChunkedArray) else piece for piece in pieces])
    back = np.empty(len(numbers), np.int64)
    back[order] = np.arange(len(numbers))
    return joined.take(pa.array(back))


def text_of(paths: Sequence[Path], one: int) -> np.ndarray:
    """The bytes of one document's text, uint8, not copied."""
    column = _mapped(paths[one >> ROW_BITS])["text"]
    scalar = column[one & ((1 << ROW_BITS) - 1)].as_buffer()
    return np.frombuffer(scalar, np.uint8) if scalar is not None and scalar.size else np.empty(0, np.uint8)


def num_rows(path: Path) -> int:
    """Documents of a shard."""
    reader = _opened(path)
    return sum(reader.get_batch(i).num_rows for i in range(reader.num_record_batches))
