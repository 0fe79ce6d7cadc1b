"""Asynchronous engine: worker threads that step their cores for ever, while requests join and leave."""

import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch

from gristmill.core.errors import InputError
from gristmill.engine.core import Core
from gristmill.engine.engine import Engine
from gristmill.engine.sequence import RequestState

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """Stream event: a token of a request with a listener, or (sample -1) the end of any request, with its error if it failed.

    Attributes:
        last: the sample's last token.
    """

    state: RequestState
    sample: int
    token: int = 0
    logprob: float = 0.0
    last: bool = False
    top_logprobs: tuple[tuple[int, float], ...] = ()
    error: Exception | None = None


class AsyncEngine:
    """Engine threads that serve whoever submits.

    Args:
        engine: the model; its `generate` may be used meanwhile.
        deliver: hears, from the threads, what a step brought. Without listeners, that is the ends of requests alone.
        interactive: as in `Core`.
    """

    def __init__(self, engine: Engine, deliver: Callable[[list[TokenEvent]], object], *, interactive: bool = False) -> None:
        self.engine = engine
        num_workers = engine.useful_workers(engine.max_batch)
        self._torch_threads = torch.get_num_threads()
        self._refreshing = threading.Lock()
        self.workers = [_Worker(engine, num_workers, deliver, interactive) for _ in range(num_workers)]

    def start(self) -> None:
        if self.engine.num_workers > 1:  # one thread inside torch for each of ours
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

    @property
    def num_open(self) -> int:
        """Samples that are submitted and not done."""
        return sum(worker.load for worker in self.workers)

    def submit(self, state: RequestState) -> None:
        """Take a request. Its end is delivered, whatever happens."""
        count = self.num_open + len(state.completions)
        slots = self.engine.max_batch // len(self.workers)
        filled = self.workers[: max(self.engine.useful_workers(count), -(-count // slots))]
        worker = min(filled, key=lambda one: one.load)
        if worker.load + len(state.completions) > slots:  # samples stay together, so what is free may lie in parts
            worker = min(self.workers, key=lambda one: one.load)
        worker.add_load(len(state.completions))
        worker.inbox.put((state, True))

    def cancel(self, state: RequestState) -> None:
        """Abort a request; its end is delivered too."""
        for worker in self.workers:
            worker.inbox.put((state, False))

    def refresh(self) -> None:
        """Weight update between two steps: take over what training has changed in place. Returns when all threads have."""
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
    """A thread with a core.

    Attributes:
        load: samples that are submitted and not done.
    """

    def __init__(self, engine: Engine, num_workers: int, deliver: Callable[[list[TokenEvent]], object], interactive: bool) -> None:
        self.engine, self.num_workers, self.deliver, self.interactive = engine, num_workers, deliver, interactive
        self.inbox: queue.SimpleQueue[tuple[RequestState, bool] | threading.Barrier | None] = queue.SimpleQueue()
        self.states: set[RequestState] = set()
        self.load = 0
        self._lock = threading.Lock()
        self.core: Core = engine.core(num_workers, interactive=interactive)
        self.events: list[TokenEvent] = []
        self.thread = threading.Thread(target=self._run, daemon=True)

    def add_load(self, samples: int) -> None:
        with self._lock:
            self.load += samples

    def _run(self) -> None:
        try:
            self.core.start()
        except Exception:  # the first step fails in the same way, and tells who asked
            log.exception("the engine cannot make room for its cache")
        while True:
            try:
                message = self.inbox.get(block=self.core.idle)
                if message is None:
                    self.core.release()
                    return
                if isinstance(message, threading.Barrier):
                    message.wait()
                    message.wait()
                    self.core.refresh()
                    message.wait()
                    continue
                self._handle(*message)
                continue
            except queue.Empty:
                pass
            try:
                self.core.step()
                for state in self.core.take_finished():
                    self._end(state, state.error)
            except Exception as e:  # whatever it was, the others' state may be wrong too
                for state in list(self.states):
                    self._end(state, e)
                self._flush()
                self.core.release()
                try:
                    self.core = self.engine.core(self.num_workers, interactive=self.interactive)
                except Exception:
                    log.exception("the engine cannot go on")
                    return
            self._flush()

    def _handle(self, state: RequestState, wanted: bool) -> None:
        if not wanted:
            if state in self.states:
                self.core.cancel(state)
                self._end(state, InputError("cancelled"))
        elif not state.cancelled:
            self.states.add(state)
            if state.listener is not None:
                state.listener = lambda *token: self.events.append(TokenEvent(state, *token))
            try:
                self.core.add(state)
            except InputError as e:
                self._end(state, e)
        self._flush()

    def _end(self, state: RequestState, error: Exception | None = None) -> None:
        self.states.discard(state)
        self.add_load(-len(state.completions))
        self.events.append(TokenEvent(state, -1, error=error))

    def _flush(self) -> None:
        events, self.events = self.events, []
        if events:
            self.deliver(events)
