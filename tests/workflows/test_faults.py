"""Kills, full disks and power cuts at the operations on files of whole runs: the next start ends with the calm run's results.

A sample of the operations is tried. `GRISTMILL_TEST_FAULTS=1` tries all of them, N every Nth, N:K every Nth from the Kth (from 0); each:K
draws K of each kind of operation on each kind of file: minutes to hours.
"""

import errno
import io
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from gristmill.core.config import check
from gristmill.core.errors import InputError
from gristmill.core.progress import Progress
from gristmill.curate import run as curation
from gristmill.curate.blend import blend as blending
from gristmill.curate.recipe import Curation
from gristmill.engine.load import EngineArgs, load_engine
from gristmill.report.benchmarks import write_benchmark_page
from gristmill.train.settings import training_section
from gristmill.workflows.alignment import ranks
from gristmill.workflows.benchmark_requests import BenchmarkArgs
from gristmill.workflows.benchmarks import run_benchmarks
from gristmill.workflows.dataset import run as dataset
from gristmill.workflows.dataset.recipe import DatasetRecipe
from gristmill.workflows.evaluate import evaluate
from gristmill.workflows.train import train_model
from tests.evaluate.benchmarks import Scripted, write_data

STRIDE, _, FIRST = os.environ.get("GRISTMILL_TEST_FAULTS", "0").partition(":")
VARYING = {
    "seconds",
    "peak_mib",
    "tokens_per_second",
    "train_seconds",
    "asked now",
    "usage_of_this_start",
    "stamps",
    "check",
    "num_samples",
}
FILLING = {"open", "write", "fsync", "rename", "mkdir", "link"}  # what may find the disk full
QUIET = Progress(quiet=True)


@dataclass
class Work:
    """A run: how it is started, and how many places of each kind of fault are tried in a sample."""

    start: Callable[[Path], Any]
    kills: int
    cuts: int
    full: int


class Disk:
    """Stands between a run and its folder: counts the operations, knows what has been synced, and strikes before the chosen ones."""

    def __init__(self, root: Path, strike: Callable[["Disk", str, str], None]):
        self.strike, self.count = strike, 0
        self.lengths: dict[int, int] = {}  # of synced files, by inode
        self.times: dict[int, int] = {}  # when they were last written before that
        self.entries: dict[str, set[str]] = {}  # synced names of each folder
        self.path = Path(os.path.realpath(root))

    def _meets(self, path: Any, folder: int | None = None) -> str:
        """The whole path if it is in the run's folder, else nothing."""
        place = os.readlink(f"/proc/self/fd/{folder}") if folder is not None else os.getcwd()
        full = os.path.normpath(os.path.join(place, os.fsdecode(path)))
        return full if full == str(self.path) or full.startswith(f"{self.path}/") else ""

    def _operation(self, kind: str, path: str) -> None:
        self.count += 1
        self.strike(self, kind, path)

    def _forget(self, path: str) -> None:
        if os.path.exists(path):
            self.lengths.pop(os.stat(path).st_ino, None)

    @contextmanager
    def installed(self, patch: pytest.MonkeyPatch) -> Iterator["Disk"]:
        real_open, real_fsync = io.open, os.fsync

        def opened(file: Any, mode: str = "r", *args: Any, **more: Any) -> Any:
            path = self._meets(file) if isinstance(file, str | os.PathLike) else ""
            if not path or not set(mode) & set("wax+"):
                return real_open(file, mode, *args, **more)
            self._operation("open", path)
            if "w" in mode:
                self._forget(path)
            found = real_open(file, mode, *args, **more)
            write = found.write

            def wrote(data: Any) -> Any:
                half = len(data) // 2
                self._operation("write", path)
                if half and isinstance(data, str | bytes | memoryview):
                    write(data[:half])
                    found.flush()
                    self._operation("write", path)
                    return half + write(data[half:])
                return write(data)

            found.write = wrote
            return found

        def synced(descriptor: int) -> None:
            path = self._meets(os.readlink(f"/proc/self/fd/{descriptor}"))
            if path:
                self._operation("fsync", path)
            real_fsync(descriptor)
            if path and os.path.isdir(path):
                self.entries[path] = set(os.listdir(path))
            elif path:
                found = os.fstat(descriptor)
                self.lengths[found.st_ino], self.times[found.st_ino] = found.st_size, found.st_mtime_ns

        def calling(kind: str, real: Any) -> Any:
            def called(*args: Any, **more: Any) -> Any:
                path = self._meets(args[0], more.get("dir_fd"))
                if path:
                    self._operation(kind, path)
                    if kind in ("unlink", "rename"):
                        self._forget(path if kind == "unlink" else self._meets(args[1]))
                result = real(*args, **more)
                if path and kind == "rename" and os.path.isdir(args[1]):
                    moved = [name for name in self.entries if name == path or name.startswith(f"{path}/")]
                    for name in moved:
                        self.entries[os.fspath(args[1]) + name.removeprefix(path)] = self.entries.pop(name)
                return result

            return called

        patch.setattr(io, "open", opened)
        patch.setattr("builtins.open", opened)
        patch.setattr(os, "fsync", synced)
        kinds = {name: name for name in ("rename", "mkdir", "unlink", "link")} | {"replace": "rename", "rmdir": "unlink"}
        for name, kind in kinds.items():
            patch.setattr(os, name, calling(kind, getattr(os, name)))
        yield self

    def state(self, *, power_cut: bool) -> frozenset[tuple[Any, ...]]:
        """What tells the folder that `copy` would make from another one."""
        found: set[tuple[Any, ...]] = set()
        for place, folders, files in os.walk(self.path):
            if power_cut:
                folders[:] = [name for name in folders if name in self.entries.get(place, set())]
                files = [name for name in files if name in self.entries.get(place, set())]
            found |= {(place, name) for name in folders}
            for name in files:
                of = os.stat(os.path.join(place, name))
                synced = (of.st_ino, min(of.st_size, self.lengths.get(of.st_ino, 0)), self.times.get(of.st_ino))
                found.add((place, name, *(synced if power_cut else (of.st_ino, of.st_size, of.st_mtime_ns))))
        return frozenset(found)

    def copy(self, target: Path, *, power_cut: bool) -> None:
        """The folder as a kill would leave it now; after a power cut, without what has not been synced."""
        if not self.path.exists():
            return
        shutil.copytree(self.path, target)
        if not power_cut:
            return
        for place, folders, files in os.walk(self.path):
            there = target / Path(place).relative_to(self.path)
            for name in [*folders, *files]:
                source, copy = Path(place, name), there / name
                if name not in self.entries.get(place, set()):
                    shutil.rmtree(copy) if copy.is_dir() else copy.unlink(missing_ok=True)
                elif copy.is_file():
                    os.truncate(copy, min(copy.stat().st_size, self.lengths.get(source.stat().st_ino, 0)))


