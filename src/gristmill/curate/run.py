"""A curation from files to files, by tasks over shards that any executor can do.

Stages follow each other; each has a folder in `work/` named by its place, its steps, and a key made of everything before it, so that a
changed recipe begins again only where it differs. Steps that look at one document at a time are done in one pass.
"""

import json
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gristmill.core.config import dump
from gristmill.core.errors import InputError
from gristmill.core.io import lock, state, write_json
from gristmill.core.progress import Progress
from gristmill.curate import stages as chains
from gristmill.curate.io import readers as documents
from gristmill.curate.io import shards
from gristmill.curate.io.readers import Reading
from gristmill.curate.recipe import Curation, Output, Step
from gristmill.curate.stages import Facts, Stage, num_bytes
from gristmill.data.rows import make_id
from gristmill.runs import executor
from gristmill.runs.executor import Task

MADE = ("data", "dropped", "index")  # folders that a run makes, and replaces; the last only with the step `remember`
MOST_SKIPPED = 1000  # skips that are named one by one


def ingest(files: Sequence[tuple[Path, str]], folder: Path, reading: Reading, number: int) -> Facts:
    """Read files, of which each has a name, into shards of at most `reading.batch_bytes` of text.

    After a shard a note says how far they are read: a task that is done again goes on there, and makes the same shards.
    """
    note = folder / f"{number:05d}.note"
    # of the tables in shards and in `waiting`: how many shards and so on, and which row of which file is their last
    facts: Facts = {"shards": 0, "documents": 0, "bytes": 0, "num_skipped": 0, "skipped": [], "file": 0, "rows": 0}
    if note.exists():
        facts = json.loads(note.read_text())
    waiting: list[pa.Table] = []
    size, told, named = 0, facts["num_skipped"], list(facts["skipped"])  # of the next table too, which has been read

    def tell(where: str, why: str) -> None:
        nonlocal told
        told += 1
        if len(named) < MOST_SKIPPED:
            named.append([where, why])

    def write() -> None:
        shards.write(folder / _shard(number, facts["shards"]), pa.concat_tables(waiting))
        facts["shards"] += 1
        waiting.clear()

    for i, (path, name) in enumerate(files[facts["file"] :], facts["file"]):
        before, start = told, facts["rows"] if i == facts["file"] else 0
        for table, rows, told_of_rows in documents.read_from(start, path, reading, on_skip=tell, name=name):
            more = num_bytes(table)
            if waiting and size + more > reading.batch_bytes:
                write()
                write_json(note, facts | {"skipped": named[: facts["num_skipped"]]})
                size = 0
            waiting.append(table)
            size += more
            facts["documents"] += len(table)
            facts["bytes"] += more
            facts |= {"num_skipped": before + told_of_rows, "file": i, "rows": rows}
    if waiting:
        write()
    made = [_shard(number, i) for i in range(facts["shards"])]
    return {"shards": made, "documents": facts["documents"], "bytes": facts["bytes"], "num_skipped": told, "skipped": named}


def _shard(number: int, i: int) -> str:
    return f"{number:05d}-{i:05d}.arrow"


def emit(sources: Sequence[Path], folder: Path, output: Output) -> Facts:
    """Shards into files of documents."""
    paths = documents.write((shards.read(source) for source in sources), folder, output.format, shard_bytes=output.shard_mb * 2**20)
    return {"files": len(paths)}


