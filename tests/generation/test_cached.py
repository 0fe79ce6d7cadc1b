"""What is asked once is in the journal: nothing is bought twice, lost or doubled, whatever ends the process."""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gristmill.data.chat import Message
from gristmill.generation.api import Completion, Request, SamplingParams
from gristmill.generation.cached import BatchingClient, CachedClient
from gristmill.generation.endpoint import Endpoint, RowFailed, Target
from gristmill.runs.journal import Journal


def ask(name: str, text: str = "", n: int = 1) -> Request:
    return Request(name, (Message("user", text or f"row {name}"),), SamplingParams(n=n))


def answers(server: Any, path: Path, requests: Iterable[Request], **options: Any) -> dict[str, str]:
    async def run() -> dict[str, str]:
        async with Endpoint([Target(server.url, "mock")], timeout=60.0, retries=1) as endpoint:
            with Journal(path) as journal:
                stream = CachedClient(endpoint, journal, **options).stream(requests)
                return {r.id: str(result) if isinstance(result, RowFailed) else result[0].text async for r, result in stream}

    return asyncio.run(run())


def test_what_was_answered_is_not_asked_again(endpoint: Any, tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    first = answers(endpoint, path, [ask(str(n)) for n in range(20)])
    again = answers(endpoint, path, [ask(str(n)) for n in range(25)])
    assert first == {str(n): f"answer to row {n}" for n in range(20)} and again.items() > first.items()
    assert endpoint.stats()["requests"] == 25


def test_equal_prompts_with_different_ids_are_different_rows(endpoint: Any, tmp_path: Path) -> None:
    assert len(answers(endpoint, tmp_path / "j.jsonl", [ask(str(n), "the same") for n in range(10)])) == 10
    assert endpoint.stats()["requests"] == 10


def test_the_same_row_asked_twice_at_once_is_bought_once(endpoint: Any, tmp_path: Path) -> None:
    assert answers(endpoint, tmp_path / "j.jsonl", [ask("a"), ask("a"), ask("b", "b [fate 400]"), ask("b", "b [fate 400]")]).keys() == {
        "a",
        "b",
    }
    assert endpoint.stats()["requests"] == 2


def test_failed_rows_are_records_and_are_asked_again_only_on_demand(endpoint: Any, tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    rows = [ask("a"), ask("b", "b [fate 500 500 ok]")]
    failed = answers(endpoint, path, rows)["b"]
    assert "the server failed (500)" in failed
    record = json.loads(path.read_text().splitlines()[-1])
    del record["error"]
    assert record == {"id": "b", "model": "mock", "attempts": 2, "status": 500, "prompt": rows[1].messages[0].content}
    assert answers(endpoint, path, rows)["b"] == failed and endpoint.stats()["requests"] == 3
    assert answers(endpoint, path, rows, retry_failed=True)["b"].startswith("answer to b") and endpoint.stats()["requests"] == 4
    assert answers(endpoint, path, rows)["b"].startswith("answer to b") and endpoint.stats()["requests"] == 4


def test_a_record_that_cannot_be_read_is_asked_again(endpoint: Any, tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    outs: list[Any] = [None, [], [["text"]], [[3, 1, None, "stop"]], "text", {"a": 1}]
    path.write_text(
        "".join(json.dumps({"id": str(n), "out": out}) + "\n" for n, out in enumerate(outs)) + '{"id": "x"}\n{"id": "y", "error": 3}\n'
    )
    names = [*map(str, range(len(outs))), "x", "y"]
    assert answers(endpoint, path, map(ask, names)) == {name: f"answer to row {name}" for name in names}
    assert answers(endpoint, path, map(ask, names)) == {name: f"answer to row {name}" for name in names}
    assert endpoint.stats()["requests"] == len(names)


def test_what_was_asked_without_a_refused_field_is_told_again(tmp_path: Path) -> None:
    class Source(Echo):
        async def complete(self, request: Request, model: str = "") -> list[Completion]:
            return [Completion("fine", 1, (), "stop", left_out=("seed", "temperature") if request.id == "a" else ())]

        concurrency = 4

        def model_of(self, request_id: str) -> str:
            return "m"

    async def run() -> CachedClient:
        with Journal(tmp_path / "j.jsonl") as journal:
            client = CachedClient(Source(), journal)
            for name in ("a", "b"):
                await client.complete(ask(name))
            return client

    for found in (0, 2):
        client = asyncio.run(run())
        assert client.found == found and client.left_out == Counter({"seed": 1, "temperature": 1})


CLIENT = """
import asyncio, resource, sys, threading, time
from pathlib import Path
from gristmill.data.chat import Message
from gristmill.generation.api import Request
from gristmill.generation import cached
from gristmill.generation.endpoint import Endpoint, Target
from gristmill.runs.journal import Journal

url, path, rows, full = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
cached.DISK_PAUSE = 0.05

def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

full_disk, echo = threading.Event(), cached.echo

def told(*words, **options):
    echo(*words, **options)
    full_disk.set()

def space():
    full_disk.wait()
    time.sleep(0.2)
    limit(resource.RLIM_INFINITY)

if full:  # the disk is full after so many bytes, and has space again a little after that was told
    cached.echo = told
    limit(full)
    threading.Thread(target=space, daemon=True).start()

async def main():
    requests = (Request(str(n), (Message("user", f"row {n}"),)) for n in range(rows))
    async with Endpoint([Target(url, "mock")], concurrency=16) as endpoint:
        with Journal(path) as journal:
            async for request, result in cached.CachedClient(endpoint, journal).stream(requests):
                assert result[0].text == f"answer to row {request.id}"
            print(len(journal))

asyncio.run(main())
"""


def client(server: Any, path: Path, rows: int, full: int = 0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CLIENT, server.url, str(path), str(rows), str(full)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX")
def test_killed_at_random_moments_it_loses_and_doubles_nothing(start_endpoint: Callable[..., Any], tmp_path: Path) -> None:
    server, path, rng = start_endpoint(latency=0.02), tmp_path / "j.jsonl", random.Random(0)
    kills = rows = 0
    while kills < 6:
        known = path.read_bytes().count(b"\n") if path.exists() else 0
        rows = known + 100
        process = client(server, path, rows)
        target = known + rng.randint(1, 60)
        while process.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < target):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL  # else it was done before
        process.communicate()
    out, err = client(server, path, rows).communicate(timeout=300)
    assert out.strip() == str(rows), err
    counts = Counter(json.loads(line)["id"] for line in path.read_text().splitlines())
    assert len(counts) == rows and set(counts.values()) == {1}
    # sent again at most what was in flight at a kill
    assert server.stats()["requests"] <= rows + kills * 16


@pytest.mark.skipif(os.name != "posix", reason="file size limits are POSIX")
def test_a_disk_that_is_full_for_a_while_is_waited_for(start_endpoint: Callable[..., Any], tmp_path: Path) -> None:
    server = start_endpoint(latency=0.005)
    out, err = client(server, tmp_path / "j.jsonl", 200, full=4000).communicate(timeout=300)
    assert out.strip() == "200", err
    assert err.count("free some space") == 1 and server.stats()["requests"] == 200


class Echo:
    """A generator that answers at once, and fails on demand."""

    name = "echo"

    def __init__(self) -> None:
        self.waves: list[int] = []

    def generate(self, requests: Iterable[Request]) -> Iterator[tuple[Request, list[Completion]]]:
        wave = list(requests)
        self.waves.append(len(wave))
        for request in reversed(wave):
            if request.id == "broken":
                raise ValueError("no model")
            yield request, [Completion(f"echo {request.id}", 1, (-1.0,), "stop")] * request.sampling.n


def test_a_generator_answers_what_waits_together(tmp_path: Path) -> None:
    echo = Echo()

    async def run() -> list[str]:
        with Journal(tmp_path / "j.jsonl") as journal:
            client = CachedClient(BatchingClient(echo), journal)

            async def chain(name: str) -> str:
                first = await client.complete(ask(name))
                second = await client.complete(ask(first[0].text))
                return second[0].text

            return await asyncio.gather(*(chain(str(n)) for n in range(10)))

    assert asyncio.run(run()) == [f"echo echo {n}" for n in range(10)]
    assert echo.waves == [10, 10]
    assert asyncio.run(run()) == [f"echo echo {n}" for n in range(10)] and echo.waves == [10, 10]


def test_a_row_that_is_cancelled_harms_no_other_of_its_wave() -> None:
    async def run() -> list[Any]:
        source = BatchingClient(Echo())
        rows = [asyncio.ensure_future(source.complete(ask(str(n)))) for n in range(3)]
        await asyncio.sleep(0)
        rows[0].cancel()
        return await asyncio.gather(*rows, return_exceptions=True)

    cancelled, *others = asyncio.run(run())
    assert isinstance(cancelled, asyncio.CancelledError) and [outs[0].text for outs in others] == ["echo 1", "echo 2"]


def test_the_same_request_may_wait_twice() -> None:
    async def run() -> list[Any]:
        source, request = BatchingClient(Echo()), ask("a")
        return await asyncio.wait_for(asyncio.gather(source.complete(request), source.complete(request)), 10)

    assert [outs[0].text for outs in asyncio.run(run())] == ["echo a"] * 2


def test_a_broken_generator_is_heard_of(tmp_path: Path) -> None:
    async def run() -> None:
        with Journal(tmp_path / "j.jsonl") as journal:
            await CachedClient(BatchingClient(Echo()), journal).complete(ask("broken"))

    with pytest.raises(ValueError, match="no model"):
        asyncio.run(run())
