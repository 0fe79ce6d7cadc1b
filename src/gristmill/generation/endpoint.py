"""Any OpenAI-compatible endpoint as a source of responses.

One queue and no batches: every request is a row of its own, and as many are in flight as the endpoint bears. What can pass (a rate
limit, a server error, a time-out, a reset, a broken or empty body) is tried again by the next free slot, up to a budget a row; what
cannot is reported with its reason. A dead endpoint costs no row its budget: everything waits until it answers again.
"""

import asyncio
import contextlib
import email.utils
import hashlib
import json
import os
import random
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

import aiohttp

from gristmill.core.errors import InputError
from gristmill.generation.api import Completion, Finish, Request
from gristmill.generation.rate_limit import RateLimit

FIRST_PAUSE, LONGEST_PAUSE = 0.25, 8.0  # seconds between attempts of a row
# A gateway's errors count as an outage, which costs a row nothing, when nothing was answered for so many seconds.
OUTAGE_SECONDS = 2.0
LONGEST_RETRY_AFTER = 120.0  # seconds; an endpoint that asks for more is treated as one that asks for this
UNKNOWN_PATIENCE = 10.0  # seconds that an endpoint may be unreachable before it ever answered
WORKERS_PER_SLOT = 2  # rows under way for each slot: those that pause between attempts hold none
LARGEST_ANSWER = 32 << 20  # bytes
SURROGATE = re.compile("[\ud800-\udfff]")
FEW_ROWS = 4  # so few rows that get nothing but a gateway's errors are bad rows, more are a dead endpoint
MOST_TOKENS = 1 << 40  # that an answer may say it has
SHOWN = 300  # characters of an error's body


Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Target:
    """One model behind one base URL.

    Attributes:
        base_url: up to and including `/v1`.
        model: name that the endpoint knows the model by.
        weight: share of the rows that this model gets, relative to the other models. Several targets of the same model are
            replicas: a row goes to the least busy one.
        kind: "chat" for `/chat/completions`; "completions" for `/completions`, where a request's only message is the prompt.
        api_key_env, api_key_file: where the key is. It is never part of a recipe, log or journal.
        price_in, price_out: money a million tokens.
        logprobs: ask for log-probabilities of the chosen tokens.
    """

    base_url: str
    model: str
    weight: float = 1.0
    kind: Literal["chat", "completions"] = "chat"
    api_key_env: str = ""
    api_key_file: str = ""
    price_in: float = 0.0
    price_out: float = 0.0
    logprobs: bool = False


@dataclass
class Usage:
    """What was spent so far."""

    requests: int = 0
    rows: int = 0
    failed: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float = 0.0
    errors: Counter[str] = field(default_factory=Counter)  # attempts that ended badly, by kind


class RowFailed(Exception):
    """A row that used up its budget, or that the endpoint will never answer.

    Attributes:
        attempts: how often it was sent.
        status: HTTP status of the last answer; 0 where there was none.
    """

    def __init__(self, reason: str, attempts: int, status: int = 0):
        super().__init__(reason)
        self.attempts, self.status = attempts, status


class _Passing(Exception):
    """An attempt failed in a way that the next may not."""

    def __init__(self, kind: str, reason: str, status: int = 0, pause: float | None = None):
        super().__init__(reason)
        self.kind, self.status, self.pause = kind, status, pause

    def seconds(self, failures: int) -> float:
        """How long to wait after so many failures: as long as the server says; else the first is tried again at once, unless it
        was refused for its rate."""
        if self.pause is not None:
            return self.pause
        doublings = failures - 1 if self.kind == "429" else failures - 2
        return min(LONGEST_PAUSE, FIRST_PAUSE * 2**doublings) * random.uniform(0.5, 1.0) if doublings >= 0 else 0.0


