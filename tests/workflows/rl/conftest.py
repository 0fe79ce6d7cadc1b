"""A server that answers what a test tells it to, and a reward model."""

import json
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from gristmill.data.tokenizer import Tokenizer
from gristmill.model.hf import load_model
from gristmill.model.hf_save import save_reward
from gristmill.model.reward import RewardModel

Answer = Callable[[str, dict[str, Any]], tuple[int, Any]]  # of a path and a body: status and JSON


class JsonServer:
    """Attributes: url; seen, the bodies of all requests."""

    def __init__(self, answer: Answer):
        self.seen: list[dict[str, Any]] = []
        seen = self.seen

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                seen.append(body)
                status, said = answer(self.path, body)
                out = json.dumps(said).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(out)))
                self.end_headers()
                self.wfile.write(out)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture(scope="module")
def reward_folder(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward") / "model"
    save_reward(RewardModel(load_model(tiny_base)[0], seed=1), Tokenizer.load(tiny_base), folder)
    return folder


@pytest.fixture
def serve() -> Iterator[Callable[[Answer], JsonServer]]:
    servers: list[JsonServer] = []

    def start(answer: Answer) -> JsonServer:
        servers.append(JsonServer(answer))
        return servers[-1]

    yield start
    for one in servers:
        one.server.shutdown()
        one.server.server_close()


def chat_reply(text: str) -> dict[str, Any]:
    """A completion as an OpenAI-compatible endpoint gives it."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return {"id": "x", "object": "chat.completion", "choices": [choice], "usage": {"prompt_tokens": 1, "completion_tokens": 3}}


@pytest.fixture
def chat() -> Callable[[str], dict[str, Any]]:
    return chat_reply
