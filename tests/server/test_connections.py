"""Connections that keep the server waiting have deadlines and make room for others; nothing of a request is read before its key."""

import asyncio
import json
import resource
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web

from gristmill.data.chat_format import FORMATS
from gristmill.engine.engine import Engine
from gristmill.model.hf import load_model
from gristmill.server import admission, connections
from gristmill.server.admission import Limits
from gristmill.server.app import Server
from gristmill.server.connections import ConnectionPool, connection_limit

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


@asynccontextmanager
async def listening(tiny_base: Path, max_connections: int, *keys: str) -> AsyncIterator[tuple[ConnectionPool, int]]:
    server = Server(Engine(*load_model(tiny_base), FORMATS["nemotron"], name="tiny", max_batch=4), Limits(keys))
    runner = web.AppRunner(server.app(), access_log=None, handler_cancellation=True)
    await runner.setup()
    assert runner.server is not None
    pool = server.pool = ConnectionPool(runner.server, max_connections)
    listener = await asyncio.get_running_loop().create_server(pool, "127.0.0.1", 0)
    try:
        yield pool, listener.sockets[0].getsockname()[1]
    finally:
        listener.close()
        pool.stop()
        await runner.cleanup()


async def opened(port: int, begin: bytes = b"") -> Streams:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(begin)
    await asyncio.sleep(0.02)
    return reader, writer


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


async def answer(streams: Streams) -> tuple[int, dict[str, object]]:
    """Status and body of the next answer."""
    reader, _ = streams
    head = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)).decode()
    length = int(head.lower().split("content-length: ")[1].split("\r\n")[0])
    return int(head.split()[1]), json.loads(await reader.readexactly(length))


async def closed(streams: Streams) -> bool:
    try:
        return not await asyncio.wait_for(streams[0].read(), 60)
    except ConnectionError:
        return True


def test_half_open_connections_make_room_the_oldest_first(tiny_base: Path) -> None:
    async def go() -> None:
        async with listening(tiny_base, 8) as (pool, port):
            kept = await opened(port, HEALTH)
            assert (await answer(kept))[0] == 200
            half = [await opened(port, b"GET /health HTTP/1.1\r\nX-a: ") for _ in range(12)]
            await until(lambda: len(pool.connections) == 8 and pool.num_dropped["room"] == 5)
            assert all([await closed(one) for one in half[:5]])
            assert (await answer(await opened(port, HEALTH)))[0] == 200, "an honest newcomer is served"
            kept[1].write(HEALTH)
            assert (await answer(kept))[0] == 200, "who has asked properly is not dropped for those who have not"
            half[-1][1].write(b"a\r\nHost: x\r\n\r\n")
            assert (await answer(half[-1]))[0] == 200

    asyncio.run(go())


def test_where_all_are_at_work_a_newcomer_is_told_to_come_back(tiny_base: Path) -> None:
    async def go() -> None:
        async with listening(tiny_base, 2) as (pool, port):
            busy = [await opened(port) for _ in range(2)]
            await until(lambda: len(pool.connections) == 2)
            for connection in pool.connections:
                connection.work(60)
            status, body = await answer(await opened(port))
            assert status == 503 and "come back later" in str(body["error"])
            assert pool.num_dropped == {"refused": 1} and len(pool.connections) == len(busy)

    asyncio.run(go())


def test_headers_bodies_and_idleness_have_deadlines(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "SWEEP_SECONDS", 0.05)
    monkeypatch.setattr(connections, "HEADER_SECONDS", 2.0)
    monkeypatch.setattr(admission, "BODY_SECONDS", 0.3)

    async def go() -> None:
        async with listening(tiny_base, 8) as (pool, port):
            silent = await opened(port)
            slow = await opened(port, b"GET /health HTTP/1.1\r\nX-a: ")
            for _ in range(5):  # what dribbles in does not put the end off
                slow[1].write(b"a")
                await asyncio.sleep(0.03)
            status, body = await answer(slow)
            assert status == 408 and "did not arrive" in str(body["error"])
            assert await closed(silent) and await closed(slow)
            head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"
            status, body = await answer(waiting := await opened(port, head))
            assert status == 408 and "body did not arrive" in str(body["error"]) and await closed(waiting)
            await until(lambda: not pool.connections)
            idle = await opened(port, HEALTH)
            await answer(idle)
            next(iter(pool.connections)).wait(0.1)
            assert await closed(idle)
            await until(lambda: not pool.connections and pool.num_dropped["deadline"] == 3)

    asyncio.run(go())


def test_without_a_key_nothing_of_a_body_is_read(tiny_base: Path) -> None:
    packed = zlib.compress(b" " * (64 << 20))

    async def go() -> None:
        async with listening(tiny_base, 8, "right") as (_, port):

            async def ask(*headers: str, body: bytes = b"{}", length: int | None = None) -> tuple[int, bool]:
                size = len(body) if length is None else length
                lines = "".join(f"{line}\r\n" for line in (f"Content-Length: {size}", "Host: x", *headers))
                streams = await opened(port, f"POST /v1/completions HTTP/1.1\r\n{lines}\r\n".encode() + body)
                status, reply = await answer(streams)
                error = reply["error"]
                assert isinstance(error, dict) and set(error) == {"message", "type", "param", "code"} and error["message"]
                return status, status != 400 and await closed(streams)

            key = "Authorization: Bearer right"
            assert await ask(body=packed, length=10**9) == (401, True), "answered although the body never comes"
            assert await ask("Content-Encoding: deflate", body=packed) == (401, True)
            for encoding in ("deflate", "gzip", "br", "identity, gzip"):
                assert await ask(key, f"Content-Encoding: {encoding}", body=packed) == (415, True)
            assert await ask(key, body=b"{", length=(4 << 20) + 1) == (413, True)
            assert await ask(key, "Content-Encoding: identity") == (400, False)
            assert (await ask("Expect: 100-continue", body=b"", length=10))[0] == 401, "and no 100 before it"
            whole = b"%x\r\n" % (5 << 20) + b" " * (5 << 20)
            chunked = await opened(
                port, f"POST /v1/completions HTTP/1.1\r\nHost: x\r\n{key}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
            )
            chunked[1].write(whole)
            assert (await answer(chunked))[0] == 413, "what arrives is counted"

    asyncio.run(go())


def test_what_is_no_http_is_answered_and_not_logged(tiny_base: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def go() -> None:
        async with listening(tiny_base, 8) as (_, port):
            for raw in (b"\0" * 100 + b"\r\n\r\n", b"GET / HTTP/1.1\r\nX: " + b"evil" * 5000 + b"\r\n\r\n", b"evil / HTTP/1.1\r\n\r\n"):
                status, body = await answer(await opened(port, raw))
                assert status in (400, 405) and "evil" not in str(body) and isinstance(body["error"], dict)

    asyncio.run(go())
    assert "evil" not in caplog.text and "Traceback" not in caplog.text


def test_there_are_fewer_connections_than_files() -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert connections.MIN_CONNECTIONS <= connection_limit() <= connections.MAX_CONNECTIONS
    assert connection_limit() < resource.getrlimit(resource.RLIMIT_NOFILE)[0] and resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= soft
