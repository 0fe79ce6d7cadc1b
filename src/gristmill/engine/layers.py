"""Inference layers with fused kernels: weights made ready once, and fewer passes over the activations than training needs.

Shapes: T tokens, D hidden size, F ffn size, N outputs of a product.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gristmill.core.device import Arena
from gristmill.core.errors import InputError
from gristmill.engine.kernels import library as kernels
from gristmill.engine.linear import (
    BF16,
    INT4,
    INT8,
    LINEARS,
    Int8Activations,
    Int8Linear,
    LinearMethod,
    has_triton,
    max_rows,
    supported_by_kernels,
)
from gristmill.engine.lora import LoraRows
from gristmill.model.attention import varlen_attention
from gristmill.model.layers import MLP, LayerNorm1P, Linear, RMSNorm, gate_activation
from gristmill.model.packed import PackedShape
from gristmill.model.quantized import MAX_VALUES, Head, Quantize, scaled
from gristmill.model.rotary import rotate_heads
from gristmill.model.transformer import Attention, Block, Transformer, check_length, scale_embeddings, soft_cap


class Norm:
    """Fused residual add and norm (`LayerNorm1P` or `RMSNorm`): it first adds what the layer before has left to add.

    Args:
        scale: of what an RMSNorm gives.
    """

    def __init__(self, norm: nn.Module, scale: float = 1.0) -> None:
        assert isinstance(norm, LayerNorm1P | RMSNorm)
        self.centred = isinstance(norm, LayerNorm1P)
        gain_D = norm.gain().detach() if isinstance(norm, RMSNorm) else norm.weight.detach().float() + 1.0
        self.gain_D = (gain_D if scale == 1 else gain_D * scale).contiguous()
        self.bias_D = norm.bias.detach().float().contiguous() if isinstance(norm, LayerNorm1P) else None
        self.eps = norm.eps
        self.library = kernels.load() if self.gain_D.device.type == "cpu" else None
        self.fused = has_triton(self.gain_D.device)

    def __call__(self, x_TD: Tensor, delta_TD: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Residual x + delta (in x's place if it can be), and its norm."""
        if self.fused:
            from gristmill.engine.kernels.triton_norm import add_norm

            return x_TD, add_norm(x_TD, delta_TD, self.gain_D, self.bias_D, eps=self.eps, centred=self.centred)
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

    Args:
        arena: of quantized matrices; those of all layers are best in the same.
    """

    def __init__(self, block: Block, dtype: torch.dtype, quantize: Quantize = "", number: int = 0, arena: Arena | None = None) -> None:
        self.number = number
        held = arena or Arena()

        def make(linear: Linear) -> LinearMethod:
            return LINEARS[quantize](linear, dtype, held)

        def norm(module: nn.Module | None) -> Norm | None:
            return None if module is None else Norm(module)

        self.attention: Attention | None = block.attention
        self.mlp: MLP | None = block.mlp
        self.rope, self.mod, self.residual_multiplier = block.config.rope, block.mod, block.residual_multiplier
        if block.attention is not None:
            self.attention_norm, self.attention_post_norm = norm(block.attention_norm), norm(block.attention_post_norm)
            self.qkv, self.output = make(block.attention.qkv), make(block.attention.output)
        if block.mlp is not None:
            self.mlp_norm, self.mlp_post_norm = norm(block.mlp_norm), norm(block.mlp_post_norm)
            linears = (block.mlp.gate_up, block.mlp.gate, block.mlp.up)
            self.gate_up, self.gate, self.up = (None if linear is None else make(linear) for linear in linears)
            self.down = make(block.mlp.down)
            self.library = kernels.load() if supported_by_kernels(block.mlp.down.weight.device, dtype) else None

    def project_qkv(self, x_TD: Tensor, delta_TD: Tensor | None, lora: LoraRows | None = None) -> tuple[Tensor, Tensor]:
        """Attention norm and QKV projection: the residual stream, and queries, keys and values [T, H + 2K, d] before the rotation."""
        assert self.attention is not None
        if isinstance(self.qkv, Int8Linear) and lora is None:
            x_TD, rows = _quantized(self.attention_norm, x_TD, delta_TD)
            qkv = self.qkv.matmul(rows)
        else:
            x_TD, normed_TD = _normed(self.attention_norm, x_TD, delta_TD)
            qkv = self.qkv(normed_TD)
            if lora is not None:
                lora.add(self.number, "qkv", normed_TD, qkv)
        return x_TD, self.attention.heads(qkv)

    def project_output(self, attended_TN: Tensor, lora: LoraRows | None = None) -> Tensor:
        """What attention adds to the residual stream."""
        out_TD = self.output(attended_TN)
        if lora is not None:
            lora.add(self.number, "output", attended_TN, out_TD)
        return self._added(out_TD, self.attention_post_norm)

    def feed_forward(self, x_TD: Tensor, delta_TD: Tensor | None, lora: LoraRows | None = None) -> tuple[Tensor, Tensor | None]:
        """MLP norm and MLP: the residual stream, and what the MLP adds to it."""
        if self.mlp is None:
            return x_TD, delta_TD
        if isinstance(self.down, Int8Linear) and lora is None:
            x_TD, rows = _quantized(self.mlp_norm, x_TD, delta_TD)
            return x_TD, self._added(self._int8_mlp(rows), self.mlp_post_norm)
        x_TD, normed_TD = _normed(self.mlp_norm, x_TD, delta_TD)
        out_TD = self._mlp(normed_TD) if lora is None else self._mlp_with(lora, normed_TD)
        return x_TD, self._added(out_TD, self.mlp_post_norm)

    def _added(self, out_TD: Tensor, norm: Norm | None) -> Tensor:
        if norm is not None:
            out_TD = norm(out_TD)[1]
        return out_TD if self.residual_multiplier == 1 else out_TD.mul_(self.residual_multiplier)

    def _int8_mlp(self, rows: Int8Activations) -> Tensor:
        assert self.mlp is not None and isinstance(self.down, Int8Linear)
        if isinstance(self.gate_up, Int8Linear):
            gate_TF, up_TF = self.gate_up.matmul(rows).chunk(2, dim=-1)
            return self.down(gate_activation(gate_TF, self.mlp.parts) * up_TF)
        assert isinstance(self.up, Int8Linear)
        if self.gate is None:
            return self.down.matmul(self.up.squared_relu(rows))
        assert isinstance(self.gate, Int8Linear)
        return self.down(gate_activation(self.gate.matmul(rows), self.mlp.parts) * self.up.matmul(rows))

    def _mlp(self, normed_TD: Tensor) -> Tensor:
        assert self.mlp is not None
        if self.gate_up is not None:
            gate_TF, up_TF = self.gate_up(normed_TD).chunk(2, dim=-1)
            return self.down(gate_activation(gate_TF, self.mlp.parts).mul_(up_TF))
        assert self.up is not None
        up_TF = self.up(normed_TD)
        if self.gate is not None:
            return self.down(gate_activation(self.gate(normed_TD), self.mlp.parts).mul_(up_TF))
        if self.library is None:
            return self.down(F.relu_(up_TF).square_())
        self.library.gristmill_squared_relu(up_TF.data_ptr(), up_TF.numel(), kernels.TYPES[up_TF.dtype])
        return self.down(up_TF)

    def _mlp_with(self, lora: LoraRows, normed_TD: Tensor) -> Tensor:
        """MLP without fused kernels: adapters change what stands between them."""
        assert self.mlp is not None

        def product(name: str, linear: LinearMethod | None, x_TD: Tensor) -> Tensor:
            assert linear is not None
            out = linear(x_TD)
            lora.add(self.number, name, x_TD, out)
            return out

        if self.gate_up is not None:
            gate_TF, up_TF = product("gate_up", self.gate_up, normed_TD).chunk(2, dim=-1)
            inner_TF = gate_activation(gate_TF, self.mlp.parts).mul_(up_TF)
        else:
            inner_TF = product("up", self.up, normed_TD)
            if self.gate is None:
                inner_TF = F.relu_(inner_TF).square_()
            else:
                inner_TF = gate_activation(product("gate", self.gate, normed_TD), self.mlp.parts).mul_(inner_TF)
        return product("down", self.down, inner_TF)


def _normed(norm: Norm | None, x_TD: Tensor, delta_TD: Tensor | None) -> tuple[Tensor, Tensor]:
    """Residual x + delta, and its norm; twice the residual where a family has no norm there."""
    if norm is not None:
        return norm(x_TD, delta_TD)
    x_TD = x_TD if delta_TD is None else x_TD + delta_TD
    return x_TD, x_TD


def _quantized(norm: Norm | None, x_TD: Tensor, delta_TD: Tensor | None) -> tuple[Tensor, Int8Activations]:
    """The same with the norm as int8 activations."""
    if norm is not None:
        return norm.quantized(x_TD, delta_TD)
    x_TD, _ = _normed(None, x_TD, delta_TD)
    return x_TD, Int8Activations.quantize(x_TD)


def release(block: nn.Module) -> None:
    """Free the matrices of a block that a quantized layer was made from."""
    for module in block.modules():
        if isinstance(module, Linear):
            module.to("meta")


class Decoder:
    """Decoder stack for inference: what `Transformer` computes, by the layers above.

    Args:
        model: its matrices are read in place where nothing is quantized; they must then be of type `dtype`.
        dtype: of activations.
        quantize: the layers' matrices; embeddings stay as they are.
        head: how the output matrix is quantized; "" for as it is.
        layers: made already from the model's blocks, which are released.
    """

    def __init__(
        self,
        model: Transformer,
        dtype: torch.dtype,
        quantize: Quantize = "",
        *,
        head: Head = "",
        layers: list[DecoderLayer] | None = None,
    ) -> None:
        self.model, self.config, self.dtype, self.quantize, self.head = model, model.config, dtype, quantize, head
        self.device = model.embedding.device
        self.released = False
        self._read(layers)
        self.released = layers is not None

    def refresh(self) -> None:
        """Load the weights as they are now.

        Raises:
            InputError: they were released.
        """
        if self.released:
            raise InputError("The engine was made with own=True and has let go of the weights that it was made from: make another one.")
        self._read(None)

    def _read(self, layers: list[DecoderLayer] | None) -> None:
        arena = Arena()
        if layers is None:
            blocks = [block for block in self.model.blocks.values() if isinstance(block, Block)]
            layers = [DecoderLayer(block, self.dtype, self.quantize, number, arena) for number, block in enumerate(blocks)]
        self.layers = layers
        self.final_norm = Norm(self.model.final_norm, 1 / self.config.logits_scaling)
        self.embedding_VD = self.model.embedding.detach().to(self.dtype)
        self.unembedding_VD = self.model.unembedding().detach().to(self.dtype)
        if self.model.lm_head is None:
            self.unembedding_VD = self.embedding_VD
        output = Linear(1, 1, bias=False)
        output.weight = nn.Parameter(self.unembedding_VD, requires_grad=False)
        self.output = LINEARS["int8-weight" if self.head else ""](output, self.dtype, arena)

    @property
    def any_rows(self) -> bool:
        """Whether products take any number of rows alike: nothing is gained by padding it."""
        kinds = {"": BF16, "int8-weight": INT8, "int4": INT4}
        if self.device.type != "cpu" or self.dtype != torch.bfloat16 or self.quantize not in kinds:
            return False
        return min(max_rows(kinds[self.quantize]), max_rows(INT8 if self.head else BF16)) > 1 << 20

    def release(self) -> None:
        """Free the model's own copy of all that is quantized: nobody else may use the model any more, nor `refresh` be called."""
        for block in self.model.blocks.values():
            release(block)
        self.model.embedding.data = self.embedding_VD
        if self.model.lm_head is not None:
            self.model.lm_head.weight.data = self.unembedding_VD
        if self.head:
            self.release_head()
        self.released = True
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # for the KV cache

    def release_head(self) -> None:
        """Free the output matrix that a quantized one was made from."""
        if self.model.lm_head is not None:
            self.model.lm_head.to("meta")
        self.unembedding_VD = self.unembedding_VD.to("meta")
        self.released = True

    def embed(self, ids_T: Tensor) -> Tensor:
        """Token embeddings [T, D], a copy."""
        return scale_embeddings(F.embedding(ids_T, self.embedding_VD), self.config)

    def logits(self, h: Tensor) -> Tensor:
        """Logits (.., V) of states (.., D)."""
        return soft_cap(self.output(h.flatten(0, -2)).unflatten(0, h.shape[:-1]), self.config.logits_soft_cap)

    def hidden(self, ids_T: Tensor, shape: PackedShape, cache_dtype: torch.dtype | None = None, lora: LoraRows | None = None) -> Tensor:
        """Hidden states [T, D] of whole texts after the final norm, with keys and values as a cache of this type would give them back."""
        check_length(self.config, shape)
        angles = self.model.rope(shape.positions_T)
        x_TD, delta_TD = self.embed(ids_T), None
        for layer in self.layers:
            if layer.attention is not None:
                x_TD, qkv = layer.project_qkv(x_TD, delta_TD, lora)
                q_THd, k_TKd, v_TKd = rotate_heads(qkv, layer.attention.num_kv_heads, angles[layer.rope])
                k_TKd, v_TKd = (_cache_round_trip(x, cache_dtype or self.dtype) for x in (k_TKd, v_TKd))
                attended_TN = varlen_attention(q_THd, k_TKd, v_TKd, shape, mod=layer.mod).flatten(1)
                delta_TD = layer.project_output(attended_TN, lora)
            x_TD, delta_TD = layer.feed_forward(x_TD, delta_TD, lora)
        return self.final_norm(x_TD, delta_TD)[1]


def _cache_round_trip(x: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype not in MAX_VALUES:
        return x.to(dtype).to(x.dtype)
    values, scale = scaled(x, dtype)
    return (values.float() * scale[..., None]).to(x.dtype)
