"""The server process through our own endpoint client: the same answers as the engine's own."""

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from gristmill.chat import Message
from gristmill.engine.generator import Request, Sampling
from gristmill.jobs import chat_format_of
from gristmill.model.weights import load_model
from gristmill.synth.endpoint import Endpoint, Target


@pytest.fixture(scope="module")
def served(tiny_base: Path) -> Iterator[tuple[Path, str]]:
    command = [sys.executable, "-m", "gristmill.cli", "serve", str(tiny_base), "--port", "0", "--name", "tiny"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("tiny answers at http://127.0.0.1:"), line
    yield tiny_base, line.split()[-1]
    process.terminate()
    assert process.wait(20) == 0


def ask(text: str, **sampling: Any) -> Request:
    return Request(text, (Message("user", text),), Sampling(**sampling))


def test_greedy_answers_are_the_engines(served: tuple[Path, str]) -> None:
    from gristmill.engine.engine import Engine

    folder, url = served
    model, tokenizer = load_model(folder)
    engine = Engine(model, tokenizer, chat_format_of("auto", tokenizer), "tiny", 8)
    words = ("Name a land.", "Name a thing to count.", "Name a kind of input for a function.", "Write a word sum about eggs.")
    requests = [ask(f"{text}{' Really.' * n}", temperature=0.0, max_tokens=24) for text in words for n in range(3)]
    own = {request.id: outs[0] for request, outs in engine.generate(requests)}
    filled = {name for name, out in own.items() if out.text.strip()}
    there = {r.id: outs[0] for r, outs in Endpoint([Target(url, "tiny")]).generate([r for r in requests if r.id in filled])}
    assert len(filled) > 3 and {name: (out.text, out.num_tokens, out.finish) for name, out in there.items()} == {
        name: (own[name].text, own[name].num_tokens, own[name].finish) for name in filled
    }


def test_the_same_seed_draws_the_same_samples(served: tuple[Path, str]) -> None:
    requests = [ask("Name a land.", n=3, max_tokens=24)]
    draws = [[out.text for _, outs in Endpoint([Target(served[1], "tiny")]).generate(requests) for out in outs] for _ in range(2)]
    assert draws[0] == draws[1] and len(draws[0]) == 3


def test_odd_numbers_of_one_request_break_no_other(served: tuple[Path, str]) -> None:
    odd = [{"top_k": 2**63 - 1}, {"temperature": 1e-40}, {"n": 3, "max_tokens": 10**9}]

    async def post() -> list[int]:
        async with aiohttp.ClientSession() as session:

            async def one(extra: dict[str, Any]) -> int:
                body = {"model": "tiny", "messages": [{"role": "user", "content": "Name a land."}], "max_tokens": 8, **extra}
                async with session.post(served[1] + "/chat/completions", json=body) as reply:
                    assert (await reply.json())["choices"]
                    return reply.status

            return await asyncio.gather(*(one(extra) for extra in ({}, *odd, {})))

    assert asyncio.run(post()) == [200] * 5


def test_it_ends_quietly_in_the_middle_of_an_answer(tiny_base: Path) -> None:
    command = [sys.executable, "-m", "gristmill.cli", "serve", str(tiny_base), "--port", "0", "--name", "tiny"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1]

        async def ask_and_end() -> None:
            async with aiohttp.ClientSession() as session:
                body = {"model": "tiny", "messages": [{"role": "user", "content": "Name a land."}], "max_tokens": 400, "n": 64}
                asking = asyncio.ensure_future(session.post(url + "/chat/completions", json=body))
                await asyncio.sleep(0.3)
                process.terminate()
                with contextlib.suppress(aiohttp.ClientError, asyncio.CancelledError):
                    asking.cancel()
                    await asking

        asyncio.run(ask_and_end())
        assert process.wait(30) == 0


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"not json", 400, "is not JSON"),
        (b"[]", 400, "must be an object"),
        (b'{"model": "tiny", "messages": []}', 400, "no user turn"),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": 1}]}', 400, "text as content"),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "temperature": -1}', 400, "temperature must be"),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "n": "many"}', 400, "whole numbers"),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "n": 1000000000}', 400, "n must be at most 128"),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 0}', 400, "max_tokens must be"),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1e999}', 400, "whole numbers"),
        (b"[" * 200_000, 400, "is not JSON"),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "heat": 1}', 400, "unknown field 'heat'"),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "stream": true}', 400, "streaming"),
        (b'{"model": "huge", "messages": [{"role": "user", "content": "x"}]}', 404, "'huge' does not exist"),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "' + b"x y " * 5000 + b'"}]}', 400, "shorten it"),
    ],
)
def test_bad_requests_are_refused_with_a_reason(served: tuple[Path, str], body: bytes, status: int, words: str) -> None:
    async def post() -> tuple[int, str]:
        async with aiohttp.ClientSession() as session, session.post(served[1] + "/chat/completions", data=body) as reply:
            return reply.status, (await reply.json())["error"]["message"]

    found, message = asyncio.run(post())
    assert found == status and words in message
