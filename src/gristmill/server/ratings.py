"""Ratings of the reward model for requests that come one by one: those that wait are rated together."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor

from gristmill.data.chat import Conversation

RateFn = Callable[[list[Conversation]], list[dict[str, float]]]


class RatingQueue:
    """Queue of conversations that wait to be rated.

    Args:
        rate: the attributes of the last turn of conversations.
        executor: where it runs.
    """

    def __init__(self, rate: RateFn, executor: Executor) -> None:
        self._rate, self._executor = rate, executor
        self._task: asyncio.Task[None] | None = None
        self._waiting: list[tuple[Conversation, asyncio.Future[dict[str, float]]]] = []

    async def rate(self, conversation: Conversation) -> dict[str, float]:
        """Rate one conversation."""
        future: asyncio.Future[dict[str, float]] = asyncio.get_running_loop().create_future()
        self._waiting.append((conversation, future))
        if self._task is None or self._task.done():  # of its own: whoever waits may go
            self._task = asyncio.ensure_future(self._drain())
        return await future

    async def _drain(self) -> None:
        while self._waiting:
            batch, self._waiting = [one for one in self._waiting if not one[1].done()], []
            if batch:
                await self._rate_batch(batch)

    async def _rate_batch(self, batch: list[tuple[Conversation, asyncio.Future[dict[str, float]]]]) -> None:
        try:
            ratings = await asyncio.get_running_loop().run_in_executor(
                self._executor, self._rate, [conversation for conversation, _ in batch]
            )
        except Exception as e:
            if len(batch) > 1:  # one of them broke it: each by itself
                for one in batch:
                    await self._rate_batch([one])
            elif not batch[0][1].done():
                batch[0][1].set_exception(e)
            return
        for (_, future), rating in zip(batch, ratings, strict=True):
            if not future.done():
                future.set_result(rating)
