"""A model in this process as the source of a dataset: its engine takes calls as they come, like an endpoint."""

import asyncio
from typing import Any

from gristmill.core.errors import InputError
from gristmill.engine.async_engine import Event, Live
from gristmill.engine.engine import Engine
from gristmill.engine.sequence import Job
from gristmill.generation.api import Completion, Request
from gristmill.generation.endpoint import RowFailed


class AsyncEngineClient:
    """An engine as a `synth.ask.Client`. Its threads work while it is entered."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.concurrency = engine, engine.max_batch
        self._turns: dict[Job, asyncio.Future[list[Completion]]] = {}

    def model_of(self, request_id: str) -> str:
        return self.engine.name

    async def __aenter__(self) -> "AsyncEngineClient":
        self._loop = asyncio.get_running_loop()
        self._live = Live(self.engine, lambda events: self._loop.call_soon_threadsafe(self._settle, events))
        self._live.start()
        return self

    async def __aexit__(self, *_: Any) -> None:
        await asyncio.to_thread(self._live.stop)

    async def complete(self, request: Request, model: str = "") -> list[Completion]:
        """The completions of one request; `RowFailed` where the model has no room for it."""
        try:
            job = self.engine.job(request)
        except InputError as e:
            raise RowFailed(str(e), 1) from e
        turn = self._turns[job] = self._loop.create_future()
        self._live.submit(job)
        try:
            return await turn
        finally:
            if self._turns.pop(job, None) is not None:  # whoever asked has gone
                self._live.cancel(job)

    def _settle(self, events: list[Event]) -> None:
        for event in events:
            turn = self._turns.pop(event.job, None)
            if turn is None or turn.done():
                continue
            if isinstance(event.error, InputError):
                turn.set_exception(RowFailed(str(event.error), 1))
            elif event.error is not None:
                turn.set_exception(event.error)
            else:
                turn.set_result([c for c in event.job.completions if c is not None])
