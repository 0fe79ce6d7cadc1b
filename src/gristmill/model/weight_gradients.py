"""Weight-gradient store: gradients of matrices that wait until a zero-bubble pipeline has time for them.

Inside `deferring` a backward pass gives gradients of states at once, which other stages wait for, and keeps what gradients of matrices are
products of; `take` gives what has come together since, to be computed later. Biases, norms, embeddings, adapters and the output matrix do
not wait. Source: zero-bubble pipeline parallelism (arXiv 2401.10241).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Not by thread: a GPU's backward pass has its own.
_waiting: list[Callable[[], None]] | None = None


@contextmanager
def deferring() -> Iterator[None]:
    """Let gradients of matrices wait."""
    global _waiting
    _waiting = []
    try:
        yield
    finally:
        _waiting = None


def defers(x_TD: Tensor, weight_ND: Tensor) -> bool:
    """Whether the gradient of a matrix waits; where the states need none, nothing else would call for the backward pass."""
    return _waiting is not None and torch.is_grad_enabled() and weight_ND.requires_grad and x_TD.requires_grad


def later(weights: Sequence[Tensor], gradients: Callable[[], Sequence[Tensor]]) -> None:
    """Give these gradients to matrices, or to what they are made of, when they are taken out of the store."""
    assert _waiting is not None
    _waiting.append(lambda: torch.autograd.backward(weights, gradients()))


def later_product(weight_ND: Tensor, grad_TN: Tensor, x_TD: Tensor) -> None:
    """The same of one matrix, where x weight^T had this gradient."""
    x_TD = x_TD.detach()
    later([weight_ND], lambda: [(grad_TN.T @ x_TD).to(weight_ND.dtype)])


def take() -> Callable[[], None]:
    """What computes all that waits now, as the `dw_builder` of torch's pipeline stages."""
    assert _waiting is not None
    taken = _waiting[:]
    _waiting.clear()

    @torch.no_grad()
    def compute() -> None:
        while taken:
            taken.pop(0)()

    return compute


def linear(x_TD: Tensor, weight_ND: Tensor, bias_N: Tensor | None) -> Tensor:
    """x weight^T + bias, of a matrix whose gradient waits."""
    out_TN: Tensor = _Linear.apply(x_TD, weight_ND.detach(), [weight_ND], bias_N)
    return out_TN


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, used_ND: Tensor, weight: list[Tensor], bias_N: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_TD, used_ND)
        (ctx.weight_ND,) = weight
        return F.linear(x_TD, used_ND, bias_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_TN,), (x_TD, used_ND) = grads, ctx.saved_tensors
        later_product(ctx.weight_ND, grad_TN, x_TD)
        return grad_TN @ used_ND, None, None, grad_TN.sum(0) if ctx.needs_input_grad[3] else None
