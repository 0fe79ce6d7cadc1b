"""An append-only journal: nothing that was generated or scored is lost or bought twice.

One JSON object a line, flushed as it arrives. A process killed in the middle of a line leaves a torn last line, which is dropped
and cut off when the journal is opened again; every line before it stands. Lines reach the kernel at once (so a killed process loses
none) and the disk every `SYNC_SECONDS` (so a power cut loses at most those).
"""

import contextlib
import json
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from gristmill.errors import InputError

SYNC_SECONDS = 5.0


class Journal:
    """Records by id.

    Args:
        path: the file; created when absent.

    Attributes:
        done: every record so far, by its id.
    """

    def __init__(self, path: Path):
        self.path = path
        self.done: dict[str, Any] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        good = 0
        if path.exists():
            with path.open("rb") as file:
                for line in file:
                    try:
                        record = json.loads(line) if line.endswith(b"\n") else None
                    except ValueError:
                        record = None
                    if not isinstance(record, dict) or "id" not in record:
                        break
                    self.done[record["id"]] = record
                    good += len(line)
        self._file = path.open("ab", buffering=0)  # a failed write leaves nothing behind that close would try again
        self._size = good
        if self._file.tell() > good:
            self._file.truncate(good)
        self._synced = time.monotonic()

    def append(self, record: dict[str, Any]) -> None:
        """Add one record, which must have an `id`.

        Raises:
            InputError: the disk is full; the journal keeps all earlier records.
        """
        data = json.dumps(record, ensure_ascii=False).encode() + b"\n"
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
        self._size += len(data)
        self.done[record["id"]] = record

    def _full(self, e: OSError) -> InputError:
        return InputError(f"{self.path} cannot be written ({e.strerror}): free some space and run the same command again.")

    def close(self) -> None:
        """Flush to disk and close."""
        if not self._file.closed:
            try:
                os.fsync(self._file.fileno())
            except OSError as e:
                raise self._full(e) from e
            finally:
                self._file.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