class _Line:
    """One target in use: its window, key, and whether it is there at all."""

    def __init__(self, target: Target, concurrency: int):
        self.target = target
        self.window = RateLimit(concurrency)
        self.key = _key(target)
        path = "/chat/completions" if target.kind == "chat" else "/completions"
        self.url = target.base_url.rstrip("/") + path
        self.headers = {"Content-Type": "application/json"}
        if self.key:
            self.headers["Authorization"] = f"Bearer {self.key}"
        self.answered_at: float | None = None
        self.down_since: float | None = None
        self.pause_until = 0.0
        self.in_outage: set[str] = set()  # rows that a dead endpoint keeps waiting

    def clean(self, text: str) -> str:
        """A server's words without our key, and not too many of them."""
        if self.key:  # before it is cut, or a part of the key might stay
            text = text.replace(self.key, "[key]")
        return " ".join(text.split())[:SHOWN]

    @property
    def paused(self) -> bool:
        return self.pause_until > time.monotonic()

    async def there(self) -> None:
        """Wait while everything to this target is paused."""
        while (wait := self.pause_until - time.monotonic()) > 0:
            await asyncio.sleep(wait)

    def unreachable(self, patience: float, why: str) -> None:
        """Nobody answered: pause everything a little longer each time.

        Raises:
            InputError: it has been so for longer than `patience` (or was never otherwise).
        """
        now = time.monotonic()
        if self.down_since is None:
            self.down_since = now
        away = now - self.down_since
        if away > (patience if self.answered_at is not None else min(patience, UNKNOWN_PATIENCE)):
            raise InputError(
                f"{self.target.base_url} has not answered for {away:.0f} s ({why}): check the address, start the server, and run the "
                "same command again. Nothing that was answered is lost."
            )
        self.pause_until = max(self.pause_until, now + min(5.0, max(0.5, away / 2)))

    def reachable(self) -> None:
        self.answered_at, self.down_since = time.monotonic(), None

    @property
    def silent(self) -> bool:
        """Whether nothing was answered of late."""
        return self.answered_at is None or time.monotonic() - self.answered_at > OUTAGE_SECONDS


