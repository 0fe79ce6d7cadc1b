"""Parquet of strangers: honest files are read as Arrow reads them; what swells is refused before memory is taken."""

import datetime
import decimal
import random
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gristmill.core.errors import InputError
from gristmill.curate.io.readers import Reading, read
from gristmill.data.parquet import FREE_EXPANSION, ParquetReader, _Column, max_held_bytes
from gristmill.data.rows import read_records

MIB = 1 << 20
TALKS = [[{"role": r, "content": f"{r} {i} " * 9} for r in ("user", "assistant") * (i % 3)] if i % 5 else None for i in range(700)]
HONEST = pa.table(
    {
        "text": [f"text {i} " * (i % 40) if i % 7 else None for i in range(700)],
        "messages": TALKS,
        "tags": [["a", None, "b" * (i % 9)] if i % 4 else [] for i in range(700)],
        "ids": pa.array([list(range(i % 30)) for i in range(700)], pa.list_(pa.int32())),
        "deep": [[[f"{i}"], []] for i in range(700)],
        "mapped": pa.array([[("k", f"v{i % 3}")] for i in range(700)], pa.map_(pa.string(), pa.string())),
        "fixed": pa.array([[1.0, float(i)] for i in range(700)], pa.list_(pa.float32(), 2)),
        "raw": [bytes([i % 256]) * 5 for i in range(700)],
        "wide": pa.array([b"0123456789abcdef"] * 700, pa.binary(16)),
        "price": pa.array([decimal.Decimal(i) for i in range(700)], pa.decimal128(30, 2)),
        "when": [datetime.datetime(2020, 1, 1) + datetime.timedelta(hours=i) for i in range(700)],
        "yes": [i % 2 == 0 for i in range(700)],
        "nothing": pa.nulls(700),
        "large": pa.array([f"l{i % 5}" for i in range(700)], pa.large_string()),
        "kind": pa.array([f"k{i % 5}" for i in range(700)]).dictionary_encode(),
        "a.b": [{"c": f"{i}"} for i in range(700)],
    }
)
WRITTEN: dict[str, dict[str, Any]] = {
    "usual": {},
    "pages of a few rows": {"data_page_size": 64, "write_batch_size": 8, "row_group_size": 300},
    "second version": {"data_page_version": "2.0", "compression": "zstd"},
    "no dictionary": {"use_dictionary": False, "compression": "gzip"},
    "no compression": {"compression": "none", "write_statistics": False},
    "checksums": {"write_page_checksum": True, "write_page_index": True, "compression": "brotli"},
}


@pytest.mark.parametrize("name", WRITTEN)
def test_honest_files_are_read_as_arrow_reads_them(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(HONEST, path, **WRITTEN[name])
    wanted = pq.read_table(path).to_pylist()
    assert read_records(path) == wanted
    with ParquetReader(path, FREE_EXPANSION) as file:
        for group in range(file.facts.num_row_groups):
            for i in range(file.facts.num_columns):
                column, chunk = _Column(False, False, 0), file.facts.row_group(group).column(i)
                file._read_pages(chunk, column)
                assert column.num_values == chunk.num_values
                assert 0 <= column.num_bytes < chunk.total_uncompressed_size  # which has the headers too
    with ParquetReader(path, FREE_EXPANSION, ["a.b", "missing", "tags"]) as file:
        rows = [row for group in range(file.facts.num_row_groups) for batch in file.batches(group) for row in batch.to_pylist()]
    assert all(set(row) == {"tags", "a.b"} for row in rows)
    assert [row["tags"] for row in rows] == [row["tags"] for row in wanted]


def test_texts_that_repeat_what_the_one_before_begins_with(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"text": [f"{'same beginning ' * 3}{i}" for i in range(500)], "n": range(500)})
    pq.write_table(table, path, use_dictionary=False, column_encoding={"text": "DELTA_BYTE_ARRAY"})
    assert read_records(path) == table.to_pylist()


PAGE, LONG = "x" * (48 * MIB), "x" * MIB
PLAIN = {"use_dictionary": False, "compression": "zstd"}
BOMBS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a page": ({"text": [PAGE]}, PLAIN),
    "many pages": ({"text": [LONG] * 32}, PLAIN),
    "second version": ({"text": [PAGE]}, PLAIN | {"compression": "gzip", "data_page_version": "2.0"}),
    "another column": ({"text": ["a"], "more": [PAGE]}, PLAIN | {"compression": "brotli"}),
    "a dictionary": ({"text": pa.DictionaryArray.from_arrays([0] * 9000, [LONG])}, {"compression": "zstd"}),
    "a dictionary, in a list": ({"text": ["a"], "more": [[LONG] * 32]}, {"dictionary_pagesize_limit": 2 * MIB, "compression": "zstd"}),
    "beginnings": ({"text": [f"{LONG}{i}" for i in range(32)]}, PLAIN | {"column_encoding": {"text": "DELTA_BYTE_ARRAY"}}),
    "beginnings, in a list": (
        {"text": ["a"], "more": [[f"{LONG}{i}" for i in range(32)]]},
        PLAIN | {"column_encoding": {"more.list.element": "DELTA_BYTE_ARRAY"}},
    ),
    "numbers in a list": ({"text": ["a"], "more": pa.array([[7] * 4_000_000], pa.list_(pa.int8()))}, {"compression": "zstd"}),
}


