"""Replace-1-block scores: the parent with one layer exchanged, and how far that moves its distributions of the next token.

The sum of its layers' scores stands for a child's quality in the search. Source: Puzzle (arXiv 2411.19146), section 2.
"""

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gristmill.compress.child import Distance, Reference
from gristmill.compress.library import Library
from gristmill.compress.variants import Choice, Space
from gristmill.core.errors import InputError
from gristmill.core.progress import Progress
from gristmill.core.threads import num_workers, workers
from gristmill.model.transformer import Transformer
from gristmill.runs.journal import Journal

JOURNAL = "scores.jsonl"


def score_id(layer: int, choice: Choice) -> str:
    """Name of a layer's choice in the journal."""
    return f"{layer:03}-{choice.kv_heads}-{choice.ffn_size}"


@torch.no_grad()
def score_blocks(library: Library, space: Space, reference: Reference, folder: Path, progress: Progress) -> Mapping[str, dict[str, Any]]:
    """Score every choice of every layer, in `scores.jsonl`; those that it holds stay.

    Returns:
        Of each choice (`score_id`): `layer`, `kv_heads`, `ffn_size`, `kl`, `lm_loss` (the rise over the parent's).
    """
    parent = library.parent
    base = reference.distance(parent)
    wanted = [(layer, choice) for layer in range(parent.config.num_layers) for choice in space.choices(layer)]
    with Journal(folder / JOURNAL) as journal:
        left = [one for one in wanted if score_id(*one) not in journal]
        states = [parent.embed(piece.ids_T) for piece in reference.pieces]
        for layer in range(parent.config.num_layers if left else 0):
            own, *others = [choice for number, choice in wanted if number == layer]

            missing = [choice for choice in others if (layer, choice) in left]
            scored = [(own, base)] if (layer, own) in left else []
            with workers(num_workers(parent)) as each:
                scored += zip(missing, each(partial(_replaced, library, reference, layer, states), missing), strict=True)
            for choice, found in scored:
                journal.append({"id": score_id(layer, choice), **_record(layer, choice, found, base)})
            progress.tick(len(journal), len(wanted), "blocks scored")
            states = [_through(parent, x_TD, layer, layer + 1, piece) for x_TD, piece in zip(states, reference.pieces, strict=True)]
        return {score_id(*one): journal[score_id(*one)] for one in wanted}


def _record(layer: int, choice: Choice, found: Distance, base: Distance) -> dict[str, Any]:
    where = {"layer": layer, "kv_heads": choice.kv_heads, "ffn_size": choice.ffn_size}
    if not math.isfinite(found.kl) or not math.isfinite(found.lm_loss):  # beside 0 no number compares, and it would be the best
        raise InputError(f"The model with {where} gives no numbers (KL {found.kl}): lower bld.lr, and choose another --out.")
    return {**where, "kl": max(0.0, found.kl), "lm_loss": found.lm_loss - base.lm_loss}


@torch.no_grad()
def _replaced(library: Library, reference: Reference, layer: int, states: list[Tensor], choice: Choice) -> Distance:
    """Distance of the parent with one layer exchanged, from what that layer reads."""
    parent = library.parent
    halves = library.half(layer, "attention", choice.kv_heads), library.half(layer, "mlp", choice.ffn_size)
    hidden = []
    for x_TD, piece in zip(states, reference.pieces, strict=True):
        angles = parent.rope(piece.shape.positions_T)[parent.config.blocks[layer].rope]
        for half in halves:
            x_TD = half(x_TD, *angles, piece.shape)
        x_TD = _through(parent, x_TD, layer + 1, parent.config.num_layers, piece)
        h_RD = parent.final_norm(x_TD[piece.rows_R])
        hidden.append(h_RD if parent.config.logits_scaling == 1 else h_RD / parent.config.logits_scaling)
    return reference.of_hidden(hidden, parent)


def _through(parent: Transformer, x_TD: Tensor, first: int, end: int, piece: Any) -> Tensor:
    """States behind the layers from `first` to before `end`."""
    angles = parent.rope(piece.shape.positions_T)
    for number in range(first, end):
        x_TD = parent.blocks[str(number)](x_TD, *angles[parent.config.blocks[number].rope], piece.shape)
    return x_TD
