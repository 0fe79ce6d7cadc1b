"""What all routes of the studio share: store, rows, threads for what waits, the feed of events, and how requests are read."""

import asyncio
import contextlib
import functools
import json
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from aiohttp import web

from gristmill.core.echo import echo
from gristmill.core.errors import InputError
from gristmill.studio.apart import Told
from gristmill.studio.security import HEADERS
from gristmill.studio.sources import Sources
from gristmill.studio.store import Person, Refused, Store

BODY_SECONDS = 30.0
NUM_THREADS = 8
PULSE_SECONDS = 20.0
PROGRESS_SECONDS = 0.5  # between two lines
PERSON = web.RequestKey("person", Person)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
T = TypeVar("T")


class Events:
    """Feed of server-sent events: the last ones are kept, so that a page that comes back gets what it has missed."""

    def __init__(self) -> None:
        self._number = int(time.time() * 1000)  # goes on after a restart
        self._recent: deque[tuple[int, dict[str, Any]]] = deque(maxlen=500)
        self._changed = asyncio.Condition()
        self.closed = False
        self.num_streams = 0

    async def publish(self, **event: Any) -> None:
        """Add an event. It goes to everybody, so it names a project and nothing else."""
        async with self._changed:
            self._number += 1
            self._recent.append((self._number, event))
            self._changed.notify_all()

    async def close(self) -> None:
        """End all streams."""
        async with self._changed:
            self.closed = True
            self._changed.notify_all()

    async def after(self, number: int) -> AsyncIterator[tuple[int, dict[str, Any]] | None]:
        """Events after a number as they come; None where there was none for a while.

        A number of another server, before a restart, is answered by an empty event: what came between is not known any more.
        """
        number = number or self._number
        if number > self._number or (number < self._number and not self._recent):
            number = self._number
            yield number, {}
        while not self.closed:
            new = [event for event in list(self._recent) if event[0] > number]
            for event in new:
                number = event[0]
                yield event
            if new:
                continue
            async with self._changed:
                if self._number > number or self.closed:
                    continue
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), PULSE_SECONDS)
                    continue
            yield None


class Service:
    """A studio's store, rows and threads."""

    events: Events  # made where the server's loop runs

    def __init__(self, store: Store, sources: Sources):
        self.store, self.sources = store, sources
        self.threads = ThreadPoolExecutor(NUM_THREADS, "studio")

    async def in_thread(self, work: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """The result of a function that reads files or the database."""
        return await asyncio.get_running_loop().run_in_executor(self.threads, functools.partial(work, *args, **kwargs))


class Routes:
    """Handlers of some routes. `handlers` names them; who may call which stands in `security.ROUTES`."""

    def __init__(self, service: Service):
        self.service, self.store, self.sources, self.in_thread = service, service.store, service.sources, service.in_thread

    @property
    def handlers(self) -> Mapping[tuple[str, str], Handler]:
        raise NotImplementedError

    async def close(self) -> None:
        """End what these routes have begun."""


async def body_of(request: web.Request) -> dict[str, Any]:
    """The JSON object of a request.

    Raises:
        InputError: it is none, or does not arrive.
    """
    try:
        async with asyncio.timeout(BODY_SECONDS):
            raw = await request.read()
    except TimeoutError:
        raise Refused(408, f"The request did not arrive within {BODY_SECONDS:g} s.") from None
    try:
        body = json.loads(raw or b"{}")
    except (ValueError, RecursionError):
        raise InputError("The request is not JSON.") from None
    if not isinstance(body, dict):
        raise InputError("The request must be a JSON object.")
    return body


def text_of(body: dict[str, Any], name: str, most: int = 4000) -> str:
    """A text of a request; "" where it is not given."""
    value = body.get(name, "")
    if not isinstance(value, str) or len(value) > most:
        raise InputError(f"`{name}` must be text of at most {most:,} characters.")
    return value


def whole_of(body: dict[str, Any], name: str, default: int, *, low: int, high: int) -> int:
    """A whole number of a request, within bounds."""
    value = body.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InputError(f"{name} must be a whole number from {low:,} to {high:,}.")
    return value


def number_of(request: web.Request, name: str, default: int) -> int:
    """A whole number of a request's address."""
    value = request.query.get(name)
    if value is None or value == "":
        return default
    if not value.isascii() or not value.isdigit() or len(value) > 12:
        raise InputError(f"`{name}` must be a whole number.")
    return int(value)


async def progress_reply(
    request: web.Request, service: Service, work: Callable[[Told, threading.Event], dict[str, Any]]
) -> web.StreamResponse:
    """The result of work in a thread. Where that takes time and tells how far it is, lines of JSON say so before the result.

    The work gets an event that ends it: its page has gone, or the server stops.
    """
    stop, far, reply = threading.Event(), list[tuple[int, int]](), lines_reply()
    first: tuple[float, int] | None = None  # when the first of it was done, and how much that was
    task = asyncio.ensure_future(service.in_thread(work, lambda *now: far.append(now), stop))

    async def write(line: dict[str, Any]) -> None:
        if not reply.prepared:
            await reply.prepare(request)
        with contextlib.suppress(ConnectionError):  # the page has gone: the next look says so
            await reply.write(json.dumps(line).encode() + b"\n")

    try:
        while not (await asyncio.wait({task}, timeout=PROGRESS_SECONDS))[0]:
            if service.events.closed or request.transport is None or request.transport.is_closing():
                stop.set()
            elif far:
                done, of = far[-1]
                first = first or ((time.monotonic(), done) if done else None)
                each = (time.monotonic() - first[0]) / (done - first[1]) if first and done > first[1] else 0.0
                await write({"done": done, "of": of, "left": round(each * (of - done), 1)})
        result = await task
    except Exception as e:
        if not reply.prepared:
            raise
        if not isinstance(e, InputError):
            echo(f"gristmill studio: {type(e).__name__} in {request.method} {request.path}: {e}", err=True)
        result = {"error": str(e) if isinstance(e, InputError) else f"The server failed ({type(e).__name__}): nothing of it is kept."}
    finally:
        stop.set()
    if not reply.prepared:
        return json_reply(result)
    await write(result)
    return reply


def lines_reply() -> web.StreamResponse:
    """A reply of lines of JSON, written as they come."""
    return web.StreamResponse(headers={**HEADERS, "Content-Type": "application/x-ndjson", "Cache-Control": "no-store"})


def json_reply(value: Any, status: int = 200) -> web.Response:
    """A value as an answer."""
    return web.json_response(value, status=status)


def error_reply(status: int, message: str, **more: Any) -> web.Response:
    """One sentence as an answer."""
    return web.json_response({"error": message, **more}, status=status)
