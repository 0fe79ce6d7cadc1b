"""Optimisers and schedules: AdamW, and Muon for hidden matrices with AdamW for everything else."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gristmill.core.device import zeros_outside_heap
from gristmill.core.errors import InputError
from gristmill.core.threads import Map, alone, evenly
from gristmill.model.kernels import library as kernels
from gristmill.parallel.mesh import Mesh, is_sharded, part_of
from gristmill.train.muon import ShardedMuon

OPTIMIZERS = ("adamw", "muon")
EPS = 1e-8  # of AdamW
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


class AdamW:
    """`torch.optim.AdamW` with its fused kernel, groups and state: to make one of those imports torch's compiler, for a second."""

    def __init__(self, groups: Sequence[dict[str, Any]], *, lr: float, betas: tuple[float, float]) -> None:
        self.param_groups = [{"lr": lr, "betas": betas, **group} for group in groups]
        self.state: defaultdict[nn.Parameter, dict[str, Tensor]] = defaultdict(dict)

    @torch.no_grad()
    def step(self, parameters: Sequence[nn.Parameter], clip: float = 1.0, copies: Mapping[Tensor, Tensor] | None = None) -> None:
        """One step of some parameters, whose states have been made.

        Args:
            clip: factor of their gradients.
            copies: of some in bf16, to be made up to date. With our kernel all this is one pass over memory.
        """
        mine = set(parameters)
        for group in self.param_groups:
            due = [parameter for parameter in group["params"] if parameter in mine and parameter.grad is not None]
            if not due:
                continue
            means, squares, steps = ([self.state[parameter][key] for parameter in due] for key in ("exp_avg", "exp_avg_sq", "step"))
            torch._foreach_add_(steps, 1)
            if all(map(has_kernel, due)):
                _step_compiled(group, clip, due, means, squares, steps, copies or {})
                continue
            if clip != 1:
                torch._foreach_mul_([parameter.grad for parameter in due], clip)
            beta1, beta2 = group["betas"]
            torch._fused_adamw_(
                due,
                [parameter.grad for parameter in due],
                means,
                squares,
                [],
                steps,
                lr=group["lr"],
                beta1=beta1,
                beta2=beta2,
                weight_decay=group["weight_decay"],
                eps=EPS,
                amsgrad=False,
                maximize=False,
            )
            for parameter in due:
                if copies is not None and parameter in copies:
                    copies[parameter].copy_(parameter.detach())


def _step_compiled(
    group: Mapping[str, Any],
    clip: float,
    parameters: Sequence[nn.Parameter],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    steps: Sequence[Tensor],
    copies: Mapping[Tensor, Tensor],
) -> None:
    library, (beta1, beta2) = kernels.load(), group["betas"]
    assert library is not None
    grads = [gradient_values(parameter).contiguous() for parameter in parameters]
    numbers = torch.stack(list(steps)).tolist()
    parts = [
        kernels.AdamWPart(
            *map(kernels.pointer_of, (parameter, grad, mean, square, copies.get(parameter))),
            parameter.numel(),
            1 - beta1**number,
            1 - beta2**number,
            *_rows_of(parameter),
        )
        for parameter, grad, mean, square, number in zip(parameters, grads, means, squares, numbers, strict=True)
    ]
    settings = kernels.AdamW(group["lr"], 1 - beta1, beta2, 1 - beta2, EPS, group["weight_decay"], clip)
    library.gristmill_adamw(settings, (kernels.AdamWPart * len(parts))(*parts), len(parts), torch.get_num_threads())
    torch.autograd.graph.increment_version(parameters)  # as torch's own operations do


def gradient_values(parameter: nn.Parameter) -> Tensor:
    """The numbers of a gradient, of a sparse one those of its rows."""
    assert parameter.grad is not None
    return parameter.grad.values() if parameter.grad.is_sparse else parameter.grad


def _rows_of(parameter: nn.Parameter) -> tuple[int | None, int, int]:
    """Address and number of the rows of a sparse gradient, and their width."""
    grad = parameter.grad
    if grad is None or not grad.is_sparse:
        return None, 0, 0
    rows = grad.indices()[0]
    assert len(rows), "null would stand for all rows"
    return rows.data_ptr(), len(rows), parameter.shape[1]


def has_kernel(parameter: nn.Parameter) -> bool:
    """Whether our kernel, which takes sparse gradients too, makes the step of a parameter."""
    plain = parameter.device.type == "cpu" and not is_sharded(parameter) and parameter.dtype == torch.float32 and kernels.load() is not None
    return plain and parameter.is_contiguous()


