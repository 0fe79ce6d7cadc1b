"""A run folder, read back: its kind, recipe, stages, results, and the artifacts of every stage.

Only files are looked at, so an unfinished run reads as well as a finished one.
"""

import os
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, overload

from gristmill.core.config import COMMANDS, read
from gristmill.core.errors import InputError
from gristmill.core.io import STAMPS, read_json, reason

if TYPE_CHECKING:  # `gristmill status` starts without what rows need
    import pyarrow as pa

    from gristmill.runs.artifacts import AnyArtifact, Artifact, JournalArtifact, JsonArtifact

Row = TypeVar("Row")
RECIPE_HASH, CHECK = "recipe", "check"  # in every marker: of the run's recipe, and of the marker's own values
OF_MARKERS = (STAMPS, RECIPE_HASH, CHECK)
GENERATED = "generated_tokens"  # in the marker of a stage that has journals
CUT_OFF = "cut_off"  # in results: folders of stages that were never finished and that the run does without
STAGE_FOLDER = re.compile(r"(\d{2,})-.+")


@dataclass(frozen=True)
class RunData:
    """What a run folder holds.

    Attributes:
        folder: the run's folder.
        kind: of its recipe: "alignment", "dataset", "curation" or another.
        recipe: resolved, as plain values.
        stages: in order, what each stage's `done.json` says, and its folder's name under "folder". An unfinished stage has only that.
        results: `results.json`, or None while the run is not finished.

    A JSON object is read once, the first time that it is asked for.
    """

    folder: Path
    kind: str
    recipe: dict[str, Any]
    stages: list[dict[str, Any]]
    results: dict[str, Any] | None
    _objects: dict[Path, dict[str, Any]] = field(default_factory=dict, repr=False, compare=False)

    def stages_with(self, artifact: "AnyArtifact") -> list[dict[str, Any]]:
        """The finished stages that wrote an artifact, in order."""
        return [s for s in self.stages if artifact.file in s.get("artifacts", ())]

    @overload
    def read(self, stage: str, artifact: "Artifact[Row]", at: Sequence[int] | None = None) -> list[Row]: ...
    @overload
    def read(self, stage: str, artifact: "JsonArtifact") -> dict[str, Any]: ...
    @overload
    def read(self, stage: str, artifact: "JournalArtifact") -> dict[str, dict[str, Any]]: ...

    def read(self, stage: str, artifact: "AnyArtifact", at: Sequence[int] | None = None) -> Any:
        """What a stage (given by its folder's name) wrote: rows (or those of some numbers), a JSON object, or records by id.

        Raises:
            InputError: the stage is not finished or writes no such artifact, or the file is damaged or gone.
        """
        from gristmill.runs.artifacts import JsonArtifact

        folder = self._folder(stage, artifact)
        if isinstance(artifact, JsonArtifact):
            path = folder / artifact.file
            if path not in self._objects:
                self._objects[path] = artifact.read(folder)
            return self._objects[path]
        return artifact.read(folder) if at is None else artifact.read(folder, at)  # type: ignore[call-arg]

    def columns(self, stage: str, artifact: "Artifact[Any]", *names: str) -> "dict[str, pa.Array]":
        """Some fields of all rows that a stage wrote, as `data.rows.read_columns` gives them.

        Raises:
            InputError: as `read`.
        """
        return artifact.columns(self._folder(stage, artifact), names)

    def _folder(self, stage: str, artifact: "AnyArtifact") -> Path:
        path = self.folder / stage / artifact.file
        if all(s["folder"] != stage for s in self.stages_with(artifact)):
            raise InputError(f"{path} is not an artifact of a finished stage: run the same command again to finish it.")
        if not path.is_file():
            raise InputError(f"{path} is gone: put it back, or delete its folder and run the same command again.")
        return path.parent

    def tokens_written(self, stage: str) -> int:
        """Tokens that models generated in a stage. Where its marker does not say how many, its journals do."""
        said = next((s for s in self.stages if s["folder"] == stage), {}).get(GENERATED)
        return said if isinstance(said, int) else generated_tokens(self.folder / stage)

    def records(self, stage: str, artifact: "JournalArtifact", ids: Collection[str]) -> dict[str, dict[str, Any]]:
        """Some records of a stage's journal, by id.

        Raises:
            InputError: as `read`.
        """
        from gristmill.runs.journal import read_once

        return {record["id"]: record for record in read_once(self._folder(stage, artifact) / artifact.file, ids)}


def generated_tokens(folder: Path) -> int:
    """Tokens that models generated, by all journals in a stage's folder: what was paid for counts, declared or not."""
    from gristmill.runs.journal import read_once

    total = 0
    for path in sorted(folder.glob("*.jsonl")):
        total += sum({record["id"]: sum([out[1] for out in record.get("out") or ()]) for record in read_once(path)}.values())
    return total


@contextmanager
def reading_back(folder: Path) -> Iterator[None]:
    """Turn what a file of another form leads to, wherever it is looked into, into an InputError."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, OSError, RecursionError) as e:
        if isinstance(e, InputError):
            raise
        raise InputError(
            f"{folder} holds a file that is damaged or of another version ({type(e).__name__}: {reason(e)}): "
            "run the command that made it again, which mends it."
        ) from e


def read_run(folder: Path, *, kind: str | None = None) -> RunData:
    """Read a run, finished or not.

    Args:
        kind: the only kind of recipe that will do; any, by default.

    Raises:
        InputError: the folder holds no run or one of another kind, or one of its files is damaged.
    """
    saved = folder / "recipe.yaml"
    if not os.path.isfile(saved):
        raise InputError(f"{folder} holds no run: give the folder that `gristmill run` wrote.")
    try:
        recipe = read(saved)
    except InputError as e:
        raise InputError(f"{e} Run the same command again, which writes it again.") from e
    if "kind" not in recipe:
        raise InputError(f"{folder} was made by an earlier version of gristmill: read it with that one.")
    if kind is not None and recipe["kind"] != kind:
        command, other = COMMANDS.get(kind, kind), COMMANDS.get(str(recipe["kind"]), recipe["kind"])
        raise InputError(f"{folder} holds a run of `gristmill {other}`: give one of `gristmill {command}`.")
    numbered = [(int(m[1]), p) for p in folder.iterdir() if p.is_dir() and (m := STAGE_FOLDER.fullmatch(p.name))]
    stages: list[dict[str, Any]] = []
    for _, path in sorted(numbered):
        done = path / "done.json"
        stages.append({**(_said(done) if done.exists() else {}), "folder": path.name})
    results = _results(folder, stages)
    if results and not stages:  # a finished run may have dropped their folders
        stages = [stage for stage in results.get("stages", []) if "folder" in stage]
    return RunData(folder, str(recipe["kind"]), recipe, stages, results)


def _said(path: Path) -> dict[str, Any]:
    """What a marker says, without what it says of itself."""
    return {key: value for key, value in read_json(path).items() if key not in OF_MARKERS}


def _results(folder: Path, stages: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The results, unless there are none or they are those of an earlier, shorter run that is being continued."""
    path = folder / "results.json"
    unfinished = [s["folder"] for s in stages if "fingerprint" not in s]
    if not path.exists() or any(not folder.startswith("00-") for folder in unfinished):
        return None
    results = _said(path)
    if not set(unfinished) <= set(results.get(CUT_OFF, ())):
        return None
    models = {s["name"] for s in stages if "greedy" in s}
    return results if not models or models <= {s["name"] for s in results.get("stages", [])} else None
