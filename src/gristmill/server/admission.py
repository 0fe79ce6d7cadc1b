"""Admission of HTTP requests: keys, load, time and bodies, and the errors that requests end with.

What can be refused by its headers is refused before its body is read. Every limit counts what arrives.
"""

import asyncio
import contextlib
import hmac
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from aiohttp import hdrs, web

from gristmill.core.errors import InputError
from gristmill.engine.async_engine import AsyncEngine
from gristmill.server.connections import BODY_SECONDS, SEND_SECONDS, Connection, log_failure
from gristmill.server.metrics import Metrics
from gristmill.server.protocol import FieldError
from gristmill.server.responses import error_response

MAX_BODY_BYTES = 4 << 20
MAX_BODIES_BYTES = 64 << 20  # of all requests that are on their way
CLIENT_CLOSED_REQUEST = 499
STREAM = web.RequestKey("stream", web.StreamResponse)  # the answer that has begun
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class HttpError(Exception):
    """HTTP error: a request that gets this status and these words."""

    def __init__(self, status: int, message: str, *, code: str | None = None):
        super().__init__(message)
        self.status, self.code = status, code


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


class Admission:
    """What stands around the handlers of all routes."""

    def __init__(self, limits: Limits, async_engine: AsyncEngine, metrics: Metrics):
        self.limits, self.async_engine, self.metrics = limits, async_engine, metrics
        self._num_posts = self._body_bytes = 0

    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        http, started = request, time.monotonic()
        connection = http.protocol if isinstance(http.protocol, Connection) else None
        resource = http.match_info.route.resource
        known, path = resource is not None, resource.canonical if resource is not None else "?"
        post = http.method == hdrs.METH_POST
        self._num_posts += post
        try:
            refused = self._refuse(http)
            if connection is not None and refused is None:
                if http.path != "/health" or not self.limits.api_keys:
                    connection.trust()
                if post:
                    connection.wait(BODY_SECONDS + SEND_SECONDS)
                else:
                    connection.work(self.limits.timeout)
            reply = refused or await self._handle_errors(http, handler)
        except asyncio.CancelledError:
            self.metrics.requests.labels(path, "gone").inc()
            raise
        finally:
            self._num_posts -= post
            if connection is not None:
                connection.wait()
        self.metrics.requests.labels(path, str(reply.status)).inc()
        if known and post and reply.status == 200:
            self.metrics.seconds.observe(time.monotonic() - started)
        return reply

    def _refuse(self, http: web.Request) -> web.Response | None:
        """What is refused by its headers alone. Its body is not read, and the connection ends."""
        encoding = http.headers.get(hdrs.CONTENT_ENCODING, "identity").strip().lower()
        if self.limits.api_keys and http.path != "/health" and not self._has_key(http):
            reply = error_response(401, "this server wants an API key: send `Authorization: Bearer KEY`")
        elif encoding not in ("", "identity"):
            reply = error_response(415, "the body is compressed, which is not taken: send it as it is, without Content-Encoding")
        elif (http.content_length or 0) > MAX_BODY_BYTES:
            reply = error_response(413, f"the body has more than {MAX_BODY_BYTES:,} bytes: send less at once")
        elif http.method == hdrs.METH_POST and not self.async_engine.healthy:
            reply = error_response(503, "the engine is broken: start the server again")
        elif http.method == hdrs.METH_POST and self._num_posts > self.limits.max_open_samples:
            reply = error_response(429, "too many requests are waiting: come back later")
        else:
            return None
        if http.body_exists:
            reply.force_close()
        return reply

    def _has_key(self, http: web.Request) -> bool:
        given = http.headers.get(hdrs.AUTHORIZATION, "").removeprefix("Bearer ").encode(errors="surrogateescape")
        return any([hmac.compare_digest(given, key.encode()) for key in self.limits.api_keys])

    async def expect(self, http: web.Request) -> web.StreamResponse | None:
        """`Expect: 100-continue`: a client that would be refused need not send its body."""
        if (refused := self._refuse(http)) is not None:
            return refused
        if http.headers.get(hdrs.EXPECT, "").lower() == "100-continue":
            await http.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            http.writer.output_size = 0
        return None

    async def _handle_errors(self, http: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            async with asyncio.timeout(self.limits.timeout):
                return await handler(http)
        except HttpError as e:
            return await self._error_reply(http, error_response(e.status, str(e), code=e.code))
        except web.HTTPNotFound:
            paths = sorted({resource.canonical for resource in http.app.router.resources()})
            return error_response(404, f"this server has no such path: ask one of {', '.join(paths)}")
        except web.HTTPMethodNotAllowed as e:
            return error_response(405, f"this path takes no such method: ask it with {' or '.join(sorted(e.allowed_methods))}")
        except web.HTTPException as e:
            return error_response(e.status, e.reason.lower())
        except InputError as e:
            return await self._error_reply(http, error_response(400, str(e), param=e.field if isinstance(e, FieldError) else None))
        except TimeoutError:
            return await self._error_reply(http, error_response(504, f"no answer within {self.limits.timeout:g} s"))
        except ConnectionError:  # whoever asked is not there any more, and nobody reads this
            return web.Response(status=CLIENT_CLOSED_REQUEST)
        except Exception as e:
            log_failure(e)
            return await self._error_reply(http, error_response(500, f"the engine failed ({type(e).__name__})"))

    async def _error_reply(self, http: web.Request, answer: web.Response) -> web.StreamResponse:
        """Error response of its own, or the last event of a stream that has begun."""
        reply = http.get(STREAM)
        if reply is None:
            if http.body_exists and not http.content.at_eof():
                answer.force_close()
            return answer
        with contextlib.suppress(ConnectionError):
            await reply.write(b"data: " + (answer.body if isinstance(answer.body, bytes) else b"{}") + b"\n\n")
            await reply.write_eof()
        return reply

    def check_capacity(self, samples: int) -> None:
        """Refuse a request of so many samples where too many are under way."""
        if self.async_engine.num_open + samples > self.limits.max_open_samples:
            raise HttpError(429, "too many requests are waiting, or this one is too large: come back later")

    async def read_body(self, http: web.Request) -> bytes:
        """The body, counted as it arrives."""
        raw = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in http.content.iter_any():
                    raw += part
                    self._body_bytes += len(part)
                    if len(raw) > MAX_BODY_BYTES:
                        raise HttpError(413, f"the body has more than {MAX_BODY_BYTES:,} bytes: send less at once")
                    if self._body_bytes > MAX_BODIES_BYTES:
                        raise HttpError(429, "too many large requests are on their way: come back later")
        except TimeoutError as e:
            raise HttpError(408, f"the body did not arrive within {BODY_SECONDS:g} s") from e
        except web.RequestPayloadError as e:
            raise InputError("the body is not as its headers say") from e
        finally:
            self._body_bytes -= len(raw)
        return bytes(raw)
