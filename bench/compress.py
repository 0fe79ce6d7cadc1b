"""Compression's choices compared on a finished compression of a model of the miniature: text and losses of distillation, and FFN Fusion.

    PYTHONPATH=src python bench/compress.py text runs/miniature-compress --target 1.3x --steps 400
    PYTHONPATH=src python bench/compress.py losses runs/miniature-compress --target 1.5x --steps 120 --seeds 3
    PYTHONPATH=src python bench/compress.py fusion runs/miniature-compress

text: the child that the search of this target chose is distilled for so many steps, on answers to 1,000 prompts that are asked again and
again, and on as many answers to different prompts. KL(parent || child) on what it was trained on, and on the run's validation text.
Exits 1 where more prompts are no better.

losses: the child that the search of this target chose begins from the library's weights and is distilled on the run's text, by each loss
with each seed, which decides the order of the text. KL(parent || child) and cross-entropy are on the run's validation text. Exits 1 where
the means over seeds break the order of Puzzle (arXiv 2411.19146): cosine+kl the lowest KL, lm the highest.

fusion: the parent without any attention; its dependency matrix, what fusing by several limits moves its distributions (KL), and what
removing as many layers does: of all ways to leave out consecutive MLPs, the best. Exits 1 where the shipped limit's fusion is no better.

Prints JSON.
"""

import argparse
import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from gristmill.compress.activations import pieces_of
from gristmill.compress.child import Reference, make_child
from gristmill.compress.fusion import dependency_matrix, fusable_runs, fuse, independent_runs
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
from gristmill.workflows.alignment.source import normalize_prompt
from gristmill.workflows.compress.recipe import CompressionRecipe
from gristmill.workflows.compress.text import CalibrationText, answer_samples
from gristmill.workflows.train import load_teacher

LOSSES = ("cosine+kl", "kl", "cosine+kl+lm", "lm")
CPU = torch.device("cpu")
BATCH = 32


class Run:
    """A finished compression, read back: its parent, library and text."""

    def __init__(self, folder: Path) -> None:
        self.recipe = load(folder / "recipe.yaml", CompressionRecipe)
        self.stages = {stage["name"]: stage for stage in read_run(folder).stages}
        self.parent, tokenizer = load_model(Path(self.recipe.model))
        self.parent.requires_grad_(False)
        engine = Engine(self.parent, tokenizer, find_format("auto", tokenizer), name="parent")
        quiet = Progress(quiet=True)
        self.prompts = MiniatureSource(HumanData(), self.recipe.seed).drawn(self.recipe.calibration.num_draws, quiet)
        self.answer = partial(answer_samples, engine, progress=quiet, seed=self.recipe.seed)
        text = folder / self.stages["text"]["folder"]  # whose journal has all answers
        samples = self.answer(self.prompts, self.recipe.calibration, text)
        self.text = CalibrationText.of(samples, self.recipe.calibration, self.recipe.seed)
        self.pieces = pieces_of(self.text.validation, 4096, CPU)
        self.library = Library(self.parent, folder / self.stages["library"]["folder"])

    def chosen(self, target: str) -> list[Choice]:
        """Layers of the child that the search of a target took."""
        search = self.stages[f"search-{target}"]
        layers = next(child["layers"] for child in search["children"] if child["number"] == search["chosen"])
        return [Choice(**one) for one in layers]