def file_kind(path: str) -> str:
    """A path without what tells the stages, and the files of a kind, apart."""
    return re.sub(r"[0-9a-f]{8,}|\d+", "#", re.sub(r"/\d\d-[a-z0-9-]+", "/STAGE", path))


def alike(value: Any) -> Any:
    """Results without what no two runs have in common."""
    if isinstance(value, dict):
        return {k: alike(v) for k, v in value.items() if k not in VARYING}
    if isinstance(value, list | tuple):
        return [alike(v) for v in value]
    return round(value, 6) if isinstance(value, float) else value


def results_of(folder: Path) -> dict[str, Any]:
    """All that a run has made and that somebody reads."""
    found: dict[str, Any] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and not {".lock", "train"} & set(p.relative_to(folder).parts)):
        name = str(path.relative_to(folder))
        if path.suffix == ".json":
            found[name] = alike(json.loads(path.read_text()))
        elif path.suffix == ".parquet":
            found[name] = sorted(json.dumps(row, sort_keys=True, default=str) for row in pq.read_table(path).to_pylist())
        elif path.suffix == ".jsonl" and name.count("/") == 1 and not name.startswith("export/"):
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = sorted(line["id"] for line in lines)
        elif path.suffix in (".safetensors", ".bin", ".npy", ".jsonl", ".arrow", ".yaml"):
            found[name] = path.read_bytes()
        else:
            found[name] = None
    return found


