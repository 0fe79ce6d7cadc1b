"""Run folder: the stages of any workflow, each done once and complete when its marker is there.

    runs/NAME/recipe.yaml       the resolved recipe, with its kind
    runs/NAME/03-r1-prompts/    a stage: its artifacts, and done.json (summary, seconds, artifacts, sizes and hashes of its files,
                                fingerprint of its inputs)
    runs/NAME/results.json      written at the end
    runs/NAME/report.html

`done.json` is written last, when all that it speaks of is on the disk. A stage that has it, and whose files still are what it says, is
skipped on the next start; another is continued, and makes the damaged files again. A folder is removed by a rename first, so that half of
it is never taken for the whole. Where a recipe may change, a stage that was made from other inputs is moved to `replaced/N/` when the user
asks for it, and stays untouched otherwise: nothing that was made is lost.
"""

import json
import re
import resource
import shutil
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gristmill.core.config import COMMANDS, Recipe, dump, read
from gristmill.core.errors import InputError
from gristmill.core.io import (
    STAMPS,
    DamagedFile,
    damaged,
    disk_errors,
    lock,
    make_folder,
    read_json,
    reason,
    stamps,
    sweep,
    sync,
    write_json,
    write_text,
)
from gristmill.core.progress import Progress
from gristmill.data.rows import make_id
from gristmill.runs.artifacts import ALL, AnyArtifact, JournalArtifact
from gristmill.runs.reader import CHECK, CUT_OFF, GENERATED, OF_MARKERS, RECIPE_HASH, STAGE_FOLDER, generated_tokens

