"""Memory of a parallel layout: weights, gradients, optimizer states, activations and loss of every kind of pipeline rank."""

from dataclasses import asdict, dataclass

from gristmill.model.config import BlockConfig, ModelConfig
from gristmill.model.flops import (
    CHUNK_LOGITS,
    GRADIENT_BYTES,
    MASTER_BYTES,
    MIN_CHUNK_ROWS,
    MOMENT_BYTES,
    block_activation_bytes_per_token,
    block_matrix_parameters,
    block_vector_parameters,
    loss_bytes,
    saved_values,
)
from gristmill.parallel.hardware import Hardware
from gristmill.parallel.layout import Layout, counted, rank_blocks
from gristmill.parallel.lora_plan import BASE_BYTES, LoraPlan, adapted, adapter_parameters, frozen_bytes, kept_values

USABLE_SHARE = 0.9  # of the free memory: an estimate may be wrong by a tenth, and a GPU's libraries and fragments take some


def fits_into(needed: float, free: float) -> bool:
    """Whether training that needs so many bytes may be started with so many free."""
    return needed <= USABLE_SHARE * free


@dataclass(frozen=True)
class Memory:
    """Bytes that one rank holds at its peak. `weights` are the copy that is computed with, `optimizer` holds the fp32 masters too."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    loss: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.loss

    def gib(self) -> dict[str, float]:
        """Every part and the total in GiB."""
        return {name: value / 2**30 for name, value in [*asdict(self).items(), ("total", self.total)]}


def rank_parameters(config: ModelConfig, layout: Layout, rank: int) -> float:
    """Parameters that a pipeline rank holds; TP shares out matrices, and repeats norms (and key-value heads, where there are fewer)."""
    blocks = counted(rank_blocks(config, layout, rank))
    return sum(count * block_parameters(config, block, layout.tp) for block, count in blocks) + _ends(config, layout, rank)


def trained_parameters(config: ModelConfig, layout: Layout, rank: int) -> float:
    """Parameters of a pipeline rank that are trained: all, or an adapter's."""
    if (lora := layout.lora) is None:
        return rank_parameters(config, layout, rank)
    return sum(count * adapter_parameters(config, block, lora) for block, count in counted(rank_blocks(config, layout, rank)))


def rank_weight_bytes(config: ModelConfig, layout: Layout, rank: int) -> float:
    """Bytes of a pipeline rank's weights with fp32 masters, whole: all are trained, or an adapter beside what is frozen."""
    trained = BASE_BYTES["fp32"] * trained_parameters(config, layout, rank)
    return trained if layout.lora is None else trained + _frozen_bytes(config, layout, layout.lora, rank)


def _frozen_bytes(config: ModelConfig, layout: Layout, lora: LoraPlan, rank: int) -> float:
    """Bytes of what a pipeline rank has beside an adapter: with a base of fewer bits embedding and output matrix are in bf16."""
    total = _ends(config, layout, rank) * (BASE_BYTES["fp32"] if lora.base == "fp32" else BASE_BYTES["bf16"])
    for block, count in counted(rank_blocks(config, layout, rank)):
        vectors = block_vector_parameters(config, block)
        matrix = block_parameters(config, block, layout.tp) - vectors
        total += count * (frozen_bytes(config, block, lora, matrix) + BASE_BYTES["fp32"] * vectors)
    return total


def block_parameters(config: ModelConfig, block: BlockConfig, tp: int) -> float:
    """Parameters of a layer on one of `tp` ranks."""
    repeated = 2 * config.hidden_size * block.head_dim * max(0, tp - block.num_kv_heads) if block.has_attention else 0
    return (block_matrix_parameters(config, block) + repeated) / tp + block_vector_parameters(config, block)