@pytest.fixture
def works(
    tmp_path: Path, make_recipe: Any, random_base: Path, start_endpoint: Any, run: Any, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    torch.set_num_threads(1)
    monkeypatch.setattr(ranks, "CHECKPOINT_SECONDS", 0.001)  # a checkpoint after every step
    draw = random.Random(0)
    words = [f"word{i}" for i in range(300)]
    texts = [" ".join(draw.choices(words, k=60)) + "." for _ in range(30)]
    texts += texts[:5] + [text + " Postscript." for text in texts[5:9]]
    (tmp_path / "in").mkdir()
    for part in range(3):
        rows = [{"id": f"d{i}", "text": text} for i, text in enumerate(texts) if i % 3 == part]
        (tmp_path / "in" / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    steps = [{"step": "clean"}, {"step": "exact"}, {"step": "fuzzy"}, {"step": "remember"}]
    curate = {"inputs": [str(tmp_path / "in")], "reading": {"batch_bytes": 6000}, "workers": 1, "steps": steps}
    source = {"name": "one", "inputs": [str(tmp_path / "in")], "weight": 1, "max_epochs": 9}
    blend = {"tokenizer": str(random_base), "sources": [source], "tokens": 9000, "workers": 1}
    talks = [[{"role": "user", "content": f"Say {w}."}, {"role": "assistant", "content": w}] for w in words[:6]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    settings = training_section("sft", {"lr": 1e-3, "batch_size": 2, "epochs": 1.0})

    def synth(folder: Path) -> None:
        url = start_endpoint(latency=0.0, obedient=True).url if not servers else servers[0]
        servers.append(url)
        values = {
            "generators": [{"base_url": url, "model": "mock"}],
            "topics": {"own": ["tides"], "macro": 0},
            "pipelines": {"open_qa": {"questions": 2, "revisions": 0}},
            "answers": {"samples": 2, "max_tokens": 8},
        }
        dataset.run(check(DatasetRecipe, values), folder, Progress(quiet=True))

    def train(folder: Path) -> None:
        train_model("sft", random_base, tmp_path / "rows.jsonl", out=folder, recipe=settings, device="cpu", checkpoint_every=0.001)

    answers = "".join(json.dumps({"prompt": f"Say {w}.", "answer": w}) + "\n" for w in words[:16])
    (tmp_path / "prompts.jsonl").write_text(answers)

    def evaluation(folder: Path) -> None:
        engine = load_engine(random_base, EngineArgs(device="cpu"))
        evaluate(engine, tmp_path / "prompts.jsonl", QUIET, max_tokens=4, seed=0, greedy=True, out=folder / "answers.jsonl")

    asked = BenchmarkArgs(tasks=("mmlu", "gsm8k", "winogrande"), data=write_data(tmp_path / "data"), num_fewshot=1, limit=2)

    def benchmarks(folder: Path) -> None:
        report = run_benchmarks(Scripted, {"name": "m"}, replace(asked, out=folder / "out"), QUIET)
        write_benchmark_page(folder / "out", report)

    servers: list[str] = []
    return {
        "run": Work(lambda folder: run(make_recipe(), folder), 2, 1, 1),
        "synth": Work(synth, 3, 2, 2),
        "curate": Work(lambda folder: curation.run(check(Curation, curate), folder, QUIET), 4, 2, 3),
        "blend": Work(lambda folder: blending.blend(check(blending.Blend, blend), folder, QUIET), 4, 2, 3),
        "train": Work(train, 5, 3, 3),
        "eval": Work(evaluation, 1, 1, 1),
        "benchmarks": Work(benchmarks, 10, 4, 4),
    }


@pytest.mark.parametrize("name", ["run", "synth", "curate", "blend", "train", "eval", "benchmarks"])
def test_struck_anywhere_the_next_start_ends_the_same(name: str, works: dict[str, Work], tmp_path: Path) -> None:
    work = works[name]
    kinds: list[tuple[str, str]] = []
    with pytest.MonkeyPatch.context() as patch, Disk(tmp_path / "calm", lambda disk, *what: kinds.append(what)).installed(patch):
        work.start(tmp_path / "calm")
    calm = results_of(tmp_path / "calm")
    assert len(kinds) > 30

    def chosen(count: int, places: list[int]) -> list[int]:
        if STRIDE == "each":
            alike: dict[tuple[str, str], list[int]] = {}
            for i in places:
                alike.setdefault((kinds[i][0], file_kind(kinds[i][1])), []).append(i)
            draw = random.Random(count)
            return sorted(i for of in alike.values() for i in draw.sample(of, min(int(FIRST), len(of))))
        stride = int(STRIDE) or max(1, len(places) // count)
        return places[int(FIRST or stride // 2) :: stride]

    failed: list[str] = []

    def goes_on(folder: Path, what: str) -> None:
        try:
            work.start(folder)
            found = results_of(folder)
            assert found == calm, sorted(key for key in found.keys() | calm.keys() if found.get(key) != calm.get(key))[:4]
        except Exception as e:
            failed.append(f"{what}: {type(e).__name__} {str(e)[:300]}")
        shutil.rmtree(folder, ignore_errors=True)

    kills = set(chosen(work.kills, list(range(len(kinds)))))
    cuts = set(chosen(work.cuts, list(range(len(kinds)))))
    copies: list[tuple[Path, str]] = []
    states: set[tuple[str, frozenset[tuple[Any, ...]]]] = set()

    def copying(disk: Disk, kind: str, path: str) -> None:
        place = disk.count - 1
        for mode, places in (("kill", kills), ("power cut", cuts)):
            if place in places:
                state = disk.state(power_cut=mode == "power cut")
                if (mode, state) not in states:  # most operations change nothing that a kill, or a power cut, leaves behind
                    states.add((mode, state))
                    copies.append((tmp_path / f"{mode}-{place}", f"{mode} before {kind} of {Path(path).relative_to(tmp_path)}"))
                    disk.copy(copies[-1][0], power_cut=mode == "power cut")

    with pytest.MonkeyPatch.context() as patch, Disk(tmp_path / "struck", copying).installed(patch):
        work.start(tmp_path / "struck")
    assert results_of(tmp_path / "struck") == calm
    for folder, what in copies:
        goes_on(folder, what)

    for place in chosen(work.full, [i for i, (kind, _) in enumerate(kinds) if kind in FILLING]):
        folder, where = tmp_path / f"full-{place}", ""

        def full(disk: Disk, kind: str, path: str, place: int = place) -> None:
            nonlocal where
            if disk.count - 1 == place:
                where = f"full disk at {kind} of {Path(path).relative_to(tmp_path)}"
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with pytest.MonkeyPatch.context() as patch, Disk(folder, full).installed(patch):
            try:
                work.start(folder)
            except InputError:
                pass  # one sentence
            except Exception as e:
                failed.append(f"{where}: {type(e).__name__} {e}")
        goes_on(folder, where)
    print(f"{name}: {len(kinds)} operations, {len(copies)} kills and power cuts, {len(failed)} failures")
    assert not failed, "\n".join(failed)