RECIPE, MARKER, INPUTS, RESULTS = "recipe.yaml", "done.json", "inputs.json", "results.json"
REPORT, REPLACED = "report.html", "replaced"
JOURNALS = tuple(file for file, one in ALL.items() if isinstance(one, JournalArtifact))
OnChange = Literal["refuse", "redo", "continue"]
GONE = ".gone"  # what is being removed: renamed at once, so that half of it is never taken for the whole
OLD_TEMPORARY = "recipe.yaml.tmp"  # of earlier versions
BEGINNINGS = re.compile(r"\.lock|\.recipe\.yaml\.\d+\.tmp|recipe\.yaml\.tmp")  # all that a start leaves behind that was cut off at once


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
        redo: whether stages that were made from other inputs are moved aside and made again; None: the kind of recipe refuses changes.

    Raises:
        InputError: the folder holds a run of another recipe, holds something else, or is in use.
    """

    def __init__(self, path: Path, recipe: Recipe, progress: Progress, *, redo: bool | None = None):
        self.path, self.progress, self.redo = path, progress, redo
        self.stages: list[str] = []
        self.beside: list[str] = []  # stages out of the order
        self._differs: list[str] = []  # keys in which the recipe is another than the one that the folder has
        self._aside: Path | None = None
        kept = {key: value for key, value in recipe.model_dump(mode="json").items() if key not in recipe.may_change}
        self._key = make_id(kept)
        try:
            self._check(recipe)
            make_folder(path)
            with ExitStack() as held:
                self._lock = held.enter_context(lock(path))
                sweep(path)
                (path / OLD_TEMPORARY).unlink(missing_ok=True)
                self._recipe = dump(recipe)
                if not self._differs:  # else when the first stage is worked on: a start that is refused leaves all as it was
                    write_text(path / RECIPE, self._recipe)
                shutil.rmtree(path / GONE, ignore_errors=True)
                held.pop_all()
        except (OSError, ValueError) as e:
            if isinstance(e, InputError):
                raise
            raise InputError(f"{path} cannot be written ({reason(e)}): free some space, or choose another folder with --out.") from e

    def _check(self, recipe: Recipe) -> None:
        saved = self.path / RECIPE
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path} is not a folder: choose another with --out.")
        found = {p.name for p in self.path.iterdir()} if self.path.exists() else set()
        if all(BEGINNINGS.fullmatch(name) for name in found):
            return  # nothing is made yet
        if not self.begun and not {".lock", RECIPE} <= found:
            raise InputError(f"{self.path} is not empty and holds no run: choose another folder with --out.")
        kind = recipe.model_dump()["kind"]
        try:
            old = read(saved)
            changed = recipe.changed(old) if old.get("kind") == kind else []
            if self.redo is not None and changed:
                new = recipe.model_dump(mode="json")
                self._differs = [name for key in changed for name in _differences(old.get(key), new.get(key), key)]
                changed = recipe.forbidden(old)
        except (ValueError, TypeError) as e:  # of which types its values are, nobody has checked
            if not self.begun or self._is_of_this_recipe():
                return
            raise InputError(f"{saved} is damaged ({reason(e)}): put it back, or choose another folder with --out.") from e
        if (other := old.get("kind", kind)) != kind:
            raise InputError(f"{self.path} holds a run of `gristmill {COMMANDS.get(str(other), other)}`: choose another --out.")
        if not self.begun:
            self._differs = []
            return  # nothing is made yet: the recipe may change
        if "kind" not in old:
            raise InputError(f"{self.path} was made by an earlier version of gristmill: finish it with that one, or choose another --out.")
        if changed:
            raise InputError(
                f"{self.path} was made by another recipe (they differ in {', '.join(changed)}): "
                "choose another folder with --out, or go back to that recipe."
            )

    def _is_of_this_recipe(self) -> bool:
        """Whether all that is finished says that it was made by this very recipe."""
        paths = [*self.path.glob(f"*/{MARKER}"), self.path / RESULTS]
        made = [found for path in paths if (found := self._marker(path))]
        return bool(made) and all(one.get(RECIPE_HASH, self._key) == self._key for one in made) and any(RECIPE_HASH in one for one in made)

    def _marker(self, path: Path) -> dict[str, Any]:
        """What a marker says; nothing where there is none, or one that is damaged."""
        if not path.exists():
            return {}
        try:
            found = read_json(path)
        except DamagedFile:
            found = {CHECK: ""}
        check = found.pop(CHECK, None)  # those of earlier versions have none
        sound = check == make_id(found) if check is not None else isinstance(found.get("fingerprint"), str)
        if not sound:
            self.progress.warn(f"{path} is damaged: what it speaks of is made again.")
        return found if sound else {}

    def _write_marker(self, path: Path, value: dict[str, Any]) -> None:
        value = json.loads(json.dumps(value | {RECIPE_HASH: self._key}))  # as it will be read
        write_json(path, value | {CHECK: make_id(value)})

    def _is_whole(self, folder: Path, done: dict[str, Any]) -> bool:
        """Whether a finished stage's files are what its marker says. Those of earlier versions name them only."""
        if STAMPS in done:
            bad = damaged(folder, done[STAMPS])
        else:
            names = [name for name in done.get("artifacts", ()) if not name.endswith(".jsonl")]
            bad = [name for name in names if not (folder / name).is_file() or not (folder / name).stat().st_size]
        if bad:
            self.progress.warn(f"{folder / bad[0]} is gone or damaged: {folder.name} is made again.")
        return not bad

    @property
    def begun(self) -> bool:
        """Whether anything is made that another recipe could not go on with: a finished stage, results, or calls in a journal."""
        return (
            (self.path / RESULTS).exists()
            or any(self.path.glob(f"*/{MARKER}"))
            or any(p.stat().st_size for p in self.path.glob("*/*.jsonl"))
        )

    @property
    def unsettled(self) -> bool:
        """Whether the recipe differs from the folder's and no stage was worked on yet: a later one may still refuse the start."""
        return bool(self._differs)

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
        files: Sequence[str] = (),
        on_change: OnChange = "refuse",
        again: Callable[[dict[str, Any]], bool] | None = None,
        beside: bool = False,
    ) -> Stage:
        """Do a stage, or give it back when it is done.

        Args:
            name: what it is for; the folder's name is its place in the order and this.
            inputs: anything (JSON) that decides its result.
            work: gets the stage's folder, which may hold what an interrupted start left; returns the summary.
            artifacts: the files that it writes.
            files: patterns of what else in its folder others will read. Journals are not vouched for: each line does that itself.
            on_change: what happens when the stage was made from other inputs: "refuse" it, "redo" it and all after it from nothing, or
                "continue" with the files that are there, for work whose journals know each call by all that was asked.
            again: whether a finished stage is continued all the same, by its summary.
            beside: it has no place in the order: its number is 0.
        """
        with self._open(name, inputs, artifacts, files, on_change, again, beside) as entry:
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
        files: Sequence[str] = (),
        on_change: OnChange = "refuse",
        again: Callable[[dict[str, Any]], bool] | None = None,
    ) -> Stage:
        """As `stage`, for work that waits for others."""
        with self._open(name, inputs, artifacts, files, on_change, again) as entry:
            if entry.summary is None:
                entry.summary = await work(entry.folder)
        return Stage(entry.folder, entry.done)

    @contextmanager
    def _open(
        self,
        name: str,
        inputs: Any,
        artifacts: Sequence[AnyArtifact],
        files: Sequence[str],
        on_change: OnChange,
        again: Callable[[dict[str, Any]], bool] | None,
        beside: bool = False,
    ) -> Iterator["_Entry"]:
        folder = self.path / f"{0 if beside else len(self.stages):02d}-{name}"
        (self.beside if beside else self.stages).append(folder.name)
        fingerprint = make_id(name, inputs)
        marker, begun = folder / MARKER, folder / INPUTS
        done = self._marker(marker)
        found = marker if done else begun
        done = done or self._marker(begun)
        changed = bool(done) and done["fingerprint"] != fingerprint
        if found is marker and not changed and not self._is_whole(folder, done):
            marker.unlink()
            found = begun
        if on_change == "redo" and (changed or not done):
            self._remove_from(len(self.stages) - 1)
            done = {}
        elif (changed and on_change == "continue") or (found is marker and not changed and again is not None and again(done)):
            marker.unlink(missing_ok=True)
            done = {}
        elif self.redo is not None and on_change == "refuse":
            if found is begun and not any(p.stat().st_size for p in folder.glob("**/*") if p.is_file() and p != begun):
                changed = False  # nothing is made yet
                done = {}
            elif not done and self._differs:
                changed = True  # half made, by a version that did not say from what
            others = [] if beside or len(self.stages) == 1 else self._numbered(len(self.stages) - 1, len(self.stages))
            if stale := [path for path in others if path != folder] + [folder] * changed:
                self._move_aside(stale)
                done = {} if changed else done
        elif changed and found is marker:
            raise InputError(
                f"{folder} was made from other inputs: delete that folder and those after it to make them again, "
                "or choose another folder with --out."
            )
        if done and found is marker:
            yield _Entry(folder, {}, {key: value for key, value in done.items() if key not in OF_MARKERS})
            return
        with disk_errors(self.path):
            self._settle()
            make_folder(folder)
        # the first stage of a run has no journal, and begins from nothing
        says = on_change == "redo" or (self.redo is not None and on_change == "refuse" and (beside or len(self.stages) > 1))
        if says and self._marker(begun).get("fingerprint") != fingerprint:
            self._write_marker(begun, {"fingerprint": fingerprint})
        entry, started = _Entry(folder), time.monotonic()
        with self.progress.stage(folder.name), disk_errors(folder):
            yield entry
        assert entry.summary is not None
        missing = [a.file for a in artifacts if not (folder / a.file).exists()]
        assert not missing, f"stage {name} did not write {missing}"
        head = {"name": name, "fingerprint": fingerprint, "seconds": round(time.monotonic() - started, 2), "peak_mib": peak_mib()}
        entry.done = {**head, "artifacts": [a.file for a in artifacts], **entry.summary}
        with disk_errors(folder):
            vouched = stamps(folder, [*(a.file for a in artifacts if not isinstance(a, JournalArtifact)), *files])
            if any((folder / file).is_file() for file in JOURNALS):  # so that a report need not read them
                with suppress(LookupError, TypeError):  # of another form: a report will say so
                    entry.done[GENERATED] = generated_tokens(folder)
            sync(folder)
        self._write_marker(marker, entry.done | {STAMPS: vouched})
        self.progress.finished(folder.name, entry.done)

    def _settle(self) -> None:
        """Write down the recipe that the folder goes on with."""
        if self._differs:
            write_text(self.path / RECIPE, self._recipe)
            self._differs = []

    def _numbered(self, first: int, end: int | None) -> list[Path]:
        """Folders of stages with a number from `first` to before `end` in which something was made."""
        folders = [path for path in sorted(self.path.iterdir()) if STAGE_FOLDER.fullmatch(path.name) and path.is_dir()]
        numbers = [int(path.name.split("-")[0]) for path in folders]
        return [p for n, p in zip(numbers, folders, strict=True) if n >= first and (end is None or n < end) and any(p.iterdir())]

    def _move_aside(self, folders: Sequence[Path]) -> None:
        """Move stages that were made from other inputs, and what was written about them, to `replaced/N/`.

        Raises:
            InputError: nobody has asked for it.
        """
        names = ", ".join(path.name for path in folders)
        if not self.redo:
            why = f"by another recipe (they differ in {', '.join(self._differs)})" if self._differs else "from other inputs"
            raise InputError(
                f"{folders[0]} was made {why}: give --redo to make it and all that depends on it again (what is there is moved to "
                f"{self.path / REPLACED}), choose another folder with --out, or go back."
            )
        with disk_errors(self.path):
            if self._aside is None:
                number = 1 + max((int(p.name) for p in (self.path / REPLACED).glob("*") if p.name.isdecimal()), default=0)
                self._aside = self.path / REPLACED / str(number)
                make_folder(self._aside)
                for name in (RESULTS, REPORT, RECIPE):  # the recipe that they were made by is copied: a run has one
                    if name == RECIPE and (self.path / name).is_file():
                        shutil.copy(self.path / name, self._aside / name)
                    elif (self.path / name).is_file():
                        (self.path / name).rename(self._aside / name)
            for path in folders:
                path.rename(self._aside / path.name)
            sync(self._aside)
            sync(self.path)
        self.progress.warn(f"redo: {names} was made from other inputs and is now in {self._aside}")

    def finish(self, results: dict[str, Any], products: Sequence[str] = ()) -> dict[str, Any]:
        """Write `results.json`; returns the results.

        Args:
            products: patterns of what stays when the stages are dropped; `finished` looks at it again.
        """
        if self.redo is not None and (left := self._numbered(len(self.stages), None)):
            self._move_aside(left)
        # cut off in an earlier start, and no part of the recipe any more: the run is finished all the same
        mine = {*self.stages, *self.beside}
        if cut_off := sorted(p.name for p in self.path.glob("00-*") if p.is_dir() and p.name not in mine and not (p / MARKER).exists()):
            results = results | {CUT_OFF: cut_off}
        with disk_errors(self.path):
            self._settle()
            vouched = stamps(self.path, products)
            sync(self.path)
        self._write_marker(self.path / RESULTS, results | {STAMPS: vouched})
        return results

    def finished(self, fingerprint: str, products: Sequence[str]) -> dict[str, Any] | None:
        """The results, if they have this fingerprint and all products are there and whole; others are removed, as they speak of other
        products."""
        path = self.path / RESULTS
        results = self._marker(path)
        if results.get("fingerprint") == fingerprint and all((self.path / name).exists() for name in products):
            vouched = results.pop(STAMPS, {})
            results.pop(RECIPE_HASH, None)
            if self._is_whole(self.path, {STAMPS: vouched}):
                return results
        with disk_errors(self.path):
            path.unlink(missing_ok=True)
        return None

    def drop_stages(self) -> None:
        """Remove the folders of all stages: the results, and what was moved out of them, is all that stays."""
        self._remove_from(0)

    def _remove_from(self, number: int) -> None:
        for folder in sorted(self.path.iterdir()):
            if (place := STAGE_FOLDER.fullmatch(folder.name)) and int(place[1]) >= number:
                self.remove(folder)

    def remove(self, path: Path) -> None:
        """Remove a file or folder in the run folder, or nothing."""
        gone = self.path / GONE
        shutil.rmtree(gone, ignore_errors=True)
        with disk_errors(self.path):
            if path.is_dir():
                path.rename(gone)
                sync(self.path)
                shutil.rmtree(gone)
            else:
                path.unlink(missing_ok=True)


def _differences(old: Any, new: Any, name: str) -> list[str]:
    """Keys, as `section.key`, under which two plain values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [found for key in sorted(old.keys() | new.keys()) for found in _differences(old.get(key), new.get(key), f"{name}.{key}")]
    return [] if old == new else [name]


class _Entry:
    """A stage that is being done; `summary` is None while its work is still to do."""

    def __init__(self, folder: Path, summary: dict[str, Any] | None = None, done: dict[str, Any] | None = None):
        self.folder, self.summary, self.done = folder, summary, done or {}


def peak_mib() -> int:
    """Most memory that this process, or one that it started and that has ended, has held so far, in MiB."""
    return max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) >> 10
