"""Hugging Face's names of tensors, and the views of our parameters, or of row ranges of them, that they stand for."""

from torch import Tensor, nn

from gristmill.model.guard import GuardModel
from gristmill.model.reward import RewardModel
from gristmill.model.transformer import Block, Linear, Transformer

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


def hf_tensors(model: Transformer) -> dict[str, Tensor]:
    """Hugging Face names to views of the model's parameters; writing into a view changes the model."""
    named = {EMBEDDING: model.embedding.detach()}
    for index, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        named.update({f"model.layers.{index}.{name}": view for name, view in block_tensors(block).items()})
    named.update(_vectors("model.norm", model.final_norm))
    if model.lm_head is not None:
        named[OUTPUT] = model.lm_head.weight.detach()
    return named


def block_tensors(block: Block) -> dict[str, Tensor]:
    """Names within a layer to views of a block's parameters."""
    named: dict[str, Tensor] = {}
    attention, mlp = block.attention, block.mlp
    if attention is not None:
        named.update(_vectors("input_layernorm", block.attention_norm))
        rows = [heads * attention.head_dim for heads in (attention.num_heads, *(attention.num_kv_heads,) * 2)]
        for kind, merged in _parts("", attention.qkv).items():
            views = {"qkv": merged} if block.fused else dict(zip("qkv", merged.split(rows), strict=True))
            named |= {f"self_attn.{name}_proj{kind}": view for name, view in views.items()}
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


def _parts(name: str, linear: Linear) -> dict[str, Tensor]:
    """Weight of a linear layer, and its bias if it has one."""
    weight = {f"{name}.weight": linear.weight.detach()}
    return weight if linear.bias is None else weight | {f"{name}.bias": linear.bias.detach()}


def _vectors(prefix: str, norm: nn.Module | None) -> dict[str, Tensor]:
    return {} if norm is None else {f"{prefix}.{name}": parameter.detach() for name, parameter in norm.named_parameters()}


def reward_tensors(model: RewardModel) -> dict[str, Tensor]:
    """As `hf_tensors`, of a reward model with its head."""
    head = {"reward_head.weight": model.head.weight.detach(), "reward_head.bias": model.head.bias.detach()}
    return hf_tensors(model.backbone) | head


def guard_tensors(model: GuardModel) -> dict[str, Tensor]:
    """As `hf_tensors`, of a guard model with its head."""
    return hf_tensors(model.backbone) | {"guard_head.weight": model.head.weight.detach(), "guard_head.bias": model.head.bias.detach()}
