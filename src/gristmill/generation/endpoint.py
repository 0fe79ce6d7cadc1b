"""Client of OpenAI-compatible endpoints: retries, replicas, adaptive concurrency.

One queue and no batches: every request is a row of its own, and as many are in flight as the endpoint bears. What can pass (a rate
limit, a server error, a time-out, a reset, a broken or empty body) is tried again by the next free slot, up to a budget a row; what
cannot is reported with its reason. A dead endpoint costs no row its budget: everything waits until it answers again.
"""

import asyncio
import contextlib
import hashlib
import json
import os
import random
import time
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import aiohttp

from gristmill.core.concurrent import map_concurrent
from gristmill.core.echo import echo
from gristmill.core.errors import InputError
from gristmill.core.io import read_bytes, reason
from gristmill.generation.api import Completion, Request
from gristmill.generation.openai_format import (
    FIELDS,
    KEPT_FIELDS,
    ErrorInAnswer,
    TransientError,
    check_fields,
    decode_answer,
    message_text,
    parse_completions,
    refused_fields,
    request_body,
    retry_after_of,
)
from gristmill.generation.rate_limit import RateLimit
from gristmill.generation.redaction import MARK, KeyRedactor

MIN_BACKOFF, MAX_BACKOFF = 0.25, 8.0  # seconds between attempts of a row
# A gateway's errors count as an outage, which costs a row nothing, when nothing was answered for so many seconds.
OUTAGE_SECONDS = 2.0
STARTUP_PATIENCE = 10.0  # seconds that an endpoint may be unreachable before it ever answered
WORKERS_PER_SLOT = 2  # rows under way for each slot: those that pause between attempts hold none
# Most bytes of an answer, decoded, counted as they arrive: some, and some for each token that it may have.
MAX_ANSWER_BYTES, BASE_ANSWER_BYTES, BYTES_PER_TOKEN = 32 << 20, 4 << 20, 1 << 10
MAX_ERROR_BYTES = 64 << 10  # read of an error
MIN_OUTAGE_ROWS = 4  # fewer that get nothing but a gateway's errors are bad rows, as many are a dead endpoint
MAX_SHOWN = 300  # characters of an error's body


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
        fields: what the endpoint calls a field of a request, or None to leave it out, as in
            `{"max_tokens": "max_completion_tokens", "seed": None}`. Without `n`, samples are asked for one at a time.
        extra_body: what is sent besides.
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
    fields: Mapping[str, str | None] = field(default_factory=dict, hash=False)
    extra_body: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass
class Usage:
    """Counts of requests, tokens and money so far, and the fields that an endpoint refused, by model: what became of them."""

    requests: int = 0
    rows: int = 0
    failed: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float = 0.0
    errors: Counter[str] = field(default_factory=Counter)  # attempts that ended badly, by kind
    refused_fields: dict[str, dict[str, str]] = field(default_factory=dict)


class RowFailed(Exception):
    """Permanent failure of one row: its budget is used up, or the endpoint will never answer it.

    Attributes:
        attempts: how often it was sent.
        status: HTTP status of the last answer; 0 where there was none.
    """

    def __init__(self, reason: str, attempts: int, status: int = 0):
        super().__init__(reason)
        self.attempts, self.status = attempts, status


class _FieldRefused(Exception):
    """A request that goes again, without a field."""