def text(run: Run, target: str, steps: int, precision: str) -> bool:
    reference, recipe, found = Reference(run.parent, run.pieces), run.recipe, []
    scored = {sample.id for sample in run.text.validation}
    fresh = [prompt for prompt in run.prompts if normalize_prompt(prompt.messages) not in scored]
    wanted = recipe.calibration.model_copy(update={"tokens": steps * BATCH * 80, "validation_tokens": 0})
    for num_prompts in (1000, len(fresh)):
        with tempfile.TemporaryDirectory() as folder:
            samples = run.answer(fresh[:num_prompts], wanted, Path(folder))[: steps * BATCH]
        child = make_child(run.library, run.chosen(target))
        objective = load_teacher(Path(recipe.model), "cosine+kl", child.model.config, precision=precision, device=CPU, layers=child.layers)
        settings = TrainSettings(lr=recipe.distillation.lr, batch_size=BATCH, weight_decay=0.0, steps=steps, precision=precision)
        Trainer(child.model, objective, settings).fit(samples)
        trained_on = Reference(run.parent, pieces_of(samples[: len(run.text.validation)], 4096, CPU))
        kl = {"trained on": trained_on.distance(child.model).kl, "held out": reference.distance(child.model).kl}
        tokens = sum(sample.num_tokens for sample in samples)
        found.append({"prompts": len({sample.id for sample in samples}), "tokens": tokens, "kl": kl})
        print(found[-1], file=sys.stderr)
    print(json.dumps({"steps": steps, "texts": found}, indent=1))
    return bool(found[1]["kl"]["held out"] < found[0]["kl"]["held out"])


def losses(run: Run, target: str, steps: int, seeds: int, precision: str) -> bool:
    reference, recipe = Reference(run.parent, run.pieces), run.recipe
    found: dict[str, list[dict[str, float]]] = {loss: [] for loss in LOSSES}
    for seed in range(seeds):
        for loss in LOSSES:
            child = make_child(run.library, run.chosen(target))
            model = child.model
            objective = load_teacher(Path(recipe.model), loss, model.config, precision=precision, device=CPU, layers=child.layers)
            options: dict[str, Any] = {"lr": recipe.distillation.lr, "batch_size": BATCH, "weight_decay": 0.0}
            Trainer(model, objective, TrainSettings(**options, steps=steps, precision=precision, seed=seed)).fit(run.text.train)
            distance = reference.distance(model)
            found[loss].append({"seed": seed, "kl": round(distance.kl, 5), "lm_loss": round(distance.lm_loss, 5)})
            print(loss, found[loss][-1], file=sys.stderr)
    means = {loss: {key: round(fmean(one[key] for one in ones), 5) for key in ("kl", "lm_loss")} for loss, ones in found.items()}
    print(json.dumps({"steps": steps, "means": means, "runs": found}, indent=1))
    order = sorted(LOSSES, key=lambda loss: means[loss]["kl"])
    return (order[0], order[-1]) == ("cosine+kl", "lm")


def fusion(run: Run) -> bool:
    sizes = [block.ffn_size for block in run.parent.config.blocks]
    child = make_child(run.library, [Choice(0, size) for size in sizes])
    reference = Reference(child.model, run.pieces)
    (whole,) = fusable_runs(child.model.config)
    matrix = dependency_matrix(child.model, run.pieces, whole)
    found = []
    for limit in (CompressionRecipe.model_fields["fusion_limit"].default, 2.0):
        parts = independent_runs({whole: matrix}, limit)
        fewer = sum(len(part) - 1 for part in parts)
        removed = [
            make_child(run.library, [Choice(0, 0 if start <= number < start + fewer else size) for number, size in enumerate(sizes)])
            for start in range(len(sizes) - fewer + 1)
        ]
        kl = {"fused": reference.distance(fuse(child, parts).model).kl, "removed": min(reference.distance(one.model).kl for one in removed)}
        found.append({"limit": limit, "parts": [[part[0], part[-1]] for part in parts], "layers fewer": fewer, "kl": kl})
    report = {"tokens": run.pieces[-1].end, "dependencies": matrix.round(4).tolist(), "fusion": found}
    print(json.dumps(report, indent=1))
    return bool(found[0]["kl"]["fused"] < found[0]["kl"]["removed"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["text", "losses", "fusion"])
    parser.add_argument("run", type=Path, help="folder of a finished compression of a model of the miniature")
    parser.add_argument("--target", default="1.5x", help="text, losses: whose chosen child is distilled")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--precision", default="bf16")
    args = parser.parse_args()
    torch.set_num_threads(1)
    run = Run(args.run)
    what = {
        "text": lambda: text(run, args.target, args.steps, args.precision),
        "losses": lambda: losses(run, args.target, args.steps, args.seeds, args.precision),
        "fusion": lambda: fusion(run),
    }
    sys.exit(not what[args.what]())


if __name__ == "__main__":
    main()
