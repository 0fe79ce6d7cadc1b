"""Run folder: the stages of any workflow, each done once and complete when its marker is there.

    runs/NAME/recipe.yaml       the resolved recipe, with its kind
    runs/NAME/03-r1-prompts/    a stage: its artifacts, and done.json (summary, seconds, artifacts, fingerprint of its inputs)
    runs/NAME/results.json      written at the end
    runs/NAME/report.html

`done.json` is written last, by an atomic rename. A stage that has it is skipped on the next start; one without is continued.
"""

import json
import resource
import shutil
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gristmill.core.config import COMMANDS, Recipe, dump, read
from gristmill.core.errors import InputError
from gristmill.core.io import disk_errors, lock, write_json
from gristmill.core.progress import Progress
from gristmill.data.rows import make_id
from gristmill.runs.artifacts import AnyArtifact

RECIPE, MARKER, INPUTS, RESULTS = "recipe.yaml", "done.json", "inputs.json", "results.json"
OnChange = Literal["refuse", "redo", "continue"]
NEW_RECIPE = "recipe.yaml.tmp"  # may be all that a start leaves behind that was cut off at once


@dataclass(frozen=True)
class Stage:
    """A finished stage.

    Attributes:
        summary: what its `done.json` says.
    """

    folder: Path
    summary: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """Of everything that decided its result."""
        return str(self.summary["fingerprint"])


class RunDir:
    """The folder of one run, held by this process.

    Args:
        path: the folder; created when absent.
        recipe: the resolved recipe.
        progress: where stages announce themselves.

    Raises:
        InputError: the folder holds a run of another recipe, holds something else, or is in use.
    """

    def __init__(self, path: Path, recipe: Recipe, progress: Progress):
        self.path, self.progress = path, progress
        self.stages: list[str] = []
        self._check(recipe)
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = lock(path)
            temporary = path / NEW_RECIPE
            temporary.write_text(dump(recipe))
            temporary.replace(path / RECIPE)
        except OSError as e:
            raise InputError(f"{path} cannot be written ({e.strerror}): free some space, or choose another folder with --out.") from e

    def _check(self, recipe: Recipe) -> None:
        saved = self.path / RECIPE
        if not saved.exists():
            if self.path.exists() and not self.path.is_dir():
                raise InputError(f"{self.path} is not a folder: choose another with --out.")
            if self.path.exists() and any(p.name not in (".lock", NEW_RECIPE) for p in self.path.iterdir()):
                raise InputError(f"{self.path} is not empty and holds no run: choose another folder with --out.")
            return
        if not self.begun:
            return  # nothing is made yet: the recipe may change
        old, kind = read(saved), recipe.model_dump()["kind"]
        if "kind" not in old:
            raise InputError(f"{self.path} was made by an earlier version of gristmill: finish it with that one, or choose another --out.")
        if old["kind"] != kind:
            raise InputError(f"{self.path} holds a run of `gristmill {COMMANDS.get(old['kind'], old['kind'])}`: choose another --out.")
        if changed := recipe.changed(old):
            raise InputError(
                f"{self.path} was made by another recipe (they differ in {', '.join(changed)}): "
                "choose another folder with --out, or go back to that recipe."
            )

    @property
    def begun(self) -> bool:
        """Whether anything is made that another recipe could not go on with: a finished stage, or calls in a journal."""
        return any(self.path.glob(f"*/{MARKER}")) or any(p.stat().st_size for p in self.path.glob("*/*.jsonl"))

    def close(self) -> None:
        """Let go of the folder."""
        self._lock.close()

    def __enter__(self) -> "RunDir":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def stage(
        self,
        name: str,
        inputs: Any,
        work: Callable[[Path], dict[str, Any]],
        *,
        artifacts: Sequence[AnyArtifact] = (),
        on_change: OnChange = "refuse",
        again: Callable[[dict[str, Any]], bool] | None = None,
    ) -> Stage:
        """Do a stage, or give it back when it is done.

        Args:
            name: what it is for; the folder's name is its place in the order and this.
            inputs: anything (JSON) that decides its result.
            work: gets the stage's folder, which may hold what an interrupted start left; returns the summary.
            artifacts: the files that it writes.
            on_change: what happens when the stage was made from other inputs: "refuse" it, "redo" it from nothing, or "continue" with the
                files that are there, for work whose journals know each call by all that was asked.
            again: whether a finished stage is continued all the same, by its summary.
        """
        with self._open(name, inputs, artifacts, on_change, again) as entry:
            if entry.summary is None:
                entry.summary = work(entry.folder)
        return Stage(entry.folder, entry.done)

    async def stage_async(
        self,
        name: str,
        inputs: Any,
        work: Callable[[Path], Awaitable[dict[str, Any]]],
        *,
        artifacts: Sequence[AnyArtifact] = (),
        on_change: OnChange = "refuse",
        again: Callable[[dict[str, Any]], bool] | None = None,
    ) -> Stage:
        """As `stage`, for work that waits for others."""
        with self._open(name, inputs, artifacts, on_change, again) as entry:
            if entry.summary is None:
                entry.summary = await work(entry.folder)
        return Stage(entry.folder, entry.done)

    @contextmanager
    def _open(
        self,
        name: str,
        inputs: Any,
        artifacts: Sequence[AnyArtifact],
        on_change: OnChange,
        again: Callable[[dict[str, Any]], bool] | None,
    ) -> Iterator["_Entry"]:
        folder = self.path / f"{len(self.stages):02d}-{name}"
        self.stages.append(folder.name)
        fingerprint = make_id(name, inputs)
        marker, begun = folder / MARKER, folder / INPUTS
        found = marker if marker.exists() else begun
        done: dict[str, Any] = json.loads(found.read_text()) if found.exists() else {}
        if done and (done["fingerprint"] != fingerprint or (again is not None and found is marker and again(done))):
            if on_change == "redo":
                shutil.rmtree(folder)
                done = {}
            elif on_change == "continue":
                marker.unlink(missing_ok=True)
                done = {}
            elif found is marker:
                raise InputError(
                    f"{folder} was made from other inputs: delete that folder and those after it to make them again, "
                    "or choose another folder with --out."
                )
        if done and found is marker:
            yield _Entry(folder, {}, done)
            return
        with disk_errors(self.path):
            folder.mkdir(exist_ok=True)
        if on_change == "redo" and not begun.exists():
            write_json(begun, {"fingerprint": fingerprint})
        entry, started = _Entry(folder), time.monotonic()
        with self.progress.stage(folder.name), disk_errors(folder):
            yield entry
        assert entry.summary is not None
        missing = [a.file for a in artifacts if not (folder / a.file).exists()]
        assert not missing, f"stage {name} did not write {missing}"
        head = {"name": name, "fingerprint": fingerprint, "seconds": round(time.monotonic() - started, 2), "peak_mib": peak_mib()}
        entry.done = {**head, "artifacts": [a.file for a in artifacts], **entry.summary}
        write_json(marker, entry.done)
        self.progress.finished(folder.name, entry.done)

    def finish(self, results: dict[str, Any]) -> dict[str, Any]:
        """Write `results.json`; returns the results."""
        write_json(self.path / RESULTS, results)
        return results


class _Entry:
    """A stage that is being done; `summary` is None while its work is still to do."""

    def __init__(self, folder: Path, summary: dict[str, Any] | None = None, done: dict[str, Any] | None = None):
        self.folder, self.summary, self.done = folder, summary, done or {}


def peak_mib() -> int:
    """Most memory that this process, or one that it started and that has ended, has held so far, in MiB."""
    return max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) >> 10
