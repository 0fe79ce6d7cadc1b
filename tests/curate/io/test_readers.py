"""Files of every format become documents; what is wrong in a file is named and does not stop the run."""

import errno
import glob
import gzip
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gristmill.core.errors import InputError
from gristmill.curate.io import readers
from gristmill.curate.io.readers import Format, Reading, Writer, list_files, read, write
from gristmill.curate.outcome import DOCUMENT
from gristmill.data.rows import read_records

ROWS = [
    {"id": "a", "text": "First text.", "source": "here", "year": 1999, "tags": ["x"]},
    {"text": "Zweiter Text: schön 漢 🙂"},
    {"id": 3, "text": "", "url": "https://example.org"},
]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def all_of(path: Path, settings: Reading | None = None) -> tuple[list[dict], list[tuple[str, str]]]:
    skipped: list[tuple[str, str]] = []
    rows = []
    for table in read(path, settings or Reading(), lambda where, why: skipped.append((where, why))):
        assert table.schema == DOCUMENT
        rows += table.to_pylist()
    return rows, skipped


def put(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_rows_of_every_format(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith("parquet"):
        table = pa.Table.from_pylist(
            [{**row, "id": str(row["id"]) if "id" in row else None} for row in ROWS],
            schema=pa.schema(
                [("id", pa.string()), ("text", pa.string()), ("source", pa.string()), ("year", pa.int64()), ("tags", pa.list_(pa.string()))]
            ),
        )
        pq.write_table(table, path)
    else:
        data = {".gz": gzip.compress(LINES[:40]) + gzip.compress(LINES[40:]), ".zst": pa.compress(LINES, "zstd", asbytes=True)}
        put(path, data.get(path.suffix, LINES))
    rows, skipped = all_of(path)
    assert skipped == []
    assert [row["text"] for row in rows] == [row["text"] for row in ROWS]
    assert [row["id"] for row in rows] == ["a", f"{name}:2", "3"]
    assert rows[0]["source"] == "here" and rows[1]["source"] is None
    assert json.loads(rows[0]["meta"]) == {"year": 1999, "tags": ["x"]}


def test_fields_have_other_names(tmp_path: Path) -> None:
    path = put(tmp_path / "a.jsonl", b'{"content": "x", "uid": "u", "url": "s", "text": "other"}\n')
    rows, _ = all_of(path, Reading(text_field="content", id_field="uid", source_field="url"))
    assert rows == [{"id": "u", "text": "x", "source": "s", "meta": '{"text": "other"}'}]


def test_a_json_file_of_one_value(tmp_path: Path) -> None:
    assert len(all_of(put(tmp_path / "a.json", json.dumps(ROWS, indent=1).encode()))[0]) == 3
    assert len(all_of(put(tmp_path / "b.json", json.dumps(ROWS[0], indent=1).encode()))[0]) == 1


def test_bytes_that_are_replaced_are_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["caf\u00e9".encode("latin-1"), b"tea"]}), tmp_path / "a.parquet")
    for path in (put(tmp_path / "a.json", '[{"text": "caf\u00e9"}, {"text": "tea"}]'.encode("latin-1")), tmp_path / "a.parquet"):
        rows, skipped = all_of(path)
        assert [row["text"] for row in rows] == ["caf\ufffd", "tea"] and [why for _, why in skipped] == ["replaced: not UTF-8"]


