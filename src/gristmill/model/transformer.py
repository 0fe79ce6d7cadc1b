"""Decoder-only transformer of all families (config.FAMILIES), on packed token-major activations.

Shapes: T tokens of all documents, D hidden size, H query heads, K key-value heads, d head_dim, R pairs of
rotated dimensions (half of `rotary_dims`), F ffn size, V vocabulary.

Parameters may be fp32 while activations are bf16: every layer casts its weight to the type of its input, so
`Transformer.compute_dtype` alone decides. Statistics of norms and rotary angles are always fp32.
"""

import hashlib
import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from gristmill.core.errors import InputError
from gristmill.model import compiled_blocks, fused
from gristmill.model.attention import ScoreMod, compiled_attention, group_heads, split_heads, varlen_attention
from gristmill.model.config import BlockConfig, ModelConfig
from gristmill.model.layers import MLP, Linear, RMSNorm, add_norm, make_norm
from gristmill.model.packed import PackedShape, filled_length
from gristmill.model.rotary import Angles, inverse_frequencies, rotate_heads

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}  # types that a model computes in, by their names in recipes
# Those of training: with fp8 the products of layers are in 8 bits (`model.fp8`), and what lies between them in bf16.
TRAINING_PRECISIONS = PRECISIONS | {"fp8": torch.bfloat16, "fp8_tensorwise": torch.bfloat16}


class Sharding(Protocol):
    """Sharding of a decoder over processes (`parallel.tensor`): they have other parts of its matrices and, between these, other tokens."""

    def embed(self, ids_T: Tensor, weight_VD: Tensor, dtype: torch.dtype) -> Tensor:
        """Embeddings of own tokens."""
        ...

    def rows(self, x_TD: Tensor, rows_S: Tensor) -> Tensor:
        """Own share of some rows of all."""
        ...

    def whole(self, x_TD: Tensor, num_rows: int) -> Tensor:
        """All rows."""
        ...

    def vocabulary(self, weight_VD: Tensor) -> Any:
        """Own rows of the output matrix, as the losses take them."""
        ...


class Context(Protocol):
    """Sharding of a decoder's tokens over processes (`parallel.context`): each computes its own, and sees the keys of all."""

    def tokens(self, ids_T: Tensor, shape: PackedShape, rows_S: Tensor | None) -> tuple[Tensor, PackedShape, Tensor | None]:
        """Own tokens, their shape, and which of them are among some rows."""
        ...

    def whole(self, h_PD: Tensor, shape: PackedShape, rows_S: Tensor | None) -> Tensor:
        """States of all tokens, or of some rows."""
        ...

    def vocabulary(self, weight: Any) -> Any:
        """The output matrix, or its own rows, as the losses take it."""
        ...


