"""The endpoint client against a server that replies as a test says: refused fields, errors inside answers, hostile bodies, echoed keys."""

import asyncio
import base64
import contextlib
import gzip
import json
import time
import tracemalloc
import zlib
from collections.abc import AsyncIterator, Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web

from gristmill.core.config import check
from gristmill.core.errors import InputError
from gristmill.generation import endpoint as module
from gristmill.generation.api import Request
from gristmill.generation.endpoint import Endpoint, RowFailed, Target
from gristmill.generation.settings import GeneratorSettings
from tests.generation.test_endpoint import ask, client

KEY = "sk-live-9fK2mQ7zT4xW8bN1cV6pLr3d"


def said(text: Any = "fine", **choice: Any) -> dict[str, Any]:
    """An answer of one choice."""
    return {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"} | choice]}


def scripted(
    answer: Callable[[int, dict[str, Any]], Any],
    requests: Sequence[Request] = (),
    monkeypatch: pytest.MonkeyPatch | None = None,
    **options: Any,
) -> tuple[list[Any], list[dict[str, Any]], Endpoint]:
    """What a client makes of a server that answers its n-th request as told: with a body, (status, body, headers), or bytes in pieces."""
    bodies: list[dict[str, Any]] = []
    times: list[float] = []

    async def handle(request: web.Request) -> web.StreamResponse:
        bodies.append(await request.json())
        times.append(time.monotonic())
        told = answer(len(bodies), bodies[-1])
        status, body, headers = told if isinstance(told, tuple) else (200, told, {})
        if callable(body):
            reply = web.StreamResponse(status=status, headers=headers)
            await reply.prepare(request)
            with contextlib.suppress(ConnectionError):
                async for piece in body():
                    await reply.write(piece)
            return reply
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return web.Response(status=status, body=data, headers={"Content-Type": "application/json"} | headers)

    if monkeypatch:
        monkeypatch.setenv("MOCK_KEY", KEY)
        options["api_key_env"] = "MOCK_KEY"

    async def run() -> tuple[list[Any], Endpoint]:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", handle)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        source = client(SimpleNamespace(url=f"http://127.0.0.1:{runner.addresses[0][1]}/v1"), **options)
        try:
            async with source:
                rows = [source.complete(request) for request in requests or [ask("a", "hello")]]
                return await asyncio.gather(*rows, return_exceptions=True), source
        finally:
            await runner.cleanup()

    results, source = asyncio.run(run())
    for body, at in zip(bodies, times, strict=True):
        body["_at"] = at - times[0]
    return results, bodies, source


def text_of(result: Any) -> str:
    assert isinstance(result, list), result
    (out,) = result
    return out.text


def test_fields_are_sent_as_the_model_takes_them() -> None:
    fields = {"max_tokens": "max_completion_tokens", "seed": None, "temperature": None, "n": None}
    request = ask("a", "hello", n=3)
    (outs,), bodies, source = scripted(
        lambda n, body: said(f"answer {n}"), [request], fields=fields, extra_body={"reasoning_effort": "low"}
    )
    assert [out.text for out in outs] == ["answer 1", "answer 2", "answer 3"] and outs[0].left_out == () and not source.usage.refused_fields
    for body in bodies:
        del body["_at"]
        assert body == {
            "model": "mock",
            "messages": [{"role": "user", "content": "hello"}],
            "max_completion_tokens": 256,
            "reasoning_effort": "low",
        }


@pytest.mark.parametrize(
    ("fields", "extra_body", "words"),
    [
        ({"sed": None}, {}, "fields names 'sed'"),
        ({"model": None}, {}, "fields names 'model'"),
        ({"seed": "messages"}, {}, "calls 'seed' 'messages'"),
        ({"max_tokens": ""}, {}, "calls 'max_tokens' ''"),
        ({}, {"temperature": 0.3}, "extra_body sets 'temperature'"),
        ({}, {"stream": True}, "extra_body sets 'stream'"),
        ({"max_tokens": "limit"}, {"limit": 3}, "extra_body sets 'limit'"),
        ({}, {"a": float("nan")}, "extra_body is no JSON"),
        ({}, {"a": {1, 2}}, "extra_body is no JSON"),
    ],
)
def test_wrong_fields_are_refused(fields: dict[str, Any], extra_body: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Endpoint([Target("http://host/v1", "m", fields=fields, extra_body=extra_body)])
    with pytest.raises(InputError, match=words):
        check(GeneratorSettings, {"base_url": "http://host/v1", "model": "m", "fields": fields, "extra_body": extra_body})


def refusing(*names: str, form: str = "openai", status: int = 400) -> Callable[[int, dict[str, Any]], Any]:
    """A server that takes none of these fields, and says so in the form of one of several makers."""

    def answer(_: int, body: dict[str, Any]) -> Any:
        for name in names:
            if name not in body:
                continue
            words: Any = {
                "openai": {"error": {"message": f"Unsupported parameter: '{name}' is not supported with this model.", "param": name}},
                "value": {"error": {"message": f"Unsupported value: '{name}' does not support 0.7 with this model.", "param": name}},
                "fastapi": {"detail": [{"type": "extra_forbidden", "loc": ["body", name], "msg": "Extra inputs are not permitted"}]},
                "plain": f"Unrecognized request argument supplied: {name}",
                "property": {"error": {"message": f"property '{name}' is unsupported, did you mean something else?"}},
                "within": {"error": {"message": f"`{name}` is not supported", "code": 400}},
            }[form]
            return 200 if form == "within" else status, words if isinstance(words, dict) else words.encode(), {}
        return said()

    return answer


@pytest.mark.parametrize("form", ["openai", "value", "fastapi", "plain", "property", "within"])
@pytest.mark.parametrize("status", [400, 422])
def test_a_field_that_is_refused_by_name_is_left_out_and_told(form: str, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    requests = [ask(str(n), "hello", temperature=0.7) for n in range(3)]
    results, bodies, source = scripted(
        refusing("temperature", "seed", "max_tokens", form=form, status=status), requests, concurrency=1, retries=0
    )
    assert [text_of(result) for result in results] == ["fine"] * 3
    assert len(bodies) == 3 + 3  # each field was refused once
    assert all(result[0].left_out == ("seed", "temperature") for result in results)
    (known,) = source.usage.refused_fields.values()
    assert known == {
        "max_tokens": "sent as max_completion_tokens",
        "seed": "left out: another run draws other answers",
        "temperature": "left out: answers are drawn with the endpoint's own",
    }
    said_once = capsys.readouterr().err
    assert all(said_once.count(f"refuses {name}, which is {what}") == 1 for name, what in known.items())


@pytest.mark.parametrize(
    "words",
    [
        "'n' : number must be at most 1",
        {"error": {"message": "n > 1 is not supported by this model"}},
        {"error": {"message": "Only one completion choice is allowed"}},
        {"detail": [{"type": "extra_forbidden", "loc": ["body", "n"], "msg": "Extra inputs are not permitted"}]},
    ],
)
def test_samples_are_asked_for_one_at_a_time_where_n_is_refused(words: Any) -> None:
    def answer(n: int, body: dict[str, Any]) -> Any:
        return (400, words.encode() if isinstance(words, str) else words, {}) if "n" in body else said(f"answer {n}")

    (outs,), bodies, _ = scripted(answer, [ask("a", "hello", n=3)], retries=0)
    assert len({out.text for out in outs}) == 3 and len({body["seed"] for body in bodies[1:]}) == 3 and outs[0].left_out == ()


@pytest.mark.parametrize(
    "words",
    [
        "max_tokens is too large: 9000. This model supports at most 4096 completion tokens.",
        "`temperature` must be strictly positive",
        "The prompt speaks of a seed and of temperature.",
        {"error": {"message": "Unsupported parameter: 'stop' is not supported with this model.", "param": "stop"}},
        {"error": {"message": "Unsupported parameter: 'reasoning_effort' is not supported.", "param": "reasoning_effort"}},
        {"detail": [{"type": "less_than_equal", "loc": ["body", "temperature"], "msg": "Input should be less than or equal to 2"}]},
    ],
)
def test_a_value_that_is_refused_or_a_field_that_must_be_sent_ends_the_row(words: Any) -> None:
    request = ask("a", "hello", stop=("END",))
    (failed,), bodies, source = scripted(
        lambda *_: (400, words.encode() if isinstance(words, str) else words, {}), [request], extra_body={"reasoning_effort": "low"}
    )
    assert isinstance(failed, RowFailed) and failed.status == 400 and len(bodies) == 1 and not source.usage.refused_fields


@pytest.mark.parametrize(
    ("body", "kind", "words"),
    [
        ({"error": {"message": "Rate limit exceeded: free tier", "code": 429}}, "429", "Rate limit exceeded: free tier"),
        ({"error": {"message": "slow down", "type": "rate_limit_exceeded"}, "choices": []}, "429", "slow down"),
        ({"error": "upstream went away", "choices": None}, "500", "upstream went away"),
        ({"object": "error", "message": "worker died", "code": 503}, "503", "worker died"),
        ({"detail": "Internal error"}, "500", "Internal error"),
        (said("half an ans", error={"code": 502, "message": "provider broke"}, finish_reason="error"), "502", "provider broke"),
        (said("half an ans", finish_reason="error"), "500", "broken off"),
        ({"choices": []}, "malformed", "no choice"),
        ({"choices": None}, "malformed", "no choice"),
        ({"choices": [None]}, "malformed", "cannot be read"),
    ],
)
def test_an_error_inside_an_answer_is_the_error_that_it_says(body: Any, kind: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "OUTAGE_SECONDS", 60.0)
    # the first row is answered, so that nothing looks like an endpoint that is away
    results, _, source = scripted(lambda n, _: said() if n == 1 else body, [ask("a", "a"), ask("b", "b")], retries=1, concurrency=1)
    assert text_of(results[0]) == "fine" and isinstance(results[1], RowFailed) and words in str(results[1])
    assert source.usage.errors == {kind: 2} and results[1].attempts == 2


def test_an_error_inside_an_answer_that_no_row_survives_ends_the_run() -> None:
    (error,), bodies, _ = scripted(lambda *_: {"error": {"message": "no such key", "type": "invalid_api_key"}})
    assert isinstance(error, InputError) and "refuses the key (401)" in str(error) and len(bodies) == 1


@pytest.mark.parametrize("status", [400, 403, 413, 429, 500, 503])
@pytest.mark.parametrize(("name", "value"), [("Retry-After", "0.4"), ("retry-after-ms", "400"), ("Retry-After", "400ms")])
def test_every_refusal_may_say_when_to_come_again(status: int, name: str, value: str) -> None:
    results, bodies, _ = scripted(
        lambda n, _: (status, {}, {name: value}) if n == 2 else said(), [ask("a", "a"), ask("b", "b")], concurrency=1, retries=1
    )
    assert [text_of(result) for result in results] == ["fine", "fine"] and bodies[2]["_at"] - bodies[1]["_at"] >= 0.4


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"message": {"content": None, "reasoning_content": "hm " * 9}, "finish_reason": "length"}, "reasoning took all of max_tokens"),
        ({"message": {"content": "", "reasoning": "hm"}, "finish_reason": "stop"}, "reasoning alone"),
        ({"message": {"content": [{"type": "thinking", "thinking": "hm"}]}, "finish_reason": "length"}, "reasoning took all"),
        ({"message": {"content": " \n"}, "finish_reason": "length"}, "max_tokens ended it"),
        ({"message": {"content": None, "tool_calls": [{"id": "a"}]}, "finish_reason": "tool_calls"}, "a call of a tool"),
        ({"message": {"content": None, "refusal": "no"}, "finish_reason": "stop"}, "refused to answer"),
    ],
)
def test_an_answer_without_text_is_bought_once_and_says_why(choice: dict[str, Any], words: str) -> None:
    (failed,), bodies, source = scripted(lambda *_: {"choices": [choice], "usage": {"completion_tokens": 256}})
    assert isinstance(failed, RowFailed) and words in str(failed) and len(bodies) == 1
    assert source.usage.tokens_out == 256 and source.usage.failed == 1  # it was paid for
    mixed = {"choices": [choice, *said("an answer")["choices"]]}
    (outs,), bodies, _ = scripted(lambda *_: mixed, [ask("a", "a", n=2)])
    assert [out.text for out in outs] == ["", "an answer"] and len(bodies) == 1


