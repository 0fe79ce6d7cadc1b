"""OpenAI-compatible server: chat and text completions, streamed or whole, beside a reward model if there is one.

Sources of the protocol: OpenAI's API reference; for rewards, the API of Nemotron-4-340B-Reward.
"""

import asyncio
import contextlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from gristmill.core.errors import InputError
from gristmill.data.chat import Conversation
from gristmill.data.rows import make_id
from gristmill.engine.async_engine import AsyncEngine, TokenEvent
from gristmill.engine.engine import Engine
from gristmill.engine.sequence import RequestState
from gristmill.generation.api import Request, SamplingParams
from gristmill.server.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    CompletionRequestBase,
    RewardRequest,
    parse_body,
    parse_messages,
    parse_prompts,
)
from gristmill.server.responses import (
    ChatResponseBuilder,
    CompletionResponseBuilder,
    IncrementalDetokenizer,
    ResponseBuilder,
    envelope,
    num_output_tokens,
    usage_counts,
)

MAX_BODY_BYTES = 4 << 20
MAX_TOKEN_CHARS = 128  # as good as never more: a longer text is too long without counting
MAX_INLINE_WORK = 20_000  # characters of a text, or tokens with their likeliest, that would hold up everybody else
RETRY_SECONDS = 1
CLIENT_CLOSED_REQUEST = 499
STREAM = web.RequestKey("stream", web.StreamResponse)  # the answer that has begun
JSON = "application/json"
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
RateFn = Callable[[list[Conversation]], list[dict[str, float]]]


