"""Inference layers with fused kernels: weights made ready once, and fewer passes over the activations than training needs.

Shapes: T tokens, D hidden size, F ffn size, N outputs of a product.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gristmill.core.errors import InputError
from gristmill.engine.kernels import library as kernels
from gristmill.engine.linear import LINEARS, Int8Activations, Int8Linear, supported_by_kernels
from gristmill.engine.lora import LoraRows
from gristmill.model.attention import varlen_attention
from gristmill.model.packed import PackedShape
from gristmill.model.quantized import MAX_VALUES, Quantize, scaled
from gristmill.model.transformer import MLP, Attention, Block, LayerNorm1P, Linear, RMSNorm, Transformer, rotate


class Norm:
    """Fused residual add and norm (`LayerNorm1P` or `RMSNorm`): it first adds what the layer before has left to add."""

    def __init__(self, norm: nn.Module) -> None:
        assert isinstance(norm, LayerNorm1P | RMSNorm)
        self.centred = isinstance(norm, LayerNorm1P)
        gain_D = norm.weight.detach().float()
        self.gain_D = (gain_D + 1.0 if self.centred else gain_D).contiguous()
        self.bias_D = norm.bias.detach().float().contiguous() if isinstance(norm, LayerNorm1P) else None
        self.eps = norm.eps
        self.library = kernels.load() if self.gain_D.device.type == "cpu" else None

    def __call__(self, x_TD: Tensor, delta_TD: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Residual x + delta (in x's place if it can be), and its norm."""
        if self.library is None or x_TD.dtype not in kernels.TYPES:
            x_TD = x_TD if delta_TD is None else x_TD + delta_TD
            if self.centred:
                return x_TD, F.layer_norm(x_TD.float(), self.gain_D.shape, self.gain_D, self.bias_D, self.eps).to(x_TD.dtype)
            return x_TD, F.rms_norm(x_TD.float(), self.gain_D.shape, self.gain_D, self.eps).to(x_TD.dtype)
        out_TD = torch.empty_like(x_TD)
        self._compiled(x_TD, delta_TD, out_TD.data_ptr(), None, None)
        return x_TD, out_TD

    def quantized(self, x_TD: Tensor, delta_TD: Tensor | None) -> tuple[Tensor, "Int8Activations"]:
        """The same with the norm as int8 activations."""
        if self.library is None or x_TD.dtype not in kernels.TYPES:
            x_TD, normed_TD = self(x_TD, delta_TD)
            return x_TD, Int8Activations.quantize(normed_TD)
        rows = Int8Activations(torch.empty(x_TD.shape, dtype=torch.int8), torch.empty(len(x_TD)))
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
            kernels.TYPES[x_TD.dtype],
        )


class DecoderLayer:
    """Decoder layer in two halves around attention itself. What a half adds to the residual stream is left for the next norm to add.

    The `lora` of its methods are the rows of the step that adapters change, if there are any.
    """

    def __init__(self, block: Block, dtype: torch.dtype, quantize: Quantize = "", number: int = 0) -> None:
        make, self.number = LINEARS[quantize], number
        self.attention: Attention | None = block.attention
        self.mlp: MLP | None = block.mlp
        if block.attention is not None and block.attention_norm is not None:
            self.attention_norm = Norm(block.attention_norm)
            self.qkv, self.output = make(block.attention.qkv, dtype), make(block.attention.output, dtype)
        if block.mlp is not None and block.mlp_norm is not None:
            self.mlp_norm = Norm(block.mlp_norm)
            self.gate = None if block.mlp.gate is None else make(block.mlp.gate, dtype)
            self.up, self.down = make(block.mlp.up, dtype), make(block.mlp.down, dtype)
            self.library = kernels.load() if supported_by_kernels(block.mlp.up.weight.device, dtype) else None

    def project_qkv(self, x_TD: Tensor, delta_TD: Tensor | None, lora: LoraRows | None = None) -> tuple[Tensor, Tensor]:
        """Attention norm and QKV projection: the residual stream, and queries, keys and values [T, H + 2K, d] before the rotation."""
        assert self.attention is not None
        if isinstance(self.qkv, Int8Linear) and lora is None:
            x_TD, rows = self.attention_norm.quantized(x_TD, delta_TD)
            qkv = self.qkv.matmul(rows)
        else:
            x_TD, normed_TD = self.attention_norm(x_TD, delta_TD)
            qkv = self.qkv(normed_TD)
            if lora is not None:
                lora.add(self.number, "qkv", normed_TD, qkv)
        return x_TD, self.attention.heads(qkv)

    def project_output(self, attended_TN: Tensor, lora: LoraRows | None = None) -> Tensor:
        """Output projection of attention."""
        out_TD = self.output(attended_TN)
        if lora is not None:
            lora.add(self.number, "output", attended_TN, out_TD)
        return out_TD

    def feed_forward(self, x_TD: Tensor, delta_TD: Tensor | None, lora: LoraRows | None = None) -> tuple[Tensor, Tensor | None]:
        """MLP norm and MLP: the residual stream, and what the MLP adds to it."""
        if self.mlp is None:
            return x_TD, delta_TD
        if lora is not None:
            return self._feed_forward_with(lora, *self.mlp_norm(x_TD, delta_TD))
        if isinstance(self.up, Int8Linear) and isinstance(self.down, Int8Linear):
            x_TD, rows = self.mlp_norm.quantized(x_TD, delta_TD)
            if self.gate is None:
                return x_TD, self.down.matmul(self.up.squared_relu(rows))
            assert isinstance(self.gate, Int8Linear)
            return x_TD, self.down(F.silu(self.gate.matmul(rows)) * self.up.matmul(rows))
        x_TD, normed_TD = self.mlp_norm(x_TD, delta_TD)
        up_TF = self.up(normed_TD)
        if self.gate is not None:
            return x_TD, self.down(F.silu(self.gate(normed_TD)).mul_(up_TF))
        if self.library is None:
            return x_TD, self.down(F.relu_(up_TF).square_())
        self.library.gristmill_squared_relu(up_TF.data_ptr(), up_TF.numel(), kernels.TYPES[up_TF.dtype])
        return x_TD, self.down(up_TF)

    def _feed_forward_with(self, lora: LoraRows, x_TD: Tensor, normed_TD: Tensor) -> tuple[Tensor, Tensor]:
        """MLP without fused kernels: adapters change what stands between them."""
        inner_TF = self.up(normed_TD)
        lora.add(self.number, "up", normed_TD, inner_TF)
        if self.gate is None:
            inner_TF = F.relu_(inner_TF).square_()
        else:
            gate_TF = self.gate(normed_TD)
            lora.add(self.number, "gate", normed_TD, gate_TF)
            inner_TF = F.silu(gate_TF).mul_(inner_TF)
        out_TD = self.down(inner_TF)
        lora.add(self.number, "down", inner_TF, out_TD)
        return x_TD, out_TD


