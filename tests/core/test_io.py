"""A file is the old one or the new one, and a folder belongs to one process."""

import errno
import json
import os
import re
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

import gristmill
from gristmill.core.errors import InputError
from gristmill.core.io import (
    MAX_HASHED_BYTES,
    DamagedFile,
    damaged,
    disk_errors,
    lock,
    make_folder,
    read_bytes,
    read_json,
    stamp,
    stamps,
    sweep,
    sync,
    write_bytes,
    write_json,
    write_jsonl,
    write_text,
)
from gristmill.runs.journal import Journal, read_once
from gristmill.synth.pipelines.topics import read_lines


def no_space(*args: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_json_is_the_old_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.json"
    write_json(path, {"a": 1})
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(InputError, match="No space left on device") as caught:
        write_json(path, {"a": 2})
    assert "\n" not in str(caught.value)
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


DiskLog = list[tuple[str, Path, int | Path]]


def test_json_is_on_the_disk_before_it_takes_the_place_of_the_old_one(tmp_path: Path, disk_log: DiskLog) -> None:
    path = tmp_path / "results.json"
    write_json(path, {"a": 1})
    (kind, synced, size), renamed, (_, folder, _) = disk_log
    assert (kind, size) == ("fsync", path.stat().st_size) and renamed == ("rename", synced, path) and folder == tmp_path


def test_a_new_folder_is_on_the_disk_before_what_is_in_it(tmp_path: Path, disk_log: DiskLog) -> None:
    write_text(tmp_path / "a" / "b" / "state.json", "text")
    assert [path for kind, path, _ in disk_log[:2]] == [tmp_path, tmp_path / "a"]
    sync(tmp_path)
    assert disk_log[-1][:2] == ("fsync", tmp_path)


def test_a_folder_is_held_by_one_process_at_a_time(tmp_path: Path) -> None:
    held = lock(tmp_path)
    with pytest.raises(InputError, match="is in use by another gristmill process"):
        lock(tmp_path)
    held.close()
    lock(tmp_path).close()


def test_rows_are_written_as_they_come(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    assert write_jsonl(path, ({"text": t} for t in ("\u00e9", "a\nb"))) == 2
    assert [json.loads(line)["text"] for line in path.read_text().splitlines()] == ["\u00e9", "a\nb"]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file cannot be written .File exists"):
        write_jsonl(tmp_path / "file" / "rows.jsonl", [{}])


SOURCE = Path(gristmill.__file__).parent
IN_PLACE = {  # places that open, write or rename a file by themselves, and why no restart minds
    "core/io.py": "it is the one writer",
    "runs/journal.py": "appends, and cuts off torn lines",
    "train/metrics.py": "appends metrics, and cuts off torn lines",
    "train/top_logprobs.py": "appends whole groups, and cuts off torn ones",
    "sandbox/jail.py": "files of the kernel",
}
BANNED = re.compile(
    r"\.write_text\(|\.write_bytes\(|open\([^()]*[\"'][wax]b?\+?[\"']|\.save_pretrained\(|np\.save\(\w*path|mkstemp|NamedTemporaryFile|open\([^()]*O_CREAT"
)
NATIVE = re.compile(r"write_table\(|ParquetWriter\(|save_file\(|OSFile\([^()]*(\([^()]*\))?[^()]*\"wb\"|np\.memmap\([^()]*\"[rw]\+")


def test_nobody_else_writes_files() -> None:
    """A file that is read again comes from `replacing`: nothing in the source opens one for writing by itself."""
    found = {
        str(path.relative_to(SOURCE))
        for path in SOURCE.rglob("*.py")
        for line in path.read_text().splitlines()
        if BANNED.search(line) and "temporary" not in line
    }
    assert found <= IN_PLACE.keys()
    native = [path for path in SOURCE.rglob("*.py") if NATIVE.search(path.read_text())]
    assert native and all("replacing" in path.read_text() for path in native)


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b"\xff\x00", b"[" * 100_000, b'{"a":' + b"9" * 5000 + b"}", b'{"a": 1} x'])
def test_damaged_json_is_one_sentence(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(DamagedFile, match=r"a\.json (cannot be read|holds no JSON object)") as caught:
        read_json(tmp_path / "a.json")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_what_is_no_regular_file_is_neither_read_nor_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero"), Path("/proc/self/nothing"), tmp_path / ("x" * 300), Path("a\0b")):
        with pytest.raises(DamagedFile, match="cannot be read"):
            read_json(path)
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/null"), Path("/proc/x/y"), tmp_path / ("x" * 300)):
        with pytest.raises(InputError, match="cannot be written"):
            write_json(path, {})
    assert Path("/dev/null").is_char_device() and [p.name for p in tmp_path.iterdir()] == ["pipe"]


def put_fifo(path: Path) -> None:
    os.mkfifo(path)


def put_read_fifo(path: Path) -> None:
    os.mkfifo(path)
    os.open(path, os.O_RDWR)  # somebody reads it


def put_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(path))


