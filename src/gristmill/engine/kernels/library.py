"""Just-in-time build and ctypes bindings of the CPU kernels (*.cpp): once a machine, in a few seconds, with no header of torch.

Without a compiler, or with GRISTMILL_KERNELS=0, there are none, and the engine computes with torch.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import struct
import subprocess
import tempfile
from pathlib import Path

import torch

from gristmill.core.io import sync

SOURCES = tuple(Path(__file__).with_name(name) for name in ("kernels.cpp", "linear.cpp"))
FLAGS = ("-O3", "-march=native", "-mprefer-vector-width=512", "-fno-math-errno", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC")
BUILD_SECONDS = 120
TYPES = {torch.float32: 0, torch.bfloat16: 1}  # of activations, as the kernels are told them
CACHE_TYPES = TYPES | {torch.int8: 2, torch.float8_e4m3fn: 3}
# `Product` in linear.cpp, as bytes, which are made in less time than a ctypes structure: pointers to activations, matrix, scales of both,
# bias and output, then types, sizes and threads.
PRODUCT = struct.Struct("6P7i")
log = logging.getLogger(__name__)


class Layer(ctypes.Structure):
    """ctypes mirror of `Layer` in kernels.cpp."""

    _fields_ = [
        ("k_offset", ctypes.c_int64),
        ("v_offset", ctypes.c_int64),
        ("s_offset", ctypes.c_int64),
        ("heads", ctypes.c_int32),
        ("kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("pairs", ctypes.c_int32),
        ("window", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("cap", ctypes.c_float),
        ("padding", ctypes.c_int32),  # so that what follows lies at a multiple of 8
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
    ]


class Step(ctypes.Structure):
    """ctypes mirror of `Step` in kernels.cpp."""

    _fields_ = [
        ("num_seqs", ctypes.c_int32),
        ("table_stride", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("padding", ctypes.c_int32),  # so that what follows lies at a multiple of 8
        ("block_stride", ctypes.c_int64),
        ("query_start", ctypes.c_void_p),
        ("seq_lens", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("block_tables", ctypes.c_void_p),
    ]


@functools.cache
def load() -> ctypes.CDLL | None:
    """The compiled library, or None where it cannot be had."""
    if os.environ.get("GRISTMILL_KERNELS") == "0":
        return None
    compiler = os.environ.get("CXX", "g++")
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gristmill"
    try:
        path = folder / f"kernels-{_key(compiler)}.so"
        if not path.exists():
            _build(compiler, path)
        library = ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as e:
        log.info("no compiled attention, torch attends instead: %s", e)
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int
    for name, arguments in {
        "norm": [pointer] * 7 + [number] * 2 + [ctypes.c_float] + [number] * 2,
        "squared_relu": [pointer, ctypes.c_int64, number],
        "quantize": [pointer] * 3 + [number] * 3,
        "dequantize": [pointer] * 7 + [number] * 3,
        "sample": [pointer] * 5 + [number] * 2,
    }.items():
        function = getattr(library, f"gristmill_{name}")
        function.restype, function.argtypes = None, arguments
    library.gristmill_product.restype, library.gristmill_product.argtypes = None, [ctypes.c_char_p]
    library.gristmill_attend.restype = None
    library.gristmill_attend.argtypes = [
        ctypes.POINTER(Layer),
        ctypes.POINTER(Step),
        ctypes.c_void_p,
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_int,
        ctypes.c_void_p,
    ]
    return library


def _key(compiler: str) -> str:
    """Cache key: another source, compiler or processor needs another library."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=BUILD_SECONDS).stdout
    cpu = Path("/proc/cpuinfo")
    flags = next((line for line in cpu.read_text().splitlines() if line.startswith(("flags", "Features"))), "") if cpu.exists() else ""
    parts = (*(source.read_bytes() for source in SOURCES), version, " ".join(FLAGS).encode(), flags.encode(), platform.machine().encode())
    return hashlib.blake2b(b"\0".join(parts), digest_size=10).hexdigest()


def _build(compiler: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:  # beside the goal, so that the last step is a rename
        built = Path(temporary) / path.name
        subprocess.run([compiler, *FLAGS, "-o", str(built), *map(str, SOURCES)], check=True, capture_output=True, timeout=BUILD_SECONDS)
        sync(built)  # half a library would crash whoever loads it
        built.replace(path)
