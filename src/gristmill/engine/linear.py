"""Linear methods: unquantized, W8A8 int8, int8 weights alone, and fp8. Weights have a scale a row, quantized activations a scale a token.

Shapes: T tokens, D inputs, N outputs of a product.
"""

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from gristmill.core.errors import InputError
from gristmill.engine.kernels import library as kernels
from gristmill.model.quantized import scaled
from gristmill.model.transformer import Linear

MIN_INT8_ROWS = 16  # of an int8 product on a GPU, and one more


class LinearMethod(Protocol):
    """Linear method: x [T, D] -> [T, N]."""

    def __call__(self, x_TD: Tensor) -> Tensor: ...


def supported_by_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether kernels.cpp computes with activations of this type."""
    return device.type == "cpu" and dtype in kernels.TYPES and kernels.load() is not None


def has_triton(device: torch.device) -> bool:
    """Whether the Triton kernels compute on this device."""
    return device.type == "cuda" and find_spec("triton") is not None and os.environ.get("GRISTMILL_KERNELS") != "0"


class Int8Activations:
    """Int8 activations with a scale a token: value = int8 * scale."""

    def __init__(self, values_TD: Tensor, scale_T: Tensor) -> None:
        self.values_TD, self.scale_T = values_TD, scale_T

    @staticmethod
    def quantize(x_TD: Tensor) -> "Int8Activations":
        library = kernels.load() if supported_by_kernels(x_TD.device, x_TD.dtype) else None
        if library is None:
            return Int8Activations(*scaled(x_TD, torch.int8))
        x_TD = x_TD.contiguous()
        rows = Int8Activations(torch.empty(x_TD.shape, dtype=torch.int8), torch.empty(len(x_TD)))
        library.gristmill_quantize(
            x_TD.data_ptr(), rows.values_TD.data_ptr(), rows.scale_T.data_ptr(), len(x_TD), x_TD.shape[1], kernels.TYPES[x_TD.dtype]
        )
        return rows


class UnquantizedLinear:
    """Linear layer as it is. It reads the model's own weight, so that later changes of it are seen."""

    def __init__(self, linear: Linear, dtype: torch.dtype) -> None:
        self.weight_ND = linear.weight.detach()
        self.bias_N = None if linear.bias is None else linear.bias.detach().to(dtype)

    def __call__(self, x_TD: Tensor) -> Tensor:
        return F.linear(x_TD, self.weight_ND, self.bias_N)


def _check_widths(linear: Linear, step: int) -> None:
    """Raise `InputError` where a GPU's eight-bit product does not take the matrix."""
    if linear.weight.device.type == "cuda" and any(size % step for size in linear.weight.shape):
        size = " by ".join(map(str, linear.weight.shape))
        raise InputError(f"A GPU multiplies eight-bit matrices whose sides are multiples of {step}, not {size}: quantize to int8-weight.")


