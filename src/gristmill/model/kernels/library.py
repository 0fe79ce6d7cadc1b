"""ctypes bindings of the model's CPU kernels (kernels.cpp, amx_attention.cpp, blocks.cpp, optimizer.cpp)."""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from gristmill.core.native import build_library

TYPES = {torch.float32: 0, torch.bfloat16: 1}  # of activations, as the kernels are told them
ACTIVATIONS = {"silu": 0, "gelu": 1, "squared_relu": 2}

SOURCES = ("kernels.cpp", "amx_attention.cpp", "blocks.cpp", "optimizer.cpp")


class Attention(ctypes.Structure):
    """ctypes mirror of `Attention` in kernels.cpp."""

    _fields_ = [
        *(
            (name, ctypes.c_int32)
            for name in ("heads", "kv_heads", "head_dim", "pairs", "window", "threads", "num_documents", "num_groups")
        ),
        ("scale", ctypes.c_float),
        ("cap", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("documents", "groups", "cos", "sin")),
    ]


class Weight(ctypes.Structure):
    """ctypes mirror of `Weight` in blocks.cpp."""

    _fields_ = [*((name, ctypes.c_void_p) for name in ("columns", "rows", "grad")), ("adds", ctypes.c_int64)]


class Norm(ctypes.Structure):
    """ctypes mirror of `Norm` in blocks.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("gain", "bias", "grad_gain", "grad_bias")),
        ("adds", ctypes.c_int64),
        ("eps", ctypes.c_float),
        ("centred", ctypes.c_int32),
    ]


class Layer(ctypes.Structure):
    """ctypes mirror of `Layer` in blocks.cpp."""

    _fields_ = [
        *((name, Norm) for name in ("attention_norm", "mlp_norm")),
        *((name, Weight) for name in ("qkv", "output", "gate", "up", "down")),
        *((name, ctypes.c_void_p) for name in ("attention", "states", "grad_states")),
        ("ffn", ctypes.c_int64),
    ]


class Blocks(ctypes.Structure):
    """ctypes mirror of `Blocks` in blocks.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("layers", "picked")),
        *((name, ctypes.c_int32) for name in ("num_blocks", "tokens", "num_picked", "hidden", "activation", "keeps", "threads")),
    ]


class AdamW(ctypes.Structure):
    """ctypes mirror of `AdamW` in optimizer.cpp."""

    _fields_ = [(name, ctypes.c_float) for name in ("lr", "rest1", "beta2", "rest2", "eps", "weight_decay", "clip")]


class AdamWPart(ctypes.Structure):
    """ctypes mirror of `Part` in optimizer.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "grad", "mean", "square", "copy")),
        ("size", ctypes.c_int64),
        *((name, ctypes.c_float) for name in ("correction1", "correction2")),
        ("rows", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("num_rows", "width")),
    ]


@functools.cache
def load() -> ctypes.CDLL | None:
    """The compiled library, or None where it cannot be had."""
    library = build_library([Path(__file__).with_name(name) for name in SOURCES], "model")
    if library is None:
        return None
    pointer, number, large, real = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
    for name, arguments in {
        "attention_forward": [ctypes.POINTER(Attention)] + [pointer] * 3,
        "attention_backward": [ctypes.POINTER(Attention)] + [pointer] * 5,
        "amx_attention_forward": [ctypes.POINTER(Attention)] + [pointer] * 3,
        "amx_attention_backward": [ctypes.POINTER(Attention)] + [pointer] * 5,
        "norm_forward": [pointer] * 7 + [number] * 2 + [real] + [number] * 3,
        "norm_backward": [pointer] * 8 + [number] * 5,
        "activate": [pointer] * 6 + [number] * 2 + [large] + [number] * 3,
        "softmax_forward": [pointer] * 2 + [number] * 2 + [large] + [number] * 2,
        "softmax_backward": [pointer] * 5 + [number] * 2 + [large] * 2 + [number] * 2,
        "kl_divergence": [pointer] * 5 + [number] * 2 + [large] * 2 + [number] * 3,
        "blocks_memory": [ctypes.POINTER(Blocks)],
        "blocks_forward": [ctypes.POINTER(Blocks)] + [pointer] * 3,
        "blocks_backward": [ctypes.POINTER(Blocks)] + [pointer] * 3,
        "tiles_of": [pointer] + [number] * 2 + [pointer] * 2,
        "adamw": [ctypes.POINTER(AdamW), ctypes.POINTER(AdamWPart), number, number],
        "weight_gradient": [pointer] * 3 + [number] * 3 + [large] * 2 + [number] * 2,
    }.items():
        function = getattr(library, f"gristmill_{name}")
        function.restype, function.argtypes = None, arguments
    library.gristmill_blocks_memory.restype = large
    return library


@functools.cache
def has_tiles() -> bool:
    """Whether the library multiplies tiles of bf16 (AMX): compiled for it, on such a CPU, and allowed by the system."""
    library = load()
    return library is not None and bool(library.gristmill_has_tiles())


def library_for(x: Tensor) -> ctypes.CDLL | None:
    """The compiled library where it computes with such tensors."""
    return load() if x.device.type == "cpu" and x.dtype in TYPES else None


def pointer_of(x: Tensor | None) -> int | None:
    """Address of a tensor's first element; null for None."""
    return None if x is None else x.data_ptr()
