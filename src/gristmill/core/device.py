"""Devices: from what a recipe or a command says to a torch.device that exists here, and the memory that it has free."""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
import os
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from gristmill.core.errors import InputError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h

if TYPE_CHECKING:
    import numpy as np
    import torch


def pick_device(name: str | torch.device = "auto") -> torch.device:
    """The device of that name: "auto" (a GPU where torch finds one, else the CPU), "cpu", "cuda", "cuda:1", "mps".

    Of the processes that torchrun started on a machine, "auto" and "cuda" give each its own GPU.

    Raises:
        InputError: no such device, or none here.
    """
    import torch

    if isinstance(name, torch.device):
        return name
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
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


def put(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """An array as a tensor on a device; on its way to a GPU nobody waits: it is copied from pinned memory, in the order of the stream."""
    import torch

    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def current_device(device: torch.device) -> AbstractContextManager[object]:
    """Make a GPU the thread's current one meanwhile: Triton and CUDA graphs go by that, and not by where tensors are."""
    import torch

    return torch.cuda.device(device) if device.type == "cuda" and device.index is not None else nullcontext()


def check_dtype(device: torch.device, dtype: torch.dtype) -> None:
    """InputError where a GPU has no arithmetic of this type."""
    import torch

    if device.type == "cuda" and dtype == torch.bfloat16:
        with current_device(device):
            if not torch.cuda.is_bf16_supported(including_emulation=False):
                raise InputError(f"{torch.cuda.get_device_name(device)} does not compute in bf16: choose fp32.")


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken: of a GPU, or of this machine within the limits of container (cgroup) and process (ulimit)."""
    import torch

    if device.type == "cuda":
        # what torch keeps of memory that was freed counts as taken with the driver
        return int(torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    free = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *_free_in_cgroup()]
    if (available := _fields(Path("/proc/meminfo"), "MemAvailable:")) is not None:
        free.append(available * 1024)
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        free.append(limit - (_fields(Path("/proc/self/status"), "VmSize:") or 0) * 1024)
    return max(0, min(free))


@contextmanager
def returned_at_once() -> Iterator[None]:
    """Large blocks of memory go back to the system as soon as they are freed; glibc else keeps the holes that they leave in its heap."""
    _set_heap(mmap_threshold=1 << 20)
    try:
        yield
    finally:  # what glibc comes to by itself when blocks of this size are freed, and how much it then keeps: faster for activations
        _set_heap(mmap_threshold=32 << 20, trim_threshold=64 << 20)


class Arena:
    """Arena of tensors that stay for long, on a CPU outside the heap and on large pages: zeros, one after another in mappings of 64 MiB.

    In the heap they would lie between activations, whose holes are never the right ones for the next. A processor translates the addresses
    of a page at a time: matrices are read up to one and a half times as fast from large ones. A mapping goes back to the system with the
    last of its tensors; a page becomes memory when it is first written.
    """

    MAPPING, LINE, PAGE = 64 << 20, 64, 2 << 20

    def __init__(self) -> None:
        self._free: torch.Tensor | None = None

    def zeros(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
        """Zeros, of a GPU those that torch gives."""
        import torch

        size = math.prod(shape) * dtype.itemsize
        if torch.device(device).type != "cpu" or not size:
            return torch.zeros(tuple(shape), dtype=dtype, device=device)
        if size > self.MAPPING:
            return self._mapped(size)[:size].view(dtype).view(tuple(shape))
        if self._free is None or len(self._free) < size:
            self._free = self._mapped(self.MAPPING)
        place, self._free = self._free[:size], self._free[-(-size // self.LINE) * self.LINE :]
        return place.view(dtype).view(tuple(shape))

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy in the arena; on a GPU the tensor itself."""
        return tensor if tensor.device.type != "cpu" else self.zeros(tensor.shape, tensor.dtype).copy_(tensor)

    def _mapped(self, size: int) -> torch.Tensor:
        import torch

        memory = mmap.mmap(-1, size + self.PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError, AttributeError):  # where the kernel has large pages
            memory.madvise(mmap.MADV_HUGEPAGE)
        flat = torch.frombuffer(memory, dtype=torch.uint8)
        return flat[-flat.data_ptr() % self.PAGE :]


def zeros_outside_heap(like: Sequence[torch.Tensor], dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    """Zeros of the shapes and devices of tensors, and of their types or another, in an `Arena` of their own."""
    arena = Arena()
    return [arena.zeros(one.shape, dtype or one.dtype, one.device) for one in like]


@contextmanager
def kept_heap() -> Iterator[None]:
    """Freed memory is kept for what comes next, which else costs a page fault each 4 KiB; it goes back at the end."""
    _set_heap(mmap_threshold=32 << 20, trim_threshold=2**31 - 1)
    try:
        yield
    finally:
        _set_heap(trim_threshold=64 << 20)
        trim_heap()


def _set_heap(mmap_threshold: int | None = None, trim_threshold: int | None = None) -> None:
    """Bytes from which glibc maps a block by itself, and free bytes from which it gives its heap back; nothing in other C libraries."""
    with suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((M_MMAP_THRESHOLD, mmap_threshold), (M_TRIM_THRESHOLD, trim_threshold)):
            if value is not None:
                mallopt(option, value)


def trim_heap() -> None:
    """Give freed memory back to the system: glibc keeps what reading a large tokenizer leaves, tens of megabytes."""
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _fields(path: Path, name: str) -> int | None:
    """The number after a name that begins a line of one of the kernel's files; None where there is none."""
    try:
        lines = path.read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name))
    except (OSError, StopIteration, ValueError, IndexError):
        return None


def _free_in_cgroup() -> list[int]:
    """What each limit of this process's cgroup (v2) and those around it leaves; the page cache can be had back."""
    free: list[int] = []
    root = Path("/sys/fs/cgroup")
    try:
        inner = Path("/proc/self/cgroup").read_text().rsplit("::", 1)[1].strip().lstrip("/")
        for folder in (root / inner, *(root / inner).parents):
            if root not in (folder, *folder.parents):
                break
            limit = folder / "memory.max"
            if limit.exists() and (text := limit.read_text().strip()).isdigit():
                cache = _fields(folder / "memory.stat", "inactive_file ") or 0
                free.append(int(text) - int((folder / "memory.current").read_text()) + cache)
    except (OSError, IndexError, ValueError):
        pass
    return free


def pick_precision(device: torch.device) -> str:
    """What a model computes in there by default: "bf16" on a GPU, and on a CPU with instructions for it on which it is the faster one.

    A CPU without them computes bf16 by way of fp32, which is slower than fp32 itself.
    """
    import torch

    if device.type == "cuda":
        with current_device(device):
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if device.type == "cpu" and bf16_is_faster() else "fp32"


@functools.cache
def bf16_is_faster() -> bool:
    """Whether products in bf16 are the faster ones on this CPU: measured once a process, so that all of it has one answer."""
    import torch

    return has_bf16_products() and _seconds_of_product(torch.bfloat16) < _seconds_of_product(torch.float32)


@functools.cache
def has_bf16_products() -> bool:
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