def test_content_may_come_in_parts() -> None:
    parts = [
        {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]},
        {"type": "text", "text": "one "},
        "two ",
        {"text": "three"},
    ]
    (outs,), _, _ = scripted(lambda *_: said(parts))
    assert text_of(outs) == "one two three"


def test_a_bad_choice_costs_the_others_nothing() -> None:
    bad = said("", finish_reason="stop")["choices"] + said("x", finish_reason="content_filter")["choices"]
    (outs,), bodies, _ = scripted(
        lambda n, body: {"choices": [*bad, *said("first")["choices"]]} if n == 1 else said(f"then {n}"), [ask("a", "a", n=3)]
    )
    assert [out.text for out in outs] == ["first", "then 2", "then 3"] and len(bodies) == 3


async def endless() -> AsyncIterator[bytes]:
    while True:
        yield b" " * 65536


BOMB = gzip.compress(b" " * (64 << 20))


async def drip() -> AsyncIterator[bytes]:
    while True:
        yield b" "
        await asyncio.sleep(0.05)


@pytest.mark.parametrize("status", [200, 500])
@pytest.mark.parametrize(("body", "headers"), [(endless, {}), (BOMB, {"Content-Encoding": "gzip"})])
def test_limits_count_decoded_bytes_as_they_arrive(body: Any, headers: dict[str, str], status: int) -> None:
    tracemalloc.start()
    try:
        assert text_of(scripted(lambda *_: said())[0][0]) == "fine"
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        (failed,), _, _ = scripted(lambda *_: (status, body, headers), retries=0, patience=0)
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert isinstance(failed, RowFailed) and ("longer than 4,456,448 bytes" in str(failed) if status == 200 else failed.status == 500)
    assert peak < 3 * module.BASE_ANSWER_BYTES


