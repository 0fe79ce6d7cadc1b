"""Heavy work in a process of its own: the server stays small and quick, hears how far it is, and can end it.

It runs at a low priority, so that pages are painted first on a machine with few cores.
"""

import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from threading import Event
from typing import Any

from gristmill.core.errors import InputError

NICE = 5  # above this process's own
POLL_SECONDS = 0.1  # in which an end is heard
END_SECONDS = 5.0  # in which the process may remove what it has half written
Told = Callable[[int, int], None]  # how much is done, of how much


class Stopped(InputError):
    """Nobody waits for the work any more."""


class Died(Exception):
    """The process ended without a word, as where memory is short."""


def apart(work: Callable[..., Any], *args: Any, told: Told | None = None, stop: Event | None = None) -> Any:
    """The result of `work(tell, *args)`, called in another process; `tell(done, of)` there calls `told` here.

    Args:
        stop: ends the process when it is set.

    Raises:
        Stopped: by `stop`.
        Died: the process ended by itself.
        Exception: as the work raised it.
    """
    context = get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(there, work, args), daemon=True)
    process.start()
    there.close()
    try:
        with suppress(OSError):  # it has ended already, or may not be changed here
            os.setpriority(os.PRIO_PROCESS, process.pid or 0, min(19, os.getpriority(os.PRIO_PROCESS, 0) + NICE))
        while True:
            while not here.poll(POLL_SECONDS):
                if stop is not None and stop.is_set():
                    raise Stopped("This was stopped before it was done: nothing of it is kept.")
            kind, value = here.recv()
            if kind == "done":
                return value
            if kind == "failed":
                raise value
            if told is not None:
                told(*value)
    except EOFError as e:
        raise Died from e
    finally:
        process.terminate()
        process.join(END_SECONDS)
        process.kill()
        process.join()
        here.close()


def _run(there: Connection, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the server ends this process
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # by way of what stands in `finally`
    try:
        there.send(("done", work(lambda *far: there.send(("told", far)), *args)))
    except Exception as e:
        there.send(("failed", e))
