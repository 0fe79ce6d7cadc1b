"""Calibration of the planner: a hardware row measured on this machine, from matrix products, attention and steps of small models.

The planner's step time is linear in the inverse rates of a device. They are fitted, none below zero, to what was measured, each
measurement weighed by its relative error.
"""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from gristmill.core.device import has_bf16_products, pick_device
from gristmill.core.errors import InputError
from gristmill.model.config import ModelConfig, uniform_blocks
from gristmill.model.kernels import library as kernels
from gristmill.model.transformer import PRECISIONS, Transformer
from gristmill.parallel.hardware import HARDWARE, Hardware, calibration_path, write_hardware
from gristmill.parallel.layout import Layout
from gristmill.parallel.step_time import NETWORK_SHARE, gemm_seconds, step_time
from gristmill.train.batches import Sample
from gristmill.train.objectives.next_token import next_token_objective
from gristmill.train.trainer import Trainer, TrainSettings

UNIT = 1e30  # a rate at which nothing takes time
ALL_REDUCE_VALUES = 4 << 20
PRODUCT_WEIGHT = 0.3  # of a product alone beside a step, which is what shall be foretold
# Of matrix products M, N, K; and of steps: hidden size, layers, heads, key-value heads, ffn, vocabulary, family, tokens of a sequence,
# sequences at once.
CPU_PRODUCTS = [(64, 64, 64), (256, 256, 256), (512, 1024, 256), (384, 576, 1536), (1024, 1024, 1024), (128, 8192, 512)]
CPU_STEPS = [
    (64, 4, 4, 2, 256, 512, "nemotron", 64, 16),
    (160, 5, 5, 5, 640, 2048, "nemotron", 128, 16),
    (256, 2, 4, 4, 1024, 4096, "llama", 256, 4),
    (384, 3, 6, 3, 1024, 16_384, "llama", 128, 4),
    (512, 2, 8, 2, 1536, 8192, "llama", 512, 1),
    (512, 1, 8, 8, 2048, 32_768, "nemotron", 256, 2),
    (128, 2, 4, 4, 256, 512, "llama", 1024, 2),
]
GPU_PRODUCTS = [(1024, 1024, 1024), (4096, 4096, 4096), (8192, 8192, 8192), (8192, 2048, 8192), (2048, 32_768, 2048)]
GPU_STEPS = [
    (1024, 4, 8, 8, 4096, 16_384, "llama", 2048, 2),
    (2048, 4, 16, 8, 8192, 32_768, "nemotron", 4096, 2),
    (2048, 2, 16, 8, 8192, 32_768, "llama", 4096, 4),
    (1024, 4, 8, 8, 2048, 8192, "nemotron", 8192, 1),
]


def calibrate(kind: str) -> tuple[dict[str, Any], Path]:
    """Measure this machine's "cpu" (one process with the threads that torch has) or "cuda" device, and keep its row in the user's cache.

    Args:
        kind: which; "" for the GPU where there is one.

    Returns:
        The row, and its file.

    Raises:
        InputError: another name, or no such device here.
    """
    kind = kind or pick_device().type
    if kind not in ("cpu", "cuda"):
        raise InputError(f"Choose what to calibrate with --gpu cpu or --gpu cuda: {kind!r} is a row of the data sheets.")
    device = pick_device(kind)
    hardware = measure(device)
    path = calibration_path(kind)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_hardware(path, hardware)
    return asdict(hardware), path


def measure(device: torch.device) -> Hardware:
    """A hardware row of a device: fp32 on a CPU (bf16 too where it has products in it), bf16 on a GPU."""
    cpu = device.type == "cpu"
    precision = "fp32" if cpu else "bf16"
    products, steps = (CPU_PRODUCTS, CPU_STEPS) if cpu else (GPU_PRODUCTS, GPU_STEPS)
    if cpu:
        name = platform.processor() or platform.machine()
        memory: float = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        bandwidth = _all_reduce_bandwidth()
        unit = _unit(name, precision, memory, link=bandwidth, network=bandwidth, threads=torch.get_num_threads())
        unit = replace(unit, kernels=kernels.load() is not None, devices_per_node=os.cpu_count() or 1, exposed_tp=1.0, exposed_dp=1.0)
    else:
        found = torch.cuda.get_device_properties(device)
        like = HARDWARE["b200" if found.major >= 10 else "h100" if found.major >= 9 else "a100"]  # links cannot be measured with one
        links = {"link": like.link_bandwidth, "network": like.network_bandwidth}
        unit = _unit(found.name, precision, found.total_memory, **links, threads=0)
    rows: list[tuple[list[float], float]] = []
    for sides in products:
        a = torch.randn(sides[0], sides[2], device=device, dtype=PRECISIONS[precision])
        b = torch.randn(sides[2], sides[1], device=device, dtype=PRECISIONS[precision])
        layout = Layout(batch_size=1, seq_len=1, precision=precision)
        features = [gemm_seconds(sides, layout, one) for one in _isolated(unit)]
        rows.append((features, _seconds(lambda a=a, b=b: torch.mm(a, b), device)))  # type: ignore[misc]
    for shape in steps:
        config, layout = _shape(shape, precision)
        features = [step_time(config, layout, one).total for one in _isolated(unit)]
        rows.append((features, step_seconds(config, layout, device)))
    weights = [PRODUCT_WEIGHT] * len(products) + [1.0] * len(steps)
    flop, overhead, attention, byte, operation = _fit(rows, weights)
    rate = 1 / max(flop, 1e-18)
    fitted = replace(
        unit,
        flops={precision: rate},
        gemm_overhead=overhead * rate,
        attention_efficiency=min(1e6, 1 / max(attention * rate, 1e-6)),
        memory_bandwidth=1 / max(byte, 1e-18),
        operation_seconds=operation,
    )
    if not cpu:  # MFU is of the data sheet's peak
        peak = HARDWARE["b200" if found.major >= 10 else "h100" if found.major >= 9 else "a100"].flops["bf16"]
        fitted = replace(
            fitted,
            flops={precision: peak},
            gemm_efficiency=rate / peak,
            attention_efficiency=fitted.attention_efficiency * rate / peak,
        )
    elif has_bf16_products():
        a = torch.randn(1024, 1024)
        gain = _seconds(lambda: torch.mm(a, a), device) / _seconds(lambda: torch.mm(a.bfloat16(), a.bfloat16()), device)
        fitted = replace(fitted, flops={precision: rate, "bf16": rate * gain})
    return fitted


