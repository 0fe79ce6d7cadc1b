"""An append-only journal: nothing that was generated or scored is lost or bought twice.

One JSON object a line, one line for each attempt that ended. A process killed in the middle of a line leaves a torn last line, which
is cut off when the journal is opened again; every other line stands. Lines reach the kernel at once (so a killed process loses
none) and the disk every `SYNC_SECONDS` (so a power cut loses at most those).

Memory holds the place of each record and no record, so that a journal may be larger than memory.
"""

import contextlib
import json
import os
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from pydantic_core import from_json

from gristmill.core.errors import InputError
from gristmill.core.io import make_folder, reason, regular, sync

SYNC_SECONDS = 5.0
ENCODE = json.JSONEncoder(ensure_ascii=False).encode
PIECE = 16384  # bytes; most records are shorter
HEAD = b'{"id": '  # of the lines that `append` writes, as every caller has the id first


class DiskFull(InputError):
    """A record cannot be written at present; the journal keeps all earlier ones."""


class Journal(Mapping[str, dict[str, Any]]):
    """Records by id, in the order in which their ids first came. Of several records of an id the last counts.

    Args:
        path: the file; created when absent.
        read_only: only look; another process may be writing.
    """

    def __init__(self, path: Path, *, read_only: bool = False):
        self.path = path
        self._places: dict[str, int] = {}
        if read_only:
            try:
                self._size = self._read()
                self._file = open(path, "rb", buffering=0, opener=regular)  # noqa: SIM115 (closed by close)
            except OSError as e:
                raise InputError(f"{path} cannot be read ({reason(e)}): put it back, or run the same command again.") from e
            return
        try:
            make_folder(path.parent)
            is_new = not path.exists()
            good = 0 if is_new else self._read()
            # unbuffered: a failed write leaves nothing behind that close would try again
            self._file = open(path, "ab+", buffering=0, opener=regular)  # noqa: SIM115 (closed by close)
            self._size = good
            if self._file.seek(0, os.SEEK_END) > good:
                self._file.truncate(good)
            if is_new:
                sync(path.parent)
        except OSError as e:
            raise self._full(e) from e
        self._synced = time.monotonic()

    def _read(self) -> int:
        """Find the records; returns where the last whole one ends."""
        good = place = 0
        with open(self.path, "rb", opener=regular) as file:
            for line in file:
                record = _record(line)
                if record is not None:
                    self._places[record["id"]] = place
                    good = place + len(line)
                place += len(line)
        return good

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __getitem__(self, name: str) -> dict[str, Any]:
        place, line = self._places[name], b""
        while (end := line.find(b"\n")) < 0:
            piece = os.pread(self._file.fileno(), PIECE, place + len(line))
            assert piece, "the journal was cut while it was open"
            line += piece
        record = _record(line[: end + 1])
        assert record is not None
        return record

    def append(self, record: dict[str, Any]) -> None:
        """Add one record, which must have an `id`.

        Raises:
            DiskFull: the record could not be written; it may be appended again later.
        """
        data = ENCODE(record).encode() + b"\n"
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[self._file.write(rest) :]
            if time.monotonic() - self._synced > SYNC_SECONDS:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()
        except OSError as e:
            with contextlib.suppress(OSError):  # no torn line before a later record
                self._file.truncate(self._size)
            raise self._full(e) from e
        self._places[record["id"]] = self._size
        self._size += len(data)

    def _full(self, e: OSError) -> DiskFull:
        return DiskFull(f"{self.path} cannot be written ({reason(e)}): free some space and run the same command again.")

    def close(self) -> None:
        """Flush to disk and close."""
        if not self._file.closed and self._file.writable():
            try:
                os.fsync(self._file.fileno())
            except OSError as e:
                raise self._full(e) from e
            finally:
                self._file.close()
        self._file.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def read_once(path: Path, ids: Collection[str] | None = None) -> Iterator[dict[str, Any]]:
    """The records of a journal in the order of its lines, several of an id too: for who looks at each once and needs no place of any.

    Args:
        ids: of the only records to give.
    """
    wanted = {ENCODE(one).encode() for one in ids or ()}
    try:
        with open(path, "rb", opener=regular) as file:
            for line in file:
                if ids is not None and line.startswith(HEAD):
                    name = line[len(HEAD) : line.find(b'"', len(HEAD) + 1) + 1]
                    if name not in wanted and b"\\" not in name:
                        continue
                record = _record(line)
                if record is not None and (ids is None or record["id"] in ids):
                    yield record
    except OSError as e:
        raise InputError(f"{path} cannot be read ({reason(e)}): put it back, or run the same command again.") from e


def _record(line: bytes) -> dict[str, Any] | None:
    """The record of a whole line; None for anything else."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = from_json(line, cache_strings="keys")
    except ValueError:
        try:  # it knows no half of a surrogate pair; and a power cut may leave NUL bytes where a torn line was
            record = json.loads(line.lstrip(b"\0"))
        except (ValueError, RecursionError):
            return None
    return record if isinstance(record, dict) and isinstance(record.get("id"), str) else None