def _ends(config: ModelConfig, layout: Layout, rank: int) -> float:
    """Rows of embedding and output matrix on a rank: the vocabulary is filled up to a multiple of TP."""
    matrix = -(-config.vocab_size // layout.tp) * config.hidden_size
    first, last = rank == 0, has_loss(layout, rank)
    one = config.tie_embeddings and layout.pp == 1  # with ZBV the last stage has a copy beside the first one's
    return matrix * ((1 if one else 2) if first and last else first or last)


def has_loss(layout: Layout, rank: int) -> bool:
    """Whether a pipeline rank has the last stage: with ZBV the first rank has."""
    return rank == (0 if layout.schedule == "zbv" else layout.pp - 1)


def micro_batches_in_flight(layout: Layout, rank: int) -> float:
    """Micro-batches whose activations a pipeline rank holds at the peak of 1F1B, of its interleaved form, or with zero bubble.

    With virtual stages the first rank holds pp (1 + (pp - 1) / (pp vp)): more than with 1F1B, for a smaller bubble. With zero bubble all
    ranks hold pp, where what gradients of matrices wait for counts as all activations do.
    """
    pp, vp, m = layout.pp, layout.vp, layout.num_micro_batches
    if layout.schedule != "1f1b":
        return min(pp, m)
    if vp == 1:
        return min(pp - rank, m)
    return min((pp * vp + pp - 1 - 2 * rank) / vp, m)


def memory(config: ModelConfig, layout: Layout, hardware: Hardware) -> dict[str, Memory]:
    """Memory of the first, a middle and the last pipeline rank (only the first where there is no pipeline), at the peak.

    Activations in bf16, also in fp8, of a layer, T tokens of a micro-batch over TP ranks: inputs of norms, products, attention and
    activation, each once (28.3 h bytes a token for Nemotron-4 340B; Megatron's estimate is 34 h).
    """
    ranks = {"first": 0} | ({"middle": 1} if layout.pp > 2 else {}) | ({"last": layout.pp - 1} if layout.pp > 1 else {})
    return {name: _rank_memory(config, layout, hardware, rank) for name, rank in ranks.items()}


def _rank_memory(config: ModelConfig, layout: Layout, hardware: Hardware, rank: int) -> Memory:
    blocks, lora = counted(rank_blocks(config, layout, rank)), layout.lora
    count, shards = trained_parameters(config, layout, rank), layout.num_shards if lora is None else 1
    itemsize = 4 if layout.precision == "fp32" else 2
    # in fp32, and of an adapter, the master is what is kept to compute with
    weights, optimizer = (4, MOMENT_BYTES) if itemsize == 4 or lora is not None else (itemsize, MASTER_BYTES + MOMENT_BYTES)
    tokens = layout.tokens / layout.tp
    sizes = [(_block_bytes(config, block, layout, hardware) * tokens, num) for block, num in blocks]
    full = layout.recompute == "full"  # keeps a layer's input, and of one layer at a time all the rest
    kept = sum((config.hidden_size * itemsize * tokens if full else size) * num for size, num in sizes)
    activations = micro_batches_in_flight(layout, rank) * kept + (max(sizes)[0] if full else 0)
    gathered = 0.0
    if layout.zero == 3 and shards > 1:  # a block is whole while it computes, and its gradients until they are shared out
        gathered = max(block_parameters(config, block, layout.tp) for block, _ in blocks) * (weights + GRADIENT_BYTES)
    frozen = 0.0 if lora is None else _frozen_bytes(config, layout, lora, rank)
    return Memory(
        weights=count * weights / (shards if layout.zero == 3 else 1) + gathered + frozen,
        gradients=count * GRADIENT_BYTES / (shards if layout.zero >= 2 else 1),
        optimizer=count * optimizer / (shards if layout.zero >= 1 else 1),
        activations=activations,
        loss=_loss_bytes(config, layout, hardware, itemsize) if has_loss(layout, rank) else 0.0,
    )


def _block_bytes(config: ModelConfig, block: BlockConfig, layout: Layout, hardware: Hardware) -> float:
    """Activations of a layer a token."""
    itemsize, lora = 4 if layout.precision == "fp32" else 2, layout.lora
    beside = 0.0 if lora is None else kept_values(config, block, lora, layout.tp) * itemsize
    if hardware.is_cpu:
        last = lora is not None and any(matrix.name == "down_proj" for matrix in adapted(config, block, lora))
        return block_activation_bytes_per_token(config, block, itemsize, adapted=last, compiled=hardware.kernels) + beside
    return saved_values(config, block, product=layout.recompute == "none") * itemsize + beside


def _loss_bytes(config: ModelConfig, layout: Layout, hardware: Hardware, itemsize: int) -> float:
    if hardware.is_cpu:
        return (
            loss_bytes(layout.tokens, config.vocab_size, config.hidden_size, itemsize) + 4 * config.hidden_size * itemsize * layout.tokens
        )
    vocabulary = -(-config.vocab_size // layout.tp)
    rows = min(layout.tokens, max(MIN_CHUNK_ROWS, CHUNK_LOGITS // vocabulary))
    # logits of a chunk and a slice of them in fp32; states before and after the last norm, and their gradients
    return rows * vocabulary * itemsize + 16 * CHUNK_LOGITS + 4 * config.hidden_size * itemsize * layout.tokens