class _Replica:
    """One target in use: its rate limit, key, the fields it takes, and whether it is reachable."""

    def __init__(self, target: Target, concurrency: int):
        self.target = target
        self.rate_limit = RateLimit(concurrency)
        self.key = _key(target)
        self.redactor, self.sends_key = KeyRedactor(self.key), False
        check_fields(target.fields, target.extra_body)
        self.fields = dict(target.fields)
        self.left_out: tuple[str, ...] = ()  # fields that it refused, without which an answer is drawn otherwise
        path = "/chat/completions" if target.kind == "chat" else "/completions"
        self.url = target.base_url.rstrip("/") + path
        self.headers = {"Content-Type": "application/json", "Accept-Encoding": "gzip"}
        if self.key:
            self.headers["Authorization"] = f"Bearer {self.key}"
        self.answered_at: float | None = None
        self.down_since: float | None = None
        self.pause_until = 0.0
        self.rows_in_outage: set[str] = set()  # rows that a dead endpoint keeps waiting

    def redact(self, text: str) -> str:
        """A server's words without our key, nothing in them that moves a terminal, and not too many of them."""
        (text,) = self.redactor.redact([text])  # before it is cut, or a part of the key might stay
        return " ".join("".join(c if c.isprintable() else " " for c in text[: 8 * MAX_SHOWN]).split())[:MAX_SHOWN]

    def refuse(self, name: str) -> str:
        """The endpoint refuses a field: ask without it from now on. Returns what is sent instead, or "" where nothing can be done."""
        if name == "max_tokens":
            if self.fields.get(name, name) != name:
                return ""
            self.fields[name] = "max_completion_tokens"
            return "sent as max_completion_tokens"
        if name in KEPT_FIELDS:
            return ""
        self.fields[name] = None
        if name == "n":
            return "left out: samples are asked for one at a time"
        self.left_out = tuple(sorted({*self.left_out, name}))
        return {
            "seed": "left out: another run draws other answers",
            "logprobs": "left out: answers have no log-probabilities",
        }.get(name, "left out: answers are drawn with the endpoint's own")

    @property
    def paused(self) -> bool:
        return self.pause_until > time.monotonic()

    async def wait_while_paused(self) -> None:
        """Wait while everything to this target is paused."""
        while (wait := self.pause_until - time.monotonic()) > 0:
            await asyncio.sleep(wait)

    def mark_unreachable(self, patience: float, why: str, retry_after: float | None = None) -> None:
        """Nobody answered: pause everything a little longer each time, and as long as the server says.

        Raises:
            InputError: it has been so for longer than `patience` (or was never otherwise).
        """
        now = time.monotonic()
        if self.down_since is None:
            self.down_since = now
        away = now - self.down_since
        if away > (patience if self.answered_at is not None else min(patience, STARTUP_PATIENCE)):
            raise InputError(
                f"{self.target.base_url} has not answered for {away:.0f} s ({why}): check the address, start the server, and run the "
                "same command again. Nothing that was answered is lost."
            )
        self.pause_until = max(self.pause_until, now + max(retry_after or 0.0, min(5.0, max(0.5, away / 2))))

    def mark_reachable(self) -> None:
        self.answered_at, self.down_since = time.monotonic(), None

    @property
    def is_silent(self) -> bool:
        """Whether nothing was answered of late."""
        return self.answered_at is None or time.monotonic() - self.answered_at > OUTAGE_SECONDS


