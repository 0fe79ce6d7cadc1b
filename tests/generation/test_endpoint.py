"""The endpoint client against a real server process that misbehaves on request."""

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from gristmill.core.errors import InputError
from gristmill.data.chat import Message
from gristmill.generation import endpoint as module
from gristmill.generation.api import Completion, Request, SamplingParams
from gristmill.generation.endpoint import Endpoint, RowFailed, Target


def ask(name: str, text: str, **sampling: Any) -> Request:
    return Request(name, (Message("user", text),), SamplingParams(**sampling))


def complete(endpoint: Endpoint, requests: Sequence[Request]) -> list[list[Completion] | RowFailed | Exception]:
    async def run() -> list[Any]:
        async with endpoint:
            return await asyncio.gather(*(endpoint.complete(request) for request in requests), return_exceptions=True)

    return asyncio.run(run())


def client(server: Any, **options: Any) -> Endpoint:
    target = {name: options.pop(name) for name in list(options) if name in Target.__dataclass_fields__}
    return Endpoint([Target(server.url, "mock", **target)], **{"timeout": 60.0, "patience": 60.0, **options})


def test_what_can_pass_is_tried_again(endpoint: Any) -> None:
    fates = ["429 ok", "500 ok", "bad ok", "empty ok", "reset ok", "429 500 bad reset empty ok", "ok"]
    requests = [ask(str(n), f"row {n} [fate {fate}]") for n, fate in enumerate(fates)]
    source = client(endpoint)
    for request, outs in zip(requests, complete(source, requests), strict=True):
        assert isinstance(outs, list) and [out.text for out in outs] == [f"answer to {request.messages[0].content}"]
    assert source.usage.rows == len(fates) and source.usage.failed == 0
    assert source.usage.errors == Counter({"429": 2, "500": 2, "malformed": 2, "empty": 2, "reset": 2})
    assert endpoint.stats()["requests"] == source.usage.requests == sum(len(fate.split()) for fate in fates)


def test_hostile_answers_fail_their_row_alone(endpoint: Any) -> None:
    requests = [ask(str(n), f"row {n} [fate {fate}]") for n, fate in enumerate(("endless", "deep", "filter", "surrogate", "ok"))]
    endless, deep, filtered, surrogate, fine = complete(client(endpoint, retries=1), requests)
    assert [str(failed) for failed in (endless, deep)] == [
        f"the answer cannot be read ({name})" for name in ("OverflowError", "RecursionError")
    ]
    assert isinstance(filtered, RowFailed) and "content filter" in str(filtered)
    assert isinstance(surrogate, list) and surrogate[0].text == "half a pair \ufffd" and isinstance(fine, list)


def test_a_key_at_the_edge_of_a_long_error_does_not_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOCK_KEY", "sk-very-secret")
    replica = module._Replica(Target("http://x/v1", "m", api_key_env="MOCK_KEY"), 1)
    for padding in range(270, 301):
        assert "sk" not in replica.redact("y" * padding + " Bearer sk-very-secret")


def test_a_replica_that_was_away_is_used_again(start_endpoint: Callable[..., Any]) -> None:
    away, there = start_endpoint(latency=0.01), start_endpoint(latency=0.01)
    away.kill()

    async def run() -> None:
        async with Endpoint([Target(server.url, "mock") for server in (away, there)], concurrency=4) as source:
            await asyncio.gather(*(source.complete(ask(str(n), f"row {n}")) for n in range(20)))
            await asyncio.to_thread(away.start)
            for wave in range(600):
                await asyncio.gather(*(source.complete(ask(f"{wave}-{n}", f"row {wave}-{n}")) for n in range(8)))
                if (await asyncio.to_thread(away.stats))["requests"] >= 10:
                    return
                await asyncio.sleep(0.1)
            raise AssertionError("it is left out for good")

    asyncio.run(run())


def test_a_used_up_budget_and_a_bad_request_end_one_row_each(endpoint: Any) -> None:
    requests = [ask("a", "a [fate 500]"), ask("b", "b [fate 400]"), ask("c", "c")]
    used_up, refused, fine = complete(client(endpoint, retries=2), requests)
    assert isinstance(used_up, RowFailed) and (used_up.attempts, used_up.status) == (3, 500)
    # its words say "rate" and "temperature", but its status says that the next attempt will fare no better
    assert isinstance(refused, RowFailed) and (refused.attempts, refused.status) == (1, 400) and "rate or temperature" in str(refused)
    assert isinstance(fine, list)


