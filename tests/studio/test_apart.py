"""Work in a process of its own: what it tells, what it raises, and that it ends with who waits for it."""

import multiprocessing
import os
import time
from threading import Event

import pytest

from gristmill.core.errors import InputError
from gristmill.studio.apart import Died, Stopped, Told, apart


def work(tell: Told, what: str) -> int:
    tell(1, 2)
    if what == "fail":
        raise InputError("it is wrong")
    if what == "die":
        os._exit(1)
    if what == "wait":
        time.sleep(600)
    return os.getpriority(os.PRIO_PROCESS, 0)


def test_work_tells_how_far_it_is_and_is_modest() -> None:
    told = list[tuple[int, int]]()
    assert apart(work, "", told=lambda *far: told.append(far)) > os.getpriority(os.PRIO_PROCESS, 0)
    assert told == [(1, 2)]


def test_what_it_raises_is_raised_here_and_its_death_is_told() -> None:
    with pytest.raises(InputError, match="it is wrong"):
        apart(work, "fail")
    with pytest.raises(Died):
        apart(work, "die")


def test_it_is_ended_when_nobody_waits() -> None:
    stop = Event()
    with pytest.raises(Stopped):
        apart(work, "wait", told=lambda *far: stop.set(), stop=stop)
    assert not multiprocessing.active_children()
