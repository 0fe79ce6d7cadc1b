"""Muon of matrices that are cut over processes: each is orthogonalised by one of them, its owner.

Momentum lies where the parts of a matrix do. In a step all updates go to their owners in one exchange, in bf16, in which Newton-Schulz
computes, and come back in another one; so every matrix gets the bits that one process gives it. Sources: Muon (Jordan and others, 2024),
its distributed form (arXiv 2502.16982, section 2.3).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import _muon

from gristmill.core.threads import evenly
from gristmill.parallel.mesh import Group, local, place_of


class ShardedMuon(torch.optim.Muon):
    """`torch.optim.Muon` with the same state, for matrices that a group of processes have parts of, or all of.

    Args:
        group: all that have a part of any of the matrices.
    """

    def __init__(self, matrices: Sequence[nn.Parameter], *, group: Group, lr: float, weight_decay: float) -> None:
        super().__init__(matrices, lr=lr, weight_decay=weight_decay)
        self._owners = Owners(matrices, group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step (collective)."""
        (group,) = self.param_groups
        momentum, parameters = group["momentum"], group["params"]
        updates = []
        for parameter in parameters:
            grad, buffer = local(parameter.grad), local(self.state[parameter]["momentum_buffer"])
            buffer.lerp_(grad, 1 - momentum)
            updates.append((grad.lerp(buffer, momentum) if group["nesterov"] else buffer).bfloat16())
        coefficients = group["ns_coefficients"], group["ns_steps"], group["eps"]
        whole = {number: _muon._zeropower_via_newtonschulz(x, *coefficients) for number, x in self._owners.gathered(updates).items()}
        for parameter, update in zip(parameters, self._owners.scattered(whole), strict=True):
            lr = _muon._adjust_lr(group["lr"], group["adjust_lr_fn"], parameter.shape)
            local(parameter).mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-lr)


class Owners:
    """Who of a group has which matrix whole for a while: about as much work for each, and the same plan on all.

    Args:
        matrices: cut over processes, in the same order on all.
    """

    def __init__(self, matrices: Sequence[Tensor], group: Group) -> None:
        self._group, self._shapes = group, [cast("tuple[int, int]", tuple(matrix.shape)) for matrix in matrices]
        self._places = [[tuple(map(tuple, place)) for place in places] for places in group.gather([place_of(m) for m in matrices])]
        work = [min(shape) * min(shape) * max(shape) for shape in self._shapes]
        self._owner = [0] * len(work)
        for rank, numbers in enumerate(evenly(range(len(work)), group.size, size=work.__getitem__)):
            for number in numbers:
                self._owner[number] = rank

    def gathered(self, parts: Sequence[Tensor]) -> dict[int, Tensor]:
        """Of what all have of each matrix, the whole of those that are owned here, by their numbers (collective)."""
        rank, peers = self._group.rank, range(self._group.size)
        whole = {n: parts[n].new_empty(shape) for n, shape in enumerate(self._shapes) if self._owner[n] == rank}
        sent = [[part for n, part in enumerate(parts) if self._owner[n] == peer and self._gives(n, rank)] for peer in peers]
        into = [[_part(whole[n], self._places[peer][n]) for n in whole if self._gives(n, peer)] for peer in peers]
        self._group.all_to_all(sent, into, parts[0].dtype)
        return whole

    def scattered(self, whole: Mapping[int, Tensor]) -> list[Tensor]:
        """Of matrices that are owned here and elsewhere, the own parts of all (collective)."""
        mine, peers = self._places[self._group.rank], range(self._group.size)
        dtype, device = torch.bfloat16, self._group.device
        parts = [torch.empty([end - begin for begin, end in place], dtype=dtype, device=device) for place in mine]
        sent = [[_part(whole[n], self._places[peer][n]) for n in whole] for peer in peers]
        into = [[part for n, part in enumerate(parts) if self._owner[n] == peer] for peer in peers]
        self._group.all_to_all(sent, into, dtype)
        return parts

    def _gives(self, number: int, peer: int) -> bool:
        """Whether a process is the first of those that have its part of a matrix."""
        return [places[number] for places in self._places].index(self._places[peer][number]) == peer


def _part(matrix: Tensor, place: Any) -> Tensor:
    (top, bottom), (left, right) = place
    return matrix[top:bottom, left:right]
