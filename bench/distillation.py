"""The losses of global distillation compared: one child of a finished compression, trained with each of them, over several seeds.

    PYTHONPATH=src python bench/distillation.py runs/miniature-compress --target 1.5x --steps 120 --seeds 3

For each loss and seed the child that the search of this target chose begins from the library's weights and is distilled on the run's text;
a seed decides the order of the text. Prints KL(parent || child) and cross-entropy on the run's validation text as JSON, and exits 1 where
a mean over seeds breaks the order of Puzzle (arXiv 2411.19146): cosine+kl the lowest KL, lm the highest.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from gristmill.compress.activations import pieces_of
from gristmill.compress.child import Reference, make_child
from gristmill.compress.library import Library
from gristmill.compress.variants import Choice
from gristmill.core.config import load
from gristmill.core.progress import Progress
from gristmill.data.find_format import find_format
from gristmill.data.human import HumanData
from gristmill.engine.engine import Engine
from gristmill.miniature.source import MiniatureSource
from gristmill.model.hf import load_model
from gristmill.runs.reader import read_run
from gristmill.train.trainer import Trainer, TrainSettings
from gristmill.workflows.compress.recipe import CompressionRecipe
from gristmill.workflows.compress.text import CalibrationText, answer_samples
from gristmill.workflows.train import load_teacher

LOSSES = ("cosine+kl", "kl", "cosine+kl+lm", "lm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished compression of a model of the miniature")
    parser.add_argument("--target", default="1.5x", help="whose chosen child is distilled")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--precision", default="bf16")
    args = parser.parse_args()
    torch.set_num_threads(1)
    recipe, stages = load(args.run / "recipe.yaml", CompressionRecipe), {stage["name"]: stage for stage in read_run(args.run).stages}
    parent, tokenizer = load_model(Path(recipe.model))
    parent.requires_grad_(False)
    text = text_of(recipe, args.run / stages["text"]["folder"], Engine(parent, tokenizer, find_format("auto", tokenizer), name="parent"))
    reference = Reference(parent, pieces_of(text.validation, 4096, torch.device("cpu")))
    search = stages[f"search-{args.target}"]
    layers = next(child["layers"] for child in search["children"] if child["number"] == search["chosen"])
    library = Library(parent, args.run / stages["library"]["folder"])
    found: dict[str, list[dict[str, float]]] = {loss: [] for loss in LOSSES}
    for seed in range(args.seeds):
        for loss in LOSSES:
            child = make_child(library, [Choice(**one) for one in layers])
            objective = load_teacher(
                Path(recipe.model), loss, child.model.config, precision=args.precision, device=torch.device("cpu"), layers=child.layers
            )
            settings = TrainSettings(
                lr=recipe.distillation.lr or 1e-3, steps=args.steps, batch_size=32, weight_decay=0.0, precision=args.precision, seed=seed
            )
            Trainer(child.model, objective, settings).fit(text.train)
            distance = reference.distance(child.model)
            found[loss].append({"seed": seed, "kl": round(distance.kl, 5), "lm_loss": round(distance.lm_loss, 5)})
            print(loss, found[loss][-1], file=sys.stderr)
    print(json.dumps(report(found, args.steps), indent=1))
    means = {loss: fmean(one["kl"] for one in runs) for loss, runs in found.items()}
    sys.exit(not (min(means, key=means.__getitem__) == "cosine+kl" and max(means, key=means.__getitem__) == "lm"))


def text_of(recipe: CompressionRecipe, folder: Path, engine: Engine) -> CalibrationText:
    """The run's text, from its journal of answers."""
    prompts = MiniatureSource(HumanData(), recipe.seed).prompts()
    samples = answer_samples(engine, prompts, recipe.calibration, folder, Progress(quiet=True), recipe.seed)
    return CalibrationText.of(samples, recipe.calibration, recipe.seed)


def report(found: dict[str, list[dict[str, float]]], steps: int) -> dict[str, Any]:
    """Means over seeds beside what each seed gave."""
    means = {loss: {key: round(fmean(one[key] for one in runs), 5) for key in ("kl", "lm_loss")} for loss, runs in found.items()}
    return {"steps": steps, "means": means, "runs": found}


if __name__ == "__main__":
    main()