def test_text_files_of_a_folder(tmp_path: Path) -> None:
    put(tmp_path / "in/deep/a.txt", "schön".encode())
    put(tmp_path / "in/b.md", b"\xef\xbb\xbf# Title")
    put(tmp_path / "in/c.html", b"<html><head><title>t</title></head><body><script>x()</script><p>Seen &amp; read.</p></body></html>")
    put(tmp_path / "in/d.py", b"print()")
    put(tmp_path / "in/e.txt", "wide".encode("utf-16"))
    put(tmp_path / "in/f.png", b"\x89PNG\0\0")
    put(tmp_path / "in/.hidden/g.txt", b"no")
    put(tmp_path / "in/.h.txt", b"no")
    put(tmp_path / "in/i.txt.gz", gzip.compress(b"packed"))
    found = list_files([tmp_path / "in"])
    skipped: list[tuple[str, str]] = []
    rows = [
        row
        for path, name in found.items()
        for table in read(path, Reading(), lambda where, why: skipped.append((where, why)), name=name)
        for row in table.to_pylist()
    ]
    assert {row["id"]: row["text"].strip() for row in rows} == {
        "deep/a.txt": "schön", "b.md": "# Title", "c.html": "Seen & read.", "d.py": "print()", "e.txt": "wide", "i.txt.gz": "packed"
    }  # fmt: skip
    assert skipped == [("f.png", "not text")]


def test_finding(tmp_path: Path) -> None:
    a, b, c = (put(tmp_path / name, b"x") for name in ("one/a.txt", "two/a.txt", "two/c.txt"))
    assert list(list_files([tmp_path / "two", str(tmp_path / "*/a.txt"), a])) == [b, c, a]
    assert list_files([tmp_path / "one", tmp_path / "two"]) == {a: a.as_posix(), b: b.as_posix(), c: "c.txt"}
    for nothing in ("none", "*.parquet"):
        with pytest.raises(InputError, match="There is no document"):
            list_files([tmp_path / nothing])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError):
        list_files([tmp_path / "empty"])


def test_what_cannot_be_looked_at_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = put(tmp_path / "in/a.txt", b"x")
    put(tmp_path / "in/shut/b.txt", b"x")
    (tmp_path / "in/broken.txt").symlink_to("nowhere")
    (tmp_path / "in/turn.txt").symlink_to("turn.txt")
    for name in ("one", "two"):  # a glob would follow them for ever
        (tmp_path / "in" / name).symlink_to(".")
    scandir = os.scandir

    def guarded(path: Path | str) -> Any:
        if Path(path).name == "shut":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    for given in (tmp_path / "in", tmp_path / "in/**/*.txt", tmp_path / "i?/**"):
        told: dict[str, str] = {}
        assert list(list_files([given], told.__setitem__)) == [good]
        why = {Path(where).name: reason for where, reason in told.items()}
        assert why.pop("shut") == "cannot be read: Permission denied"
        assert why.pop("broken.txt").startswith("cannot be read") and "links" in why.pop("turn.txt")
        assert why == {"one": "a link to a folder", "two": "a link to a folder"}
    told = {}
    assert list(list_files([tmp_path / "in/*.txt"], told.__setitem__)) == [good]
    assert {Path(where).name for where in told} == {"broken.txt", "turn.txt"}
    with pytest.raises(InputError, match=r"There is no document at .*shut \(.*Permission denied\)"):
        list_files([tmp_path / "in/shut"])


def test_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.txt", "b/a.txt", "b/c/a.txt", "b/c/d.md", ".h/a.txt", "b/.h.txt", "b-c/a.txt"):
        put(tmp_path / name, b"x")
    monkeypatch.chdir(tmp_path)
    patterns = ["*.txt", "**/*.txt", "*/a.txt", "b/*/", "b/**", "b/**/c/*", "**/c", ".h/*", "b/.*", ".*/*.txt", "b*/[a]*"]
    for pattern in [*patterns, str(tmp_path / "*/?.txt")]:
        expected: list[Path] = []
        for place in map(Path, sorted(glob.glob(pattern, recursive=True))):
            below = sorted(p for p in place.rglob("*") if p.is_file() and not p.name.startswith(".")) if place.is_dir() else [place]
            expected += [p for p in below if p not in expected]
        assert list(list_files([pattern])) == expected, pattern


