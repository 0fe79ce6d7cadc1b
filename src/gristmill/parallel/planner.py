"""Planner: memory, step time and MFU of a model on a layout and hardware, and the search for the layouts that are fastest."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any

from gristmill.core.errors import InputError
from gristmill.model.config import ModelConfig
from gristmill.model.flops import num_parameters, training_flops_per_token
from gristmill.parallel.hardware import HARDWARE, Hardware
from gristmill.parallel.layout import MAX_DEVICES, RECOMPUTE, Layout, check_layout, warnings
from gristmill.parallel.lora_plan import adapter_parameters
from gristmill.parallel.memory import USABLE_SHARE, Memory, fits_into, memory
from gristmill.parallel.published import PUBLISHED, Published
from gristmill.parallel.step_time import StepTime, step_time

ERROR = 0.055  # root mean square over the published rows: layouts nearer to each other than this are not told apart
MICRO_BATCHES = (1, 2, 4, 8)
MIN_CP_TOKENS = 2048  # of a sequence a rank: shorter pieces are not worth their traffic, and would crowd the search


@dataclass(frozen=True)
class Plan:
    """What a training takes on one layout; `check` of the layout has passed."""

    name: str
    config: ModelConfig
    layout: Layout
    hardware: Hardware

    @cached_property
    def memory(self) -> dict[str, Memory]:
        """Of the first, a middle and the last pipeline rank."""
        return memory(self.config, self.layout, self.hardware)

    @cached_property
    def time(self) -> StepTime:
        return step_time(self.config, self.layout, self.hardware)

    @property
    def fullest(self) -> str:
        """The kind of rank that holds the most."""
        return max(self.memory, key=lambda rank: self.memory[rank].total)

    @property
    def device_bytes(self) -> float:
        """Memory of a device; processes on a CPU share that of their machine."""
        sharing = min(self.layout.num_devices, self.hardware.devices_per_node) if self.hardware.is_cpu else 1
        return self.hardware.memory_bytes / sharing

    @property
    def fits(self) -> bool:
        return fits_into(self.memory[self.fullest].total, self.device_bytes)

    @property
    def trained_parameters(self) -> int:
        """Of the whole model, or of an adapter."""
        if (lora := self.layout.lora) is None:
            return num_parameters(self.config)
        return sum(adapter_parameters(self.config, block, lora) for block in self.config.blocks)

    @property
    def tokens_per_second(self) -> float:
        return self.layout.batch_size * self.layout.seq_len / self.time.total

    def mfu(self, *, causal: bool = False, precision: str = "") -> float:
        """Share (0 to 1) of the peak in a precision (default bf16's, or the only one): attention in full as in the Nemotron reports,
        or half of it (causal), as Llama 3 counts; the output matrix once, nothing for recompute.
        """
        peak = self.hardware.flops[precision or ("bf16" if self.layout.precision == "fp8" else self.layout.precision)]
        products = training_flops_per_token(self.config, 0)
        attention = training_flops_per_token(self.config, self.layout.seq_len) - products
        if self.layout.lora is not None:  # what is frozen has no gradients
            products *= 2 / 3
            products += 6 * self.trained_parameters
        flops = products + attention * (0.5 if causal else 1.0)
        return flops * self.tokens_per_second / (self.layout.num_devices * peak)

    @property
    def refusal(self) -> str:
        """Why the layout cannot be started, with what to do; empty where it fits."""
        if self.fits:
            return ""
        rank, usable = self.memory[self.fullest], USABLE_SHARE * self.device_bytes / 2**30
        most = max(asdict(rank).items(), key=lambda part: part[1])[0]
        remedy = {
            "activations": "recompute more (--recompute selective or full), or raise --tp, --cp or --pp",
            "optimizer": "raise --dp, --tp or --pp" if self.layout.zero else "share it out (--zero 1)",
        }.get(most, "raise --tp or --pp, or share it out with --zero 2 (3 without a pipeline)")
        return (
            f"{self.name} does not fit with {self.layout}: the {self.fullest} rank takes {rank.total / 2**30:,.1f} GiB of "
            f"{usable:,.1f} GiB that are usable, most of it {'the optimizer' if most == 'optimizer' else most}; {remedy}."
        )

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain values, for --json."""
        layout, tokens = self.layout, self.layout.batch_size * self.layout.seq_len
        worst = self.memory[self.fullest]
        return {
            "model": self.name,
            "parameters": num_parameters(self.config),
            "trained_parameters": self.trained_parameters,
            "hardware": self.hardware.name,
            "gpus": layout.num_devices,
            "layout": asdict(layout) | {"num_micro_batches": layout.num_micro_batches},
            "step_seconds": self.time.total,
            "tokens_per_step": tokens,
            "tokens_per_second": self.tokens_per_second,
            "mfu": self.mfu(),
            "mfu_causal": self.mfu(causal=True),
            **({"mfu_of_fp8_peak": self.mfu(precision="fp8")} if layout.precision == "fp8" else {}),
            "seconds": asdict(self.time),
            "memory_gib": worst.gib(),
            "memory_gib_by_rank": {name: rank.gib() for name, rank in self.memory.items()},
            "usable_gib": USABLE_SHARE * self.device_bytes / 2**30,
            "fits": self.fits,
            "warnings": warnings(self.config, layout, self.hardware),
        }


def make_plan(name: str, config: ModelConfig, layout: Layout, *, hardware: Hardware) -> Plan:
    """The plan of a layout.

    Raises:
        InputError: the model, the batch or the hardware cannot take the layout.
    """
    check_layout(config, layout, hardware)
    return Plan(name, config, layout, hardware)


def require_fit(plan: Plan) -> None:
    """Refuse a layout before anything is started on it.

    Raises:
        InputError: it takes more memory than is usable.
    """
    if refusal := plan.refusal:
        raise InputError(refusal)


# ---- search ----


@dataclass(frozen=True)
class Found:
    """Result of a search: the fastest plan of every TP and PP, the fastest first, of all layouts that are valid and that fit."""

    plans: list[Plan]
    num_valid: int
    num_fit: int

    @property
    def undecided(self) -> int:
        """How many of the first are nearer to the best than the planner's error."""
        best = self.plans[0].time.total
        return sum(plan.time.total <= best * (1 + ERROR) for plan in self.plans)


def search(
    name: str,
    config: ModelConfig,
    layout: Layout,
    *,
    hardware: Hardware,
    num_devices: int,
    free: Iterable[str],
    dp: int | None = None,
) -> Found:
    """Search the layouts of so many devices that fit into memory.

    Args:
        layout: its fields that are not `free` are kept; DP is what is left of the devices.
        dp: only layouts with this many data-parallel ways.
        free: of "tp", "pp", "vp", "cp", "micro_batch" and "recompute", those to try. Interleaved schedules get a multiple of PP
            micro-batches.

    Raises:
        InputError: no layout is valid, or none fits; the one that misses least is named.
    """
    if not 1 <= num_devices <= MAX_DEVICES:
        raise InputError(f"Give --gpus a whole number from 1 to {MAX_DEVICES:,}: it is {num_devices}.")
    best: dict[tuple[int, int], Plan] = {}
    least: Plan | None = None
    complaint, num_valid, num_fit = "", 0, 0
    for candidate in _candidates(config, layout, hardware, num_devices=num_devices, free=set(free)):
        if dp not in (None, candidate.dp):
            continue
        try:
            plan = make_plan(name, config, candidate, hardware=hardware)
        except InputError as error:
            complaint = complaint or str(error)
            continue
        num_valid += 1
        if not plan.fits:
            if least is None or plan.memory[plan.fullest].total < least.memory[least.fullest].total:
                least = plan
            continue
        num_fit += 1
        key = (candidate.tp, candidate.pp)
        if key not in best or plan.time.total < best[key].time.total:
            best[key] = plan
    if not best:
        if least is not None:
            raise InputError(f"None of {num_valid:,} layouts of {num_devices:,} GPUs fits. The nearest: {least.refusal}")
        tried = f" The first that was tried: {complaint}" if complaint else ""
        raise InputError(
            f"No layout of {num_devices:,} GPUs divides a batch of {layout.batch_size:,} sequences and the model: change --gpus or "
            f"--batch-size.{tried}"
        )
    return Found(sorted(best.values(), key=lambda plan: plan.time.total), num_valid, num_fit)


def _candidates(config: ModelConfig, layout: Layout, hardware: Hardware, *, num_devices: int, free: set[str]) -> Iterator[Layout]:
    """Layouts worth a look: powers of two for TP (within a node) and CP, pipelines that share the layers out evenly.

    Of layouts that are equal otherwise, the simpler comes first.
    """
    powers = [2**i for i in range(21)]
    layers = config.num_layers
    tps = [n for n in powers if n <= hardware.devices_per_node] if "tp" in free else [layout.tp]
    pps = [n for n in range(1, layers + 1) if layers % n == 0 or (layers + 2) % n == 0] if "pp" in free else [layout.pp]
    cps = [n for n in powers if n == 1 or layout.seq_len >= MIN_CP_TOKENS * n] if "cp" in free else [layout.cp]
    micro = MICRO_BATCHES if "micro_batch" in free else (layout.micro_batch,)
    recompute = RECOMPUTE if "recompute" in free else (layout.recompute,)
    for again, tp, pp, cp, size in product(recompute, tps, pps, cps, micro):
        rest, left = divmod(num_devices, tp * pp * cp)
        if left or not rest or layout.batch_size % (rest * size):
            continue
        m = layout.batch_size // (rest * size)
        most = (layers + 2) // pp if pp > 1 and m % pp == 0 else 1
        for vp in range(1, most + 1) if "vp" in free else (layout.vp,):
            if vp > 1 and "vp" in free and layers % (pp * vp) and (layers + 2) % (pp * vp):
                continue
            yield replace(layout, tp=tp, pp=pp, vp=vp, cp=cp, dp=rest, micro_batch=size, recompute=again)


# ---- the published rows ----


def published_rows() -> list[dict[str, Any]]:
    """Every published measurement beside the plan: seconds of a step, or MFU by the source's own count; and the relative error."""
    return [_published_row(row) for row in PUBLISHED]


def _published_row(row: Published) -> dict[str, Any]:
    plan = make_plan(row.name, row.config, row.layout, hardware=HARDWARE["h100"])
    kind = "step_seconds" if row.step_seconds else "mfu"
    measured = row.step_seconds or row.mfu
    planned = plan.time.total if row.step_seconds else plan.mfu(causal=row.causal)
    facts = {"name": row.name, "gpus": row.layout.num_devices, "layout": str(row.layout), "kind": kind}
    return facts | {"measured": measured, "planned": planned, "error": planned / measured - 1, "fits": plan.fits}


def root_mean_square(errors: Iterable[float]) -> float:
    """Root of the mean square."""
    values = list(errors)
    return math.sqrt(sum(value * value for value in values) / len(values))
