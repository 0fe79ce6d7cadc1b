"""FFN Fusion: the MLPs of consecutive layers without attention become one wide MLP, which computes them side by side.

A run's layers read almost the same states, so that each may read what the first does; the dependency matrix says how nearly. The norm is
that of the last layer that is fused: treating each layer's own norm by its weights changes nothing that was measured. The last MLP of a run
is never fused. Source: FFN Fusion (arXiv 2503.18908), section 3.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gristmill.compress.activations import Piece
from gristmill.compress.child import Child, through
from gristmill.core.errors import InputError
from gristmill.model.config import BlockConfig, ModelConfig
from gristmill.model.transformer import Block, Transformer


def fusable_runs(config: ModelConfig) -> list[range]:
    """Runs of two and more layers that can be fused: consecutive ones without attention, all but the last of each run."""
    runs: list[range] = []
    start = 0
    for number in range(config.num_layers + 1):
        if number < config.num_layers and not config.blocks[number].has_attention and config.blocks[number].has_mlp:
            continue
        if number - 1 - start >= 2:
            runs.append(range(start, number - 1))
        start = number + 1
    return runs


@torch.no_grad()
def dependency_matrix(model: Transformer, pieces: Sequence[Piece], run: range) -> np.ndarray:
    """Dependency matrix of a run of layers without attention: how much each needs those before it.

    Returns:
        [i, j]: cosine distance between what layer j adds to the states with layer i and without it, a mean over tokens; 0 but for i < j.
    """
    sums = np.zeros((len(run), len(run)))
    for piece in pieces:
        states = [through(model, model.embed(piece.ids_T), 0, run.start, piece)]
        for number in run:
            states.append(through(model, states[-1], number, number + 1, piece))
        for i in range(len(run) - 1):
            x_TD = states[i]  # in which layer i is left out
            for j in range(i + 1, len(run)):
                after_TD = through(model, x_TD, run[j], run[j] + 1, piece)
                added = (states[j + 1] - states[j]).float(), (after_TD - x_TD).float()
                sums[i, j] += float((1 - F.cosine_similarity(*added, dim=-1)).sum())
                x_TD = after_TD
    return sums / pieces[-1].end


def independent_runs(matrices: Mapping[range, np.ndarray], limit: float) -> list[range]:
    """Of runs with their dependency matrices, the parts to fuse: the longest in which no layer depends on another by more than the limit.

    Of equally long ones that of the smallest largest entry is taken, then that of the smallest sum; none overlaps another.
    """
    parts: list[tuple[int, float, float, range]] = []
    for run, matrix in matrices.items():
        for start in range(len(run) - 1):
            for end in range(start + 2, len(run) + 1):
                within = matrix[start:end, start:end]
                if within.max() <= limit:
                    parts.append((start - end, float(within.max()), float(within.sum()), run[start:end]))
    chosen: list[range] = []
    for *_, part in sorted(parts, key=lambda one: one[:3]):
        if all(part.stop <= other.start or other.stop <= part.start for other in chosen):
            chosen.append(part)
    return sorted(chosen, key=lambda run: run.start)


def fuse(child: Child, runs: Sequence[range] | None = None) -> Child:
    """Fuse runs of layers, in new weights. In `layers` a fused one stands for the last of its run, whose states its own are nearest to.

    Args:
        runs: of layers without attention; None: all of `fusable_runs`.

    Raises:
        InputError: a family that norms what an MLP gives, or a run with attention.
    """
    config = child.model.config
    runs = fusable_runs(config) if runs is None else runs
    if not runs:
        return child
    if config.parts.post_norm:
        raise InputError(f"FFN Fusion does not fit {config.family}: it norms what each MLP gives, and a sum has one norm.")
    blocks = [child.model.get_submodule(f"blocks.{number}") for number in range(config.num_layers)]
    groups: list[Sequence[int]] = []
    for number in range(config.num_layers):
        run = next((run for run in runs if number in run), None)
        if run is None:
            groups.append([number])
        elif number == run[0]:
            groups.append(run)
    made = [config.blocks[group[0]] if len(group) == 1 else _wide(config, group) for group in groups]
    with torch.device("meta"):
        model = Transformer(replace(config, blocks=tuple(made)))
    state = {name: tensor for name, tensor in child.model.state_dict().items() if not name.startswith("blocks.")}
    for number, group in enumerate(groups):
        parts = [block for layer in group if isinstance(block := blocks[layer], Block)]
        own = parts[0].state_dict() if len(group) == 1 else _fused(parts)
        state |= {f"blocks.{number}.{name}": tensor for name, tensor in own.items()}
    model.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
    return Child(model.requires_grad_(), tuple(child.layers[group[-1]] for group in groups))


def _wide(config: ModelConfig, run: Sequence[int]) -> BlockConfig:
    blocks = [config.blocks[number] for number in run]
    if any(block.has_attention for block in blocks):
        raise InputError(f"Layers {run[0]} to {run[-1]} cannot be fused: one of them has attention.")
    return replace(blocks[0], ffn_size=sum(block.ffn_size for block in blocks))


def _fused(blocks: Sequence[Block]) -> dict[str, Tensor]:
    """Parameters of one MLP that is the sum of several: rows of the first matrices and columns of the last end to end."""
    states = [block.state_dict() for block in blocks]
    fused: dict[str, Tensor] = {}
    for name, last in states[-1].items():
        parts = [state[name] for state in states]
        if name.startswith("mlp.gate_up."):  # gates of all, then ups of all
            halves = [part.chunk(2) for part in parts]
            fused[name] = torch.cat([half[side] for side in (0, 1) for half in halves])
        elif name == "mlp.down.weight":
            fused[name] = torch.cat(parts, dim=1)
        elif name == "mlp.down.bias":
            fused[name] = torch.stack(parts).sum(0)
        else:
            fused[name] = last if name.startswith("mlp_norm") else torch.cat(parts)
    return fused