def test_names_that_are_not_unicode(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    folder = os.fsencode(tmp_path / "in")
    data = {b"a\xff.txt": b"one", b"a\xfe.txt": b"two", b"b\xff.jsonl": b'{"text": "three"}\nno\n'}
    for name, content in data.items():
        Path(os.fsdecode(folder + b"/" + name)).write_bytes(content)
    pq.write_table(pa.table({"text": ["four"]}), tmp_path / "p")
    (tmp_path / "p").rename(os.fsdecode(folder + b"/c\xff.parquet"))
    found = list_files([tmp_path / "in"])
    rows, skipped = [], dict[str, str]()
    for path, name in found.items():
        rows += [row for table in read(path, Reading(), skipped.__setitem__, name=name) for row in table.to_pylist()]
    texts = {row["id"]: row["text"] for row in rows}
    assert texts == {r"a\xfe.txt": "two", r"a\xff.txt": "one", r"b\xff.jsonl:1": "three", r"c\xff.parquet:1": "four"}
    assert skipped == {r"b\xff.jsonl:2": "not JSON"} and rows[0]["source"].endswith(r"in/a\xfe.txt")


def record(kind: str, uri: str, body: bytes, content_type: str) -> bytes:
    head = f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: {uri}\r\nWARC-Date: 2026-01-02T03:04:05Z\r\n"
    head += f"WARC-Record-ID: <urn:uuid:00000000-0000-0000-0000-{len(body):012d}>\r\nContent-Type: {content_type}\r\n"
    return head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body + b"\r\n\r\n"


def page(body: str, charset: str) -> bytes:
    return f"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset={charset}\r\n\r\n<html><body>{body}</body></html>".encode(charset)


HTTP = "application/http; msgtype=response"


@pytest.mark.parametrize("packed", [False, True])
def test_web_archives(tmp_path: Path, packed: bool) -> None:
    records = [
        record("warcinfo", "", b"software: x", "application/warc-fields"),
        record("response", "http://a.org/", page("<p>Größe der Mühle</p>", "latin-1"), HTTP),
        record("response", "http://b.org/x.png", b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n\r\n\0\0", HTTP),
        record("response", "http://c.org/", page("<div>" * 100_000 + "deep", "utf-8"), HTTP),
        record("conversion", "http://d.org/", "Plain text: ö".encode(), "text/plain"),
    ]
    data = b"".join(map(gzip.compress, records)) if packed else b"".join(records)
    rows, skipped = all_of(put(tmp_path / ("a.warc.gz" if packed else "a.wet"), data))
    assert [row["text"].strip() for row in rows] == ["Größe der Mühle", "Plain text: ö"]
    assert [row["source"] for row in rows] == ["http://a.org/", "http://d.org/"]
    assert "00000000-0000" in rows[0]["id"] and rows[0]["id"] != rows[1]["id"]
    assert json.loads(rows[0]["meta"])["date"].startswith("2026-01-02")
    assert len(skipped) == 1 and "deep" in skipped[0][1]


def test_records_that_cannot_be_decoded_are_named(tmp_path: Path) -> None:
    def packed(body: bytes, more: str) -> bytes:
        return f"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=gb2312\r\n{more}\r\n".encode() + body

    body = "<p>The mill by the \u9555\u6c5f</p>".encode("gbk")
    gzipped = gzip.compress(body)
    records = [
        packed(gzipped, "Content-Encoding: gzip\r\n"),
        packed(gzipped[:-9], "Content-Encoding: gzip\r\n"),
        packed(b"%x\r\n" % len(body) + body + b"\r\n0\r\n\r\n", "Transfer-Encoding: chunked\r\n"),
        packed(gzip.compress(b"a" * 3_000_000), "Content-Encoding: gzip\r\n"),
        packed(gzipped, ""),
        packed(body, "X-Long: " + "x" * 100_000 + "\r\n"),
        packed(body, ""),
    ]
    data = b"".join(record("response", f"http://{i}.org/", one, HTTP) for i, one in enumerate(records))
    rows, skipped = all_of(put(tmp_path / "a.warc", data), Reading(max_document_bytes=1 << 20))
    assert [row["source"] for row in rows] == ["http://0.org/", "http://2.org/", "http://6.org/"]
    assert {row["text"].strip() for row in rows} == {"The mill by the \u9555\u6c5f"}
    reasons = dict(skipped)
    assert sorted(reasons) == ["a.warc:2", "a.warc:4", "a.warc:5", "a.warc:6"]
    for number, why in ((2, "gzip cannot be undone"), (4, "1,048,576 bytes"), (5, "not text"), (6, "headers")):
        assert why in reasons[f"a.warc:{number}"]


def test_a_damaged_web_archive(tmp_path: Path) -> None:
    good = record("conversion", "http://d.org/", b"Plain text", "text/plain")
    rows, skipped = all_of(put(tmp_path / "a.warc.gz", b"".join(gzip.compress(good) for _ in range(3000)) + gzip.compress(good * 50)[:-30]))
    assert rows[0]["text"].strip() == "Plain text" and skipped


def test_lines_that_are_no_documents(tmp_path: Path) -> None:
    lines = [
        b'{"text": "one"}', b"not json", b"[1, 2]", b'"text"', b"", b'{"id": "x"}', b'{"text": null}', b'{"text": 5}',
        b'{"text": "bad \xff byte"}', b'{"text": "nul \\u0000 \x00"}', b'{"text": "half \\ud800 pair"}', b"[" * 100_000,
        b'{"text": "n", "n": ' + b"9" * 10_000 + b"}", b'{"text": "last"}',
    ]  # fmt: skip
    rows, skipped = all_of(put(tmp_path / "a.jsonl", b"\r\n".join(lines)))
    assert [row["text"] for row in rows] == ["one", "bad \ufffd byte", "nul \0 \0", "half \ufffd pair", "last"]
    assert rows[-1]["id"] == "a.jsonl:14"
    assert [where.split(":")[1] for where, _ in skipped] == ["2", "3", "4", "6", "7", "8", "9", "11", "12", "13"]
    assert dict(skipped)["a.jsonl:2"] == "not JSON" and "no text" in dict(skipped)["a.jsonl:6"]


def test_fields_that_cannot_be_written_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nested: list = []
    for _ in range(100_000):
        nested = [nested]
    monkeypatch.setattr(readers, "_value", lambda text: {"text": text, "deep": nested})
    rows, skipped = all_of(put(tmp_path / "a.jsonl", b"one\ntwo\n"))
    assert [(row["text"], row["meta"]) for row in rows] == [("one", "{}"), ("two", "{}")]
    assert [where for where, why in skipped if "too deep" in why] == ["a.jsonl:1", "a.jsonl:2"]


def test_meta_is_json_whatever_the_numbers(tmp_path: Path) -> None:
    rows, _ = all_of(put(tmp_path / "a.jsonl", b'{"text": "t", "a": NaN, "b": [1.5, {"c": -Infinity}]}\n'))
    assert rows[0]["meta"] == '{"a": null, "b": [1.5, {"c": null}]}'
    pq.write_table(pa.table({"text": ["t"], "a": pa.array([float("nan")])}), tmp_path / "a.parquet")
    assert all_of(tmp_path / "a.parquet")[0][0]["meta"] == '{"a": null}'


def test_an_endless_line_is_not_held(tmp_path: Path) -> None:
    path = put(tmp_path / "a.jsonl", b'{"text": "a"}\n{"text": "' + b"x" * 50_000_000 + b'"}\n{"text": "b"}\n')
    tracemalloc.start()
    rows, skipped = all_of(path, Reading(max_document_bytes=1 << 20))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [row["id"] for row in rows] == ["a.jsonl:1", "a.jsonl:3"]
    assert [where for where, _ in skipped] == ["a.jsonl:2"] and peak < 16 << 20


@pytest.mark.parametrize("codec", ["gz", "zst"])
def test_a_bomb_is_left(tmp_path: Path, codec: str) -> None:
    data = b'{"text": "a"}\n' + b"\0" * 300_000_000
    path = put(tmp_path / f"a.jsonl.{codec}", gzip.compress(data, 9) if codec == "gz" else pa.compress(data, "zstd", asbytes=True))
    del data
    rows, skipped = all_of(path, Reading(max_expansion=100))
    assert [row["text"] for row in rows] == ["a"]
    assert any("compressed byte" in why for _, why in skipped)


def test_files_that_are_damaged(tmp_path: Path) -> None:
    assert all_of(put(tmp_path / "empty.jsonl", b"")) == ([], [("empty.jsonl", "empty")])
    many = b"".join(b'{"text": "%d"}\n' % i for i in range(200_000))
    rows, skipped = all_of(put(tmp_path / "cut.jsonl.gz", gzip.compress(many)[:-1000]))
    assert len(rows) > 100_000 and "Truncated" in skipped[-1][1]
    assert "cannot be read" in all_of(put(tmp_path / "no.jsonl.gz", b"not gzip"))[1][0][1]
    assert "cannot be read" in all_of(put(tmp_path / "no.parquet", b"PAR1 no"))[1][0][1]
    assert "cannot be read" in all_of(put(tmp_path / "no.warc", b"\0" * 100))[1][0][1] if all_of(tmp_path / "no.warc")[1] else True
    path = tmp_path / "hurt.parquet"
    pq.write_table(
        pa.table({"text": [str(i) * 50 for i in range(5000)]}), path, row_group_size=1000, compression="none", use_dictionary=False
    )
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle - 40_000 : middle + 40_000] = b"\xff" * 80_000
    rows, skipped = all_of(put(path, bytes(data)))
    assert 1000 <= len(rows) < 5000 and skipped
    pq.write_table(pa.table({"body": ["x"]}), path)
    assert all_of(path) == ([], [("hurt.parquet", "no column 'text'")])
    assert all_of(put(tmp_path / "bad.txt", b"caf\xe9 \0")) == (
        [{"id": "bad.txt", "text": "caf\ufffd \0", "source": str(tmp_path / "bad.txt"), "meta": "{}"}],
        [("bad.txt", "replaced: not UTF-8")],
    )


@pytest.mark.parametrize("typed", [True, False])
def test_parquet_that_unfolds_is_left(tmp_path: Path, typed: bool) -> None:
    path = tmp_path / "bomb.parquet"
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 4000), ["a" * 500_000])  # 2 GB, written out
    pq.write_table(pa.table({"text": column}), path, compression="zstd", store_schema=typed)
    assert path.stat().st_size < 2000
    before = pa.total_allocated_bytes()
    taken, skipped = [], []
    for table in read(path, Reading(), lambda where, why: skipped.append((where, why))):
        taken.append(len(table))
        assert pa.total_allocated_bytes() - before < 200 << 20
    assert sum(taken) < 100 and skipped == [("bomb.parquet", "more than 1000 bytes come out of each of its bytes")]
    with pytest.raises(InputError, match="more than 1000 bytes of text to a byte"):
        read_records(path)