class _HttpError(Exception):
    """HTTP error: a request that gets this status and these words."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


@dataclass
class Limits:
    """Server limits: API keys, load and time.

    Attributes:
        api_keys: one of which a request must bear; none: everybody may ask.
        max_open_samples: that may be under way or wait; a request beyond them is told to come back.
        timeout: seconds that a request may take.
    """

    api_keys: Sequence[str] = ()
    max_open_samples: int = 4096
    timeout: float = 600.0


@dataclass(eq=False)
class _OpenRequest:
    """Open request: its end, and its token events if they are streamed."""

    state: RequestState
    ended: asyncio.Future[None]
    tokens: "asyncio.Queue[TokenEvent | None]" = field(default_factory=asyncio.Queue)


class _Metrics:
    """Prometheus metrics."""

    def __init__(self, server: "Server") -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("gristmill_requests", "Requests by path and status.", ["path", "status"], registry=self.registry)
        self.seconds = Histogram("gristmill_request_seconds", "Time to the end of an answer.", registry=self.registry)
        self.first = Histogram("gristmill_first_token_seconds", "Time to the first token of a streamed answer.", registry=self.registry)
        cores = lambda: [worker.core for worker in server.async_engine.workers]  # noqa: E731
        for name, about, value in (
            ("gristmill_open_samples", "Samples under way or waiting.", lambda: server.async_engine.num_open),
            (
                "gristmill_running",
                "Samples that have a slot.",
                lambda: sum(c.batch_state.num_slots - len(c.batch_state.free_slots) for c in cores()),
            ),
            ("gristmill_pages_in_use", "KV-cache blocks in use.", lambda: sum(c.block_manager.num_used_blocks for c in cores())),
            ("gristmill_pages", "KV-cache blocks.", lambda: sum(c.block_manager.num_blocks for c in cores())),
            ("gristmill_prompt_tokens", "Prompt tokens computed.", lambda: sum(c.prompt_tokens for c in cores())),
            ("gristmill_output_tokens", "Tokens sampled.", lambda: sum(c.output_tokens for c in cores())),
            (
                "gristmill_preemptions",
                "Samples preempted for want of KV-cache blocks.",
                lambda: sum(c.scheduler.num_preemptions for c in cores()),
            ),
        ):
            Gauge(name, about, registry=self.registry).set_function(value)


class Server:
    """HTTP server over an asynchronous engine.

    Args:
        rate: the attributes of the last turn of conversations, by the reward model `reward_name`.
    """

    def __init__(self, engine: Engine, limits: Limits | None = None, rate: RateFn | None = None, *, reward_name: str = "reward"):
        self.engine, self.limits = engine, limits or Limits()
        self.rate, self.reward_name = rate, reward_name
        self.context = engine.model.config.max_positions
        self.async_engine = AsyncEngine(engine, self._deliver)
        self.metrics = _Metrics(self)
        self.closing = False
        self._open: dict[RequestState, _OpenRequest] = {}
        self._number = 0
        self._executor = ThreadPoolExecutor(1)  # scores and ratings, one at a time
        self._rating_task: asyncio.Task[None] | None = None
        self._rating_queue: list[tuple[Conversation, asyncio.Future[dict[str, float]]]] = []

    def app(self) -> web.Application:
        """Application with its routes; the engine's threads start and stop with it."""
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[self._middleware])
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._show_metrics)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/completions", self._completions)
        app.router.add_post("/v1/rewards", self._rewards)

        async def start(app: web.Application) -> None:
            self._loop = asyncio.get_running_loop()
            self.async_engine.start()

        async def shut(app: web.Application) -> None:
            self.closing = True

        async def stop(app: web.Application) -> None:
            self.quiet = self.async_engine.stop()
            self._executor.shutdown(wait=False, cancel_futures=True)

        app.on_startup.append(start)
        app.on_shutdown.append(shut)
        app.on_cleanup.append(stop)
        return app

    # ---- around every request ----

    @web.middleware
    async def _middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        http, started = request, time.monotonic()
        try:
            reply = await self._handle_errors(http, handler)
        except asyncio.CancelledError:
            self.metrics.requests.labels(http.path if http.match_info.route.resource else "?", "gone").inc()
            raise
        known = http.match_info.route.resource is not None
        self.metrics.requests.labels(http.path if known else "?", str(reply.status)).inc()
        if known and http.method == "POST" and reply.status == 200:
            self.metrics.seconds.observe(time.monotonic() - started)
        return reply

    async def _handle_errors(self, http: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            if self.limits.api_keys and http.path != "/health":
                given = http.headers.get("Authorization", "").removeprefix("Bearer ").encode(errors="surrogateescape")
                if not any(hmac.compare_digest(given, key.encode()) for key in self.limits.api_keys):
                    return _error(401, "this server wants an API key: send `Authorization: Bearer KEY`")
            if http.method == "POST":
                if not self.async_engine.healthy:
                    return _error(503, "the engine is broken: start the server again")
                self._check_capacity(1)
            async with asyncio.timeout(self.limits.timeout):
                return await handler(http)
        except web.HTTPRequestEntityTooLarge:
            return _error(413, f"the body has more than {MAX_BODY_BYTES:,} bytes")
        except _HttpError as e:
            return await self._error_reply(http, e.status, str(e))
        except web.HTTPException as e:
            return _error(e.status, e.reason.lower())
        except InputError as e:
            return await self._error_reply(http, 400, str(e))
        except TimeoutError:
            return await self._error_reply(http, 504, f"no answer within {self.limits.timeout:g} s")
        except ConnectionError:  # whoever asked is not there any more, and nobody reads this
            return web.Response(status=CLIENT_CLOSED_REQUEST)
        except Exception as e:
            return await self._error_reply(http, 500, f"the engine failed ({type(e).__name__})")

    async def _error_reply(self, http: web.Request, status: int, message: str) -> web.StreamResponse:
        """Error response of its own, or the last event of a stream that has begun."""
        reply = http.get(STREAM)
        answer = _error(status, message)
        if reply is None:
            return answer
        with contextlib.suppress(ConnectionError):
            await reply.write(b"data: " + (answer.body if isinstance(answer.body, bytes) else b"{}") + b"\n\n")
            await reply.write_eof()
        return reply

    def _check_capacity(self, samples: int) -> None:
        if self.async_engine.num_open + samples > self.limits.max_open_samples:
            raise _HttpError(429, "too many requests are waiting, or this one is too large: come back later")

    # ---- routes ----

    async def _health(self, _: web.Request) -> web.Response:
        good = self.async_engine.healthy and not self.closing
        return web.json_response({"status": "ok" if good else "closing" if self.closing else "broken"}, status=200 if good else 503)

    async def _show_metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=generate_latest(self.metrics.registry), content_type="text/plain", charset="utf-8")

    async def _models(self, _: web.Request) -> web.Response:
        names = [self.engine.name, *([self.reward_name] if self.rate else [])]
        models = [{"id": name, "object": "model", "created": 0, "owned_by": "gristmill"} for name in names]
        return web.json_response({"object": "list", "data": models})

    async def _chat(self, http: web.Request) -> web.StreamResponse:
        body = await parse_body(http, ChatCompletionRequest)
        conversation = parse_messages(body.messages)
        if self.rate is not None and body.model == self.reward_name:
            return await self._reward_chat(body, conversation)
        self._check_model(body.model, self.engine.name)
        if body.top_logprobs and not body.logprobs:
            raise InputError("top_logprobs needs logprobs: true")
        if conversation[-1].role != "user":
            raise InputError("the last message must be the user's")
        body.max_tokens = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
        prompt_ids = await self._encode(
            sum(len(m.content) for m in conversation), self.engine.chat_format.render_prompt, conversation, self.engine.tokenizer
        )
        sampling = body.to_sampling_params(256, self.context, (body.top_logprobs or 0) if body.logprobs else 0)
        request = self._request("chatcmpl", body, conversation, prompt_ids, sampling=sampling, content=body.messages)
        builder = ChatResponseBuilder(self.engine, bool(body.logprobs))
        return await self._respond(http, body, [request], builder=builder)

    async def _completions(self, http: web.Request) -> web.StreamResponse:
        body = await parse_body(http, CompletionRequest)
        self._check_model(body.model, self.engine.name)
        texts = parse_prompts(body.prompt)
        self._check_capacity(len(texts) * (1 if body.n is None else body.n))
        prompts = [await self._tokenize(one) for one in texts]
        wanted = 16 if body.max_tokens is None else body.max_tokens
        scored = None
        if body.echo and body.logprobs is not None:
            scored = [await self._score(ids, body.logprobs) for ids in prompts]
        if body.echo and wanted == 0:
            sampling, requests = body.model_copy(update={"max_tokens": 1}).to_sampling_params(16, self.context, 0), []
        else:
            sampling = body.to_sampling_params(16, self.context, body.logprobs or 0)
            requests = [self._request("cmpl", body, (), ids, sampling=sampling, content=[body.prompt, i]) for i, ids in enumerate(prompts)]
        builder = CompletionResponseBuilder(self.engine, body, prompts, scored=scored)
        if not requests and not body.stream:
            return web.json_response(builder.response([], sampling.n))
        return await self._respond(http, body, requests, builder=builder)

    async def _rewards(self, http: web.Request) -> web.StreamResponse:
        body = await parse_body(http, RewardRequest)
        if self.rate is None:
            raise _HttpError(404, "this server has no reward model: start it with --reward")
        if body.model:
            self._check_model(body.model, self.reward_name)
        rating = await self._rating(parse_messages(body.messages))
        return web.json_response({"object": "reward", "model": self.reward_name, "rewards": rating})

    async def _reward_chat(self, body: ChatCompletionRequest, conversation: Conversation) -> web.StreamResponse:
        if body.stream or (body.n or 1) > 1:
            raise InputError("a reward model gives one rating, whole: leave stream and n out")
        rating = {name: value for name, value in (await self._rating(conversation)).items() if name != "score"}
        text = ",".join(f"{name}:{value}" for name, value in rating.items())
        entries: list[dict[str, Any]] = [
            {"token": name, "logprob": value, "bytes": None, "top_logprobs": []} for name, value in rating.items()
        ]
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "logprobs": {"content": entries}, "finish_reason": "length"}
        return web.json_response(
            envelope("chat.completion", f"reward-{make_id(text)}", self.reward_name, choices=[choice], usage=usage_counts(0, 1))
        )

    # ---- work ----

    def _check_model(self, name: str | None, wanted: str) -> None:
        if name != wanted:
            also = f", and the reward model {self.reward_name!r}" if self.rate else ""
            raise _HttpError(404, f"the model {name or ''!r} does not exist here; this server has {self.engine.name!r}{also}")

    def _request(
        self,
        kind: str,
        body: CompletionRequestBase,
        conversation: Conversation,
        prompt_ids: list[int],
        *,
        sampling: SamplingParams,
        content: Any,
    ) -> Request:
        self._number += 1
        # the engine samples by id and seed: where a seed is given, equal requests shall have equal answers
        name = f"{kind}-{self._number}" if body.seed is None else f"{kind}-{make_id(content, body.seed)}"
        return Request(name, conversation, sampling, body.seed or 0, prompt_ids=tuple(prompt_ids))

    async def _encode(self, characters: int, encode: Callable[..., list[int]], *args: Any) -> list[int]:
        if characters > MAX_TOKEN_CHARS * self.context:
            raise InputError(f"the text has {characters:,} characters and the model's context is {self.context} tokens: shorten it")
        return encode(*args) if characters < MAX_INLINE_WORK else await asyncio.to_thread(encode, *args)

    async def _tokenize(self, prompt: str | list[int]) -> list[int]:
        ids = prompt
        if isinstance(ids, str):
            ids = await self._encode(len(ids), self.engine.tokenizer.encode, ids)
        if not ids:
            raise InputError("a prompt is empty")
        if wrong := [token for token in ids if not 0 <= token < self.engine.model.config.vocab_size]:
            raise InputError(f"the model has no token {wrong[0]}")
        return ids

    async def _score(self, ids: list[int], top: int) -> tuple[list[float], list[list[tuple[int, float]]]]:
        return await asyncio.get_running_loop().run_in_executor(self._executor, self.engine.prompt_logprobs, ids, top)

    async def _rating(self, conversation: Conversation) -> dict[str, float]:
        if conversation[-1].role != "assistant":
            raise InputError("the last message must be the assistant's, which is rated")
        future: asyncio.Future[dict[str, float]] = asyncio.get_running_loop().create_future()
        self._rating_queue.append((conversation, future))
        if self._rating_task is None or self._rating_task.done():  # of its own: whoever waits may go
            self._rating_task = asyncio.ensure_future(self._drain_ratings())
        return await future

    async def _drain_ratings(self) -> None:
        while self._rating_queue:
            batch, self._rating_queue = [one for one in self._rating_queue if not one[1].done()], []
            if batch:
                await self._rate_batch(batch)

    async def _rate_batch(self, batch: list[tuple[Conversation, asyncio.Future[dict[str, float]]]]) -> None:
        assert self.rate is not None
        try:
            ratings = await asyncio.get_running_loop().run_in_executor(
                self._executor, self.rate, [conversation for conversation, _ in batch]
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

    def _deliver(self, events: list[TokenEvent]) -> None:
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

    async def _respond(
        self, http: web.Request, body: CompletionRequestBase, requests: list[Request], *, builder: ResponseBuilder
    ) -> web.StreamResponse:
        open_requests = []
        try:
            for request in requests:
                state = self.engine.prepare(request)
                if body.stream:
                    state.listener = lambda *_: None
                open_requests.append(_OpenRequest(state, asyncio.get_running_loop().create_future()))
            self._check_capacity(sum(len(one.state.completions) for one in open_requests))
            for one in open_requests:
                self._open[one.state] = one
                self.async_engine.submit(one.state)
            if body.stream:
                return await self._stream(http, body, open_requests, builder=builder)
            await asyncio.gather(*(one.ended for one in open_requests))
            states = [one.state for one in open_requests]
            if num_output_tokens(states) * (1 + states[0].request.sampling.top_logprobs) > MAX_INLINE_WORK:
                return web.Response(
                    text=await asyncio.to_thread(lambda: json.dumps(builder.response(states, body.n or 1))), content_type=JSON
                )
            return web.json_response(builder.response(states, body.n or 1))
        finally:  # the client has gone, or time is up: nobody wants the rest
            for one in open_requests:
                if self._open.pop(one.state, None) is not None:
                    self.async_engine.cancel(one.state)
                if one.ended.done() and not one.ended.cancelled():
                    one.ended.exception()  # heard, even where another request's came first

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
                self.metrics.first.observe(time.monotonic() - started)
            await reply.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
        assert reply is not None
        if (body.stream_options or {}).get("include_usage"):
            states = [one.state for one in open_requests]
            usage = usage_counts(sum(len(state.prompt_ids) for state in states), num_output_tokens(states))
            await reply.write(b"data: " + json.dumps(builder.chunk([]) | {"usage": usage}).encode() + b"\n\n")
        await reply.write(b"data: [DONE]\n\n")
        await reply.write_eof()
        return reply

    async def _chunks(self, open_requests: list[_OpenRequest], builder: ResponseBuilder) -> AsyncIterator[dict[str, Any]]:
        """Stream chunks of all samples as they come: the requests' one after another, the samples' of one together."""
        for choice in builder.prompt_choices():
            yield builder.chunk([choice])
        for place, one in enumerate(open_requests):
            num_samples = len(one.state.completions)
            detokenizers = [IncrementalDetokenizer(self.engine, one.state.request.sampling.stop) for _ in range(num_samples)]
            while (event := await one.tokens.get()) is not None:
                index = place * num_samples + event.sample
                if not event.last:
                    text = detokenizers[event.sample].add(event.token)
                    yield builder.chunk([builder.choice_delta(index, text, event, finish=None)])
                else:
                    completion = one.state.completions[event.sample]
                    assert completion is not None
                    text = detokenizers[event.sample].finish(completion.text)
                    yield builder.chunk([builder.choice_delta(index, text, event, finish=completion.finish)])
            await one.ended  # raises what went wrong


def _error(status: int, message: str) -> web.Response:
    headers = {"Retry-After": str(RETRY_SECONDS)} if status == 429 else None
    kind = "invalid_request_error" if status < 500 else "server_error"
    return web.json_response({"error": {"message": message, "type": kind, "code": status}}, status=status, headers=headers)
