"""Optimisers and schedules: AdamW, and Muon for hidden matrices with AdamW for everything else."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from gristmill.core.device import zeros_outside_heap
from gristmill.core.errors import InputError
from gristmill.parallel.mesh import Mesh, is_sharded, part_of
from gristmill.train.muon import ShardedMuon

OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("constant", "cosine", "linear")


@dataclass(frozen=True)
class OptimSettings:
    """What an optimiser needs: ``lr`` is AdamW's rate, ``muon_lr`` that of Muon's matrices, ``b_lr_ratio`` LoRA+'s factor for B."""

    optimizer: str = "adamw"
    lr: float = 1e-3
    muon_lr: float = 0.02
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    b_lr_ratio: float = 1.0


def schedule_scale(schedule: str, step: int, total_steps: int, *, warmup_steps: int, min_lr_ratio: float) -> float:
    """The factor on every learning rate at ``step`` (counted from 0).

    Linear warmup, then constant, or cosine or linear decay that reaches ``min_lr_ratio`` on the last step.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    progress = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
    decay = 0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else 1 - progress
    return min_lr_ratio + (1 - min_lr_ratio) * decay


def _is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """A matrix between hidden states. Embeddings and output heads live outside the blocks."""
    return parameter.ndim == 2 and ".blocks." in f".{name}"


class Optimizer:
    """One or two torch optimisers behind one face, with a state that is a flat dictionary of tensors.

    Norms, biases and all other one-dimensional parameters are never decayed.

    Args:
        mesh: the processes that have parts of the model.
    """

    def __init__(self, model: nn.Module, settings: OptimSettings, mesh: Mesh | None = None) -> None:
        if settings.optimizer not in OPTIMIZERS:
            raise InputError(f"unknown optimizer {settings.optimizer!r}; choose one of {', '.join(OPTIMIZERS)}")
        self._names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
        muon, decayed, plain, b_matrices = [], [], [], []
        for parameter, name in self._names.items():
            if settings.optimizer == "muon" and _is_hidden_matrix(name, parameter):
                muon.append(parameter)
            elif settings.b_lr_ratio != 1.0 and name.endswith(".lora_B"):
                b_matrices.append(parameter)
            elif parameter.ndim >= 2:
                decayed.append(parameter)
            else:
                plain.append(parameter)
        groups = [
            {"params": decayed, "weight_decay": settings.weight_decay},
            {"params": plain, "weight_decay": 0.0},
            {"params": b_matrices, "weight_decay": settings.weight_decay, "lr_ratio": settings.b_lr_ratio},
        ]
        self._parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(
                [group for group in groups if group["params"]],
                lr=settings.lr,
                betas=settings.betas,
                fused=True,
            )
        ]
        if muon:
            make: Callable[..., torch.optim.Muon] = torch.optim.Muon
            alike = mesh is not None and mesh.size > 1 and mesh.dims.together == 1  # all have all matrices, or parts of all
            if mesh is not None and (alike or any(is_sharded(matrix) for matrix in muon)):
                make = partial(ShardedMuon, group=mesh.layer_group())
            self._parts.append(make(muon, lr=settings.muon_lr, weight_decay=settings.weight_decay))
        self._base_lrs = [settings.lr, settings.muon_lr]

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self._names)

    def set_scale(self, scale: float) -> None:
        """Set every learning rate to ``scale`` times its configured value."""
        for part, lr in zip(self._parts, self._base_lrs, strict=False):
            for group in part.param_groups:
                group["lr"] = lr * scale * group.get("lr_ratio", 1.0)

    def step(self) -> None:
        self._make_states([(part, p) for _, part, p in self._states() if p.grad is not None and not part.state[p]])
        for part in self._parts:
            part.step()

    def _make_states(self, new: Sequence[tuple[torch.optim.Optimizer, nn.Parameter]]) -> None:
        """States as torch's optimizers begin with, which would lie in the heap between activations."""
        names = [("momentum_buffer",) if isinstance(part, torch.optim.Muon) else ("exp_avg", "exp_avg_sq") for part, _ in new]
        owners = [parameter for (_, parameter), keys in zip(new, names, strict=True) for _ in keys]
        cut = any(is_sharded(parameter) for parameter in owners)  # then each process has its parts alone
        zeros = iter([torch.zeros_like(parameter) for parameter in owners] if cut else zeros_outside_heap(owners))
        for (part, parameter), keys in zip(new, names, strict=True):
            step = {} if "momentum_buffer" in keys else {"step": torch.zeros((), device=parameter.device)}
            part.state[parameter] = step | {key: next(zeros) for key in keys}

    def zero_grad(self) -> None:
        for part in self._parts:
            part.zero_grad(set_to_none=True)

    def release(self) -> None:
        """Free gradients and states, which nothing needs when training has ended."""
        self.zero_grad()
        for part in self._parts:
            part.state.clear()

    def _states(self) -> Iterator[tuple[str, torch.optim.Optimizer, nn.Parameter]]:
        for part in self._parts:
            for group in part.param_groups:
                for parameter in group["params"]:
                    yield self._names[parameter], part, parameter

    def state_tensors(self) -> dict[str, Tensor]:
        """The whole state as ``{"PARAMETER|KEY": tensor}``."""
        return {f"{name}|{key}": value for name, part, parameter in self._states() for key, value in part.state[parameter].items()}

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Copy what ``state_tensors`` gave out of the dictionary, which is emptied: there is no room for all of it twice."""
        saved = {key.rpartition("|")[0] for key in tensors}
        found = [(name, part, parameter) for name, part, parameter in self._states() if name in saved]
        self._make_states([(part, parameter) for _, part, parameter in found])
        for name, part, parameter in found:
            for key, value in part.state[parameter].items():
                value.copy_(part_of(tensors.pop(f"{name}|{key}"), value))