def test_slow_bodies_have_a_deadline() -> None:
    (failed,), _, _ = scripted(lambda *_: (200, drip, {}), retries=0, timeout=0.4)
    assert isinstance(failed, RowFailed) and "no whole answer within 0.4 s" in str(failed)


def test_compressed_answers_are_read() -> None:
    data = json.dumps(said("packed")).encode()
    for packed, name in ((gzip.compress(data), "gzip"), (zlib.compress(data), "deflate")):
        assert text_of(scripted(lambda *_, p=packed, n=name: (200, p, {"Content-Encoding": n}))[0][0]) == "packed"  # type: ignore[misc]
    for packed, name in (
        (gzip.compress(data)[:-20], "gzip"),
        (data, "gzip"),
        (data, "br"),
        (gzip.compress(gzip.compress(data)), "gzip, gzip"),
    ):
        (failed,), _, _ = scripted(lambda *_, p=packed, n=name: (200, p, {"Content-Encoding": n}), retries=0)  # type: ignore[misc]
        assert isinstance(failed, RowFailed)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    (error,), bodies, _ = scripted(lambda *_: (status, {}, {"Location": "/elsewhere"}), monkeypatch=monkeypatch)
    assert isinstance(error, InputError) and "sends to /elsewhere" in str(error) and len(bodies) == 1
    results, bodies, _ = scripted(
        lambda n, _: said() if n == 1 else (status, {}, {"Location": "http://127.0.0.1:1/" + KEY}),
        [ask("a", "a"), ask("b", "b")],
        monkeypatch,
        concurrency=1,
    )
    assert isinstance(results[1], RowFailed) and KEY not in str(results[1]) and len(bodies) == 2


