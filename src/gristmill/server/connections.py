"""HTTP connections under limits that hold before a request is parsed: how many, how long each may keep the server waiting, what is logged.

A connection waits for its client while it has sent no request, a part of one, or the body is on its way. Such connections have deadlines,
and are what makes room when there are too many: first those that have shown no key, of the address that has most of them the oldest.
"""

import asyncio
import logging
import os
import resource
import time
from collections import Counter
from typing import Any

from aiohttp import web

from gristmill.core.logs import short_traceback
from gristmill.server.responses import error_response

MAX_CONNECTIONS = 4096
HEADER_SECONDS = 15.0  # for the request line and headers, from the connection or the request's first byte on
BODY_SECONDS = 60.0
IDLE_SECONDS = 75.0  # between two requests of a connection
SEND_SECONDS = 60.0  # beyond the time of an answer
SWEEP_SECONDS = 1.0
LINGER_SECONDS = 2.0  # in which what still arrives of a refused request is thrown away, so that its client reads why
ACCEPT_BURST = 16  # connections that asyncio accepts in a turn of its loop; each is counted, and another dropped for it, some turns later
RESERVED_FILES = 16 * ACCEPT_BURST + 64  # for those, and for what else opens files
WANTED_FILES = MAX_CONNECTIONS + 1024
MIN_CONNECTIONS = 16

log = logging.getLogger(__name__)