class Decoder:
    """Decoder stack for inference: what `Transformer` computes, by the layers above.

    Args:
        model: its matrices are read in place where nothing is quantized; they must then be of type `dtype`.
        dtype: of activations.
        quantize: the layers' matrices; embeddings and output matrix stay as they are.
    """

    def __init__(self, model: Transformer, dtype: torch.dtype, quantize: Quantize = "") -> None:
        self.model, self.config, self.dtype, self.quantize = model, model.config, dtype, quantize
        self.device = model.embedding.device
        self.released = False
        self.refresh()

    def refresh(self) -> None:
        """Load the weights as they are now.

        Raises:
            InputError: they were released.
        """
        if self.released:
            raise InputError("The engine was made with own=True and has let go of the weights that it was made from: make another one.")
        blocks = [block for block in self.model.blocks if isinstance(block, Block)]
        self.layers = [DecoderLayer(block, self.dtype, self.quantize, number) for number, block in enumerate(blocks)]
        self.final_norm = Norm(self.model.final_norm)
        self.embedding_VD = self.model.embedding.detach().to(self.dtype)
        self.unembedding_VD = self.model.unembedding().detach().to(self.dtype)
        if self.model.lm_head is None:
            self.unembedding_VD = self.embedding_VD

    def release(self) -> None:
        """Free the model's own copy of all that is quantized: nobody else may use the model any more, nor `refresh` be called."""
        for module in self.model.modules():
            if isinstance(module, Linear) and module is not self.model.lm_head:
                module.weight.data = module.weight.data.new_empty(0)
        self.model.embedding.data = self.embedding_VD
        if self.model.lm_head is not None:
            self.model.lm_head.weight.data = self.unembedding_VD
        self.released = True
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # for the KV cache

    def embed(self, ids_T: Tensor) -> Tensor:
        """Token embeddings [T, D], a copy."""
        return F.embedding(ids_T, self.embedding_VD)

    def logits(self, h: Tensor) -> Tensor:
        """Logits (.., V) of states (.., D)."""
        return F.linear(h, self.unembedding_VD)

    def hidden(self, ids_T: Tensor, shape: PackedShape, cache_dtype: torch.dtype | None = None, lora: LoraRows | None = None) -> Tensor:
        """Hidden states [T, D] of whole texts after the final norm, with keys and values as a cache of this type would give them back."""
        cos_TR, sin_TR = self.model.rope(shape.positions_T)
        x_TD, delta_TD = self.embed(ids_T), None
        for layer in self.layers:
            if layer.attention is not None:
                heads, kv_heads = layer.attention.num_heads, layer.attention.num_kv_heads
                x_TD, qkv = layer.project_qkv(x_TD, delta_TD, lora)
                qk, v_TKd = qkv.split([heads + kv_heads, kv_heads], dim=1)
                q_THd, k_TKd = rotate(qk, cos_TR, sin_TR).split([heads, kv_heads], dim=1)
                k_TKd, v_TKd = (_cache_round_trip(x, cache_dtype or self.dtype) for x in (k_TKd, v_TKd))
                delta_TD = layer.project_output(varlen_attention(q_THd, k_TKd, v_TKd, shape).flatten(1), lora)
            x_TD, delta_TD = layer.feed_forward(x_TD, delta_TD, lora)
        return self.final_norm(x_TD, delta_TD)[1]


def _cache_round_trip(x: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype not in MAX_VALUES:
        return x.to(dtype).to(x.dtype)
    values, scale = scaled(x, dtype)
    return (values.float() * scale[..., None]).to(x.dtype)
