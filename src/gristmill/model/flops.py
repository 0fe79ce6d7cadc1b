"""Model sizes: parameters, training FLOPs, utilisation and memory of a configuration, without building it.

Formulas as in the Nemotron-4 reports: embeddings count both matrices, FLOPs count the output matrix once and
attention in full (not halved for causality), nothing is counted for recomputation.
"""

from gristmill.core.device import has_bf16_products
from gristmill.model.config import BlockConfig, ModelConfig

H100_FLOPS = 989e12  # bf16, dense, a GPU


def embedding_parameters(config: ModelConfig) -> int:
    """Input and output embedding (one matrix where they are tied)."""
    return (1 if config.tie_embeddings else 2) * config.vocab_size * config.hidden_size


def matrix_parameters(config: ModelConfig) -> int:
    """Weights of all linear layers inside the blocks."""
    total = 0
    for block in config.blocks:
        heads = 2 * block.num_heads + 2 * block.num_kv_heads if block.has_attention else 0
        total += config.hidden_size * heads * block.head_dim
        total += config.hidden_size * block.ffn_size * (3 if config.parts.gated else 2)
    return total


def vector_parameters(config: ModelConfig) -> int:
    """Gains and biases of norms, and biases of projections; published totals leave them out."""
    parts, hidden = config.parts, config.hidden_size
    norm = hidden * (2 if parts.norm == "layernorm1p" else 1)
    total = norm
    for block in config.blocks:
        total += norm * (block.has_attention + block.has_mlp) * (parts.pre_norm + parts.post_norm)
        if block.has_attention:
            heads = {"": 0, "head": 2, "projection": block.num_heads + block.num_kv_heads}[parts.qk_norm]
            heads += (block.num_heads + 2 * block.num_kv_heads) * (parts.qkv_bias or config.attention_bias)
            total += heads * block.head_dim + hidden * config.attention_bias
        if block.has_mlp and config.mlp_bias:
            total += block.ffn_size * (2 if parts.gated else 1) + hidden
    return total


def num_parameters(config: ModelConfig) -> int:
    """All parameters of `Transformer(config)`."""
    return embedding_parameters(config) + matrix_parameters(config) + vector_parameters(config)


def training_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """FLOPs of forward and backward for one token of a sequence.

    6 (matrix parameters + V D) + 12 (sum over layers of heads * head_dim * min(seq_len, window)).
    """
    matrices = matrix_parameters(config) + config.vocab_size * config.hidden_size
    attended = sum(block.num_heads * block.head_dim * min(seq_len, block.window or seq_len) for block in config.blocks)
    return 6.0 * matrices + 12.0 * attended


def model_flops_utilisation(
    config: ModelConfig,
    seq_len: int,
    batch_size: int,
    *,
    step_seconds: float,
    num_devices: int,
    device_flops: float = H100_FLOPS,
) -> float:
    """Share (0 to 1) of the devices' peak that training reaches.

    `batch_size` counts the sequences of one step over all devices, `device_flops` is one device's peak.
    """
    flops = training_flops_per_token(config, seq_len) * batch_size * seq_len
    return flops / (num_devices * device_flops * step_seconds)


def kv_bytes_per_token(config: ModelConfig, bytes_per_value: float = 2) -> int:
    """Bytes of keys and values that one token leaves in the cache."""
    values = sum(2 * block.num_kv_heads * block.head_dim for block in config.blocks if block.has_attention)
    return int(values * bytes_per_value)


def weight_bytes(config: ModelConfig, bytes_per_value: float = 2) -> int:
    """Bytes of the weights when each takes `bytes_per_value` (2 for bf16, 1 for fp8)."""
    return int(num_parameters(config) * bytes_per_value)


def block_activation_bytes_per_token(
    config: ModelConfig, block: BlockConfig, bytes_per_value: float = 4, *, adapted: bool = False, compiled: bool = False
) -> int:
    """Bytes that a layer keeps of one token for its backward pass (on a CPU, within a tenth).

    Args:
        adapted: the MLP's last matrix has a LoRA adapter, and keeps what a gated MLP else makes again, as one with a bias does.
        compiled: the kernels of model/kernels compute what they can; else torch does, and attention has padding.
    """
    queries, keys = block.num_heads * block.head_dim, block.num_kv_heads * block.head_dim
    short = bytes_per_value < 4
    if compiled and not (short and has_bf16_products()):
        # the inputs of norms, products, attention and activations, each once
        norm = config.hidden_size * (2 + config.parts.post_norm)
        values = float(norm * (block.has_attention + block.has_mlp))
        if block.has_attention:
            values += 2 * queries + 2 * keys + block.num_heads + (queries + keys) * (config.parts.qk_norm != "")
        if block.has_mlp:
            values += block.ffn_size * (3 if config.parts.gated and (config.mlp_bias or adapted) else 2)
        return int(values * bytes_per_value)
    # RMS norms of torch keep their input in fp32 also in bf16
    norm = config.hidden_size * (1 if config.parts.norm == "layernorm1p" else 3 if short else 2) * (1 + config.parts.post_norm)
    values = 0.0
    if block.has_attention:
        # rotated heads and values, the same in padded views, outputs in both, and the input of the output projection
        values += norm + 5.4 * queries + 2.4 * keys
        values += (4.1 if short else 2.5) * (queries + keys) * (config.parts.qk_norm != "")
    if block.has_mlp:
        values += norm + block.ffn_size * (4 if config.parts.gated and (config.mlp_bias or adapted) else 2)
    return int(values * bytes_per_value)


def activation_bytes_per_token(config: ModelConfig, bytes_per_value: float = 4, *, adapted: bool = False, compiled: bool = False) -> int:
    """Bytes that the whole model keeps of one token for its backward pass, without the loss; `adapted` and `compiled` as above."""
    layers = sum(
        block_activation_bytes_per_token(config, block, bytes_per_value, adapted=adapted, compiled=compiled) for block in config.blocks
    )
    return layers + int(4 * config.hidden_size * bytes_per_value)
