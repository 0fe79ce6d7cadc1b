"""Files: atomic and synced writes, one reader that names what is wrong, stamps of content, folder locks, disk errors.

Every file that a later start reads is written by `replacing`; `tests/core/test_io.py` finds who does it otherwise.
"""

import errno
import fcntl
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from gristmill.core.errors import InputError

MAX_BYTES = 1 << 28  # of a file that is read whole
MAX_HASHED_BYTES = 8 << 20  # a larger file's stamp is of so many blocks, spread over it
NUM_BLOCKS, BLOCK_BYTES = 16, 1 << 16
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
WRITTEN: ContextVar[list[Path] | None] = ContextVar("WRITTEN", default=None)  # what `replacing` has written, for who wants to know
TEMPORARY = re.compile(r"\..+\.\d+\.tmp")
STAMPS = "stamps"  # key of a marker: sizes and hashes of what it vouches for, by path
Stamp = list[Any]  # size in bytes and hash; a list, as JSON gives it back


class DamagedFile(InputError):
    """A file of ours that does not hold what was written."""


# ---- writing ----


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Atomic file write: the body writes to the temporary path that it gets, which is then synced and takes the place of `path`.

    A kill or a power cut at any moment leaves the old file or the whole new one, and at most a temporary that `sweep` removes.

    Raises:
        InputError: the disk is full or the place cannot be written.
    """
    temporary = path
    try:
        path = Path(os.path.realpath(path)) if path.is_symlink() else path
        if path.exists() and not path.is_file():
            kind = errno.EISDIR if path.is_dir() else errno.EINVAL  # a device must stay one
            raise OSError(kind, os.strerror(kind))
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        make_folder(path.parent)
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
        if (written := WRITTEN.get()) is not None:
            written.append(path)
    except (OSError, SafetensorError) as e:
        full = f"the disk of {path.parent} is full; " if error_number(e) in FULL else ""
        hint = "free some space and start again, finished work is kept" if full else "free some space or choose another place"
        raise InputError(f"{path} cannot be written ({reason(e)}): {full}{hint}.") from e
    finally:
        if temporary != path:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically, as `replacing` does."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(data)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write a stream of rows as JSONL, each as it comes, so that what is there when the stream breaks off is kept; returns their number."""
    count = 0
    try:
        make_folder(path.parent)
        with open(path, "w", encoding="utf-8", newline="\n", opener=regular) as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                count += 1
    except OSError as e:
        raise InputError(f"{path} cannot be written ({reason(e)}): free some space or choose another place.") from e
    return count


def make_folder(path: Path) -> None:
    """Make a folder and those above it, each on the disk before anything is put into it.

    Raises:
        InputError: the disk is full, or the folder cannot be made.
    """
    if not path.is_dir():
        make_folder(path.parent)
        try:
            path.mkdir(exist_ok=True)
            sync(path.parent)
        except OSError as e:
            raise InputError(f"{path} cannot be written ({reason(e)}): free some space or choose another place.") from e


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's entries, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as e:
        if e.errno != errno.EINVAL:  # some network file systems sync no folders
            raise
    finally:
        os.close(handle)


def sweep(folder: Path) -> None:
    """Remove the temporary files that killed processes have left in a folder and below. Only for who holds it."""
    for place, _, names in os.walk(folder):
        for name in names:
            if TEMPORARY.fullmatch(name):
                Path(place, name).unlink(missing_ok=True)


# ---- reading ----


def regular(path: str | Path, flags: int) -> int:
    """Opener (of the built-in `open`) that takes regular files and /dev/null alone: a pipe must not be waited for, a device has no end.

    Raises:
        DamagedFile: it is something else.
    """
    try:
        handle = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as e:
        if e.errno == errno.ENXIO:  # a pipe that nobody reads, or a socket
            raise DamagedFile(f"{path} is no regular file: take it away, or give another.") from e
        raise
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode) and found.st_rdev != os.stat(os.devnull).st_rdev:
        os.close(handle)
        raise DamagedFile(f"{path} is no regular file: take it away, or give another.")
    return handle


