"""Layers of a block: linear layers, norms, activations and MLPs. Shapes as in transformer.py."""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gristmill.model import fused, weight_gradients
from gristmill.model.config import BlockConfig, Family, ModelConfig

GiveProduct = Callable[[Tensor, Tensor], None]  # gradient of the outputs, and inputs


class Product(Protocol):
    """Products of a matrix in place of torch's: x weight^T + bias for autograd; without it x weight^T, and the gradient of x."""

    def __call__(self, x_TD: Tensor, weight_ND: Tensor, bias_N: Tensor | None) -> Tensor: ...

    def outputs(self, x_TD: Tensor, weight_ND: Tensor) -> Tensor: ...

    def input_gradient(self, grad_TN: Tensor, weight_ND: Tensor) -> Tensor: ...


class Linear(nn.Linear):
    """A linear layer whose weight follows the type of its input. Values are set by `init_weights`."""

    product: Product | None = None  # in place of torch's (`model.fp8`)
    takes_product = True

    def sides(self) -> tuple[int, int]:
        """Outputs and inputs of the matrix that is multiplied here."""
        return self.out_features, self.in_features

    def reset_parameters(self) -> None:
        pass

    def forward(self, input: Tensor) -> Tensor:
        if self.product is not None and input.dtype == torch.bfloat16:
            return self.product(input, self.weight.to(input.dtype), self.bias)
        if fused.accumulates(self.weight):
            return fused.linear(input, self.weight, self.bias)
        bias, weight = None if self.bias is None else self.bias.to(input.dtype), self.weight.to(input.dtype)
        return (weight_gradients.linear if weight_gradients.defers(input, weight) else F.linear)(input, weight, bias)

    def beside(self, input: Tensor, other: "Linear") -> tuple[Tensor, Tensor]:
        """Outputs of this layer and of another one with the same input."""
        return self(input), other(input)


def _as_it_is(parameter: Tensor) -> Tensor:
    return parameter


class LayerNorm1P(nn.Module):
    """y = (x - mean) / sqrt(var + eps) * (1 + weight) + bias: the gain is stored around zero."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.local: Callable[[Tensor], Tensor] = _as_it_is  # what this process has of a parameter
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size))

    def gain(self) -> Tensor:
        """Effective gain, fp32."""
        return self.local(self.weight).float() + 1.0

    def shift(self) -> Tensor:
        """Bias, fp32."""
        return self.local(self.bias).float()

    def forward(self, x_TD: Tensor) -> Tensor:
        gain_D, bias_D = self.gain(), self.shift()
        if (normed_TD := fused.norm(x_TD, gain_D, bias_D, eps=self.eps)) is not None:
            return normed_TD
        if x_TD.dtype != torch.float32 and torch.is_grad_enabled():
            return _LayerNorm.apply(x_TD, gain_D, bias_D, self.eps)
        return F.layer_norm(x_TD.float(), gain_D.shape, gain_D, bias_D, self.eps).to(x_TD.dtype)


class _LayerNorm(torch.autograd.Function):
    """Layer norm in fp32 that keeps its input as it came, where autograd would keep a copy in fp32."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, gain_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
        out_TD, *statistics = torch.native_layer_norm(x_TD.float(), gain_D.shape, gain_D, bias_D, eps)
        ctx.save_for_backward(x_TD, *statistics, gain_D, bias_D)
        return out_TD.to(x_TD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, mean_T, scale_T, gain_D, bias_D = ctx.saved_tensors
        backward = torch.ops.aten.native_layer_norm_backward
        due = [True, ctx.needs_input_grad[1], ctx.needs_input_grad[2]]
        x_grad_TD, *rest = backward(grads[0].float(), x_TD.float(), gain_D.shape, mean_T, scale_T, gain_D, bias_D, due)
        return x_grad_TD.to(x_TD.dtype), *rest, None


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * gain, over the last dimension; the gain is weight, or 1 + weight where it is stored around zero."""

    def __init__(self, size: int, eps: float, zero_centred: bool = False) -> None:
        super().__init__()
        self.eps, self.zero_centred = eps, zero_centred
        self.local: Callable[[Tensor], Tensor] = _as_it_is  # what this process has of a parameter
        self.weight = nn.Parameter(torch.empty(size))

    def gain(self) -> Tensor:
        """Effective gain, fp32."""
        weight = self.local(self.weight).float()
        return weight + 1.0 if self.zero_centred else weight

    def forward(self, x: Tensor) -> Tensor:
        if (normed := fused.norm(x, self.gain(), None, eps=self.eps)) is not None:
            return normed
        return F.rms_norm(x.float(), self.weight.shape, self.gain(), self.eps).to(x.dtype)


def add_norm(x_TD: Tensor, delta_TD: Tensor, norm: nn.Module | None) -> tuple[Tensor, Tensor]:
    """Residual x + delta, and its norm; twice the residual where a family has no norm there."""
    if isinstance(norm, LayerNorm1P | RMSNorm):
        bias_D = norm.shift() if isinstance(norm, LayerNorm1P) else None
        if (both := fused.add_norm(x_TD, delta_TD, norm.gain(), bias_D, eps=norm.eps)) is not None:
            return both
    x_TD = x_TD + delta_TD
    return x_TD, x_TD if norm is None else norm(x_TD)


def make_norm(config: ModelConfig, size: int = 0) -> nn.Module:
    """The family's norm of the hidden states, or of `size` numbers of a head."""
    if config.parts.norm == "layernorm1p" and not size:
        return LayerNorm1P(config.hidden_size, config.norm_eps)
    return RMSNorm(size or config.hidden_size, config.norm_eps, zero_centred=config.parts.norm == "rms1p")


class _SquaredReLU(torch.autograd.Function):
    """relu(x)^2 with gradient 2 relu(x). Keeps relu(x) alone, in place of x where that may be overwritten; autograd would keep both."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, in_place: bool) -> Tensor:
        kept = F.relu_(x) if in_place else F.relu(x)
        ctx.save_for_backward(kept)
        return kept.square()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (kept,) = ctx.saved_tensors
        return torch.addcmul(kept.new_zeros(()), kept, grads[0], value=2), None


def _activation_kind(parts: Family) -> str:
    """Its name among the kernels."""
    return "squared_relu" if not parts.gated else "silu" if parts.activation == "silu" else "gelu"


def gate_activation(gate_TF: Tensor, parts: Family) -> Tensor:
    """SiLU, or GELU in its tanh form, of a gate."""
    return F.silu(gate_TF) if parts.activation == "silu" else F.gelu(gate_TF, approximate="tanh")


def activated(gate: Tensor, up_TF: Tensor | None, parts: Family, *, in_place: bool = True) -> Tensor:
    """What an MLP's last matrix multiplies: relu(gate)^2, or f(gate) * up, where without an up it lies behind the gate.

    Args:
        in_place: the gate of a squared ReLU may be overwritten.
    """
    if (inner_TF := fused.activation(gate, up_TF, _activation_kind(parts))) is not None:
        return inner_TF
    if not parts.gated:
        return _SquaredReLU.apply(gate, in_place)
    if up_TF is None:
        gate, up_TF = gate.chunk(2, dim=-1)
    return gate_activation(gate, parts) * up_TF


class _GatedDown(torch.autograd.Function):
    """(f(gate) * up) @ down.T that keeps gate and up and makes the product again; autograd would keep f(gate) and the product too.

    `give` takes what the weight's gradient is a product of, which autograd then does not get.
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up_TF: Tensor | None, used_DF: Tensor, parts: Family, give: GiveProduct | None) -> Tensor:
        ctx.save_for_backward(gate, up_TF, used_DF)
        ctx.parts, ctx.give = parts, give
        return F.linear(activated(gate, up_TF, parts), used_DF)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate, up_TF, used_DF = ctx.saved_tensors
        grad_inner_TF = grads[0] @ used_DF
        inner_TF, grad_gate, grad_up_TF = fused.activation_and_gradients(gate, up_TF, grad_inner_TF, _activation_kind(ctx.parts))
        grad_DF = None
        if ctx.give is not None:
            ctx.give(grads[0], inner_TF)
        elif ctx.needs_input_grad[2]:
            grad_DF = grads[0].T @ inner_TF
        return grad_gate, grad_up_TF, grad_DF, None, None


