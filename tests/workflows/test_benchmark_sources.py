"""Sources of answers: an endpoint gives what the engine gives, and says in one sentence what it cannot do."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from gristmill.core.errors import InputError
from gristmill.engine.load import EngineArgs, load_engine
from gristmill.evaluate.task import GenerationKwargs
from gristmill.workflows.benchmark_sources import Chat, EndpointSource, EngineSource, replied, sampling_of

PAIRS = [("Why so? ", "yes"), ("Why so?", " no"), ("Because it is", " a long reason of some words"), ("Why so?", " yes")]


@pytest.fixture(scope="module")
def served(random_base: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "gristmill.cli", "serve", str(random_base), "--port", "0", "--name", "m", "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().split()[-1]
        process.terminate()


def test_an_endpoint_gives_what_the_engine_gives(served: str, random_base: Path) -> None:
    here, there = EngineSource(load_engine(random_base, EngineArgs(device="cpu"))), EndpointSource(served, "m")
    own, told = dict(here.likelihoods(PAIRS)), dict(there.likelihoods(PAIRS))
    assert own.keys() == told.keys() == set(range(4))
    for number, one in own.items():
        assert told[number].logprob == pytest.approx(one.logprob, abs=1e-3)
    assert own[0].logprob == pytest.approx(own[3].logprob, abs=1e-5)  # the blank belongs to the continuation
    settings = GenerationKwargs(until=("e", "\n"), max_gen_toks=12)
    texts = {number: answer.text for number, answer in here.generate(["Ask", "Tell me"], settings, chat=None, seed=0)}
    assert {number: answer.text for number, answer in there.generate(["Ask", "Tell me"], settings, chat=None, seed=0)} == texts
    assert all("e" not in text and "\n" not in text for text in texts.values())
    for chat in (Chat(), Chat("off"), Chat("on", 4), Chat("", 0)):
        found = [dict(source.generate(["Ask", "Tell me"], settings, chat=chat, seed=0)) for source in (here, there)]
        assert [answer.text for answer in found[0].values()] == [found[1][number].text for number in found[0]]
    with pytest.raises(InputError, match="give a model folder"):
        list(there.rolling(["text"]))


def test_thinking_is_asked_for_and_stop_sequences_are_for_the_reply() -> None:
    settings = GenerationKwargs(until=("\n", "Q:"), max_gen_toks=12)
    on = Chat("on", 30)
    assert [m.content for m in on.messages("Why?")] == ["detailed thinking on", "Why?"] and len(Chat().messages("Why?")) == 1
    assert sampling_of(settings, on).stop == () and sampling_of(settings, on).max_tokens == 42
    assert sampling_of(settings, Chat("off")).stop == sampling_of(settings, None).stop == ("\n", "Q:")
    assert replied("<think>a\nb</think>c Q: d\n", settings, on) == "<think>a\nb</think>c "
    assert replied("no form\nQ: d", settings, on) == "no form" and replied("<think>a\n", settings, on) == "<think>a"
    assert replied("<think>a\nb</think>c", settings, on) == "<think>a\nb</think>c" and replied("c\nd", settings, None) == "c\nd"


@contextmanager
def answering(reply: Callable[[dict[str, Any]], tuple[int, dict[str, Any]]]) -> Iterator[EndpointSource]:
    """A server of completions, by what it replies."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            status, answer = reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            body = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield EndpointSource(f"http://127.0.0.1:{server.server_address[1]}/v1", "plain")
    finally:
        server.shutdown()
        server.server_close()


def echoed(text: str, logprobs: list[float | None]) -> dict[str, Any]:
    told = {"text_offset": list(range(len(logprobs))), "token_logprobs": logprobs}
    return {"choices": [{"text": text, "logprobs": told, "finish_reason": "length"}], "usage": {}}


@pytest.mark.parametrize(
    ("status", "answer", "said"),
    [
        (200, {"choices": [{"text": "x", "finish_reason": "stop"}], "usage": {}}, "tells no log-probabilities of a prompt"),
        (400, {"error": {"message": "echo is no such argument"}}, "no such argument.* Choices are scored by echo and logprobs"),
        (200, echoed("so? yes", [None, -1.0, -1.0, -1.0]), "repeats 7 of a prompt's 11 characters, so it was cut"),
        (200, echoed("Why so? yes!", [None, -1.0, float("nan")]), "request 1: .*malformed|request 1: .*cannot be read"),
    ],
)
def test_an_endpoint_that_tells_no_likelihoods_is_refused_in_one_sentence(
    status: int, answer: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gristmill.generation.endpoint.MIN_BACKOFF", 0.0)
    with answering(lambda body: (status, answer)) as source, pytest.raises(InputError, match=said):
        list(source.likelihoods(PAIRS[:1]))


def test_an_endpoint_that_refuses_a_temperature_is_asked_without_it_and_says_so() -> None:
    def reply(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if "temperature" in body:
            return 400, {"error": {"message": "temperature is not supported", "param": "temperature"}}
        return 200, {"choices": [{"text": "yes", "finish_reason": "stop"}], "usage": {}}

    with answering(reply) as source:
        ((_, answer),) = source.generate(["Why?"], GenerationKwargs(), chat=None, seed=0)
        assert answer.text == "yes" and answer.left_out == ("temperature",)


def test_a_beginning_of_text_token_stands_where_the_tokenizer_puts_one(random_base: Path) -> None:
    engine = load_engine(random_base, EngineArgs(device="cpu"))
    plain = dict(EngineSource(engine).likelihoods([("Why", " so"), ("", "so")]))
    tokenizer = engine.tokenizer
    assert tokenizer.text_prefix == [] and tokenizer.context_id == tokenizer.eos_id
    tokenizer.__dict__["text_prefix"] = [5]
    begun = dict(EngineSource(engine).likelihoods([("Why", " so"), ("", "so")]))
    whole = [5, *tokenizer.encode("Why so")]
    num = len(tokenizer.encode(" so"))
    assert begun[0].logprob == pytest.approx(sum(engine.prompt_logprobs(whole, 1)[0][-num:]), abs=1e-4)
    assert begun[0].logprob != pytest.approx(plain[0].logprob, abs=1e-4)
    alone = [tokenizer.eos_id, *tokenizer.encode("so")]
    assert plain[1].logprob == pytest.approx(sum(engine.prompt_logprobs(alone, 1)[0]), abs=1e-4)
