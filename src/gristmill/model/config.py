"""Model configuration: one `BlockConfig` a layer, one `ModelConfig` a model, and the presets.

Four families share one transformer. A family fixes the kind of norm, the MLP and the extras of attention;
everything else is a number in the configuration. Sources: Nemotron-4 15B (arXiv 2402.16819) Table 1,
Nemotron-4 340B report Table 1, and the published configurations of the models.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from gristmill.core.echo import echo
from gristmill.core.errors import InputError
from gristmill.core.untrusted import existing_file, quoted, read_untrusted_json

# Bounds of a configuration: several times the largest published model. Below them, what a model needs is known without overflow.
MAX_SIZES = {
    "vocab_size": 2**21,
    "hidden_size": 2**16,
    "ffn_size": 2**19,
    "num_heads": 2**10,
    "num_kv_heads": 2**10,
    "head_dim": 2**10,
    "max_positions": 2**22,
}
MAX_LAYERS = 512


def _check_sizes(minimum: int, **sizes: Any) -> None:
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= MAX_SIZES[name]:
            raise InputError(f"Give {name} a whole number from {minimum} to {MAX_SIZES[name]}: it is {quoted(value)}.")


def _check_numbers(**numbers: tuple[Any, float, float]) -> None:
    for name, (value, low, high) in numbers.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:  # NaN is not
            raise InputError(f"Give {name} a number from {low:g} to {high:g}: it is {quoted(value)}.")


@dataclass(frozen=True)
class Family:
    """Architecture family: the parts that every model of one Hugging Face architecture has in common."""

    architecture: str
    zero_centred_norm: bool  # LayerNorm1P (mean removed, gain 1 + w, bias) instead of RMSNorm
    gated_silu: bool  # down(silu(gate x) * up x) instead of down(relu(up x)^2)
    qk_norm: bool  # RMSNorm of every query and key head before the rotation
    qkv_bias: bool
    # What transformers takes for keys that a config.json lacks; None: from the other sizes.
    default_rotary_fraction: float
    default_max_positions: int
    default_kv_heads: int | None
    default_head_dim: int | None
    default_init_std: float


FAMILIES: dict[str, Family] = {
    "nemotron": Family("NemotronForCausalLM", True, False, False, False, 0.5, 4096, None, None, 0.0134),
    "llama": Family("LlamaForCausalLM", False, True, False, False, 1.0, 2048, None, None, 0.02),
    "qwen2": Family("Qwen2ForCausalLM", False, True, False, True, 1.0, 32_768, 32, None, 0.02),
    "qwen3": Family("Qwen3ForCausalLM", False, True, True, False, 1.0, 32_768, 32, 128, 0.02),
}
# Architecture and model_type of a folder whose layers differ or lack a part. Named after a family, such a folder would be opened by
# transformers, with random weights in place of those that it lacks.
OWN_ARCHITECTURE, OWN_MODEL_TYPE = "GristmillForCausalLM", "gristmill"


@dataclass(frozen=True)
class BlockConfig:
    """Configuration of one layer. `num_heads = 0` means no attention, `ffn_size = 0` means no MLP."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int

    def __post_init__(self) -> None:
        _check_sizes(0, **asdict(self))
        if self.num_heads and (self.num_kv_heads == 0 or self.num_heads % self.num_kv_heads):
            raise InputError(
                f"Choose a number of query heads ({self.num_heads}) that is a multiple of the number of "
                f"key-value heads ({self.num_kv_heads})."
            )
        if self.num_heads and self.head_dim == 0:
            raise InputError("Give attention a head_dim greater than zero.")

    @property
    def has_attention(self) -> bool:
        return self.num_heads > 0

    @property
    def has_mlp(self) -> bool:
        return self.ffn_size > 0