READ_ALL = """
import re, sys
from pathlib import Path
from gristmill.core.errors import InputError
from gristmill.curate.io.readers import Reading, read
from gristmill.data.rows import read_records

def peak():  # the kernel's other figure, in resource, is at first that of the process that started this one
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

def both(path):
    told = []
    try:
        read_records(path)
    except InputError as e:
        told.append(str(e))
    list(read(path, Reading(max_expansion=10), lambda where, why: told.append(why)))
    return told

assert both(Path(sys.argv[1])) == [], both(Path(sys.argv[1]))
for name in sys.argv[2:]:
    before = peak()
    told = both(Path(name))
    grown = peak() - before
    assert "holds more than 1000 bytes of text to a byte" in told[0], (name, told)
    assert told[1:] == ["more than 10 bytes come out of each of its bytes"], (name, told)
    assert grown < 96 << 10, (name, grown)
"""


def test_what_swells_is_refused_before_it_takes_memory(tmp_path: Path) -> None:
    paths = [tmp_path / "honest.parquet", *(tmp_path / f"{name}.parquet" for name in BOMBS)]
    pq.write_table(pa.table({"text": ["a", "b"], "messages": TALKS[1:3]}), paths[0])
    for path, (columns, how) in zip(paths[1:], BOMBS.values(), strict=True):
        pq.write_table(pa.table(columns), path, **how)
    done = subprocess.run([sys.executable, "-c", READ_ALL, *map(str, paths)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_footer_that_lies_changes_nothing(tmp_path: Path) -> None:
    def varint(number: int, size: int) -> bytes:
        return bytes([number >> 7 * i & 127 | (128 if i + 1 < size else 0) for i in range(size)])

    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [PAGE]}), path, **PLAIN)
    told = pq.read_metadata(path).row_group(0).column(0).total_uncompressed_size
    whole, size = path.read_bytes(), (2 * told).bit_length() // 7 + 1
    path.write_bytes(whole.replace(varint(2 * told, size), varint(2 * 100, size)))
    assert pq.read_metadata(path).row_group(0).column(0).total_uncompressed_size == 100
    with pytest.raises(InputError, match="holds more than 1000 bytes"):
        read_records(path)


def test_damage_anywhere_is_one_sentence(tmp_path: Path) -> None:
    path, draw = tmp_path / "a.parquet", random.Random(0)
    pq.write_table(HONEST.slice(0, 60).select(["text", "messages", "ids"]), path, compression="none")
    whole = path.read_bytes()
    for _ in range(100):
        damaged = bytearray(whole)
        damaged[draw.randrange(4, len(whole) - 8)] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        with suppress(InputError):
            read_records(path)


def test_a_page_whose_header_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a" * 50] * 30}), path, use_dictionary=False, compression="none")
    whole = bytearray(path.read_bytes())
    whole[4:9] = b"\x18\xff\xff\xff\x7f"  # a text of a quarter of a gigabyte
    path.write_bytes(whole)
    with pytest.raises(InputError, match="a page has no header that can be read"):
        read_records(path)


def test_one_page_of_a_large_file(tmp_path: Path) -> None:
    """A file that is large enough for its size to allow much has no page that takes it all at once."""
    path = tmp_path / "a.parquet"
    noise = random.Random(0).randbytes(MIB)
    with pq.ParquetWriter(path, pa.schema({"raw": pa.binary(), "text": pa.string()}), **PLAIN) as writer:
        for raw, text in ((noise, "a"), (b"", PAGE + 32 * LONG)):
            writer.write_table(pa.table({"raw": [raw], "text": [text]}))
    size = path.stat().st_size
    assert MIB < size < 2 * MIB and max_held_bytes(size) > 80 * MIB
    with pytest.raises(InputError, match="has pages that are too large"):
        read_records(path)
    told: list[str] = []
    assert [table["text"].to_pylist() for table in read(path, Reading(), lambda where, why: told.append(why))] == [["a"]]
    assert told == ["its pages are too large to be opened: raise reading.max_page_bytes and reading.max_expansion"]
    raised = Reading(max_expansion=10_000, max_document_bytes=100 * MIB)
    assert sum(len(table) for table in read(path, raised, lambda where, why: told.append(why))) == 2 and len(told) == 1


def test_what_is_held_at_once_grows_with_the_file() -> None:
    sizes = [100, 1 << 18, 1 << 20, 10 << 20, 1 << 30]
    assert [max_held_bytes(size) for size in sizes] == [FREE_EXPANSION, 1000 << 18, 512 << 20, 1000 << 20, 100 << 30]
