"""Hugging Face's config.json, read as transformers reads it, and written.

Every key is accounted for: it is read, it is known to change nothing, it is refused, or it is named in a warning.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

from gristmill.core.echo import echo, sentence
from gristmill.core.errors import InputError
from gristmill.core.untrusted import quoted, read_untrusted_json
from gristmill.model.bounds import MAX_SIZES, check_sizes, mapping_of, value_of
from gristmill.model.config import (
    BIASES,
    FAMILIES,
    LOCAL_ROPE_THETA,
    MAX_LAYERS,
    OWN_ARCHITECTURE,
    OWN_MODEL_TYPE,
    BlockConfig,
    Family,
    ModelConfig,
)
from gristmill.model.folder import model_file
from gristmill.model.rope import HAS_ORIGINAL, ORIGINAL, read_rope, write_rope

EXPECTED = "Use a checkpoint whose config.json has"
ROPE_KINDS = {kind: kind for kind in ("default", "linear", "dynamic", "llama3", "yarn", "longrope")}
PHI3_CODE = "modeling_phi3.Phi3ForCausalLM"  # beside published folders; transformers has since taken it in
PHI3_ROPE_KINDS = {"default": "default", "longrope": "longrope", "su": "longrope", "yarn": "longrope"}  # as transformers reads them
MAX_ENDS = 1024  # tokens that end a text
DTYPES = ("float64", "float32", "float16", "bfloat16", "double", "float", "half", "auto")

# Keys that are read here or say nothing about the forward pass: tokens, sampling, training, and notes of other programs.
_HARMLESS = re.compile(
    r"architectures|model_type|gristmill|reward_attributes|reward_weights|guard_(codes|thresholds|caution)|quantization_config"
    r"|(vocab|hidden|intermediate)_size"
    r"|num_hidden_layers|num_attention_heads|num_key_value_heads|head_dim|(original_)?max_position_embeddings|initializer_range"
    r"|rope_theta|rope_scaling|rope_parameters|partial_rotary_factor|tie_word_embeddings|(use_)?sliding_window|max_window_layers"
    r"|layer_types|_.*|.*dropout.*|.*pdrop|.*_token_ids?|.*token_index|(output|return)_.*|use_(return_dict|cache|bfloat16)|.*version"
    r"|transformers.*|unsloth.*|is_llama_config|is_decoder|pretraining_tp|chunk_size_feed_forward|gradient_checkpointing|torchscript"
    r"|id2label|label2id|num_labels|problem_type|finetuning_task|task_specific_params|tokenizer_class|prefix|tf_legacy_loss"
    r"|tie_encoder_decoder|name_or_path|model_max_length|max_sequence_length|do_sample|early_stopping|temperature|top_[kp]|typical_p"
    r"|(min|max)_(length|new_tokens)|num_beams|num_beam_groups|num_return_sequences|.*_penalty|.*no_repeat_ngram_size|bad_words_ids"
    r"|remove_invalid_values|(begin_)?suppress_tokens|cache_implementation"
)
# Keys of generation_config.json that are read, that only say how to draw where nobody else does, or that say nothing about an answer.
_SAMPLING = re.compile(
    r"_.*|(?!forced).*_token_ids?|do_sample|temperature|(top|min)_[kp]|max_(length|new_tokens)|(output|return)_.*|use_cache"
    r"|transformers_version|cache_.*|.*assistant.*|(length|diversity)_penalty|early_stopping|target_lookbehind|chat_format"
)
# Words in the names of keys by which other architectures change the forward pass, those of tomorrow included.
_CHANGES = re.compile(
    r"multiplier|scal(e|ing|ar)|soft_?cap|logits?_cap|(^|_)qk_|qk_?(layer_?)?norm|clip|alibi|(^|_)mup|expert|(^|_)moe(_|$)|no_rope|nope|xpos"
    r"|sliding|window_size|(local|sparse|linear|chunked?)_att|att(entio)?n_(window|chunk|type|sink|temperature)|sink|temperature_tuning"
    r"|parallel_(att|residual|block)|interleave|bias|per_layer|block_configs|bidirectional|lora_rank|mamba|ssm_|hybrid|kv_shared|cross_layer"
    r"|mrope|rope_(ratio|pct|percent|dim|base)|rotary_|post_(layer)?norm|sandwich|(^|_)quanti|compression_config|auto_map|pruned_heads"
    r"|dim_model_base|cross_attention|index_topk|no_norm|early_exit|skip_layers"
)
# Of these a factor of one changes nothing.
_FACTORS = re.compile(r"^(?!.*(att|query|qk)).*(multiplier|scal(e|ing)|ratio|pct|percent)")


def read_config(folder: Path) -> tuple[dict[str, Any], ModelConfig]:
    """Read a model folder's config.json, as it is and as a ModelConfig; the ends of text in generation_config.json are checked too.

    Raises:
        InputError: a file is absent or damaged, or the model is one that we cannot run.
    """
    path = model_file(folder, "config.json")
    hf = read_untrusted_json(path)
    try:
        config = from_hf(hf)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    _check_ends(hf, path, config.vocab_size)
    generation = folder / "generation_config.json"
    if generation.exists():
        said = read_untrusted_json(generation)
        _check_ends(said, generation, config.vocab_size)
        unread = [key for key in said if not _SAMPLING.fullmatch(key) and not _is_neutral(key, said[key]) and said[key] != 1]
        _warn_of(generation, said, unread, "says")
    scaling = config.rope_scaling
    if scaling is not None and scaling.extended_max_positions > config.max_positions:
        _warn(
            f"{path} is read with a context of {config.max_positions:,} of {scaling.extended_max_positions:,} tokens: in longer texts "
            "longrope rotates all tokens by other angles."
        )
    _warn_of(path, hf, unknown_keys(hf, config), "computes")
    if hf.get("model_type") != OWN_MODEL_TYPE and "gristmill" in hf and _without_ours(hf) != config.blocks:
        _warn(f"{path} says under gristmill which layers the model has: programs that read the usual keys alone compute something else.")
    return hf, config


def _without_ours(hf: Mapping[str, Any]) -> tuple[BlockConfig, ...]:
    """The layers that other programs read; none where the usual keys say nothing that can be."""
    try:
        return from_hf({key: value for key, value in hf.items() if key != "gristmill"}).blocks
    except InputError:
        return ()


def _warn_of(path: Path, values: Mapping[str, Any], keys: Sequence[str], what: str) -> None:
    if keys:
        some = ", ".join(f"{quoted(key)[1:-1]} = {quoted(values[key])}" for key in keys[:5])
        more = f", and {len(keys) - 5} more" if len(keys) > 5 else ""
        _warn(f"{path} has keys that are not read, and that may change what the model {what}: {some}{more}.")


@cache
def _warn(message: str) -> None:  # once a process, however often a model is loaded
    echo(f"Warning: {sentence(message)}", err=True)


def _check_ends(values: Mapping[str, Any], path: Path, vocab_size: int) -> None:
    ends = values.get("eos_token_id")
    if isinstance(ends, list) and len(ends) > MAX_ENDS:
        raise InputError(f"Correct eos_token_id in {path}: it names {len(ends):,} tokens, and {MAX_ENDS} are read.")
    for token in ends if isinstance(ends, list) else [] if ends is None else [ends]:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
            raise InputError(f"Correct eos_token_id in {path}: {quoted(token)} is no id of a token below {vocab_size}.")


def _is_neutral(key: str, value: Any) -> bool:
    """Whether a key says nothing with this value: absent, off, empty, or a factor of one."""
    if _FACTORS.search(key):
        return value is None or value is False or (value == 1 and value is not True)
    return value in (None, False, "", [], {})  # 0 too, which equals False


def unknown_keys(hf: Mapping[str, Any], config: ModelConfig) -> list[str]:
    """Keys of a config.json that nothing here reads, though their values say something."""
    known = {"auto_map", "norm_eps" if config.family == "nemotron" else "rms_norm_eps", *config.parts.keys, *_fixed_values(config.family)}
    return sorted(key for key in hf if key not in known and not _HARMLESS.fullmatch(key) and not _is_neutral(key, hf[key]))


def _fixed_values(family: str) -> dict[str, tuple[Any, ...]]:
    """Keys that choose between kinds of block, and the values that mean the kind of this family; the first where a key is absent."""
    parts = FAMILIES[family]
    activations = {"silu": ("silu", "swish"), "gelu_tanh": ("gelu_pytorch_tanh",), "relu2": ("relu2",)}[parts.activation]
    names = ("hidden_act", "hidden_activation", "activation_function", "mlp_hidden_act")
    fixed: dict[str, tuple[Any, ...]] = dict.fromkeys(names, (*activations, None))
    # What Gemma's first folders call gelu is gelu_pytorch_tanh; those after it have the key hidden_activation.
    fixed["hidden_act"] = (*activations, "gelu") if family == "gemma" else (*activations, None) if parts.windows == "gemma" else activations
    fixed |= {"is_causal": (True, None), "position_embedding_type": ("rope", "rotary", None)}
    fixed |= dict.fromkeys(("is_encoder_decoder", "add_cross_attention"), (False, None))
    fixed |= dict.fromkeys(("use_qk_norm", "qk_norm", "qk_layernorm"), (bool(parts.qk_norm), None))
    fixed |= {key: (False, True, None) if key in parts.optional_biases else (False, None) for key in BIASES}
    # Qwen2 has a bias on q, k and v whatever this key says.
    fixed |= {"qkv_bias": (parts.qkv_bias, None)} | ({"attention_bias": (False, True, None)} if parts.qkv_bias else {})
    if family == "gemma3_text":  # transformers does not apply it, others do
        fixed["attn_logit_softcapping"] = (None,)
    if family == "phi3":  # of the code beside Phi-4-mini
        fixed |= dict.fromkeys(("full_attn_mod", "interpolate_factor"), (1, None))
    fixed |= dict.fromkeys(("torch_dtype", "dtype"), (None, *DTYPES, *(f"torch.{name}" for name in DTYPES)))
    return fixed


def _refuse_unsupported(hf: Mapping[str, Any], family: str) -> None:
    fixed, keys = _fixed_values(family), FAMILIES[family].keys
    for key, value in hf.items():
        if family == "phi3" and key == "auto_map" and isinstance(value, dict) and value.get("AutoModelForCausalLM") == PHI3_CODE:
            continue
        if key in fixed:
            # by type too: 0 and 1 are no booleans
            if not any(value == one and type(value) is type(one) for one in fixed[key]):
                raise InputError(f"{EXPECTED} {key} = {fixed[key][0]!r}: {key} = {quoted(value)} is not supported for {family}.")
        elif key not in keys and not _HARMLESS.fullmatch(key) and _CHANGES.search(key) and not _is_neutral(key, value):
            raise InputError(
                f"Use a checkpoint without the key {quoted(key)[1:-1]} in its config.json: {quoted(value)} may change what the model "
                f"computes, and is not supported for {family}."
            )


def _rope_from_hf(hf: Mapping[str, Any], family: str, max_positions: int) -> dict[str, Any]:
    """Bases, scalings and rotating fraction, as fields of ModelConfig."""
    # Newer writers gather everything in "rope_parameters"; older ones spread it over three keys.
    parts, new, old = FAMILIES[family], mapping_of(hf, "rope_parameters"), mapping_of(hf, "rope_scaling")
    given = value_of(hf, "rope_theta") if "rope_theta" in hf else None
    kinds = PHI3_ROPE_KINDS if family == "phi3" else ROPE_KINDS
    if parts.rope == "local":
        if strange := new.keys() - {"full_attention", "sliding_attention"}:
            raise InputError(
                f"Give rope_parameters of {family} for full_attention and sliding_attention, not {quoted(sorted(strange)[0])}."
            )
        if "type" in old and "rope_type" not in old and old["type"] != "default":
            # transformers took this name once, and passes over it here since version 5
            raise InputError(f"Write rope_type in place of type in rope_scaling of {family}: programs read it differently.")
        full, local = mapping_of(new, "full_attention"), mapping_of(new, "sliding_attention")
        theta, scaling = read_rope(full | old, hf, max_positions, kinds=kinds, theta=given, default_theta=parts.default_rope_theta)
        given = value_of(hf, "rope_local_base_freq") if "rope_local_base_freq" in hf else None
        local_theta, local_scaling = read_rope(local, hf, max_positions, kinds=kinds, theta=given, default_theta=LOCAL_ROPE_THETA)
        if ORIGINAL in hf and any(one is not None and one.kind in HAS_ORIGINAL for one in (scaling, local_scaling)):
            raise InputError(f"Write {ORIGINAL} of {family} within its rope scaling: programs read it differently.")
        for one in (scaling, local_scaling):
            if one is not None and (one.kind == "longrope" or one.truncate is False):  # read for both or none
                raise InputError(f"Use a checkpoint of {family} whose rope scaling is no longrope and has no truncate = false.")
        return {"rope_theta": theta, "rope_scaling": scaling, "local_rope_theta": local_theta, "local_rope_scaling": local_scaling}
    if new and old and new != old:
        raise InputError("Take rope_scaling or rope_parameters out of the model's config.json: they are not the same.")
    rope, key = old or new, "partial_rotary_factor"
    if key in rope and key in hf and rope[key] != hf[key]:
        raise InputError(f"Give {key} once in the model's config.json: it is {quoted(rope[key])} and {quoted(hf[key])}.")
    fraction = value_of({**hf, **rope}, key, parts.default_rotary_fraction, null=None if parts.partial_rotary else 1.0)
    hf = {ORIGINAL: 4096, **hf} if family == "phi3" else hf
    theta, scaling = read_rope(rope, hf, max_positions, kinds=kinds, theta=given, default_theta=parts.default_rope_theta)
    return {"rope_theta": theta, "rope_scaling": scaling, "rotary_fraction": fraction}


def _blocks_from_hf(hf: Mapping[str, Any], family: str, max_positions: int) -> tuple[BlockConfig, ...]:
    parts, listed = FAMILIES[family], mapping_of(hf, "gristmill").get("blocks")
    if listed is not None:
        if not isinstance(listed, list) or len(listed) > MAX_LAYERS:
            raise InputError(f"Correct the list of blocks in the model's config.json: it is no list of up to {MAX_LAYERS}.")
        try:
            return tuple(BlockConfig(**block) for block in listed)
        except TypeError:
            names = ", ".join(BlockConfig.__dataclass_fields__)
            raise InputError(f"Correct the list of blocks in the model's config.json: each has {names}.") from None
    hidden, heads = value_of(hf, "hidden_size"), value_of(hf, "num_attention_heads")
    check_sizes(1, hidden_size=hidden, num_heads=heads)
    kv_heads = value_of(hf, "num_key_value_heads", parts.default_kv_heads or heads, null=heads)
    head_dim = value_of(hf, "head_dim", parts.default_head_dim or hidden // heads, null=parts.default_head_dim or hidden // heads)
    layers, ffn = value_of(hf, "num_hidden_layers"), value_of(hf, "intermediate_size")
    check_sizes(1, num_kv_heads=kv_heads, head_dim=head_dim, ffn_size=ffn)
    if not isinstance(layers, int) or isinstance(layers, bool) or not 1 <= layers <= MAX_LAYERS:
        raise InputError(f"Give num_hidden_layers a whole number from 1 to {MAX_LAYERS}: it is {quoted(layers)}.")
    rotates = _rotating_layers(hf, layers) if parts.rope == "nope" else [True] * layers
    windows = _windows_from_hf(hf, family, rotates, max_positions)
    blocks = []
    for rotated, window in zip(rotates, windows, strict=True):
        rope = "none" if not rotated else "local" if window and parts.rope == "local" else "global"
        blocks.append(BlockConfig(heads, kv_heads, head_dim, ffn, window, rope))
    return tuple(blocks)


def _rotating_layers(hf: Mapping[str, Any], num_layers: int) -> list[bool]:
    """Which layers rotate queries and keys, by SmolLM3's keys; all but every fourth where they are absent."""
    interval, listed = hf.get("no_rope_layer_interval", 4), hf.get("no_rope_layers")
    if listed is None:
        if not isinstance(interval, int) or isinstance(interval, bool) or interval < 1:
            raise InputError(f"Give no_rope_layer_interval a whole number from 1: it is {quoted(interval)}.")
        return [(layer + 1) % interval != 0 for layer in range(num_layers)]
    if not isinstance(listed, list) or len(listed) < num_layers or any(isinstance(one, bool) or one not in (0, 1) for one in listed):
        raise InputError(f"Give no_rope_layers 1 (rotates) or 0 for each of {num_layers} layers: it is {quoted(listed)}.")
    return [bool(one) for one in listed[:num_layers]]


