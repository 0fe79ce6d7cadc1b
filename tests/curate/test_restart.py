"""The first stage, stopped anywhere, goes on after its last shard, and makes what a calm run makes."""

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gristmill.curate.io import html, readers, shards
from gristmill.curate.io.readers import Reading
from gristmill.curate.run import ingest

READING = Reading(batch_bytes=3000, max_document_bytes=6000)
Files = list[tuple[Path, str]]


class Stopped(Exception):
    pass


def texts(seed: int, count: int = 60) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices("abc äö\n", k=draw.choice([0, 20, 300, 900, 1500]))) for _ in range(count)]


def lines(seed: int) -> bytes:
    """Also such lines as are skipped, as are mended, and as are passed over."""
    bad = [b"no json", b'{"text": 3}', b"", b'{"text": "' + b"x" * 7000 + b'"}', b'{"text": "\xff"}', b'{"text": "\\ud800"}', b"[1]"]
    good = [json.dumps({"text": text, "n": i}).encode() for i, text in enumerate(texts(seed))]
    draw = random.Random(seed)
    for _ in range(30):
        good.insert(draw.randrange(len(good) + 1), draw.choice(bad))
    return b"\n".join([*good, *bad])


def in_lines(folder: Path, packed: bool) -> Files:
    paths = [folder / f"{i}.jsonl{'.gz' if packed else ''}" for i in range(3)]
    for i, path in enumerate(paths):
        path.write_bytes(gzip.compress(lines(i)) if packed else lines(i))
    if packed:
        paths[1].write_bytes(gzip.compress(lines(1) * 3)[:-2000])  # damaged at its end
    return [(path, path.name) for path in paths]


def in_tables(folder: Path) -> Files:
    paths = [folder / f"{i}.parquet" for i in range(3)]
    for i, path in enumerate(paths):
        column = [text if n % 7 else None for n, text in enumerate(texts(i))]
        pq.write_table(pa.table({"text": column, "n": range(len(column))}), path, row_group_size=13, compression="none")
    data = bytearray(paths[1].read_bytes())
    group = pq.ParquetFile(paths[1]).metadata.row_group(2).column(0)
    data[group.data_page_offset : group.data_page_offset + 200] = b"\xff" * 200  # the groups after it are whole
    paths[1].write_bytes(data)
    return [(path, path.name) for path in paths]


def in_archives(folder: Path) -> Files:
    paths = [folder / f"{i}.warc.gz" for i in range(2)]
    for i, path in enumerate(paths):
        records = []
        for text in texts(i):
            body = f"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n\r\n<html><body><p>{text}</p></body></html>".encode()
            head = f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: http://a.org/\r\nContent-Length: {len(body)}\r\n"
            head += "WARC-Date: 2026-01-02T03:04:05Z\r\nContent-Type: application/http; msgtype=response\r\n\r\n"
            records.append(gzip.compress(head.encode() + body + b"\r\n\r\n"))
        path.write_bytes(b"".join(records)[: -50 * i or None])
    return [(path, path.name) for path in paths]


def in_texts(folder: Path) -> Files:
    for i, text in enumerate(texts(0)):
        (folder / f"{i:03d}.txt").write_bytes(text.encode() if i % 5 else text.encode() + b"\xff")
    return [(path, path.name) for path in sorted(folder.iterdir())]


def in_values(folder: Path) -> Files:
    """JSON that is one value is read whole each time."""
    reading = [{"text": text[:300]} for text in texts(0, 4)] + [{"no": "text"}]
    for i in range(30):
        (folder / f"{i:03d}.json").write_text(json.dumps(reading, indent=1))
    return [(path, path.name) for path in sorted(folder.iterdir())]


# how files are made, and what is called once for each row that is parsed
KINDS: dict[str, tuple[Callable[[Path], Files], str]] = {
    "jsonl": (lambda folder: in_lines(folder, False), "_value"),
    "jsonl.gz": (lambda folder: in_lines(folder, True), "_value"),
    "parquet": (in_tables, "_object"),
    "warc": (in_archives, "main_text"),
    "text": (in_texts, "_text"),
    "json": (in_values, "_object"),
}


def made(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.arrow")}


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_anywhere_it_makes_the_same_shards(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, parsed = KINDS[kind]
    (tmp_path / "in").mkdir()
    files = make(tmp_path / "in")
    calls = 0
    owner = html if parsed == "main_text" else readers
    original = getattr(owner, parsed)

    def counted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        return original(*arguments)

    monkeypatch.setattr(owner, parsed, counted)
    calm = ingest(files, tmp_path / "calm", READING, 7)
    num, all_calls = len(calm["shards"]), calls
    assert num > 9 and set(made(tmp_path / "calm")) == set(calm["shards"])
    write = shards.write
    most = left = 0
    after = False

    def stopping(path: Path, table: pa.Table) -> None:
        nonlocal left
        left -= 1
        if left >= 0 or after:
            write(path, table)
        if left < 0:
            raise Stopped

    for stop in range(0, num, num // 4):
        folder = tmp_path / str(stop)
        left, calls, after = stop, 0, not after  # `after`: the shard is there, and the note is not
        with monkeypatch.context() as patch:
            patch.setattr(shards, "write", stopping)
            with pytest.raises(Stopped):
                ingest(files, folder, READING, 7)
        again = ingest(files, folder, READING, 7)
        assert json.dumps(again) == json.dumps(calm), stop
        assert made(folder) == made(tmp_path / "calm"), stop
        most = max(most, calls - all_calls)
    in_a_shard = max(shards.num_rows(path) for path in (tmp_path / "calm").iterdir() if path.suffix == ".arrow")
    assert most <= 2 * in_a_shard + 30, "rows of the shard in work, of the next, and those that were skipped there"


def test_stopped_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once at each shard, in one run."""
    (tmp_path / "in").mkdir()
    files = [file for make in (in_tables, in_archives) for file in make(tmp_path / "in")]
    calm = ingest(files, tmp_path / "calm", READING, 0)
    damaged = [why for _, why in calm["skipped"] if "the rest" in why]
    assert len(damaged) == 2 and "row group 2 cannot be read" in damaged[0]
    write, refused = shards.write, set[Path]()

    def stopping(path: Path, table: pa.Table) -> None:
        if path not in refused:
            refused.add(path)
            raise Stopped
        write(path, table)

    monkeypatch.setattr(shards, "write", stopping)
    for _ in calm["shards"]:
        with pytest.raises(Stopped):
            ingest(files, tmp_path / "again", READING, 0)
    assert json.dumps(ingest(files, tmp_path / "again", READING, 0)) == json.dumps(calm)
    assert made(tmp_path / "again") == made(tmp_path / "calm")