def test_pages_and_texts_that_are_too_large(tmp_path: Path) -> None:
    _, skipped = all_of(put(tmp_path / "a.html", b"<div>" * 100_000))
    assert "deep" in skipped[0][1]
    _, skipped = all_of(put(tmp_path / "a.html", b"<div><b>" * 100_000))
    assert "deep" in skipped[0][1]
    assert len(all_of(put(tmp_path / "a.html", b"<p><br><li>x</li><b>y</b>" * 5000))[0]) == 1  # wide, not deep
    _, skipped = all_of(put(tmp_path / "a.txt", b"x" * 2000), Reading(max_document_bytes=1000))
    assert "more than 1,000 bytes" in skipped[0][1]


def test_tables_are_bounded(tmp_path: Path) -> None:
    sizes = [300, 500, 200, 5000, 10, 800, 1]  # and 66 bytes beside each
    path = put(tmp_path / "a.jsonl", b"".join(json.dumps({"text": "x" * size}).encode() + b"\n" for size in sizes))
    tables = list(read(path, Reading(batch_bytes=1000), print))
    assert [[len(text) for text in table["text"].to_pylist()] for table in tables] == [[300, 500], [200], [5000], [10, 800], [1]]


@pytest.mark.parametrize("format", ["parquet", "jsonl", "jsonl.zst"])
def test_shards(tmp_path: Path, format: Format) -> None:
    rows = [{"id": str(i), "text": "ü" * (i % 7 * 10), "source": None, "meta": json.dumps({"n": i})} for i in range(100)]
    table = pa.Table.from_pylist(rows, schema=DOCUMENT)
    paths = write(iter([table]), tmp_path / "out", format, shard_bytes=1000)
    assert [path.name for path in paths] == [f"part-{i:05d}.{format}" for i in range(len(paths))] and len(paths) > 3
    assert sorted((tmp_path / "out").iterdir()) == paths  # nothing temporary is left
    assert [row for path in paths for row in all_of(path)[0]] == rows
    pieces = [len(all_of(path)[0]) for path in paths]
    again = write((table.slice(i, 9) for i in range(0, 100, 9)), tmp_path / "again", format, shard_bytes=1000)
    assert [len(all_of(path)[0]) for path in again] == pieces
    fewer = write(iter([table.slice(0, 5)]), tmp_path / "out", format, shard_bytes=1 << 20)
    assert sorted((tmp_path / "out").iterdir()) == fewer  # an earlier run's parts are gone
    assert write(iter([]), tmp_path / "none", format, shard_bytes=10) == []