def test_a_time_out_is_tried_again(endpoint: Any) -> None:
    source = client(endpoint, timeout=1.0)
    (outs,) = complete(source, [ask("a", "a [fate hang ok]")])
    assert isinstance(outs, list) and source.usage.errors["timeout"] >= 1


def test_retry_after_is_honoured_by_that_row_alone(endpoint: Any) -> None:
    async def run() -> bool:
        async with client(endpoint) as source:
            slow = asyncio.ensure_future(source.complete(ask("slow", "slow [fate 429:600 ok]")))
            while not source.usage.errors["429"]:
                await asyncio.sleep(0.01)
            await asyncio.gather(*(source.complete(ask(str(n), f"row {n}")) for n in range(200)))
            waits = not slow.done()
            slow.cancel()
            return waits

    assert asyncio.run(run()) and endpoint.stats()["requests"] == 201


def test_samples_that_a_server_leaves_out_are_asked_for(endpoint: Any) -> None:
    whole, parts = complete(client(endpoint), [ask("a", "a", n=3), ask("b", "b [fate one]", n=3)])
    assert isinstance(whole, list) and isinstance(parts, list) and len(whole) == len(parts) == 3
    bodies = [body for body in endpoint.stats()["bodies"] if body["messages"][0]["content"].startswith("b")]
    assert [body.get("n", 1) for body in bodies] == [3, 2, 1]
    assert len({body["seed"] for body in bodies}) == 3  # or they would be the same answer


def test_the_request_says_what_was_asked_for(endpoint: Any) -> None:
    request = Request("a", (Message("system", "be kind"), Message("user", "hello")), SamplingParams(0.5, 0.9, 40, 17), seed=3)
    (outs,) = complete(client(endpoint, logprobs=True, price_in=1.0, price_out=2.0), [request])
    assert isinstance(outs, list) and outs[0].logprobs == (-0.5,) * 3 and outs[0].num_tokens == 3
    (again,) = complete(source := client(endpoint, kind="completions", price_in=1.0, price_out=2.0), [ask("b", "plain")])
    assert isinstance(again, list) and again[0].num_tokens == 20 and again[0].text == "answer to plain"
    assert (source.usage.tokens_in, source.usage.tokens_out) == (10, 20) and source.usage.cost == pytest.approx(50e-6)
    chat, text = endpoint.stats()["bodies"]
    assert isinstance(chat.pop("seed"), int)
    assert chat == {
        "model": "mock",
        "messages": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}],
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "max_tokens": 17,
        "logprobs": True,
    }
    assert text["prompt"] == "plain" and "messages" not in text


@pytest.mark.parametrize(
    ("status", "words"), [("401", "refuses the key"), ("403", "refuses the key"), ("404", "does not know the model 'mock'")]
)
def test_an_endpoint_that_refuses_everything_ends_the_run(endpoint: Any, status: str, words: str) -> None:
    results = complete(client(endpoint), [ask(str(n), f"row {n} [fate {status}]") for n in range(3)])
    assert all(isinstance(result, InputError) for result in results) and words in str(results[0])
    assert endpoint.stats()["requests"] == 3  # none was sent twice