def _unit(name: str, precision: str, memory: float, *, link: float, network: float, threads: int) -> Hardware:
    return Hardware(
        name=name,
        flops={precision: UNIT},
        memory_bytes=memory,
        memory_bandwidth=UNIT,
        link_bandwidth=link,
        network_bandwidth=network,
        gemm_efficiency=1.0,
        gemm_overhead=0.0,
        attention_efficiency=1.0,
        threads=threads,
    )


def _isolated(unit: Hardware) -> list[Hardware]:
    """Devices on which one thing alone takes time: a FLOP of products, their overhead, a FLOP of attention, a byte, an operation."""
    precision = next(iter(unit.flops))
    one = {precision: 1.0}
    return [
        replace(unit, flops=one, attention_efficiency=UNIT),
        # 1 / M + 1 / N + 1 / K of the FLOPs: what products take with an overhead of so much, of which they are no share
        replace(unit, gemm_overhead=UNIT),
        replace(unit, flops=one, gemm_efficiency=UNIT),
        replace(unit, memory_bandwidth=1.0),
        replace(unit, operation_seconds=1.0),
    ]


def _fit(rows: Sequence[tuple[Sequence[float], float]], weights: Sequence[float]) -> list[float]:
    """Least squares of weighed relative errors with no coefficient below zero: what would be negative is left out, the worst first."""
    features = np.array([row for row, _ in rows]) * (np.array(weights) / np.array([seconds for _, seconds in rows]))[:, None]
    scale = features.max(axis=0)
    kept = list(range(features.shape[1]))
    while True:
        found, *_ = np.linalg.lstsq(features[:, kept] / scale[kept], np.array(weights), rcond=None)
        if found.min() >= 0:
            break
        kept.pop(int(found.argmin()))
    out = [0.0] * features.shape[1]
    for place, value in zip(kept, found, strict=True):
        out[place] = float(value / scale[place])
    return out


def _shape(shape: tuple[Any, ...], precision: str) -> tuple[ModelConfig, Layout]:
    hidden, layers, heads, kv_heads, ffn, vocabulary, family, seq_len, micro_batch = shape
    config = ModelConfig(family, vocabulary, hidden, uniform_blocks(layers, heads, kv_heads, hidden // heads, ffn), 8192)
    return config, Layout(batch_size=2 * micro_batch, micro_batch=micro_batch, seq_len=seq_len, precision=precision, zero=0)


def step_seconds(config: ModelConfig, layout: Layout, device: torch.device) -> float:
    """Seconds of an optimizer step of the Trainer on random tokens, in one process."""
    model = Transformer(config)
    settings = TrainSettings(
        lr=1e-5,
        steps=1000,
        batch_size=layout.batch_size,
        micro_batch_tokens=layout.micro_batch * layout.seq_len,
        precision=layout.precision,
        schedule="constant",
        checkpoint_activations=layout.recompute == "full",
    )
    trainer = Trainer(model, next_token_objective, settings, device=device)
    draw = np.random.default_rng(0)
    samples = []
    for number in range(layout.batch_size):
        samples.append(Sample(draw.integers(0, config.vocab_size, layout.seq_len), np.arange(layout.seq_len) > 0, str(number)))
    return _seconds(lambda: trainer.step(samples), device)


def _seconds(work: Callable[[], object], device: torch.device, *, times: int = 5, at_least: float = 0.3) -> float:
    """The least of some runs. Of a single thread the processor's own time, so that neighbours are not counted."""
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter

    def once(count: int) -> float:
        started = clock()
        for _ in range(count):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (clock() - started) / count

    work()
    count = max(1, int(at_least / times / max(once(1), 1e-7)))
    return min(once(count) for _ in range(times))


# ---- two processes ----

_REDUCE = """
import sys, time, torch, torch.distributed as dist
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=int(sys.argv[2]), world_size=2)
values = torch.ones(int(sys.argv[3]))
best = float("inf")
for _ in range(6):
    dist.barrier()
    started = time.perf_counter()
    dist.all_reduce(values)
    best = min(best, time.perf_counter() - started)
print(best)
"""


def _all_reduce_bandwidth() -> float:
    """Bytes a second that two processes of this machine exchange, as the planner counts an all-reduce in fp32."""
    with TemporaryDirectory() as folder:
        commands = [[sys.executable, "-c", _REDUCE, f"{folder}/store", str(rank), str(ALL_REDUCE_VALUES)] for rank in range(2)]
        started = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) for command in commands]
        try:
            outputs = [one.communicate(timeout=120)[0] for one in started]
        except subprocess.TimeoutExpired:
            outputs = []
        finally:
            for one in started:
                one.kill()
                one.wait()
    try:
        seconds = max(float(json.loads(output)) for output in outputs)
    except (ValueError, TypeError):
        raise InputError("Two processes of this machine cannot talk to each other through gloo: allow connections on 127.0.0.1.") from None
    return 8 * ALL_REDUCE_VALUES / 2 / (NETWORK_SHARE * seconds)
