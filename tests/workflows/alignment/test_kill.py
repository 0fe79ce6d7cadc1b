"""`kill -9` at any moment, then the same command: the same rows and results, and nothing finished is generated again."""

import json
import math
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gristmill.core.config import dump
from gristmill.data.rows import read_records

KILLS = int(os.environ.get("GRISTMILL_TEST_KILLS", "10"))
SEED = 5
ROWS = ("prompts.parquet", "kept.parquet", "pairs.parquet", "responses.parquet")

# Imports once, then runs each command line it reads in a forked process: a start costs no import, a kill is a real one.
# It comes after so many seconds, or in the middle of a journal's n-th line from then on. Training saves its state after every
# step, so that kills meet half-trained models.
LAUNCHER = """
import json, os, signal, sys, time
import gristmill.workflows.alignment.loop, gristmill.report.alignment, gristmill.report.summary
from gristmill.cli.main import app
from gristmill.workflows.alignment import ranks
from gristmill.runs.journal import Journal

ranks.CHECKPOINT_SECONDS = 0.001
append = Journal.append
left = None

def append_or_die(journal, record):
    global left
    if left == 1:
        journal._file.write(json.dumps(record).encode()[:9])
        os.kill(os.getpid(), signal.SIGKILL)
    left = left and left - 1
    append(journal, record)

Journal.append = append_or_die
print("ready", flush=True)
for line in sys.stdin:
    arguments, seconds, left = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.dup2(2, 1)
        app(arguments)
    if seconds:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)  # not waited for yet: the pid is still its own
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Launcher:
    """Starts `gristmill` processes one after the other."""

    def __init__(self, folder: Path):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def run(self, arguments: list[str], seconds: float | None = None, lines: int | None = None) -> int:
        """Exit code of a command; -9 when it was killed, after so many seconds or in so many lines, before it ended."""
        assert self.process.stdin
        self.process.stdin.write(json.dumps([arguments, seconds, lines]) + "\n")
        self.process.stdin.flush()
        return int(self._line())

    def close(self) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.wait(10)
        self.process.stdout.close()


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[Launcher]:
    launched = Launcher(tmp_path)
    yield launched
    launched.close()


def journals(folder: Path) -> dict[str, list[str]]:
    """Whole lines of every journal, by its path in the run."""
    found = {}
    for path in sorted(folder.glob("*/*.jsonl")):
        text = path.read_bytes()
        found[str(path.relative_to(folder))] = text[: text.rfind(b"\n") + 1].decode().splitlines()
    return found


def rows(folder: Path) -> dict[str, list[Any]]:
    """What the run made: every row of prompts, kept answers and pairs; ids and texts of responses."""
    found = {}
    for path in sorted(p for name in ROWS for p in folder.glob(f"*/{name}")):
        records = read_records(path)
        if path.name == "responses.parquet":
            records = [{k: r[k] for k in ("id", "prompt", "text", "finished", "good")} for r in records]
        if path.name == "pairs.parquet":
            records = [{k: v for k, v in r.items() if not k.endswith("_reward")} for r in records]
        found[str(path.relative_to(folder))] = records
    return found


def assert_alike(one: Any, other: Any, where: str = "results") -> None:
    """Equal but for times and float noise."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one.keys() - {"seconds", "check"}:  # the check covers the times
            assert_alike(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_alike(a, b, f"{where}[{i}]")
    elif isinstance(one, float):
        assert math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-6), where
    else:
        assert one == other, where


def test_killed_at_random_moments_it_ends_with_the_same_rows_and_results(make_recipe: Any, launcher: Launcher, tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(dump(make_recipe()))

    def command(folder: Path) -> list[str]:
        return ["run", str(path), "--quiet", "--out", str(folder)]

    whole = tmp_path / "whole"
    started = time.monotonic()
    assert launcher.run(command(whole)) == 0
    seconds = time.monotonic() - started
    expected, results = rows(whole), json.loads((whole / "results.json").read_text())
    assert {Path(name).name for name in expected} == set(ROWS)

    rng = random.Random(SEED)
    kills = runs = 0
    moments: list[str] = []
    while kills < KILLS:
        folder = tmp_path / f"killed-{runs}"
        runs += 1
        before: dict[str, list[str]] = {}
        while kills < KILLS:
            # at most half a run a start, so that a run is killed several times
            moment = {"lines": rng.randint(1, 60)} if kills % 2 else {"seconds": rng.uniform(0.02, seconds / 2)}
            if launcher.run(command(folder), **moment) == 0:
                break
            kills += 1
            now = journals(folder)
            for name, lines in before.items():
                assert now[name][: len(lines)] == lines, name
            before = now
            done = len(list(folder.glob("*/done.json")))
            moments.append(f"{done} stages, {sum(map(len, now.values()))} answers")
        assert launcher.run(command(folder)) == 0
        for name, lines in journals(folder).items():
            ids = [json.loads(line)["id"] for line in lines]
            assert len(ids) == len(set(ids)), f"{name} holds a request twice"
            assert lines[: len(before.get(name, []))] == before.get(name, []), name
        assert rows(folder) == expected
        assert_alike(json.loads((folder / "results.json").read_text()), results)
    assert len(set(moments)) > 1, "the kills must hit different moments"
