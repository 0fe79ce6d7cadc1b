"""Thread parallelism on a CPU: pieces of work in one Python thread a core.

The operations of a small model are too short to be cut over cores. On two of them torch's own threads train at .7 of one thread's speed
while the waiting ones sleep; spinning they reach 1.5, but fall to .4 beside a busy neighbour. Whole pieces of work in threads of their
own reach 1.6 (generation 1.8) and lose nothing (docs/lab.md): torch leaves Python's lock while it computes.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue
from threading import Event, Lock
from typing import Protocol, TypeVar

import torch
from torch import nn

# Parameters from which on torch's own threads are the better use of the cores; their gradients would also be held once a worker.
MAX_THREADED_PARAMETERS = 50_000_000

# MKL computes these. Where two threads call one for the first time at once, one of them may get cosines that are wrong in the fourth digit.
VECTOR_FUNCTIONS = (torch.cos, torch.sin, torch.exp, torch.log, torch.tanh, torch.erf)

_COUNTING, _num_alone, _num_before = Lock(), 0, 1  # who wants one thread inside torch, and how many there were

Item = TypeVar("Item")
Result = TypeVar("Result")


class Map(Protocol):
    """Protocol of a parallel `map` that returns a list: the results in the order of the items."""

    def __call__(self, function: Callable[[Item], Result], items: Iterable[Item], /) -> list[Result]: ...


def num_workers(model: nn.Module, device: torch.device | None = None) -> int:
    """How many pieces of work to do at once with this model, on a device (None: where it is): `torch.get_num_threads()` for a small one
    on a CPU, else 1.
    """
    parameters = list(model.parameters())
    small = sum(p.numel() for p in parameters) < MAX_THREADED_PARAMETERS
    return torch.get_num_threads() if small and (device or parameters[0].device).type == "cpu" else 1


def alone(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """The `Map` of one worker: the caller itself."""
    return [function(item) for item in items]


def evenly(items: Iterable[Item], count: int, size: Callable[[Item], int]) -> list[list[Item]]:
    """Share items out to `count` workers, about as much to each; every share keeps their order."""
    items = list(items)
    loads, owners = [0] * count, [0] * len(items)
    for number in sorted(range(len(items)), key=lambda number: -size(items[number])):
        owners[number] = loads.index(min(loads))
        loads[owners[number]] += size(items[number])
    return [[item for item, owner in zip(items, owners, strict=True) if owner == worker] for worker in range(count)]


@contextmanager
def workers(count: int) -> Iterator[Map]:
    """A `Map` over `count` threads, with one thread inside torch for each of them meanwhile. One worker is the caller itself."""
    if count == 1:
        yield alone
        return
    with one_torch_thread(), ThreadPoolExecutor(count) as pool:
        for function in VECTOR_FUNCTIONS:
            function(torch.ones(1))
        yield lambda function, items: list(pool.map(function, items))


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """One thread inside torch meanwhile. Those of one Python thread may end in any order, and leave as many as there were at first."""
    global _num_alone, _num_before
    with _COUNTING:
        if not _num_alone:
            _num_before = torch.get_num_threads()
        _num_alone += 1
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _COUNTING:
            _num_alone -= 1
            if not _num_alone:
                torch.set_num_threads(_num_before)


def merge(count: int, stream: Callable[[int, Event], Iterator[Item]]) -> Iterator[Item]:
    """Merge `count` streams, each made in a worker of its own, as their items come.

    Args:
        count: number of workers; one is the caller itself.
        stream: makes the stream of a worker, which is given by number. Its event is set when nobody waits for its items any more:
            another stream has failed, or the caller has gone.
    """
    stop = Event()
    if count == 1:
        yield from stream(0, stop)
        return
    results: SimpleQueue[tuple[Item] | BaseException | None] = SimpleQueue()

    def work(number: int) -> None:
        try:
            for item in stream(number, stop):
                results.put((item,))
            results.put(None)
        except BaseException as e:
            results.put(e)

    with workers(count) as each, ThreadPoolExecutor(1) as caller:
        caller.submit(each, work, range(count))
        try:
            while count:
                result = results.get()
                if isinstance(result, BaseException):
                    raise result
                if result is None:
                    count -= 1
                else:
                    yield result[0]
        finally:
            stop.set()
