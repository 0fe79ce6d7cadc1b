"""Step time of a parallel layout by part, from FLOPs and bytes: products, attention, element-wise work, traffic, bubble, optimizer.

The formulas and their three constants (gemm_efficiency, exposed_tp, straggling of `hardware.Hardware`) were fitted to 18 published
measurements on H100 clusters, which `published.py` lists; the root of their mean square error is 5.5 %.
"""

from dataclasses import asdict, dataclass
from math import log2

from gristmill.model.config import BlockConfig, ModelConfig
from gristmill.parallel.hardware import Hardware
from gristmill.parallel.layout import Layout, counted
from gristmill.parallel.lora_plan import BASE_BYTES, LoraPlan, adapted
from gristmill.parallel.lora_plan import matrices as matrices_of
from gristmill.parallel.memory import trained_parameters
from gristmill.parallel.schedule import Times, bubble

CP_EXPOSED = 0.3  # of the traffic of keys and values
NETWORK_SHARE = 0.7  # of its bandwidth that collectives over many ranks reach
OPTIMIZER_BYTES = 30  # read and written a parameter: gradient, master and moments
STRAGGLING_FROM = 64  # devices
SELECTIVE_SHARE = 0.1  # of a forward pass that selective recompute makes again


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step by part; they add up to it.

    Attributes:
        products: of the layers' matrices, forward and backward.
        head: products with the output matrix, and the softmax over the vocabulary.
        traffic_tp, traffic_cp, traffic_pp, traffic_dp: what of each dimension's traffic is exposed.
        bubble: of the pipeline.
        stragglers: waiting for the slowest of many devices.
    """

    products: float
    attention: float
    elementwise: float
    head: float
    recompute: float
    traffic_tp: float
    traffic_cp: float
    traffic_pp: float
    bubble: float
    traffic_dp: float
    optimizer: float
    stragglers: float

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


def step_time(config: ModelConfig, layout: Layout, hardware: Hardware) -> StepTime:
    """Time of a step: m micro-batches through the slowest stage, then the bubble, gradients, optimizer and stragglers.

    The slowest stage has the mean number of layers and the output matrix.
    """
    m, pp, vp = layout.num_micro_batches, layout.pp, layout.vp
    parts: dict[str, float] = dict.fromkeys(("products", "attention", "elementwise", "traffic_tp", "traffic_cp", "recompute"), 0.0)
    parts["head"] = _head(config, layout, hardware)
    forward, matrices = parts["head"] / (3 if layout.lora is None else 2), 0.0
    for block, count in counted(config.blocks):
        layer = _layer(config, block, layout, hardware)
        for name, seconds in layer.parts.items():
            parts[name] += count / pp * seconds
        forward, matrices = forward + count / pp * layer.forward, matrices + count / pp * layer.matrices
    stage = sum(parts.values())
    # a send and a receive of every virtual stage, forward and backward, half of them hidden
    p2p = vp * layout.tokens * config.hidden_size * _itemsize(layout) / layout.tp / hardware.network_bandwidth if pp > 1 else 0.0
    waits = bubble(layout.schedule, pp, vp, m, Times(forward / vp, (stage - forward - matrices) / vp, matrices / vp))
    trained = max(trained_parameters(config, layout, rank) for rank in {0, pp - 1})
    shards = layout.num_shards if layout.lora is None else 1
    exposed = 0.0
    for times, traffic in _gradient_traffic(trained, layout, hardware):
        exposed += times * max(hardware.exposed_dp * traffic, traffic - stage)
    optimizer = OPTIMIZER_BYTES * trained / (shards if layout.zero else 1) / hardware.memory_bandwidth
    subtotal = m * (stage + p2p) + waits + exposed + optimizer
    return StepTime(
        **{name: m * seconds for name, seconds in parts.items()},
        traffic_pp=m * p2p,
        bubble=waits,
        traffic_dp=exposed,
        optimizer=optimizer,
        stragglers=subtotal * hardware.straggling * max(0.0, log2(layout.num_devices / STRAGGLING_FROM)),
    )


def _itemsize(layout: Layout) -> int:
    return 4 if layout.precision == "fp32" else 2


def gemm_seconds(sides: tuple[float, float, float], layout: Layout, hardware: Hardware, *, precision: str = "") -> float:
    """Seconds of an M x N x K product: 2 M N K / (peak e / (1 + 100 (1/M + 1/N + 1/K)))."""
    m, n, k = sides
    if not m * n * k:
        return 0.0
    rate = hardware.peak(precision or layout.precision) * hardware.gemm_efficiency
    return 2 * m * n * k / rate * (1 + hardware.gemm_overhead * (1 / m + 1 / n + 1 / k)) + hardware.operation_seconds


@dataclass(frozen=True)
class _Layer:
    """Seconds of a layer and micro-batch by part, forward and backward; of its forward pass, and of its matrices' gradients."""

    parts: dict[str, float]
    forward: float
    matrices: float