class Int8Linear:
    """W8A8 linear layer: an int8 matrix, and activations quantized token by token as they come."""

    def __init__(self, linear: Linear, dtype: torch.dtype) -> None:
        _check_widths(linear, 8)
        weight_ND, self.scale_N = scaled(linear.weight.detach(), torch.int8)
        self.weight_DN = weight_ND.T.clone(memory_format=torch.contiguous_format)
        self.bias_N = None if linear.bias is None else linear.bias.detach().float()
        self.dtype = dtype
        self.library = kernels.load() if supported_by_kernels(weight_ND.device, dtype) else None

    def __call__(self, x_TD: Tensor) -> Tensor:
        return self.matmul(Int8Activations.quantize(x_TD))

    def matmul(self, x: Int8Activations) -> Tensor:
        """The product with activations that are quantized already."""
        values_TD, count = x.values_TD, len(x.values_TD)
        if values_TD.device.type == "cuda" and count <= MIN_INT8_ROWS:  # all that its product takes there
            values_TD = F.pad(values_TD, (0, 0, 0, MIN_INT8_ROWS + 1 - count))
        product_TN = torch._int_mm(values_TD, self.weight_DN)[:count]
        if self.library is None:
            out_TN = product_TN.float() * x.scale_T[:, None] * self.scale_N
            return (out_TN if self.bias_N is None else out_TN + self.bias_N).to(self.dtype)
        out_TN = torch.empty(product_TN.shape, dtype=self.dtype)
        self._dequantize(product_TN, x.scale_T, out_TN.data_ptr(), None, None, kernels.TYPES[self.dtype])
        return out_TN

    def squared_relu(self, x: Int8Activations) -> Int8Activations:
        """Fused relu(product)^2, quantized again."""
        if self.library is None:
            return Int8Activations.quantize(self.matmul(x).float().relu().square())
        product_TN = torch._int_mm(x.values_TD, self.weight_DN)
        out = Int8Activations(torch.empty(product_TN.shape, dtype=torch.int8), torch.empty(len(product_TN)))
        self._dequantize(product_TN, x.scale_T, None, out.values_TD.data_ptr(), out.scale_T.data_ptr(), 0)
        return out

    def _dequantize(self, product_TN: Tensor, scale_T: Tensor, out: int | None, small: int | None, scale: int | None, kind: int) -> None:
        assert self.library is not None
        bias = None if self.bias_N is None else self.bias_N.data_ptr()
        at = product_TN.data_ptr(), scale_T.data_ptr(), self.scale_N.data_ptr(), bias, out, small, scale
        self.library.gristmill_dequantize(*at, *product_TN.shape, kind)


class Int8WeightLinear:
    """Weight-only int8 linear layer, activations as they are: a quarter of the memory of fp32, half of bf16."""

    MAX_MIXED_ROWS = 8  # rows up to which torch's mixed product beats making the matrix whole again (twice as fast as bf16 at one row)

    def __init__(self, linear: Linear, dtype: torch.dtype) -> None:
        self.weight_ND, scale_N = scaled(linear.weight.detach(), torch.int8)
        self.scale_N = scale_N.to(dtype)
        self.bias_N = None if linear.bias is None else linear.bias.detach().to(dtype)

    def __call__(self, x_TD: Tensor) -> Tensor:
        # in bf16 torch reads beyond the rows' ends where they are no whole vectors
        safe = x_TD.dtype == torch.float32 or x_TD.shape[1] % 16 == 0
        if len(x_TD) <= self.MAX_MIXED_ROWS and x_TD.device.type == "cpu" and safe:
            out_TN = torch._weight_int8pack_mm(x_TD, self.weight_ND, self.scale_N)
        else:
            out_TN = F.linear(x_TD, self.weight_ND.to(x_TD.dtype)).mul_(self.scale_N)
        return out_TN if self.bias_N is None else out_TN.add_(self.bias_N)


class Fp8Linear:
    """W8A8 fp8 (e4m3) linear layer. On a CPU it is right and slow."""

    def __init__(self, linear: Linear, dtype: torch.dtype) -> None:
        device = linear.weight.device
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
            raise InputError(f"{torch.cuda.get_device_name(device)} has no fp8 products: quantize to int8 instead.")
        _check_widths(linear, 16)
        self.weight_ND, self.scale_N = scaled(linear.weight.detach(), torch.float8_e4m3fn)
        self.bias_N = None if linear.bias is None else linear.bias.detach().to(dtype)
        self.dtype = dtype
        self.out_dtype = torch.bfloat16 if device.type == "cuda" else dtype  # all that scales by row and column give there

    def __call__(self, x_TD: Tensor) -> Tensor:
        values_TD, scale_T = scaled(x_TD, torch.float8_e4m3fn)
        out_TN = torch._scaled_mm(values_TD, self.weight_ND.T, scale_T[:, None], self.scale_N[None], out_dtype=self.out_dtype)
        out_TN = out_TN.to(self.dtype)
        return out_TN if self.bias_N is None else out_TN.add_(self.bias_N)


LINEARS: dict[str, Callable[[Linear, torch.dtype], LinearMethod]] = {
    "": UnquantizedLinear,
    "int8": Int8Linear,
    "int8-weight": Int8WeightLinear,
    "fp8": Fp8Linear,
}
