"""Fused operations between the matrix products of a layer: residual add and norm, gated activations.

Shapes: T tokens, D hidden size, F ffn size.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gristmill.model.kernels import library as kernels


def norm(x: Tensor, gain_D: Tensor, bias_D: Tensor | None, *, eps: float) -> Tensor | None:
    """RMS norm of the last dimension, or with a bias layer norm, in the type of x; None where there is no kernel for x."""
    if kernels.library_for(x) is None:
        return None
    return _AddNorm.apply(x, None, gain_D, bias_D, eps)[1]


def add_norm(x_TD: Tensor, delta_TD: Tensor, gain_D: Tensor, bias_D: Tensor | None, *, eps: float) -> tuple[Tensor, Tensor] | None:
    """Residual add and norm: x + delta, and its norm; None where there is no kernel for x."""
    return None if kernels.library_for(x_TD) is None else _AddNorm.apply(x_TD, delta_TD, gain_D, bias_D, eps)


class _AddNorm(torch.autograd.Function):
    """Keeps the sum and two numbers a row. Without a delta the sum is x itself, so that its two gradients are added here."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor | None, gain_D: Tensor, bias_D: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
        x, size = x.contiguous(), len(gain_D)
        library = kernels.library_for(x)
        assert library is not None
        delta = None if delta is None else delta.contiguous()
        total = x.view_as(x) if delta is None else torch.empty_like(x)
        out, statistics = torch.empty_like(x), torch.empty(x.numel() // size, 2)
        addresses = [kernels.pointer_of(tensor) for tensor in (x, delta, gain_D, bias_D, total, out, statistics)]
        numbers = len(statistics), size, eps, int(bias_D is not None), kernels.TYPES[x.dtype], torch.get_num_threads()
        library.gristmill_norm_forward(*addresses, *numbers)
        ctx.save_for_backward(total, gain_D, statistics)
        ctx.centred, ctx.adds = bias_D is not None, delta is not None
        ctx.set_materialize_grads(False)
        return total, out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_total, grad = grads
        if grad is None:
            return grad_total, grad_total if ctx.adds else None, None, None, None
        total, gain_D, statistics = ctx.saved_tensors
        library = kernels.library_for(total)
        assert library is not None
        grad, grad_total = grad.contiguous(), None if grad_total is None else grad_total.contiguous()
        grad_x = torch.empty_like(total)
        grad_gain_D = torch.empty_like(gain_D) if ctx.needs_input_grad[2] else None
        grad_bias_D = torch.empty_like(gain_D) if ctx.centred and ctx.needs_input_grad[3] else None
        tensors = grad, grad_total, total, gain_D, statistics, grad_x, grad_gain_D, grad_bias_D
        numbers = len(statistics), len(gain_D), int(ctx.centred), kernels.TYPES[total.dtype], torch.get_num_threads()
        library.gristmill_norm_backward(*(kernels.pointer_of(tensor) for tensor in tensors), *numbers)
        return grad_x, grad_x if ctx.adds else None, grad_gain_D, grad_bias_D, None


def activation(gate: Tensor, up_TF: Tensor | None, kind: str) -> Tensor | None:
    """f(gate) * up, or f(gate) where there is no up; None where there is no kernel for them.

    Args:
        gate: [T, F]; or [T, 2 F] with up behind the gate, of a gated kind.
        kind: of kernels.ACTIVATIONS; squared ReLU has no up.
    """
    return None if kernels.library_for(gate) is None else _Activation.apply(gate, up_TF, kind)


class _Activation(torch.autograd.Function):
    """Keeps its inputs alone."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up_TF: Tensor | None, kind: str) -> Tensor:
        gate, up_TF = gate.contiguous(), None if up_TF is None else up_TF.contiguous()
        ctx.save_for_backward(gate, up_TF)
        ctx.kind, ctx.fused = kind, up_TF is None and kind != "squared_relu"
        out_TF = gate.new_empty(gate.shape[0], gate.shape[1] // (2 if ctx.fused else 1))
        _activate(gate, up_TF, out_TF, None, None, None, ctx)
        return out_TF

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate, up_TF = ctx.saved_tensors
        grad_gate, grad_up_TF = torch.empty_like(gate), None if up_TF is None else torch.empty_like(up_TF)
        _activate(gate, up_TF, None, grads[0].contiguous(), grad_gate, grad_up_TF, ctx)
        return grad_gate, grad_up_TF, None


def _activate(
    gate: Tensor,
    up_TF: Tensor | None,
    out_TF: Tensor | None,
    grad_TF: Tensor | None,
    grad_gate: Tensor | None,
    grad_up: Tensor | None,
    ctx: Any,
) -> None:
    library, size = kernels.library_for(gate), gate.shape[1] // (2 if ctx.fused else 1)
    assert library is not None
    if ctx.fused:
        up_TF, grad_up = gate[:, size:], None if grad_gate is None else grad_gate[:, size:]
    addresses = [kernels.pointer_of(x) for x in (gate, up_TF, out_TF, grad_TF, grad_gate, grad_up)]
    numbers = gate.shape[0], size, gate.shape[1], kernels.ACTIVATIONS[ctx.kind], kernels.TYPES[gate.dtype], torch.get_num_threads()
    library.gristmill_activate(*addresses, *numbers)
