"""Atomic and synced file writes, folder locks, disk errors."""

import errno
import fcntl
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from gristmill.core.errors import InputError


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically: the file is either the old one or the whole new one."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w") as file:
            json.dump(value, file, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as e:
        temporary.unlink(missing_ok=True)
        raise InputError(f"{path} cannot be written ({e.strerror}): free some space and run the same command again.") from e


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object that `write_json` wrote into a run.

    Raises:
        InputError: the file is damaged.
    """
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise InputError(f"{path} cannot be read ({e}): delete its folder and run the same command again.") from e
    if not isinstance(value, dict):
        raise InputError(f"{path} holds no JSON object: delete its folder and run the same command again.")
    return value


def lock(path: Path) -> IO[str]:
    """Lock the folder for this process; the kernel lets go when the process ends, however it ends."""
    file = (path / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        raise InputError(f"{path} is in use by another gristmill process: wait for it to end.") from e
    return file


def state(path: Path) -> tuple[str, int, int, int]:
    """Stamp of a file (path, size, times): another stamp means that it has changed."""
    found = path.stat()
    return str(path), found.st_size, found.st_mtime_ns, found.st_ctime_ns


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write a stream of rows as JSONL; returns their number."""
    count = 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                count += 1
    except OSError as e:
        raise InputError(f"{path} cannot be written ({e.strerror}): free some space or choose another place.") from e
    return count


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn a full disk, an exhausted quota or a file-size limit into an InputError; ``folder`` only names the disk."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    message = f"the disk of {folder} is full; free some space and start again, finished work is kept"
    try:
        yield
    except OSError as error:
        if error.errno in full:
            raise InputError(message) from error
        raise
    except SafetensorError as error:
        # safetensors wraps the system's error in its own, of which only the text tells the cause
        cause = re.search(r"(?:os error|code:) (\d+)", str(error))
        if cause and int(cause[1]) in full:
            raise InputError(message) from error
        raise


def write_synced(path: Path, text: str) -> None:
    """Write a text file and wait until it is on the disk."""
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's entries, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
