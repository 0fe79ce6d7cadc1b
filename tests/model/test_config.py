"""Configurations: presets, Hugging Face keys both ways, refusals."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill.core.errors import InputError
from gristmill.model.config import (
    FAMILIES,
    MAX_LAYERS,
    PRESETS,
    BlockConfig,
    ModelConfig,
    RopeScaling,
    read_config,
    uniform_blocks,
    unknown_keys,
)

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


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lacking", [BlockConfig(0, 0, 0, 24), BlockConfig(4, 2, 16, 0), BlockConfig(4, 1, 16, 48)])
def test_layers_that_differ_never_look_like_a_family_that_others_open(family: str, lacking: BlockConfig) -> None:
    for blocks in ((lacking, *BLOCKS), (*BLOCKS, lacking)):
        hf = ModelConfig(family, 64, 32, blocks, 128).to_hf()
        assert ModelConfig.from_hf(json.loads(json.dumps(hf))).blocks == blocks
        with pytest.raises(ValueError, match="gristmill"):
            transformers.AutoConfig.for_model(**hf)


def test_folders_of_earlier_runs_with_layers_that_differ_are_read() -> None:
    mixed = replace(LLAMA, blocks=(*BLOCKS, BlockConfig(0, 0, 0, 48)))
    earlier = LLAMA.to_hf() | {"num_hidden_layers": 3, "gristmill": {"blocks": mixed.to_hf()["gristmill"]["blocks"]}}
    assert ModelConfig.from_hf(earlier) == mixed


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
        ({"sliding_window": 127}, "sliding_window of 127"),
        ({"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}, "full attention"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ({"layer_types": "full"}, "'full'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_theta": 10_000.0, "partial_rotary_factor": 0.25}}, "partial_rotary_factor"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
        ({"rope_scaling": {"rope_type": "llama3", "type": "yarn"}}, "yarn"),
        ({"rope_scaling": {"rope_type": "default", "mrope_section": [2, 3, 3]}}, "mrope_section"),
        ({"rope_scaling": {"factor": 8.0}, "rope_parameters": {"factor": 4.0}}, "not the same"),
        ({"rope_parameters": {"rope_theta": 5.0}}, "rope_theta once"),
        ({"rope_scaling": [1]}, "no JSON object"),
        ({"rope_theta": None}, "rope_theta"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_theta": float("inf")}, "rope_theta"),
        ({"rms_norm_eps": None}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "norm_eps"),
        ({"rms_norm_eps": "1e-5"}, "norm_eps"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings"),
        ({"mlp_bias": 0}, "mlp_bias"),
        ({"hidden_act": None}, "hidden_act"),
        ({"hidden_size": 10**7}, "hidden_size"),
        ({"hidden_size": 2**62}, "hidden_size"),
        ({"hidden_size": 32.0}, "hidden_size"),
        ({"vocab_size": "64"}, "vocab_size"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"intermediate_size": 10**9}, "ffn_size"),
        ({"num_attention_heads": 10**6}, "num_heads"),
        ({"num_key_value_heads": 0}, "num_kv_heads"),
        ({"head_dim": 10**8}, "head_dim"),
        ({"max_position_embeddings": 10**12}, "max_positions"),
        ({"num_hidden_layers": MAX_LAYERS + 1}, "num_hidden_layers"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"num_hidden_layers": 3.5}, "num_hidden_layers"),
        ({"gristmill": []}, "gristmill"),
        ({"gristmill": {"blocks": 5}}, "blocks"),
        ({"gristmill": {"blocks": [LLAMA.to_hf()]}}, "num_kv_heads"),
        ({"gristmill": {"blocks": [{"num_heads": 10**9, "num_kv_heads": 1, "head_dim": 8, "ffn_size": 8}]}}, "num_heads"),
        ({"architectures": 5}, "architectures"),
        ({"model_type": [1]}, "model_type"),
        ({"model_type": "mistral"}, "mistral"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"architectures": ["GristmillForCausalLM"]}, "not supported"),
        ({"attention_multiplier": 1.0}, "attention_multiplier"),
        ({"logits_scaling": 8.0}, "logits_scaling"),
        ({"residual_multiplier": 0.2}, "residual_multiplier"),
        ({"embedding_multiplier": 12}, "embedding_multiplier"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"use_qk_norm": True}, "use_qk_norm"),
        ({"use_mup": True}, "use_mup"),
        ({"no_rope_layers": [1, 0]}, "no_rope_layers"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"per_layer_config": {"0": {"skip": ["attention"]}}}, "per_layer_config"),
        ({"auto_map": {"AutoModelForCausalLM": "m.M"}}, "auto_map"),
        ({"is_causal": False}, "is_causal"),
        ({"torch_dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
        ({"some_logit_scale_of_tomorrow": 0.5}, "some_logit_scale_of_tomorrow"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_key_value_heads": 3}, "multiple"),
        ({"gristmill": {"blocks": [{"heads": 4}]}}, "blocks"),
    ],
)
def test_what_cannot_run_is_refused_by_name(change: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        ModelConfig.from_hf(LLAMA.to_hf() | change)


@pytest.mark.parametrize(
    "change",
    [
        {"attention_bias": None, "mlp_bias": None},
        {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": None, "rope_scaling": None, "layer_types": None},
        {"sliding_window": 128},
        {"sliding_window": 8, "use_sliding_window": False},
        {"layer_types": ["full_attention"] * 2},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}},
        {"logits_scaling": 1.0, "residual_multiplier": 1, "attn_logit_softcapping": None, "num_experts": 0, "use_mup": False},
        {"hidden_act": "swish", "torch_dtype": "bfloat16", "auto_map": {}, "partial_rotary_factor": 1.0},
        {"pretraining_tp": 2, "attention_dropout": 0.1, "pad_token_id": -1, "temperature": 0.6, "_name_or_path": "a/b"},
    ],
)
def test_what_says_nothing_new_changes_nothing(change: dict) -> None:
    hf = LLAMA.to_hf() | change
    assert ModelConfig.from_hf(hf) == LLAMA and not unknown_keys(hf, LLAMA)


@pytest.mark.parametrize("family", FAMILIES)
def test_absent_keys_mean_what_they_mean_to_transformers(family: str) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 512, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 32}
    theirs = transformers.AutoConfig.for_model(family, **sizes)
    ours = ModelConfig.from_hf(sizes | {"model_type": family})
    rope = theirs.rope_parameters
    head_dim = getattr(theirs, "head_dim", 16)
    kv_heads = theirs.num_key_value_heads or 32
    assert ours == ModelConfig(
        family,
        vocab_size=64,
        hidden_size=512,
        blocks=uniform_blocks(2, 32, kv_heads, head_dim, 96),
        max_positions=theirs.max_position_embeddings,
        norm_eps=theirs.norm_eps if family == "nemotron" else theirs.rms_norm_eps,
        rotary_fraction=rope.get("partial_rotary_factor", 1.0),
        rope_theta=rope["rope_theta"],
        tie_embeddings=theirs.tie_word_embeddings,
        init_std=theirs.initializer_range,
    )
    assert theirs.hidden_act == ("relu2" if family == "nemotron" else "silu")


def test_keys_of_others_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf = LLAMA.to_hf() | {"value_residual\x1b[2J": True, "num_loops": 3, "swa": 0, "note": ""}
    assert unknown_keys(hf, LLAMA) == ["num_loops", "value_residual\x1b[2J"]
    (tmp_path / "config.json").write_text(json.dumps(hf))
    for _ in range(2):
        assert read_config(tmp_path)[1] == LLAMA
    said = capsys.readouterr().err
    assert said.count("num_loops = 3") == 1 and "value_residual" in said and "\x1b" not in said


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("ends", [64, -1, [0, 10**30], "a", [[0]], True, {"a": 1}, [0.0]])
def test_an_end_of_text_beyond_the_vocabulary_is_refused(name: str, ends: Any, tmp_path: Path) -> None:
    for file in ("config.json", "generation_config.json"):
        (tmp_path / file).write_text(json.dumps(LLAMA.to_hf() | {"eos_token_id": ends if file == name else [0, 63]}))
    with pytest.raises(InputError, match=rf"eos_token_id in .*/{name}"):
        read_config(tmp_path)


def test_rotation_is_partial_in_nemotron_alone() -> None:
    assert {family: ModelConfig(family, 64, 32, BLOCKS, 128).rotary_fraction for family in FAMILIES} == {
        "nemotron": 0.5,
        "llama": 1.0,
        "qwen2": 1.0,
        "qwen3": 1.0,
    }
    with pytest.raises(InputError, match="partial_rotary_factor"):
        replace(LLAMA, rotary_fraction=0.5)


QWEN = ModelConfig("qwen2", 64, 32, BLOCKS, 128)


@pytest.mark.parametrize(
    ("change", "fits"),
    [
        ({"sliding_window": 8}, True),  # which only use_sliding_window makes one
        ({"use_sliding_window": True}, True),  # from layer 28 on, which is not there
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}, True),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, False),
        ({"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 0}, True),
        ({"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, True),
        ({"layer_types": ["sliding_attention"] * 2, "sliding_window": 128}, False),  # transformers fails too
        ({"layer_types": ["sliding_attention"] * 2, "sliding_window": 128, "use_sliding_window": True}, True),
    ],
)
def test_windows_of_qwen(change: dict, fits: bool) -> None:
    hf = QWEN.to_hf() | change
    if fits:
        assert ModelConfig.from_hf(hf) == QWEN
    else:
        with pytest.raises(InputError, match="sliding_window"):
            ModelConfig.from_hf(hf)


VALUES: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(-2, 600) | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=20), inner, max_size=3),
    max_leaves=6,
)
ROPE: Any = st.dictionaries(st.sampled_from(["rope_type", "type", "factor", "rope_theta", "partial_rotary_factor", "x"]), VALUES)
KEYS = sorted({*LLAMA.to_hf(), *QWEN.to_hf(), "gristmill", "layer_types", "sliding_window", "use_sliding_window", "max_window_layers"})


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(FAMILIES)), st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=12), VALUES | ROPE, max_size=4))
def test_any_change_of_a_configuration_is_read_or_refused_in_a_sentence(family: str, change: dict) -> None:
    hf = ModelConfig(family, 64, 32, BLOCKS, 128).to_hf() | change
    try:
        config = ModelConfig.from_hf(hf)
    except InputError as error:
        assert len(str(error)) < 600 and str(error).isprintable()
        return
    assert config.num_layers <= MAX_LAYERS and config.hidden_size <= 2**16
    assert ModelConfig.from_hf(config.to_hf()) == config  # what is read can be written


def test_layers_share_one_head_dim() -> None:
    with pytest.raises(InputError, match="head_dim"):
        replace(LLAMA, blocks=(BlockConfig(4, 2, 16, 48), BlockConfig(4, 2, 8, 48)))
