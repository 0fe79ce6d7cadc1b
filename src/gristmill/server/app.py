"""A model behind the OpenAI protocol: chat and text completions, streamed or whole, beside a reward model if there is one.

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
from gristmill.engine.async_engine import Event, Live
from gristmill.engine.engine import Engine
from gristmill.engine.sequence import Job
from gristmill.generation.api import Request, SamplingParams
from gristmill.server.protocol import Body, ChatBody, RewardBody, TextBody, prompts_of, read, talk_of
from gristmill.server.responses import ChatShape, GrowingText, Shape, TextShape, drawn, envelope, usage_of

LARGEST_BODY = 4 << 20  # bytes
LONGEST_TOKEN = 128  # characters, as good as never more: a longer text is too long without counting
IN_A_THREAD = 20_000  # characters of a text, or tokens with their likeliest, that would hold up everybody else
RETRY_SECONDS = 1
GONE = 499
STREAM = web.RequestKey("stream", web.StreamResponse)  # the answer that has begun
JSON = "application/json"
Rate = Callable[[list[Conversation]], list[dict[str, float]]]


class _Refused(Exception):
    """A request that gets this status and these words."""

    def __init__(self, status: int, words: str):
        super().__init__(words)
        self.status = status


@dataclass
class Limits:
    """What the server takes on.

    Attributes:
        keys: one of which a request must bear; none: everybody may ask.
        most_open: samples that may be under way or wait; a request beyond them is told to come back.
        seconds: that a request may take.
    """

    keys: Sequence[str] = ()
    most_open: int = 4096
    seconds: float = 600.0


@dataclass(eq=False)
class _Open:
    """A request under way: its end, and its tokens as they come if they are wanted one by one."""

    job: Job
    ended: asyncio.Future[None]
    tokens: "asyncio.Queue[Event | None]" = field(default_factory=asyncio.Queue)


class _Metrics:
    def __init__(self, server: "Server") -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("gristmill_requests", "Requests by path and status.", ["path", "status"], registry=self.registry)
        self.seconds = Histogram("gristmill_request_seconds", "Time to the end of an answer.", registry=self.registry)
        self.first = Histogram("gristmill_first_token_seconds", "Time to the first token of a streamed answer.", registry=self.registry)
        cores = lambda: [worker.core for worker in server.live.workers]  # noqa: E731
        for name, about, value in (
            ("gristmill_open_samples", "Samples under way or waiting.", lambda: sum(w.load for w in server.live.workers)),
            ("gristmill_running", "Samples that have a slot.", lambda: sum(c.slots.count - len(c.slots.free) for c in cores())),
            ("gristmill_pages_in_use", "Pages of the cache that somebody reads.", lambda: sum(c.pages.in_use for c in cores())),
            ("gristmill_pages", "Pages of the cache.", lambda: sum(c.pages.count for c in cores())),
            ("gristmill_prompt_tokens", "Prompt tokens computed.", lambda: sum(c.prompt_tokens for c in cores())),
            ("gristmill_output_tokens", "Tokens drawn.", lambda: sum(c.output_tokens for c in cores())),
            ("gristmill_preemptions", "Samples sent back for want of pages.", lambda: sum(c.scheduler.preemptions for c in cores())),
        ):
            Gauge(name, about, registry=self.registry).set_function(value)


class Server:
    """Answers requests with an engine that is always at work.

    Args:
        rate: the attributes of the last turn of conversations, by the reward model `reward_name`.
    """

    def __init__(self, engine: Engine, limits: Limits | None = None, rate: Rate | None = None, reward_name: str = "reward"):
        self.engine, self.limits = engine, limits or Limits()
        self.rate, self.reward_name = rate, reward_name
        self.context = engine.model.config.max_positions
        self.live = Live(engine, self._deliver)
        self.metrics = _Metrics(self)
        self.closing = False
        self._open: dict[Job, _Open] = {}
        self._number = 0
        self._aside = ThreadPoolExecutor(1)  # scores and ratings, one at a time
        self._rating_now: asyncio.Task[None] | None = None
        self._unrated: list[tuple[Conversation, asyncio.Future[dict[str, float]]]] = []

    def app(self) -> web.Application:
        """The routes; the engine's threads start and stop with them."""
        app = web.Application(client_max_size=LARGEST_BODY, middlewares=[self._around])
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._show_metrics)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/completions", self._text)
        app.router.add_post("/v1/rewards", self._rewards)

        async def start(app: web.Application) -> None:
            self._loop = asyncio.get_running_loop()
            self.live.start()

        async def shut(app: web.Application) -> None:
            self.closing = True

        async def stop(app: web.Application) -> None:
            self.quiet = self.live.stop()
            self._aside.shutdown(wait=False, cancel_futures=True)

        app.on_startup.append(start)
        app.on_shutdown.append(shut)
        app.on_cleanup.append(stop)
        return app

    # ---- around every request ----

    @web.middleware
    async def _around(self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> web.StreamResponse:
        http, started = request, time.monotonic()
        try:
            reply = await self._guarded(http, handler)
        except asyncio.CancelledError:
            self.metrics.requests.labels(http.path if http.match_info.route.resource else "?", "gone").inc()
            raise
        known = http.match_info.route.resource is not None
        self.metrics.requests.labels(http.path if known else "?", str(reply.status)).inc()
        if known and http.method == "POST" and reply.status == 200:
            self.metrics.seconds.observe(time.monotonic() - started)
        return reply

    async def _guarded(self, http: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> web.StreamResponse:
        try:
            if self.limits.keys and http.path != "/health":
                given = http.headers.get("Authorization", "").removeprefix("Bearer ").encode(errors="surrogateescape")
                if not any(hmac.compare_digest(given, key.encode()) for key in self.limits.keys):
                    return _error(401, "this server wants an API key: send `Authorization: Bearer KEY`")
            if http.method == "POST":
                if not self.live.healthy:
                    return _error(503, "the engine is broken: start the server again")
                self._check_room(1)
            async with asyncio.timeout(self.limits.seconds):
                return await handler(http)
        except web.HTTPRequestEntityTooLarge:
            return _error(413, f"the body has more than {LARGEST_BODY:,} bytes")
        except _Refused as e:
            return await self._told(http, e.status, str(e))
        except web.HTTPException as e:
            return _error(e.status, e.reason.lower())
        except InputError as e:
            return await self._told(http, 400, str(e))
        except TimeoutError:
            return await self._told(http, 504, f"no answer within {self.limits.seconds:g} s")
        except ConnectionError:  # whoever asked is not there any more, and nobody reads this
            return web.Response(status=GONE)
        except Exception as e:
            return await self._told(http, 500, f"the engine failed ({type(e).__name__})")

    async def _told(self, http: web.Request, status: int, words: str) -> web.StreamResponse:
        """An error as an answer of its own, or as the last event of a stream that has begun."""
        reply = http.get(STREAM)
        answer = _error(status, words)
        if reply is None:
            return answer
        with contextlib.suppress(ConnectionError):
            await reply.write(b"data: " + (answer.body if isinstance(answer.body, bytes) else b"{}") + b"\n\n")
            await reply.write_eof()
        return reply

    def _check_room(self, samples: int) -> None:
        if sum(worker.load for worker in self.live.workers) + samples > self.limits.most_open:
            raise _Refused(429, "too many requests are waiting, or this one is too large: come back later")

    # ---- routes ----

    async def _health(self, _: web.Request) -> web.Response:
        good = self.live.healthy and not self.closing
        return web.json_response({"status": "ok" if good else "closing" if self.closing else "broken"}, status=200 if good else 503)

    async def _show_metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=generate_latest(self.metrics.registry), content_type="text/plain", charset="utf-8")

    async def _models(self, _: web.Request) -> web.Response:
        names = [self.engine.name, *([self.reward_name] if self.rate else [])]
        models = [{"id": name, "object": "model", "created": 0, "owned_by": "gristmill"} for name in names]
        return web.json_response({"object": "list", "data": models})

    async def _chat(self, http: web.Request) -> web.StreamResponse:
        body = await read(http, ChatBody)
        talk = talk_of(body.messages)
        if self.rate is not None and body.model == self.reward_name:
            return await self._rated_chat(body, talk)
        self._check_model(body.model, self.engine.name)
        if body.top_logprobs and not body.logprobs:
            raise InputError("top_logprobs needs logprobs: true")
        if talk[-1].role != "user":
            raise InputError("the last message must be the user's")
        body.max_tokens = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
        prompt = await self._encoded(sum(len(m.content) for m in talk), self.engine.chat_format.render_prompt, talk, self.engine.tokenizer)
        sampling = body.sampling(256, self.context, (body.top_logprobs or 0) if body.logprobs else 0)
        request = self._request("chatcmpl", body, talk, sampling, body.messages)
        shape = ChatShape(self.engine, bool(body.logprobs))
        return await self._answer(http, body, [(request, prompt)], shape)

    async def _text(self, http: web.Request) -> web.StreamResponse:
        body = await read(http, TextBody)
        self._check_model(body.model, self.engine.name)
        texts = prompts_of(body.prompt)
        self._check_room(len(texts) * (1 if body.n is None else body.n))
        prompts = [await self._ids(one) for one in texts]
        wanted = 16 if body.max_tokens is None else body.max_tokens
        scored = None
        if body.echo and body.logprobs is not None:
            scored = [await self._score(ids, body.logprobs) for ids in prompts]
        if body.echo and wanted == 0:
            sampling, jobs = body.model_copy(update={"max_tokens": 1}).sampling(16, self.context, 0), []
        else:
            sampling = body.sampling(16, self.context, body.logprobs or 0)
            jobs = [(self._request("cmpl", body, (), sampling, [body.prompt, i]), ids) for i, ids in enumerate(prompts)]
        shape = TextShape(self.engine, body, prompts, scored)
        if not jobs and not body.stream:
            return web.json_response(shape.whole([], sampling.n))
        return await self._answer(http, body, jobs, shape)

    async def _rewards(self, http: web.Request) -> web.StreamResponse:
        body = await read(http, RewardBody)
        if self.rate is None:
            raise _Refused(404, "this server has no reward model: start it with --reward")
        if body.model:
            self._check_model(body.model, self.reward_name)
        rating = await self._rating(talk_of(body.messages))
        return web.json_response({"object": "reward", "model": self.reward_name, "rewards": rating})

    async def _rated_chat(self, body: ChatBody, talk: Conversation) -> web.StreamResponse:
        if body.stream or (body.n or 1) > 1:
            raise InputError("a reward model gives one rating, whole: leave stream and n out")
        rating = {name: value for name, value in (await self._rating(talk)).items() if name != "score"}
        text = ",".join(f"{name}:{value}" for name, value in rating.items())
        entries: list[dict[str, Any]] = [
            {"token": name, "logprob": value, "bytes": None, "top_logprobs": []} for name, value in rating.items()
        ]
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "logprobs": {"content": entries}, "finish_reason": "length"}
        return web.json_response(envelope("chat.completion", f"reward-{make_id(text)}", self.reward_name, [choice], usage_of(0, 1)))

    # ---- work ----

    def _check_model(self, name: str | None, wanted: str) -> None:
        if name != wanted:
            also = f", and the reward model {self.reward_name!r}" if self.rate else ""
            raise _Refused(404, f"the model {name or ''!r} does not exist here; this server has {self.engine.name!r}{also}")

    def _request(self, kind: str, body: Body, talk: Conversation, sampling: SamplingParams, content: Any) -> Request:
        self._number += 1
        # the engine draws by id and seed: where a seed is given, equal requests shall have equal answers
        name = f"{kind}-{self._number}" if body.seed is None else f"{kind}-{make_id(content, body.seed)}"
        return Request(name, talk, sampling, body.seed or 0)

    async def _encoded(self, characters: int, encode: Callable[..., list[int]], *args: Any) -> list[int]:
        if characters > LONGEST_TOKEN * self.context:
            raise InputError(f"the text has {characters:,} characters and the model's context is {self.context} tokens: shorten it")
        return encode(*args) if characters < IN_A_THREAD else await asyncio.to_thread(encode, *args)

    async def _ids(self, prompt: str | list[int]) -> list[int]:
        ids = prompt
        if isinstance(ids, str):
            ids = await self._encoded(len(ids), self.engine.tokenizer.encode, ids)
        if not ids:
            raise InputError("a prompt is empty")
        if wrong := [token for token in ids if not 0 <= token < self.engine.model.config.vocab_size]:
            raise InputError(f"the model has no token {wrong[0]}")
        return ids

    async def _score(self, ids: list[int], top: int) -> tuple[list[float], list[list[tuple[int, float]]]]:
        return await asyncio.get_running_loop().run_in_executor(self._aside, self.engine.prompt_logprobs, ids, top)

    async def _rating(self, talk: Conversation) -> dict[str, float]:
        if talk[-1].role != "assistant":
            raise InputError("the last message must be the assistant's, which is rated")
        turn: asyncio.Future[dict[str, float]] = asyncio.get_running_loop().create_future()
        self._unrated.append((talk, turn))
        if self._rating_now is None or self._rating_now.done():  # of its own: whoever waits may go
            self._rating_now = asyncio.ensure_future(self._rate_all())
        return await turn

    async def _rate_all(self) -> None:
        while self._unrated:
            wave, self._unrated = [one for one in self._unrated if not one[1].done()], []
            if wave:
                await self._rate_wave(wave)

    async def _rate_wave(self, wave: list[tuple[Conversation, asyncio.Future[dict[str, float]]]]) -> None:
        assert self.rate is not None
        try:
            ratings = await asyncio.get_running_loop().run_in_executor(self._aside, self.rate, [talk for talk, _ in wave])
        except Exception as e:
            if len(wave) > 1:  # one of them broke it: each by itself
                for one in wave:
                    await self._rate_wave([one])
            elif not wave[0][1].done():
                wave[0][1].set_exception(e)
            return
        for (_, turn), rating in zip(wave, ratings, strict=True):
            if not turn.done():
                turn.set_result(rating)

    def _deliver(self, events: list[Event]) -> None:
        """From the engine's threads."""
        self._loop.call_soon_threadsafe(self._sort, events)

    def _sort(self, events: list[Event]) -> None:
        for event in events:
            one = self._open.get(event.job)
            if one is None:
                continue
            if event.sample >= 0:
                one.tokens.put_nowait(event)
            elif not one.ended.done():
                del self._open[event.job]
                one.tokens.put_nowait(None)
                if event.error is None:
                    one.ended.set_result(None)
                else:
                    one.ended.set_exception(event.error)

    async def _answer(self, http: web.Request, body: Body, jobs: list[tuple[Request, list[int]]], shape: Shape) -> web.StreamResponse:
        opened = []
        try:
            for request, ids in jobs:
                job = self.engine.job_of(request, ids)
                if body.stream:
                    job.listener = lambda *_: None
                opened.append(_Open(job, asyncio.get_running_loop().create_future()))
            self._check_room(sum(len(one.job.completions) for one in opened))
            for one in opened:
                self._open[one.job] = one
                self.live.submit(one.job)
            if body.stream:
                return await self._stream(http, body, opened, shape)
            await asyncio.gather(*(one.ended for one in opened))
            made = [one.job for one in opened]
            if drawn(made) * (1 + made[0].request.sampling.top_logprobs) > IN_A_THREAD:
                return web.Response(text=await asyncio.to_thread(lambda: json.dumps(shape.whole(made, body.n or 1))), content_type=JSON)
            return web.json_response(shape.whole(made, body.n or 1))
        finally:  # the client has gone, or time is up: nobody wants the rest
            for one in opened:
                if self._open.pop(one.job, None) is not None:
                    self.live.cancel(one.job)
                if one.ended.done() and not one.ended.cancelled():
                    one.ended.exception()  # heard, even where another request's came first

    async def _stream(self, http: web.Request, body: Body, opened: list[_Open], shape: Shape) -> web.StreamResponse:
        started = time.monotonic()
        reply: web.StreamResponse | None = None
        async for chunk in self._chunks(opened, shape):
            if reply is None:  # an error before the first token has a status of its own
                reply = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
                await reply.prepare(http)
                http[STREAM] = reply
                self.metrics.first.observe(time.monotonic() - started)
            await reply.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
        assert reply is not None
        if (body.stream_options or {}).get("include_usage"):
            usage = usage_of(sum(len(one.job.prompt) for one in opened), drawn([one.job for one in opened]))
            await reply.write(b"data: " + json.dumps(shape.chunk([]) | {"usage": usage}).encode() + b"\n\n")
        await reply.write(b"data: [DONE]\n\n")
        await reply.write_eof()
        return reply

    async def _chunks(self, opened: list[_Open], shape: Shape) -> AsyncIterator[dict[str, Any]]:
        """Chunks of all samples as they come: the requests' one after another, the samples' of one together."""
        for choice in shape.before():
            yield shape.chunk([choice])
        for place, one in enumerate(opened):
            num_samples = len(one.job.completions)
            texts = [GrowingText(self.engine, one.job.request.sampling.stop) for _ in range(num_samples)]
            ended: set[int] = set()
            while (event := await one.tokens.get()) is not None:
                index = place * num_samples + event.sample
                if not event.last:
                    piece = texts[event.sample].add(event.token)
                    yield shape.chunk([shape.piece(index, piece, event, None)])
                else:
                    completion = one.job.completions[event.sample]
                    assert completion is not None
                    piece = texts[event.sample].rest(completion.text)
                    ended.add(event.sample)
                    yield shape.chunk([shape.piece(index, piece, event, completion.finish)])
            await one.ended  # raises what went wrong


def _error(status: int, words: str) -> web.Response:
    headers = {"Retry-After": str(RETRY_SECONDS)} if status == 429 else None
    kind = "invalid_request_error" if status < 500 else "server_error"
    return web.json_response({"error": {"message": words, "type": kind, "code": status}}, status=status, headers=headers)
