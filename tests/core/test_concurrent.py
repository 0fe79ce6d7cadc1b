"""A coroutine is mapped over a stream within a bound, and what fails ends all."""

import asyncio
from collections.abc import Iterator

import pytest

from gristmill.core.concurrent import map_concurrent


def test_no_more_are_under_way_or_taken_than_the_bound_allows() -> None:
    taken, under_way, most = 0, 0, 0

    def items() -> Iterator[int]:
        nonlocal taken
        while taken < 100:
            taken += 1
            yield taken

    async def work(item: int) -> int:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0)
        under_way -= 1
        return item

    async def run() -> list[int]:
        found = []
        async for item in map_concurrent(items(), work, 4):
            found.append(item)
            assert taken <= len(found) + 2 * 4, "the rest of the stream is not read yet"
        return found

    assert sorted(asyncio.run(run())) == list(range(1, 101)) and most == 4


def test_the_first_exception_ends_all() -> None:
    done = []

    async def work(item: int) -> int:
        if item == 3:
            raise ValueError("three")
        await asyncio.sleep(0.01 * item)
        done.append(item)
        return item

    async def run() -> None:
        async for _ in map_concurrent(range(1000), work, 4):
            pass

    with pytest.raises(ValueError, match="three"):
        asyncio.run(run())
    assert len(done) < 10
