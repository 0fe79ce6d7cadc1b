"""Model configuration: one `BlockConfig` a layer, one `ModelConfig` a model, and the presets.

All families share one transformer. A family fixes the kinds and places of norms, the MLP and the extras of attention;
everything else is a number in the configuration. Sources: Nemotron-4 15B (arXiv 2402.16819) Table 1,
Nemotron-4 340B report Table 1, the published configurations of the models, and transformers for what absent keys mean.
"""

from dataclasses import asdict, dataclass
from typing import Literal

from gristmill.core.errors import InputError
from gristmill.core.untrusted import quoted
from gristmill.model.bounds import MAX_FACTOR, check_numbers, check_sizes
from gristmill.model.rope import RopeScaling

MAX_LAYERS = 512


@dataclass(frozen=True, kw_only=True)
class Family:
    """Architecture family: the parts that every model of one Hugging Face architecture has in common.

    Attributes:
        norm: RMSNorm with gain w or 1 + w, or LayerNorm1P (mean removed, gain 1 + w, bias).
        pre_norm, post_norm: whether attention and MLP read a norm of the residual stream, and whether what they give is normed.
        activation: of the MLP down(f(gate x) * up x), or down(relu(up x)^2).
        qk_norm: RMSNorm before the rotation of every query and key head, or of all heads of a token together.
        qkv_bias: whether queries, keys and values have a bias, but the output none.
        fused: whether a file holds one matrix qkv_proj and one gate_up_proj.
        scaled_embedding: whether embeddings are multiplied by sqrt(hidden_size).
        partial_rotary: whether a part of each head may rotate.
        optional_biases: keys by which a config.json may give attention (its output too) and MLP a bias.
        windows: how a config.json says which layers see a window of tokens: none may, all do where there is one, or as listed.
        rope: how it says which layers rotate: all do, some do not, or those with a window have angles of their own.
        keys: those of its own that are read.
        has_default_ids: whether absent ids of padding and beginning mean tokens of the published vocabulary.
    """

    architecture: str
    norm: Literal["rms", "rms1p", "layernorm1p"] = "rms"
    pre_norm: bool = True
    post_norm: bool = False
    activation: Literal["silu", "gelu_tanh", "relu2"] = "silu"
    qk_norm: Literal["", "head", "projection"] = ""
    qkv_bias: bool = False
    fused: bool = False
    scaled_embedding: bool = False
    partial_rotary: bool = False
    optional_biases: tuple[str, ...] = ()
    windows: Literal["", "all", "qwen", "nope", "gemma"] = ""
    rope: Literal["all", "nope", "local"] = "all"
    keys: tuple[str, ...] = ()
    has_default_ids: bool = False
    # What transformers takes for keys that a config.json lacks; None: from the other sizes.
    default_rotary_fraction: float = 1.0
    default_rope_theta: float = 10_000.0
    default_max_positions: int = 2048
    default_kv_heads: int | None = None
    default_head_dim: int | None = None
    default_window: int | None = None
    default_norm_eps: float = 1e-6
    default_init_std: float = 0.02
    default_tied: bool = False

    @property
    def gated(self) -> bool:
        """Whether the MLP has a gate."""
        return self.activation != "relu2"


