"""Hugging Face's config.json: presets and families both ways, refusals."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill.core.errors import InputError
from gristmill.model.config import FAMILIES, MAX_LAYERS, PRESETS, BlockConfig, ModelConfig, RopeScaling, uniform_blocks
from gristmill.model.hf_config import from_hf, read_config, to_hf, unknown_keys

BLOCKS = uniform_blocks(2, 4, 2, 16, 48)
LLAMA = ModelConfig("llama", 64, 32, BLOCKS, 128, rotary_fraction=1.0)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_round_trip_through_json(name: str) -> None:
    hf = json.loads(json.dumps(to_hf(PRESETS[name])))
    assert from_hf(hf) == PRESETS[name]
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
    assert from_hf(json.loads(json.dumps(to_hf(config)))) == config


def test_differing_layers_are_the_only_reason_for_our_own_key() -> None:
    assert "gristmill" not in to_hf(LLAMA)
    mixed = replace(LLAMA, blocks=(*BLOCKS, BlockConfig(2, 2, 16, 48)))
    assert len(to_hf(mixed)["gristmill"]["blocks"]) == 3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lacking", [BlockConfig(0, 0, 0, 24), BlockConfig(4, 2, 16, 0), BlockConfig(4, 1, 16, 48)])
def test_layers_that_differ_never_look_like_a_family_that_others_open(family: str, lacking: BlockConfig) -> None:
    for blocks in ((lacking, *BLOCKS), (*BLOCKS, lacking)):
        hf = to_hf(ModelConfig(family, 64, 32, blocks, 128))
        assert from_hf(json.loads(json.dumps(hf))).blocks == blocks
        with pytest.raises(ValueError, match="gristmill"):
            transformers.AutoConfig.for_model(**hf)


def test_folders_of_earlier_runs_with_layers_that_differ_are_read() -> None:
    mixed = replace(LLAMA, blocks=(*BLOCKS, BlockConfig(0, 0, 0, 48)))
    earlier = to_hf(LLAMA) | {"num_hidden_layers": 3, "gristmill": {"blocks": to_hf(mixed)["gristmill"]["blocks"]}}
    assert from_hf(earlier) == mixed


def test_rope_parameters_of_newer_files_are_read() -> None:
    hf = to_hf(PRESETS["miniature"])
    del hf["rope_theta"], hf["partial_rotary_factor"]
    hf["rope_parameters"] = {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.25}
    config = from_hf(hf)
    assert (config.rope_theta, config.rotary_fraction, config.rotary_dims) == (5000.0, 0.25, 8)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM"),
        ({"rope_scaling": {"rope_type": "proportional", "factor": 4.0}}, "proportional"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "some_beta": 2.0}}, "some_beta"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "truncate": 1.5}}, "truncate"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "rope_theta": 1.0}, "rope_theta"),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}}, "8 numbers"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "low_freq_factor"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"attention_bias": 1}, "attention_bias"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"sliding_window": 127}, "sliding_window of 127"),
        ({"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}, "full attention"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ({"layer_types": "full"}, "'full'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_theta": 10_000.0, "partial_rotary_factor": 0.25}}, "partial_rotary_factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor"),
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
        ({"gristmill": {"blocks": [to_hf(LLAMA)]}}, "num_kv_heads"),
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
        from_hf(to_hf(LLAMA) | change)


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
    hf = to_hf(LLAMA) | change
    assert from_hf(hf) == LLAMA and not unknown_keys(hf, LLAMA)


@pytest.mark.parametrize("family", FAMILIES)
def test_absent_keys_mean_what_they_mean_to_transformers(family: str) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 512, "intermediate_size": 96, "num_hidden_layers": 8, "num_attention_heads": 32}
    theirs = transformers.AutoConfig.for_model(family, **sizes)
    ours = from_hf(sizes | {"model_type": family})
    assert ours == from_hf(theirs.to_dict() | {"architectures": [ours.parts.architecture]})  # where every key is written
    rope = theirs.rope_parameters.get("full_attention", theirs.rope_parameters)
    slides = getattr(theirs, "layer_types", None) or ["sliding_attention" if family == "mistral" else "full_attention"] * 8
    expected = BlockConfig(32, theirs.num_key_value_heads or 32, getattr(theirs, "head_dim", 16), 96)
    assert {replace(block, window=0, rope="global") for block in ours.blocks} == {expected}
    assert [block.window for block in ours.blocks] == [theirs.sliding_window if one == "sliding_attention" else 0 for one in slides]
    rotates = getattr(theirs, "no_rope_layers", [1] * 8)
    assert [block.rope != "none" for block in ours.blocks] == [bool(one) for one in rotates]
    assert (ours.max_positions, ours.tie_embeddings) == (theirs.max_position_embeddings, theirs.tie_word_embeddings)
    assert ours.norm_eps == (theirs.norm_eps if family == "nemotron" else theirs.rms_norm_eps)
    assert (ours.rotary_fraction, ours.rope_theta) == (rope.get("partial_rotary_factor", 1.0), rope["rope_theta"])
    assert ours.init_std == theirs.initializer_range
    assert ours.logits_soft_cap == getattr(theirs, "final_logit_softcapping", None)
    assert ours.attention_soft_cap == getattr(theirs, "attn_logit_softcapping", None)
    activation = getattr(theirs, "hidden_activation", None) or theirs.hidden_act
    assert activation == {"silu": "silu", "relu2": "relu2", "gelu_tanh": "gelu_pytorch_tanh"}[ours.parts.activation]


def test_keys_of_others_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf = to_hf(LLAMA) | {"value_residual\x1b[2J": True, "num_loops": 3, "swa": 0, "note": ""}
    assert unknown_keys(hf, LLAMA) == ["num_loops", "value_residual\x1b[2J"]
    (tmp_path / "config.json").write_text(json.dumps(hf))
    for _ in range(2):
        assert read_config(tmp_path)[1] == LLAMA
    said = capsys.readouterr().err
    assert said.count("num_loops = 3") == 1 and "value_residual" in said and "\x1b" not in said


def test_what_changes_greedy_answers_elsewhere_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(to_hf(LLAMA)))
    quiet = transformers.GenerationConfig(temperature=0.6, top_p=0.9, do_sample=True, eos_token_id=[0, 63], pad_token_id=5)
    for keys in ({}, {"suppress_tokens": [3], "repetition_penalty": 1.05}):
        (tmp_path / "generation_config.json").write_text(json.dumps(quiet.to_dict() | keys))
        read_config(tmp_path)
        said = capsys.readouterr().err
        assert ("suppress_tokens = [3]" in said and "repetition_penalty = 1.05" in said) == bool(keys) == bool(said)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("ends", [64, -1, [0, 10**30], "a", [[0]], True, {"a": 1}, [0.0]])
def test_an_end_of_text_beyond_the_vocabulary_is_refused(name: str, ends: Any, tmp_path: Path) -> None:
    for file in ("config.json", "generation_config.json"):
        (tmp_path / file).write_text(json.dumps(to_hf(LLAMA) | {"eos_token_id": ends if file == name else [0, 63]}))
    with pytest.raises(InputError, match=rf"eos_token_id in .*/{name}"):
        read_config(tmp_path)


LISTED = ["full_attention", "sliding_attention"]


@pytest.mark.parametrize(
    ("family", "change", "windows"),
    [
        ("qwen2", {"sliding_window": 8}, [0, 0]),  # which only use_sliding_window makes one
        ("qwen2", {"use_sliding_window": True}, [0, 0]),  # from layer 28 on, which is not there
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}, [0, 0]),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, [0, 8]),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 0}, [128, 128]),
        ("qwen2", {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, [0, 0]),
        ("qwen2", {"layer_types": LISTED, "sliding_window": 128}, "sliding_window"),  # transformers fails too
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": "1"}, "max_window_layers"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": True}, "max_window_layers"),
        ("qwen3", {"layer_types": LISTED, "sliding_window": 8, "use_sliding_window": True}, [0, 8]),
        ("qwen3", {"layer_types": LISTED[:1], "sliding_window": 8, "use_sliding_window": True}, "layer_types"),
        ("qwen3", {"layer_types": LISTED, "sliding_window": 0, "use_sliding_window": True}, "sliding_window"),
        ("qwen3", {"layer_types": LISTED, "sliding_window": 8.5, "use_sliding_window": True}, "sliding_window"),
        ("mistral", {"sliding_window": 8}, [8, 8]),
        ("mistral", {"sliding_window": None}, [0, 0]),
        ("mistral", {"sliding_window": 8, "layer_types": LISTED}, "sliding_window"),  # which transformers does not read there
        ("mistral", {"sliding_window": 8, "use_sliding_window": False}, "sliding_window"),
        ("mistral", {"sliding_window": 128, "use_sliding_window": False}, [0, 0]),
        ("phi3", {"sliding_window": 8, "layer_types": LISTED[1:] * 2}, [8, 8]),
        ("smollm3", {"sliding_window": 8, "use_sliding_window": True, "no_rope_layers": [0, 1], "layer_types": None}, [8, 0]),
        ("smollm3", {"sliding_window": 8, "no_rope_layers": [0, 1]}, [0, 0]),
        ("smollm3", {"no_rope_layers": [0]}, "no_rope_layers"),
        ("smollm3", {"no_rope_layers": None, "no_rope_layer_interval": 0}, "no_rope_layer_interval"),
        ("gemma2", {"sliding_window": 8, "layer_types": None}, [8, 0]),
        ("gemma2", {"sliding_window": None, "layer_types": None}, "sliding_window"),
        ("gemma3_text", {"sliding_window": 8, "layer_types": None, "sliding_window_pattern": 2}, [8, 0]),
        ("gemma3_text", {"layer_types": None, "sliding_window_pattern": 0}, "sliding_window_pattern"),
        ("granite", {"sliding_window": 8}, "sliding_window"),
    ],
)
def test_windows(family: str, change: dict, windows: list[int] | str) -> None:
    hf = to_hf(ModelConfig(family, 64, 32, BLOCKS, 128)) | change
    if isinstance(windows, str):
        with pytest.raises(InputError, match=windows):
            from_hf(hf)
        return
    config = from_hf(hf)
    assert [block.window for block in config.blocks] == windows
    assert from_hf(json.loads(json.dumps(to_hf(config)))) == config


PHI = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}


@pytest.mark.parametrize(
    ("family", "change", "said"),
    [
        ("phi3", {"rope_scaling": {"type": "su", **PHI}, "original_max_position_embeddings": 64}, ""),
        ("phi3", {"auto_map": {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}}, ""),
        ("phi3", {"auto_map": {"AutoModelForCausalLM": "modeling_mine.Phi3ForCausalLM"}}, "auto_map"),
        ("phi3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
        ("phi3", {"attention_bias": True}, "attention_bias"),
        ("gemma", {"hidden_act": "gelu"}, ""),  # gelu_pytorch_tanh in the first folders
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation"),
        ("gemma2", {"query_pre_attn_scalar": 2.5}, "query_pre_attn_scalar"),
        ("gemma2", {"attn_logit_softcapping": -1.0}, "attention_soft_cap"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("gemma3_text", {"rope_parameters": {"rope_type": "default"}}, "rope_type"),
        ("gemma3_text", {"rope_local_base_freq": 5000.0}, "rope_theta once"),
        ("gemma3_text", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "original_max_position_embeddings": 64}, "Write orig"),
        ("gemma3_text", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "Write rope_type"),  # transformers passes over it
        ("gemma3_text", {"rope_parameters": {"full_attention": {"rope_type": "dynamic", "factor": 2.0}}}, ""),
        ("gemma3_text", {"rope_parameters": {"sliding_attention": {"rope_type": "yarn", "factor": 2.0, "truncate": False}}}, "truncate"),
        ("granite", {"residual_multiplier": 0}, "residual_multiplier"),
        ("olmo2", {"clip_qkv": 8.0}, "clip_qkv"),
    ],
)
def test_keys_of_single_families(family: str, change: dict, said: str) -> None:
    hf = to_hf(ModelConfig(family, 64, 32, BLOCKS, 128)) | change
    if said:
        with pytest.raises(InputError, match=said):
            from_hf(hf)
    else:
        config = from_hf(hf)
        assert from_hf(json.loads(json.dumps(to_hf(config)))) == config and not unknown_keys(hf, config)


def test_yarn_makes_the_context_as_long_as_it_says() -> None:
    hf = to_hf(QWEN) | {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}}
    config = from_hf(hf)
    assert config.max_positions == 512 and from_hf(to_hf(config)) == config
    assert from_hf(hf | {"max_position_embeddings": 1024}).max_positions == 1024


def test_longrope_is_read_up_to_the_positions_of_its_short_factors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf = to_hf(ModelConfig("phi3", 64, 32, BLOCKS, 1024))
    hf |= {"rope_scaling": {"type": "longrope", **PHI}, "original_max_position_embeddings": 64}
    config = from_hf(hf)
    assert config.max_positions == 64 and to_hf(config)["max_position_embeddings"] == 1024
    (tmp_path / "config.json").write_text(json.dumps(hf))
    assert read_config(tmp_path)[1] == config and "a context of 64 of 1,024 tokens" in capsys.readouterr().err
    assert from_hf(to_hf(config)) == config


QWEN = ModelConfig("qwen2", 64, 32, BLOCKS, 128)
VALUES: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(-2, 600) | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=20), inner, max_size=3),
    max_leaves=6,
)
ROPE: Any = st.dictionaries(st.sampled_from(["rope_type", "type", "factor", "rope_theta", "partial_rotary_factor", "x"]), VALUES)
KEYS = sorted({key for family in FAMILIES.values() for key in family.keys} | {*to_hf(LLAMA), *to_hf(QWEN), "gristmill", "layer_types"})
KEYS += ["sliding_window", "use_sliding_window", "max_window_layers", "original_max_position_embeddings", "mlp_bias", "rope_parameters"]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(FAMILIES)), st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=12), VALUES | ROPE, max_size=4))
def test_any_change_of_a_configuration_is_read_or_refused_in_a_sentence(family: str, change: dict) -> None:
    hf = to_hf(ModelConfig(family, 64, 32, BLOCKS, 128)) | change
    try:
        config = from_hf(hf)
    except InputError as error:
        assert len(str(error)) < 600 and str(error).isprintable()
        return
    assert config.num_layers <= MAX_LAYERS and config.hidden_size <= 2**16
    assert from_hf(to_hf(config)) == config  # what is read can be written
