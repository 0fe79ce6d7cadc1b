"""A model behind the OpenAI protocol: chat and text completions, streamed or whole, beside a reward model if there is one.

Sources of the protocol: OpenAI's API reference; for rewards, the API of Nemotron-4-340B-Reward.
"""

import asyncio
import contextlib
import hmac
import itertools
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr, ValidationError

from gristmill.chat import Conversation, check, conversation
from gristmill.engine import constraints
from gristmill.engine.engine import Engine
from gristmill.engine.generator import Completion, Request, Sampling
from gristmill.engine.live import Event, Live
from gristmill.engine.sequence import Job
from gristmill.errors import InputError
from gristmill.rows import make_id

LARGEST_BODY = 4 << 20  # bytes
MOST_SAMPLES = 128
MOST_TOP_K = 1 << 20
MOST_STOPS, LONGEST_STOP, MOST_BIASES = 16, 500, 1024
LONGEST_TOKEN = 128  # characters, as good as never more: a longer text is too long without counting
IN_A_THREAD = 20_000  # characters of a text, or tokens with their likeliest, that would hold up everybody else
RETRY_SECONDS = 1
GONE = 499
STREAM = web.RequestKey("stream", web.StreamResponse)  # the answer that has begun
JSON = "application/json"
Number = StrictFloat | StrictInt
Stop = Annotated[StrictStr, Field(max_length=LONGEST_STOP)]
Rate = Callable[[list[Conversation]], list[dict[str, float]]]


class _Refused(Exception):
    """A request that gets this status and these words."""

    def __init__(self, status: int, words: str):
        super().__init__(words)
        self.status = status


class _Body(BaseModel):
    """What chat and text completions share."""

    model_config = ConfigDict(extra="forbid")
    model: StrictStr | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: StrictInt | None = None
    min_p: Number | None = None
    max_tokens: StrictInt | None = None
    n: StrictInt | None = Field(None, le=MOST_SAMPLES)
    seed: StrictInt | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    repetition_penalty: Number | None = None
    logit_bias: dict[str, Number] | None = Field(None, max_length=MOST_BIASES)
    stream: StrictBool | None = None
    stream_options: dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    # what clients send along and what changes nothing here
    best_of: Annotated[StrictInt, Field(ge=1, le=1)] | None = None
    metadata: Any = None
    parallel_tool_calls: StrictBool | None = None
    service_tier: Any = None
    store: Literal[False] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    user: Any = None

    def sampling(self, default_tokens: int, most_tokens: int, top_logprobs: int) -> Sampling:
        wanted = default_tokens if self.max_tokens is None else self.max_tokens
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        try:
            bias = tuple((int(token), _or(value, 0.0)) for token, value in (self.logit_bias or {}).items())
        except ValueError as e:
            raise InputError("the keys of logit_bias must be token ids") from e
        return Sampling(
            temperature=_or(self.temperature, 1.0),
            top_p=_or(self.top_p, 1.0),
            top_k=min(self.top_k or 0, MOST_TOP_K),
            max_tokens=min(wanted, most_tokens),
            n=1 if self.n is None else self.n,
            min_p=_or(self.min_p, 0.0),
            repetition_penalty=_or(self.repetition_penalty, 1.0),
            presence_penalty=_or(self.presence_penalty, 0.0),
            frequency_penalty=_or(self.frequency_penalty, 0.0),
            stop=stop,
            logit_bias=bias,
            top_logprobs=top_logprobs,
            grammar=_grammar(self.response_format, self.structured_outputs),
        )


class ChatBody(_Body):
    messages: list[Any]
    max_completion_tokens: StrictInt | None = None
    logprobs: StrictBool | None = None
    top_logprobs: StrictInt | None = Field(None, ge=0, le=20)


class TextBody(_Body):
    prompt: StrictStr | list[StrictInt] | list[StrictStr] | list[list[StrictInt]]
    logprobs: StrictInt | None = Field(None, ge=0, le=20)
    echo: StrictBool | None = None


