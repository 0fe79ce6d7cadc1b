"""Decoder-only transformer of the Nemotron, Llama and Qwen families, on packed token-major activations.

Shapes: T tokens of all documents, D hidden size, H query heads, K key-value heads, d head_dim, R pairs of
rotated dimensions (half of `rotary_dims`), F ffn size, V vocabulary.

Parameters may be fp32 while activations are bf16: every layer casts its weight to the type of its input, so
`Transformer.compute_dtype` alone decides. Statistics of norms and rotary angles are always fp32.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from gristmill.model.attention import varlen_attention
from gristmill.model.config import BlockConfig, ModelConfig
from gristmill.model.packed import PackedShape

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}  # types that a model computes in, by their names in recipes


class Linear(nn.Linear):
    """A linear layer whose weight follows the type of its input. Values are set by `init_weights`."""

    def reset_parameters(self) -> None:
        pass

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.weight.to(input.dtype), bias)


class LayerNorm1P(nn.Module):
    """y = (x - mean) / sqrt(var + eps) * (1 + weight) + bias: the gain is stored around zero."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size))

    def forward(self, x_TD: Tensor) -> Tensor:
        gain_D, bias_D = self.weight.float() + 1.0, self.bias.float()
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
    """y = x / sqrt(mean(x^2) + eps) * weight, over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


def _norm(config: ModelConfig) -> nn.Module:
    kind = LayerNorm1P if config.parts.zero_centred_norm else RMSNorm
    return kind(config.hidden_size, config.norm_eps)


def rotate(x_THd: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """Rotate the first 2R dimensions of each head, pairing i with i + R; the rest passes through."""
    return _Rotate.apply(x_THd, cos_TR.unsqueeze(1), sin_TR.unsqueeze(1))


class _Rotate(torch.autograd.Function):
    """In place of a dozen autograd nodes; the gradient is rotated back by the same angles."""

    @staticmethod
    def forward(ctx: Any, x_THd: Tensor, cos_T1R: Tensor, sin_T1R: Tensor) -> Tensor:
        ctx.save_for_backward(cos_T1R, sin_T1R)
        return _rotated(x_THd, cos_T1R, sin_T1R)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos_T1R, sin_T1R = ctx.saved_tensors
        return _rotated(grads[0], cos_T1R, -sin_T1R), None, None


def _rotated(x_THd: Tensor, cos_T1R: Tensor, sin_T1R: Tensor) -> Tensor:
    num_pairs = cos_T1R.shape[-1]
    out_THd = x_THd.clone(memory_format=torch.contiguous_format)
    pairs = x_THd[..., : 2 * num_pairs].float()
    others = pairs.roll(num_pairs, -1)  # each beside the one it is paired with
    out_THd[..., : 2 * num_pairs] = pairs * torch.cat([cos_T1R, cos_T1R], -1) + others * torch.cat([-sin_T1R, sin_T1R], -1)
    return out_THd


class _SquaredReLU(torch.autograd.Function):
    """relu(x)^2 with gradient 2 relu(x). Overwrites x with relu(x) and keeps only that, where autograd would keep both."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        kept = F.relu_(x)
        ctx.save_for_backward(kept)
        return kept.square()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (kept,) = ctx.saved_tensors
        return torch.addcmul(kept.new_zeros(()), kept, grads[0], value=2)


