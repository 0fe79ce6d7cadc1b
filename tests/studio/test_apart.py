"""Work in a process of its own: what it tells, what it raises, and that it ends with who waits for it."""

import multiprocessing
import os
import threading
import time
from threading import Event
from typing import Any

import pytest

from gristmill.core.errors import InputError
from gristmill.studio import asking
from gristmill.studio.apart import Died, Stopped, Told, apart
from gristmill.studio.sources import Sources
from gristmill.studio.store import Store
from tests.studio.conftest import Served


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


def test_a_server_that_ends_ends_the_choosing_and_keeps_nothing_of_it(
    local_store: Store, sources: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "choose_items", lambda *_, told, stop, **more: apart(work, "wait", told=told, stop=stop))
    served, said = Served(local_store, sources), list[Any]()
    body = {"kind": "rate", "source": "01-answers/responses.parquet", "strategy": "disagreement"}
    asked = threading.Thread(target=lambda: said.append(served.client("owner").api("POST", "/projects", body)[1]))
    asked.start()
    end = time.monotonic() + 30
    while not multiprocessing.active_children() and time.monotonic() < end:
        time.sleep(0.02)
    served.stop()
    asked.join(30)
    assert not multiprocessing.active_children() and not local_store.projects()
    assert "stopped before it was done" in str(said[0])
