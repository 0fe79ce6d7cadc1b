"""Products in 8 bits (FP8) of training, with dynamic scales: those of the layers, but their weights' gradients, which stay in bf16.

Rowwise: a scale for each row of the left and each column of the right operand, all in e4m3. Tensorwise: one for each operand, and e5m2 for
gradients of outputs, which are wider. On a CPU torch computes the same products slowly, so that they can be tested there.

Shapes: T tokens, D inputs of a matrix, N its outputs. Source: FP8 formats for deep learning (arXiv 2209.05433).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gristmill.core.errors import InputError
from gristmill.model import weight_gradients
from gristmill.model.layers import Linear
from gristmill.model.transformer import Transformer

RECIPES = {"fp8": "rowwise", "fp8_tensorwise": "tensorwise"}  # by their names among precisions
MIN_AMAX = 1e-12  # a row of zeros has a scale too
MULTIPLE = 16  # of the sides of a product's operands
MIN_CAPABILITY = (8, 9)  # of a GPU with such products: Ada, Hopper and later


def check_float8(device: torch.device, precision: str) -> None:
    """Raise InputError where a device has no products in 8 bits."""
    if precision in RECIPES and device.type == "cuda" and torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        raise InputError(f"Choose precision bf16: {torch.cuda.get_device_name(device)} has no products in FP8.")
    if precision in RECIPES and device.type not in ("cpu", "cuda"):
        raise InputError(f"Choose precision bf16: {device.type} has no products in FP8.")


def float8_linears(decoder: Transformer) -> list[Linear]:
    """The layers' matrices that multiply in 8 bits: not those of the first and the last layer, whose errors weigh most.

    Raises:
        InputError: there are none: a model of two layers, or sides that 16 does not divide.
    """
    inner = [block for name, block in decoder.blocks.items() if 0 < int(name) < decoder.config.num_layers - 1]
    found = [module for block in inner for module in block.modules() if isinstance(module, Linear) and _divides(module)]
    if not found and len(decoder.blocks) == decoder.config.num_layers:  # a pipeline's stage may have none
        raise InputError(
            f"Choose precision bf16: FP8 is for matrices between the first and the last layer without an adapter, whose sides {MULTIPLE} "
            "divides (with --tp those of their parts), and there are none."
        )
    return found


@contextmanager
def computing_in_float8(decoders: Sequence[Transformer], precision: str) -> Iterator[None]:
    """Let the layers' matrices multiply in 8 bits meanwhile, if the precision says so."""
    found = [linear for decoder in decoders for linear in float8_linears(decoder)] if precision in RECIPES else []
    for linear in found:
        linear.product = Float8Product(rowwise=RECIPES[precision] == "rowwise")
    try:
        yield
    finally:
        for linear in found:
            linear.product = None


def _divides(linear: Linear) -> bool:
    return linear.takes_product and all(side % MULTIPLE == 0 for side in linear.sides())


class Float8Product:
    """x weight^T in 8 bits, where the computation is in bf16. Of a matrix in parts each has scales of its own."""

    def __init__(self, *, rowwise: bool) -> None:
        self.rowwise = rowwise

    def __call__(self, x_TD: Tensor, weight_ND: Tensor, bias_N: Tensor | None) -> Tensor:
        waits = weight_gradients.defers(x_TD, weight_ND)
        out_TN: Tensor = _Product.apply(x_TD, weight_ND.detach() if waits else weight_ND, self, [weight_ND] if waits else [])
        return out_TN if bias_N is None else out_TN + bias_N.to(out_TN.dtype)

    def outputs(self, x_TD: Tensor, weight_ND: Tensor) -> Tensor:
        """x weight^T."""
        return scaled_product(x_TD, weight_ND.T, rowwise=self.rowwise)

    def input_gradient(self, grad_TN: Tensor, weight_ND: Tensor) -> Tensor:
        """Gradient of x from that of the outputs."""
        left = torch.float8_e4m3fn if self.rowwise else torch.float8_e5m2
        return scaled_product(grad_TN, weight_ND, rowwise=self.rowwise, left=left)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_ND: Tensor, product: Float8Product, waiting: list[Tensor]) -> Tensor:
        ctx.save_for_backward(x_TD, weight_ND)
        ctx.product, ctx.waiting = product, waiting
        return product.outputs(x_TD, weight_ND)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_TN,), (x_TD, weight_ND) = grads, ctx.saved_tensors
        for waiting_ND in ctx.waiting:
            weight_gradients.later_product(waiting_ND, grad_TN, x_TD)
        grad_ND = (grad_TN.T @ x_TD).to(weight_ND.dtype) if ctx.needs_input_grad[1] else None
        return ctx.product.input_gradient(grad_TN, weight_ND), grad_ND, None, None


def scaled_product(left_MK: Tensor, right_KN: Tensor, *, rowwise: bool, left: torch.dtype = torch.float8_e4m3fn) -> Tensor:
    """Product of two matrices in 8 bits with a sum in fp32, in the type of the left one.

    Args:
        left: type of the left operand in 8 bits.
    """
    eight_MK, scale_M1 = quantize_float8(left_MK, 1 if rowwise else None, left)
    eight_KN, scale_1N = quantize_float8(right_KN, 0 if rowwise else None, torch.float8_e4m3fn)
    by_columns_KN = eight_KN.T.contiguous().T  # the order that the kernels read
    out_MN: Tensor = torch._scaled_mm(eight_MK.contiguous(), by_columns_KN, scale_a=scale_M1, scale_b=scale_1N, out_dtype=torch.bfloat16)
    return out_MN.to(left_MK.dtype)


def quantize_float8(x: Tensor, dim: int | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Values in 8 bits and the scale that multiplies them: one for each row (`dim` 1), for each column (0), or for all."""
    x = x.float()
    amax = x.abs().amax() if dim is None else x.abs().amax(dim, keepdim=True)
    scale = amax.clamp(min=MIN_AMAX) / torch.finfo(dtype).max
    return (x / scale).to(dtype), scale