def run(recipe: Curation, folder: Path, progress: Progress) -> Facts:
    """Do what a recipe says, or what is left of it; returns the funnel.

    The folder then holds `data/` (the documents kept), `dropped/` (the others, each with its reason), `recipe.yaml` and `funnel.json`.

    Raises:
        InputError: an input is missing, a setting is wrong, or the disk is full.
    """
    if not recipe.inputs:
        raise InputError("There is nothing to read: give `inputs` in the recipe, or --input.")
    passed: list[tuple[str, str]] = []
    files = documents.list_files(recipe.inputs, lambda where, why: passed.append((where, why)))
    for path in files:
        if path.resolve().is_relative_to(folder.resolve()):
            raise InputError(f"{path} lies in {folder}, where the result shall be: give another --out.")
    if not any((folder / name).exists() for name in ("funnel.json", "recipe.yaml", "work")):
        for name in MADE:
            if (folder / name).exists():
                raise InputError(f"{folder / name} was not made by a curation and would be replaced: give another --out.")
    if (folder / "index").exists() and "index" not in _made(recipe):
        raise InputError(f"{folder / 'index'} is of another recipe, with the step `remember`: give another --out, or remove it.")
    read = [chains.check(step) for step in recipe.steps]
    for step_reads in read:
        for file, *_ in step_reads:
            if any(Path(file).resolve().is_relative_to((folder / name).resolve()) for name in MADE):
                raise InputError(f"A step reads {file}, which the run would replace: give another --out.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = lock(folder)
    except OSError as e:
        raise InputError(f"Nothing can be written to {folder} ({e.strerror}): give another --out.") from e
    try:
        return _Run(recipe, folder, progress, read, list(dict.fromkeys(passed))).all(files)
    except OSError as e:
        raise InputError(f"{e.filename or folder}: {e.strerror or e}: see to it, and run the same command again.") from e
    finally:
        held.close()


def _made(recipe: Curation) -> list[str]:
    """Those of MADE that a run of this recipe makes."""
    return [name for name in MADE if name != "index" or any(step.step == "remember" for step in recipe.steps)]


class _Run:
    def __init__(self, recipe: Curation, folder: Path, progress: Progress, read: Sequence[Any], passed: list[tuple[str, str]]) -> None:
        """`read` says, of each step, which files it reads and how they are now; `passed` names inputs that cannot be read, and why."""
        self.recipe, self.folder, self.progress = recipe, folder, progress
        self.passed = passed
        self.read = dict(zip(map(id, recipe.steps), read, strict=True))
        self.work = folder / "work"
        self.key = ""
        self.place = 0
        self.stages: list[Facts] = []
        self.executor: executor.Executor | None = None

    def all(self, files: dict[Path, str]) -> Facts:
        inputs = [(name, state(path)) for path, name in files.items()]
        plan = self.recipe.model_dump(mode="json", exclude={"executor", "workers"})
        whole = make_id(inputs, plan, list(self.read.values()))
        done = self.folder / "funnel.json"
        made = [self.folder / name for name in _made(self.recipe)]
        gone = self.folder / ".gone"
        shutil.rmtree(gone, ignore_errors=True)  # what a kill may have left
        if done.exists() and all(path.exists() for path in made) and (funnel := json.loads(done.read_text())).get("key") == whole:
            return funnel
        done.unlink(missing_ok=True)  # from here on it would speak of other files
        started = time.monotonic()
        (self.folder / "recipe.yaml").write_text(dump(self.recipe))
        workers = self.recipe.workers or executor.cores()
        self.executor = executor.make(self.recipe.executor, workers)
        try:
            funnel = self._all(files, make_id(inputs, plan["reading"]))
        finally:
            self.executor.close()
        funnel |= {"key": whole, "name": self.recipe.name, "seconds": round(time.monotonic() - started, 2)}
        write_json(done, funnel)
        self.work.rename(gone)  # at once: half of it would be taken for the whole
        shutil.rmtree(gone)
        return funnel

    def _all(self, files: dict[Path, str], key: str) -> Facts:
        self.key = key
        sources, first = self._read(files)
        for is_local, group in groupby(self.recipe.steps, key=lambda step: step.step in chains.LOCAL):
            for steps in [list(group)] if is_local else [[step] for step in group]:
                sources = self._stage(steps, sources)
        num_files = self._write(sources)
        summed = [facts for stage in self.stages for facts in _summed(stage["steps"])]
        return {"read": first, "steps": summed, "documents": _rows(sources), "files": num_files}

    def _open(self, name: str, *settings: Any) -> Path:
        """The folder of the next stage."""
        self.key = make_id(self.key, name, *settings)
        folder = self.work / f"{self.place:02d}-{name}-{self.key[:8]}"
        self.place += 1
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _do(self, name: str, tasks: Sequence[Task], here: bool = False) -> list[Facts]:
        assert self.executor is not None
        return executor.do(executor.InProcess() if here else self.executor, name, tasks, self.progress)

    def _read(self, files: dict[Path, str]) -> tuple[list[Path], Facts]:
        folder = self._open("read")
        groups: list[list[tuple[Path, str]]] = [[]]
        size = 0
        for path, name in files.items():
            more = path.stat().st_size
            if groups[-1] and size + more > self.recipe.reading.batch_bytes:
                groups.append([])
                size = 0
            groups[-1].append((path, name))
            size += more
        tasks = [Task(ingest, (group, folder, self.recipe.reading, i), folder / f"{i:05d}.json") for i, group in enumerate(groups)]
        facts = self._do("read", tasks)
        sources = [folder / name for one in facts for name in one["shards"]]
        total = {name: sum(one[name] for one in facts) for name in ("documents", "bytes", "num_skipped")}
        total["num_skipped"] += len(self.passed)
        skipped = [*self.passed, *(entry for one in facts for entry in one["skipped"])][:MOST_SKIPPED]
        if not total["documents"]:
            why = f": {skipped[0][0]}: {skipped[0][1]}" if skipped else ""
            raise InputError(f"The inputs hold no document{why}.")
        return sources, {"files": len(files), **total, "skipped": skipped}

    def _stage(self, steps: list[Step], sources: list[Path]) -> list[Path]:
        names = [step.step for step in steps]
        folder = self._open("-".join(names), *[(step.model_dump(mode="json"), self.read[id(step)]) for step in steps])
        label = " ".join(names)
        stage = Stage(
            folder,
            sources,
            _rows(sources),
            self.work / "index",
            self.folder,
            lambda what, tasks, here: self._do(label if what == "shard" else f"{label}: {what}", tasks, here),
            self.progress.tick,
        )
        self.stages.append({"folder": folder, "steps": [one["steps"] for one in chains.do(stage, steps)]})
        return stage.kept

    def _write(self, sources: list[Path]) -> int:
        """The documents that are left, and those that are not, in folders that appear whole; files of the former."""
        folder = self._open("write", self.recipe.output.model_dump(mode="json"))
        data, dropped = folder / "data", folder / "dropped"
        task = Task(emit, (sources, data, self.recipe.output), folder / "data.json")
        if not data.exists():  # moved away by a run that was killed right then
            task.marker.unlink(missing_ok=True)
        (written,) = self._do("write", [task])
        for unfinished in data.glob(".part-*.tmp"):  # by a run that was killed
            unfinished.unlink(missing_ok=True)
        dropped.mkdir(exist_ok=True)
        for stage in self.stages:
            for path in sorted(stage["folder"].glob("dropped-*.parquet")):
                target = dropped / f"{stage['folder'].name.rsplit('-', 1)[0]}-{path.name.removeprefix('dropped-')}"
                target.unlink(missing_ok=True)
                target.hardlink_to(path)
        made = {"data": data, "dropped": dropped, "index": self.work / "index"}
        for name in _made(self.recipe):
            shutil.rmtree(self.folder / name, ignore_errors=True)
            made[name].rename(self.folder / name)
        return int(written["files"])


def _rows(sources: Iterable[Path]) -> int:
    return sum(shards.num_rows(source) for source in sources)


def _summed(of_shards: Sequence[Sequence[Facts]]) -> list[Facts]:
    """The facts of a stage's steps over all shards."""
    out: list[Facts] = []
    for same in zip(*of_shards, strict=True):
        total: Facts = {"step": same[0]["step"]}
        for name in ("documents_in", "bytes_in", "documents_out", "bytes_out"):
            total[name] = sum(one[name] for one in same)
        for name in ("reasons", "changed"):
            total[name] = dict(sum((Counter(one[name]) for one in same), Counter()).most_common())
        out.append(total)
    return out


def explain(folder: Path, name: str) -> list[Facts]:
    """What became of the documents of an id: dropped, by which step and why, or kept, and where.

    Raises:
        InputError: there is no finished curation, or no such document.
    """
    if not all((folder / part).exists() for part in ("funnel.json", "data", "dropped")):
        raise InputError(f"{folder} holds no finished curation: run it first, and give its folder with --out.")
    found: list[Facts] = []
    everything = Reading(max_document_bytes=2**40, max_expansion=2**40)
    name = name.encode("utf-8", "replace").decode()
    for path in sorted((folder / "dropped").glob("*.parquet")):
        table = pq.read_table(path, filters=[("id", "==", name)])
        found += [{"file": path.name, **row} for row in table.to_pylist()]
    for path in sorted((folder / "data").iterdir()):
        for table in documents.read(path, everything, lambda where, why: None):
            found += [{"file": path.name, "step": "kept", **row} for row in table.filter(pc.equal(table["id"], name)).to_pylist()]
    if not found:
        raise InputError(f"No document of {folder} has the id {name!r}; ids of a folder's files are their paths in it.")
    return found