@dataclass(frozen=True)
class RopeScaling:
    """RoPE scaling of Llama 3.1: stretching of the low rotary frequencies (rope_type "llama3")."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int

    def __post_init__(self) -> None:
        _check_sizes(1, max_positions=self.original_max_positions)
        _check_numbers(factor=(self.factor, 1e-3, 1e6), low_freq_factor=(self.low_freq_factor, 1e-6, 1e6))
        _check_numbers(high_freq_factor=(self.high_freq_factor, 1e-6, 1e6))
        if self.high_freq_factor <= self.low_freq_factor:
            raise InputError(
                f"Give a high_freq_factor ({quoted(self.high_freq_factor)}) above low_freq_factor ({quoted(self.low_freq_factor)})."
            )


@dataclass(frozen=True)
class ModelConfig:
    """Configuration of a decoder: `family` names the kind of block (a key of FAMILIES), `blocks` the layers in order."""

    family: str
    vocab_size: int
    hidden_size: int
    blocks: tuple[BlockConfig, ...]
    max_positions: int
    norm_eps: float = 1e-5
    rotary_fraction: float = None  # type: ignore[assignment]  # None: the family's own
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False
    init_std: float = 0.02

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise InputError(f"Use one of the model families {', '.join(FAMILIES)} instead of {self.family!r}.")
        if self.rotary_fraction is None:
            object.__setattr__(self, "rotary_fraction", self.parts.default_rotary_fraction)
        if not 1 <= len(self.blocks) <= MAX_LAYERS:
            raise InputError(f"Give the model from 1 to {MAX_LAYERS} layers: it has {len(self.blocks)}.")
        _check_sizes(1, vocab_size=self.vocab_size, hidden_size=self.hidden_size, max_positions=self.max_positions)
        _check_numbers(norm_eps=(self.norm_eps, 0, 1), init_std=(self.init_std, 0, 1))
        _check_numbers(rotary_fraction=(self.rotary_fraction, 0, 1), rope_theta=(self.rope_theta, 1e-6, 1e15))
        if self.rotary_fraction != 1 and self.parts.default_rotary_fraction == 1:
            raise InputError(f"Use rotary_fraction (partial_rotary_factor) 1 with {self.family}: it has no partial rotation.")
        if len({b.head_dim for b in self.blocks if b.has_attention}) > 1:
            # One table of rotary angles serves all layers.
            raise InputError("Give all layers with attention the same head_dim.")
        if self.rotary_dims % 2:
            raise InputError(f"Choose head_dim and rotary_fraction so that an even number of dimensions rotates (now {self.rotary_dims}).")

    @property
    def parts(self) -> Family:
        return FAMILIES[self.family]

    @property
    def num_layers(self) -> int:
        return len(self.blocks)

    @property
    def head_dim(self) -> int:
        """Size of an attention head, or 0 where no layer has attention."""
        return next((b.head_dim for b in self.blocks if b.has_attention), 0)

    @property
    def rotary_dims(self) -> int:
        """How many dimensions of each head rotate; the rest passes through."""
        return int(self.head_dim * self.rotary_fraction)

    @staticmethod
    def from_hf(hf: Mapping[str, Any]) -> "ModelConfig":
        """Read a Hugging Face config.json. Raises InputError for an architecture or option we cannot run."""
        return _from_hf(hf)

    def to_hf(self) -> dict[str, Any]:
        """The Hugging Face config.json of this model. Layers that differ go under the key "gristmill"."""
        return _to_hf(self)


def uniform_blocks(num_layers: int, num_heads: int, num_kv_heads: int, head_dim: int, ffn_size: int) -> tuple[BlockConfig, ...]:
    """The same layer `num_layers` times."""
    return (BlockConfig(num_heads, num_kv_heads, head_dim, ffn_size),) * num_layers


PRESETS: dict[str, ModelConfig] = {
    "nemotron4-340b": ModelConfig("nemotron", 256_000, 18_432, uniform_blocks(96, 96, 8, 192, 73_728), 4096, init_std=0.0063),
    "nemotron4-15b": ModelConfig("nemotron", 256_000, 6144, uniform_blocks(32, 48, 8, 128, 24_576), 4096, init_std=0.0134),
    "minitron-4b": ModelConfig("nemotron", 256_000, 3072, uniform_blocks(32, 24, 8, 128, 9216), 4096, init_std=0.0134),
    # The published stds lie between 0.64 and 1.05 over sqrt(hidden size); this is 0.64 / sqrt(128).
    "miniature": ModelConfig("nemotron", 1024, 128, uniform_blocks(6, 4, 2, 32, 512), 512, init_std=0.057),
}


# ---- config.json, read as transformers reads it ----

EXPECTED = "Use a checkpoint whose config.json has"
ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"}
LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor")
DTYPES = ("float64", "float32", "float16", "bfloat16", "double", "float", "half", "auto")

# Keys that are read here or say nothing about the forward pass: tokens, sampling, training, and notes of other programs.
_HARMLESS = re.compile(
    r"architectures|model_type|gristmill|reward_attributes|reward_weights|quantization_config|(vocab|hidden|intermediate)_size"
    r"|num_hidden_layers|num_attention_heads|num_key_value_heads|head_dim|(original_)?max_position_embeddings|initializer_range"
    r"|rope_theta|rope_scaling|rope_parameters|partial_rotary_factor|tie_word_embeddings|(use_)?sliding_window|max_window_layers"
    r"|layer_types|_.*|.*dropout.*|.*pdrop|.*_token_ids?|.*token_index|(output|return)_.*|use_(return_dict|cache|bfloat16)|.*version"
    r"|transformers.*|unsloth.*|is_llama_config|is_decoder|pretraining_tp|chunk_size_feed_forward|gradient_checkpointing|torchscript"
    r"|id2label|label2id|num_labels|problem_type|finetuning_task|task_specific_params|tokenizer_class|prefix|tf_legacy_loss"
    r"|tie_encoder_decoder|name_or_path|model_max_length|max_sequence_length|do_sample|early_stopping|temperature|top_[kp]|typical_p"
    r"|(min|max)_(length|new_tokens)|num_beams|num_beam_groups|num_return_sequences|.*_penalty|.*no_repeat_ngram_size|bad_words_ids"
    r"|remove_invalid_values|(begin_)?suppress_tokens"
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
    path = existing_file(folder / "config.json", "Give a folder with a Hugging Face model")
    hf = read_untrusted_json(path)
    try:
        config = ModelConfig.from_hf(hf)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    _check_ends(hf, path, config.vocab_size)
    generation = folder / "generation_config.json"
    if generation.exists():
        _check_ends(read_untrusted_json(generation), generation, config.vocab_size)
    if unknown := unknown_keys(hf, config):
        some = ", ".join(f"{quoted(key)[1:-1]} = {quoted(hf[key])}" for key in unknown[:5])
        more = f", and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        _warn(f"{path} has keys that are not read, and that may change what the model computes: {some}{more}.")
    return hf, config


@cache
def _warn(message: str) -> None:  # once a process, however often a model is loaded
    echo(f"Warning: {message}", err=True)


def _check_ends(values: Mapping[str, Any], path: Path, vocab_size: int) -> None:
    ends = values.get("eos_token_id")
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
    known = {"norm_eps" if config.family == "nemotron" else "rms_norm_eps", *_fixed_values(config.family)}
    return sorted(key for key in hf if key not in known and not _HARMLESS.fullmatch(key) and not _is_neutral(key, hf[key]))


def _fixed_values(family: str) -> dict[str, tuple[Any, ...]]:
    """Keys that choose between kinds of block, and the values that mean the kind of this family; the first where a key is absent."""
    parts = FAMILIES[family]
    activations = ("silu", "swish", None) if parts.gated_silu else ("relu2", None)
    names = ("hidden_act", "hidden_activation", "activation_function", "mlp_hidden_act")
    fixed: dict[str, tuple[Any, ...]] = dict.fromkeys(names, activations)
    fixed["hidden_act"] = activations[:-1]
    fixed |= {"mlp_bias": (False, None), "is_causal": (True, None), "position_embedding_type": ("rope", "rotary", None)}
    fixed |= dict.fromkeys(("is_encoder_decoder", "add_cross_attention"), (False, None))
    fixed |= dict.fromkeys(("use_qk_norm", "qk_norm", "qk_layernorm"), (parts.qk_norm, None))
    # Qwen2 has a bias on q, k and v whatever this key says.
    fixed |= {"attention_bias": (False, True, None) if parts.qkv_bias else (False, None), "qkv_bias": (parts.qkv_bias, None)}
    fixed |= dict.fromkeys(("torch_dtype", "dtype"), (None, *DTYPES, *(f"torch.{name}" for name in DTYPES)))
    return fixed


def _refuse_unsupported(hf: Mapping[str, Any], family: str) -> None:
    fixed = _fixed_values(family)
    for key, value in hf.items():
        if key in fixed:
            # by type too: 0 and 1 are no booleans
            if not any(value == one and type(value) is type(one) for one in fixed[key]):
                raise InputError(f"{EXPECTED} {key} = {fixed[key][0]!r}: {key} = {quoted(value)} is not supported for {family}.")
        elif not _HARMLESS.fullmatch(key) and _CHANGES.search(key) and not _is_neutral(key, value):
            raise InputError(
                f"Use a checkpoint without the key {quoted(key)[1:-1]} in its config.json: {quoted(value)} may change what the model "
                f"computes, and is not supported for {family}."
            )


def _value(hf: Mapping[str, Any], key: str, default: Any = None, *, null: Any = None) -> Any:
    """The value of a key, `default` where it is absent, `null` where it is null.

    Raises:
        InputError: it is absent or null, and that means nothing.
    """
    if key not in hf and default is None:
        raise InputError(f"Add the missing key {key!r} to the model's config.json.")
    value = hf.get(key, default)
    if value is None and null is None:
        raise InputError(f"Give {key!r} a value in the model's config.json: it is null.")
    return null if value is None else value


def _mapping(hf: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = {} if hf.get(key) is None else hf[key]
    if not isinstance(value, dict):
        raise InputError(f"Correct {key} in the model's config.json: {quoted(value)} is no JSON object.")
    return value


def _rope_from_hf(hf: Mapping[str, Any], parts: Family, max_positions: int) -> tuple[float, RopeScaling | None, float]:
    # Newer writers gather everything in "rope_parameters"; older ones spread it over three keys.
    new, old = _mapping(hf, "rope_parameters"), _mapping(hf, "rope_scaling")
    if new and old and new != old:
        raise InputError("Take rope_scaling or rope_parameters out of the model's config.json: they are not the same.")
    rope = old or new
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3") or rope.get("type", kind) != kind:
        raise InputError(f"Use a checkpoint with plain or llama3 rope scaling: {quoted(rope.get('type', kind))} is not supported.")
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in rope and key in hf and rope[key] != hf[key]:
            raise InputError(f"Give {key} once in the model's config.json: it is {quoted(rope[key])} and {quoted(hf[key])}.")
    known = ROPE_KEYS | (set(LLAMA3_KEYS) if kind == "llama3" else set())
    for key, value in rope.items():
        if key not in known and value not in (None, 1, False):
            raise InputError(f"Use a checkpoint with plain or llama3 rope scaling: {quoted(key)[1:-1]} = {quoted(value)} is not supported.")
    theta = _value({**hf, **rope}, "rope_theta", 10_000.0)
    fraction = _value({**hf, **rope}, "partial_rotary_factor", parts.default_rotary_fraction, null=None if parts.zero_centred_norm else 1.0)
    if kind == "default":
        return theta, None, fraction
    original = hf.get("original_max_position_embeddings", rope.get("original_max_position_embeddings", max_positions))
    factor, low, high = (_value(rope, key) for key in LLAMA3_KEYS)
    return theta, RopeScaling(factor, low, high, original), fraction


def _blocks_from_hf(hf: Mapping[str, Any], parts: Family) -> tuple[BlockConfig, ...]:
    listed = _mapping(hf, "gristmill").get("blocks")
    if listed is not None:
        if not isinstance(listed, list) or len(listed) > MAX_LAYERS:
            raise InputError(f"Correct the list of blocks in the model's config.json: it is no list of up to {MAX_LAYERS}.")
        try:
            return tuple(BlockConfig(**block) for block in listed)
        except TypeError:
            names = ", ".join(BlockConfig.__dataclass_fields__)
            raise InputError(f"Correct the list of blocks in the model's config.json: each has {names}.") from None
    hidden, heads = _value(hf, "hidden_size"), _value(hf, "num_attention_heads")
    _check_sizes(1, hidden_size=hidden, num_heads=heads)
    kv_heads = _value(hf, "num_key_value_heads", parts.default_kv_heads or heads, null=heads)
    head_dim = _value(hf, "head_dim", parts.default_head_dim or hidden // heads, null=parts.default_head_dim or hidden // heads)
    layers, ffn = _value(hf, "num_hidden_layers"), _value(hf, "intermediate_size")
    _check_sizes(1, num_kv_heads=kv_heads, head_dim=head_dim, ffn_size=ffn)
    if not isinstance(layers, int) or isinstance(layers, bool) or not 1 <= layers <= MAX_LAYERS:
        raise InputError(f"Give num_hidden_layers a whole number from 1 to {MAX_LAYERS}: it is {quoted(layers)}.")
    return uniform_blocks(layers, heads, kv_heads, head_dim, ffn)


def _refuse_windows(hf: Mapping[str, Any], family: str, num_layers: int, max_positions: int) -> None:
    """Refuse layers that see only a window of the tokens before them, unless the window holds the whole context."""
    qwen = FAMILIES[family].default_kv_heads is not None
    used = hf.get("use_sliding_window", None if qwen else hf.get("sliding_window") is not None)
    if not isinstance(used, bool | None):
        raise InputError(f"{EXPECTED} use_sliding_window = False: it is {quoted(used)}.")
    # Qwen's default, which only `use_sliding_window` makes one
    window = hf.get("sliding_window", 4096 if qwen else None) if used else None
    types = hf.get("layer_types")
    if types is None:
        first = hf.get("max_window_layers", 28) if qwen else 0
        windowed = bool(used) and (not isinstance(first, int) or first < num_layers) and (window is not None or not qwen)
    else:
        known = ("full_attention", "attention", "sliding_attention")
        strange = [one for one in types if one not in known] if isinstance(types, list) else [types]
        if strange:
            raise InputError(f"{EXPECTED} layers of full attention: {quoted(strange[0])} is not supported.")
        windowed = "sliding_attention" in types
    if windowed and (not isinstance(window, int) or window < max_positions):
        raise InputError(
            f"{EXPECTED} layers of full attention (use_sliding_window = False): a sliding_window of {quoted(window)} tokens is not "
            f"supported, unless it holds the whole context of {max_positions}."
        )


def _family_from_hf(hf: Mapping[str, Any]) -> str:
    names = {family.architecture: name for name, family in FAMILIES.items()}
    architectures, kind = hf.get("architectures") or [], hf.get("model_type")
    if not isinstance(architectures, list) or not isinstance(kind, str | None):
        raise InputError(f"Correct architectures ({quoted(architectures)}) or model_type ({quoted(kind)}) in the model's config.json.")
    found = architectures[0] if architectures else kind
    if found == OWN_ARCHITECTURE and kind == OWN_MODEL_TYPE:
        family = _mapping(hf, "gristmill").get("family")
    else:
        family = names.get(found, found if not architectures else None) if isinstance(found, str) else None
        if isinstance(kind, str) and family in FAMILIES and kind != family:
            raise InputError(f"Correct architectures or model_type in the model's config.json: {quoted(found)} is not {quoted(kind)}.")
    if not isinstance(family, str) or family not in FAMILIES:
        raise InputError(f"Use a checkpoint of one of {', '.join(names)}: {quoted(found)} is not supported.")
    return family


def _from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    family = _family_from_hf(hf)
    parts = FAMILIES[family]
    _refuse_unsupported(hf, family)
    max_positions = _value(hf, "max_position_embeddings", parts.default_max_positions)
    _check_sizes(1, max_positions=max_positions)
    blocks = _blocks_from_hf(hf, parts)
    _refuse_windows(hf, family, len(blocks), max_positions)
    theta, scaling, fraction = _rope_from_hf(hf, parts, max_positions)
    tied = hf.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise InputError(f"Give tie_word_embeddings true or false in the model's config.json: it is {quoted(tied)}.")
    return ModelConfig(
        family=family,
        vocab_size=_value(hf, "vocab_size"),
        hidden_size=_value(hf, "hidden_size"),
        blocks=blocks,
        max_positions=max_positions,
        norm_eps=_value(hf, "norm_eps", 1e-5) if parts.zero_centred_norm else _value(hf, "rms_norm_eps", 1e-6),
        rotary_fraction=fraction,
        rope_theta=theta,
        rope_scaling=scaling,
        tie_embeddings=tied,
        init_std=_value(hf, "initializer_range", parts.default_init_std),
    )


def _to_hf(config: ModelConfig) -> dict[str, Any]:
    parts, first = config.parts, config.blocks[0]
    # Hugging Face's keys cannot express layers that differ or lack a part.
    uniform = len(set(config.blocks)) == 1 and first.has_attention and first.has_mlp
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
        "max_position_embeddings": config.max_positions,
        "hidden_act": "silu" if parts.gated_silu else "relu2",
        "norm_eps" if parts.zero_centred_norm else "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "attention_dropout": 0.0,
        "use_cache": True,
    }
    if parts.default_rotary_fraction != 1.0:
        hf["partial_rotary_factor"] = config.rotary_fraction
    if not parts.qkv_bias:
        hf["attention_bias"] = False
    if config.rope_scaling is not None:
        scaling = config.rope_scaling
        hf["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_positions,
        }
    if not uniform:
        for key in ("num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size"):
            del hf[key]
        hf["gristmill"] = {"family": config.family, "blocks": [asdict(block) for block in config.blocks]}
    return hf
