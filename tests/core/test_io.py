"""A file is the old one or the new one, and a folder belongs to one process."""

import errno
import json
import os
from pathlib import Path

import pytest

from gristmill.core.errors import InputError
from gristmill.core.io import lock, write_json


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


def test_a_folder_is_held_by_one_process_at_a_time(tmp_path: Path) -> None:
    held = lock(tmp_path)
    with pytest.raises(InputError, match="is in use by another gristmill process"):
        lock(tmp_path)
    held.close()
    lock(tmp_path).close()