OPENED: list[Callable[[Path], object]] = [
    lambda path: lock(path.parent),
    stamp,
    read_bytes,
    lambda path: write_jsonl(path, [{}]),
    Journal,
    lambda path: Journal(path, read_only=True),
    lambda path: list(read_once(path)),
    lambda path: read_lines(path, "word"),
]


@pytest.mark.parametrize("put", [put_fifo, put_read_fifo, put_socket, lambda p: p.symlink_to("/dev/zero"), Path.mkdir])
@pytest.mark.parametrize("number", range(len(OPENED)))
def test_what_is_no_regular_file_is_never_waited_for(number: int, put: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    put(path)
    signal.alarm(20)
    try:
        with pytest.raises((InputError, IsADirectoryError)) as caught:
            OPENED[number](path)
    finally:
        signal.alarm(0)
    assert str(path) in str(caught.value)


def test_no_more_is_read_than_the_limit(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 11)
    assert read_bytes(tmp_path / "a", 11) == b"x" * 11
    with pytest.raises(DamagedFile, match="larger than 10 bytes"):
        read_bytes(tmp_path / "a", 10)


@pytest.mark.parametrize("size", [10, 3 * MAX_HASHED_BYTES])
def test_stamps_tell_damage(tmp_path: Path, size: int) -> None:
    path = tmp_path / "model" / "weights"
    write_bytes(path, bytes(size))
    found = stamps(tmp_path, ["model/*"])
    assert list(found) == ["model/weights"] and damaged(tmp_path, found) == []
    for data in (bytes(size - 1), bytes(size) + b"\0", b"\1" + bytes(size - 1), bytes(size - 1) + b"\1", b""):
        path.write_bytes(data)
        assert damaged(tmp_path, found) == ["model/weights"]
    path.unlink()
    assert damaged(tmp_path, found) == ["model/weights"] and damaged(tmp_path, [1]) and damaged(tmp_path, {"..": 3})


def test_temporaries_are_swept_and_nothing_else(tmp_path: Path) -> None:
    for name in (".a.json.123.tmp", "sub/.b.parquet.9.tmp", "mine.tmp", ".mine.tmp", "sub/c.123.tmp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    sweep(tmp_path)
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == [".mine.tmp", "mine.tmp", "sub/c.123.tmp"]


def test_the_disk_s_errors_are_sentences_and_others_are_not_hidden(tmp_path: Path) -> None:
    for error, words in ((OSError(errno.ENOSPC, "x"), "is full"), (PermissionError(errno.EACCES, "x", "/a/b"), "/a/b: Permission denied")):
        with pytest.raises(InputError, match=words), disk_errors(tmp_path):
            raise error
    with pytest.raises(ConnectionError), disk_errors(tmp_path):
        raise ConnectionResetError(errno.ECONNRESET, "x")


@pytest.mark.parametrize("call", ["mkdir", "fsync"])
def test_a_folder_that_a_full_disk_does_not_take_is_one_sentence(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, call, no_space)
    with pytest.raises(InputError, match=r"new cannot be written \(No space left on device\): free some space"):
        make_folder(tmp_path / "new" / "deep")
