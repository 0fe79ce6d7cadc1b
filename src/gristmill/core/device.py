"""Device selection: from what a recipe or a command says to a torch.device that exists here."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from gristmill.core.errors import InputError

if TYPE_CHECKING:
    import torch


def pick_device(name: str | torch.device = "auto") -> torch.device:
    """The device of that name: "auto" (a GPU where torch finds one, else the CPU), "cpu", "cuda", "cuda:1", "mps".

    Raises:
        InputError: no such device, or none here.
    """
    import torch

    if isinstance(name, torch.device):
        return name
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise InputError(f"unknown device {name!r}; choose one of auto, cpu, cuda, cuda:N, mps")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            raise InputError(f"device is {name!r} but torch finds no GPU here; choose cpu or auto, or install a build of torch with CUDA")
        if (device.index or 0) >= count:
            raise InputError(f"device is {name!r} but there are only {count} GPUs; choose one of cuda:0 to cuda:{count - 1}")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError(f"device is {name!r} but torch finds no Apple GPU here; choose cpu or auto")
    return device


def pick_precision(device: torch.device, *, cpu: str = "") -> str:
    """What a model computes in there by default: "bf16" on a GPU, and on a CPU with instructions for it on which it is the faster one.

    A CPU without them computes bf16 by way of fp32, which is slower than fp32 itself.

    Args:
        cpu: what it is on a CPU, without a look at its instructions.
    """
    import torch

    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type == "cpu" and cpu:
        return cpu
    if device.type != "cpu" or not _has_bf16_products():
        return "fp32"
    return "bf16" if _seconds_of_product(torch.bfloat16) < _seconds_of_product(torch.float32) else "fp32"


def _has_bf16_products() -> bool:
    """Whether the CPU multiplies matrices in bf16: AMX or AVX-512's bf16 on x86, bf16 on ARM."""
    import platform

    import torch

    if platform.machine() in ("aarch64", "arm64"):
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def _seconds_of_product(dtype: torch.dtype) -> float:
    """The best of a few products of the shapes of a step of generation."""
    import torch

    a, b = torch.ones(64, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - started)
    return best