class Endpoint:
    """Asynchronous client of OpenAI-compatible endpoints, and a `Generator` over them.

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
        self._replicas: dict[str, list[_Replica]] = {}
        for target in targets:
            self._replicas.setdefault(target.model, []).append(_Replica(target, concurrency))
        self._weights = {model: max(replica.target.weight for replica in replicas) for model, replicas in self._replicas.items()}
        self.concurrency = concurrency * len(targets)
        self._timeout = aiohttp.ClientTimeout(total=timeout)
        self._timeout_s, self._retries, self._patience = timeout, retries, patience
        self._session: aiohttp.ClientSession | None = None
        self.usage = Usage()

    @property
    def name(self) -> str:
        return "+".join(self._replicas)

    @property
    def in_flight(self) -> int:
        """Requests under way now."""
        return sum(replica.rate_limit.in_flight for replicas in self._replicas.values() for replica in replicas)

    def model_of(self, request_id: str) -> str:
        """The model that answers a row."""
        if len(self._replicas) == 1:
            return next(iter(self._replicas))
        share = int.from_bytes(hashlib.blake2b(request_id.encode(), digest_size=8).digest(), "big") / 2**64
        share *= sum(self._weights.values())
        for model, weight in self._weights.items():
            share -= weight
            if share < 0:
                return model
        return next(iter(self._replicas))

    async def __aenter__(self) -> "Endpoint":
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=60)
        self._session = aiohttp.ClientSession(
            connector=connector,
            timeout=self._timeout,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,  # which would decode a body before anyone can count its bytes
        )
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
        replicas = self._replicas[model or self.model_of(request.id)]
        outs: list[Completion] = []
        failures, again, empty = 0, False, ""
        while True:
            replica = replicas[0] if len(replicas) == 1 else min(replicas, key=lambda replica: (replica.paused, replica.rate_limit.load))
            await replica.wait_while_paused()
            await replica.rate_limit.acquire(again)
            try:
                # some servers ignore n, so what is missing is asked for again
                more, why = await self._attempt(replica, request, request.sampling.n - len(outs), len(outs))
                outs, empty = outs + more, empty or why
                if len(outs) < request.sampling.n:
                    continue
                if empty and not any(out.text for out in outs):
                    self.usage.failed += 1
                    raise RowFailed(empty, failures + 1, 200)
                self.usage.rows += 1
                return outs[: request.sampling.n]
            except _FieldRefused:  # each time one field fewer is sent
                again = True
                continue
            except TransientError as e:
                self.usage.errors[e.kind] += 1
                failed, again = e, True
            except RowFailed as e:
                e.attempts = failures + 1
                raise
            finally:
                replica.rate_limit.release()
                replica.rows_in_outage.discard(request.id)
            if failed.kind == "unreachable":
                replica.rows_in_outage.add(request.id)
                try:
                    replica.mark_unreachable(self._patience, str(failed), failed.retry_after)
                except InputError:
                    replica.rows_in_outage.discard(request.id)
                    if failed.status and len(replica.rows_in_outage) < MIN_OUTAGE_ROWS:  # a gateway that answers, and refuses only these
                        self.usage.failed += 1
                        raise RowFailed(str(failed), failures + 1, failed.status) from None
                    raise
                continue
            failures += 1
            if failures > self._retries:
                self.usage.failed += 1
                if failed.status in (401, 403, 404) and replica.answered_at is None:
                    raise InputError(_refusal_message(replica.target, failed.status, str(failed)))
                raise RowFailed(str(failed), failures, failed.status)
            if pause := _backoff(failed, failures):
                await asyncio.sleep(pause)

    def choice_text(self, choice: Any, target: Target) -> Any:
        """The text of a decoded choice. What raises here, or is no text, is a malformed answer, which is asked for again."""
        return message_text(choice, target.kind == "chat")

    async def _attempt(self, replica: _Replica, request: Request, num: int, start: int) -> tuple[list[Completion], str]:
        """One call: its completions, and why some have no text."""
        assert self._session is not None
        target = replica.target
        num = 1 if replica.fields.get("n", "n") is None else num
        body = request_body(
            request,
            num,
            start,
            model=target.model,
            chat=target.kind == "chat",
            logprobs=target.logprobs,
            fields=replica.fields,
            extra_body=target.extra_body,
        )
        left_out = replica.left_out
        self.usage.requests += 1
        max_bytes = min(MAX_ANSWER_BYTES, BASE_ANSWER_BYTES + BYTES_PER_TOKEN * request.sampling.max_tokens * num)
        try:
            async with self._session.post(
                replica.url, data=json.dumps(body).encode(), headers=replica.headers, allow_redirects=False
            ) as reply:
                status, headers = reply.status, dict(reply.headers)
                answer = await _read(reply, max_bytes) if 200 <= status < 300 else await _read(reply, MAX_ERROR_BYTES, cut=True)
        except aiohttp.ClientConnectorError as e:
            raise TransientError("unreachable", replica.redact(str(e))) from e
        except TimeoutError as e:
            replica.rate_limit.record(refused=True)
            raise TransientError("timeout", f"no whole answer within {self._timeout_s:g} s") from e
        except (aiohttp.ClientError, ConnectionError) as e:
            raise TransientError("reset", f"the connection broke ({replica.redact(str(e)) or type(e).__name__})") from e
        if not 200 <= status < 300:
            raise self._refusal(replica, status, answer.decode(errors="replace"), headers, body)
        try:
            decoded, tokens_in, tokens_out = decode_answer(answer)
            usage = self.usage  # an answer without text is paid for too
            usage.tokens_in += tokens_in
            usage.tokens_out += tokens_out
            usage.cost += (tokens_in * target.price_in + tokens_out * target.price_out) / 1e6
            outs, empty = parse_completions(decoded, num, tokens_out, lambda choice: self.choice_text(choice, target))
        except ErrorInAnswer as e:
            raise self._refusal(replica, e.status, str(e), headers | e.headers, body) from e
        except TransientError:
            replica.mark_reachable()
            raise
        replica.mark_reachable()
        replica.rate_limit.record(refused=False)
        texts = replica.redactor.redact([out.text for out in outs], words=False)
        if not replica.sends_key and any(out.text != text for out, text in zip(outs, texts, strict=True)):
            replica.sends_key = True
            echo(f"{target.base_url} ({target.model}) sends the API key back in its answers, where it is hidden as {MARK}.", err=True)
        return [
            out if out.text == text and not left_out else replace(out, text=text, left_out=left_out)
            for out, text in zip(outs, texts, strict=True)
        ], empty

    def _refusal(self, replica: _Replica, status: int, said: str, headers: Mapping[str, str], body: Mapping[str, Any]) -> Exception:
        """What an error is to a row; `said` is what the server said, and `body` the request."""
        target = replica.target
        replica.rate_limit.record(refused=status in (429, 504))  # it does not keep up
        said = said[:MAX_ERROR_BYTES]
        words = replica.redact(said)
        if status in (400, 422) and self._goes_without(replica, said, body):
            return _FieldRefused()
        wait = retry_after_of(headers, rate_limited=status == 429)
        if status == 429:
            if wait and replica.rate_limit.limit < replica.rate_limit.max_limit:  # not one refusal among many answers: all wait
                replica.pause_until = max(replica.pause_until, time.monotonic() + wait)
            return TransientError("429", f"refused for its rate (429): {words}", status, wait)
        if status in (502, 503, 504) and replica.is_silent:
            return TransientError("unreachable", f"status {status}: {words}", status, wait)
        if status >= 500 or status in (408, 409, 425) or wait is not None:
            what = "the server failed" if status >= 500 else "refused for now"
            return TransientError(str(status), f"{what} ({status}): {words}", status, wait)
        if 300 <= status < 400:
            where = replica.redact(headers.get("Location", "")) or "elsewhere"
            words = f"{target.base_url} sends to {where} ({status}), where neither key nor prompts go: give the final address as base_url."
            if replica.answered_at is None:
                return InputError(words)
        if status in (401, 403, 404) and replica.answered_at is None:
            return InputError(_refusal_message(target, status, words))
        self.usage.failed += 1
        return RowFailed(f"refused ({status}): {words}", 1, status)

    def _goes_without(self, replica: _Replica, said: str, body: Mapping[str, Any]) -> bool:
        """Whether another request can do without the fields that the server's words refuse, which are left out from now on."""
        target = replica.target
        renamed = {"max_tokens": "max_completion_tokens", **target.fields}
        names = {name: name for name in FIELDS if name in body}  # what was sent, by what we call it
        names |= {name: other for name, other in renamed.items() if other and other in body and other not in target.extra_body}
        refused = refused_fields(said, names.values())
        helped = False
        for name, sent in names.items():
            if sent not in refused:
                continue
            if replica.fields.get(name, name) != sent:  # the refusal of another row came first
                helped = True
            elif what := replica.refuse(name):
                helped = True
                known = self.usage.refused_fields.setdefault(target.model, {})
                if name not in known:
                    echo(f"{target.base_url} ({target.model}) refuses {name}, which is {what}.", err=True)
                known[name] = what
        return helped

    # ---- many rows ----

    def generate(self, requests: Iterable[Request]) -> Iterator[tuple[Request, list[Completion]]]:
        """As `Generator.generate`, on an event loop of its own.

        Raises:
            RowFailed: a row failed for good. Use a `CachedClient` where the others shall go on.
        """

        async def answer(request: Request) -> tuple[Request, list[Completion]]:
            return request, await self.complete(request)

        async def rows() -> AsyncIterator[tuple[Request, list[Completion]]]:
            async with self:
                async for item in map_concurrent(requests, answer, WORKERS_PER_SLOT * self.concurrency):
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


