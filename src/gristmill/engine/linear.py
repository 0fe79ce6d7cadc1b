"""Linear methods: unquantized, W8A8 int8, int8 or int4 weights alone, and fp8.

Weights of eight bits have a scale a row, of four bits a scale a group of columns; quantized activations have a scale a token.
Shapes: T tokens, D inputs, N outputs of a product.
"""

import os
import platform
from collections.abc import Callable
from importlib.util import find_spec
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from gristmill.core.device import Arena, has_bf16_products
from gristmill.core.errors import InputError
from gristmill.engine.kernels import library as kernels
from gristmill.model.layers import Linear
from gristmill.model.quantized import INT4_GROUP, check_groups, grouped, scaled

MIN_INT8_ROWS = 16  # of an int8 product on a GPU, and one more


class LinearMethod(Protocol):
    """Linear method: x [T, D] -> [T, N].

    Attributes:
        compiled: what multiplies up to `max_rows` rows without torch; None where torch multiplies any number.
    """

    compiled: "CompiledProduct | None"
    max_rows: int

    def __call__(self, x_TD: Tensor) -> Tensor: ...


def supported_by_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether kernels.cpp computes with activations of this type."""
    return device.type == "cpu" and dtype in kernels.TYPES and kernels.load() is not None


def has_triton(device: torch.device) -> bool:
    """Whether the Triton kernels compute on this device."""
    return device.type == "cuda" and find_spec("triton") is not None and os.environ.get("GRISTMILL_KERNELS") != "0"


FP32, BF16, INT8, INT4 = 0, 1, 2, 3  # matrices, as linear.cpp is told them
CHUNK, PAIR = 256, 64  # columns that int4's scales and bytes are padded to
ANY_ROWS = 2**31
# Rows up to which own products beat torch's on a CPU that has instructions for bf16. On others all but fp32's do at any number.
MAX_ROWS = {FP32: 16, BF16: 8, INT8: 16, INT4: 64}
# Of bf16 by tile products (AMX); of integers, of which torch would make a bf16 matrix each time, any number. So it is of a matrix of few
# numbers: torch's products of many rows are a tenth faster there, and all layers in one call save more than that.
MAX_TILED_ROWS, FEW_NUMBERS = 512, 2**17


def max_rows(kind: int, dtype: torch.dtype = torch.bfloat16, size: int = FEW_NUMBERS + 1) -> int:
    """Rows of activations of a type up to which linear.cpp multiplies by a matrix of this kind and size; 0 where torch does."""
    if kernels.load() is None or (kind in (INT8, INT4) and platform.machine() not in ("x86_64", "AMD64")):
        return 0
    if kind != FP32 and dtype == torch.bfloat16 and kernels.has_tiles():
        return MAX_TILED_ROWS if kind == BF16 and size > FEW_NUMBERS else ANY_ROWS
    return MAX_ROWS[kind] if kind == FP32 or has_bf16_products() else ANY_ROWS


class CompiledProduct:
    """Product x [T, D] -> [T, N] by linear.cpp, with a matrix that stays where it is.

    Args:
        weight: fp32 or bf16 [N, D], or as `int8_rows` and `int4_blocks` lay it out; contiguous.
        scale: fp32 [N] of int8, bf16 of int4.
        bias_N: fp32.
    """

    def __init__(self, kind: int, weight: Tensor, scale: Tensor | None, bias_N: Tensor | None, *, shape: torch.Size) -> None:
        library = kernels.load()
        assert library is not None and weight.is_contiguous()
        self.function, self.kind, (self.num_outputs, self.width) = library.gristmill_product, kind, shape
        self.held = weight, scale, bias_N  # what the pointers point to
        self.pointers = [0 if tensor is None else tensor.data_ptr() for tensor in self.held]

    def __call__(self, x_TD: Tensor, dtype: torch.dtype | None = None, scale_T: Tensor | None = None) -> Tensor:
        """The product in `dtype`, which activations that are int8 have to name, with their scales."""
        x_TD, dtype = x_TD.contiguous(), dtype or x_TD.dtype
        out_TN = torch.empty(x_TD.shape[0], self.num_outputs, dtype=dtype)
        weight, scale, bias = self.pointers
        row_scale = 0 if scale_T is None else scale_T.data_ptr()
        types = kernels.CACHE_TYPES[x_TD.dtype], self.kind, kernels.TYPES[dtype]
        sizes = x_TD.shape[0], self.num_outputs, self.width, torch.get_num_threads()
        self.function(kernels.PRODUCT.pack(x_TD.data_ptr(), weight, scale, row_scale, bias, out_TN.data_ptr(), *types, *sizes))
        return out_TN


def int8_rows(values_ND: Tensor) -> Tensor:
    """Int8 matrix [N, D] as linear.cpp reads it: rows of whole vectors."""
    return F.pad(values_ND, (0, -values_ND.shape[1] % 16)).contiguous()


def int4_blocks(values_ND: Tensor, scale_NG: Tensor) -> tuple[Tensor, Tensor]:
    """Int4 values [N, D] with scales [N, G] as linear.cpp reads them: two columns a byte, 32 apart, and scales in bf16 for whole chunks."""
    raised = (F.pad(values_ND, (0, -values_ND.shape[1] % PAIR)) + 8).to(torch.uint8).unflatten(1, (-1, 2, PAIR // 2))
    scale_NG = F.pad(scale_NG.bfloat16(), (0, -scale_NG.shape[1] % (CHUNK // INT4_GROUP)))
    return (raised[:, :, 0] | raised[:, :, 1] << 4).flatten(1).contiguous(), scale_NG.contiguous()


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

    def __init__(self, linear: Linear, dtype: torch.dtype, arena: Arena) -> None:
        self.weight_ND = linear.weight.detach()
        self.bias_N = None if linear.bias is None else linear.bias.detach().to(dtype)
        kind = {torch.float32: FP32, torch.bfloat16: BF16}.get(dtype)
        fits = self.weight_ND.device.type == "cpu" and dtype == self.weight_ND.dtype and self.weight_ND.is_contiguous()
        self.max_rows = max_rows(kind, size=self.weight_ND.numel()) if fits and kind is not None else 0
        self.compiled: CompiledProduct | None = None
        if kind is not None and self.max_rows:
            bias_N = None if self.bias_N is None else self.bias_N.float()
            self.compiled = CompiledProduct(kind, self.weight_ND, None, bias_N, shape=self.weight_ND.shape)

    def __call__(self, x_TD: Tensor) -> Tensor:
        if self.compiled is not None and 0 < x_TD.shape[0] <= self.max_rows:
            return self.compiled(x_TD)
        return F.linear(x_TD, self.weight_ND, self.bias_N)


def _check_widths(linear: Linear, step: int) -> None:
    """Raise `InputError` where a GPU's eight-bit product does not take the matrix."""
    if linear.weight.device.type == "cuda" and any(size % step for size in linear.weight.shape):
        size = " by ".join(map(str, linear.weight.shape))
        raise InputError(f"A GPU multiplies eight-bit matrices whose sides are multiples of {step}, not {size}: quantize to int8-weight.")


