"""Model sizes: parameters, training FLOPs, utilisation and memory of a configuration, without building it.

Formulas as in the Nemotron-4 reports: embeddings count both matrices, FLOPs count the output matrix once and
attention in full (not halved for causality), nothing is counted for recomputation.
"""

from gristmill.model.config import BlockConfig, ModelConfig

H100_FLOPS = 989e12  # bf16, dense, a GPU
# A chunk of rows goes through the products with the output matrix at once: at least so many, since with a large vocabulary fewer cost
# 3 to 7 times the time. What a loss holds is the chunk's logits in the type of the states, MIN_CHUNK_ROWS x V or CHUNK_LOGITS.
MIN_CHUNK_ROWS = 1024
# The softmax is made in fp32 for a slice of the chunk: 8 MiB, which on a CPU stay in the cache.
CHUNK_LOGITS = 2**21
# Bytes of training a parameter, beside the copy that is computed with: gradient, master and AdamW's two moments, all in fp32.
GRADIENT_BYTES, MASTER_BYTES, MOMENT_BYTES = 4, 4, 8


def embedding_parameters(config: ModelConfig) -> int:
    """Input and output embedding (one matrix where they are tied)."""
    return (1 if config.tie_embeddings else 2) * config.vocab_size * config.hidden_size


def block_matrix_parameters(config: ModelConfig, block: BlockConfig) -> int:
    """Weights of the linear layers of a block."""
    heads = 2 * block.num_heads + 2 * block.num_kv_heads if block.has_attention else 0
    return config.hidden_size * (heads * block.head_dim + block.ffn_size * (3 if config.parts.gated else 2))


def matrix_parameters(config: ModelConfig) -> int:
    """Weights of all linear layers inside the blocks."""
    return sum(block_matrix_parameters(config, block) for block in config.blocks)


def _norm_parameters(config: ModelConfig) -> int:
    return config.hidden_size * (2 if config.parts.norm == "layernorm1p" else 1)


def block_vector_parameters(config: ModelConfig, block: BlockConfig) -> int:
    """Gains and biases of a block's norms, and biases of its projections."""
    parts, hidden = config.parts, config.hidden_size
    total = _norm_parameters(config) * (block.has_attention + block.has_mlp) * (parts.pre_norm + parts.post_norm)
    if block.has_attention:
        heads = {"": 0, "head": 2, "projection": block.num_heads + block.num_kv_heads}[parts.qk_norm]
        heads += (block.num_heads + 2 * block.num_kv_heads) * (parts.qkv_bias or config.attention_bias)
        total += heads * block.head_dim + hidden * config.attention_bias
    if block.has_mlp and config.mlp_bias:
        total += block.ffn_size * (2 if parts.gated else 1) + hidden
    return total


def vector_parameters(config: ModelConfig) -> int:
    """Gains and biases of norms, and biases of projections; published totals leave them out."""
    return _norm_parameters(config) + sum(block_vector_parameters(config, block) for block in config.blocks)


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


def saved_values(config: ModelConfig, block: BlockConfig, *, product: bool = True) -> int:
    """Values that a layer saves of one token for its backward pass: the inputs of norms, products, attention and activation, each once.

    Args:
        product: the input of the MLP's last matrix is saved too, and not made again from what the activation reads.
    """
    queries, keys = block.num_heads * block.head_dim, block.num_kv_heads * block.head_dim
    values = config.hidden_size * (2 + config.parts.post_norm) * (block.has_attention + block.has_mlp)
    if block.has_attention:
        values += 2 * queries + 2 * keys + block.num_heads + (queries + keys) * (config.parts.qk_norm != "")
    return values + block.ffn_size * ((2 if config.parts.gated else 1) + product)


def loss_bytes(num_rows: int, vocab_size: int, hidden_size: int, bytes_per_value: int) -> int:
    """Memory of a loss over the vocabulary: its chunk of logits, rows, the gradients of output matrix and of input embedding."""
    chunk = min(num_rows, max(MIN_CHUNK_ROWS, CHUNK_LOGITS // vocab_size)) * vocab_size * bytes_per_value
    matrices = vocab_size * hidden_size * (2 * 4 + (bytes_per_value if bytes_per_value < 4 else 0))
    return chunk + 16 * CHUNK_LOGITS + matrices + 4 * num_rows * hidden_size * bytes_per_value


def block_activation_bytes_per_token(
    config: ModelConfig, block: BlockConfig, bytes_per_value: float = 4, *, adapted: bool = False, compiled: bool = False
) -> int:
    """Bytes that a layer keeps of one token for its backward pass (on a CPU, within a tenth).

    Args:
        adapted: the MLP's last matrix has a LoRA adapter, and keeps what a gated MLP else makes again, as one with a bias does.
        compiled: kernels compute what they can, and keep what `saved_values` says; else torch does, and attention has padding.
    """
    queries, keys = block.num_heads * block.head_dim, block.num_kv_heads * block.head_dim
    short = bytes_per_value < 4
    if compiled:
        product = not config.parts.gated or config.mlp_bias or adapted
        return int(saved_values(config, block, product=product) * bytes_per_value)
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
