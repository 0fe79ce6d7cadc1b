"""A model's layers as the engine computes them: weights made ready once, and fewer passes over the activations than training needs.

Shapes: T tokens, D hidden size, F ffn size, N outputs of a product.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gristmill.engine import kernels
from gristmill.model.attention import varlen_attention
from gristmill.model.packed import PackedShape
from gristmill.model.transformer import MLP, Attention, Block, LayerNorm1P, Linear, RMSNorm, Transformer, rotate

TYPES = kernels.TYPES


class Norm:
    """`LayerNorm1P` or `RMSNorm`, which first adds what the layer before has left to add."""

    def __init__(self, norm: nn.Module) -> None:
        assert isinstance(norm, LayerNorm1P | RMSNorm)
        self.centred = isinstance(norm, LayerNorm1P)
        gain_D = norm.weight.detach().float()
        self.gain_D = (gain_D + 1.0 if self.centred else gain_D).contiguous()
        self.bias_D = norm.bias.detach().float().contiguous() if isinstance(norm, LayerNorm1P) else None
        self.eps = norm.eps
        self.library = kernels.load() if self.gain_D.device.type == "cpu" else None

    def __call__(self, x_TD: Tensor, delta_TD: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x + delta (in x's place if it can be), and its norm."""
        if self.library is None or x_TD.dtype not in TYPES:
            x_TD = x_TD if delta_TD is None else x_TD + delta_TD
            if self.centred:
                return x_TD, F.layer_norm(x_TD.float(), self.gain_D.shape, self.gain_D, self.bias_D, self.eps).to(x_TD.dtype)
            return x_TD, F.rms_norm(x_TD.float(), self.gain_D.shape, self.gain_D, self.eps).to(x_TD.dtype)
        out_TD = torch.empty_like(x_TD)
        self._compiled(x_TD, delta_TD, out_TD.data_ptr(), None, None)
        return x_TD, out_TD

    def quantized(self, x_TD: Tensor, delta_TD: Tensor | None) -> tuple[Tensor, "Rows"]:
        """The same with the norm as int8 rows."""
        if self.library is None or x_TD.dtype not in TYPES:
            x_TD, normed_TD = self(x_TD, delta_TD)
            return x_TD, Rows.of(normed_TD)
        rows = Rows(torch.empty(x_TD.shape, dtype=torch.int8), torch.empty(len(x_TD)))
        self._compiled(x_TD, delta_TD, None, rows.values_TD.data_ptr(), rows.scale_T.data_ptr())
        return x_TD, rows

    def _compiled(self, x_TD: Tensor, delta_TD: Tensor | None, out: int | None, small: int | None, scale: int | None) -> None:
        assert self.library is not None and x_TD.is_contiguous()
        self.library.gristmill_norm(
            x_TD.data_ptr(),
            None if delta_TD is None else delta_TD.contiguous().data_ptr(),
            self.gain_D.data_ptr(),
            None if self.bias_D is None else self.bias_D.data_ptr(),
            out,
            small,
            scale,
            len(x_TD),
            x_TD.shape[1],
            self.eps,
            int(self.centred),
            TYPES[x_TD.dtype],
        )


class Rows:
    """Activations as int8, a scale a row: value = int8 * scale."""

    def __init__(self, values_TD: Tensor, scale_T: Tensor) -> None:
        self.values_TD, self.scale_T = values_TD, scale_T

    @staticmethod
    def of(x_TD: Tensor) -> "Rows":
        library = kernels.load() if x_TD.device.type == "cpu" and x_TD.dtype in TYPES else None
        if library is None:
            scale_T = x_TD.float().abs().amax(-1) / 127
            return Rows((x_TD.float() / scale_T.clamp(min=1e-30)[:, None]).round().to(torch.int8), scale_T)
        x_TD = x_TD.contiguous()
        rows = Rows(torch.empty(x_TD.shape, dtype=torch.int8), torch.empty(len(x_TD)))
        library.gristmill_quantize(
            x_TD.data_ptr(), rows.values_TD.data_ptr(), rows.scale_T.data_ptr(), len(x_TD), x_TD.shape[1], TYPES[x_TD.dtype]
        )
        return rows


class Dense:
    """A product with a matrix as it is. It reads the model's own weight, so that later changes of it are seen."""

    def __init__(self, linear: Linear, dtype: torch.dtype) -> None:
        self.weight_ND = linear.weight.detach()
        self.bias_N = None if linear.bias is None else linear.bias.detach().to(dtype)

    def __call__(self, x_TD: Tensor) -> Tensor:
        return F.linear(x_TD, self.weight_ND, self.bias_N)


