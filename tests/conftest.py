"""A tiny Base made in seconds that knows a few sentences by heart; a whole run of it through the loop; and an endpoint."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gristmill.core.config import check
from gristmill.core.progress import Progress
from gristmill.data.chat import Conversation, Message
from gristmill.data.chat_format import FORMATS
from gristmill.data.rows import Demonstration
from gristmill.data.tokenizer import Tokenizer
from gristmill.miniature import followups
from gristmill.miniature.world import NEXT_REQUEST, PROMPT_REQUEST, TOPIC_REQUEST, World
from gristmill.model.config import ModelConfig, uniform_blocks
from gristmill.model.hf_save import save_model
from gristmill.model.transformer import Transformer
from gristmill.train.objectives.sft import demonstration_samples, sft_objective
from gristmill.train.trainer import Trainer, TrainSettings
from gristmill.workflows.alignment import loop
from gristmill.workflows.alignment.recipe import AlignmentRecipe

MakeRecipe = Callable[..., AlignmentRecipe]

LESSONS = 3  # problems a task that the tiny Base learns by heart
STEPS = 150


def lessons(world: World) -> list[Conversation]:
    """Topics, prompts and answers to learn by heart: enough for a model to write prompts that the verifiers understand."""
    rng = random.Random("lessons")
    out: list[Conversation] = []

    def teach(asked: str, said: str) -> None:
        out.append((Message("user", asked), Message("assistant", said)))

    for task, request in PROMPT_REQUEST.items():
        for _ in range(LESSONS):
            problem = world.draw(rng, task)
            if task in TOPIC_REQUEST:
                teach(TOPIC_REQUEST[task], problem.topic)
            teach(request.format(topic=problem.topic), problem.question)
            teach(problem.question, problem.answer)
    for _ in range(LESSONS):
        problem = world.draw(rng, followups.TASK)
        teach(NEXT_REQUEST.format(question=problem.messages[0].content, answer=problem.messages[1].content), problem.question)
        out.append((*problem.messages, Message("assistant", problem.answer)))
    return out


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a Base of two layers and 512 tokens that ends its turns and writes some prompts that make sense."""
    torch.set_num_threads(1)
    texts = lessons(World.make())
    chat_format = FORMATS["nemotron"]
    headers = ["System\n", "User\n", "Assistant\n"]
    tokenizer = Tokenizer.train([m.content for text in texts for m in text] + headers, 512, chat_format.special_tokens)
    model = Transformer(ModelConfig("nemotron", tokenizer.vocab_size, 32, uniform_blocks(2, 2, 1, 16, 96), max_positions=256))
    model.init_weights(0)
    rows = [Demonstration(f"lesson-{i}", "", text, "human") for i, text in enumerate(texts)]
    settings = TrainSettings(optimizer="muon", lr=1e-2, muon_lr=0.05, steps=STEPS, batch_size=16, schedule="linear", warmup_steps=5)
    Trainer(model, sft_objective, settings).fit(demonstration_samples(rows, chat_format, tokenizer))
    folder = tmp_path_factory.mktemp("tiny") / "base"
    save_model(model, tokenizer, folder)
    return folder


@pytest.fixture(scope="session")
def random_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a Base with random weights, a tokenizer of bytes and the chatml format."""
    tokenizer = Tokenizer.train(["a b c"], 300, FORMATS["chatml"].special_tokens)
    model = Transformer(ModelConfig("llama", tokenizer.vocab_size, 16, uniform_blocks(1, 2, 1, 8, 32), max_positions=256))
    model.init_weights(0)
    folder = tmp_path_factory.mktemp("random") / "base"
    save_model(model, tokenizer, folder)
    return folder


class MockEndpoint:
    """The server of mock_endpoint.py. It can die, and come back at the same address."""

    def __init__(self, latency: float = 0.01, obedient: bool = False):
        self.latency, self.port, self.obedient = latency, 0, obedient
        self.start()

    def start(self) -> None:
        command = [
            sys.executable,
            str(Path(__file__).parent / "generation" / "mock_endpoint.py"),
            "--port",
            str(self.port),
            "--latency",
            str(self.latency),
        ]
        command += ["--obedient"] * self.obedient
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


@pytest.fixture(scope="session")
def comes_true() -> Callable[[Callable[[], bool]], bool]:
    """Whether a condition comes true within a minute, which is enough for the busiest machine."""

    def wait(condition: Callable[[], bool]) -> bool:
        end = time.monotonic() + 60
        while not condition():
            if time.monotonic() > end:
                return False
            time.sleep(0.01)
        return True

    return wait


def content(folder: Path) -> dict[str, bytes]:
    """Every file under a folder and its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="session")
