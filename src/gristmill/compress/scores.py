"""Replace-1-block scores: the parent with one layer exchanged, and how far that moves its next-token distributions, or a task's accuracy.

The sum of its layers' scores stands for a child's quality in the search. Source: Puzzle (arXiv 2411.19146), section 2.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gristmill.compress.child import Distance, Reference, make_child, through
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
                hidden = each(partial(_replaced, library, reference, layer, states), missing)
            scored += zip(missing, reference.distances(hidden, parent.unembedding()), strict=True)
            for choice, found in scored:
                journal.append({"id": score_id(layer, choice), **_record(layer, choice, found, base)})
            progress.tick(sum(score_id(*one) in journal for one in wanted), len(wanted), "blocks scored")
            states = [through(parent, x_TD, layer, layer + 1, piece) for x_TD, piece in zip(states, reference.pieces, strict=True)]
        return {score_id(*one): journal[score_id(*one)] for one in wanted}


def _record(layer: int, choice: Choice, found: Distance, base: Distance) -> dict[str, Any]:
    where = {"layer": layer, "kv_heads": choice.kv_heads, "ffn_size": choice.ffn_size}
    if not math.isfinite(found.kl) or not math.isfinite(found.lm_loss):  # beside 0 no number compares, and it would be the best
        raise InputError(f"The model with {where} gives no numbers (KL {found.kl}): lower bld.lr, and choose another --out.")
    return {**where, "kl": max(0.0, found.kl), "lm_loss": found.lm_loss - base.lm_loss}


@torch.no_grad()
def _replaced(library: Library, reference: Reference, layer: int, states: list[Tensor], choice: Choice) -> list[Tensor]:
    """States that the parent with one layer exchanged comes to in each piece, from what that layer reads."""
    parent = library.parent
    halves = library.half(layer, "attention", choice.kv_heads), library.half(layer, "mlp", choice.ffn_size)
    hidden = []
    for x_TD, piece in zip(states, reference.pieces, strict=True):
        angles = parent.rope(piece.shape.positions_T)[parent.config.blocks[layer].rope]
        for half in halves:
            x_TD = half(x_TD, *angles, piece.shape)
        x_TD = through(parent, x_TD, layer + 1, parent.config.num_layers, piece)
        h_RD = parent.final_norm(x_TD[piece.rows_R])
        hidden.append(h_RD if parent.config.logits_scaling == 1 else h_RD / parent.config.logits_scaling)
    return hidden


@dataclass(frozen=True)
class Task:
    """Prompts with known answers, for scores by accuracy.

    Attributes:
        id: of the prompts, their truths, and how they are asked.
        judge: of a model, whether its greedy answer to each prompt is right.
    """

    id: str
    judge: Callable[[Transformer], Sequence[bool]]


def score_accuracy(library: Library, space: Space, task: Task, folder: Path, progress: Progress) -> Mapping[str, dict[str, Any]]:
    """Score every choice of every layer by the fall of a task's accuracy, in the same `scores.jsonl`; those that it holds stay.

    Returns:
        Of each choice (`score_id`): `accuracy`, how far it falls below the parent's (below 0 by chance), and `stderr`, the standard error
        of that by the prompts' differences. Of "parent": `right`, a verdict a prompt.

    Raises:
        InputError: the parent has no prompt right.
    """
    own = [space.choices(layer)[0] for layer in range(library.parent.config.num_layers)]
    wanted = [(layer, choice) for layer in range(len(own)) for choice in space.choices(layer)]
    names = {one: score_id(*one) for one in wanted}
    with Journal(folder / JOURNAL) as journal:
        if (of_parent := f"parent-{task.id}") not in journal:
            journal.append({"id": of_parent, "right": [int(ok) for ok in task.judge(library.parent)]})
        right = np.array(journal[of_parent]["right"], float)
        if not right.any():
            raise InputError(
                f"The model answers none of {len(right)} prompts rightly, so that no accuracy can fall: take search.metric kl."
            )
        for number, (layer, choice) in enumerate(wanted):
            if (name := f"{names[layer, choice]}-{task.id}") not in journal:
                falls = np.zeros(len(right))
                if choice != own[layer]:
                    falls = right - np.array(task.judge(make_child(library, [*own[:layer], choice, *own[layer + 1 :]]).model), float)
                stderr = float(falls.std(ddof=1)) / math.sqrt(len(falls))
                where = {"layer": layer, "kv_heads": choice.kv_heads, "ffn_size": choice.ffn_size}
                journal.append({"id": name, **where, "accuracy": float(falls.mean()), "stderr": stderr})
            progress.tick(number + 1, len(wanted), "blocks scored by accuracy")
        found = {names[one]: {key: journal[f"{names[one]}-{task.id}"][key] for key in ("accuracy", "stderr")} for one in wanted}
        return {"parent": {"right": journal[of_parent]["right"]}, **found}


def search_scores(blocks: Mapping[str, Mapping[str, float]], space: Space, metric: str, num_prompts: int = 0) -> list[np.ndarray]:
    """Scores as the search adds them up: of every layer one a choice, less is better.

    An accuracy is a count of prompts with noise. A layer that seems to better the parent's would be preferred by chance, and so it counts
    as one that changes nothing (as KL does, which cannot be below 0). Choices with the same accuracy are ordered by KL, whose weight is
    so small that over all layers it comes to less than half a prompt.
    """
    layers = range(len(space.attention))

    def of(key: str) -> list[np.ndarray]:
        return [np.array([blocks[score_id(layer, choice)][key] for choice in space.choices(layer)], float) for layer in layers]

    if metric != "accuracy":
        return of(metric)
    kl = of("kl")
    weight = 0.5 / num_prompts / max(sum(float(of_layer.max()) for of_layer in kl), 1e-9)
    return [np.maximum(falls, 0.0) + weight * of_layer for falls, of_layer in zip(of("accuracy"), kl, strict=True)]
