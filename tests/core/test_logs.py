"""A log that strangers write to stays short and moves no terminal."""

import logging

from gristmill.core.logs import MAX_LOG_LINES, LogLimit


def test_the_log_has_few_lines_of_printable_ascii() -> None:
    limit, shown = LogLimit(), []
    for _ in range(100):
        record = logging.LogRecord("asyncio", logging.ERROR, "x.py", 1, "%s", ("\x1b[31m\r\nfake \u00e9" + "x" * 10_000,), None)
        if limit.filter(record):
            shown.append(record.getMessage())
    assert len(shown) == MAX_LOG_LINES and "left out" in shown[-1]
    assert all(line.isascii() and line.isprintable() and len(line) < 5000 for line in shown)
    try:
        raise ValueError("\x1b[2J" + "y" * 9999)
    except ValueError as e:
        record = logging.LogRecord("x", logging.ERROR, "x.py", 1, "it failed", (), (ValueError, e, e.__traceback__))
    assert LogLimit().filter(record) and "test_logs.py" in record.getMessage() and len(record.getMessage()) < 1000
