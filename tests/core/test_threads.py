"""Threads share out work, keep order, and neither lose an error nor go on after one."""

import time
from collections.abc import Iterator
from threading import Event, get_ident

import pytest
import torch
from torch import nn

from gristmill.core.threads import MAX_THREADED_PARAMETERS, evenly, merge, num_workers, one_torch_thread, workers


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_small_models_use_every_core_and_large_ones_leave_them_to_torch() -> None:
    assert num_workers(nn.Linear(4, 4)) == 3
    assert num_workers(nn.Linear(MAX_THREADED_PARAMETERS, 1, bias=False, device="meta")) == 1


@pytest.mark.parametrize("count", [1, 3])
def test_results_keep_the_order_of_their_items(count: int) -> None:
    with workers(count) as each:
        assert each(lambda i: (time.sleep(0.002 * (5 - i)), i)[1], range(6)) == list(range(6))


def test_each_worker_has_one_thread_inside_torch() -> None:
    with workers(3) as each:
        assert each(lambda _: torch.get_num_threads(), range(6)) == [1] * 6
    assert torch.get_num_threads() == 3


def test_threads_are_given_back_by_the_last_that_wants_one() -> None:
    """Streams of answers may begin and end in any order."""
    first, second = one_torch_thread(), one_torch_thread()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.get_num_threads() == 1
    second.__exit__(None, None, None)
    assert torch.get_num_threads() == 3


def test_threads_are_given_back_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), workers(3) as each:
        each(lambda i: 1 // i, range(3))
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("count", [1, 3])
def test_streams_are_merged(count: int) -> None:
    def stream(number: int, stop: Event) -> Iterator[int]:
        yield from (number, number)

    assert sorted(merge(count, stream)) == sorted([*range(count)] * 2)


def test_one_failing_stream_ends_the_others_and_is_raised() -> None:
    ended = []

    def stream(number: int, stop: Event) -> Iterator[int]:
        if not ended:
            ended.append(get_ident())
            raise ValueError("no more")
        while not stop.wait(0.001):
            yield 0
        ended.append(get_ident())

    with pytest.raises(ValueError, match="no more"):
        list(merge(3, stream))
    assert len(ended) == 3


def test_a_caller_that_leaves_ends_the_streams() -> None:
    stops: list[Event] = []

    def stream(number: int, stop: Event) -> Iterator[int]:
        stops.append(stop)
        while not stop.is_set():
            yield 0
            time.sleep(0.001)

    items = merge(2, stream)
    assert next(items) == 0
    items.close()
    assert all(stop.is_set() for stop in stops) and torch.get_num_threads() == 3


def test_work_is_shared_out_evenly_and_in_order() -> None:
    assert evenly([9, 1, 8, 2, 3], 2, size=lambda item: item) == [[9, 1, 2], [8, 3]]
    assert evenly([5], 3, size=lambda item: item) == [[5], [], []] and evenly([], 1, size=lambda item: item) == [[]]