def _windows_from_hf(hf: Mapping[str, Any], family: str, rotates: Sequence[bool], max_positions: int) -> list[int]:
    """Windows of the layers, 0 for none: how many tokens a token sees, itself included."""
    parts, num_layers = FAMILIES[family], len(rotates)
    used, types = hf.get("use_sliding_window"), hf.get("layer_types")
    window = hf.get("sliding_window", parts.default_window)
    if not isinstance(used, bool | None):
        raise InputError(f"{EXPECTED} use_sliding_window true or false: it is {quoted(used)}.")
    if types is not None:
        known = ("full_attention", "attention", "sliding_attention")
        strange = [one for one in types if one not in known] if isinstance(types, list) else [types]
        if strange:
            raise InputError(f"{EXPECTED} layers of full attention: {quoted(strange[0])} is not supported.")
    if parts.windows in ("qwen", "nope") and not used:
        window = None  # only use_sliding_window makes it one
    if types is not None:
        slides = [one == "sliding_attention" for one in types]
        if parts.windows and len(slides) != num_layers:
            raise InputError(f"Give layer_types a type for each of {num_layers} layers: there are {len(slides)}.")
    elif parts.windows == "qwen":
        first = hf.get("max_window_layers", 28)
        if not isinstance(first, int | None) or isinstance(first, bool):
            raise InputError(f"Give max_window_layers a whole number or null: it is {quoted(first)}.")
        slides = [window is not None and (first is None or layer >= first) for layer in range(num_layers)]
    elif parts.windows == "nope":
        slides = [window is not None and not rotated for rotated in rotates]
    elif parts.windows == "gemma":
        every = hf.get("sliding_window_pattern", 6) if parts.rope == "local" else 2
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise InputError(f"Give sliding_window_pattern a whole number from 1: it is {quoted(every)}.")
        slides = [bool((layer + 1) % every) for layer in range(num_layers)]
    else:
        slides = [bool(used) if used is not None else window is not None] * num_layers
    # Programs read differently: other keys of Mistral and Phi-3 than sliding_window, and any key in a family without windows.
    at_odds = parts.windows == "all" and set(slides) != {window is not None}
    holds_all = isinstance(window, int) and window >= max_positions
    if holds_all and (at_odds or not parts.windows):
        return [0] * num_layers
    if at_odds or (any(slides) and (not parts.windows or window is None)):
        raise InputError(
            f"{EXPECTED} layers of full attention (use_sliding_window = False): a sliding_window of {quoted(window)} tokens in "
            f"{sum(slides)} of {num_layers} layers is not supported for {family}, unless it holds the whole context of {max_positions}."
        )
    if not any(slides):
        return [0] * num_layers
    if not isinstance(window, int) or isinstance(window, bool) or window < 1:
        raise InputError(f"Give sliding_window a whole number from 1 or null: it is {quoted(window)}.")
    return [min(window, MAX_SIZES["window"]) if one else 0 for one in slides]


