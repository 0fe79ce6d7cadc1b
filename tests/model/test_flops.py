"""Published totals, the utilisation table and memory figures of the Nemotron-4 reports."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gristmill.model.attention import has_compiled_attention
from gristmill.model.config import PRESETS, BlockConfig, ModelConfig, uniform_blocks
from gristmill.model.flops import (
    block_activation_bytes_per_token,
    embedding_parameters,
    kv_bytes_per_token,
    matrix_parameters,
    model_flops_utilisation,
    num_parameters,
    training_flops_per_token,
    weight_bytes,
)
from gristmill.model.packed import PackedShape
from gristmill.model.transformer import Transformer


@pytest.mark.parametrize(
    ("name", "embedding", "matrices", "total"),
    [
        ("nemotron4-340b", 9.437, 331.585, 341.022),
        ("nemotron4-15b", 3.146, 12.482, 15.628),
        ("minitron-4b", 1.573, 2.617, 4.190),
    ],
)
def test_published_totals_in_billions(name: str, embedding: float, matrices: float, total: float) -> None:
    config = PRESETS[name]
    counts = embedding_parameters(config), matrix_parameters(config)
    assert counts[0] / 1e9 == pytest.approx(embedding, abs=5e-4)
    assert counts[1] / 1e9 == pytest.approx(matrices, abs=5e-4)
    assert sum(counts) / 1e9 == pytest.approx(total, abs=6e-4)


LLAMA = ModelConfig("llama", 100, 32, uniform_blocks(2, 4, 2, 8, 48), 64, rotary_fraction=1.0)
VARIANTS = {
    "llama": LLAMA,
    "tied": replace(LLAMA, tie_embeddings=True),
    "qwen2": replace(LLAMA, family="qwen2"),
    "qwen3": replace(LLAMA, family="qwen3"),
    "biases": replace(LLAMA, attention_bias=True, mlp_bias=True),
    **{family: ModelConfig(family, 100, 32, uniform_blocks(2, 4, 2, 8, 48), 64) for family in ("olmo2", "phi3", "gemma2", "gemma3_text")},
    "mixed": replace(LLAMA, blocks=(BlockConfig(4, 1, 8, 48), BlockConfig(0, 0, 0, 16), BlockConfig(2, 2, 8, 0))),
}


@pytest.mark.parametrize("config", [*PRESETS.values(), *VARIANTS.values()], ids=[*PRESETS, *VARIANTS])
def test_the_formula_counts_the_module(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = Transformer(config)
    assert sum(p.numel() for p in model.parameters()) == num_parameters(config)


@pytest.mark.parametrize(
    ("name", "gpus", "batch", "seconds", "reported"),
    [
        ("nemotron4-340b", 1536, 768, 10.3, 42.4),
        ("nemotron4-340b", 3072, 1536, 10.3, 42.3),
        ("nemotron4-340b", 6144, 2304, 8.0, 41.0),
        ("nemotron4-15b", 768, 384, 0.57, 34.3),
        ("nemotron4-15b", 1536, 768, 0.58, 33.3),
        ("nemotron4-15b", 2304, 1152, 0.64, 30.5),
    ],
)
def test_utilisation_table(name: str, gpus: int, batch: int, seconds: float, reported: float) -> None:
    share = model_flops_utilisation(PRESETS[name], 4096, batch, step_seconds=seconds, num_devices=gpus)
    assert 100 * share == pytest.approx(reported, abs=0.3)


def test_memory_of_the_340b() -> None:
    config = PRESETS["nemotron4-340b"]
    assert kv_bytes_per_token(config) == 589_824
    assert kv_bytes_per_token(config) * 4096 / 2**30 == 2.25
    assert kv_bytes_per_token(config, 1) * 4096 / 2**30 == 1.125
    assert weight_bytes(config, 1) / 8 / 1e9 == pytest.approx(42.6, abs=0.05)
    assert weight_bytes(config) / 8 / 1e9 == pytest.approx(85.3, abs=0.05)


def test_layers_without_attention_cost_no_attention() -> None:
    mixed = VARIANTS["mixed"]
    assert kv_bytes_per_token(mixed) == 2 * (1 + 2) * 8 * 2
    more_per_token = training_flops_per_token(mixed, 20) - training_flops_per_token(mixed, 10)
    assert more_per_token == 12 * 10 * (4 + 2) * 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["nemotron", "llama", "qwen3"])
def test_activations_are_estimated_from_above_and_closely(family: str, dtype: torch.dtype) -> None:
    kept = []
    lengths = [200, 160, 152]
    for layers in (1, 3):
        config = ModelConfig(family, 256, 128, uniform_blocks(layers, 8, 4, 16, 384), 512, rotary_fraction=1.0, tie_embeddings=True)
        model = Transformer(config)
        model.compute_dtype = dtype
        weights = {parameter.data_ptr() for parameter in model.parameters()}
        shapes = {parameter.shape for parameter in model.blocks.parameters()}
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor, sizes: dict[int, int] = sizes, weights: set[int] = weights, shapes: set = shapes) -> Tensor:
            # casts of weights are not a token's
            if tensor.untyped_storage().data_ptr() not in weights and tensor.shape not in shapes and tensor.T.shape not in shapes:
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            states_TD = model.hidden(torch.arange(512) % 256, PackedShape.from_lengths(lengths))
        kept.append(sum(sizes.values()))
        assert states_TD.requires_grad
    measured = (kept[1] - kept[0]) / 2 / sum(lengths)
    compiled = has_compiled_attention(torch.device("cpu"), dtype)
    estimated = block_activation_bytes_per_token(config, config.blocks[0], dtype.itemsize, compiled=compiled)
    assert 0.9 < estimated / measured < (1.15 if dtype == torch.float32 else 1.6), (estimated, measured)