BIASES = ("attention_bias", "mlp_bias")
GEMMA_KEYS = ("query_pre_attn_scalar", "final_logit_softcapping", "attn_logit_softcapping")
FAMILIES: dict[str, Family] = {
    "nemotron": Family(
        architecture="NemotronForCausalLM",
        norm="layernorm1p",
        activation="relu2",
        partial_rotary=True,
        optional_biases=BIASES,
        default_rotary_fraction=0.5,
        default_max_positions=4096,
        default_norm_eps=1e-5,
        default_init_std=0.0134,
    ),
    "llama": Family(architecture="LlamaForCausalLM", optional_biases=BIASES),
    "mistral": Family(
        architecture="MistralForCausalLM", windows="all", default_max_positions=131_072, default_kv_heads=8, default_window=4096
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        qkv_bias=True,
        windows="qwen",
        default_max_positions=32_768,
        default_kv_heads=32,
        default_window=4096,
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        qk_norm="head",
        optional_biases=("attention_bias",),
        windows="qwen",
        default_max_positions=32_768,
        default_kv_heads=32,
        default_head_dim=128,
        default_window=4096,
    ),
    "smollm3": Family(
        architecture="SmolLM3ForCausalLM",
        has_default_ids=True,
        optional_biases=BIASES,
        windows="nope",
        rope="nope",
        keys=("no_rope_layers", "no_rope_layer_interval"),
        default_rope_theta=2_000_000.0,
        default_max_positions=32_768,
        default_kv_heads=4,
        default_tied=True,
    ),
    "olmo2": Family(
        architecture="Olmo2ForCausalLM",
        has_default_ids=True,
        pre_norm=False,
        post_norm=True,
        qk_norm="projection",
        optional_biases=("attention_bias",),
        default_norm_eps=1e-5,
    ),
    "granite": Family(
        architecture="GraniteForCausalLM",
        optional_biases=BIASES,
        keys=("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"),
    ),
    "phi3": Family(
        architecture="Phi3ForCausalLM",
        has_default_ids=True,
        fused=True,
        partial_rotary=True,
        windows="all",
        default_max_positions=4096,
        default_norm_eps=1e-5,
    ),
    "gemma": Family(
        architecture="GemmaForCausalLM",
        has_default_ids=True,
        norm="rms1p",
        activation="gelu_tanh",
        scaled_embedding=True,
        optional_biases=("attention_bias",),
        default_max_positions=8192,
        default_kv_heads=16,
        default_head_dim=256,
        default_tied=True,
    ),
    "gemma2": Family(
        architecture="Gemma2ForCausalLM",
        has_default_ids=True,
        norm="rms1p",
        post_norm=True,
        activation="gelu_tanh",
        scaled_embedding=True,
        optional_biases=("attention_bias",),
        windows="gemma",
        keys=GEMMA_KEYS,
        default_max_positions=8192,
        default_kv_heads=4,
        default_head_dim=256,
        default_window=4096,
        default_tied=True,
    ),
    "gemma3_text": Family(
        architecture="Gemma3ForCausalLM",
        has_default_ids=True,
        norm="rms1p",
        post_norm=True,
        activation="gelu_tanh",
        qk_norm="head",
        scaled_embedding=True,
        optional_biases=("attention_bias",),
        windows="gemma",
        rope="local",
        keys=(*GEMMA_KEYS, "sliding_window_pattern", "rope_local_base_freq"),
        default_rope_theta=1_000_000.0,
        default_max_positions=131_072,
        default_kv_heads=4,
        default_head_dim=256,
        default_window=4096,
        default_tied=True,
    ),
}
LOCAL_ROPE_THETA = 10_000.0  # of Gemma 3's layers with a window
ROPES = {"all": {"global"}, "nope": {"global", "none"}, "local": {"global", "local"}}  # of layers, by Family.rope
FACTORS = {  # fields of ModelConfig, and the keys of a family that has them
    "attention_scale": {"attention_multiplier", "query_pre_attn_scalar"},
    "embedding_multiplier": {"embedding_multiplier"},
    "residual_multiplier": {"residual_multiplier"},
    "logits_scaling": {"logits_scaling"},
    "attention_soft_cap": {"attn_logit_softcapping"},
    "logits_soft_cap": {"final_logit_softcapping"},
}
# Architecture and model_type of a folder whose layers differ or lack a part. Named after a family, such a folder would be opened by
# transformers, with random weights in place of those that it lacks.
OWN_ARCHITECTURE, OWN_MODEL_TYPE = "GristmillForCausalLM", "gristmill"


