"""Model configuration: one `BlockConfig` a layer, one `ModelConfig` a model, and the presets.

Four families share one transformer. A family fixes the kind of norm, the MLP and the extras of attention;
everything else is a number in the configuration. Sources: Nemotron-4 15B (arXiv 2402.16819) Table 1,
Nemotron-4 340B report Table 1, and the published configurations of the models.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from gristmill.core.errors import InputError


@dataclass(frozen=True)
class Family:
    """Architecture family: the parts that every model of one Hugging Face architecture has in common."""

    architecture: str
    zero_centred_norm: bool  # LayerNorm1P (mean removed, gain 1 + w, bias) instead of RMSNorm
    gated_silu: bool  # down(silu(gate x) * up x) instead of down(relu(up x)^2)
    qk_norm: bool  # RMSNorm of every query and key head before the rotation
    qkv_bias: bool
    default_rotary_fraction: float


FAMILIES: dict[str, Family] = {
    "nemotron": Family("NemotronForCausalLM", True, False, False, False, 0.5),
    "llama": Family("LlamaForCausalLM", False, True, False, False, 1.0),
    "qwen2": Family("Qwen2ForCausalLM", False, True, False, True, 1.0),
    "qwen3": Family("Qwen3ForCausalLM", False, True, True, False, 1.0),
}


@dataclass(frozen=True)
class BlockConfig:
    """Configuration of one layer. `num_heads = 0` means no attention, `ffn_size = 0` means no MLP."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int

    def __post_init__(self) -> None:
        if min(self.num_heads, self.num_kv_heads, self.head_dim, self.ffn_size) < 0:
            raise InputError(f"Give sizes of zero or more in {self}.")
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


@dataclass(frozen=True)
class ModelConfig:
    """Configuration of a decoder: `family` names the kind of block (a key of FAMILIES), `blocks` the layers in order."""

    family: str
    vocab_size: int
    hidden_size: int
    blocks: tuple[BlockConfig, ...]
    max_positions: int
    norm_eps: float = 1e-5
    rotary_fraction: float = 0.5
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False
    init_std: float = 0.02

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise InputError(f"Use one of the model families {', '.join(FAMILIES)} instead of {self.family!r}.")
        if not self.blocks:
            raise InputError("Give the model at least one layer.")
        if min(self.vocab_size, self.hidden_size, self.max_positions) < 1:
            raise InputError("Give vocab_size, hidden_size and max_positions values of at least one.")
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


def _required(hf: Mapping[str, Any], key: str) -> Any:
    if hf.get(key) is None:
        raise InputError(f"Add the missing key {key!r} to the model's config.json.")
    return hf[key]


def _refuse_unsupported(hf: Mapping[str, Any], family: str) -> None:
    activation = "silu" if FAMILIES[family].gated_silu else "relu2"
    expected = {"hidden_act": activation, "mlp_bias": False, "use_sliding_window": False}
    if family != "qwen2":  # the key is absent there and its meaning fixed: bias on q, k, v only
        expected["attention_bias"] = False
    for key, value in expected.items():
        if hf.get(key, value) != value:
            raise InputError(
                f"Use a checkpoint whose config.json has {key} = {value!r}: {key} = {hf[key]!r} is not supported for {family}."
            )


def _rope_from_hf(hf: Mapping[str, Any], default_fraction: float) -> tuple[float, RopeScaling | None, float]:
    # Newer writers gather everything in "rope_parameters"; older ones spread it over three keys.
    rope = dict(hf.get("rope_parameters") or {})
    scaling = rope or dict(hf.get("rope_scaling") or {})
    theta = float(rope.get("rope_theta", hf.get("rope_theta") or 10_000.0))
    fraction = rope.get("partial_rotary_factor", hf.get("partial_rotary_factor"))
    fraction = default_fraction if fraction is None else float(fraction)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return theta, None, fraction
    if kind != "llama3":
        raise InputError(f"Use a checkpoint with plain or llama3 rope scaling: {kind!r} is not supported.")
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    factor, low, high, original = (_required(scaling, key) for key in keys)
    return theta, RopeScaling(float(factor), float(low), float(high), int(original)), fraction


def _blocks_from_hf(hf: Mapping[str, Any]) -> tuple[BlockConfig, ...]:
    listed = (hf.get("gristmill") or {}).get("blocks")
    if listed is not None:
        try:
            return tuple(BlockConfig(**block) for block in listed)
        except TypeError as error:
            raise InputError(f"Correct the list of blocks in the model's config.json: {error}.") from None
    hidden, heads = int(_required(hf, "hidden_size")), int(_required(hf, "num_attention_heads"))
    kv_heads = int(hf.get("num_key_value_heads") or heads)
    head_dim = int(hf.get("head_dim") or hidden // heads)
    layers, ffn = int(_required(hf, "num_hidden_layers")), int(_required(hf, "intermediate_size"))
    return uniform_blocks(layers, heads, kv_heads, head_dim, ffn)


def _from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    names = {family.architecture: name for name, family in FAMILIES.items()}
    architectures = hf.get("architectures") or []
    family = names.get(architectures[0]) if architectures else hf.get("model_type")
    if family not in FAMILIES:
        found = architectures[0] if architectures else hf.get("model_type")
        raise InputError(f"Use a checkpoint of one of {', '.join(names)}: {found!r} is not supported.")
    _refuse_unsupported(hf, family)
    theta, scaling, fraction = _rope_from_hf(hf, FAMILIES[family].default_rotary_fraction)
    eps_key = "norm_eps" if family == "nemotron" else "rms_norm_eps"
    return ModelConfig(
        family=family,
        vocab_size=int(_required(hf, "vocab_size")),
        hidden_size=int(_required(hf, "hidden_size")),
        blocks=_blocks_from_hf(hf),
        max_positions=int(_required(hf, "max_position_embeddings")),
        norm_eps=float(hf.get(eps_key) or (1e-5 if family == "nemotron" else 1e-6)),
        rotary_fraction=fraction,
        rope_theta=theta,
        rope_scaling=scaling,
        tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
        init_std=float(hf.get("initializer_range", 0.02)),
    )


def _to_hf(config: ModelConfig) -> dict[str, Any]:
    parts, first = config.parts, config.blocks[0]
    hf: dict[str, Any] = {
        "architectures": [parts.architecture],
        "model_type": config.family,
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
    if parts.default_rotary_fraction != 1.0 or config.rotary_fraction != 1.0:
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
    # Hugging Face's keys cannot express layers that differ or lack a part.
    if len(set(config.blocks)) > 1 or not (first.has_attention and first.has_mlp):
        hf["gristmill"] = {"blocks": [asdict(block) for block in config.blocks]}
    return hf
