"""Experiment grid of the claims: an alignment recipe and variants of it over seeds, as runs of their own processes, some at a time."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from gristmill.core.config import check, read
from gristmill.core.errors import InputError
from gristmill.core.io import read_bytes, regular, write_text
from gristmill.core.progress import Progress
from gristmill.workflows.alignment.recipe import AlignmentRecipe

POLL_SECONDS = 0.5
WITH_ALARMS = 4  # exit code of a run that ended so


def _pairs(num: int) -> dict[str, Any]:
    """One round whose preference stages train on so many pairs."""
    stage = {"num_pairs": num, "num_prompts": 4 * num}
    return {"rounds": 1, "rpo_iterations": 1, "dpo": stage, "rpo": stage}


# What differs from the recipe. A code SFT of one step at no rate leaves the model as it is, and its rows go into general SFT.
VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "human-only": {"control": "human-only"},
    "unfiltered": {"control": "unfiltered"},
    "random-filter": {"control": "random-filter"},
    "reward-only": {"control": "reward-only"},
    "replace": {"control": "replace"},
    "mixed-sft": {"code_sft": {"steps": 1, "lr": 1e-12, "warmup_steps": 0}, "judging": {"code_share": 1.0}},
    **{f"pairs-{num}": _pairs(num) for num in (50, 100, 200, 400)},
}


@dataclass(frozen=True)
class GridRun:
    """One run of the grid: a variant at a seed."""

    variant: str
    seed: int
    folder: Path
    recipe: Path

    @property
    def name(self) -> str:
        return self.folder.name


def plan(recipe: Path, folder: Path, variants: Sequence[str], seeds: Sequence[int]) -> list[GridRun]:
    """The runs of the grid, the seeds of the first variant first. Each variant's recipe is written to the folder.

    Raises:
        InputError: the recipe is wrong, or another recipe's grid is in the folder.
    """
    out = []
    values = read(recipe)
    for variant in variants:
        merged = _merged(values, VARIANTS[variant])
        whole = check(AlignmentRecipe, merged, f"{recipe} as {variant}", base=recipe.parent)
        path, text = folder / f"{variant}.yaml", yaml.safe_dump(whole.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        if path.exists() and read_bytes(path) != text.encode():
            raise InputError(f"{path} is of another recipe: give another folder (--out), or the recipe that this one was begun with.")
        write_text(path, text)
        out += [GridRun(variant, seed, folder / f"{variant}-seed{seed}", path) for seed in seeds]
    return out


def _merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(values)
    for key, change in changes.items():
        old = out.get(key)
        out[key] = {**old, **change} if isinstance(old, dict) and isinstance(change, dict) else change
    return out


@contextmanager
def _ended_with_us(living: Mapping[Any, "subprocess.Popen[bytes]"]) -> Iterator[None]:
    """End the processes that still live where this one is told to end."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        for process in living.values():
            process.terminate()
        for process in living.values():
            process.wait()
        signal.signal(signal.SIGTERM, before)


def run_grid(
    runs: Sequence[GridRun], progress: Progress, *, jobs: int, threads: int, redo: bool = False, unsafe_code: bool = False
) -> dict[str, str]:
    """Run what is not finished yet, `jobs` at a time. A run that was cut off goes on where it was.

    Returns:
        the last line of what each run that failed said, by its name; the others went on.
    """
    waiting = [run for run in runs if not (run.folder / "results.json").exists()]
    num_done, failed = len(runs) - len(waiting), dict[str, str]()
    living: dict[GridRun, subprocess.Popen[bytes]] = {}
    started, total = time.monotonic(), len(waiting)
    with _ended_with_us(living):
        while waiting or living:
            while waiting and len(living) < jobs:
                run = waiting.pop(0)
                living[run] = _start(run, threads, redo=redo, unsafe_code=unsafe_code)
            time.sleep(POLL_SECONDS)
            for run in [run for run, process in living.items() if process.poll() is not None]:
                code = living.pop(run).returncode
                if code not in (0, WITH_ALARMS):
                    failed[run.name] = _last_line(run) or f"it ended with exit code {code}"
                num_done += 1
                left = total - len(waiting) - len(living)
                seconds = (time.monotonic() - started) / left * (total - left)
                progress.say(f"{num_done}/{len(runs)} runs: {run.name} {'failed' if run.name in failed else 'done'}{_left(seconds)}")
            progress.tick(num_done, len(runs), f"runs, now {', '.join(_where(run) for run in living)}")
    return failed


def _start(run: GridRun, threads: int, *, redo: bool, unsafe_code: bool) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "gristmill.cli", "run", str(run.recipe), "--out", str(run.folder), "--seed", str(run.seed)]
    command += ["--threads", str(threads), "--quiet", *["--redo"] * redo, *["--unsafe-code"] * unsafe_code]
    with open(run.folder.with_suffix(".log"), "wb", opener=regular) as log:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)


def _where(run: GridRun) -> str:
    """A run's name and the stage that it is in."""
    stages = sorted(path.name for path in run.folder.glob("[0-9]*-*")) if run.folder.is_dir() else []
    return f"{run.name} ({stages[-1]})" if stages else run.name


def _left(seconds: float) -> str:
    return f", about {seconds / 60:.0f} min left" if seconds >= 60 else ""


def _last_line(run: GridRun) -> str:
    try:
        lines = run.folder.with_suffix(".log").read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