def snapshot() -> Callable[[Path], dict[str, bytes]]:
    """Every file under a folder and its bytes, to tell that nothing was touched."""
    return content


# ---- one run of the whole loop, in two seconds ----

# Every threshold lets everything pass: so small a model has no quality to filter by, but every stage has rows to work on.
TINY: dict[str, Any] = {
    "name": "tiny",
    "rounds": 1,
    "rpo_iterations": 1,
    "threads": 1,
    "data": {"num_demonstrations": 64, "num_rated_prompts": 24, "num_prompts": 6, "num_evaluation": 2, "num_held_out_ratings": 10},
    "topics": {"macro": 6, "subtopics": 0, "own": ["Batru", "Fikro"]},
    "pipelines": {
        "open_qa": {"questions": 4, "revisions": 0},
        "math": {"own": ["apples"], "topics": 4, "subtopics": 0, "levels": ["school"], "forms": ["general"], "problems": 6},
        "python": {"own": ["lists"], "topics": 4, "subtopics": 0, "levels": ["beginner"], "problems": 6},
        "writing": {"own": ["fruits", "tools"], "kinds": ["list"], "kinds_per_topic": 1, "tasks": 6, "revisions": 0},
        "two_turn": {"prompts": 12},
    },
    "answers": {"samples": 4, "temperatures": [0.7, 1.0], "max_tokens": 32},
    "engine": {"precision": "fp32"},
    "judging": {"keep": "correctness >= -99", "min_votes": 1, "min_gap": 0},
    "collapse": {"tokens": 400, "stop": 9},
    "demonstration_sft": {"lr": 1e-5, "steps": 2, "batch_size": 8, "precision": "fp32"},
    "reward": {"lr": 5e-4, "steps": 3, "batch_size": 8, "precision": "fp32"},
    "code_sft": {"lr": 1e-5, "steps": 2, "batch_size": 8, "precision": "fp32"},
    "general_sft": {"lr": 1e-5, "steps": 3, "batch_size": 8, "precision": "fp32"},
    "dpo": {"lr": 1e-4, "steps": 2, "batch_size": 4, "precision": "fp32", "num_prompts": 24, "keep_chosen": "correctness >= -99"},
    "rpo": {
        "lr": 1e-4,
        "steps": 2,
        "batch_size": 4,
        "precision": "fp32",
        "num_prompts": 24,
        "keep_chosen": "correctness >= -99",
        "loss": "rpo",
    },
}


@pytest.fixture(scope="session")
def tiny_recipe(tiny_base: Path) -> dict[str, Any]:
    """The tiny recipe on the miniature world, as plain values."""
    return {"world": "miniature", "model": str(tiny_base), **TINY}


@pytest.fixture(scope="session")
def make_recipe(tiny_recipe: dict[str, Any]) -> MakeRecipe:
    """The tiny recipe with changes by key; a section's changes are merged into it."""

    def make(**changes: Any) -> AlignmentRecipe:
        values = dict(tiny_recipe)
        for key, value in changes.items():
            values[key] = {**values[key], **value} if isinstance(value, dict) and key in values else value
        return check(AlignmentRecipe, values)

    return make


def run_quietly(recipe: AlignmentRecipe, folder: Path) -> dict[str, Any]:
    with Progress(quiet=True) as progress:
        return loop.run(recipe, folder, progress)


@pytest.fixture(scope="session")
def run() -> Callable[[AlignmentRecipe, Path], dict[str, Any]]:
    """run(recipe, folder) -> results, without a display."""
    return run_quietly


@pytest.fixture(scope="session")
def finished(make_recipe: MakeRecipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of the tiny recipe. Read only: take `copy` to change it."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    run_quietly(make_recipe(), folder)
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(finished, tmp_path / "tiny"))


@pytest.fixture
def disk_log(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Path, int | Path]]:
    """What is really synced and renamed, in order: ("fsync", path, size then) and ("rename", from, to)."""
    log: list[tuple[str, Path, int | Path]] = []
    fsync = os.fsync

    def synced(descriptor: int) -> None:
        fsync(descriptor)
        log.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}")), os.fstat(descriptor).st_size))

    def renaming(rename: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
        def renamed(source: Any, target: Any) -> None:
            rename(source, target)
            log.append(("rename", Path(source), Path(target)))

        return renamed

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renaming(os.rename))
    monkeypatch.setattr(os, "replace", renaming(os.replace))
    return log
