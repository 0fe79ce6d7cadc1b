"""Curation pipeline: read, stages of steps over shards, write; as tasks that any executor can run.

Every stage is a folder of the run; its fingerprint is of everything before it, so that a changed recipe begins again where it differs.
Steps that look at one document at a time are done in one pass.
"""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gristmill.core.errors import InputError
from gristmill.core.io import STAMPS, DamagedFile, damaged, disk_errors, make_folder, read_json, stamp, state, sync, write_json
from gristmill.core.progress import Progress
from gristmill.curate import stages
from gristmill.curate.io import readers, shards
from gristmill.curate.io.readers import Reading
from gristmill.curate.recipe import Curation, Output
from gristmill.curate.stages import Stage
from gristmill.curate.stats import Facts, num_bytes
from gristmill.curate.text.words import VERSION
from gristmill.data.rows import make_id
from gristmill.runs import executor
from gristmill.runs.artifacts import JsonArtifact
from gristmill.runs.executor import Task
from gristmill.runs.run_dir import RESULTS, RunDir

PRODUCTS = ("data", "dropped", "index")  # folders that a run makes, and replaces; the last only with the step `remember`
SAMPLES = JsonArtifact("samples")
MAX_SKIPPED = 1000  # skips that are named one by one


def ingest(files: Sequence[tuple[Path, str]], folder: Path, reading: Reading, number: int) -> Facts:
    """Read files, of which each has a name, into shards of at most `reading.batch_bytes` of text.

    After a shard a note says how far they are read: a task that is done again goes on there, and makes the same shards.
    """
    note = folder / f"{number:05d}.note"
    # of the tables in shards and in `waiting`: how many shards and so on, and which row of which file is their last
    facts: Facts = {"shards": 0, "documents": 0, "bytes": 0, "num_skipped": 0, "skipped": [], "file": 0, "rows": 0, STAMPS: {}}
    with suppress(DamagedFile):
        noted = read_json(note) if note.exists() else {}
        if facts.keys() <= noted.keys() and not damaged(folder, noted.get(STAMPS)):
            facts = noted
    waiting: list[pa.Table] = []
    size, told, named = 0, facts["num_skipped"], list(facts["skipped"])  # of the next table too, which has been read

    def tell(where: str, why: str) -> None:
        nonlocal told
        told += 1
        if len(named) < MAX_SKIPPED:
            named.append([where, why])

    def write() -> None:
        path = folder / _shard(number, facts["shards"])
        shards.write(path, pa.concat_tables(waiting))
        facts[STAMPS][path.name] = stamp(path)
        facts["shards"] += 1
        waiting.clear()

    for i, (path, name) in enumerate(files[facts["file"] :], facts["file"]):
        before, start = told, facts["rows"] if i == facts["file"] else 0
        for table, rows, told_of_rows in readers.read_from(start, path, reading, on_skip=tell, name=name):
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
    counts = {"documents": facts["documents"], "bytes": facts["bytes"], "num_skipped": told, "skipped": named}
    return {"shards": made, **counts, STAMPS: facts[STAMPS]}


def _shard(number: int, i: int) -> str:
    return f"{number:05d}-{i:05d}.arrow"


def emit(sources: Sequence[Path], folder: Path, output: Output) -> Facts:
    """Shards into files of documents."""
    paths = readers.write((shards.read(source) for source in sources), folder, output.format, shard_bytes=output.shard_mb * 2**20)
    return {"files": len(paths)}


def run(recipe: Curation, folder: Path, progress: Progress) -> Facts:
    """Run a recipe, or what is left of it; returns what is in `results.json`.

    The folder then holds `data/` (the documents kept), `dropped/` (the others, each with its reason), `recipe.yaml`, `results.json` and
    `samples.json`.

    Raises:
        InputError: an input is missing, a setting is wrong, or the disk is full.
    """
    if not recipe.inputs:
        raise InputError("There is nothing to read: give `inputs` in the recipe, or --input.")
    skipped: list[tuple[str, str]] = []
    files = readers.list_files(recipe.inputs, lambda where, why: skipped.append((where, why)))
    with disk_errors(folder):
        _check_folder(folder, recipe, files)
    read_by = [stages.check(step) for step in recipe.steps]
    for file, *_ in (entry for of_step in read_by for entry in of_step):
        if any(Path(file).resolve().is_relative_to((folder / name).resolve()) for name in PRODUCTS):
            raise InputError(f"A step reads {file}, which the run would replace: give another --out.")
    with RunDir(folder, recipe, progress) as run_dir:
        try:
            return _Run(recipe, run_dir, files, read_by=read_by, skipped=list(dict.fromkeys(skipped))).run()
        except OSError as e:
            raise InputError(f"{e.filename or folder}: {e.strerror or e}: see to it, and run the same command again.") from e


