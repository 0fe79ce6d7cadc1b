"""Sources of answers: an endpoint gives what the engine gives, and says in one sentence what it cannot do."""

import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from gristmill.core.errors import InputError
from gristmill.engine.load import EngineArgs, load_engine
from gristmill.evaluate.task import GenerationKwargs
from gristmill.workflows.benchmark_sources import EndpointSource, EngineSource

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
    texts = {number: answer.text for number, answer in here.generate(["Ask", "Tell me"], settings, chat=False, seed=0)}
    assert {number: answer.text for number, answer in there.generate(["Ask", "Tell me"], settings, chat=False, seed=0)} == texts
    assert all("e" not in text and "\n" not in text for text in texts.values())
    with pytest.raises(InputError, match="give a model folder"):
        list(there.rolling(["text"]))


class _Plain(BaseHTTPRequestHandler):
    """A server of completions that ignores echo and logprobs, and gives empty answers to who asks for several tokens."""

    def do_POST(self) -> None:
        asked = self.rfile.read(int(self.headers["Content-Length"]))
        text = b"x" if b'"max_tokens": 1,' in asked else b""
        body = b'{"choices": [{"text": "' + text + b'", "finish_reason": "stop"}], "usage": {}}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


def test_an_endpoint_without_echo_is_refused_in_one_sentence() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Plain)
    Thread(target=server.serve_forever, daemon=True).start()
    source = EndpointSource(f"http://127.0.0.1:{server.server_address[1]}/v1", "plain")
    try:
        with pytest.raises(InputError, match="tells no log-probabilities of a prompt"):
            list(source.likelihoods(PAIRS))
    finally:
        server.shutdown()
        server.server_close()


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