def read_bytes(path: Path, max_bytes: int = MAX_BYTES) -> bytes:
    """A regular file's content.

    Raises:
        DamagedFile: it is missing, is no regular file, cannot be read, or is larger.
    """
    try:
        with open(path, "rb", opener=regular) as file:
            data = file.read(max_bytes + 1)
    except (OSError, ValueError) as e:
        why = "it is no regular file" if isinstance(e, DamagedFile) else reason(e)
        raise DamagedFile(f"{path} cannot be read ({why}).") from e
    if len(data) > max_bytes:
        raise DamagedFile(f"{path} cannot be read (it is larger than {max_bytes:,} bytes).")
    return data


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object that `write_json` wrote into a run.

    Raises:
        DamagedFile: it does not hold one.
    """
    data = read_bytes(path)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as e:
        raise DamagedFile(f"{path} cannot be read ({reason(e)}): run the same command again, which makes it again.") from e
    if not isinstance(value, dict):
        raise DamagedFile(f"{path} holds no JSON object: run the same command again, which makes it again.")
    return value


# ---- what files hold ----


def stamp(path: Path) -> Stamp:
    """Size and hash of a file's content; of a large file, the hash is of blocks at both ends and between.

    Raises:
        OSError: it cannot be read.
    """
    import xxhash

    digest = xxhash.xxh3_128()
    with open(path, "rb", buffering=0, opener=regular) as file:
        size = os.fstat(file.fileno()).st_size
        if size <= MAX_HASHED_BYTES:
            digest.update(file.read(size))
        else:
            for i in range(NUM_BLOCKS):
                digest.update(os.pread(file.fileno(), BLOCK_BYTES, (size - BLOCK_BYTES) * i // (NUM_BLOCKS - 1)))
    return [size, digest.hexdigest()]


def stamps(folder: Path, patterns: Sequence[str]) -> dict[str, Stamp]:
    """Stamps of the files in a folder that match a pattern, by their paths in it, all of them synced."""
    found = {}
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}):
        sync(path)
        found[str(path.relative_to(folder))] = stamp(path)
    return found


def damaged(folder: Path, stamped: Any) -> list[str]:
    """Names of the files that are not what `stamps` found: missing, cut off, or with other bytes."""
    if not isinstance(stamped, dict):
        return ["?"]

    def is_whole(name: str, wanted: Any) -> bool:
        try:
            return (folder / name).is_file() and bool(stamp(folder / name) == wanted)
        except (OSError, ValueError):
            return False

    return [name for name, wanted in stamped.items() if not is_whole(name, wanted)]


def state(path: Path) -> tuple[str, int, int, int]:
    """State of an input file (path, size, times): another one means that it has changed."""
    found = path.stat()
    return str(path), found.st_size, found.st_mtime_ns, found.st_ctime_ns


# ---- locks and errors ----


def lock(path: Path) -> IO[str]:
    """Lock the folder for this process; the kernel lets go when the process ends, however it ends.

    Raises:
        InputError: another process has it, or it cannot be locked.
    """
    try:
        file = open(path / ".lock", "a", opener=regular)  # noqa: SIM115 (the caller closes it)
    except OSError as e:
        raise InputError(f"{path / '.lock'} cannot be opened ({reason(e)}): take it away, or choose another folder.") from e
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        file.close()
        raise InputError(f"{path} is in use by another gristmill process: wait for it to end.") from e
    return file


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn what the disk refuses into an InputError: it is full, or the place cannot be read or written.

    Args:
        folder: names the place where the error does not.
    """
    try:
        yield
    except (OSError, SafetensorError) as e:
        if error_number(e) in FULL:
            raise InputError(f"the disk of {folder} is full; free some space and start again, finished work is kept") from e
        if isinstance(e, OSError) and e.filename is not None:  # others are no matter of files
            raise InputError(f"{os.fsdecode(e.filename)}: {reason(e)}: see to it, and run the same command again.") from e
        raise


def error_number(error: Exception) -> int | None:
    """The system's number of an error. safetensors wraps it in its own, of which only the text tells the cause."""
    if isinstance(error, OSError):
        return error.errno
    cause = re.search(r"(?:os error|code:) (\d+)", str(error))
    return int(cause[1]) if cause else None


def reason(error: Exception) -> str:
    """What went wrong, in the system's words, on one line."""
    number = error_number(error)
    return os.strerror(number) if number else " ".join(str(error).split())[:200] or type(error).__name__
