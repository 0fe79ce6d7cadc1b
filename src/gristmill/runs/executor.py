"""Task executors: in process, a pool of local processes, or Ray. A task that left its marker is never done again."""

import gc
import multiprocessing
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from gristmill.core.errors import InputError
from gristmill.core.io import STAMPS, WRITTEN, DamagedFile, damaged, read_json, stamp, write_json
from gristmill.core.progress import Progress

WATCH_SECONDS = 2.0
ATTEMPTS = 3  # of a task whose process was killed


@dataclass(frozen=True)
class Task:
    """A call of a module's function that writes files and returns counts.

    Attributes:
        marker: JSON of what it returned, with `seconds` and `peak_mib`, and sizes and hashes of the files that it wrote, written when
            they are on the disk. Until then, or when one of them is damaged, it is done again from the beginning.
    """

    work: Callable[..., dict[str, Any]]
    arguments: tuple[Any, ...]
    marker: Path


def perform(task: Task) -> dict[str, Any]:
    """Do a task, unless it was done before. It may return STAMPS of files that an earlier start wrote.

    Returns:
        What it returned; beside it the `seconds` that it took, and `peak_mib`, the most memory that its process has held so far.
    """
    folder = task.marker.parent
    if task.marker.exists():
        with suppress(DamagedFile):
            done = read_json(task.marker)
            if {"seconds", "peak_mib"} <= done.keys() and not damaged(folder, done.pop(STAMPS, {})):
                return done
        task.marker.unlink(missing_ok=True)
    before = gc.get_threshold()
    gc.set_threshold(100_000, 50, 100)  # rows come and go by the thousand, in no cycles: looking for some took a twentieth of the time
    started = time.monotonic()
    written: list[Path] = []
    token = WRITTEN.set(written)
    try:
        result = task.work(*task.arguments)
    finally:
        WRITTEN.reset(token)
        gc.set_threshold(*before)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    result = {**result, "seconds": round(time.monotonic() - started, 4), "peak_mib": peak}
    files = result.pop(STAMPS, {}) | {os.path.relpath(path, folder): stamp(path) for path in dict.fromkeys(written)}
    write_json(task.marker, result | {STAMPS: files})
    return result


class Executor(Protocol):
    """Runs tasks in any order and gives back (place in the list, result) as they finish."""

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[int, dict[str, Any]]]: ...

    def close(self) -> None: ...


class InProcess:
    """Serial executor in this process."""

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[int, dict[str, Any]]]:
        for place, task in enumerate(tasks):
            yield place, perform(task)

    def close(self) -> None:
        pass


def _serve(parent: int) -> None:
    """In a worker: leave Ctrl-C to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _end_with(parent)


@cache
def _end_with(parent: int) -> None:
    """In a worker: end when the parent is gone, which nobody else would tell."""

    def watch() -> None:
        while True:
            time.sleep(WATCH_SECONDS)
            try:
                os.kill(parent, 0)
            except OSError:
                os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Processes:
    """Pool of local processes. A process that is killed costs the tasks under way, which are done again."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        self.pool = ProcessPoolExecutor(self.workers, context, initializer=_serve, initargs=(os.getpid(),))

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[int, dict[str, Any]]]:
        left = list(range(len(tasks)))[::-1]
        attempts = dict.fromkeys(left, 0)
        running: dict[Future[dict[str, Any]], int] = {}
        while left or running:
            broken: list[int] = []
            while left and len(running) < 2 * self.workers:
                place = left.pop()
                attempts[place] += 1
                try:
                    running[self.pool.submit(perform, tasks[place])] = place
                except BrokenProcessPool:
                    broken.append(place)
                    break
            done, _ = wait(running, return_when=FIRST_COMPLETED) if running else (set(), None)
            for future in done:
                place = running.pop(future)
                try:
                    result = future.result()
                except BrokenProcessPool:
                    broken.append(place)
                    continue
                yield place, result
            if broken:
                again = [*broken, *running.values()]
                running.clear()
                self.pool.shutdown(wait=True, cancel_futures=True)
                if max(attempts[place] for place in again) >= ATTEMPTS:
                    raise InputError(
                        "A worker process was killed again and again (out of memory?): give fewer --workers or smaller shards."
                    )
                left += again[::-1]
                self._start()

    def close(self) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)


def _perform_for(driver: int, task: Task) -> dict[str, Any]:
    """`perform` in a worker of Ray's. On the driver's machine it ends with the driver: Ray lets it work on for a minute and more, beside
    the next run. (A cluster that stays sees to it itself: `driver` is 0.)"""
    if driver:
        _end_with(driver)
    return perform(task)


class Ray:
    """Ray executor, on the cluster that `RAY_ADDRESS` names or on a local one. Run folder and inputs must be where all nodes see them."""

    def __init__(self, workers: int) -> None:
        try:
            ray: Any = import_module("ray")  # an extra: nothing else may need its types
        except ImportError as e:
            raise InputError("Ray is not installed: pip install 'gristmill[ray]'.") from e
        self.ray, self.workers = ray, workers
        self.started = not ray.is_initialized()
        is_local = self.started and not os.environ.get("RAY_ADDRESS")
        if self.started:
            local = {"num_cpus": workers} if is_local else {}
            ray.init(include_dashboard=False, log_to_driver=False, logging_level="error", **local)
        self.driver = os.getpid() if is_local else 0
        self.perform = ray.remote(num_cpus=1, max_retries=ATTEMPTS)(_perform_for)

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[int, dict[str, Any]]]:
        left = list(enumerate(tasks))[::-1]
        running: dict[Any, int] = {}
        while left or running:
            while left and len(running) < 2 * self.workers:
                place, task = left.pop()
                running[self.perform.remote(self.driver, task)] = place
            done, _ = self.ray.wait(list(running), num_returns=1)
            for reference in done:
                place = running.pop(reference)
                try:
                    result = self.ray.get(reference)
                except self.ray.exceptions.RayTaskError as e:
                    raise e.as_instanceof_cause() from e
                yield place, result

    def close(self) -> None:
        if self.started:
            self.ray.shutdown()


def run_tasks(executor: Executor, tasks: Sequence[Task], progress: Progress, name: str) -> list[dict[str, Any]]:
    """Run tasks and show how many are done; their results in order.

    Args:
        name: of this part of the stage, for the person who waits.
    """
    out: list[dict[str, Any]] = [{}] * len(tasks)
    for place, result in progress.track(executor.run(tasks), len(tasks), lambda: name):
        out[place] = result
    return out


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make(kind: str, workers: int) -> Executor:
    """An executor by its name: processes or ray; one worker in processes is this process."""
    if kind == "ray":
        return Ray(workers)
    return InProcess() if workers == 1 else Processes(workers)
