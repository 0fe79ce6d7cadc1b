"""A file is the old one or the new one, and a folder belongs to one process."""

import errno
import json
import os
from pathlib import Path

import pytest

from gristmill.core.errors import InputError
from gristmill.core.io import lock, sync, write_json, write_jsonl, write_text


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
    with pytest.raises(InputError, match="rows.jsonl cannot be written"):
        write_jsonl(tmp_path / "file" / "rows.jsonl", [{}])
