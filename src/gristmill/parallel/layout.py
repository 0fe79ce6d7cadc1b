"""Parallel layout of a training: how many ways each dimension is split, and which layouts a model and a batch can take."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from gristmill.core.errors import InputError
from gristmill.model.config import BlockConfig, ModelConfig
from gristmill.parallel.hardware import Hardware
from gristmill.parallel.lora_plan import LoraPlan, check_lora

SCHEDULES = ("1f1b", "zero-bubble", "zbv")
RECOMPUTE = ("none", "selective", "full")
# Several times what anybody has: below them nothing overflows, and a search ends.
MAX_DEVICES, MAX_BATCH, MAX_SEQUENCE = 2**20, 2**24, 2**22
DEFAULT_SEQUENCE = 8192  # tokens, where the model's context is longer


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A parallel layout, with the batch that it trains on.

    Attributes:
        tp, pp, cp, dp: ways of tensor (with sequence), pipeline, context and data parallelism.
        vp: virtual pipeline stages a rank: the schedule is 1F1B with 1, and interleaved above.
        schedule: of the pipeline, out of SCHEDULES.
        micro_batch: sequences that a data-parallel rank computes at once.
        batch_size: sequences of one optimizer step over all ranks (the global batch).
        seq_len: tokens of a sequence, which attention takes for one document.
        recompute: activations made again in the backward pass: none, the MLP's activation (selective), or all of a layer (full).
        zero: what data-parallel ranks share out: 0 nothing, 1 optimizer states (the distributed optimizer), 2 gradients too, 3 weights too.
        lora: the adapter that is trained; of it, and of what is frozen, data-parallel ranks share nothing out.
    """

    batch_size: int
    seq_len: int
    tp: int = 1
    pp: int = 1
    vp: int = 1
    cp: int = 1
    dp: int = 1
    micro_batch: int = 1
    precision: str = "bf16"
    schedule: str = "1f1b"
    recompute: str = "none"
    zero: int = 1
    lora: LoraPlan | None = None

    @property
    def num_devices(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    @property
    def num_micro_batches(self) -> int:
        """Of one data-parallel rank in a step."""
        return self.batch_size // (self.dp * self.micro_batch)

    @property
    def num_shards(self) -> int:
        """Ranks that share out optimizer states: those of context parallelism hold the same weights too."""
        return self.dp * self.cp

    @property
    def tokens(self) -> int:
        """Of a micro-batch on one rank; tensor parallelism divides what lies between its products further."""
        return self.micro_batch * self.seq_len // self.cp

    def __str__(self) -> str:
        parts = {"TP": self.tp, "PP": self.pp, "VP": self.vp, "CP": self.cp, "DP": self.dp}
        ways = ", ".join(f"{name} {ways}" for name, ways in parts.items() if ways > 1 or name in ("TP", "PP", "DP"))
        again = f", recompute {self.recompute}" if self.recompute != "none" else ""
        schedule = f", {self.schedule}" if self.schedule != "1f1b" else ""
        lora = "" if self.lora is None else f", {'DoRA' if self.lora.dora else 'LoRA'} {self.lora.rank} on {self.lora.base}"
        return f"{ways}{schedule}, micro-batch {self.micro_batch}{again}{lora}"


def default_layout(config: ModelConfig, ways: Mapping[str, Any], *, num_devices: int | None, precision: str, zero: int) -> Layout:
    """A layout from what was given: ways that are absent are 1, DP is what is left of the devices.

    Raises:
        InputError: the ways do not divide the devices, or a number cannot be used.
    """
    for name, value in ways.items():
        if name not in ("recompute", "schedule", "lora"):
            _check_number(name, value)
    tp, pp, cp = (ways.get(name, 1) for name in ("tp", "pp", "cp"))
    dp = ways.get("dp", 1)
    if num_devices is not None:
        if not 1 <= num_devices <= MAX_DEVICES:
            raise InputError(f"Give --gpus a whole number from 1 to {MAX_DEVICES:,}: it is {num_devices}.")
        if num_devices % (tp * pp * cp):
            raise InputError(f"Choose --gpus that is a multiple of TP x PP x CP = {tp * pp * cp:,}: it is {num_devices:,}.")
        dp = ways.get("dp", num_devices // (tp * pp * cp))
        if tp * pp * cp * dp != num_devices:
            raise InputError(f"Leave --dp or --gpus out: TP x PP x CP x DP is {tp * pp * cp * dp:,}, and --gpus {num_devices:,}.")
    default = {
        "seq_len": min(config.max_positions, DEFAULT_SEQUENCE),
        "batch_size": dp * ways.get("micro_batch", 1) * (4 * pp if pp > 1 else 1),
    }
    return Layout(**{**default, **ways, "dp": dp}, precision=precision, zero=zero)


def _check_number(name: str, value: object) -> None:
    bound = {"micro_batch": MAX_BATCH, "batch_size": MAX_BATCH, "seq_len": MAX_SEQUENCE}.get(name, MAX_DEVICES)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= bound:
        raise InputError(f"Give --{name.replace('_', '-')} a whole number from 1 to {bound:,}: it is {value}.")


def counted(blocks: Sequence[BlockConfig]) -> list[tuple[BlockConfig, int]]:
    """Runs of one and the same layer, with their lengths."""
    runs = [list(run) for _, run in groupby(blocks, key=id)]
    return [(run[0], len(run)) for run in runs]


def rank_blocks(config: ModelConfig, layout: Layout, rank: int) -> tuple[BlockConfig, ...]:
    """The layers of a pipeline rank: of its `vp` stages, each as many, or one fewer in the first and in the last stage of all."""
    numbers = stages_of(layout.schedule, layout.pp, layout.vp, rank)
    stages = (stage_layers(config.num_layers, layout.pp * layout.vp, number) for number in numbers)
    return tuple(config.blocks[layer] for stage in stages for layer in stage)


def stage_layers(num_layers: int, num_stages: int, stage: int) -> range:
    """The layers of a pipeline stage: each has as many, or one fewer in the first and in the last stage of all."""
    fewer = num_layers % num_stages != 0
    size = (num_layers + 2 * fewer) // num_stages
    return range(max(0, stage * size - fewer), min(num_layers, max(0, (stage + 1) * size - fewer)))


def check_stages(num_layers: int, num_stages: int) -> None:
    """Raise InputError where layers cannot be shared out over so many pipeline stages."""
    if num_layers % num_stages and (num_layers + 2) % num_stages:
        raise InputError(
            f"Choose --pp times --vp that divides the {num_layers} layers, or these and two more (embedding and output matrix "
            f"counted as layers): it is {num_stages}."
        )


def check_schedule(schedule: str, vp: int) -> None:
    """Raise InputError where a pipeline's schedule is none, or does not take so many virtual stages a rank."""
    if schedule not in SCHEDULES:
        raise InputError(f"Choose --pp-schedule {', '.join(SCHEDULES)}, not {schedule!r}.")
    if schedule == "zbv" and vp != 2:
        raise InputError(f"Give --vp 2 with --pp-schedule zbv: each process has two stages, on the way down a V and up (--vp is {vp}).")
    if schedule == "zero-bubble" and vp == 1:
        raise InputError("Give --vp 2 or more with --pp-schedule zero-bubble, which is of interleaved stages; zbv takes 2.")


def stages_of(schedule: str, pp: int, vp: int, rank: int) -> list[int]:
    """The virtual stages of a pipeline rank: every pp-th, or two that lie as on the branches of a V."""
    return [rank, 2 * pp - 1 - rank] if schedule == "zbv" else list(range(rank, pp * vp, pp))


def check_layout(config: ModelConfig, layout: Layout, hardware: Hardware) -> None:
    """Refuse a layout that the model, the batch or the hardware cannot take.

    Raises:
        InputError: one sentence, with what to change.
    """
    for name in ("tp", "pp", "vp", "cp", "dp", "micro_batch", "batch_size", "seq_len"):
        _check_number(name, getattr(layout, name))
    if layout.num_devices > MAX_DEVICES:
        raise InputError(f"Plan at most {MAX_DEVICES:,} GPUs: TP x PP x CP x DP is {layout.num_devices:,}.")
    if layout.recompute not in RECOMPUTE:
        raise InputError(f"Choose --recompute {', '.join(RECOMPUTE)}, not {layout.recompute!r}.")
    if layout.zero not in range(4):
        raise InputError(f"Choose --zero 0, 1, 2 or 3, not {layout.zero}.")
    hardware.peak(layout.precision)
    if layout.lora is not None:
        check_lora(config, layout.lora, layout.tp)
    _check_batch(layout)
    _check_split(config, layout)


def _check_batch(layout: Layout) -> None:
    together = layout.dp * layout.micro_batch
    if layout.batch_size % together:
        raise InputError(
            f"Choose a batch of a multiple of {together:,} sequences (DP {layout.dp:,} x micro-batch {layout.micro_batch}): "
            f"--batch-size is {layout.batch_size:,}."
        )
    if layout.num_micro_batches < layout.pp:
        raise InputError(
            f"Give the pipeline at least as many micro-batches as it has stages: a step has {layout.num_micro_batches} for --pp "
            f"{layout.pp}; raise --batch-size to {together * layout.pp:,} or more, or lower --pp."
        )
    if layout.vp > 1 and layout.pp == 1:
        raise InputError(f"Leave --vp out, or raise --pp: without a pipeline there are no virtual stages (--vp is {layout.vp}).")
    check_schedule(layout.schedule, layout.vp)
    if layout.zero == 3 and layout.pp > 1:
        raise InputError("Choose --zero 2 with --pp: a pipeline that shares out its weights would gather them for every micro-batch.")
    if layout.micro_batch * layout.seq_len % layout.cp:
        raise InputError(
            f"Choose --cp that divides the {layout.micro_batch * layout.seq_len:,} tokens of a micro-batch: it is {layout.cp}."
        )
    if layout.tokens % layout.tp:
        raise InputError(f"Choose --tp that divides the {layout.tokens:,} tokens of a micro-batch's rank: it is {layout.tp}.")


def check_tensor_parallel(config: ModelConfig, tp: int) -> None:
    """Raise InputError where the matrices of a model's layers cannot be cut over so many processes."""
    for block, _ in counted(config.blocks):
        if block.num_heads % tp:
            raise InputError(f"Choose --tp that divides the {block.num_heads} attention heads of a layer: it is {tp}.")
        if block.ffn_size % tp:
            raise InputError(f"Choose --tp that divides the {block.ffn_size:,} columns of an MLP: it is {tp}.")
        if block.has_attention and block.num_kv_heads % tp and tp % block.num_kv_heads:
            raise InputError(f"Choose --tp that divides the {block.num_kv_heads} key-value heads of a layer, or is a multiple: it is {tp}.")


def _check_split(config: ModelConfig, layout: Layout) -> None:
    tp = layout.tp
    check_tensor_parallel(config, tp)
    check_stages(config.num_layers, layout.pp * layout.vp)
    if not all(rank_blocks(config, layout, rank) for rank in {0, layout.pp - 1}):
        raise InputError(f"Lower --pp: {config.num_layers} layers leave a rank of {layout.pp} without any.")
    if layout.precision == "fp8":
        sizes = [config.hidden_size, *(size // tp for b in config.blocks for size in (b.num_heads * b.head_dim, b.ffn_size))]
        if any(size % 16 for size in sizes):
            raise InputError(f"Choose --precision bf16, or a smaller --tp than {tp}: products in fp8 need sides that 16 divides.")


def warnings(config: ModelConfig, layout: Layout, hardware: Hardware) -> list[str]:
    """What is allowed and rarely meant, a sentence each."""
    out = []
    least = min((block.num_kv_heads for block in config.blocks if block.has_attention), default=layout.tp)
    if least < layout.tp:
        out.append(f"TP {layout.tp} is more than the {least} key-value heads: each is held by several ranks.")
    if layout.tp > hardware.devices_per_node:
        out.append(f"TP {layout.tp} reaches beyond a node of {hardware.devices_per_node}: its traffic is counted at the speed of a node.")
    if layout.vp > 1 and layout.schedule != "zbv" and layout.num_micro_batches % layout.pp:
        out.append(
            f"{layout.num_micro_batches} micro-batches are no multiple of PP {layout.pp}: some interleaved schedules refuse that, and the "
            "bubble is larger than planned."
        )
    if layout.seq_len > config.max_positions:
        out.append(f"Sequences of {layout.seq_len:,} tokens are longer than the model's context of {config.max_positions:,}.")
    return out