class Int8Linear:
    """W8A8 linear layer: an int8 matrix, and activations quantized token by token as they come."""

    def __init__(self, linear: Linear, dtype: torch.dtype, arena: Arena) -> None:
        _check_widths(linear, 8)
        weight_ND, self.scale_N = scaled(linear.weight.detach(), torch.int8)
        self.bias_N = None if linear.bias is None else linear.bias.detach().float()
        self.dtype = dtype
        self.library = kernels.load() if supported_by_kernels(weight_ND.device, dtype) else None
        self.compiled: CompiledProduct | None = None
        self.max_rows = ANY_ROWS
        # torch's int8 product is slower than any other on a CPU that has no instructions for it
        if self.library is not None and max_rows(INT8) and not torch.cpu._is_vnni_supported():
            self.compiled = CompiledProduct(INT8, arena.keep(int8_rows(weight_ND)), self.scale_N, self.bias_N, shape=weight_ND.shape)
        else:
            self.weight_DN = arena.keep(weight_ND.T)

    def __call__(self, x_TD: Tensor) -> Tensor:
        return self.matmul(Int8Activations.quantize(x_TD))

    def matmul(self, x: Int8Activations) -> Tensor:
        """The product with activations that are quantized already."""
        if self.compiled is not None:
            return self.compiled(x.values_TD, self.dtype, x.scale_T)
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
        if self.compiled is not None:
            return Int8Activations.quantize(self.compiled(x.values_TD, torch.float32, x.scale_T).relu_().square_())
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

    def __init__(self, linear: Linear, dtype: torch.dtype, arena: Arena) -> None:
        values_ND, scale_N = scaled(linear.weight.detach(), torch.int8)
        self.weight_ND, self.scale_N = values_ND, scale_N.to(dtype)
        self.bias_N = None if linear.bias is None else linear.bias.detach().to(dtype)
        self.max_rows = max_rows(INT8, dtype) if supported_by_kernels(values_ND.device, dtype) else 0
        self.compiled: CompiledProduct | None = None
        if self.max_rows:
            held, bias_N = arena.keep(int8_rows(values_ND)), None if self.bias_N is None else self.bias_N.float()
            self.compiled = CompiledProduct(INT8, held, scale_N, bias_N, shape=values_ND.shape)
            self.weight_ND = held[:, : values_ND.shape[1]]

    def __call__(self, x_TD: Tensor) -> Tensor:
        if self.compiled is not None and 0 < x_TD.shape[0] <= self.max_rows:
            return self.compiled(x_TD)
        # in bf16 torch reads beyond the rows' ends where they are no whole vectors
        safe = x_TD.dtype == torch.float32 or x_TD.shape[1] % 16 == 0
        if len(x_TD) <= self.MAX_MIXED_ROWS and x_TD.device.type == "cpu" and safe and not self.max_rows:
            out_TN = torch._weight_int8pack_mm(x_TD, self.weight_ND, self.scale_N)
        else:
            out_TN = F.linear(x_TD, self.weight_ND.to(x_TD.dtype)).mul_(self.scale_N)
        return out_TN if self.bias_N is None else out_TN.add_(self.bias_N)


