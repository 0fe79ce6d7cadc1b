"""Terminal output: the one place that prints, with the control characters of foreign text made visible.

Names, answers, errors and paths may come from a model or a stranger. Raw, they could move the cursor, reach the clipboard
(OSC 52) or turn the order of a line round.
"""

import ctypes
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

# C0 and C1 but for tab and line feed, DEL, soft hyphen, direction marks, line and paragraph separators, byte order mark,
# surrogates, annotation marks and tags. Joiners stay: scripts and emoji are written with them.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff\ufff9-\ufffb\U000e0000-\U000e007f]"
)

_FILES = threading.Lock()  # of the process's standard streams


def visible(text: str) -> str:
    """Text whose control characters are written as JSON writes them: ``\\u001b``. JSON stays JSON of the same value."""
    return _UNSAFE.sub(lambda m: f"\\u{ord(m[0]):04x}" if ord(m[0]) < 0x10000 else f"\\U{ord(m[0]):08x}", text)


def sentence(text: str) -> str:
    """Text on one line, so that what a stranger wrote into it never looks like another message."""
    return visible(text).replace("\n", "\\n")


def echo(text: str, err: bool = False, nl: bool = True) -> None:
    """Print to standard output, or standard error; what the terminal's encoding lacks is escaped too."""
    stream = sys.stderr if err else sys.stdout
    line = visible(text)
    encoding = stream.encoding or "utf-8"
    stream.write(line.encode(encoding, "backslashreplace").decode(encoding) + ("\n" if nl else ""))
    stream.flush()


class _Visible:
    """Standard error for all that does not print by `echo`: options, warnings, logs, and what threads end with."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(visible(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def terminal() -> TextIO:
    """Standard error as it is, for what moves the cursor itself: the display of progress."""
    return sys.stderr._stream if isinstance(sys.stderr, _Visible) else sys.stderr


@contextmanager
def guarded_stderr() -> Iterator[None]:
    """Standard error on which nothing moves the terminal."""
    raw = sys.stderr
    sys.stderr = cast(TextIO, _Visible(raw))
    try:
        yield
    finally:
        sys.stderr = raw


@contextmanager
def silenced(descriptor: int) -> Iterator[None]:
    """Drop what a library writes meanwhile to standard output (1) or standard error (2), past Python."""
    flush = ctypes.CDLL(None).fflush  # C keeps what goes into a pipe, and would write it later
    with _FILES:
        flush(None)
        kept, nowhere = os.dup(descriptor), os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, descriptor)
        try:
            yield
        finally:
            flush(None)
            os.dup2(kept, descriptor)
            os.close(kept)
            os.close(nowhere)