def _family_from_hf(hf: Mapping[str, Any]) -> str:
    names = {family.architecture: name for name, family in FAMILIES.items()}
    architectures, kind = hf.get("architectures") or [], hf.get("model_type")
    if not isinstance(architectures, list) or not isinstance(kind, str | None):
        raise InputError(f"Correct architectures ({quoted(architectures)}) or model_type ({quoted(kind)}) in the model's config.json.")
    found = architectures[0] if architectures else kind
    if found == OWN_ARCHITECTURE and kind == OWN_MODEL_TYPE:
        family = mapping_of(hf, "gristmill").get("family")
    else:
        family = names.get(found, found if not architectures else None) if isinstance(found, str) else None
        if isinstance(kind, str) and family in FAMILIES and kind != family:
            raise InputError(f"Correct architectures or model_type in the model's config.json: {quoted(found)} is not {quoted(kind)}.")
    if not isinstance(family, str) or family not in FAMILIES:
        raise InputError(f"Use a checkpoint of one of {', '.join(names)}: {quoted(found)} is not supported.")
    return family


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Read a Hugging Face config.json. Raises InputError for an architecture or option we cannot run."""
    family = _family_from_hf(hf)
    parts = FAMILIES[family]
    _refuse_unsupported(hf, family)
    max_positions = value_of(hf, "max_position_embeddings", parts.default_max_positions)
    check_sizes(1, max_positions=max_positions)
    rope = _rope_from_hf(hf, family, max_positions)
    scaling = rope["rope_scaling"]
    if scaling is not None and scaling.kind == "longrope":
        max_positions = min(max_positions, scaling.original_max_positions)
    given = {**hf, **mapping_of(hf, "rope_scaling"), **mapping_of(hf, "rope_parameters")}
    if scaling is not None and scaling.kind == "yarn" and ORIGINAL in given:
        # Cards of models say to add the scaling, and to leave max_position_embeddings as it was.
        extended = int(scaling.original_max_positions * (scaling.factor or 1))
        max_positions = max(max_positions, min(extended, MAX_SIZES["max_positions"]))
    blocks = _blocks_from_hf(hf, family, max_positions)
    tied = hf.get("tie_word_embeddings", parts.default_tied)
    if not isinstance(tied, bool):
        raise InputError(f"Give tie_word_embeddings true or false in the model's config.json: it is {quoted(tied)}.")
    return ModelConfig(
        family=family,
        vocab_size=value_of(hf, "vocab_size"),
        hidden_size=value_of(hf, "hidden_size"),
        blocks=blocks,
        max_positions=max_positions,
        norm_eps=value_of(hf, "norm_eps" if family == "nemotron" else "rms_norm_eps", parts.default_norm_eps),
        tie_embeddings=tied,
        init_std=value_of(hf, "initializer_range", parts.default_init_std),
        attention_bias=bool(hf.get("attention_bias")) and not parts.qkv_bias,
        mlp_bias=bool(hf.get("mlp_bias")),
        **rope,
        **_factors_from_hf(hf, parts),
    )


def _factors_from_hf(hf: Mapping[str, Any], parts: Family) -> dict[str, Any]:
    """Multipliers of Granite, scale and caps of Gemma 2 and 3, as fields of ModelConfig."""
    if "attention_multiplier" in parts.keys:
        names = ("embedding_multiplier", "residual_multiplier", "logits_scaling")
        return {"attention_scale": value_of(hf, "attention_multiplier", 1.0), **{name: value_of(hf, name, 1.0) for name in names}}
    if "query_pre_attn_scalar" not in parts.keys:
        return {}
    scalar = value_of(hf, "query_pre_attn_scalar", 256)
    if not isinstance(scalar, int) or isinstance(scalar, bool) or not 1 <= scalar <= MAX_SIZES["hidden_size"]:
        raise InputError(f"Give query_pre_attn_scalar a whole number from 1 to {MAX_SIZES['hidden_size']}: it is {quoted(scalar)}.")
    defaults = (None, None) if parts.rope == "local" else (50.0, 30.0)
    caps = (hf.get(key, default) for key, default in zip(("attn_logit_softcapping", "final_logit_softcapping"), defaults, strict=True))
    return {"attention_scale": scalar**-0.5, **dict(zip(("attention_soft_cap", "logits_soft_cap"), caps, strict=True))}


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """The Hugging Face config.json of a model. Layers that differ go under the key "gristmill"."""
    parts, first = config.parts, config.blocks[0]
    # Hugging Face's keys cannot express layers that differ or lack a part.
    alike = {replace(block, window=0, rope="global") for block in config.blocks}
    layers = _layers_to_hf(config)
    uniform = len(alike) == 1 and first.has_attention and first.has_mlp and layers is not None
    scaling = config.rope_scaling
    hf: dict[str, Any] = {
        "architectures": [parts.architecture if uniform else OWN_ARCHITECTURE],
        "model_type": config.family if uniform else OWN_MODEL_TYPE,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": first.num_heads,
        "num_key_value_heads": first.num_kv_heads,
        "head_dim": first.head_dim,
        "intermediate_size": first.ffn_size,
        "max_position_embeddings": config.max_positions if scaling is None else max(config.max_positions, scaling.extended_max_positions),
        "hidden_activation" if parts.windows == "gemma" else "hidden_act": _fixed_values(config.family)["hidden_activation"][0],
        "norm_eps" if config.family == "nemotron" else "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "attention_dropout": 0.0,
        "use_cache": True,
    }
    if parts.partial_rotary:
        hf["partial_rotary_factor"] = config.rotary_fraction
    if not parts.qkv_bias:
        hf["attention_bias"] = config.attention_bias
    if config.mlp_bias:
        hf["mlp_bias"] = True
    if parts.has_default_ids:
        hf |= {"bos_token_id": None, "pad_token_id": None}
    if "attention_multiplier" in parts.keys:
        hf["attention_multiplier"] = first.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
        hf |= {name: getattr(config, name) for name in ("embedding_multiplier", "residual_multiplier", "logits_scaling")}
    if "query_pre_attn_scalar" in parts.keys:
        hf["query_pre_attn_scalar"] = first.head_dim if config.attention_scale is None else round(config.attention_scale**-2)
        hf |= {"attn_logit_softcapping": config.attention_soft_cap, "final_logit_softcapping": config.logits_soft_cap}
    if scaling is not None:
        hf["rope_scaling"] = write_rope(scaling)
        if config.family == "phi3":
            hf[ORIGINAL] = scaling.original_max_positions
    if parts.rope == "local":
        local = {} if config.local_rope_scaling is None else write_rope(config.local_rope_scaling)
        full = {"rope_type": "default", **hf.pop("rope_scaling", {}), "rope_theta": hf.pop("rope_theta")}
        hf["rope_parameters"] = {
            "full_attention": full,
            "sliding_attention": {"rope_type": "default", **local, "rope_theta": config.local_rope_theta},
        }
    if uniform:
        return hf | (layers or {})
    for key in ("num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size"):
        del hf[key]
    usual = {"window": 0, "rope": "global"}
    blocks = [{name: value for name, value in asdict(block).items() if usual.get(name) != value} for block in config.blocks]
    hf["gristmill"] = {"family": config.family, "blocks": blocks}
    return hf


def _layers_to_hf(config: ModelConfig) -> dict[str, Any] | None:
    """The keys of a config.json that say which layers rotate and see a window; None where the family has none for these."""
    parts = config.parts
    windows, ropes = [block.window for block in config.blocks], [block.rope for block in config.blocks]
    sizes = sorted(set(windows) - {0})
    if len(sizes) > 1 or (sizes and (not parts.windows or (parts.windows == "all" and 0 in windows))):
        return None
    if parts.rope == "local" and any((rope == "local") != bool(window) for rope, window in zip(ropes, windows, strict=True)):
        return None
    window = sizes[0] if sizes else None
    types: dict[str, Any] = {"layer_types": ["sliding_attention" if one else "full_attention" for one in windows]}
    if parts.windows == "all":
        return {"sliding_window": window}
    if parts.windows == "gemma":
        return types if window is None else types | {"sliding_window": window}
    layers = types | {"use_sliding_window": True, "sliding_window": window} if window is not None else {}
    if parts.rope == "nope":
        layers |= {"no_rope_layers": [int(rope != "none") for rope in ropes]}
    return layers