class Endpoint:
    """A `Generator` over HTTP.

    Args:
        targets: models and where they are. Which model answers a row depends on the row's id alone.
        concurrency: most requests in flight at each base URL.
        timeout: seconds that an attempt may take.
        retries: further attempts of a row after the first.
        patience: seconds that an endpoint may be unreachable before the run ends.

    Raises:
        InputError: no target, a bad URL, or a key that is not where it should be.
    """

    def __init__(
        self, targets: Sequence[Target], *, concurrency: int = 64, timeout: float = 120.0, retries: int = 5, patience: float = 600.0
    ):
        if not targets:
            raise InputError("No endpoint is given: name at least one base_url and model.")
        if concurrency < 1 or timeout <= 0 or retries < 0 or patience < 0:
            raise InputError("concurrency must be at least 1, timeout above 0, retries and patience at least 0.")
        self._lines: dict[str, list[_Line]] = {}
        for target in targets:
            self._lines.setdefault(target.model, []).append(_Line(target, concurrency))
        self._weights = {model: max(line.target.weight for line in lines) for model, lines in self._lines.items()}
        self.concurrency = concurrency * len(targets)
        self._timeout = aiohttp.ClientTimeout(total=timeout)
        self._seconds, self._retries, self._patience = timeout, retries, patience
        self._session: aiohttp.ClientSession | None = None
        self.usage = Usage()

    @property
    def name(self) -> str:
        return "+".join(self._lines)

    @property
    def in_flight(self) -> int:
        """Requests under way now."""
        return sum(line.window.in_flight for lines in self._lines.values() for line in lines)

    def model_of(self, request_id: str) -> str:
        """The model that answers a row."""
        if len(self._lines) == 1:
            return next(iter(self._lines))
        share = int.from_bytes(hashlib.blake2b(request_id.encode(), digest_size=8).digest(), "big") / 2**64
        share *= sum(self._weights.values())
        for model, weight in self._weights.items():
            share -= weight
            if share < 0:
                return model
        return next(iter(self._lines))

    async def __aenter__(self) -> "Endpoint":
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=60)
        self._session = aiohttp.ClientSession(connector=connector, timeout=self._timeout, cookie_jar=aiohttp.DummyCookieJar())
        return self

    async def __aexit__(self, *error: object) -> None:
        assert self._session is not None
        await self._session.close()
        self._session = None

    # ---- rows ----

    async def complete(self, request: Request, model: str = "") -> list[Completion]:
        """The `n` completions of one request, by the model of its row or by another.

        Raises:
            RowFailed: the endpoint refuses this row for good, or its budget is used up.
            InputError: the endpoint refuses every row (key, address, model), or has been unreachable for too long.
        """
        lines = self._lines[model or self.model_of(request.id)]
        outs: list[Completion] = []
        failures = 0
        while True:
            line = lines[0] if len(lines) == 1 else min(lines, key=lambda line: (line.paused, line.window.load))
            again = failures > 0
            await line.there()
            await line.window.enter(again)
            try:
                # some servers ignore n, so what is missing is asked for again
                outs += await self._attempt(line, request, request.sampling.n - len(outs), len(outs))
                if len(outs) >= request.sampling.n:
                    self.usage.rows += 1
                    return outs[: request.sampling.n]
                continue
            except _Passing as e:
                self.usage.errors[e.kind] += 1
                failed = e
            except RowFailed as e:
                e.attempts = failures + 1
                raise
            finally:
                line.window.leave()
                line.in_outage.discard(request.id)
            if failed.kind == "unreachable":
                line.in_outage.add(request.id)
                try:
                    line.unreachable(self._patience, str(failed))
                except InputError:
                    line.in_outage.discard(request.id)
                    if failed.status and len(line.in_outage) < FEW_ROWS:  # a gateway that answers, and refuses only these
                        self.usage.failed += 1
                        raise RowFailed(str(failed), failures + 1, failed.status) from None
                    raise
                continue
            failures += 1
            if failures > self._retries:
                self.usage.failed += 1
                raise RowFailed(str(failed), failures, failed.status)
            if pause := failed.seconds(failures):
                await asyncio.sleep(pause)

    def text_of(self, choice: Any, target: Target) -> Any:
        """The text of a decoded choice. What raises here, or is no text, is a malformed answer, which is asked for again."""
        return choice["message"]["content"] if target.kind == "chat" else choice["text"]

    async def _attempt(self, line: _Line, request: Request, num: int, start: int) -> list[Completion]:
        assert self._session is not None
        data = json.dumps(_body(line.target, request, num, start)).encode()
        self.usage.requests += 1
        try:
            async with self._session.post(line.url, data=data, headers=line.headers) as reply:
                status, headers = reply.status, reply.headers
                if (reply.content_length or 0) > LARGEST_ANSWER:
                    raise _Passing("malformed", f"the answer has {reply.content_length:,} bytes", status)
                body = await reply.read()
        except aiohttp.ClientConnectorError as e:
            raise _Passing("unreachable", line.clean(str(e))) from e
        except TimeoutError as e:
            line.window.saw(refused=True)
            raise _Passing("timeout", f"no answer within {self._seconds:g} s") from e
        except (aiohttp.ClientError, ConnectionError) as e:
            raise _Passing("reset", f"the connection broke ({line.clean(str(e)) or type(e).__name__})") from e
        if status == 200:
            line.reachable()
            outs, tokens_in, tokens_out = _completions(body, line.target, self.text_of)
            line.window.saw(refused=False)
            usage, target = self.usage, line.target
            usage.tokens_in += tokens_in
            usage.tokens_out += tokens_out
            usage.cost += (tokens_in * target.price_in + tokens_out * target.price_out) / 1e6
            return outs
        line.window.saw(refused=status in (429, 504))  # it does not keep up
        words = line.clean(body.decode(errors="replace"))
        if status == 429:
            wait = _retry_after(headers.get("Retry-After"))
            if wait and line.window.size < line.window.largest:  # not one refusal among many answers: all wait
                line.pause_until = max(line.pause_until, time.monotonic() + wait)
            raise _Passing("429", f"refused for its rate (429): {words}", status, wait)
        if status in (502, 503, 504) and line.silent:
            raise _Passing("unreachable", f"status {status}: {words}", status)
        if status >= 500 or status in (408, 409, 425):
            raise _Passing(str(status), f"the server failed ({status}): {words}", status)
        if status in (401, 403, 404) and line.answered_at is None:
            raise InputError(_refusal(line.target, status, words))
        self.usage.failed += 1
        raise RowFailed(f"refused ({status}): {words}", 1, status)

    # ---- many rows ----

    def generate(self, requests: Iterable[Request]) -> Iterator[tuple[Request, list[Completion]]]:
        """As `Generator.generate`, on an event loop of its own.

        Raises:
            RowFailed: a row failed for good. Use an `CachedClient` where the others shall go on.
        """

        async def answer(request: Request) -> tuple[Request, list[Completion]]:
            return request, await self.complete(request)

        async def rows() -> AsyncIterator[tuple[Request, list[Completion]]]:
            async with self:
                async for item in side_by_side(requests, answer, WORKERS_PER_SLOT * self.concurrency):
                    yield item

        with asyncio.Runner() as runner:
            stream = rows()
            try:
                while True:
                    try:
                        yield runner.run(_next(stream))
                    except StopAsyncIteration:
                        return
            finally:
                runner.run(_close(stream))


