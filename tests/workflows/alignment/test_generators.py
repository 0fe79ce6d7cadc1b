"""Who writes a round: an endpoint (a real `gristmill serve`), a model folder, a checkpoint of the run, or several of them by weight."""

import json
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gristmill.core.config import dump
from gristmill.core.errors import InputError
from gristmill.generation.endpoint import WORKERS_PER_SLOT
from gristmill.runs import artifacts
from gristmill.workflows.alignment.recipe import AlignmentRecipe
from gristmill.workflows.dataset.lineage import lineage

Make = Callable[..., AlignmentRecipe]
Run = Callable[[AlignmentRecipe, Path], dict[str, Any]]
CONCURRENCY = 4


@pytest.fixture
def served(tiny_base: Path) -> Iterator[str]:
    """The base URL of a server of the tiny Base, which knows how to write prompts and answers."""
    command = [sys.executable, "-m", "gristmill.cli", "serve", str(tiny_base), "--port", "0", "--name", "teacher"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("teacher answers at "), line
    yield line.split()[-1]
    process.terminate()
    process.wait(20)


def answered(url: str) -> int:
    """Chat completions that the server has given so far."""
    with urllib.request.urlopen(url.removesuffix("/v1") + "/metrics") as reply:
        found = re.search(r'gristmill_requests_total\{path="/v1/chat/completions",status="200"\} (\S+)', reply.read().decode())
    return int(float(found[1])) if found else 0


def calls(folder: Path) -> dict[str, list[str]]:
    """The ids in the journal of each stage of the first round that asks the generators."""
    names = ("-r1-prompts", "-r1-answers")
    found = {path.parent.name: path for path in folder.glob(f"*/{artifacts.CALLS.file}") if path.parent.name.endswith(names)}
    return {name: [json.loads(line)["id"] for line in path.read_text().splitlines()] for name, path in sorted(found.items())}


def test_an_endpoint_writes_the_first_round_and_nothing_is_bought_twice(served: str, make_recipe: Make, tmp_path: Path) -> None:
    teacher = {"base_url": served, "model": "teacher", "rounds": [1]}
    recipe = make_recipe(generators=[teacher], calls={"concurrency": CONCURRENCY}, rpo_iterations=0)
    path, folder = tmp_path / "recipe.yaml", tmp_path / "run"
    path.write_text(dump(recipe))
    command = [sys.executable, "-m", "gristmill.cli", "run", str(path), "--out", str(folder), "--quiet"]
    kills, before = 0, dict[str, list[str]]()
    for stage, lines in (("r1-prompts", 5), ("r1-answers", 3)):  # killed in the middle of each
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while process.poll() is None and not any(len(ids) >= lines for name, ids in calls_now(folder).items() if name.endswith(stage)):
            time.sleep(0.005)
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        now = calls_now(folder)
        assert all(now[name][: len(ids)] == ids for name, ids in before.items())
        before = now
    assert kills == 2
    assert subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 0
    bought = calls(folder)
    assert all(bought[name][: len(ids)] == ids for name, ids in before.items())
    assert all(len(ids) == len(set(ids)) for ids in bought.values()) and len(bought) == 2
    # what was under way at a kill, and not yet in the journal, is all that may have been asked again
    records = [json.loads(line) for name in bought for line in (folder / name / artifacts.CALLS.file).read_text().splitlines()]
    assert answered(served) <= sum(record.get("attempts", 1) for record in records) + kills * CONCURRENCY * WORKERS_PER_SLOT
    rows = artifacts.RESPONSES.read(next(folder.glob("*-r1-answers")))
    assert {r.generator for r in rows} == {"teacher"} and len(rows) > 10
    prompts = artifacts.PROMPTS.read(next(folder.glob("*-r1-prompts")))
    assert {p.origin for p in prompts} == {"file", "teacher"}
    # pairs are of the run's own model; lineage goes from an answer to the call and the topic
    assert {r.generator for r in artifacts.RESPONSES.read(next(folder.glob("*-r1-dpo-pairs")))} == {"r1-general-sft"}
    written = next(r for r in rows if any(p.id == r.prompt and p.origin == "teacher" for p in prompts))
    chain = lineage(folder, written.id)
    assert chain[0]["kind"] == "response" and {e["kind"] for e in chain} >= {"prompt", "call"}


def calls_now(folder: Path) -> dict[str, list[str]]:
    """As `calls`, while a torn line may be there."""
    names = ("-r1-prompts", "-r1-answers")
    found = {}
    for path in folder.glob(f"*/{artifacts.CALLS.file}"):
        if path.parent.name.endswith(names):
            lines = path.read_bytes().split(b"\n")[:-1]
            found[path.parent.name] = [json.loads(line)["id"] for line in lines]
    return found


def test_generators_share_the_rows_by_weight(make_recipe: Make, run: Run, tiny_base: Path, tmp_path: Path) -> None:
    generators = [{"checkpoint": "latest", "weight": 1}, {"folder": str(tiny_base), "weight": 3}]
    recipe = make_recipe(generators=generators, rpo_iterations=0)
    run(recipe, tmp_path / "run")
    rows = artifacts.RESPONSES.read(next((tmp_path / "run").glob("*-r1-answers")))
    count = Counter(r.generator for r in rows)
    assert set(count) == {"demonstrations", "base"} and count["base"] > count["demonstrations"]
    before = json.loads((tmp_path / "run" / "results.json").read_text())
    assert run(recipe, tmp_path / "run").items() <= before.items()


def test_a_generator_that_is_not_there_is_told_before_work(make_recipe: Make, run: Run, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="GRISTMILL_NO_KEY"):
        run(make_recipe(generators=[{"base_url": "http://x/v1", "model": "m", "api_key_env": "GRISTMILL_NO_KEY"}]), tmp_path / "run")
    with pytest.raises(InputError, match=r"no config.json|nowhere"):
        run(make_recipe(generators=[{"folder": str(tmp_path / "nowhere")}]), tmp_path / "run")
    with pytest.raises(InputError, match="checkpoint 'r1-rpo9'.*latest, demonstrations"):
        run(make_recipe(generators=[{"checkpoint": "r1-rpo9"}]), tmp_path / "run")
    assert not (tmp_path / "run").exists()
