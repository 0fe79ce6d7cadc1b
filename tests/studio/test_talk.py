"""Chat and red team at the API: a model of a run in a process of its own, rows that people make, transformations and guards."""

import http.client
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from gristmill.core.errors import InputError
from gristmill.data.rows import Demonstration, read_rows
from gristmill.evaluate.safety import read_probes
from gristmill.studio import export
from gristmill.studio.guard import GuardView, guard_of
from gristmill.studio.serve import open_store
from tests.studio.conftest import Client, Served

HELLO = [{"role": "user", "content": "What is the capital of Batru?"}]
TALK = [*HELLO, {"role": "assistant", "content": "I cannot say."}]


@pytest.fixture(scope="module")
def opened(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A studio of a finished run, with a guard that finds everything unsafe."""
    run = Path(shutil.copytree(finished, tmp_path_factory.mktemp("talk") / "run"))

    class Guard(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert asked["model"] == "llama-guard" and asked["messages"][-1]["content"] == "I cannot say."
            body = json.dumps({"choices": [{"message": {"content": "unsafe\nO3"}}]}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Guard)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    guard = guard_of(f"llama-guard=http://127.0.0.1:{server.server_port}/v1", "llama-guard", "")
    store, sources = open_store(run)
    made = Served(store, sources, guard=guard)
    yield made
    made.stop()
    store.database.close()
    server.shutdown()


def stream(client: Client, body: dict[str, Any], until: Callable[[dict[str, Any]], bool] = lambda piece: False) -> list[dict[str, Any]]:
    """Pieces of an answer; the connection is closed where `until` says so."""
    connection = http.client.HTTPConnection(client.origin.partition("//")[2], timeout=300)
    connection.request("POST", "/studio/api/chat", json.dumps(body), client.headers)
    reply, pieces = connection.getresponse(), []
    assert reply.status == 200, reply.read()
    while line := reply.readline():
        pieces.append(json.loads(line))
        if until(pieces[-1]):
            break
    connection.close()
    return pieces


def test_a_model_of_the_run_answers_stops_and_never_blocks(opened: Served) -> None:
    client = opened.client("expert")
    models = [model["name"] for model in client.api("GET", "/models")[1]["models"]]
    assert models[0] == "r1-rpo1" and models[-1] == "base"
    body = {"model": "demonstrations", "messages": HELLO, "max_tokens": 24, "temperature": 1.0, "seed": 3}
    loading = threading.Event()
    whole: list[dict[str, Any]] = []
    asking = threading.Thread(target=lambda: whole.extend(stream(client, body, lambda piece: loading.set() or False)))
    asking.start()
    assert loading.wait(60)
    assert client.api("GET", "/me")[0] == 200 and not any("finish" in piece for piece in whole)  # while the model is loaded
    asking.join(120)
    assert whole[0] == {"state": "loading"} and whole[-1]["finish"] in ("stop", "length")
    tokens = [token for piece in whole for token in piece.get("tokens", ())]
    assert tokens and all(logprob <= 0 and len(others) == 4 for _, logprob, others in tokens)
    assert stream(client, body)[-1]["finish"] == whole[-1]["finish"]  # it is up now: nothing is loaded again
    assert client.api("GET", "/models")[1]["up"] == "demonstrations"
    stream(client, body | {"max_tokens": 200}, until=lambda piece: bool(piece.get("tokens")))  # the page has gone
    other = stream(client, body | {"model": "base"}, until=lambda piece: "error" in piece or bool(piece.get("tokens")))
    assert other[0] == {"state": "loading"} and not any("error" in piece for piece in other)  # so another one can be loaded
    assert client.api("POST", "/chat", body | {"model": "nobody"})[0] == 404
    for wrong in ({"messages": TALK}, {"temperature": 9}, {"max_tokens": 0}, {"messages": [{"role": "tool", "content": ""}]}):
        assert client.api("POST", "/chat", body | wrong)[0] == 400


def test_a_chat_becomes_a_demonstration(opened: Served, tmp_path: Path) -> None:
    client, name = opened.client("expert"), str(uuid4())
    for _ in range(2):  # as if the first reply had been lost
        assert client.api("POST", "/made", {"id": name, "messages": TALK, "task": "facts", "model": "base"})[0] == 200
    assert client.api("POST", "/made", {"id": str(uuid4()), "messages": HELLO})[0] == 400
    export.write(opened.store, opened.studio.service.sources, "demonstrations.parquet", tmp_path / "d.parquet")
    (row,) = read_rows(tmp_path / "d.parquet", Demonstration)
    assert row.task == "facts" and row.messages[-1].content == "I cannot say." and row.meta["person"] == client.person.pseudonym


def test_attacks_are_transformed_kept_and_asked_again(opened: Served, tmp_path: Path) -> None:
    client = opened.client("expert")
    assert client.api("POST", "/attacks/transform", {"text": "abc", "spec": "hex"})[1]["text"].endswith("616263")
    status, said = client.api("POST", "/attacks/transform", {"text": "abc", "spec": "base46"})
    assert status == 400 and "did you mean base64" in said["error"]
    attack = {"category": "O3", "transforms": "hex", "conversation": TALK, "model": "base", "outcome": "partial", "codes": ["O3"]}
    status, view = client.api("POST", "/attacks", attack | {"id": str(uuid4())})
    assert status == 200 and view == {"refusal": "full", "guard": {"unsafe": True, "codes": ["O3"], "says": ""}}
    assert client.api("POST", "/attacks", attack | {"id": str(uuid4()), "outcome": "refused"})[0] == 200
    assert client.api("POST", "/attacks", attack | {"id": str(uuid4()), "outcome": "won"})[0] == 400
    told = client.api("GET", "/attacks")[1]
    assert told["counts"]["partial"] == 1 and told["regressions"] == 1 and "guard" not in told["attacks"][0]
    for name in ("attacks.jsonl", "regressions.jsonl"):
        export.write(opened.store, opened.studio.service.sources, name, tmp_path / name)
    (probe,) = read_probes(tmp_path / "regressions.jsonl", "regressions")  # what `safety.rows` of a recipe reads
    assert probe.label == "unsafe" and probe.type == "O3" and probe.attack == "hex" and probe.messages[-1].content == HELLO[0]["content"]
    assert len((tmp_path / "attacks.jsonl").read_text().splitlines()) == 2
    annotator = opened.client("annotator")
    for method, path in (("GET", "/attacks"), ("GET", "/models"), ("POST", "/chat"), ("POST", "/made")):
        assert annotator.api(method, path, {} if method == "POST" else None)[0] == 403


def test_a_guard_that_cannot_be_asked_says_so() -> None:
    silent = GuardView("judge", "http://127.0.0.1:1/v1", "m")
    assert silent.verdict(TALK) == {"unsafe": None, "codes": [], "says": "The guard cannot be asked (URLError)."}
    assert guard_of("", "", "") is None
    for spec, model, words in (("magic=http://x/v1", "m", "is no guard"), ("judge=http://x/v1", "", "--guard-model")):
        with pytest.raises(InputError, match=words):
            guard_of(spec, model, "")
    with pytest.raises(InputError, match="no key in NO_SUCH_KEY"):
        guard_of("judge=http://x/v1", "m", "NO_SUCH_KEY")
