"""Hugging Face's names of tensors, and the rows of our parameters that they stand for."""

import torch
from torch import Tensor, nn

from gristmill.model.guard import GuardModel
from gristmill.model.layers import Linear
from gristmill.model.reward import RewardModel
from gristmill.model.transformer import Attention, Block, Transformer

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
Rows = list[Tensor]  # a tensor as views of a parameter's rows, end to end: our rows of queries, keys and values are in another order


def joined(rows: Rows) -> Tensor:
    """A tensor in one piece: a view where it is one in the model, else a copy."""
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def hf_tensors(model: Transformer) -> dict[str, Tensor]:
    """Hugging Face names to the model's tensors: views of parameters, but copies of queries, keys and values."""
    return {name: joined(rows) for name, rows in hf_rows(model).items()}


def hf_rows(model: Transformer) -> dict[str, Rows]:
    """Hugging Face names to views of the model's parameters; writing into a view changes the model."""
    named = {EMBEDDING: [model.embedding.detach()]}
    for number, block in model.blocks.items():
        assert isinstance(block, Block)
        named.update({f"model.layers.{number}.{name}": rows for name, rows in block_rows(block).items()})
    named.update(_vectors("model.norm", model.final_norm))
    if model.lm_head is not None:
        named[OUTPUT] = [model.lm_head.weight.detach()]
    return named


def block_rows(block: Block) -> dict[str, Rows]:
    """Names within a layer to views of a block's parameters."""
    named: dict[str, Rows] = {}
    attention, mlp = block.attention, block.mlp
    if attention is not None:
        named.update(_vectors("input_layernorm", block.attention_norm))
        for kind, (stored,) in _parts("", attention.qkv).items():
            named |= {f"self_attn.{name}_proj{kind}": rows for name, rows in _projections(attention, stored, block.fused).items()}
        named |= _parts("self_attn.o_proj", attention.output)
        named |= _vectors("self_attn.q_norm", attention.q_norm) | _vectors("self_attn.k_norm", attention.k_norm)
        named |= _vectors("post_attention_layernorm", block.attention_post_norm)
    if mlp is not None:
        has_post_norm = block.mlp_post_norm is not None
        named |= _vectors("pre_feedforward_layernorm" if has_post_norm else "post_attention_layernorm", block.mlp_norm)
        for name, linear in {"gate_up": mlp.gate_up, "gate": mlp.gate, "up": mlp.up, "down": mlp.down}.items():
            named |= {} if linear is None else _parts(f"mlp.{name}_proj", linear)
        named |= _vectors("post_feedforward_layernorm", block.mlp_post_norm)
    return named


def _projections(attention: Attention, stored: Tensor, fused: bool) -> dict[str, Rows]:
    """Rows of `qkv` as a file holds them: all queries, all keys, all values."""
    parts = {name: list(view) for name, view in zip("qkv", attention.parts(stored), strict=True)}
    return {"qkv": [rows for part in parts.values() for rows in part]} if fused else parts


def _parts(name: str, linear: Linear) -> dict[str, Rows]:
    """Weight of a linear layer, and its bias if it has one."""
    weight = {f"{name}.weight": [linear.weight.detach()]}
    return weight if linear.bias is None else weight | {f"{name}.bias": [linear.bias.detach()]}


def _vectors(prefix: str, norm: nn.Module | None) -> dict[str, Rows]:
    return {} if norm is None else {f"{prefix}.{name}": [parameter.detach()] for name, parameter in norm.named_parameters()}


def reward_rows(model: RewardModel) -> dict[str, Rows]:
    """As `hf_rows`, of a reward model with its head."""
    return hf_rows(model.backbone) | _parts("reward_head", model.head)


def guard_rows(model: GuardModel) -> dict[str, Rows]:
    """As `hf_rows`, of a guard model with its head."""
    return hf_rows(model.backbone) | _parts("guard_head", model.head)