class Int8:
    """A product with an int8 matrix, a scale a column of the result; activations are quantized row by row as they come."""

    def __init__(self, linear: Linear, dtype: torch.dtype) -> None:
        weight_ND = linear.weight.detach().float()
        self.scale_N = weight_ND.abs().amax(-1).clamp(min=1e-30) / 127
        self.weight_DN = (weight_ND / self.scale_N[:, None]).round().to(torch.int8).T.clone(memory_format=torch.contiguous_format)
        self.bias_N = None if linear.bias is None else linear.bias.detach().float()
        self.dtype = dtype
        self.library = kernels.load() if weight_ND.device.type == "cpu" and dtype in TYPES else None

    def __call__(self, x_TD: Tensor) -> Tensor:
        return self.rows(Rows.of(x_TD))

    def rows(self, rows: Rows) -> Tensor:
        """The product with rows that are quantized already."""
        product_TN = torch._int_mm(rows.values_TD, self.weight_DN)
        if self.library is None:
            out_TN = product_TN.float() * rows.scale_T[:, None] * self.scale_N
            return (out_TN if self.bias_N is None else out_TN + self.bias_N).to(self.dtype)
        out_TN = torch.empty(product_TN.shape, dtype=self.dtype)
        self._dequantize(product_TN, rows.scale_T, out_TN.data_ptr(), None, None, TYPES[self.dtype])
        return out_TN

    def squared_relu(self, rows: Rows) -> Rows:
        """relu(product)^2, quantized again."""
        if self.library is None:
            return Rows.of(self.rows(rows).float().relu().square())
        product_TN = torch._int_mm(rows.values_TD, self.weight_DN)
        out = Rows(torch.empty(product_TN.shape, dtype=torch.int8), torch.empty(len(product_TN)))
        self._dequantize(product_TN, rows.scale_T, None, out.values_TD.data_ptr(), out.scale_T.data_ptr(), 0)
        return out

    def _dequantize(self, product_TN: Tensor, scale_T: Tensor, out: int | None, small: int | None, scale: int | None, kind: int) -> None:
        assert self.library is not None
        bias = None if self.bias_N is None else self.bias_N.data_ptr()
        at = product_TN.data_ptr(), scale_T.data_ptr(), self.scale_N.data_ptr(), bias, out, small, scale
        self.library.gristmill_dequantize(*at, *product_TN.shape, kind)


class Layer:
    """A `Block` in two halves around attention itself. What a half adds to the stream is left for the next norm to add."""

    def __init__(self, block: Block, dtype: torch.dtype, int8: bool) -> None:
        make = Int8 if int8 else Dense
        self.attention: Attention | None = block.attention
        self.mlp: MLP | None = block.mlp
        if block.attention is not None and block.attention_norm is not None:
            self.attention_norm = Norm(block.attention_norm)
            self.qkv, self.output = make(block.attention.qkv, dtype), make(block.attention.output, dtype)
        if block.mlp is not None and block.mlp_norm is not None:
            self.mlp_norm = Norm(block.mlp_norm)
            self.gate = None if block.mlp.gate is None else make(block.mlp.gate, dtype)
            self.up, self.down = make(block.mlp.up, dtype), make(block.mlp.down, dtype)
            self.library = kernels.load() if block.mlp.up.weight.device.type == "cpu" and dtype in TYPES else None

    def project(self, x_TD: Tensor, delta_TD: Tensor | None) -> tuple[Tensor, Tensor]:
        """The stream, and queries, keys and values [T, H + 2K, d] before the rotation."""
        assert self.attention is not None
        if isinstance(self.qkv, Int8):
            x_TD, rows = self.attention_norm.quantized(x_TD, delta_TD)
            qkv = self.qkv.rows(rows)
        else:
            x_TD, normed_TD = self.attention_norm(x_TD, delta_TD)
            qkv = self.qkv(normed_TD)
        return x_TD, self.attention.heads(qkv)

    def feed(self, x_TD: Tensor, delta_TD: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The stream, and what the MLP adds to it."""
        if self.mlp is None:
            return x_TD, delta_TD
        if isinstance(self.up, Int8) and isinstance(self.down, Int8):
            x_TD, rows = self.mlp_norm.quantized(x_TD, delta_TD)
            if self.gate is None:
                return x_TD, self.down.rows(self.up.squared_relu(rows))
            assert isinstance(self.gate, Int8)
            return x_TD, self.down(F.silu(self.gate.rows(rows)) * self.up.rows(rows))
        x_TD, normed_TD = self.mlp_norm(x_TD, delta_TD)
        up_TF = self.up(normed_TD)
        if self.gate is not None:
            return x_TD, self.down(F.silu(self.gate(normed_TD)).mul_(up_TF))
        if self.library is None:
            return x_TD, self.down(F.relu_(up_TF).square_())
        self.library.gristmill_squared_relu(up_TF.data_ptr(), up_TF.numel(), TYPES[up_TF.dtype])
        return x_TD, self.down(up_TF)


def hidden(model: Transformer, layers: Sequence[Layer], final_norm: Norm, ids_T: Tensor, shape: PackedShape) -> Tensor:
    """`Transformer.hidden` by these layers: what the engine computes for whole texts."""
    cos_TR, sin_TR = model.rope(shape.positions_T)
    x_TD, delta_TD = model.embed(ids_T).clone(), None
    for layer in layers:
        if layer.attention is not None:
            heads, kv_heads = layer.attention.num_heads, layer.attention.num_kv_heads
            x_TD, qkv = layer.project(x_TD, delta_TD)
            qk, v_TKd = qkv.split([heads + kv_heads, kv_heads], dim=1)
            q_THd, k_TKd = rotate(qk, cos_TR, sin_TR).split([heads, kv_heads], dim=1)
            delta_TD = layer.output(varlen_attention(q_THd, k_TKd, v_TKd, shape).flatten(1))
        x_TD, delta_TD = layer.feed(x_TD, delta_TD)
    return final_norm(x_TD, delta_TD)[1]
