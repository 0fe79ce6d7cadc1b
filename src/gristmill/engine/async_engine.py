"""An engine that is always at work: requests join and leave while others are on their way."""

import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch

from gristmill.core.errors import InputError
from gristmill.engine.core import Core
from gristmill.engine.engine import Engine
from gristmill.engine.sequence import Job

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Event:
    """A token of a response that somebody listens to, or (sample -1) the end of a request, with its error if it failed."""

    job: Job
    sample: int
    token: int = 0
    logprob: float = 0.0
    last: bool = False
    likeliest: tuple[tuple[int, float], ...] = ()
    error: Exception | None = None


class Live:
    """Threads that work for whoever submits.

    Args:
        engine: the model; its `generate` may be used meanwhile.
        deliver: hears, from the threads, what a step brought. Without listeners, that is the ends of requests alone.
    """

    def __init__(self, engine: Engine, deliver: Callable[[list[Event]], object]) -> None:
        self.engine = engine
        count = min(engine.num_workers, engine.max_batch)
        self._torch_threads = torch.get_num_threads()
        self._refreshing = threading.Lock()
        self.workers = [_Worker(engine, count, deliver) for _ in range(count)]

    def start(self) -> None:
        if len(self.workers) > 1:  # one thread inside torch for each of ours
            torch.set_num_threads(1)
        for worker in self.workers:
            worker.thread.start()

    def stop(self, seconds: float = 5.0) -> bool:
        """End after the step that is under way. False if a thread is still in it after so long."""
        for worker in self.workers:
            worker.inbox.put(None)
        for worker in self.workers:
            worker.thread.join(seconds)
        torch.set_num_threads(self._torch_threads)
        return not any(worker.thread.is_alive() for worker in self.workers)

    @property
    def healthy(self) -> bool:
        return all(worker.thread.is_alive() for worker in self.workers)

    def submit(self, job: Job) -> None:
        """Take a request. Its end is delivered, whatever happens."""
        worker = min(self.workers, key=lambda one: one.load)
        worker.add_load(len(job.completions))
        worker.inbox.put((job, True))

    def cancel(self, job: Job) -> None:
        """Forget a request; its end is delivered too."""
        for worker in self.workers:
            worker.inbox.put((job, False))

    def refresh(self) -> None:
        """Between two steps, take over the weights that training has changed in place. Returns when all threads have."""
        with self._refreshing:  # two at once would wait for each other
            pause = threading.Barrier(len(self.workers) + 1)
            for worker in self.workers:
                worker.inbox.put(pause)
            pause.wait()  # nobody computes now
            try:
                self.engine.refresh()
            finally:  # or they would wait for ever
                pause.wait()
                pause.wait()


class _Worker:
    """Attributes: `load`, samples that are submitted and not done."""

    def __init__(self, engine: Engine, count: int, deliver: Callable[[list[Event]], object]) -> None:
        self.engine, self.count, self.deliver = engine, count, deliver
        self.inbox: queue.SimpleQueue[tuple[Job, bool] | threading.Barrier | None] = queue.SimpleQueue()
        self.jobs: set[Job] = set()
        self.load = 0
        self._lock = threading.Lock()
        self.core: Core = engine.core(count)
        self.events: list[Event] = []
        self.thread = threading.Thread(target=self._work, daemon=True)

    def add_load(self, samples: int) -> None:
        with self._lock:
            self.load += samples

    def _work(self) -> None:
        while True:
            try:
                order = self.inbox.get(block=self.core.idle)
                if order is None:
                    return
                if isinstance(order, threading.Barrier):
                    order.wait()
                    order.wait()
                    self.core.refresh()
                    order.wait()
                    continue
                self._obey(*order)
                continue
            except queue.Empty:
                pass
            try:
                self.core.step()
                for job in self.core.take_finished():
                    self._end(job, job.error)
            except Exception as e:  # whatever it was, the others' state may be wrong too
                for job in list(self.jobs):
                    self._end(job, e)
                self._tell()
                try:
                    self.core = self.engine.core(self.count)
                except Exception:
                    log.exception("the engine cannot go on")
                    return
            self._tell()

    def _obey(self, job: Job, wanted: bool) -> None:
        if not wanted:
            if job in self.jobs:
                self.core.cancel(job)
                self._end(job, InputError("cancelled"))
        elif not job.cancelled:
            self.jobs.add(job)
            if job.listener is not None:
                job.listener = lambda *heard: self.events.append(Event(job, *heard))
            try:
                self.core.add(job)
            except InputError as e:
                self._end(job, e)
        self._tell()

    def _end(self, job: Job, error: Exception | None = None) -> None:
        self.jobs.discard(job)
        self.add_load(-len(job.completions))
        self.events.append(Event(job, -1, error=error))

    def _tell(self) -> None:
        events, self.events = self.events, []
        if events:
            self.deliver(events)
