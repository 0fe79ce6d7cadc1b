"""Block library: every variant of every layer, trained by decoupled blockwise local distillation (BLD).

Each variant learns alone to give what the parent's layer gives, from what the parent's layer reads; the other half of the layer is the
parent's own and frozen. So m attentions and n MLPs take m + n trainings, and any two of a layer are combined afterwards.
Source: Puzzle (arXiv 2411.19146), section 2. A killed library goes on with the variants that it lacks.
"""

import itertools
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from gristmill.compress.activations import Activations, Piece
from gristmill.compress.variants import Half, Space, Variant, half_config, half_of, initial, size_of
from gristmill.core.errors import InputError
from gristmill.core.io import damaged, stamps
from gristmill.core.progress import Progress
from gristmill.core.tensors import write_tensors
from gristmill.core.threads import num_workers, workers
from gristmill.model.packed import PackedShape
from gristmill.model.rotary import Angles
from gristmill.model.transformer import Block, Transformer
from gristmill.runs.journal import Journal
from gristmill.train.trainer import LossOutput, Trainer, TrainSettings

JOURNAL, ACTIVATIONS = "library.jsonl", "activations"


@dataclass(frozen=True)
class BldSettings:
    """Blockwise local distillation: optimizer steps of a variant, and learning rate; 0 steps leave variants as they are made."""

    steps: int
    lr: float
    precision: str
    seed: int


@dataclass(frozen=True)
class LayerBatch:
    """Tokens of a batch around one layer: what a variant reads, and what it shall give."""

    x_TD: Tensor
    target_TD: Tensor
    angles: Angles
    shape: PackedShape
    num_tokens: int
    count: int = 1  # the loss is normalised by the batch itself


class Replaced(nn.Module):
    """A layer with one half replaced: the variant is trained, what comes behind it is the parent's and frozen."""

    def __init__(self, variant: Block, behind: Block | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.variant, self.compute_dtype = variant, dtype
        self._behind = [behind]  # no part of what is trained and saved

    def forward(self, batch: LayerBatch) -> Tensor:
        x_TD = self.variant(batch.x_TD, *batch.angles, batch.shape)
        return x_TD if (behind := self._behind[0]) is None else behind(x_TD, *batch.angles, batch.shape)


def normalized_mse(model: Replaced, batch: LayerBatch) -> LossOutput:
    """BLD's loss: MSE(parent, child) / MSE(parent, 0); 0 of the parent's own half, 1 of a layer that gives nothing."""
    target_TD = batch.target_TD.float()
    loss = (model(batch).float() - target_TD).square().sum() / target_TD.square().sum()
    return LossOutput(loss, batch.count)


class Library:
    """Variants of a parent's halves: the parent's own, and those in a folder.

    Args:
        folder: that `build_library` filled.
    """

    def __init__(self, parent: Transformer, folder: Path) -> None:
        self.parent, self.folder = parent, folder

    def half(self, layer: int, half: Half, size: int) -> Block:
        """Half a layer of this size."""
        config = self.parent.config.blocks[layer]
        if size == size_of(config, half):
            return half_of(self.parent, layer, half)
        variant = Variant(layer, half, size)
        with torch.device(self.parent.embedding.device):
            found = Block(self.parent.config, half_config(config, variant))
        if size:
            found.load_state_dict(load_file(self.folder / f"{variant.id}.safetensors"))
        return found.requires_grad_(False)


def build_library(
    parent: Transformer, space: Space, pieces: Sequence[Piece], folder: Path, settings: BldSettings, progress: Progress
) -> dict[str, dict[str, Any]]:
    """Make and train all variants of a space; those that the folder holds already stay. The parent's weights must be frozen.

    Returns:
        Of each variant by id: `layer`, `half`, `size`, and the normalised MSE `before` and `after` training on the last pieces.
    """
    variants = [variant for variant in space.variants() if variant.size]
    with Journal(folder / JOURNAL) as journal:
        left = [one for one in variants if one.id not in journal or damaged(folder, journal[one.id]["stamps"])]
        activations = Activations(parent, pieces, folder / ACTIVATIONS) if left else None
        lock, count = Lock(), itertools.count(1)
        for layer in dict.fromkeys(variant.layer for variant in left):
            assert activations is not None
            contribution_F = activations.advance(layer)
            of_layer = [variant for variant in left if variant.layer == layer]
            train = _training(activations, contribution_F, folder, settings)

            def work(variant: Variant, train: Callable[[Variant], dict[str, Any]] = train) -> None:
                record = train(variant)
                with lock:
                    journal.append(record)
                    progress.tick(len(variants) - len(left) + next(count), len(variants), "variants")

            with workers(num_workers(parent)) as each:
                each(work, of_layer)
        shutil.rmtree(folder / ACTIVATIONS, ignore_errors=True)  # also of a start that was killed behind its last variant
        return {one.id: journal[one.id] for one in variants}


def _training(
    activations: Activations, contribution_F: Tensor | None, folder: Path, settings: BldSettings
) -> Callable[[Variant], dict[str, Any]]:
    parent = activations.parent
    *train, held_out = activations.pieces if len(activations.pieces) > 1 else [*activations.pieces] * 2

    def batch_of(variant: Variant, piece: Piece) -> LayerBatch:
        x_TD = activations.inputs(piece) if variant.half == "attention" else activations.middles(piece)
        return LayerBatch(x_TD, activations.outputs(piece), activations.angles(piece), piece.shape, piece.num_tokens)

    def loss(model: Replaced, batch: LayerBatch) -> float:
        with torch.no_grad():
            return float(normalized_mse(model, batch).sum)

    def work(variant: Variant) -> dict[str, Any]:
        block = initial(parent, variant, contribution_F)
        behind = half_of(parent, variant.layer, "mlp") if variant.half == "attention" else None
        model = Replaced(block, behind, parent.compute_dtype)
        last = batch_of(variant, held_out)
        before = after = loss(model, last)
        if settings.steps:
            options = TrainSettings(
                lr=settings.lr,
                steps=settings.steps,
                batch_size=1,
                warmup_steps=min(5, settings.steps // 5),
                min_lr_ratio=0.1,
                weight_decay=0.0,
                precision=settings.precision,
                micro_batch_tokens=max(piece.num_tokens for piece in train),
            )
            trainer = Trainer(model, normalized_mse, options)
            order = np.random.default_rng([settings.seed, variant.layer]).permutation(len(train))
            for step in range(settings.steps):
                trainer.step([batch_of(variant, train[order[step % len(train)]])])
            after = loss(model, last)
        if not math.isfinite(after):
            raise InputError(f"Variant {variant.id} does not train: its loss is {after}. Lower bld.lr.")
        file = f"{variant.id}.safetensors"
        write_tensors(folder / file, block.state_dict())
        said = {"layer": variant.layer, "half": variant.half, "size": variant.size, "before": before, "after": after}
        return {"id": variant.id, **said, "stamps": stamps(folder, [file])}

    return work
