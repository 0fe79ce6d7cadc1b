"""The server process through our own endpoint client: the same answers as the engine's own."""

import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from gristmill.core.errors import InputError
from gristmill.data.chat import Message
from gristmill.data.chat_format import FORMATS
from gristmill.data.find_format import find_format
from gristmill.engine.core import Core
from gristmill.engine.engine import Engine
from gristmill.generation.api import Request, SamplingParams
from gristmill.generation.endpoint import Endpoint, Target
from gristmill.judge.reward_client import RemoteRewardScorer, RewardModelEndpoint, parse_choice
from gristmill.model.hf import load_model
from gristmill.model.hf_save import save_reward
from gristmill.model.reward import RewardModel
from gristmill.server.admission import Limits
from gristmill.server.app import Server


@pytest.fixture(scope="module")
def served(tiny_base: Path) -> Iterator[tuple[Path, str]]:
    command = [sys.executable, "-m", "gristmill.cli", "serve", str(tiny_base), "--port", "0", "--name", "tiny"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("tiny answers at http://127.0.0.1:"), line
    yield tiny_base, line.split()[-1]
    process.terminate()
    assert process.wait(120) == 0


def ask(text: str, **sampling: Any) -> Request:
    return Request(text, (Message("user", text),), SamplingParams(**sampling))


def test_greedy_answers_are_the_engines(served: tuple[Path, str]) -> None:
    folder, url = served
    model, tokenizer = load_model(folder)
    engine = Engine(model, tokenizer, find_format("auto", tokenizer), name="tiny", max_batch=8)
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
        assert process.wait(120) == 0


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"not json", 400, "is not JSON"),
        (b"[]", 400, "must be an object"),
        (b'{"model": "tiny", "messages": []}', 400, "no user turn"),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": 1}]}', 400, "text as content"),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "temperature": -1}', 400, "temperature must be"),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "n": "many"}', 400, "n: input should be a valid integer"),
        (
            b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "n": 1000000000}',
            400,
            "n: input should be less",
        ),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 0}', 400, "max_tokens must be"),
        (
            b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1e999}',
            400,
            "max_tokens: input should",
        ),
        (b"[" * 50_000, 400, "is not JSON"),
        (b"[" * 200_000, 400, "send less"),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "heat": 1}', 400, "unknown field 'heat'"),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "stop": ""}', 400, "empty string"),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "logit_bias": {"99999": 1}}', 400, "token 99999"),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "stop_token_ids": [-1]}', 400, "token -1"),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "min_p": 2}', 400, "min_p must be"),
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


# ---- everything else that a client may want ----

KEY = "mill-key"


