"""Bounded concurrency for coroutines."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


async def map_concurrent(items: Iterable[Item], work: Callable[[Item], Awaitable[Result]], max_concurrent: int) -> AsyncIterator[Result]:
    """Map a coroutine over items, at most `max_concurrent` at a time; results come in order of finishing.

    Items are taken from the iterable only as they can be worked on, so a stream of any length needs little memory. The first
    exception ends all.
    """
    todo = iter(items)
    done: asyncio.Queue[tuple[Result] | Exception | None] = asyncio.Queue(maxsize=max_concurrent)

    async def worker() -> None:
        try:
            for item in todo:
                await done.put((await work(item),))
        except Exception as e:
            await done.put(e)
        else:
            await done.put(None)

    workers = [asyncio.ensure_future(worker()) for _ in range(max_concurrent)]
    try:
        busy = max_concurrent
        while busy:
            result = await done.get()
            if isinstance(result, tuple):
                yield result[0]
            elif result is None:
                busy -= 1
            else:
                raise result
    finally:
        for task in workers:
            task.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