class Attention(nn.Module):
    """Projections of grouped-query attention. Rows of `qkv`: all queries, then all keys, then all values."""

    def __init__(self, config: ModelConfig, block: BlockConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = block.num_heads, block.num_kv_heads, block.head_dim
        rows = (block.num_heads + 2 * block.num_kv_heads) * block.head_dim
        self.qkv = Linear(config.hidden_size, rows, bias=config.parts.qkv_bias)
        self.output = Linear(block.num_heads * block.head_dim, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(block.head_dim, config.norm_eps) if config.parts.qk_norm else None
        self.k_norm = RMSNorm(block.head_dim, config.norm_eps) if config.parts.qk_norm else None

    def heads(self, qkv_TN: Tensor) -> Tensor:
        """Queries, keys and values [T, H + 2K, d] of their product, before the rotation."""
        qkv = qkv_TN.view(-1, self.num_heads + 2 * self.num_kv_heads, self.head_dim)
        if self.q_norm is None or self.k_norm is None:
            return qkv
        q_THd, k_TKd, v_TKd = qkv.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        return torch.cat([self.q_norm(q_THd), self.k_norm(k_TKd), v_TKd], dim=1)

    def forward(self, x_TD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [T, H, d], keys and values [T, K, d]; queries and keys ready for attention."""
        heads, kv_heads = self.num_heads, self.num_kv_heads
        qkv = self.qkv(x_TD).view(-1, heads + 2 * kv_heads, self.head_dim)
        if self.q_norm is None or self.k_norm is None:
            qk, v_TKd = qkv.split([heads + kv_heads, kv_heads], dim=1)
            q_THd, k_TKd = rotate(qk, cos_TR, sin_TR).split([heads, kv_heads], dim=1)
            return q_THd, k_TKd, v_TKd
        q_THd, k_TKd, v_TKd = qkv.split([heads, kv_heads, kv_heads], dim=1)
        return rotate(self.q_norm(q_THd), cos_TR, sin_TR), rotate(self.k_norm(k_TKd), cos_TR, sin_TR), v_TKd


class MLP(nn.Module):
    """down(relu(up x)^2), or down(silu(gate x) * up x) in the gated families."""

    def __init__(self, config: ModelConfig, block: BlockConfig) -> None:
        super().__init__()
        hidden, ffn = config.hidden_size, block.ffn_size
        self.gate = Linear(hidden, ffn, bias=False) if config.parts.gated_silu else None
        self.up = Linear(hidden, ffn, bias=False)
        self.down = Linear(ffn, hidden, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        up_TF = self.up(x_TD)
        if self.gate is None:
            return self.down(_SquaredReLU.apply(up_TF))
        return self.down(F.silu(self.gate(x_TD)) * up_TF)


class Block(nn.Module):
    """x + Attention(norm(x)), then x + MLP(norm(x)). Either half may be absent.

    `qkv` and `finish` are the halves around attention itself, so that a KV cache can stand between them.
    """

    def __init__(self, config: ModelConfig, block: BlockConfig) -> None:
        super().__init__()
        self.config = block
        self.attention_norm = _norm(config) if block.has_attention else None
        self.attention = Attention(config, block) if block.has_attention else None
        self.mlp_norm = _norm(config) if block.has_mlp else None
        self.mlp = MLP(config, block) if block.has_mlp else None

    def qkv(self, x_TD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Norm, projection and rotation: queries [T, H, d], keys [T, K, d], values [T, K, d]."""
        assert self.attention is not None and self.attention_norm is not None
        return self.attention(self.attention_norm(x_TD), cos_TR, sin_TR)

    def finish(self, x_TD: Tensor, attended_THd: Tensor | None) -> Tensor:
        """Add the projected attention output (None in a layer without attention) and the MLP to x_TD."""
        if attended_THd is not None:
            assert self.attention is not None
            x_TD = x_TD + self.attention.output(attended_THd.flatten(1))
        if self.mlp is not None and self.mlp_norm is not None:
            x_TD = x_TD + self.mlp(self.mlp_norm(x_TD))
        return x_TD

    def forward(self, x_TD: Tensor, cos_TR: Tensor, sin_TR: Tensor, shape: PackedShape) -> Tensor:
        if self.attention is None:
            return self.finish(x_TD, None)
        return self.finish(x_TD, varlen_attention(*self.qkv(x_TD, cos_TR, sin_TR), shape))


class Transformer(nn.Module):
    """A decoder without batch axis: token ids [T] of packed documents in, states [T, D] or logits [T, V] out.

    New weights are drawn with seed 0 (except on the meta device); call `init_weights` for another seed.
    `compute_dtype` is the type of all activations, whatever the type of the parameters.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = torch.float32
        self.checkpoint_activations = False  # a block's are computed again in the backward pass, only its input is kept
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.blocks = nn.ModuleList(Block(config, block) for block in config.blocks)
        self.final_norm = _norm(config)
        size, vocabulary = config.hidden_size, config.vocab_size
        self.lm_head = None if config.tie_embeddings else Linear(size, vocabulary, bias=False)
        if not self.embedding.is_meta:
            self.init_weights(0)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Matrices and embeddings ~ N(0, init_std); attention outputs and MLP downs init_std / sqrt(2 L).

        Norm gains start at an effective 1, biases at 0 (Megatron's scaled initialisation, as in the published
        Nemotron recipes).
        """
        generator = torch.Generator(self.embedding.device).manual_seed(seed)
        std = self.config.init_std
        residual_std = std / math.sqrt(2 * max(1, self.config.num_layers))
        for name, parameter in self.named_parameters():
            if name.endswith(("attention.output.weight", "mlp.down.weight")):
                parameter.normal_(0.0, residual_std, generator=generator)
            elif parameter.ndim == 2:
                parameter.normal_(0.0, std, generator=generator)
            else:
                parameter.zero_()
        for module in self.modules():
            if isinstance(module, RMSNorm):
                module.weight.fill_(1.0)

    def embed(self, ids_T: Tensor) -> Tensor:
        """Token embeddings [T, D] in compute_dtype."""
        return F.embedding(ids_T, self.embedding).to(self.compute_dtype)

    def rope(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [T, R] of the rotary angles, in fp32."""
        inverse_R = _inverse_frequencies(self.config).to(positions_T.device)
        angles_TR = positions_T.float()[:, None] * inverse_R
        return angles_TR.cos(), angles_TR.sin()

    def hidden(self, ids_T: Tensor, shape: PackedShape) -> Tensor:
        """States [T, D] after the final norm."""
        assert ids_T.shape == shape.positions_T.shape, "the packed shape must describe these tokens"
        cos_TR, sin_TR = self.rope(shape.positions_T)
        x_TD = self.embed(ids_T)
        for block in self.blocks:
            if self.checkpoint_activations and torch.is_grad_enabled():
                # nothing in a block is random, so there is no state to keep
                x_TD = checkpoint(block, x_TD, cos_TR, sin_TR, shape, use_reentrant=False, preserve_rng_state=False)
            else:
                x_TD = block(x_TD, cos_TR, sin_TR, shape)
        return self.final_norm(x_TD)

    def unembedding(self) -> Tensor:
        """The output matrix [V, D] (the embedding itself where they are tied)."""
        return self.embedding if self.lm_head is None else self.lm_head.weight

    def logits(self, h: Tensor) -> Tensor:
        """Logits (.., V) of states (.., D)."""
        return F.linear(h, self.unembedding().to(h.dtype))

    def forward(self, ids_T: Tensor, shape: PackedShape) -> Tensor:
        """Logits [T, V]. Training uses `hidden` and a chunked loss instead, which never holds them all."""
        return self.logits(self.hidden(ids_T, shape))


def _inverse_frequencies(config: ModelConfig) -> Tensor:
    exponents_R = torch.arange(0, config.rotary_dims, 2, dtype=torch.float32) / max(1, config.rotary_dims)
    inverse_R = 1.0 / (config.rope_theta**exponents_R)
    scaling = config.rope_scaling
    if scaling is None:
        return inverse_R
    # Llama 3.1: short wavelengths stay, long ones are slowed by `factor`, and between the two limits the
    # share of each changes linearly in original_max_positions / wavelength.
    turns_R = scaling.original_max_positions * inverse_R / (2 * math.pi)
    kept_R = (turns_R - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept_R = kept_R.clamp(0.0, 1.0)
    return inverse_R * (kept_R + (1.0 - kept_R) / scaling.factor)
