"""The loop's training stages: what `workflows.train` does, and what the stage's summary says of it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gristmill.model.adapters import merge_folder
from gristmill.train.settings import Training
from gristmill.workflows.alignment.context import AlignmentContext
from gristmill.workflows.train import ADAPTER, MODEL


def train_stage(context: AlignmentContext, kind: str, start: Path, rows: Sequence[Any], recipe: Training, folder: Path) -> dict[str, Any]:
    """Train on rows as `train_model` does; the summary of a stage.

    An adapter is merged into a model at once: what is evaluated, generates and is trained on next is the folder that is stored.
    """
    result = context.ranks.train(kind, start, rows, recipe, folder)
    lora = {}
    if recipe.lora is not None:
        update = merge_folder(folder / ADAPTER, folder / MODEL)["update"]
        lora = {"lora": {"rank": recipe.lora.rank, "update": {name: found["update"] for name, found in update.items()}}}
    return {
        "rows": len(rows),
        "steps": result.steps,
        "tokens": result.tokens,
        "train_seconds": round(result.seconds, 2),
        "tokens_per_second": round(result.tokens / max(result.seconds, 1e-9)),
        "metrics": {k: round(v, 5) for k, v in result.metrics.items()},
        "dropped": len(result.dropped_long) + len(result.dropped_untrained),
        **lora,
    }