def _check_folder(folder: Path, recipe: Curation, files: Iterable[Path]) -> None:
    """See that a run would replace neither what it reads nor what no run of its kind has made."""
    for path in files:
        if path.resolve().is_relative_to(folder.resolve()):
            raise InputError(f"{path} lies in {folder}, where the result shall be: give another --out.")
    if (folder / "work").exists() or (folder / "funnel.json").exists():
        raise InputError(f"{folder} was made by an earlier version of gristmill: finish it with that one, or choose another --out.")
    if not any((folder / name).exists() for name in (".lock", RESULTS)):
        for name in PRODUCTS:
            if (folder / name).exists():
                raise InputError(f"{folder / name} was not made by a curation and would be replaced: give another --out.")
    if (folder / "index").exists() and "index" not in _products(recipe):
        raise InputError(f"{folder / 'index'} is of another recipe, with the step `remember`: give another --out, or remove it.")


def _products(recipe: Curation) -> list[str]:
    """Those of PRODUCTS that a run of this recipe makes."""
    return [name for name in PRODUCTS if name != "index" or any(step.step == "remember" for step in recipe.steps)]


class _Run:
    def __init__(
        self, recipe: Curation, run_dir: RunDir, files: dict[Path, str], *, read_by: list[Any], skipped: list[tuple[str, str]]
    ) -> None:
        """`read_by` says, of each step, which files it reads and how they are now; `skipped` names inputs that cannot be read, and why."""
        self.recipe, self.run_dir, self.progress, self.files, self.skipped = recipe, run_dir, run_dir.progress, files, skipped
        self.steps = list(zip(recipe.steps, read_by, strict=True))
        self.inputs = [(name, state(path)) for path, name in files.items()]
        self.fingerprint: Any = None  # of the stage before
        self.done: list[Facts] = []  # stages
        self.samples: list[Facts] = []  # of all steps
        self.folders: list[Path] = []  # of stages with steps

    def run(self) -> Facts:
        plan = self.recipe.model_dump(mode="json", exclude={"executor", "workers"})
        whole = make_id(self.inputs, plan, [read_by for _, read_by in self.steps])
        results = self.run_dir.finished(whole, _products(self.recipe))
        if results is None:
            self.executor = executor.make(self.recipe.executor, self.recipe.workers or executor.cores())
            try:
                results = self._results()
            finally:
                self.executor.close()
            SAMPLES.write(self.run_dir.path, {"steps": self.samples})
            head = {"kind": self.recipe.kind, "name": self.recipe.name, "fingerprint": whole}
            products = [*(f"{name}/*" for name in _products(self.recipe)), SAMPLES.file]
            results = self.run_dir.finish({**head, **results}, products)
        self.run_dir.drop_stages()
        return results

    def _results(self) -> Facts:
        read = self._stage("read", [self.inputs, self.recipe.reading.model_dump(mode="json")], self._read)
        sources = [self.run_dir.path / read["folder"] / name for name in read["shards"]]
        facts: list[Facts] = []
        for is_local, group in groupby(self.steps, key=lambda step: step[0].step in stages.LOCAL):
            for part in [list(group)] if is_local else [[step] for step in group]:
                steps = [step for step, _ in part]
                # a stage that another version began would hold keys of other words
                inputs = [VERSION, *((step.model_dump(mode="json"), read_by) for step, read_by in part)]

                def work(folder: Path, steps: list[Any] = steps, sources: list[Path] = sources) -> Facts:
                    return self._run_steps(folder, steps, sources)

                done = self._stage("-".join(step.step for step in steps), inputs, work)
                facts += done["steps"]
                folder = self.run_dir.path / done["folder"]
                self.folders.append(folder)
                self.samples += SAMPLES.read(folder)["steps"]
                sources = [folder / f"kept-{i:05d}.arrow" for i in range(len(sources))]
        products = _products(self.recipe)
        written = self._stage("write", [self.recipe.output.model_dump(mode="json"), products], lambda folder: self._write(folder, sources))
        return {
            "read": {name: read[name] for name in ("files", "documents", "bytes", "num_skipped", "skipped")},
            "steps": facts,
            "documents": written["documents"],
            "files": written["files"],
            "seconds": round(sum(stage["seconds"] for stage in self.done), 2),
            "peak_mib": max(stage["peak_mib"] for stage in self.done),
            "stages": [{name: stage[name] for name in ("folder", "name", "fingerprint", "seconds", "peak_mib")} for stage in self.done],
        }

    def _stage(self, name: str, inputs: Any, work: Any) -> Facts:
        """A stage of the run: what its `done.json` says, and its folder's name."""
        files = ("[0-9]*.arrow", "kept-*.arrow", "dropped-*.parquet", "index/*", SAMPLES.file)
        stage = self.run_dir.stage(name, [self.fingerprint, inputs], work, files=files, on_change="redo")
        self.fingerprint = stage.fingerprint
        self.done.append({**stage.summary, "folder": stage.folder.name})
        return self.done[-1]

    def _tasks(self, name: str, tasks: Sequence[Task], here: bool = False) -> list[Facts]:
        return executor.run_tasks(executor.InProcess() if here else self.executor, tasks, self.progress, name)

    def _read(self, folder: Path) -> Facts:
        groups: list[list[tuple[Path, str]]] = [[]]
        size = 0
        for path, name in self.files.items():
            more = path.stat().st_size
            if groups[-1] and size + more > self.recipe.reading.batch_bytes:
                groups.append([])
                size = 0
            groups[-1].append((path, name))
            size += more
        tasks = [Task(ingest, (group, folder, self.recipe.reading, i), folder / f"{i:05d}.json") for i, group in enumerate(groups)]
        facts = self._tasks("files", tasks)
        total = {name: sum(one[name] for one in facts) for name in ("documents", "bytes", "num_skipped")}
        total["num_skipped"] += len(self.skipped)
        skipped = [*self.skipped, *(entry for one in facts for entry in one["skipped"])][:MAX_SKIPPED]
        if not total["documents"]:
            why = f": {skipped[0][0]}: {skipped[0][1]}" if skipped else ""
            raise InputError(f"The inputs hold no document{why}.")
        return {
            "files": len(self.files),
            **total,
            "skipped": skipped,
            "shards": [name for one in facts for name in one["shards"]],
            "peak_mib": max(one["peak_mib"] for one in facts),
        }

    def _run_steps(self, folder: Path, steps: Sequence[Any], sources: list[Path]) -> Facts:
        stage = Stage(folder, sources, _num_rows(sources), self.run_dir.path, self._tasks, self.progress.tick)
        facts, samples = stages.run_stage(stage, steps)
        SAMPLES.write(folder, {"steps": samples})
        return {"steps": facts, "documents": _num_rows(stage.kept), "peak_mib": stage.peak_mib}

    def _write(self, folder: Path, sources: list[Path]) -> Facts:
        """The documents that are left, and those that are not, in folders that appear whole at their places in the run's folder."""
        products = {"data": folder / "data", "dropped": folder / "dropped"}
        task = Task(emit, (sources, products["data"], self.recipe.output), folder / "data.json")
        (written,) = self._tasks("documents", [task])
        links: list[tuple[Path, Path]] = []  # what stages have made stays with them until the run is finished
        for stage in self.folders:
            names = {path: f"{stage.name}-{path.name.removeprefix('dropped-')}" for path in sorted(stage.glob("dropped-*.parquet"))}
            links += [(path, products["dropped"] / name) for path, name in names.items()]
            if stage.name.endswith("-remember"):
                products["index"] = folder / "index"
                links += [(path, products["index"] / path.name) for path in sorted((stage / "index").iterdir())]
        make_folder(products["dropped"])
        for path, target in links:
            make_folder(target.parent)
            target.unlink(missing_ok=True)
            target.hardlink_to(path)
        for name, made in products.items():
            if made.exists():  # or else it was moved by that run
                self.run_dir.remove(self.run_dir.path / name)
                sync(made)
                made.rename(self.run_dir.path / name)
                sync(self.run_dir.path)
        return {"files": int(written["files"]), "documents": _num_rows(sources), "peak_mib": written["peak_mib"]}


def _num_rows(sources: Iterable[Path]) -> int:
    return sum(shards.num_rows(source) for source in sources)


def explain(folder: Path, name: str) -> list[Facts]:
    """What became of the documents of an id: dropped, by which step and why, or kept, and where.

    Raises:
        InputError: there is no finished curation, or no such document.
    """
    if not all((folder / part).exists() for part in (RESULTS, "data", "dropped")):
        raise InputError(f"{folder} holds no finished curation: run it first, and give its folder with --out.")
    found: list[Facts] = []
    everything = Reading(max_document_bytes=2**40, max_expansion=2**40, max_page_bytes=2**40)
    name = name.encode("utf-8", "replace").decode()
    for path in sorted((folder / "dropped").glob("*.parquet")):
        table = pq.read_table(path, filters=[("id", "==", name)])
        found += [{"file": path.name, **row} for row in table.to_pylist()]
    for path in sorted((folder / "data").iterdir()):
        for table in readers.read(path, everything, lambda where, why: None):
            found += [{"file": path.name, "step": "kept", **row} for row in table.filter(pc.equal(table["id"], name)).to_pylist()]
    if not found:
        raise InputError(f"No document of {folder} has the id {name!r}; ids of a folder's files are their paths in it.")
    return found
