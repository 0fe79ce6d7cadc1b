"""Operations between matrix products by torch.compile, for devices that have no kernels of ours: each one graph, without a break.

Products stay outside, so that gradients of weights are still added in place, and that sharded and quantized ones need no compiler.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BACKEND = "inductor"
MAX_VARIANTS = 64  # of one operation: types, gradients or none, families; torch gives up after eight
_backend = ""  # of now; "": nothing is compiled
_made: dict[tuple[Callable[..., Any], str], Callable[..., Any]] = {}


@contextmanager
def compiling(active: bool = True) -> Iterator[None]:
    """Compile operations meanwhile, at their first use."""
    global _backend
    before, _backend = _backend, BACKEND if active else ""
    try:
        yield
    finally:
        _backend = before


def call(function: Callable[..., Any], *args: Any) -> Any:
    """What an operation gives, compiled; None while nothing is compiled."""
    if not _backend:
        return None
    if (function, _backend) not in _made:
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_VARIANTS)
        _made[function, _backend] = torch.compile(function, backend=_backend, fullgraph=True)
    return _made[function, _backend](*args)


def norm(x: Tensor, gain_D: Tensor, bias_D: Tensor | None, eps: float) -> Tensor:
    """RMS norm, or with a bias layer norm, in the type of x."""
    if bias_D is None:
        return F.rms_norm(x.float(), gain_D.shape, gain_D, eps).to(x.dtype)
    return F.layer_norm(x.float(), gain_D.shape, gain_D, bias_D, eps).to(x.dtype)


def add_norm(x_TD: Tensor, delta_TD: Tensor, gain_D: Tensor, bias_D: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Residual add and norm."""
    x_TD = x_TD + delta_TD
    return x_TD, norm(x_TD, gain_D, bias_D, eps)


def activation(gate: Tensor, up_TF: Tensor | None, kind: str) -> Tensor:
    """As `fused.activation`."""
    if kind == "squared_relu":
        return F.relu(gate).square()
    if up_TF is None:
        gate, up_TF = gate.chunk(2, dim=-1)
    return (F.silu(gate) if kind == "silu" else F.gelu(gate, approximate="tanh")) * up_TF


def activation_and_gradients(gate: Tensor, up_TF: Tensor | None, grad_TF: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `fused.activation_and_gradients`, of a gated kind."""
    gate_TF, up = gate.chunk(2, dim=-1) if up_TF is None else (gate, up_TF)
    if kind == "silu":
        activated_TF, grad_gate = F.silu(gate_TF), torch.ops.aten.silu_backward(grad_TF * up, gate_TF)
    else:
        activated_TF = F.gelu(gate_TF, approximate="tanh")
        grad_gate = torch.ops.aten.gelu_backward(grad_TF * up, gate_TF, approximate="tanh")
    grad_up = grad_TF * activated_TF
    if up_TF is None:
        return activated_TF * up, torch.cat([grad_gate, grad_up], dim=-1), None
    return activated_TF * up, grad_gate, grad_up