def connection_limit() -> int:
    """Connections that there are files for. The process's own limit is raised as far as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    if soft != unlimited and soft < WANTED_FILES:
        soft = WANTED_FILES if hard == unlimited else max(soft, min(hard, WANTED_FILES))
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    num_open = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 64
    left = MAX_CONNECTIONS if soft == unlimited else soft - num_open - RESERVED_FILES
    return max(MIN_CONNECTIONS, min(MAX_CONNECTIONS, left))


class Connection(web.RequestHandler):  # type: ignore[type-arg,unused-ignore]
    """HTTP connection of a pool.

    Attributes:
        deadline: when it is dropped unless it has moved on.
        waits: whether its client is waited for.
        trusted: whether it has borne a key that is right.
    """

    __slots__ = ("address", "begun", "deadline", "pool", "socket", "trusted", "waits")

    def __init__(self, pool: "ConnectionPool", server: web.Server) -> None:
        super().__init__(
            server,
            loop=asyncio.get_running_loop(),
            access_log=None,  # type: ignore[arg-type]
            auto_decompress=False,
            tcp_keepalive=False,  # the deadlines see to that
            lingering_time=LINGER_SECONDS,
            keepalive_timeout=IDLE_SECONDS,
        )
        self.pool, self.address = pool, ""
        self.socket: asyncio.Transport | None = None
        self.begun = self.trusted = self.waits = False
        self.deadline = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.socket = transport
        peer = transport.get_extra_info("peername")
        self.address = str(peer[0]) if isinstance(peer, tuple) else ""
        if not self.pool.add(self):
            self.close_with(503, "the server has as many connections as it can hold: come back later")
            return
        self.wait(HEADER_SECONDS)
        super().connection_made(transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        self.pool.remove(self)
        self.socket = None
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.waits and not self.begun:
            self.begun, self.deadline = True, time.monotonic() + HEADER_SECONDS
        super().data_received(data)

    def trust(self) -> None:
        """A request has borne a key that is right, or none is asked for."""
        self.pool.unlist(self)
        self.trusted = True

    def work(self, seconds: float) -> None:
        """The request is here, and answered within so many seconds."""
        self.pool.unlist(self)
        self.deadline = time.monotonic() + seconds + SEND_SECONDS

    def wait(self, seconds: float = IDLE_SECONDS) -> None:
        """Wait for the client: for its next request, or for more of this one."""
        self.pool.unlist(self)
        self.begun, self.deadline = False, time.monotonic() + seconds
        self.pool.enlist(self)

    def close_with(self, status: int, words: str) -> None:
        """Answer an error outside of any request, and close."""
        if self.socket is None:
            return
        if self.socket.get_write_buffer_size():  # an answer is under way that nobody reads
            self.socket.abort()
            return
        reply = error_response(status, words)
        body = reply.body if isinstance(reply.body, bytes) else b""
        head = dict(reply.headers) | {"Content-Length": str(len(body)), "Connection": "close"}
        lines = "".join(f"{name}: {value}\r\n" for name, value in head.items())
        self.socket.write(f"HTTP/1.1 {status} {reply.reason}\r\n{lines}\r\n".encode() + body)
        self.socket.close()

    def drop(self, why: str) -> None:
        """Close a connection whose time is up, or whose place another needs."""
        self.pool.num_dropped[why] += 1
        half = self.waits and self.begun
        self.pool.remove(self)
        if self.socket is not None and half and why == "deadline":
            self.close_with(408, f"the request did not arrive within {HEADER_SECONDS:g} s")
        elif self.socket is not None:
            self.socket.abort()

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """Answer what is no HTTP. What the client wrote is neither logged nor repeated."""
        if status >= 500:
            log_failure(exc)
        if request.writer.output_size > 0:
            raise ConnectionError("an answer has begun already")
        reply = error_response(
            status, "this is no HTTP request, or a line or header of it is too long" if status < 500 else "the server failed"
        )
        reply.force_close()
        return reply

    def log_exception(self, *args: Any, **kw: Any) -> None:
        log_failure(kw.get("exc_info"))


class ConnectionPool:
    """Connections of a server, at most so many. Call it for a new one, as `asyncio.loop.create_server` does.

    Attributes:
        num_dropped: connections that were closed by reason: "deadline", "room", "refused".
    """

    def __init__(self, server: web.Server, max_connections: int) -> None:
        self.server, self.max_connections = server, max_connections
        self.connections: dict[Connection, None] = {}
        self.num_dropped: Counter[str] = Counter()
        self._waiting: dict[tuple[bool, str], dict[Connection, None]] = {}  # by trust and address, each the oldest first
        self._sweeper = asyncio.get_running_loop().call_later(SWEEP_SECONDS, self._sweep)

    def __call__(self) -> Connection:
        return Connection(self, self.server)

    def add(self, connection: Connection) -> bool:
        """Count a connection in; another that keeps the server waiting makes room for it. False if there is none."""
        if len(self.connections) >= self.max_connections:
            groups = [(not trusted, len(group), group) for (trusted, _), group in self._waiting.items()]
            if not groups:
                self.num_dropped["refused"] += 1
                return False
            next(iter(max(groups, key=lambda group: group[:2])[2])).drop("room")
        self.connections[connection] = None
        return True

    def remove(self, connection: Connection) -> None:
        """Count a connection out."""
        self.unlist(connection)
        self.connections.pop(connection, None)

    def enlist(self, connection: Connection) -> None:
        """Put a connection behind those that keep the server waiting."""
        if connection not in self.connections:  # it was dropped meanwhile
            return
        connection.waits = True
        self._waiting.setdefault((connection.trusted, connection.address), {})[connection] = None

    def unlist(self, connection: Connection) -> None:
        """Take a connection out of those that keep the server waiting."""
        if connection.waits:
            connection.waits = False
            group = self._waiting[connection.trusted, connection.address]
            del group[connection]
            if not group:
                del self._waiting[connection.trusted, connection.address]

    def stop(self) -> None:
        """End the sweeps."""
        self._sweeper.cancel()

    def _sweep(self) -> None:
        now = time.monotonic()
        for connection in [one for one in self.connections if one.deadline < now]:
            connection.drop("deadline")
        self._sweeper = asyncio.get_running_loop().call_later(SWEEP_SECONDS, self._sweep)


def log_failure(error: BaseException | None) -> None:
    """Log what the server itself did wrong."""
    log.error("a request failed: %s", short_traceback(error) if isinstance(error, BaseException) else "?")