async def side_by_side(items: Iterable[Item], work: Callable[[Item], Awaitable[Result]], num: int) -> AsyncIterator[Result]:
    """What `work` makes of each item, `num` of them under way at a time, in order of finishing.

    Items are taken from the iterable only as they can be worked on, so a stream of any length needs little memory. The first
    exception ends all.
    """
    todo = iter(items)
    done: asyncio.Queue[tuple[Result] | Exception | None] = asyncio.Queue(maxsize=num)

    async def worker() -> None:
        try:
            for item in todo:
                await done.put((await work(item),))
        except Exception as e:
            await done.put(e)
        else:
            await done.put(None)

    workers = [asyncio.ensure_future(worker()) for _ in range(num)]
    try:
        busy = num
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


async def _next(stream: AsyncIterator[Any]) -> Any:
    return await stream.__anext__()


async def _close(stream: Any) -> None:
    with contextlib.suppress(RuntimeError):
        await stream.aclose()


def _key(target: Target) -> str:
    """The API key of a target, "" where it needs none.

    Raises:
        InputError: the URL is no URL or holds a secret, or the key is not where it should be.
    """
    url = urlsplit(target.base_url)
    if url.scheme not in ("http", "https") or not url.hostname:
        raise InputError(f"{target.base_url!r} is not the base URL of an endpoint: give one like http://localhost:8000/v1.")
    if url.username or url.password or url.query:
        raise InputError(f"The base URL of {url.hostname} holds a user, password or query: put the key into api_key_env or api_key_file.")
    if target.api_key_env:
        key = os.environ.get(target.api_key_env, "")
        if not key:
            raise InputError(f"The environment variable {target.api_key_env} is empty: put the API key of {url.hostname} into it.")
        if len(key.split()) != 1:
            raise InputError(f"The environment variable {target.api_key_env} must hold the key and nothing else.")
        return key.strip()
    if target.api_key_file:
        path = Path(target.api_key_file).expanduser()
        try:
            key = path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as e:
            raise InputError(f"The key file {path} cannot be read ({e}).") from e
        if not key or len(key.split()) > 1:
            raise InputError(f"The key file {path} must hold the key and nothing else.")
        return key
    return ""


