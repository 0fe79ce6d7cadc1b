"""A real endpoint process for the tests."""

import json
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


class MockEndpoint:
    """The server of mock_endpoint.py. It can die, and come back at the same address."""

    def __init__(self, latency: float = 0.01, obedient: bool = False):
        self.latency, self.port, self.obedient = latency, 0, obedient
        self.start()

    def start(self) -> None:
        command = [
            sys.executable,
            str(Path(__file__).with_name("mock_endpoint.py")),
            "--port",
            str(self.port),
            "--latency",
            str(self.latency),
        ]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def stats(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/_stats", timeout=10) as reply:
            return json.load(reply)


@pytest.fixture
def start_endpoint() -> Iterator[Callable[..., MockEndpoint]]:
    started: list[MockEndpoint] = []

    def start(**options: Any) -> MockEndpoint:
        started.append(MockEndpoint(**options))
        return started[-1]

    yield start
    for endpoint in started:
        endpoint.kill()


@pytest.fixture
def endpoint(start_endpoint: Callable[..., MockEndpoint]) -> MockEndpoint:
    return start_endpoint()