def test_the_key_is_sent_and_shown_nowhere(endpoint: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("MOCK_KEY", "sk-very-secret")
    source = client(endpoint, api_key_env="MOCK_KEY", retries=0)
    (failed,) = complete(source, [ask("a", "a [fate 500]")])
    assert endpoint.stats()["keys"] == ["Bearer sk-very-secret"]
    assert "[key]" in str(failed) and "secret" not in str(failed) and "secret" not in repr(source)
    (tmp_path / "key").write_text("sk-from-file\n")
    complete(client(endpoint, api_key_file=str(tmp_path / "key")), [ask("b", "b")])
    assert endpoint.stats()["keys"][-1] == "Bearer sk-from-file"


def test_wrong_settings_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    for target, words in (
        (Target("localhost:8000", "m"), "not the base URL"),
        (Target("http://me:word@host/v1", "m"), "put the key into api_key_env"),
        (Target("http://host/v1", "m", api_key_env="NO_SUCH_KEY"), "NO_SUCH_KEY is empty"),
        (Target("http://host/v1", "m", api_key_file="/nowhere/key"), "cannot be read"),
    ):
        with pytest.raises(InputError, match=words):
            Endpoint([target])
    with pytest.raises(InputError, match="No endpoint is given"):
        Endpoint([])
    with pytest.raises(InputError, match="concurrency must be at least 1"):
        Endpoint([Target("http://host/v1", "m")], concurrency=0)


def test_an_address_where_nobody_is_ends_the_run(start_endpoint: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    server = start_endpoint()
    server.kill()
    monkeypatch.setattr(module, "STARTUP_PATIENCE", 0.3)
    (error,) = complete(client(server), [ask("a", "a")])
    assert isinstance(error, InputError) and "has not answered for" in str(error) and "start the server" in str(error)


def test_an_endpoint_that_dies_and_comes_back_loses_no_row(start_endpoint: Callable[..., Any]) -> None:
    server = start_endpoint(latency=0.05)

    async def run() -> list[Any]:
        async with client(server, concurrency=8, retries=2, patience=60.0) as source:
            rows = [asyncio.ensure_future(source.complete(ask(str(n), f"row {n}"))) for n in range(60)]
            while source.usage.rows < 20:
                await asyncio.sleep(0.01)
            server.kill()
            await asyncio.sleep(1.5)
            await asyncio.to_thread(server.start)
            return await asyncio.gather(*rows)

    assert [outs[0].text for outs in asyncio.run(run())] == [f"answer to row {n}" for n in range(60)]


def test_an_outage_behind_a_gateway_costs_no_row_its_budget(endpoint: Any) -> None:
    (outs,) = complete(client(endpoint, retries=0), [ask("a", "a [fate 503 502 504 ok]")])
    assert isinstance(outs, list)


def test_a_row_that_only_gets_a_gateways_errors_fails_alone(endpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STARTUP_PATIENCE", 0.5)
    source = client(endpoint, retries=1, patience=0.5)
    poison, fine = complete(source, [ask("a", "a [fate 504]"), ask("b", "b")])
    assert isinstance(poison, RowFailed) and poison.status == 504 and isinstance(fine, list)
    (alone,) = complete(client(endpoint, retries=1, patience=0.5), [ask("a", "a [fate 504]")])
    assert isinstance(alone, RowFailed)


def test_rows_go_to_models_by_weight_and_always_to_the_same() -> None:
    def source() -> Endpoint:
        return Endpoint([Target("http://a/v1", "large", 3.0), Target("http://b/v1", "small", 1.0), Target("http://c/v1", "small", 1.0)])

    counts = Counter(source().model_of(str(n)) for n in range(4000))
    assert counts["large"] == pytest.approx(3000, abs=100) and counts["small"] == pytest.approx(1000, abs=100)
    assert [source().model_of(str(n)) for n in range(50)] == [source().model_of(str(n)) for n in range(50)]
    assert source().name == "large+small"


def test_replicas_share_the_rows(start_endpoint: Callable[..., Any]) -> None:
    servers = [start_endpoint(latency=0.05) for _ in range(2)]
    source = Endpoint([Target(server.url, "mock") for server in servers], concurrency=4)
    complete(source, [ask(str(n), f"row {n}") for n in range(40)])
    requests = [server.stats()["requests"] for server in servers]
    assert sum(requests) == 40 and min(requests) >= 15


def test_it_is_a_generator(endpoint: Any) -> None:
    requests = [ask(str(n), f"row {n}") for n in range(30)]
    source = client(endpoint, concurrency=4)
    results = {request.id: outs[0].text for request, outs in source.generate(iter(requests))}
    assert results == {str(n): f"answer to row {n}" for n in range(30)}
    with pytest.raises(RowFailed, match="400"):
        list(source.generate([ask("a", "a [fate 400]")]))
    stream = source.generate(iter(requests))
    next(stream)
    stream.close()  # leaves nothing running behind