class Int4WeightLinear:
    """Weight-only int4 linear layer, a scale for each group of columns: an eighth of the memory of fp32 and a little more. Without kernels
    it is right and slow.
    """

    def __init__(self, linear: Linear, dtype: torch.dtype, arena: Arena) -> None:
        self.shape, self.dtype = linear.weight.shape, dtype
        check_groups(self.shape[1], INT4_GROUP)
        blocks, scale_NG = int4_blocks(*grouped(linear.weight.detach(), INT4_GROUP))
        self.held = arena.keep(blocks), arena.keep(scale_NG)
        self.bias_N = None if linear.bias is None else linear.bias.detach().to(dtype)
        self.max_rows = max_rows(INT4, dtype) if supported_by_kernels(linear.weight.device, dtype) else 0
        self.compiled: CompiledProduct | None = None
        if self.max_rows:
            self.compiled = CompiledProduct(INT4, *self.held, None if self.bias_N is None else self.bias_N.float(), shape=self.shape)

    def __call__(self, x_TD: Tensor) -> Tensor:
        if self.compiled is not None and 0 < x_TD.shape[0] <= self.max_rows:
            return self.compiled(x_TD)
        return F.linear(x_TD, self._whole(), self.bias_N)

    def _whole(self) -> Tensor:
        """The matrix [N, D]."""
        both, scale_NG = self.held
        raised = torch.stack((both & 15, both >> 4), 1).unflatten(2, (-1, INT4_GROUP)).transpose(1, 2).flatten(1, 2)
        blocks = raised.to(self.dtype) - 8
        return (blocks * scale_NG[:, : blocks.shape[1], None].to(self.dtype)).flatten(1)[:, : self.shape[1]]


class Fp8Linear:
    """W8A8 fp8 (e4m3) linear layer. On a CPU it is right and slow."""

    compiled: CompiledProduct | None = None
    max_rows = 0

    def __init__(self, linear: Linear, dtype: torch.dtype, arena: Arena) -> None:
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


LINEARS: dict[str, Callable[[Linear, torch.dtype, Arena], LinearMethod]] = {
    "": UnquantizedLinear,
    "int8": Int8Linear,
    "int8-weight": Int8WeightLinear,
    "int4": Int4WeightLinear,
    "fp8": Fp8Linear,
}
