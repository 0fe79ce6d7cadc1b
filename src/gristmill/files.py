"""Files that are whole or not there, and folders that one process holds at a time."""

import fcntl
import json
import os
from pathlib import Path
from typing import IO, Any

from gristmill.errors import InputError


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that the file is either the old one or the whole new one."""
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


def lock(path: Path) -> IO[str]:
    """Hold the folder for this process; the kernel lets go when the process ends, however it ends."""
    file = (path / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        raise InputError(f"{path} is in use by another gristmill process: wait for it to end.") from e
    return file


def state(path: Path) -> tuple[str, int, int, int]:
    """What tells that a file has changed."""
    found = path.stat()
    return str(path), found.st_size, found.st_mtime_ns, found.st_ctime_ns