ECHOES = {
    "plain": KEY,
    "upper": KEY.upper(),
    "bearer": f"Bearer {KEY}",
    "base64": base64.b64encode(KEY.encode()).decode(),
    "base64 of more": base64.b64encode(f"user:{KEY}@host".encode()).decode(),
    "url": "".join(f"%{byte:02x}" for byte in KEY.encode()),
    "json": "".join(f"\\u{ord(c):04x}" for c in KEY),
    "hex": KEY.encode().hex(),
    "spaced": " ".join(KEY),
    "lines": KEY[:13] + "\n" + KEY[13:],
}


@pytest.mark.parametrize("name", ECHOES)
def test_an_echoed_key_is_hidden_wherever_it_comes(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    echo = ECHOES[name]
    bodies: list[Any] = [
        said(f"your key is {echo}, is it not"),
        (400, {"error": {"message": f"bad {echo}", "code": 3}}, {}),
        (500, f"bad {echo}".encode(), {}),
        {"error": {"message": f"bad {echo}", "code": 400}},
        (400, {"error": {"message": "bad " + echo[: len(echo) // 2], "code": echo[len(echo) // 2 :]}}, {}),
        {"choices": [*said("a " + echo[: len(echo) // 2])["choices"], *said(echo[len(echo) // 2 :] + " b")["choices"]]},
    ]
    plain = "".join(c for c in echo.lower() if c.isalnum())
    for body in bodies:
        (result,), _, _ = scripted(lambda *_, body=body: body, [ask("a", "a", n=2)], monkeypatch, retries=0)  # type: ignore[misc]
        shown = str(result) if isinstance(result, Exception) else " ".join(out.text for out in result)
        left = "".join(c for c in shown.lower() if c.isalnum())
        assert not any(plain[at : at + 12] in left for at in range(len(plain) - 11)), shown
    told = capsys.readouterr().err
    assert "9fK2" not in told and told.count("sends the API key back") == 2  # once an endpoint


def test_a_servers_words_move_no_terminal() -> None:
    (failed,), _, _ = scripted(lambda *_: (400, "no\x1b[2J\x1b]0;owned\x07 \u202eback \u2028 line\x00\x9b".encode(), {}))
    assert str(failed).isprintable() and "no" in str(failed)


def test_concurrency_is_reached_and_kept() -> None:
    full, now, most = asyncio.Event(), 0, 0

    def answer(*_: Any) -> Any:
        nonlocal now, most
        now += 1
        most = max(most, now)
        if now == 7:
            full.set()

        async def later() -> AsyncIterator[bytes]:
            nonlocal now
            await full.wait()
            await asyncio.sleep(0.01)
            now -= 1
            yield json.dumps(said()).encode()

        return 200, later, {}

    results, _, _ = scripted(answer, [ask(str(n), f"row {n}") for n in range(40)], concurrency=7)
    assert [text_of(result) for result in results] == ["fine"] * 40 and most == 7