@pytest.fixture(scope="module")
def full(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with a reward model, a key and few places."""
    folder = tmp_path_factory.mktemp("reward") / "judge"
    model, tokenizer = load_model(tiny_base)
    save_reward(RewardModel(model), tokenizer, folder)
    options = ["--reward", str(folder), "--api-key-env", "GRISTMILL_TEST_KEYS", "--max-open-samples", "64", "--cache-tokens", "4096"]
    options += ["--step-tokens", "128", "--speculative-config", "ngram"]
    command = [sys.executable, "-m", "gristmill.cli", "serve", str(tiny_base), "--port", "0", "--name", "tiny", *options]
    env = os.environ | {"GRISTMILL_TEST_KEYS": f"other {KEY}"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    assert process.stdout is not None
    yield process.stdout.readline().split()[-1]
    process.terminate()
    assert process.wait(120) == 0


def post(url: str, path: str, key: str | None = KEY, **body: Any) -> tuple[int, Any]:
    request = urllib.request.Request(f"{url}{path}", json.dumps({"model": "tiny"} | body).encode(), {"Content-Type": "application/json"})
    if key:
        request.add_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=300) as reply:
            raw = reply.read()
            return reply.status, raw if body.get("stream") else json.loads(raw)
    except urllib.error.HTTPError as e:
        return e.code, json.loads(e.read())


def chunks(raw: bytes) -> list[dict[str, Any]]:
    lines = [line.removeprefix(b"data: ") for line in raw.split(b"\n\n") if line]
    assert lines.pop() == b"[DONE]"
    return [json.loads(line) for line in lines]


def metric(url: str, name: str) -> float:
    request = urllib.request.Request(f"{url.removesuffix('/v1')}/metrics", headers={"Authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(request, timeout=300) as reply:
        (line,) = [line for line in reply.read().decode().splitlines() if line.startswith(f"{name} ")]
    return float(line.split()[1])


SAID = [{"role": "user", "content": "Write a word sum about eggs."}]


STREAMED: list[dict[str, Any]] = [
    {},
    {"n": 3, "temperature": 1.0, "seed": 5},
    {"stop": ["a", "ow"]},
    {"temperature": 1.5, "seed": 8},
    {"stop": ["Observation:", "\n\n"], "temperature": 1.5, "seed": 8},
    {"top_logprobs": 2},
    {"stop_token_ids": list(range(100, 116)), "temperature": 1.5, "seed": 8},
]


@pytest.mark.parametrize("extra", STREAMED)
def test_a_streamed_answer_is_the_whole_one(full: str, extra: dict[str, Any]) -> None:
    ask = {"messages": SAID, "max_tokens": 60, "temperature": 0.0, "logprobs": True} | extra
    status, whole = post(full, "/chat/completions", **ask)
    assert status == 200
    status, raw = post(full, "/chat/completions", stream=True, stream_options={"include_usage": True}, **ask)
    assert status == 200
    *parts, last = chunks(raw)
    assert last["usage"] == whole["usage"] and not last["choices"]
    for choice in whole["choices"]:
        mine = [c for part in parts for c in part["choices"] if c["index"] == choice["index"]]
        assert "".join(c["delta"]["content"] for c in mine) == choice["message"]["content"]
        assert [c["delta"].get("role") for c in mine] == ["assistant"] + [None] * (len(mine) - 1)
        assert [c["finish_reason"] for c in mine] == [None] * (len(mine) - 1) + [choice["finish_reason"]]
        entries = [entry for c in mine for entry in c["logprobs"]["content"]]
        assert [e["token"] for e in entries] == [e["token"] for e in choice["logprobs"]["content"]]
        likeliest = [[t["token"] for t in e["top_logprobs"]] for e in entries]
        assert likeliest == [[t["token"] for t in e["top_logprobs"]] for e in choice["logprobs"]["content"]]
        said = bytes(byte for e in entries for byte in e["bytes"]).decode(errors="replace")
        assert said.startswith(choice["message"]["content"])


def test_likeliest_tokens_stand_beside_the_chosen(full: str) -> None:
    _, reply = post(full, "/chat/completions", messages=SAID, max_tokens=5, temperature=0, logprobs=True, top_logprobs=3)
    for entry in reply["choices"][0]["logprobs"]["content"]:
        assert len(entry["top_logprobs"]) == 3 and entry["top_logprobs"][0]["token"] == entry["token"]
        assert entry["top_logprobs"][0]["logprob"] == pytest.approx(entry["logprob"], abs=1e-4)


def test_texts_are_continued_and_scored(full: str) -> None:
    text = "Write a word sum about eggs."
    status, reply = post(full, "/completions", prompt=[text, "Name"], max_tokens=4, temperature=0, logprobs=2, echo=True, n=2)
    assert status == 200 and len(reply["choices"]) == 4
    choice = reply["choices"][0]
    assert choice["text"].startswith(text) and reply["choices"][2]["text"].startswith("Name")
    scores = choice["logprobs"]
    num = len(scores["tokens"])
    assert scores["token_logprobs"][0] is None and len(scores["token_logprobs"]) == num == len(scores["text_offset"])
    assert all(value <= 0 for value in scores["token_logprobs"][1:]) and all(len(top) <= 2 for top in scores["top_logprobs"][1:])
    _, only = post(full, "/completions", prompt=text, max_tokens=0, logprobs=1, echo=True)
    assert only["choices"][0]["text"] == text and only["usage"]["completion_tokens"] == 0
    assert only["choices"][0]["logprobs"]["token_logprobs"] == scores["token_logprobs"][: len(only["choices"][0]["logprobs"]["tokens"])]
    _, ids = post(full, "/completions", prompt=[5, 6, 7], max_tokens=3, temperature=0)
    _, raw = post(full, "/completions", prompt=[5, 6, 7], max_tokens=3, temperature=0, stream=True)
    assert "".join(c["text"] for part in chunks(raw) for c in part["choices"]) == ids["choices"][0]["text"]
    for tokens in (0, 3):
        ask = {"prompt": text, "max_tokens": tokens, "temperature": 0, "logprobs": 0, "echo": True}
        _, whole = post(full, "/completions", **ask)
        _, raw = post(full, "/completions", stream=True, **ask)
        parts = [c for part in chunks(raw) for c in part["choices"]]
        assert "".join(c["text"] for c in parts) == whole["choices"][0]["text"]
        assert [w for c in parts for w in c["logprobs"]["tokens"]] == whole["choices"][0]["logprobs"]["tokens"]
        assert [w for c in parts for w in c["logprobs"]["text_offset"]] == whole["choices"][0]["logprobs"]["text_offset"]
        assert whole["choices"][0]["logprobs"]["top_logprobs"] is None
        assert parts[-1]["finish_reason"] == whole["choices"][0]["finish_reason"]
    for wrong, words in (([], "empty"), ("", "empty"), ([10**6], "no token 1000000"), ([[1], []], "empty"), ({}, "prompt")):
        status, refused = post(full, "/completions", prompt=wrong)
        assert status == 400 and words in refused["error"]["message"]


def test_answers_keep_to_a_format(full: str) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    ask = {"messages": SAID, "max_tokens": 60, "temperature": 1.0, "seed": 1}
    formats = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    _, reply = post(full, "/chat/completions", response_format=formats, **ask)
    assert json.loads(reply["choices"][0]["message"]["content"])["a"] in (1, 2)
    for outputs, pattern in (({"choice": ["left", "right"]}, "left|right"), ({"regex": "[0-9]{4}"}, "[0-9]{4}")):
        _, reply = post(full, "/chat/completions", structured_outputs=outputs, **ask)
        assert re.fullmatch(pattern, reply["choices"][0]["message"]["content"])
    for wrong in ({"regex": "(("}, {"choice": []}, {"colour": 1}, {"regex": "a", "choice": ["a"]}):
        status, reply = post(full, "/chat/completions", structured_outputs=wrong, **ask)
        assert status == 400 and reply["error"]["message"]
    assert post(full, "/chat/completions", response_format={"type": "poem"}, **ask)[0] == 400


def test_a_json_object_keeps_to_its_schema(full: str) -> None:
    schema = {"type": "object", "properties": {"zz": {"enum": [7]}}, "required": ["zz"], "additionalProperties": False}
    ask = {"messages": SAID, "max_tokens": 60, "temperature": 0, "response_format": {"type": "json_object", "schema": schema}}
    for _ in range(2):  # built, and taken from those that are built
        _, reply = post(full, "/chat/completions", **ask)
        assert json.loads(reply["choices"][0]["message"]["content"]) == {"zz": 7}
    many = {"type": "json_schema", "json_schema": {"schema": {"enum": [f"{i:020}" for i in range(6000)]}}}
    status, reply = post(full, "/chat/completions", messages=SAID, response_format=many)
    assert status == 400 and "100,000 are taken" in reply["error"]["message"]


def test_turns_in_any_order_and_answers_that_are_begun(full: str) -> None:
    ask = {"max_tokens": 12, "temperature": 0, "logit_bias": BIAS}
    for roles in ("user user", "user assistant system user", "assistant user", "system", "user assistant", "assistant assistant"):
        talk = [{"role": role, "content": "Name a land."} for role in roles.split()]
        status, reply = post(full, "/chat/completions", messages=talk, **ask)
        assert status == 200 and reply["usage"]["completion_tokens"] == 12
    _, whole = post(full, "/chat/completions", messages=SAID, **ask, logprobs=True)
    tokens = [entry["token"] for entry in whole["choices"][0]["logprobs"]["content"]]
    begun = [*SAID, {"role": "assistant", "content": "".join(tokens[:1])}]
    _, rest = post(full, "/chat/completions", messages=begun, continue_final_message=True, **ask, logprobs=True)
    assert [entry["token"] for entry in rest["choices"][0]["logprobs"]["content"]][:11] == tokens[1:], "it goes on where it was"
    _, new = post(full, "/chat/completions", messages=begun, **ask)
    assert new["usage"]["prompt_tokens"] > rest["usage"]["prompt_tokens"], "a turn of its own"
    status, reply = post(full, "/chat/completions", messages=SAID, continue_final_message=True)
    assert status == 400 and reply["error"]["param"] == "continue_final_message"


def test_without_max_tokens_an_answer_has_the_rest_of_the_context(full: str) -> None:
    _, reply = post(full, "/chat/completions", messages=SAID, logit_bias=BIAS, temperature=0)
    assert reply["choices"][0]["finish_reason"] == "length" and reply["usage"]["total_tokens"] == 256
    _, reply = post(full, "/completions", prompt="a", logit_bias=BIAS, temperature=0)
    assert reply["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize("text", ["caf\u00e9 the sum", "\u65e5\u672c\u8a9e and \U0001f600 7", "\u00e9\u00e9\u00e9"])
def test_offsets_and_bytes_of_tokens_that_are_parts_of_characters(full: str, tiny_base: Path, text: str) -> None:
    ask = {"prompt": text, "max_tokens": 8, "echo": True, "logprobs": 1, "seed": 3, "temperature": 1.5, "logit_bias": BIAS}
    _, reply = post(full, "/completions", **ask)
    choice = reply["choices"][0]
    scores = choice["logprobs"]
    ids = load_model(tiny_base)[1].encode(text)
    for place, (token, offset) in enumerate(zip(scores["tokens"], scores["text_offset"], strict=True)):
        if not token.startswith("bytes:"):
            assert choice["text"][offset : offset + len(token)] == token
        elif place < len(ids):  # of its character
            assert bytes.fromhex(token[6:].replace("\\x", "")) in choice["text"][offset].encode()
    assert any(token.startswith("bytes:") for token in scores["tokens"])
    _, raw = post(full, "/completions", **ask, stream=True)
    parts = [c for part in chunks(raw) for c in part["choices"]]
    assert [offset for c in parts for offset in c["logprobs"]["text_offset"]] == scores["text_offset"]


def test_a_request_may_name_no_model(full: str) -> None:
    status, reply = post(full, "/chat/completions", model=None, messages=SAID, max_tokens=2)
    assert status == 200 and reply["model"] == "tiny"


def test_every_refusal_has_the_form_of_openai(full: str) -> None:
    for path, body, status, code in (
        ("/chat/completions", {"messages": SAID, "model": "nope"}, 404, "model_not_found"),
        ("/chat/completions", {"messages": SAID, "n": 65}, 429, "rate_limit_exceeded"),
        ("/completions", {"prompt": 5}, 400, None),
        ("/embeddings", {"input": "x"}, 404, None),
        ("/rewards", {"messages": SAID, "model": "judge"}, 400, None),
    ):
        found, reply = post(full, path, **body)
        assert found == status and set(reply) == {"error"}
        assert set(reply["error"]) == {"message", "type", "param", "code"} and reply["error"]["code"] == code
    assert "/v1/chat/completions, /v1/completions" in post(full, "/moderations", input="x")[1]["error"]["message"]
    assert post(full, "/models")[0] == 405 and "with GET" in post(full, "/models")[1]["error"]["message"]
    assert post(full, "/completions", prompt="x", key=None)[1]["error"]["code"] == "invalid_api_key"
    status, reply = post(full, "/completions", prompt=[[5] * 5000])
    assert status == 400 and "5,000 tokens" in reply["error"]["message"] and reply["error"]["param"] == "prompt"


def test_long_bodies_are_refused_or_read_on_every_route(full: str) -> None:
    many, long = [*SAID, {"role": "assistant", "content": ""}] * 5000, [{"role": "user", "content": "x " * 1_900_000}]
    for path, model in (("/chat/completions", "tiny"), ("/chat/completions", "judge"), ("/rewards", "judge")):
        for messages, words in ((many, "more than"), (long, "3,800,000 characters")):
            status, reply = post(full, path, model=model, messages=[*messages, {"role": "assistant", "content": ""}])
            assert status == 400 and words in reply["error"]["message"].replace("3,800,001", "3,800,000")
    status, reply = post(full, "/responses", input=many)
    assert status == 400 and "more than" in reply["error"]["message"]
    _, short = post(full, "/completions", prompt=[[5, 6]] * 2, max_tokens=1, temperature=0)
    status, padded = post(full, "/completions", prompt=[[5, 6]] * 2, max_tokens=1, temperature=0, metadata=["x"] * 30_000)
    assert status == 200 and [c["text"] for c in padded["choices"]] == [c["text"] for c in short["choices"]]


def test_ratings_in_both_forms(full: str, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(KEY)
    talk = [*SAID, {"role": "assistant", "content": "Ana has 3 eggs."}]
    status, plain = post(full, "/rewards", model="judge", messages=talk)
    assert status == 200
    rewards = plain["rewards"]
    status, reply = post(full, "/chat/completions", model="judge", messages=talk)
    assert status == 200
    choice = reply["choices"][0]
    rating = parse_choice(choice)
    assert rating == parse_choice({"message": choice["message"]}) and asdict(rating) == {k: v for k, v in rewards.items() if k != "score"}
    (again,) = RemoteRewardScorer(RewardModelEndpoint([Target(full, "judge", api_key_file=str(tmp_path / "key"))])).score(
        [tuple(Message(m["role"], m["content"]) for m in talk)]  # type: ignore[arg-type]
    )
    assert again == rating
    assert post(full, "/rewards", model="judge", messages=SAID)[0] == 400 and post(full, "/rewards", messages=talk)[0] == 404
    assert post(full, "/chat/completions", model="judge", messages=talk, stream=True)[0] == 400


def test_what_clients_send_along_is_taken(full: str) -> None:
    parts = [{"type": "text", "text": "Write a word sum"}, {"type": "text", "text": "about eggs."}]
    talk = [{"role": "developer", "content": "Be brief.", "name": None}, {"role": "user", "content": parts, "name": "ann"}]
    status, reply = post(full, "/chat/completions", messages=talk, max_tokens=3, tools=[], store=False, metadata={}, best_of=1)
    assert status == 200 and reply["id"].startswith("chatcmpl-")
    _, again = post(full, "/chat/completions", messages=talk, max_tokens=3, seed=1)
    assert again["id"] != post(full, "/chat/completions", messages=talk, max_tokens=3, seed=1)[1]["id"]
    status, reply = post(full, "/chat/completions", messages=talk, top_logprobs=2)
    assert status == 400 and "logprobs: true" in reply["error"]["message"]
    assert post(full, "/chat/completions", messages=talk, tools=[{"type": "function"}])[0] == 400


def test_a_key_is_asked_for_and_health_needs_none(full: str) -> None:
    for key in (None, "wrong", "\u00ff\u00fe"):
        status, reply = post(full, "/chat/completions", key=key, messages=SAID)
        assert status == 401 and "API key" in reply["error"]["message"]
    with urllib.request.urlopen(f"{full.removesuffix('/v1')}/health", timeout=300) as reply:
        assert json.loads(reply.read()) == {"status": "ok"}


def test_too_many_are_told_to_come_back_and_who_leaves_frees_everything(
    full: str, comes_true: Callable[[Callable[[], bool]], bool]
) -> None:
    async def go() -> tuple[int, str | None]:
        headers = {"Authorization": f"Bearer {KEY}"}
        async with aiohttp.ClientSession(headers=headers) as session:
            body = {"model": "tiny", "messages": SAID, "max_tokens": 200, "n": 64, "temperature": 2.0, "stream": True, "logit_bias": BIAS}
            async with session.post(f"{full}/chat/completions", json=body) as reply:
                await reply.content.readline()
                async with session.post(f"{full}/chat/completions", json={"model": "tiny", "messages": SAID}) as refused:
                    found = refused.status, refused.headers.get("Retry-After")
                reply.close()
            return found

    assert asyncio.run(go()) == (429, "1")
    names = ("gristmill_open_samples", "gristmill_pages_in_use", "gristmill_running")
    assert comes_true(lambda: not any(metric(full, name) for name in names))
    assert post(full, "/chat/completions", messages=SAID, max_tokens=4)[0] == 200


def test_drafts_are_counted_and_priority_is_taken(full: str) -> None:
    before = metric(full, "gristmill_draft_tokens")
    asked = {"messages": [{"role": "user", "content": "egg, mill, egg, mill, " * 6}], "max_tokens": 60, "temperature": 0.0}
    status, plain = post(full, "/chat/completions", **asked, logit_bias={"5": -0.0})  # with a bias nothing is drafted
    assert status == 200 and metric(full, "gristmill_draft_tokens") == before
    status, found = post(full, "/chat/completions", **asked, priority=-3)
    assert status == 200 and found["choices"][0]["message"] == plain["choices"][0]["message"]
    # what a model says decides whether it has been said before, so many answers are asked for
    assert post(full, "/chat/completions", **asked | {"temperature": 1.0, "n": 32})[0] == 200
    assert metric(full, "gristmill_draft_tokens") > before
    assert metric(full, "gristmill_accepted_tokens") <= metric(full, "gristmill_draft_tokens")
    assert post(full, "/chat/completions", **asked, priority=101)[0] == 400


def test_one_request_cannot_ask_for_more_than_there_is_room_for(full: str) -> None:
    for path, body in (
        ("/completions", {"prompt": [[5]] * 40, "n": 2}),
        ("/chat/completions", {"messages": SAID, "n": 65}),
    ):
        assert post(full, path, **body)[0] == 429
    for body, words in (
        ({"messages": [{"role": "user", "content": "x" * 3_000_000}]}, "3,000,000 characters"),
        ({"messages": SAID, "temperature": 10**400}, "too large"),
        ({"messages": SAID, "stop": ["x"] * 17}, "stop"),
        ({"messages": SAID, "logit_bias": {str(i): 1 for i in range(2000)}}, "logit_bias"),
    ):
        status, reply = post(full, "/chat/completions", **body)
        assert status == 400 and words in reply["error"]["message"], reply
    many = [f"{a}{b}" for a in "abcdefghijklmnopqrstuvwxyz" for b in range(200)]
    status, reply = post(full, "/chat/completions", messages=SAID, structured_outputs={"choice": many}, max_tokens=20)
    assert status == 400 or reply["choices"][0]["message"]["content"] in many, "no free text where a grammar is too much"


BIAS = {str(token): -100 for token in range(8)}  # so that no answer ends early


def test_a_request_that_the_cache_cannot_hold_is_refused(tiny_base: Path) -> None:
    engine = Engine(*load_model(tiny_base), FORMATS["nemotron"], name="tiny", max_batch=4, cache_tokens=64)
    with pytest.raises(InputError, match="the cache holds 64"):
        list(engine.generate([ask("Name a land.", max_tokens=200)]))


async def served_here(tiny_base: Path, limits: Limits, rate: Any, work: Any, **options: Any) -> Any:
    """A server in this process, for what only happens when it is slow or broken."""
    engine = Engine(*load_model(tiny_base), FORMATS["nemotron"], name="Tiny", max_batch=4, cache_tokens=2048)
    server = Server(engine, limits, rate, **options)
    runner = web.AppRunner(server.app(), handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{runner.addresses[0][1]}") as session:
            return await asyncio.wait_for(work(server, session), 120)
    finally:
        await runner.cleanup()


def test_a_stream_that_takes_too_long_ends_with_the_reason(tiny_base: Path) -> None:
    async def work(server: Server, session: aiohttp.ClientSession) -> None:
        step = Core.step

        def slow(core: Core) -> None:
            step(core)
            time.sleep(0.2)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Core, "step", slow)
            body = {"model": "Tiny", "messages": SAID, "max_tokens": 200, "stream": True, "logit_bias": BIAS}
            for _ in range(2):  # the connection can be used again
                async with session.post("/v1/chat/completions", json=body) as reply:
                    assert reply.status == 200
                    lines = [line async for line in reply.content if line.strip()]
                assert "no answer within" in json.loads(lines[-1].removeprefix(b"data: "))["error"]["message"]
        async with session.post("/v1/chat/completions", json={"model": "nope", "messages": SAID}) as reply:
            assert reply.status == 404 and "has 'Tiny'" in (await reply.json())["error"]["message"]

    asyncio.run(served_here(tiny_base, Limits(timeout=2.0), None, work))


def test_who_leaves_takes_no_other_s_rating_along(tiny_base: Path) -> None:
    def rate(talks: list[Any]) -> list[dict[str, float]]:
        time.sleep(0.3)
        return [{"helpfulness": float(len(talk))} for talk in talks]

    async def work(server: Server, session: aiohttp.ClientSession) -> None:
        body = {"messages": [*SAID, {"role": "assistant", "content": "x"}]}

        async def ask() -> int:
            async with session.post("/v1/rewards", json=body) as reply:
                return reply.status

        asking = []
        for _ in range(4):
            asking.append(asyncio.ensure_future(ask()))
            await asyncio.sleep(0.05)
        asking[0].cancel()
        asking[1].cancel()
        assert await asyncio.gather(*asking[2:]) == [200, 200]

    asyncio.run(served_here(tiny_base, Limits(), rate, work))


def test_an_engine_that_breaks_tells_everyone(tiny_base: Path) -> None:
    async def work(server: Server, session: aiohttp.ClientSession) -> None:
        def broken(*_: object) -> None:
            raise RuntimeError("no memory")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Core, "step", broken)
            patch.setattr(server.engine, "core", broken)
            statuses = []
            for _ in range(2):
                async with session.post("/v1/chat/completions", json={"model": "Tiny", "messages": SAID}) as reply:
                    statuses.append(reply.status)
                await asyncio.sleep(0.1)
        assert statuses == [500, 503]

    asyncio.run(served_here(tiny_base, Limits(), None, work))


def test_told_to_end_it_finishes_what_is_under_way(tiny_base: Path) -> None:
    command = [sys.executable, "-m", "gristmill.cli", "serve", str(tiny_base), "--port", "0", "--name", "tiny"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1]

        async def go() -> list[dict[str, Any]]:
            async with aiohttp.ClientSession() as session:
                body = {"model": "tiny", "messages": SAID, "max_tokens": 150, "n": 8, "stream": True, "logit_bias": BIAS}
                async with session.post(f"{url}/chat/completions", json=body) as reply:
                    first = await reply.content.readline()
                    process.terminate()
                    return chunks(first + await reply.content.read())

        parts = asyncio.run(go())
        assert sum(c["finish_reason"] is not None for part in parts for c in part["choices"]) == 8
        assert process.wait(120) == 0