class RewardBody(BaseModel):
    model_config = ConfigDict(extra="forbid")
    model: StrictStr | None = None
    messages: list[Any]


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
        body = await _read(http, ChatBody)
        talk = _talk(body.messages)
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
        shape = _ChatShape(self, request, bool(body.logprobs))
        return await self._answer(http, body, [(request, prompt)], shape)

    async def _text(self, http: web.Request) -> web.StreamResponse:
        body = await _read(http, TextBody)
        self._check_model(body.model, self.engine.name)
        texts = _prompts(body.prompt)
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
        shape = _TextShape(self, body, prompts, scored)
        if not jobs and not body.stream:
            return web.json_response(shape.whole([], sampling.n))
        return await self._answer(http, body, jobs, shape)

    async def _rewards(self, http: web.Request) -> web.StreamResponse:
        body = await _read(http, RewardBody)
        if self.rate is None:
            raise _Refused(404, "this server has no reward model: start it with --reward")
        if body.model:
            self._check_model(body.model, self.reward_name)
        rating = await self._rating(_talk(body.messages))
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
        return web.json_response(_envelope("chat.completion", f"reward-{make_id(text)}", self.reward_name, [choice], _usage(0, 1)))

    # ---- work ----

    def _check_model(self, name: str | None, wanted: str) -> None:
        if name != wanted:
            also = f", and the reward model {self.reward_name!r}" if self.rate else ""
            raise _Refused(404, f"the model {name or ''!r} does not exist here; this server has {self.engine.name!r}{also}")

    def _request(self, kind: str, body: _Body, talk: Conversation, sampling: Sampling, content: Any) -> Request:
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

    async def _answer(self, http: web.Request, body: _Body, jobs: list[tuple[Request, list[int]]], shape: "_Shape") -> web.StreamResponse:
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
            if _drawn(made) * (1 + made[0].request.sampling.top_logprobs) > IN_A_THREAD:
                return web.Response(text=await asyncio.to_thread(lambda: json.dumps(shape.whole(made, body.n or 1))), content_type=JSON)
            return web.json_response(shape.whole(made, body.n or 1))
        finally:  # the client has gone, or time is up: nobody wants the rest
            for one in opened:
                if self._open.pop(one.job, None) is not None:
                    self.live.cancel(one.job)
                if one.ended.done() and not one.ended.cancelled():
                    one.ended.exception()  # heard, even where another request's came first

    async def _stream(self, http: web.Request, body: _Body, opened: list[_Open], shape: "_Shape") -> web.StreamResponse:
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
            usage = _usage(sum(len(one.job.prompt) for one in opened), _drawn([one.job for one in opened]))
            await reply.write(b"data: " + json.dumps(shape.chunk([]) | {"usage": usage}).encode() + b"\n\n")
        await reply.write(b"data: [DONE]\n\n")
        await reply.write_eof()
        return reply

    async def _chunks(self, opened: list[_Open], shape: "_Shape") -> AsyncIterator[dict[str, Any]]:
        """Chunks of all samples as they come: the requests' one after another, the samples' of one together."""
        for choice in shape.before():
            yield shape.chunk([choice])
        for place, one in enumerate(opened):
            num_samples = len(one.job.completions)
            texts = [_Text(self.engine, one.job.request.sampling.stop) for _ in range(num_samples)]
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


class _Text:
    """Text of a response while it grows. What may yet turn out to be no text, or the beginning of a stop string, is held back."""

    def __init__(self, engine: Engine, stop: Sequence[str]) -> None:
        self.engine = engine
        self.hold = max([len(engine.chat_format.close), *(len(s) - 1 for s in stop)])
        self.ids: list[int] = []
        self.done = ""  # text of ids before `start`, which ends where characters do
        self.start = 0
        self.sent = 0

    def add(self, token: int) -> str:
        """What can be sent now."""
        self.ids.append(token)
        text = self.done + self.engine.tokenizer.decode(self.ids[self.start :])
        if text.endswith("\ufffd"):  # in the middle of a character
            return ""
        if len(self.ids) - self.start > 64:  # so that long answers do not cost more and more
            middle = len(self.ids) - 16
            head = self.engine.tokenizer.decode(self.ids[self.start : middle])
            if text.startswith(self.done + head) and self.done + head + self.engine.tokenizer.decode(self.ids[middle:]) == text:
                self.done, self.start = self.done + head, middle
        end = max(self.sent, len(text) - self.hold)
        piece, self.sent = text[self.sent : end], end
        return piece

    def rest(self, text: str) -> str:
        """The rest of the whole text."""
        return text[self.sent :]


# ---- shapes of answers ----


class _Shape:
    """How answers are written down."""

    def whole(self, jobs: list[Job], n: int) -> dict[str, Any]:
        raise NotImplementedError

    def before(self) -> list[dict[str, Any]]:
        """What is said before anything is drawn."""
        return []

    def piece(self, index: int, text: str, event: Event, finish: str | None) -> dict[str, Any]:
        raise NotImplementedError

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        raise NotImplementedError


