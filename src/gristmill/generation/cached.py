"""Cached and batching clients: every completion goes through the journal, so that nothing is generated twice."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import replace
from typing import Any, Protocol

from gristmill.core.concurrent import map_concurrent
from gristmill.core.echo import echo
from gristmill.core.errors import InputError
from gristmill.generation.api import Completion, Generator, Request
from gristmill.generation.endpoint import WORKERS_PER_SLOT, RowFailed
from gristmill.runs.journal import DiskFull, Journal

DISK_PATIENCE = 600.0  # seconds that a full disk may stay full before the run ends
DISK_PAUSE = 1.0


class Client(Protocol):
    """Protocol of clients that complete single requests: an `Endpoint`, or `BatchingClient` over any `Generator`."""

    @property
    def concurrency(self) -> int:
        """Requests that it can have under way."""
        ...

    def model_of(self, request_id: str) -> str:
        """The model that answers a row."""
        ...

    async def complete(self, request: Request, model: str = "") -> list[Completion]:
        """The `n` completions of one request, by the model of its row or by another; `RowFailed` where there are none."""
        ...


class BatchingClient:
    """Dynamic batching over a `Generator`: what waits when it is free goes through it together."""

    def __init__(self, generator: Generator, concurrency: int = 256):
        self.generator, self.concurrency = generator, concurrency
        self._waiting: list[tuple[Request, asyncio.Future[list[Completion]]]] = []
        self._pump: asyncio.Task[None] | None = None

    def model_of(self, request_id: str) -> str:
        return self.generator.name

    async def complete(self, request: Request, model: str = "") -> list[Completion]:
        turn: asyncio.Future[list[Completion]] = asyncio.get_running_loop().create_future()
        self._waiting.append((replace(request), turn))  # its own object, for one that waits twice
        if self._pump is None or self._pump.done():
            self._pump = asyncio.ensure_future(self._run())
        return await turn

    async def _run(self) -> None:
        while self._waiting:
            await asyncio.sleep(0)  # let everyone who can ask do so first
            batch, self._waiting = self._waiting, []
            turns = {id(request): turn for request, turn in batch}
            try:
                for request, outs in self.generator.generate([request for request, _ in batch]):
                    if not turns[id(request)].done():  # whoever asked may have gone
                        turns[id(request)].set_result(outs)
                    await asyncio.sleep(0)
            except InputError:  # one of them broke the batch: each by itself, so that only that one fails
                for request, turn in batch:
                    if not turn.done():
                        self._alone(request, turn)
            except Exception as e:  # whoever waits must hear of it
                for turn in turns.values():
                    if not turn.done():
                        turn.set_exception(e)

    def _alone(self, request: Request, turn: asyncio.Future[list[Completion]]) -> None:
        try:
            ((_, outs),) = self.generator.generate([request])
            turn.set_result(outs)
        except InputError as e:
            turn.set_exception(RowFailed(str(e), 1, 0))


class CachedClient:
    """Read-through cache of completions: from the journal, or from the source and into the journal.

    Args:
        retry_failed: ask again what failed for good in an earlier run.
        disk_patience: seconds that a full disk is waited for.

    Attributes:
        asked, found, failed: rows answered by the source, found in the journal, and without an answer, so far.
        left_out: rows that were answered without a field that the endpoint refused, by field.
    """

    def __init__(self, source: Client, journal: Journal, *, retry_failed: bool = False, disk_patience: float = DISK_PATIENCE):
        self.source, self.journal, self.retry_failed, self.disk_patience = source, journal, retry_failed, disk_patience
        self.asked = self.found = self.failed = 0
        self.left_out: Counter[str] = Counter()
        self._under_way: dict[str, asyncio.Event] = {}
        self._space = asyncio.Event()
        self._space.set()

    @property
    def calls(self) -> int:
        """Rows that have come to an end so far, however."""
        return self.asked + self.found + self.failed

    async def complete(self, request: Request, model: str = "", *, note: Mapping[str, Any] | None = None) -> list[Completion]:
        """The completions of a request, by the model of its row or by another. The note goes into the journal with them.

        Raises:
            RowFailed: there are none, now or in an earlier run.
        """
        while under_way := self._under_way.get(request.id):  # somebody is asking the very same just now
            await under_way.wait()
        if request.id in self.journal:
            record = self.journal[request.id]
            outs = completions_of(record)
            if outs:
                self.found += 1
                self.left_out.update(outs[0].left_out)
                return outs
            if not self.retry_failed and isinstance(record.get("error"), str):
                self.failed += 1
                raise RowFailed(record["error"], record.get("attempts", 1), record.get("status", 0))
        self._under_way[request.id] = asyncio.Event()
        try:
            return await self._complete(request, note or {}, model)
        finally:
            self._under_way.pop(request.id).set()

    async def _complete(self, request: Request, note: Mapping[str, Any], model: str) -> list[Completion]:
        await self._space.wait()
        head = {"id": request.id, "model": model or self.source.model_of(request.id), **note}
        try:
            outs = await self.source.complete(request, model)
        except RowFailed as e:
            self.failed += 1
            await self._write({**head, "error": str(e), "attempts": e.attempts, "status": e.status, "prompt": request.messages[-1].content})
            raise
        rows = [[c.text, c.num_tokens, round(sum(c.logprobs), 4) if c.logprobs else None, c.finish] for c in outs]
        left_out = sorted({name for c in outs for name in c.left_out})
        await self._write({**head, "out": rows, **({"left_out": left_out} if left_out else {})})
        self.asked += 1
        self.left_out.update(left_out)
        return completions_of({"out": rows, "left_out": left_out})  # what a later start would find, to the digit

    async def _write(self, record: dict[str, Any]) -> None:
        """Append a record. The answer is paid for, so a full disk is waited for, and meanwhile nothing new is asked."""
        since = time.monotonic()
        while True:
            try:
                self.journal.append(record)
                return self._space.set()
            except DiskFull as e:
                if time.monotonic() - since >= self.disk_patience:
                    raise
                if self._space.is_set():
                    self._space.clear()
                    echo(f"{e} Waiting up to {self.disk_patience:.0f} s for space.", err=True)
                await asyncio.sleep(DISK_PAUSE)

    async def stream(self, requests: Iterable[Request]) -> AsyncIterator[tuple[Request, list[Completion] | RowFailed]]:
        """Every request with its completions, or why there are none, in order of finishing.

        Requests are taken from the iterable only as they can be worked on, so a stream of any length needs little memory.
        """

        async def answer(request: Request) -> tuple[Request, list[Completion] | RowFailed]:
            try:
                return request, await self.complete(request)
            except RowFailed as e:
                return request, e

        async for item in map_concurrent(requests, answer, WORKERS_PER_SLOT * self.source.concurrency):
            yield item


def completions_of(record: dict[str, Any]) -> list[Completion]:
    """The completions in a journal's record, each with its summed log-probability if there was one; none in any other record."""
    try:
        left_out = tuple(record.get("left_out", ()))
        return [
            Completion(text, num_tokens, () if logprob is None else (logprob,), finish, left_out=left_out)
            for text, num_tokens, logprob, finish in record.get("out") or ()
            if isinstance(text, str)
        ]
    except (TypeError, ValueError):
        return []