class Attention(nn.Module):
    """Projections of grouped-query attention. Rows of `qkv` are grouped by key-value head: its queries, its key, its value.

    So any even cut of the rows leaves whole groups. `num_heads` and `num_kv_heads` are those whose rows are here.
    """

    def __init__(self, config: ModelConfig, block: BlockConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = block.num_heads, block.num_kv_heads, block.head_dim
        rows = (block.num_heads + 2 * block.num_kv_heads) * block.head_dim
        self.qkv = Linear(config.hidden_size, rows, bias=config.parts.qkv_bias or config.attention_bias)
        self.output = Linear(block.num_heads * block.head_dim, config.hidden_size, bias=config.attention_bias)
        self.norms_whole = config.parts.qk_norm == "projection"
        self.q_norm: nn.Module | None = None
        self.k_norm: nn.Module | None = None
        if config.parts.qk_norm:
            heads = (1, 1) if config.parts.qk_norm == "head" else (block.num_heads, block.num_kv_heads)
            self.q_norm, self.k_norm = (make_norm(config, count * block.head_dim) for count in heads)

    def heads(self, qkv_TN: Tensor) -> Tensor:
        """Queries, keys and values [T, H + 2K, d] of their product, grouped by key-value head, before the rotation."""
        qkv = qkv_TN.view(-1, self.num_heads + 2 * self.num_kv_heads, self.head_dim)
        if self.q_norm is None or self.k_norm is None:
            return qkv
        q_THd, k_TKd, v_TKd = split_heads(qkv, self.num_kv_heads)
        return group_heads(self._normed(q_THd, self.q_norm), self._normed(k_TKd, self.k_norm), v_TKd)

    def parts(self, rows_X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views of the queries, keys and values [K, rows of each, ...] among rows of `qkv`, as Hugging Face's folders tell them apart."""
        sizes = (self.num_heads // self.num_kv_heads * self.head_dim, self.head_dim, self.head_dim)
        q, k, v = rows_X.unflatten(0, (self.num_kv_heads, -1)).split(sizes, dim=1)
        return q, k, v

    def _normed(self, x_TXd: Tensor, norm: nn.Module) -> Tensor:
        return norm(x_TXd.flatten(1)).view_as(x_TXd) if self.norms_whole else norm(x_TXd)

    def forward(self, x_TD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [T, H, d], keys and values [T, K, d]; queries and keys ready for attention."""
        return rotate_heads(self.heads(self.qkv(x_TD)), self.num_kv_heads, (cos_TR, sin_TR))


class Block(nn.Module):
    """x + Attention(norm(x)), then x + MLP(norm(x)). Either half may be absent; some families norm what a half gives, or scale it.

    `qkv` and `finish` are the halves around attention itself, so that a KV cache can stand between them.
    """

    def __init__(self, config: ModelConfig, block: BlockConfig) -> None:
        super().__init__()
        self.config, self.residual_multiplier, self.fused = block, config.residual_multiplier, config.parts.fused
        self.mod = ScoreMod(block.window, config.attention_scale, config.attention_soft_cap)
        self.sharding: Sharding | None = None
        pre, post = config.parts.pre_norm, config.parts.post_norm
        self.attention_norm = make_norm(config) if block.has_attention and pre else None
        self.attention = Attention(config, block) if block.has_attention else None
        self.attention_post_norm = make_norm(config) if block.has_attention and post else None
        self.mlp_norm = make_norm(config) if block.has_mlp and pre else None
        self.mlp = MLP(config, block) if block.has_mlp else None
        self.mlp_post_norm = make_norm(config) if block.has_mlp and post else None

    def is_plain(self) -> bool:
        """Whether it is norm, attention, norm and MLP, or one of the halves, with nothing between or around, as `compiled_blocks` computes
        them.
        """
        halves = (self.attention, self.attention_norm), (self.mlp, self.mlp_norm)
        if type(self) is not Block or any((half is None) != (norm is None) for half, norm in halves):
            return False
        linears: list[Linear | None] = [] if self.attention is None else [self.attention.qkv, self.attention.output]
        linears += [] if self.mlp is None else [self.mlp.gate, self.mlp.up, self.mlp.down]
        bare = [type(one) is Linear and one.bias is None and one.product is None for one in linears if one is not None]
        if self.fused or not all(bare) or any(part._forward_hooks or part._forward_pre_hooks for part in self.modules()):
            return False
        norms = (self.attention_post_norm, self.mlp_post_norm, None if self.attention is None else self.attention.q_norm)
        return norms == (None, None, None) and self.residual_multiplier == 1

    def qkv(self, x_TD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Norm, projection and rotation: queries [T, H, d], keys [T, K, d], values [T, K, d]."""
        assert self.attention is not None
        return self.attention(x_TD if self.attention_norm is None else self.attention_norm(x_TD), cos_TR, sin_TR)

    def finish(self, x_TD: Tensor, attended_THd: Tensor | None) -> Tensor:
        """Add the projected attention output (None in a layer without attention) and the MLP to x_TD."""
        if attended_THd is not None:
            assert self.attention is not None
            delta_TD = self._added(self.attention.output(attended_THd.flatten(1)), self.attention_post_norm)
            if self.mlp is None:
                return x_TD + delta_TD
            x_TD, normed_TD = add_norm(x_TD, delta_TD, self.mlp_norm)
            return x_TD + self._added(self.mlp(normed_TD), self.mlp_post_norm)
        if self.mlp is not None:
            x_TD = x_TD + self._added(self.mlp(x_TD if self.mlp_norm is None else self.mlp_norm(x_TD)), self.mlp_post_norm)
        return x_TD

    def _added(self, out_TD: Tensor, norm: nn.Module | None) -> Tensor:
        out_TD = out_TD if norm is None else norm(out_TD)
        return out_TD if self.residual_multiplier == 1 else out_TD * self.residual_multiplier

    def forward(self, x_TD: Tensor, cos_TR: Tensor, sin_TR: Tensor, shape: PackedShape, rows_S: Tensor | None = None) -> Tensor:
        """States of all tokens, or of these alone; of a decoder that is sharded, of own tokens among them."""
        if self.attention is None:
            return self.finish(x_TD if rows_S is None else self._rows(x_TD, rows_S), None)
        qkv_TXd = self.attention.heads(self.attention.qkv(x_TD if self.attention_norm is None else self.attention_norm(x_TD)))
        if len(qkv_TXd) > shape.num_tokens:  # padding, see `Sharding`
            qkv_TXd = qkv_TXd[: shape.num_tokens]
        attended_THd = None
        if shape.gather is None:
            attended_THd = compiled_attention(qkv_TXd, shape, num_heads=self.attention.num_heads, angles=(cos_TR, sin_TR), mod=self.mod)
        if attended_THd is None:
            q_THd, *kv = rotate_heads(qkv_TXd, self.attention.num_kv_heads, (cos_TR, sin_TR))
            k_TKd, v_TKd = kv if shape.gather is None else shape.gather(kv)
            attended_THd = varlen_attention(q_THd, k_TKd, v_TKd, shape, mod=self.mod)
        if rows_S is not None:
            x_TD, attended_THd = self._rows(x_TD, rows_S), attended_THd[rows_S]
        return self.finish(x_TD, attended_THd)

    def _rows(self, x_TD: Tensor, rows_S: Tensor) -> Tensor:
        return x_TD[rows_S] if self.sharding is None else self.sharding.rows(x_TD, rows_S)


class Transformer(nn.Module):
    """A decoder without batch axis: token ids [T] of packed documents in, states [T, D] or logits [T, V] out.

    New weights are drawn with seed 0 (except on the meta device); call `init_weights` for another seed.
    `compute_dtype` is the type of all activations, whatever the type of the parameters.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = torch.float32
        self.sharding: Sharding | None = None
        self.context: Context | None = None
        self.after_blocks: Callable[[], None] | None = None  # called where the blocks' forward pass ends
        # A block's are computed again in the backward pass: only its input is kept, or with "selective" also what its products gave.
        self.checkpoint_activations: bool | str = False
        self.tiles: compiled_blocks.Tiles | None = None  # of weights, see `compiled_blocks.unchanged`
        self.incoming_TD: Tensor | None = None  # what blocks of another process have made, in place of embeddings (`parallel.pipeline`)
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.blocks = nn.ModuleDict({str(number): Block(config, block) for number, block in enumerate(config.blocks)})
        self.final_norm = make_norm(config)
        size, vocabulary = config.hidden_size, config.vocab_size
        self.lm_head = None if config.tie_embeddings else Linear(size, vocabulary, bias=False)
        if not self.embedding.is_meta:
            self.init_weights(0)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Matrices and embeddings ~ N(0, init_std); attention outputs and MLP downs init_std / sqrt(2 L).

        Norm gains start at an effective 1, biases at 0 (Megatron's scaled initialisation, as in the published
        Nemotron recipes). Each parameter has a generator of its own, so that none depends on which others are here.
        """
        std = self.config.init_std
        residual_std = std / math.sqrt(2 * max(1, self.config.num_layers))
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                scaled = name.endswith(("attention.output.weight", "mlp.down.weight"))
                drawn = int.from_bytes(hashlib.blake2b(f"{seed} {name}".encode(), digest_size=7).digest(), "little")
                generator = torch.Generator(parameter.device).manual_seed(drawn)
                parameter.normal_(0.0, residual_std if scaled else std, generator=generator)
            else:
                parameter.zero_()
        for module in self.modules():
            if isinstance(module, RMSNorm) and not module.zero_centred:
                module.weight.fill_(1.0)

    def embed(self, ids_T: Tensor) -> Tensor:
        """Token embeddings [T, D] in compute_dtype."""
        if self.sharding is not None:
            return scale_embeddings(self.sharding.embed(ids_T, self.embedding, self.compute_dtype), self.config)
        rows_TD = fused.embedding(ids_T, self.embedding) if fused.accumulates(self.embedding) else F.embedding(ids_T, self.embedding)
        return scale_embeddings(rows_TD.to(self.compute_dtype), self.config)

    def rope(self, positions_T: Tensor) -> dict[str, Angles]:
        """Cosines and sines [T, R] of the rotary angles, in fp32, of each kind of layer (`BlockConfig.rope`)."""
        config = self.config
        given = {"global": (config.rope_theta, config.rope_scaling), "local": (config.local_rope_theta, config.local_rope_scaling)}
        angles: dict[str, Angles] = {}
        for kind in dict.fromkeys(block.rope for block in config.blocks):
            if kind == "none":
                angles[kind] = (positions_T.new_empty(len(positions_T), 0, dtype=torch.float32),) * 2
                continue
            inverse_R, factor = inverse_frequencies(config, *given[kind])
            angles_TR = positions_T.float()[:, None] * inverse_R.to(positions_T.device)
            cos_TR, sin_TR = angles_TR.cos(), angles_TR.sin()
            angles[kind] = (cos_TR, sin_TR) if factor == 1 else (cos_TR * factor, sin_TR * factor)
        return angles

    def hidden(self, ids_T: Tensor, shape: PackedShape, rows_S: Tensor | None = None, *, layers: list[Tensor] | None = None) -> Tensor:
        """States [T, D] after the final norm, divided by `logits_scaling`.

        Args:
            rows_S: tokens whose states alone are needed, in this order: [S, D]. The last layer computes no others.
            layers: a list that gets the states behind every layer, those of the last as it computes them.

        Raises:
            InputError: a document beyond the positions where the angles of all its tokens would depend on its length.
        """
        num_rows = None if rows_S is None else len(rows_S)
        if rows_S is not None and self.compute_dtype != torch.float32:  # see filled_length
            rows_S = F.pad(rows_S, (0, filled_length(len(rows_S)) - len(rows_S)))
        x_TD = self.states(ids_T, shape, rows_S, layers=layers)
        if self.after_blocks is not None:
            self.after_blocks()
        h_TD = self.final_norm(x_TD)
        own_S, num_own = rows_S, len(ids_T)
        if self.context is not None:
            own_ids, _, own_S = self.context.tokens(ids_T, shape, rows_S)
            num_own = len(own_ids)
        if self.sharding is not None:
            h_TD = self.sharding.whole(h_TD, num_own if own_S is None else len(own_S))
        if self.context is not None:
            h_TD = self.context.whole(h_TD, shape, rows_S)
        if num_rows is not None and num_rows < len(h_TD):
            h_TD = h_TD[:num_rows]
        return h_TD if self.config.logits_scaling == 1 else h_TD / self.config.logits_scaling

    def states(self, ids_T: Tensor, shape: PackedShape, rows_S: Tensor | None = None, *, layers: list[Tensor] | None = None) -> Tensor:
        """States [T, D] behind the blocks that are here, before the final norm; of `rows_S` alone behind the last block of all.

        Args and errors as of `hidden`.
        """
        assert ids_T.shape == shape.positions_T.shape, "the packed shape must describe these tokens"
        check_length(self.config, shape)
        if self.context is not None:
            ids_T, shape, rows_S = self.context.tokens(ids_T, shape, rows_S)
        angles = self.rope(shape.positions_T)
        x_TD = self.embed(ids_T) if self.incoming_TD is None else self.incoming_TD
        if (compiled_SD := compiled_blocks.run(self, x_TD, angles, shape, rows_S, layers)) is not None:
            return compiled_SD
        for number, block in self.blocks.items():
            layer = self.config.blocks[int(number)]
            given = (x_TD, *angles[layer.rope], shape, rows_S if int(number) == self.config.num_layers - 1 else None)
            if self.checkpoint_activations and torch.is_grad_enabled():
                # nothing in a block is random, so there is no state to keep
                contexts = _keeping_products if self.checkpoint_activations == "selective" else noop_context_fn
                x_TD = checkpoint(block, *given, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
            else:
                x_TD = block(*given)
            if layers is not None:
                layers.append(x_TD)
        return x_TD

    def unembedding(self) -> Any:
        """The output matrix [V, D] (the embedding itself where they are tied); of a decoder that is sharded, own rows for the losses."""
        weight_VD = self.embedding if self.lm_head is None else self.lm_head.weight
        weight = weight_VD if self.sharding is None else self.sharding.vocabulary(weight_VD)
        return weight if self.context is None else self.context.vocabulary(weight)

    def logits(self, h: Tensor) -> Tensor:
        """Logits (.., V) of states (.., D)."""
        return soft_cap(F.linear(h, self.unembedding().to(h.dtype)), self.config.logits_soft_cap)

    def forward(self, ids_T: Tensor, shape: PackedShape) -> Tensor:
        """Logits [T, V]. Training uses `hidden` and a chunked loss instead, which never holds them all."""
        return self.logits(self.hidden(ids_T, shape))


def _keeping_products() -> Any:
    """Contexts of selective activation checkpointing: norms, activations and attention are computed again, products are kept."""
    aten = torch.ops.aten
    return create_selective_checkpoint_contexts([aten.mm.default, aten.addmm.default, aten._scaled_mm.default])


def soft_cap(x: Tensor, cap: float | None) -> Tensor:
    """cap * tanh(x / cap); x itself without a cap."""
    return x if cap is None else cap * torch.tanh(x / cap)


def scale_embeddings(x_TD: Tensor, config: ModelConfig) -> Tensor:
    """Embeddings times the model's factor, which is rounded to their type first, as in training of the published models."""
    factor = config.hidden_size**0.5 if config.parts.scaled_embedding else config.embedding_multiplier
    return x_TD if factor == 1 else x_TD * float(torch.tensor(factor, dtype=x_TD.dtype))


def check_length(config: ModelConfig, shape: PackedShape) -> None:
    """Raise InputError for a document whose length would change the angles of all its tokens."""
    if shape.max_length <= config.max_positions:
        return
    for scaling in (config.rope_scaling, config.local_rope_scaling):
        if scaling is not None and scaling.depends_on_length:
            raise InputError(
                f"Give texts of at most {config.max_positions} tokens, not {shape.max_length}: beyond, rope scaling of the kind "
                f"{scaling.kind} rotates every token by an angle that depends on the length of the text, which neither a cache nor "
                "shared prompts allow."
            )
