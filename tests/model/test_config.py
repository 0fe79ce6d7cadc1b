"""Configurations: presets, Hugging Face keys both ways, refusals."""

import json
from dataclasses import replace

import pytest

from gristmill.core.errors import InputError
from gristmill.model.config import PRESETS, BlockConfig, ModelConfig, RopeScaling, uniform_blocks

BLOCKS = uniform_blocks(2, 4, 2, 16, 48)
LLAMA = ModelConfig("llama", 64, 32, BLOCKS, 128, rotary_fraction=1.0)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_round_trip_through_json(name: str) -> None:
    hf = json.loads(json.dumps(PRESETS[name].to_hf()))
    assert ModelConfig.from_hf(hf) == PRESETS[name]
    assert "gristmill" not in hf


@pytest.mark.parametrize(
    "config",
    [
        replace(LLAMA, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 64), rope_theta=500_000.0, tie_embeddings=True),
        replace(LLAMA, family="qwen2", norm_eps=1e-6),
        replace(LLAMA, family="qwen3"),
        replace(LLAMA, blocks=(BlockConfig(4, 2, 16, 48), BlockConfig(0, 0, 0, 24), BlockConfig(4, 1, 16, 0))),
        replace(LLAMA, blocks=uniform_blocks(2, 0, 0, 0, 48)),
    ],
    ids=["llama3-rope", "qwen2", "qwen3", "heterogeneous", "no-attention"],
)
def test_every_family_round_trips(config: ModelConfig) -> None:
    assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


def test_differing_layers_are_the_only_reason_for_our_own_key() -> None:
    assert "gristmill" not in LLAMA.to_hf()
    mixed = replace(LLAMA, blocks=(*BLOCKS, BlockConfig(2, 2, 16, 48)))
    assert len(mixed.to_hf()["gristmill"]["blocks"]) == 3


def test_rope_parameters_of_newer_files_are_read() -> None:
    hf = PRESETS["miniature"].to_hf()
    del hf["rope_theta"], hf["partial_rotary_factor"]
    hf["rope_parameters"] = {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.25}
    config = ModelConfig.from_hf(hf)
    assert (config.rope_theta, config.rotary_fraction, config.rotary_dims) == (5000.0, 0.25, 8)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "low_freq_factor"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_key_value_heads": 3}, "multiple"),
        ({"gristmill": {"blocks": [{"heads": 4}]}}, "blocks"),
    ],
)
def test_what_cannot_run_is_refused_by_name(change: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        ModelConfig.from_hf(LLAMA.to_hf() | change)


def test_layers_share_one_head_dim() -> None:
    with pytest.raises(InputError, match="head_dim"):
        replace(LLAMA, blocks=(BlockConfig(4, 2, 16, 48), BlockConfig(4, 2, 8, 48)))
