"""A run is a folder: one folder a stage, complete when its marker is there.

    runs/NAME/recipe.yaml       the resolved recipe
    runs/NAME/03-r1-prompts/    a stage: its files, and done.json (summary, seconds, fingerprint of its inputs)
    runs/NAME/results.json      written at the end
    runs/NAME/report.html

`done.json` is written last, by an atomic rename. A stage that has it is skipped on the next start; one without is continued.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gristmill.errors import InputError
from gristmill.files import lock, write_json
from gristmill.flywheel import recipe as recipes
from gristmill.flywheel.progress import Progress
from gristmill.flywheel.recipe import Recipe
from gristmill.rows import make_id
from gristmill.train.checkpoint import disk_errors

GROWS = {"rounds", "threads"}  # recipe keys that may change when a run is taken up again

NEW_RECIPE = "recipe.yaml.tmp"  # may be all that a start leaves behind that was cut off at once


class RunFolder:
    """The stages of a run, done or to do.

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
            temporary.write_text(recipes.dump(recipe))
            temporary.replace(path / "recipe.yaml")
        except OSError as e:
            raise InputError(f"{path} cannot be written ({e.strerror}): free some space, or choose another folder with --out.") from e

    def _check(self, recipe: Recipe) -> None:
        saved = self.path / "recipe.yaml"
        if not saved.exists():
            if self.path.exists() and not self.path.is_dir():
                raise InputError(f"{self.path} is not a folder: choose another with --out.")
            if self.path.exists() and any(p.name not in (".lock", NEW_RECIPE) for p in self.path.iterdir()):
                raise InputError(f"{self.path} is not empty and holds no run: choose another folder with --out.")
            return
        if not any(self.path.glob("*/done.json")):
            return  # nothing is made yet: the recipe may change
        old, new = recipes.load(saved).model_dump(mode="json"), recipe.model_dump(mode="json")
        changed = [k for k in new if k not in GROWS and old.get(k) != new[k]]
        if changed:
            raise InputError(
                f"{self.path} was made by another recipe (they differ in {', '.join(changed)}): "
                "choose another folder with --out, or go back to that recipe."
            )
        if new["rounds"] < old["rounds"]:
            raise InputError(f"{self.path} was made for {old['rounds']} rounds: rounds may grow, not shrink.")

    def close(self) -> None:
        """Let go of the folder."""
        self._lock.close()

    def stage(self, name: str, inputs: Any, work: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        """Do a stage, or return its summary when it is done.

        Args:
            name: what it is for; the folder's name is its place in the order and this.
            inputs: anything (JSON) that decides its result.
            work: gets the stage's folder, which may hold what an interrupted start left; returns the summary.
        """
        folder = self.path / f"{len(self.stages):02d}-{name}"
        self.stages.append(folder.name)
        fingerprint = make_id(name, inputs)
        marker = folder / "done.json"
        if marker.exists():
            done: dict[str, Any] = json.loads(marker.read_text())
            if done["fingerprint"] != fingerprint:
                raise InputError(
                    f"{folder} was made from other inputs: delete that folder and those after it to make them again, "
                    "or choose another folder with --out."
                )
            return done
        with disk_errors(self.path):
            folder.mkdir(exist_ok=True)
        started = time.monotonic()
        with self.progress.stage(folder.name), disk_errors(folder):
            summary = work(folder)
        seconds = time.monotonic() - started
        done = {"name": name, "fingerprint": fingerprint, "seconds": round(seconds, 2), **summary}
        write_json(marker, done)
        self.progress.finished(folder.name, done)
        return done