def _body(target: Target, request: Request, num: int, start: int) -> dict[str, Any]:
    sampling = request.sampling
    body: dict[str, Any] = {"model": target.model, "temperature": sampling.temperature, "max_tokens": sampling.max_tokens}
    if target.kind == "chat":
        body["messages"] = [{"role": m.role, "content": m.content} for m in request.messages]
    elif len(request.messages) == 1:
        body["prompt"] = request.messages[0].content
    else:
        raise InputError(f"Row {request.id} has {len(request.messages)} messages and {target.model} takes one text: use kind 'chat'.")
    if sampling.top_p < 1:
        body["top_p"] = sampling.top_p
    if sampling.top_k:
        body["top_k"] = sampling.top_k
    if sampling.min_p:
        body["min_p"] = sampling.min_p
    for name, off in (("repetition_penalty", 1.0), ("presence_penalty", 0.0), ("frequency_penalty", 0.0)):
        if (value := getattr(sampling, name)) != off:
            body[name] = value
    if sampling.stop:
        body["stop"] = list(sampling.stop)
    if sampling.stop_tokens:
        body["stop_token_ids"] = list(sampling.stop_tokens)
    if sampling.logit_bias:
        body["logit_bias"] = {str(token): value for token, value in sampling.logit_bias}
    if num > 1:
        body["n"] = num
    if target.logprobs:
        body["logprobs"] = True if target.kind == "chat" else 0
    # one seed a row: the same request always draws the same numbers, another row others
    digest = hashlib.blake2b(f"{request.seed}/{request.id}/{start}".encode(), digest_size=4).digest()
    body["seed"] = int.from_bytes(digest, "big") >> 1
    return body


def _completions(body: bytes, target: Target, text_of: Callable[[Any, Target], Any]) -> tuple[list[Completion], int, int]:
    """Completions of a good answer, and the tokens that it counts in and out."""
    try:
        answer = json.loads(body)
        choices = answer["choices"]
        usage = answer.get("usage") or {}
        tokens_in, tokens_out = (min(MOST_TOKENS, max(0, int(usage.get(name) or 0))) for name in ("prompt_tokens", "completion_tokens"))
        outs = []
        for choice in choices:
            text = text_of(choice, target)
            if not isinstance(text, str) or not text.strip():
                raise _Passing("empty", "the answer is empty", 200)
            if choice.get("finish_reason") == "content_filter":
                raise _Passing("filtered", "the endpoint's content filter cut the answer off", 200)
            text = SURROGATE.sub("\ufffd", text)  # which no file could hold
            logprobs = _logprobs(choice.get("logprobs"))
            finish: Finish = "length" if choice.get("finish_reason") == "length" else "stop"
            outs.append(Completion(text, len(logprobs) or tokens_out // len(choices), logprobs, finish))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError) as e:
        raise _Passing("malformed", f"the answer cannot be read ({e.__class__.__name__})", 200) from e
    if not outs:
        raise _Passing("malformed", "the answer holds no choice", 200)
    return outs, tokens_in, tokens_out


def _logprobs(found: Any) -> tuple[float, ...]:
    if not found:
        return ()
    if "content" in found:
        return tuple(float(token["logprob"]) for token in found["content"] or ())
    return tuple(float(value) for value in found.get("token_logprobs") or () if value is not None)


def _retry_after(value: str | None) -> float | None:
    """Seconds that a Retry-After header asks for, as a number or a date; None where it says nothing."""
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    return min(LONGEST_RETRY_AFTER, seconds) if seconds > 0 else 0.0


def _refusal(target: Target, status: int, words: str) -> str:
    if status == 404:
        what = f"{target.base_url} does not know the model {target.model!r} or the path (404)"
        return f"{what}: {words or 'no reason given'}. Check base_url, which ends in /v1 for most servers, and model."
    where = target.api_key_env or target.api_key_file or "api_key_env"
    return f"{target.base_url} refuses the key ({status}): {words or 'no reason given'}. Check the key in {where}."
