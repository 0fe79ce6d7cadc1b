"""The processes of an alignment run, with how they train."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from gristmill.core.errors import InputError
from gristmill.data.rows import Demonstration, Pair, Rated
from gristmill.engine.engine import Engine
from gristmill.judge.judges import Scorer
from gristmill.parallel.mesh import Mesh
from gristmill.train.settings import PreferenceTraining, Training
from gristmill.train.trainer import TrainResult
from gristmill.workflows.ranks import Ranks
from gristmill.workflows.train import train_model

# Rows of a kind of training; any other has pairs.
ROWS: dict[str, TypeAdapter[Any]] = {"sft": TypeAdapter(list[Demonstration]), "reward": TypeAdapter(list[Rated])}
PAIRS: TypeAdapter[Any] = TypeAdapter(list[Pair])
CHECKPOINT_SECONDS = 20.0


class AlignmentRanks(Ranks):
    """The processes of one alignment run; the arguments of `Ranks`, and

    Args:
        options: of every training, as `train_model` takes them.
    """

    def __init__(
        self, mesh: Mesh, *, engine: Callable[[str, Path], Engine], scorer: Callable[[Path], Scorer], options: dict[str, Any]
    ) -> None:
        super().__init__(mesh, engine=engine, scorer=scorer)
        self._options = options

    def train(self, kind: str, start: Path, rows: Sequence[Any], recipe: Training, folder: Path) -> TrainResult:
        """Train on all processes."""
        if self.mesh.size == 1:
            return self._train(kind, start, rows, recipe, folder)
        order = {"kind": kind, "start": str(start), "folder": str(folder), "recipe": recipe.model_dump(mode="json")}
        with self._together({"job": "train", "rows": ROWS.get(kind, PAIRS).dump_python(list(rows), mode="json"), **order}):
            return self._train(kind, start, rows, recipe, folder)

    def _do(self, order: dict[str, Any]) -> None:
        if order["job"] == "train":
            rows = ROWS.get(order["kind"], PAIRS).validate_python(order["rows"])
            recipe = (Training if order["kind"] in ROWS else PreferenceTraining).model_validate(order["recipe"])
            with suppress(InputError):  # the first process says it, and what comes then
                self._train(order["kind"], Path(order["start"]), rows, recipe, Path(order["folder"]))
        else:
            super()._do(order)

    def _train(self, kind: str, start: Path, rows: Sequence[Any], recipe: Training, folder: Path) -> TrainResult:
        options = {"checkpoint_every": CHECKPOINT_SECONDS, "mesh": self.mesh, **self._options}
        return train_model(kind, start, rows, out=folder, recipe=recipe, **options)