def _layer(config: ModelConfig, block: BlockConfig, layout: Layout, hardware: Hardware) -> _Layer:
    tp, h, tokens, itemsize = layout.tp, config.hidden_size, layout.tokens, _itemsize(layout)
    gated, head_dim, heads, kv_heads = config.parts.gated, block.head_dim, block.num_heads, max(block.num_kv_heads, tp)
    sides: list[tuple[float, float, float]] = []
    if block.has_attention:
        sides += [(tokens, (heads + 2 * kv_heads) * head_dim / tp, h), (tokens, h, heads * head_dim / tp)]
    if block.has_mlp:
        sides += [(tokens, (1 + gated) * block.ffn_size / tp, h), (tokens, h, block.ffn_size / tp)]
    forward = sum(gemm_seconds(one, layout, hardware) for one in sides)
    # gradients of inputs as the forward pass, those of weights in bf16 where that is fp8
    weight_precision = "bf16" if layout.precision == "fp8" else ""
    matrices = sum(gemm_seconds(one, layout, hardware, precision=weight_precision) for one in sides)
    attention = cp = 0.0
    if block.has_attention:
        window = min(block.window or layout.seq_len, layout.seq_len)
        attended = window * (1 - window / (2 * layout.seq_len))  # by the mean token: half of the sequence without a window
        peak = hardware.peak("bf16" if layout.precision == "fp8" else layout.precision) * hardware.attention_efficiency
        attention = 4 * tokens * attended * heads / tp * head_dim / peak + hardware.operation_seconds
        gathered = 2 * layout.micro_batch * layout.seq_len * kv_heads / tp * head_dim * itemsize
        cp = CP_EXPOSED * (layout.cp - 1) / layout.cp * gathered / hardware.network_bandwidth
    halves = 0.5 * (block.has_attention + block.has_mlp)
    elementwise = tokens / tp * (34 * h * halves + 6 * (1 + gated) * block.ffn_size) * itemsize / 2 / hardware.memory_bandwidth
    traffic = 2 * (block.has_attention + block.has_mlp) * (tp - 1) / tp * tokens * h * itemsize / hardware.link_bandwidth
    traffic *= hardware.exposed_tp
    added = remade = 0.0
    if layout.lora is not None:
        matrices = 0.0  # they are frozen
        added, remade = _lora(config, block, layout, hardware, lora=layout.lora)
        elementwise += remade / 3
    once = forward + added + attention + elementwise + traffic + cp
    parts = {
        "products": 2 * forward + matrices + 3 * added,
        "attention": 3.5 * attention,
        "elementwise": 3 * elementwise,
        "traffic_tp": 2.5 * traffic,  # the backward pass gathers once more
        "traffic_cp": 3 * cp,
        "recompute": {"none": 0.0, "selective": SELECTIVE_SHARE, "full": 1.0}[layout.recompute] * once,
    }
    return _Layer(parts, once, matrices)


def _lora(config: ModelConfig, block: BlockConfig, layout: Layout, hardware: Hardware, *, lora: LoraPlan) -> tuple[float, float]:
    """Seconds that an adapter adds to a layer and micro-batch: low-rank products of a forward pass; and, over both passes, frozen matrices
    made dense in the type of the computation, and with DoRA the lengths of updated rows.
    """
    products = made = 0.0
    tp, tokens, itemsize = layout.tp, layout.tokens, _itemsize(layout)
    precision = "bf16" if layout.precision == "fp8" else ""
    for one in adapted(config, block, lora):
        # own tokens times A and all tokens times own rows of B, or all tokens times own columns of A and own tokens times B
        sides: list[tuple[float, float, float]] = [(tokens / tp, lora.rank, one.columns), (tokens, one.rows / tp, lora.rank)]
        if not one.by_rows:
            sides = [(tokens, lora.rank, one.columns / tp), (tokens / tp, one.rows, lora.rank)]
        products += sum(gemm_seconds(side, layout, hardware, precision=precision) for side in sides)
        if lora.dora:  # base, update and their sum in fp32
            made += 4 * 4 * one.rows * one.columns / tp / hardware.memory_bandwidth
            made += gemm_seconds((one.rows, one.columns / tp, lora.rank), layout, hardware, precision=precision)
    if BASE_BYTES[lora.base] != itemsize:
        size = sum(one.rows * one.columns for one in matrices_of(config, block)) / tp
        made += 2 * size * (BASE_BYTES[lora.base] + itemsize) / hardware.memory_bandwidth
    return products, made


def _head(config: ModelConfig, layout: Layout, hardware: Hardware) -> float:
    """Seconds of the output matrix and the loss of a micro-batch: its logits are written, read, and overwritten by their gradient."""
    precision, vocabulary = "bf16" if layout.precision == "fp8" else "", config.vocab_size / layout.tp
    sides, times = (layout.tokens, vocabulary, config.hidden_size), 3 if layout.lora is None else 2
    products = times * gemm_seconds(sides, layout, hardware, precision=precision)
    return products + 3 * layout.tokens * vocabulary * _itemsize(layout) / hardware.memory_bandwidth


def _gradient_traffic(parameters: float, layout: Layout, hardware: Hardware) -> list[tuple[int, float]]:
    """How often, and how many seconds each time, a rank's gradients (fp32) and weights take over the network.

    Without ZeRO gradients are all-reduced once a step; with shared optimizer states they are reduced and weights gathered once. Shared
    gradients are reduced after every micro-batch, and shared weights gathered before its forward and its backward pass too.
    """
    shards, weights = layout.num_shards, _itemsize(layout)
    if layout.lora is not None:  # an adapter is whole everywhere
        return [(1, 8 * parameters * (shards - 1) / shards / (NETWORK_SHARE * hardware.network_bandwidth))]
    once, each = {0: (8, 0), 1: (4 + weights, 0), 2: (weights, 4), 3: (0, 4 + 2 * weights)}[layout.zero]
    seconds = parameters * (shards - 1) / shards / (NETWORK_SHARE * hardware.network_bandwidth)
    return [(1, once * seconds), (layout.num_micro_batches, each * seconds)]
