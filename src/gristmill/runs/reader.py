"""A run folder, read back. Only files are looked at, so an unfinished run reads as well as a finished one."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from gristmill.core.errors import InputError

Row = TypeVar("Row")
STAGE_FOLDER = re.compile(r"(\d{2,})-.+")


@dataclass(frozen=True)
class RunData:
    """What a run folder holds.

    Attributes:
        folder: the run's folder.
        recipe: its resolved recipe, as plain values.
        stages: in order, what each stage's `done.json` says, and its folder's name under "folder". An unfinished stage has only that.
        results: `results.json`, or None while the run is not finished.
    """

    folder: Path
    recipe: dict[str, Any]
    stages: list[dict[str, Any]]
    results: dict[str, Any] | None

    def rows(self, stage: str, file: str, row: type[Row]) -> list[Row]:
        """Dataclass rows of a Parquet or JSONL file in a stage's folder; none where the file is not there or holds no row.

        Raises:
            InputError: the file is damaged.
        """
        from gristmill.data.rows import read_records, read_rows

        path = self.folder / stage / file
        return read_rows(path, row) if path.is_file() and read_records(path) else []

    def journal(self, stage: str, file: str) -> dict[str, dict[str, Any]]:
        """Records by id of a stage's journal; a torn last line is left out."""
        path = self.folder / stage / file
        out: dict[str, dict[str, Any]] = {}
        if path.is_file():
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:
                    break
                out[record["id"]] = record
        return out

    def outcomes(self, stage: str) -> dict[str, dict[str, bool]]:
        """Right or wrong by mode ("greedy", "sampled") and evaluation prompt; empty when the stage has not been evaluated."""
        path = self.folder / stage / "outcomes.json"
        return _json(path) if path.is_file() else {}


def read_run(folder: Path) -> RunData:
    """Read a run, finished or not.

    Raises:
        InputError: the folder holds no run, or one of its files is damaged.
    """
    saved = folder / "recipe.yaml"
    if not saved.is_file():
        raise InputError(f"{folder} holds no run: give the folder that `gristmill run` wrote.")
    try:
        recipe = yaml.safe_load(saved.read_text())
    except yaml.YAMLError as e:
        raise InputError(f"{saved} is not YAML ({' '.join(str(e).split())}): run the recipe in a new folder.") from e
    if not isinstance(recipe, dict):
        raise InputError(f"{saved} is no recipe: run the recipe in a new folder.")
    numbered = [(int(m[1]), p) for p in folder.iterdir() if p.is_dir() and (m := STAGE_FOLDER.fullmatch(p.name))]
    stages: list[dict[str, Any]] = []
    for _, path in sorted(numbered):
        done = path / "done.json"
        stages.append({**(_json(done) if done.is_file() else {}), "folder": path.name})
    results = _results(folder, stages)
    if results and not stages:  # a finished run may have dropped their folders
        stages = [stage for stage in results.get("stages", []) if "folder" in stage]
    return RunData(folder, recipe, stages, results)


def _results(folder: Path, stages: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The results, unless there are none or they are those of an earlier, shorter run that is being continued."""
    path = folder / "results.json"
    if not path.is_file() or not all("fingerprint" in s for s in stages):
        return None
    results = _json(path)
    told = {s["name"] for s in results.get("stages", [])}
    return results if all(s["name"] in told for s in stages if "greedy" in s) else None


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise InputError(f"{path} cannot be read ({e}): delete its folder and run the same command again.") from e
    if not isinstance(value, dict):
        raise InputError(f"{path} holds no JSON object: delete its folder and run the same command again.")
    return value