@dataclass(frozen=True)
class BlockConfig:
    """Configuration of one layer. `num_heads = 0` means no attention, `ffn_size = 0` means no MLP.

    Attributes:
        window: tokens that a token sees, itself included; 0 for all before it.
        rope: which angles rotate queries and keys: the model's, those of its layers with a window, or none.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    window: int = 0
    rope: str = "global"

    def __post_init__(self) -> None:
        check_sizes(0, **{name: value for name, value in asdict(self).items() if name != "rope"})
        if self.rope not in ("global", "local", "none"):
            raise InputError(f"Give rope of a layer global, local or none: it is {quoted(self.rope)}.")
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
class ModelConfig:
    """Configuration of a decoder: `family` names the kind of block (a key of FAMILIES), `blocks` the layers in order.

    Attributes:
        local_rope_theta, local_rope_scaling: of layers whose rope is "local".
        attention_bias, mlp_bias: whether the matrices of attention (output included) and MLP have a bias.
        attention_scale: of queries times keys; None for 1 / sqrt(head_dim).
        embedding_multiplier, residual_multiplier: of embeddings, and of what attention and MLP add; logits are divided by logits_scaling.
        attention_soft_cap, logits_soft_cap: x becomes cap * tanh(x / cap).
    """

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
    local_rope_theta: float = LOCAL_ROPE_THETA
    local_rope_scaling: RopeScaling | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    attention_scale: float | None = None
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0
    attention_soft_cap: float | None = None
    logits_soft_cap: float | None = None

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise InputError(f"Use one of the model families {', '.join(FAMILIES)} instead of {self.family!r}.")
        if self.rotary_fraction is None:
            object.__setattr__(self, "rotary_fraction", self.parts.default_rotary_fraction)
        if not 1 <= len(self.blocks) <= MAX_LAYERS:
            raise InputError(f"Give the model from 1 to {MAX_LAYERS} layers: it has {len(self.blocks)}.")
        check_sizes(1, vocab_size=self.vocab_size, hidden_size=self.hidden_size, max_positions=self.max_positions)
        check_numbers(norm_eps=(self.norm_eps, 0, 1), init_std=(self.init_std, 0, 1))
        check_numbers(rotary_fraction=(self.rotary_fraction, 0, 1), rope_theta=(self.rope_theta, 1e-6, 1e15))
        check_numbers(rope_local_base_freq=(self.local_rope_theta, 1e-6, 1e15))
        if self.attention_scale is None and {"attention_multiplier", "query_pre_attn_scalar"} & set(self.parts.keys) and self.head_dim:
            object.__setattr__(self, "attention_scale", self.head_dim**-0.5)
        for name, keys in FACTORS.items():
            if (value := getattr(self, name)) is not None:
                check_numbers(**{name: (value, 1 / MAX_FACTOR, MAX_FACTOR)})
                if value != 1 and not keys & set(self.parts.keys):
                    raise InputError(f"Leave {name} as it is with {self.family}: it has none.")
        if not {block.rope for block in self.blocks} <= ROPES[self.parts.rope]:
            raise InputError(f"Give the layers of {self.family} one of the kinds of rope {', '.join(sorted(ROPES[self.parts.rope]))}.")
        for name in BIASES:
            if getattr(self, name) and name not in self.parts.optional_biases:
                raise InputError(f"Use {name} = False with {self.family}.")
        if self.rotary_fraction != 1 and not self.parts.partial_rotary:
            raise InputError(f"Use rotary_fraction (partial_rotary_factor) 1 with {self.family}: it has no partial rotation.")
        if len({b.head_dim for b in self.blocks if b.has_attention}) > 1:
            # One table of rotary angles serves all layers.
            raise InputError("Give all layers with attention the same head_dim.")
        if self.rotary_dims % 2:
            raise InputError(f"Choose head_dim and rotary_fraction so that an even number of dimensions rotates (now {self.rotary_dims}).")
        if self.rope_scaling is not None and self.rope_scaling.kind == "longrope":
            for factors in (self.rope_scaling.short_factor, self.rope_scaling.long_factor):
                if len(factors) != self.rotary_dims // 2:
                    raise InputError(f"Give short_factor and long_factor {self.rotary_dims // 2} numbers each, not {len(factors)}.")

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
