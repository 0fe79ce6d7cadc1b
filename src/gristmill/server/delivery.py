"""Delivery of answers: requests go to the engine, and what it makes of them to whoever asked, whole or as a stream of events."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from aiohttp import web

from gristmill.engine.async_engine import AsyncEngine, TokenEvent
from gristmill.engine.engine import Engine
from gristmill.engine.sequence import RequestState
from gristmill.generation.api import Request
from gristmill.server.admission import STREAM, Admission
from gristmill.server.protocol import CompletionRequestBase
from gristmill.server.responses import IncrementalDetokenizer, ResponseBuilder, dump_json, num_output_tokens, text_keeping

MAX_INLINE_WORK = 20_000  # bytes of a body, or tokens with their likeliest, that would hold up everybody else
JSON = "application/json"
Result = TypeVar("Result")


async def in_thread(executor: Executor, work: Callable[..., Result], *args: Any) -> Result:
    """What work makes in a thread, while everybody else is served."""
    return await asyncio.get_running_loop().run_in_executor(executor, work, *args)


@dataclass(eq=False)
class _OpenRequest:
    """Open request: its end, and its token events if they are streamed."""

    state: RequestState
    ended: asyncio.Future[None]
    tokens: "asyncio.Queue[TokenEvent | None]" = field(default_factory=asyncio.Queue)


class Delivery:
    """Requests under way in an asynchronous engine.

    Args:
        async_engine: calls `deliver` with its events; the engine is its.
        helpers: do what takes long.
    """

    def __init__(self, engine: Engine, async_engine: AsyncEngine, admission: Admission, *, helpers: Executor) -> None:
        self.engine, self.async_engine, self.admission, self._helpers = engine, async_engine, admission, helpers
        self._open: dict[RequestState, _OpenRequest] = {}

    def start(self) -> None:
        """Start the engine's threads, whose events go to the running loop."""
        self._loop = asyncio.get_running_loop()
        self.async_engine.start()

    async def run(self, work: Callable[..., Result], *args: Any, long: bool) -> Result:
        """Do something here, or, where it takes long, in a thread."""
        return await in_thread(self._helpers, work, *args) if long else work(*args)

    def deliver(self, events: list[TokenEvent]) -> None:
        """Hand events from the engine's threads to the event loop."""
        self._loop.call_soon_threadsafe(self._dispatch, events)

    def _dispatch(self, events: list[TokenEvent]) -> None:
        for event in events:
            one = self._open.get(event.state)
            if one is None:
                continue
            if event.sample >= 0:
                one.tokens.put_nowait(event)
            elif not one.ended.done():
                del self._open[event.state]
                one.tokens.put_nowait(None)
                if event.error is None:
                    one.ended.set_result(None)
                else:
                    one.ended.set_exception(event.error)

    async def respond(
        self, http: web.Request, body: CompletionRequestBase, requests: list[Request], *, builder: ResponseBuilder
    ) -> web.StreamResponse:
        """Answer a body by its requests; they are cancelled where nobody waits for them any more."""
        open_requests = []
        try:
            long = sum(len(request.prompt_ids) for request in requests) + 100 * len(requests) > MAX_INLINE_WORK
            for state in await self.run(lambda: [self.engine.prepare(request) for request in requests], long=long):
                if body.stream:
                    state.listener = lambda *_: None
                open_requests.append(_OpenRequest(state, asyncio.get_running_loop().create_future()))
            self.admission.check_capacity(sum(len(one.state.completions) for one in open_requests))
            for one in open_requests:
                self._open[one.state] = one
                self.async_engine.submit(one.state)
            if body.stream:
                return await self._stream(http, body, open_requests, builder=builder)
            await asyncio.gather(*(one.ended for one in open_requests))
            states = [one.state for one in open_requests]
            told = num_output_tokens(states) + (sum(len(state.prompt_ids) for state in states) if getattr(body, "echo", None) else 0)
            size = told * (1 + states[0].request.sampling.top_logprobs) + 100 * len(states)
            return await self.whole(builder, states, body.n or 1, long=size > MAX_INLINE_WORK)
        finally:  # the client has gone, or time is up: nobody wants the rest
            for one in open_requests:
                if self._open.pop(one.state, None) is not None:
                    self.async_engine.cancel(one.state)
                if one.ended.done() and not one.ended.cancelled():
                    one.ended.exception()  # heard, even where another request's came first

    async def whole(self, builder: ResponseBuilder, states: list[RequestState], n: int, *, long: bool) -> web.Response:
        """A whole response, written in a thread where it is long."""
        write = dump_json if long else json.dumps
        return web.Response(text=await self.run(lambda: write(builder.response(states, n)), long=long), content_type=JSON)

    async def _stream(
        self, http: web.Request, body: CompletionRequestBase, open_requests: list[_OpenRequest], *, builder: ResponseBuilder
    ) -> web.StreamResponse:
        started = time.monotonic()
        reply: web.StreamResponse | None = None
        async for chunk in self._chunks(open_requests, builder):
            if reply is None:  # an error before the first token has a status of its own
                reply = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
                await reply.prepare(http)
                http[STREAM] = reply
                self.admission.metrics.first.observe(time.monotonic() - started)
            await reply.write(builder.encode(chunk))
        assert reply is not None
        last = builder.last_chunks([one.state for one in open_requests], body.include_usage)
        await reply.write(b"".join(map(builder.encode, last)) + builder.done)
        await reply.write_eof()
        return reply

    async def _chunks(self, open_requests: list[_OpenRequest], builder: ResponseBuilder) -> AsyncIterator[dict[str, Any]]:
        """Stream chunks of all samples as they come: the requests' one after another, the samples' of one together."""
        for choice in await self.run(builder.prompt_choices, long=True) if builder.echoes else ():
            yield builder.chunk([choice])
        for place, one in enumerate(open_requests):
            num_samples = len(one.state.completions)
            stop, continued = one.state.request.sampling.stop, one.state.request.continues_text
            detokenizers = [IncrementalDetokenizer(self.engine, stop, continued=continued, keep=builder.keep) for _ in range(num_samples)]
            while (event := await one.tokens.get()) is not None:
                index = place * num_samples + event.sample
                finish = None
                if not event.last:
                    text = detokenizers[event.sample].add(event.token)
                else:
                    completion = one.state.completions[event.sample]
                    assert completion is not None
                    text = detokenizers[event.sample].finish(text_keeping(self.engine, one.state, completion, builder.keep))
                    finish = completion.finish
                for chunk in builder.token_chunks(index, text, event, finish=finish):
                    yield chunk
            await one.ended  # raises what went wrong