class _ChatShape(_Shape):
    def __init__(self, server: Server, request: Request, logprobs: bool) -> None:
        self.server, self.request, self.logprobs = server, request, logprobs
        self.name = f"chatcmpl-{secrets.token_hex(12)}"
        self.begun: set[int] = set()

    def whole(self, jobs: list[Job], n: int) -> dict[str, Any]:
        (job,) = jobs
        choices: list[dict[str, Any]] = []
        for index, out in enumerate(c for c in job.completions if c is not None):
            message = {"role": "assistant", "content": out.text}
            entries = {"content": self._entries(out)} if self.logprobs else None
            choices.append({"index": index, "message": message, "logprobs": entries, "finish_reason": out.finish})
        usage = _usage(len(job.prompt), _drawn(jobs))
        return _envelope("chat.completion", self.name, self.server.engine.name, choices, usage)

    def piece(self, index: int, text: str, event: Event, finish: str | None) -> dict[str, Any]:
        delta: dict[str, Any] = {"content": text}
        if index not in self.begun:
            self.begun.add(index)
            delta["role"] = "assistant"
        entries = {"content": [self._entry(event.token, event.logprob, event.likeliest)]} if self.logprobs else None
        return {"index": index, "delta": delta, "logprobs": entries, "finish_reason": finish}

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return _envelope("chat.completion.chunk", self.name, self.server.engine.name, choices, None)

    def _entries(self, out: Completion) -> list[dict[str, Any]]:
        tops = out.top_logprobs or ((),) * len(out.tokens)
        return [self._entry(token, value, top) for token, value, top in zip(out.tokens, out.logprobs, tops, strict=True)]

    def _entry(self, token: int, logprob: float, top: Sequence[tuple[int, float]]) -> dict[str, Any]:
        return self._one(token, logprob) | {"top_logprobs": [self._one(*other) for other in top]}

    def _one(self, token: int, logprob: float) -> dict[str, Any]:
        tokenizer = self.server.engine.tokenizer
        return {"token": _token(self.server.engine, token), "logprob": logprob, "bytes": list(tokenizer.token_bytes(token))}


class _TextShape(_Shape):
    def __init__(self, server: Server, body: TextBody, prompts: list[list[int]], scored: list[Any] | None) -> None:
        self.server, self.body, self.prompts, self.scored = server, body, prompts, scored
        self.name = f"cmpl-{secrets.token_hex(12)}"
        self.offsets: dict[int, int] = {}  # of choices that are streamed

    def whole(self, jobs: list[Job], n: int) -> dict[str, Any]:
        choices: list[dict[str, Any]] = []
        for place, ids in enumerate(self.prompts):
            outs = [c for c in jobs[place].completions if c is not None] if jobs else [Completion("", 0, (), "length")] * n
            for out in outs:
                choices.append(self._choice(len(choices), place, ids, out))
        usage = _usage(sum(map(len, self.prompts)), _drawn(jobs))
        return _envelope("text_completion", self.name, self.server.engine.name, choices, usage)

    def before(self) -> list[dict[str, Any]]:
        if not self.body.echo:
            return []
        n = 1 if self.body.n is None else self.body.n
        none, finish = Completion("", 0, (), "length"), None if self.body.max_tokens != 0 else "length"
        places = [(place, ids, sample) for place, ids in enumerate(self.prompts) for sample in range(n)]
        return [self._choice(place * n + sample, place, ids, none) | {"finish_reason": finish} for place, ids, sample in places]

    def piece(self, index: int, text: str, event: Event, finish: str | None) -> dict[str, Any]:
        logprobs = None
        if self.body.logprobs is not None:
            word = _token(self.server.engine, event.token)
            tops = [self._top(event.likeliest)] if self.body.logprobs else None
            offset = self.offsets.get(index, 0)
            self.offsets[index] = offset + len(word)
            logprobs = {"tokens": [word], "token_logprobs": [event.logprob], "top_logprobs": tops, "text_offset": [offset]}
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def _top(self, likeliest: Sequence[tuple[int, float]]) -> dict[str, float]:
        return {_token(self.server.engine, token): value for token, value in likeliest}

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return _envelope("text_completion", self.name, self.server.engine.name, choices, None)

    def _choice(self, index: int, place: int, ids: list[int], out: Completion) -> dict[str, Any]:
        engine = self.server.engine
        text = (engine.tokenizer.decode(ids, keep_special=True) if self.body.echo else "") + out.text
        logprobs = None
        if self.body.logprobs is not None:
            tokens, values = list(out.tokens), list[float | None](out.logprobs)
            tops: list[dict[str, float] | None] = [self._top(top) for top in out.top_logprobs]
            if self.scored is not None:
                given, likeliest = self.scored[place]
                tokens, values = [*ids, *tokens], [None, *given, *values]
                tops = [None, *(self._top(top) for top in likeliest), *tops]
            words = [_token(engine, token) for token in tokens]
            offsets = [0, *itertools.accumulate(len(word) for word in words)]
            self.offsets[index] = offsets[-1]
            told = tops if self.body.logprobs else None
            logprobs = {"tokens": words, "token_logprobs": values, "top_logprobs": told, "text_offset": offsets[:-1]}
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": out.finish}