class Optimizer:
    """One or two optimisers behind one face, with a state that is a flat dictionary of tensors.

    Norms, biases and all other one-dimensional parameters are never decayed.

    Args:
        mesh: the processes that have parts of the model.
        num_workers: threads that share out a step.

    Attributes:
        shares: the parameters of each worker, as many numbers in all of them.
    """

    def __init__(self, model: nn.Module, settings: OptimSettings, mesh: Mesh | None = None, num_workers: int = 1) -> None:
        if settings.optimizer not in OPTIMIZERS:
            raise InputError(f"unknown optimizer {settings.optimizer!r}; choose one of {', '.join(OPTIMIZERS)}")
        if settings.lr < 0 or not all(0 <= beta < 1 for beta in settings.betas) or settings.weight_decay < 0:
            given = f"{settings.lr}, {settings.weight_decay}, {settings.betas[0]} and {settings.betas[1]}"
            raise InputError(f"Give AdamW a rate and a weight decay of at least 0 and betas below 1: they are {given}.")
        self._names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
        if not self._names:
            raise InputError("The model has no parameter that is trained.")
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
        self.shares = evenly(self.parameters, num_workers, size=Tensor.numel)
        self._adamw = AdamW(groups, lr=settings.lr, betas=settings.betas)
        self._muon: torch.optim.Optimizer | None = None
        if muon:
            make: Callable[..., torch.optim.Muon] = torch.optim.Muon
            alike = mesh is not None and mesh.size > 1 and mesh.dims.together == 1  # all have all matrices, or parts of all
            if mesh is not None and (alike or any(is_sharded(matrix) for matrix in muon)):
                make = partial(ShardedMuon, group=mesh.layer_group())
            self._muon = make(muon, lr=settings.muon_lr, weight_decay=settings.weight_decay)
        self._base_lrs = [settings.lr, settings.muon_lr]

    @property
    def _parts(self) -> list[AdamW | torch.optim.Optimizer]:
        return [self._adamw] if self._muon is None else [self._adamw, self._muon]

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self._names)

    def set_scale(self, scale: float) -> None:
        """Set every learning rate to ``scale`` times its configured value."""
        for part, lr in zip(self._parts, self._base_lrs, strict=False):
            for group in part.param_groups:
                group["lr"] = lr * scale * group.get("lr_ratio", 1.0)

    def step(
        self,
        each: Map = alone,
        *,
        max_norm: float = math.inf,
        norm: float = 0.0,
        copies: Mapping[Tensor, Tensor] | None = None,
    ) -> None:
        """Clip gradients of norm `norm` to `max_norm`, and make one step, by the workers of a map; `copies` as of AdamW's step."""
        self._make_states([(part, p) for _, part, p in self._states() if p.grad is not None and not part.state[p]])

        clip = min(1.0, max_norm / (norm + 1e-6))
        each(lambda share: self._adamw.step(share, clip, copies), self.shares)
        if self._muon is not None:
            matrices = [parameter for parameter in self._muon.param_groups[0]["params"] if parameter.grad is not None]
            if clip != 1:
                torch._foreach_mul_([parameter.grad for parameter in matrices], clip)
            self._muon.step()
            for parameter in matrices:
                if copies is not None and parameter in copies:
                    copies[parameter].copy_(parameter.detach())

    def _make_states(self, new: Sequence[tuple[AdamW | torch.optim.Optimizer, nn.Parameter]]) -> None:
        """States as torch's optimizers begin with, which would lie in the heap between activations."""
        names = [("momentum_buffer",) if isinstance(part, torch.optim.Muon) else ("exp_avg", "exp_avg_sq") for part, _ in new]
        owners = [parameter for (_, parameter), keys in zip(new, names, strict=True) for _ in keys]
        cut = any(is_sharded(parameter) for parameter in owners)  # then each process has its parts alone
        zeros = iter([torch.zeros_like(parameter) for parameter in owners] if cut else zeros_outside_heap(owners))
        for (part, parameter), keys in zip(new, names, strict=True):
            step = {} if "momentum_buffer" in keys else {"step": torch.zeros((), device=parameter.device)}
            part.state[parameter] = step | {key: next(zeros) for key in keys}

    def zero_grad(self) -> None:
        for parameter in self._names:
            parameter.grad = None

    def release(self) -> None:
        """Free gradients and states, which nothing needs when training has ended."""
        self.zero_grad()
        for part in self._parts:
            part.state.clear()

    def _states(self) -> Iterator[tuple[str, AdamW | torch.optim.Optimizer, nn.Parameter]]:
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
