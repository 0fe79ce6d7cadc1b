"""A recipe that turns the whole mill in two seconds, and one finished run of it."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gristmill.core.config import check
from gristmill.core.progress import Progress
from gristmill.workflows.alignment import loop
from gristmill.workflows.alignment.recipe import AlignmentRecipe

Make = Callable[..., AlignmentRecipe]

# Every threshold lets everything pass: so small a model has no quality to filter by, but every stage has rows to work on.
TINY: dict[str, Any] = {
    "name": "tiny",
    "rounds": 1,
    "rpo_iterations": 1,
    "threads": 1,
    "data": {"num_demonstrations": 64, "num_rated_prompts": 24, "num_prompts": 6, "num_evaluation": 2, "num_held_out_ratings": 10},
    "topics": {"macro": 6, "subtopics": 0, "own": ["Batru", "Fikro"]},
    "pipelines": {
        "open_qa": {"questions": 4, "revisions": 0},
        "math": {"own": ["apples"], "topics": 4, "subtopics": 0, "levels": ["school"], "forms": ["general"], "problems": 6},
        "python": {"own": ["lists"], "topics": 4, "subtopics": 0, "levels": ["beginner"], "problems": 6},
        "writing": {"own": ["fruits", "tools"], "kinds": ["list"], "kinds_per_topic": 1, "tasks": 6, "revisions": 0},
        "two_turn": {"prompts": 12},
    },
    "answers": {"samples": 4, "temperatures": [0.7, 1.0], "max_tokens": 32},
    "judging": {"keep": "correctness >= -99", "min_votes": 1, "min_gap": 0},
    "collapse": {"tokens": 400, "stop": 9},
    "demonstration_sft": {"lr": 1e-5, "steps": 2, "batch_size": 8},
    "reward": {"lr": 5e-4, "steps": 3, "batch_size": 8},
    "code_sft": {"lr": 1e-5, "steps": 2, "batch_size": 8},
    "general_sft": {"lr": 1e-5, "steps": 3, "batch_size": 8},
    "dpo": {"lr": 1e-4, "steps": 2, "batch_size": 4, "num_prompts": 8, "keep_chosen": "correctness >= -99"},
    "rpo": {"lr": 1e-4, "steps": 2, "batch_size": 4, "num_prompts": 8, "keep_chosen": "correctness >= -99", "loss": "rpo"},
}


@pytest.fixture(scope="session")
def make_recipe(tiny_base: Path) -> Make:
    """The tiny recipe on the miniature world, with changes by key; a section's changes are merged into it."""

    def make(**changes: Any) -> AlignmentRecipe:
        values = {"world": "miniature", "model": str(tiny_base), **TINY}
        for key, value in changes.items():
            values[key] = {**values[key], **value} if isinstance(value, dict) and key in values else value
        return check(AlignmentRecipe, values)

    return make


def turn(recipe: AlignmentRecipe, folder: Path) -> dict[str, Any]:
    with Progress(quiet=True) as progress:
        return loop.run(recipe, folder, progress)


@pytest.fixture(scope="session")
def run() -> Callable[[AlignmentRecipe, Path], dict[str, Any]]:
    """Turn the mill without a display."""
    return turn


@pytest.fixture(scope="session")
def finished(make_recipe: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of the tiny recipe. Read only: take `copy` to change it."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    turn(make_recipe(), folder)
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(finished, tmp_path / "tiny"))