def _envelope(kind: str, name: str, model: str, choices: list[dict[str, Any]], usage: dict[str, int] | None) -> dict[str, Any]:
    out = {"id": name, "object": kind, "created": int(time.time()), "model": model, "choices": choices}
    return out if usage is None else out | {"usage": usage}


def _usage(prompt: int, drawn: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": drawn, "total_tokens": prompt + drawn}


def _drawn(jobs: list[Job]) -> int:
    return sum(c.num_tokens for job in jobs for c in job.completions if c is not None)


def _token(engine: Engine, token: int) -> str:
    """The text of a token; of a part of a character its bytes, written out."""
    text = engine.tokenizer.decode([token], keep_special=True)
    if "\ufffd" not in text:
        return text
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in engine.tokenizer.token_bytes(token))


# ---- reading ----


async def _read(http: web.Request, kind: type[Any]) -> Any:
    raw = await http.read()
    try:
        return kind.model_validate_json(raw)
    except ValidationError as e:
        first = e.errors()[0]
        if first["type"] == "json_invalid":
            raise InputError("the body is not JSON") from e
        if first["type"] in ("model_type", "model_attributes_type"):
            raise InputError("the body must be an object") from e
        where = ".".join(str(part) for part in first["loc"] if not str(part).startswith(("list[", "int", "float", "str", "constrained")))
        if first["type"] == "extra_forbidden":
            raise InputError(f"unknown field {where!r}") from e
        raise InputError(f"{where}: {first['msg'].lower()}") from e


def _talk(messages: list[Any]) -> Conversation:
    messages = [_plain(message) for message in messages]
    try:
        talk = conversation(messages)
    except TypeError as e:
        raise InputError("messages must be objects with `role` and `content`") from e
    check(talk)
    return talk


def _plain(message: Any) -> Any:
    """A message whose content is text, where its parts are; a developer is a system."""
    if not isinstance(message, dict):
        return message
    out = dict(message)
    parts = out.get("content")
    if isinstance(parts, list) and parts and all(isinstance(p, dict) and p.get("type") == "text" for p in parts):
        out["content"] = "\n".join(str(p.get("text", "")) for p in parts)
    if out.get("role") == "developer":
        out["role"] = "system"
    return {name: value for name, value in out.items() if value is not None and name != "name"}


def _prompts(prompt: Any) -> list[str | list[int]]:
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        return [prompt]
    if not prompt:
        raise InputError("a prompt is empty")
    return list(prompt)


def _grammar(response_format: dict[str, Any] | None, structured: dict[str, Any] | None) -> str:
    """OpenAI's `response_format`, or vLLM's `structured_outputs`, as a constraint."""
    if response_format and structured:
        raise InputError("give response_format or structured_outputs, not both")
    match response_format:
        case None | {"type": "text"}:
            pass
        case {"type": "json_object"}:
            return constraints.of_json_schema({})
        case {"type": "json_schema", "json_schema": {"schema": dict(schema)}}:
            return constraints.of_json_schema(schema)
        case _:
            raise InputError("response_format must be of type text, json_object, or json_schema with json_schema.schema")
    if structured is None:
        return ""
    match list(structured.items()):
        case [("json", dict(schema))]:
            return constraints.of_json_schema(schema)
        case [("regex", str(regex))]:
            return constraints.of_regex(regex)
        case [("choice", list(choices))] if all(isinstance(one, str) for one in choices):
            return constraints.of_choice(choices)
    raise InputError("structured_outputs must hold one of json (a schema), regex (a string) and choice (strings)")


def _or(value: float | None, default: float) -> float:
    try:
        return default if value is None else float(value)
    except OverflowError as e:
        raise InputError("a number is too large") from e


def _error(status: int, words: str) -> web.Response:
    headers = {"Retry-After": str(RETRY_SECONDS)} if status == 429 else None
    kind = "invalid_request_error" if status < 500 else "server_error"
    return web.json_response({"error": {"message": words, "type": kind, "code": status}}, status=status, headers=headers)
