"""Exports of a model whose layers differ, for programs that cannot read our own folders.

padded: the uniform shape of its family, filled with zeros and repeated heads. The same function, at the speed of the uniform shape.
nemotron-nas: the format of Llama-Nemotron (DeciLM), for children of the Llama family. vLLM and llama.cpp read it, with limits of theirs.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from gristmill.core.errors import InputError
from gristmill.model.config import BlockConfig, ModelConfig
from gristmill.model.hf import load_model, saved_as
from gristmill.model.hf_config import to_hf
from gristmill.model.hf_save import save_folder, save_model
from gristmill.model.hf_tensors import hf_rows
from gristmill.model.transformer import Attention, Block, Transformer

ExportFormat = Literal["padded", "nemotron-nas"]
NAS_MULTIPLE = 256  # to which its readers round widths up


def export_folder(folder: Path, out: Path, to: ExportFormat) -> dict[str, Any]:
    """Write a model folder in another form.

    Raises:
        InputError: the model is quantized, or the form cannot hold it.
    """
    if out.resolve() == folder.resolve():
        raise InputError(f"Choose another --out than the model itself: {folder} would be replaced.")
    if saved_as(folder):
        raise InputError(f"Give the model as it was before it was quantized: {folder} is quantized.")
    model, tokenizer = load_model(folder)
    parameters = sum(p.numel() for p in model.parameters())
    if to == "padded":
        model = padded(model)
        save_model(model, tokenizer, out)
    else:
        keys = nas_keys(model.config)
        tensors = hf_rows(model)
        save_folder(tensors, model.config, keys, tokenizer=tokenizer, folder=out)
    written = sum(p.numel() for p in model.parameters())
    return {"model": str(out), "format": to, "parameters": parameters, "parameters_written": written}


# ---- zero padding ----


def padded_config(config: ModelConfig) -> ModelConfig:
    """The uniform configuration that holds a model's layers.

    Raises:
        InputError: layers differ in what cannot be padded.
    """
    attention = [block for block in config.blocks if block.has_attention]
    if not attention or len({block.num_heads for block in attention}) > 1:
        raise InputError("Layers can be padded where some have attention, all with the same number of query heads.")
    heads, kv_heads = attention[0].num_heads, math.lcm(*(block.num_kv_heads for block in attention))
    width = max(block.ffn_size for block in config.blocks)
    if heads % kv_heads or not width:
        raise InputError(f"Layers cannot be padded to one shape: {heads} query heads, {kv_heads} key-value heads, MLPs of {width}.")

    def uniform(block: BlockConfig) -> BlockConfig:
        return replace(block, num_heads=heads, num_kv_heads=kv_heads, head_dim=config.head_dim, ffn_size=width)

    found = replace(config, blocks=tuple(uniform(block) for block in config.blocks))
    if "gristmill" in to_hf(found):
        raise InputError("The windows of these layers are none that the family's config.json can say.")
    return found


@torch.no_grad()
def padded(model: Transformer) -> Transformer:
    """The same function in the uniform shape of its family: no speed is gained from what is smaller.

    Raises:
        InputError: layers differ in what cannot be padded.
    """
    found = Transformer(padded_config(model.config))
    for name, parameter in found.named_parameters():
        if not name.startswith("blocks."):
            parameter.copy_(model.get_parameter(name))
    for number, block in model.blocks.items():
        wide = found.blocks[number]
        assert isinstance(block, Block) and isinstance(wide, Block)
        for parameter in wide.parameters():
            parameter.zero_()  # a norm of zeros gives zeros, or what zero matrices multiply
        _copy(_padded_attention(block, wide), wide)
        _copy(_padded_mlp(block), wide)
    return found


def _copy(tensors: dict[str, Tensor], wide: Block) -> None:
    """Copy into the first rows and columns of parameters."""
    for name, tensor in tensors.items():
        target = wide.get_parameter(name)
        target[tuple(slice(size) for size in tensor.shape)] = tensor


def _padded_attention(block: Block, wide: Block) -> dict[str, Tensor]:
    """Attention with each key-value head repeated, so that queries keep their order."""
    attention, target = block.attention, wide.attention
    if attention is None:
        return {}
    assert target is not None
    times = target.num_kv_heads // attention.num_kv_heads
    tensors = {name: tensor for name, tensor in block.state_dict().items() if name.startswith("attention")}
    for name in ("weight", "bias"):
        if (rows_X := getattr(attention.qkv, name)) is not None:
            tensors[f"attention.qkv.{name}"] = _repeated(attention, rows_X, target.num_kv_heads, times)
    if attention.norms_whole and attention.k_norm is not None:
        gain = tensors["attention.k_norm.weight"].view(attention.num_kv_heads, -1)
        tensors["attention.k_norm.weight"] = gain.repeat_interleave(times, 0).flatten()
    return tensors


def _repeated(attention: Attention, rows_X: Tensor, kv_heads: int, times: int) -> Tensor:
    q, k, v = attention.parts(rows_X)
    q = q.reshape(kv_heads, -1, *q.shape[2:])
    return torch.cat([q, k.repeat_interleave(times, 0), v.repeat_interleave(times, 0)], dim=1).flatten(0, 1)


def _padded_mlp(block: Block) -> dict[str, Tensor]:
    tensors = {name: tensor for name, tensor in block.state_dict().items() if name.startswith("mlp")}
    if block.mlp is None or block.mlp.gate_up is None:
        return tensors
    raise InputError("A family with gate and up in one matrix (Phi-3) is not padded.")


# ---- DeciLM ----


def nas_keys(config: ModelConfig) -> dict[str, Any]:
    """Keys of config.json by which vLLM and llama.cpp read a Llama whose layers differ.

    Raises:
        InputError: what these readers cannot run.
    """
    blocks, scaling = config.blocks, config.rope_scaling
    reasons = {
        "only children of the Llama family": config.family != "llama",
        "attention and MLP without biases": config.attention_bias or config.mlp_bias,
        "rope_scaling none or llama3": scaling is not None and scaling.kind != "llama3",
        "a first layer with attention": not blocks[0].has_attention,
        "an MLP in every layer that has attention": any(block.has_attention and not block.has_mlp for block in blocks),
        "the same number of query heads everywhere": len({block.num_heads for block in blocks if block.has_attention}) > 1,
        f"MLPs of multiples of {NAS_MULTIPLE} channels (space.width_multiple)": any(block.ffn_size % NAS_MULTIPLE for block in blocks),
    }
    if missing := [what for what, wrong in reasons.items() if wrong]:
        raise InputError(f"The format nemotron-nas takes {missing[0]}: write this model with --to padded.")
    heads = blocks[0].num_heads
    if heads * config.head_dim != config.hidden_size:
        raise InputError("The format nemotron-nas takes heads that make up the hidden size: write this model with --to padded.")
    return {
        "architectures": ["DeciLMForCausalLM"],
        "model_type": "nemotron-nas",
        "num_attention_heads": heads,
        "num_key_value_heads": None,
        "intermediate_size": None,
        "block_configs": [_nas_block(config, block) for block in blocks],
        # for readers to come: transformers' own keys of layers that differ
        "per_layer_config": {str(number): _layer_keys(block) for number, block in enumerate(blocks)},
        "gristmill": None,
    }


def _nas_block(config: ModelConfig, block: BlockConfig) -> dict[str, Any]:
    group = block.num_heads // block.num_kv_heads if block.has_attention else None
    attention = {"n_heads_in_group": group, "no_op": not block.has_attention, "replace_with_linear": False}
    mult = ffn_mult(block.ffn_size, config.hidden_size) if block.has_mlp else None
    return {"attention": attention, "ffn": {"ffn_mult": mult, "no_op": not block.has_mlp, "replace_with_linear": False}}


def _layer_keys(block: BlockConfig) -> dict[str, Any]:
    skipped: Sequence[str] = [name for name, there in (("attention", block.has_attention), ("mlp", block.has_mlp)) if not there]
    sizes = {"num_key_value_heads": block.num_kv_heads} if block.has_attention else {}
    sizes |= {"intermediate_size": block.ffn_size} if block.has_mlp else {}
    return {**sizes, **({"skip": skipped} if skipped else {})}


def nas_width(mult: float, hidden_size: int) -> int:
    """Channels that a reader makes of `ffn_mult`: int(2 mult D / 3), rounded up to a multiple of 256."""
    width = int(2 * mult * hidden_size / 3)
    return -(-width // NAS_MULTIPLE) * NAS_MULTIPLE


def ffn_mult(width: int, hidden_size: int) -> float:
    """The `ffn_mult` of a width; float errors must not round it up to the next multiple."""
    mult = 1.5 * width / hidden_size
    while int(2 * mult * hidden_size / 3) > width:
        mult = math.nextafter(mult, 0.0)
    return mult
