"""Eight-bit quantization of matrices, a scale a row, and its form on disk: compressed-tensors', which vLLM reads too.

Shapes: N rows, D columns.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from gristmill.core.errors import InputError

Quantize = Literal["", "int8", "int8-weight", "fp8"]
# Largest value of the types that numbers are quantized to.
MAX_VALUES = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
DTYPES = {"int8": torch.int8, "int8-weight": torch.int8, "fp8": torch.float8_e4m3fn}
KINDS: tuple[Quantize, ...] = ("int8", "int8-weight", "fp8")
STORED_DTYPES = {"int8": ("I8",), "fp8": ("F8_E4M3",)}  # as safetensors names them
FLOATS = ("F32", "BF16", "F16", "F64")
FORMATS = {"int8": "int-quantized", "int8-weight": "pack-quantized", "fp8": "float-quantized"}


def scaled(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Quantize each row: x [.., D] as values of `dtype` [.., D] and fp32 scales [..]: x = values * scale."""
    scale = x.float().abs().amax(-1) / MAX_VALUES[dtype]
    values = x.float() / scale.clamp(min=1e-30)[..., None]
    return (values.round() if dtype == torch.int8 else values).to(dtype), scale


def is_quantized(name: str) -> bool:
    """Whether the tensor of this Hugging Face name is one of those that are quantized: the layers' matrices."""
    return name.startswith("model.layers.") and name.endswith("_proj.weight")


def quantization_config(kind: Quantize) -> dict[str, Any]:
    """The `quantization_config` of a config.json."""
    shared = {"num_bits": 8, "type": "float" if kind == "fp8" else "int", "symmetric": True}
    group: dict[str, Any] = {"targets": ["Linear"], "weights": shared | {"strategy": "channel", "dynamic": False}}
    if kind != "int8-weight":
        group["input_activations"] = shared | {"strategy": "token", "dynamic": True}
    return {
        "quant_method": "compressed-tensors",
        "format": FORMATS[kind],
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def _known_fields(config: Mapping[str, Any]) -> Any:
    """What of a `quantization_config` must be as we know it: form, and how weights and activations are quantized."""
    groups = config.get("config_groups")
    names = ("weights", "input_activations", "output_activations")
    parts = [group.get(part) or {} for group in groups.values() for part in names] if groups else []
    return config.get("format"), [
        {key: part.get(key) for key in ("num_bits", "type", "symmetric", "strategy", "dynamic")} for part in parts
    ]


def kind_of(hf: Mapping[str, Any]) -> Quantize:
    """How the model of a config.json is quantized.

    Raises:
        InputError: in a way that is not read here.
    """
    found = hf.get("quantization_config")
    if found is None or found == {}:
        return ""
    try:
        essence = _known_fields(found)
        if any(found.get(key) for key in ("kv_cache_scheme", "transform_config")) or _is_sparse(found.get("sparsity_config")):
            essence = None
    except (AttributeError, TypeError):  # of no form that is known
        essence = None
    for kind in KINDS:
        if essence == _known_fields(quantization_config(kind)):
            return kind
    raise InputError(
        "Give the model as it was before it was quantized: of quantized folders "
        "those of compressed-tensors with eight bits, a scale a row and a scale a token are read."
    )


def _is_sparse(config: Any) -> bool:
    return bool(config) and config.get("format") != "dense"


def scale_name(name: str) -> str:
    """Name of the scales of a matrix."""
    return f"{name}_scale"


def stored_names(name: str, kind: Quantize) -> tuple[str, ...]:
    """Names of the tensors that stand for one matrix."""
    return (name, scale_name(name)) if kind != "int8-weight" else (f"{name}_packed", scale_name(name), f"{name}_shape")


def stored_as(name: str, kind: Quantize, shape: Sequence[int]) -> dict[str, tuple[tuple[str, ...], list[list[int]]]]:
    """Names of the tensors that stand for one of `shape`, with the types (safetensors' names) and the shapes that each may have."""
    if not kind or len(shape) != 2:
        return {name: (FLOATS, [list(shape)])}
    N, D = shape
    scales = (FLOATS, [[N, 1], [N]])
    if kind != "int8-weight":
        return dict(zip(stored_names(name, kind), ((STORED_DTYPES[kind], [[N, D]]), scales), strict=True))
    parts = (("I32",), [[N, -(-D // 4)]]), scales, (("I64", "I32"), [[2]])
    return dict(zip(stored_names(name, kind), parts, strict=True))


def compress(name: str, weight_ND: Tensor, kind: Quantize) -> dict[str, Tensor]:
    """Compress one matrix to the tensors that stand for it on disk."""
    values_ND, scale_N = scaled(weight_ND, DTYPES[kind])
    if kind != "int8-weight":
        return dict(zip(stored_names(name, kind), (values_ND, scale_N[:, None]), strict=True))
    bytes_ND = F.pad((values_ND.int() + 128).to(torch.uint8), (0, -values_ND.shape[1] % 4))
    parts = bytes_ND.view(torch.int32), scale_N[:, None], torch.tensor(values_ND.shape, dtype=torch.int64)
    return dict(zip(stored_names(name, kind), parts, strict=True))


def decompress(name: str, kind: Quantize, read: Callable[[str], Tensor]) -> Tensor:
    """Decompress the matrix [N, D] that such tensors stand for, in fp32.

    Args:
        read: gives a tensor by its name.
    """
    values, scale, *shape = (read(part) for part in stored_names(name, kind))
    if shape:
        values = values.contiguous().view(torch.uint8)[:, : max(0, int(shape[0][1]))].int() - 128
        if list(values.shape) != shape[0].tolist():
            raise ValueError(f"{name} has the shape {list(values.shape)}, not {shape[0].tolist()}")
    if scale.numel() != len(values):
        raise ValueError(f"{name} has {len(values)} rows and {scale.numel()} scales")
    return values.float() * scale.float().view(-1, 1)