async def _next(stream: AsyncIterator[Any]) -> Any:
    return await stream.__anext__()


async def _close(stream: Any) -> None:
    with contextlib.suppress(RuntimeError):
        await stream.aclose()


async def _read(reply: aiohttp.ClientResponse, max_bytes: int, *, cut: bool = False) -> bytes:
    """The decoded body of an answer, of which no more than `max_bytes` are ever made.

    Args:
        cut: return what there is at the limit, instead of failing.

    Raises:
        TransientError: it is longer, or cannot be decoded.
    """
    encodings = [name.strip().lower() for name in reply.headers.get("Content-Encoding", "").split(",") if name.strip()]
    if any(name not in ("gzip", "x-gzip", "deflate", "identity") for name in encodings) or len(encodings) > 1:
        reply.close()
        raise TransientError("malformed", "the answer is encoded in a way that was not asked for", reply.status)
    decoder = zlib.decompressobj(47) if encodings and encodings != ["identity"] else None
    body = bytearray()
    try:
        async for data in reply.content.iter_any():
            if decoder and decoder.eof:  # what comes after the end is no part of it
                reply.close()
                break
            body += decoder.decompress(data, max_bytes + 1 - len(body)) if decoder else data
            if len(body) > max_bytes:
                reply.close()  # what is on its way is not waited for
                if cut:
                    break
                raise TransientError("malformed", f"the answer is longer than {max_bytes:,} bytes", reply.status)
    except zlib.error as e:
        reply.close()
        raise TransientError("malformed", "the answer cannot be decompressed", reply.status) from e
    if decoder and not decoder.eof and not cut:
        raise TransientError("malformed", "the answer ends in its midst", reply.status)
    return bytes(body[:max_bytes])


def _backoff(error: TransientError, failures: int) -> float:
    """Seconds to wait after so many failures: the first is tried again at once, unless it was refused for its rate; as long as the
    server says, if that is longer."""
    doublings = failures - 1 if error.kind == "429" else failures - 2
    pause = min(MAX_BACKOFF, MIN_BACKOFF * 2**doublings) * random.uniform(0.5, 1.0) if doublings >= 0 else 0.0
    return max(pause, error.retry_after or 0.0)


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
            key = read_bytes(path).decode().strip()
        except ValueError as e:
            raise InputError(f"The key file {path} cannot be read ({reason(e)}).") from e
        if not key or len(key.split()) > 1:
            raise InputError(f"The key file {path} must hold the key and nothing else.")
        return key
    return ""


def _refusal_message(target: Target, status: int, words: str) -> str:
    if status == 404:
        what = f"{target.base_url} does not know the model {target.model!r} or the path (404)"
        return f"{what}: {words or 'no reason given'}. Check base_url, which ends in /v1 for most servers, and model."
    where = target.api_key_env or target.api_key_file or "api_key_env"
    return f"{target.base_url} refuses the key ({status}): {words or 'no reason given'}. Check the key in {where}."