class MLP(nn.Module):
    """down(relu(up x)^2), or down(f(gate x) * up x) in the gated families. Rows of `gate_up`: the gate's, then those of up."""

    def __init__(self, config: ModelConfig, block: BlockConfig) -> None:
        super().__init__()
        hidden, ffn, parts, bias = config.hidden_size, block.ffn_size, config.parts, config.mlp_bias
        self.parts = parts
        self.activation_kind = _activation_kind(parts)
        self.in_place = True  # not where the products of up are made by a function that gives them to others too
        self.gate_up = Linear(hidden, 2 * ffn, bias=bias) if parts.fused else None
        self.gate = Linear(hidden, ffn, bias=bias) if parts.gated and not parts.fused else None
        self.up = None if parts.fused else Linear(hidden, ffn, bias=bias)
        self.down = Linear(ffn, hidden, bias=bias)

    def forward(self, x_TD: Tensor) -> Tensor:
        if self.gate_up is not None:
            gate, up_TF = self.gate_up(x_TD), None
        else:
            assert self.up is not None
            gate, up_TF = (self.up(x_TD), None) if self.gate is None else self.gate.beside(x_TD, self.up)
        plain = type(self.down) is Linear and self.down.bias is None and self.down.product is None
        if self.parts.gated and plain and torch.is_grad_enabled():
            return _GatedDown.apply(gate, up_TF, *self._down(gate))
        return self.down(activated(gate, up_TF, self.parts, in_place=self.in_place))

    def _down(self, gate: Tensor) -> tuple[Tensor, Family, GiveProduct | None]:
        """The last matrix as it is multiplied by, and where what its gradient is a product of goes."""
        weight = self.down.weight
        if gate.requires_grad and fused.accumulates(weight):
            return fused.working_copy(weight, gate.dtype), self.parts, partial(fused.add_gradient, weight)
        used = weight.to(gate.dtype)
        if weight_gradients.defers(gate, used):
            return used.detach(), self.parts, partial(weight_gradients.later_product, used)
        return used, self.parts, None