def test_a_part_is_whole_or_not_there(tmp_path: Path) -> None:
    writer = Writer(tmp_path, "jsonl", 1 << 20)
    writer.add(pa.Table.from_pylist([{"id": "a", "text": "x"}], schema=DOCUMENT))
    assert [path for path in tmp_path.iterdir() if not path.name.startswith(".")] == []
    assert [path.name for path in writer.close()] == ["part-00000.jsonl"]


def test_who_was_left_at_a_part_does_not_harm_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = pa.Table.from_pylist([{"id": str(i), "text": "x" * 100} for i in range(100)], schema=DOCUMENT)
    writers = []
    for process in (1, 2):
        monkeypatch.setattr(os, "getpid", lambda process=process: process)
        writers.append(Writer(tmp_path, "parquet", 1 << 20))
        writers[-1].add(table.slice(0, 60))
    for writer in writers:
        writer.add(table.slice(60))
        [path] = writer.close()
        assert [row["id"] for row in all_of(path)[0]] == [str(i) for i in range(100)]


def test_labels_go_to_meta_on_the_way_back(tmp_path: Path) -> None:
    table = pa.Table.from_pylist([{"id": "a", "text": "x", "meta": '{"n": 1}'}], schema=DOCUMENT)
    [path] = write(iter([table.append_column("language", pa.array(["en"]))]), tmp_path, "parquet", shard_bytes=10)
    assert json.loads(all_of(path)[0][0]["meta"]) == {"n": 1, "language": "en"}


@pytest.mark.parametrize(
    ("field", "kept"),
    [
        ("NaN", None),
        ("[1.5, -Infinity]", [1.5, None]),
        ('{"a": {"b": NaN}}', {"a": {"b": None}}),
        ('"a\\ud83d"', "a\ufffd"),
        ('["\\ud83d\\ude00", "\\\\ud83d"]', ["\U0001f600", "\\ud83d"]),
    ],
)
def test_meta_is_json_as_others_read_it(field: str, kept: Any, tmp_path: Path) -> None:
    path = put(tmp_path / "a.jsonl", b'{"text": "x", "score": %s}' % field.encode())
    [row] = all_of(path)[0]

    def refuse(name: str) -> None:
        raise ValueError(name)

    assert json.loads(row["meta"], parse_constant=refuse) == {"score": kept}
