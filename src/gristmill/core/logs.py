"""Logs of what listens to strangers: few lines, short, and without a byte that moves a terminal."""

import itertools
import logging
import os
import time
import traceback

MAX_LOG_LINES, LOG_SECONDS, MAX_LOG_CHARS = 20, 10.0, 4000


class LogLimit(logging.Filter):
    """Limit of a log: so many lines in so many seconds, each of printable ASCII and no longer than a screen."""

    def __init__(self) -> None:
        super().__init__()
        self._lines, self._until = 0, 0.0

    def filter(self, record: logging.LogRecord) -> bool:
        now = time.monotonic()
        if now >= self._until:
            self._lines, self._until = 0, now + LOG_SECONDS
        self._lines += 1
        if self._lines > MAX_LOG_LINES:
            return False
        error = record.exc_info[1] if record.exc_info else None
        text = record.getMessage() + (f": {short_traceback(error)}" if error is not None else "")
        more = " (more is left out for some seconds)" if self._lines == MAX_LOG_LINES else ""
        record.msg, record.args, record.exc_info, record.exc_text = printable(text[:MAX_LOG_CHARS]) + more, (), None, None
        record.stack_info = None
        return True


def limit_logs() -> None:
    """Limit what this process writes to its log."""
    for handler in (logging.lastResort, *logging.getLogger().handlers):
        if handler is not None:
            handler.addFilter(LogLimit())


def printable(text: str) -> str:
    """Text in which nothing moves a terminal: other than printable ASCII is written out."""
    return "".join(c if c.isascii() and c.isprintable() else ascii(c)[1:-1] for c in text)


def short_traceback(error: BaseException) -> str:
    """Where an error was raised, innermost last, and what it says, cut."""
    frames = traceback.extract_tb(error.__traceback__)[-8:]
    where = " > ".join(itertools.chain((f"{os.path.basename(f.filename)}:{f.lineno} {f.name}" for f in frames), [type(error).__name__]))
    return f"{where}: {str(error)[:300]}"
