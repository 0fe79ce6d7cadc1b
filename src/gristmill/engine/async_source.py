"""In-process client: a model's engine takes a dataset's calls as they come, like an endpoint."""

import asyncio
from typing import Any

from gristmill.core.errors import InputError
from gristmill.engine.async_engine import AsyncEngine, TokenEvent
from gristmill.engine.engine import Engine
from gristmill.engine.sequence import RequestState
from gristmill.generation.api import Completion, Request
from gristmill.generation.endpoint import RowFailed


class AsyncEngineClient:
    """Asynchronous engine as a `generation.cached.Client`. Its threads work while it is entered."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.concurrency = engine, engine.max_batch
        self._futures: dict[RequestState, asyncio.Future[list[Completion]]] = {}

    def model_of(self, request_id: str) -> str:
        return self.engine.name

    async def __aenter__(self) -> "AsyncEngineClient":
        self._loop = asyncio.get_running_loop()
        self._async_engine = AsyncEngine(self.engine, lambda events: self._loop.call_soon_threadsafe(self._resolve, events))
        self._async_engine.start()
        return self

    async def __aexit__(self, *_: Any) -> None:
        await asyncio.to_thread(self._async_engine.stop)

    async def complete(self, request: Request, model: str = "") -> list[Completion]:
        """The completions of one request; `RowFailed` where the model has no room for it."""
        try:
            state = self.engine.prepare(request)
        except InputError as e:
            raise RowFailed(str(e), 1) from e
        future = self._futures[state] = self._loop.create_future()
        self._async_engine.submit(state)
        try:
            return await future
        finally:
            if self._futures.pop(state, None) is not None:  # the caller has gone
                self._async_engine.cancel(state)

    def _resolve(self, events: list[TokenEvent]) -> None:
        for event in events:
            future = self._futures.pop(event.state, None)
            if future is None or future.done():
                continue
            if isinstance(event.error, InputError):
                future.set_exception(RowFailed(str(event.error), 1))
            elif event.error is not None:
                future.set_exception(event.error)
            else:
                future.set_result([c for c in event.state.completions if c is not None])
