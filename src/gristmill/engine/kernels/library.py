"""ctypes bindings of the engine's CPU kernels (*.cpp)."""

import ctypes
import functools
import struct
from pathlib import Path

import torch

from gristmill.core.native import build_library

SOURCES = tuple(
    Path(__file__).with_name(name) for name in ("kernels.cpp", "linear.cpp", "tile_linear.cpp", "tile_attention.cpp", "decode.cpp")
)
TYPES = {torch.float32: 0, torch.bfloat16: 1}  # of activations, as the kernels are told them
CACHE_TYPES = TYPES | {torch.int8: 2, torch.float8_e4m3fn: 3}
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "relu2": 2}  # as in vectors.h, by `Family.activation`
# `Product` in kernels.h, as bytes, which are made in less time than a ctypes structure: pointers to activations, matrix, scales of both,
# bias and output, then types, sizes and threads.
PRODUCT = struct.Struct("6P7i")


class Layer(ctypes.Structure):
    """ctypes mirror of `Layer` in kernels.h."""

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
    """ctypes mirror of `Step` in kernels.h."""

    _fields_ = [
        ("num_seqs", ctypes.c_int32),
        ("table_stride", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("num_decoding", ctypes.c_int32),
        ("block_stride", ctypes.c_int64),
        ("query_start", ctypes.c_void_p),
        ("seq_lens", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("block_tables", ctypes.c_void_p),
    ]


class Norm(ctypes.Structure):
    """ctypes mirror of `Norm` in decode.cpp."""

    _fields_ = [("gain", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("eps", ctypes.c_float), ("centred", ctypes.c_int32)]


class Matrix(ctypes.Structure):
    """ctypes mirror of `Matrix` in decode.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "scale", "bias")),
        *((name, ctypes.c_int32) for name in ("kind", "n", "d", "quantized")),
    ]


class Block(ctypes.Structure):
    """ctypes mirror of `Block` in decode.cpp."""

    _fields_ = [
        ("attention", ctypes.c_void_p),
        *((name, Norm) for name in ("attention_norm", "q_norm", "k_norm", "attention_post_norm", "mlp_norm", "mlp_post_norm")),
        *((name, Matrix) for name in ("qkv", "output", "gate", "up", "down")),
        ("activation", ctypes.c_int32),
        ("norms_whole", ctypes.c_int32),
        ("multiplier", ctypes.c_float),
        ("padding", ctypes.c_int32),
    ]


class Decoder(ctypes.Structure):
    """ctypes mirror of `Decoder` in decode.cpp."""

    _fields_ = [
        ("blocks", ctypes.c_void_p),
        ("final_norm", Norm),
        *((name, ctypes.c_int32) for name in ("num_blocks", "hidden", "type", "cache_type")),
    ]


@functools.cache
def load() -> ctypes.CDLL | None:
    """The compiled library, or None where it cannot be had."""
    library = build_library(SOURCES, "engine")
    if library is None:
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
    library.gristmill_decode.restype = None
    library.gristmill_decode.argtypes = [ctypes.POINTER(Decoder), ctypes.POINTER(Step), pointer, pointer, pointer, number, pointer, number]
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


@functools.cache
def has_tiles() -> bool:
    """Whether the library multiplies tiles of bf16 (AMX): compiled for it, on such a CPU, and allowed by the system."""
    library = load()
    return library is not None and bool(library.gristmill_has_tiles())
