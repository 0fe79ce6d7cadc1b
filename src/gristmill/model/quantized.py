"""Quantization of matrices, to eight bits with a scale a row or to four with a scale a group, and its form on disk: compressed-tensors',
which vLLM reads too.

Shapes: N rows, D columns, G groups of columns in each row, g columns of a group.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from gristmill.core.errors import InputError
from gristmill.model.config import ModelConfig

Quantize = Literal["", "int8", "int8-weight", "int4", "fp8"]
Head = Literal["", "int8"]  # of the output matrix: its weights alone
# Largest value of the types that numbers are quantized to.
MAX_VALUES = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
PACKED: tuple[Quantize, ...] = ("int8-weight", "int4")  # weights alone, several in a word
DTYPES = {"int8": torch.int8, "int8-weight": torch.int8, "fp8": torch.float8_e4m3fn}
KINDS: tuple[Quantize, ...] = ("int8", "int8-weight", "int4", "fp8")
INT4_GROUP, INT4_GROUPS = 32, (32, 64, 128)  # columns of a group: as the engine multiplies, and as folders may have them
# A group's scale is its largest number over one of these: first what finds the scales again of numbers that were quantized before.
INT4_STEPS = (8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 7.5, 6.5, 5.5)
MAX_GROUPS_AT_ONCE = 1 << 12  # so that all that is computed of them stays in a cache
STORED_DTYPES = {"int8": ("I8",), "fp8": ("F8_E4M3",)}  # as safetensors names them
FLOATS = ("F32", "BF16", "F16", "F64")
FORMATS = {"int8": "int-quantized", "int8-weight": "pack-quantized", "int4": "pack-quantized", "fp8": "float-quantized"}


def scaled(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Quantize each row: x [.., D] as values of `dtype` [.., D] and fp32 scales [..]: x = values * scale."""
    scale = x.float().abs().amax(-1) / MAX_VALUES[dtype]
    values = x.float() / scale.clamp(min=1e-30)[..., None]
    return (values.round() if dtype == torch.int8 else values).to(dtype), scale


def check_groups(columns: int, group: int) -> None:
    """InputError where the columns of a matrix are no whole groups of int4."""
    if columns % group:
        smaller = " or take smaller groups" if group > INT4_GROUP and columns % INT4_GROUP == 0 else ""
        raise InputError(
            f"Quantize to int8-weight{smaller}: int4 has a scale for each {group} columns, and a matrix has {columns} of them."
        )


def check_widths(config: ModelConfig, group: int = INT4_GROUP) -> None:
    """InputError where a layer of the model has a matrix that int4 does not take."""
    for block in config.blocks:
        for columns in (config.hidden_size, block.num_heads * block.head_dim, block.ffn_size):
            check_groups(columns, group)


def grouped(x_ND: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Quantize each group of columns to int4: int8 values [N, D] of -8 to 7, and fp32 scales [N, G] that bf16 holds: x = values * scale.

    Of several scales a group gets the one with the least squared error. What is quantized again is the same.
    """
    x_Gg = x_ND.detach().float().reshape(-1, group)
    values_Gg, scale_G = torch.empty(x_Gg.shape, dtype=torch.int8, device=x_Gg.device), x_Gg.new_empty(len(x_Gg))
    for start in range(0, len(x_Gg), MAX_GROUPS_AT_ONCE):
        part = slice(start, start + MAX_GROUPS_AT_ONCE)
        values_Gg[part], scale_G[part] = _searched(x_Gg[part])
    return values_Gg.view(x_ND.shape), scale_G.view(len(x_ND), -1)


def _searched(x_Gg: Tensor) -> tuple[Tensor, Tensor]:
    top_G = x_Gg.abs().amax(1)
    values_Gg, scale_G, error_G = torch.zeros_like(x_Gg), torch.zeros_like(top_G), x_Gg.square().sum(1)
    for step in INT4_STEPS:
        left = error_G.nonzero()[:, 0]
        if not len(left):
            break
        scale = (top_G[left] / step).bfloat16().float()
        if step <= 3:  # so few values are no choice, but what another program may have left: looked at where they fit
            some = x_Gg[left, :4] / scale.clamp(min=1e-30)[:, None]
            fits = ((some - some.round()).abs() < 0.02).all(1)
            left, scale = left[fits], scale[fits]
        mine_Gg = x_Gg[left]
        values = (mine_Gg / scale.clamp(min=1e-30)[:, None]).round_().clamp_(-8, 7)
        error = torch.addcmul(mine_Gg, values, scale[:, None], value=-1).square_().sum(1)
        better = error < error_G[left]
        chosen = left[better]
        values_Gg[chosen], scale_G[chosen], error_G[chosen] = values[better], scale[better], error[better]
    return values_Gg.to(torch.int8), scale_G


def is_quantized(name: str) -> bool:
    """Whether the tensor of this Hugging Face name is one of those that are quantized: the layers' matrices."""
    return name.startswith("model.layers.") and name.endswith("_proj.weight")


def quantization_config(kind: Quantize, group: int = INT4_GROUP) -> dict[str, Any]:
    """The `quantization_config` of a config.json; `group` of int4."""
    shared = {"num_bits": 4 if kind == "int4" else 8, "type": "float" if kind == "fp8" else "int", "symmetric": True}
    scales: dict[str, Any] = {"strategy": "group", "group_size": group} if kind == "int4" else {"strategy": "channel"}
    layers: dict[str, Any] = {"targets": ["Linear"], "weights": shared | scales | {"dynamic": False}}
    if kind not in PACKED:
        layers["input_activations"] = shared | {"strategy": "token", "dynamic": True}
    return {
        "quant_method": "compressed-tensors",
        "format": FORMATS[kind],
        "quantization_status": "compressed",
        "config_groups": {"group_0": layers},
        "ignore": ["lm_head"],
    }


def _known_fields(config: Mapping[str, Any]) -> Any:
    """What of a `quantization_config` must be as we know it: form, and how weights and activations are quantized."""
    groups = config.get("config_groups")
    names = ("weights", "input_activations", "output_activations")
    parts = [group.get(part) or {} for group in groups.values() for part in names] if groups else []
    keys = ("num_bits", "type", "symmetric", "strategy", "dynamic")
    return config.get("format"), [
        {key: part.get(key) for key in (*keys, *(["group_size"] if part.get("strategy") == "group" else []))} for part in parts
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
        if any(essence == _known_fields(quantization_config(kind, group)) for group in INT4_GROUPS[: None if kind == "int4" else 1]):
            return kind
    raise InputError(
        "Give the model as it was before it was quantized: of quantized folders "
        "those of compressed-tensors are read with eight bits, a scale a row and a scale a token, or with four bits, "
        f"of weights alone, symmetric, in groups of {INT4_GROUPS[0]}, {INT4_GROUPS[1]} or {INT4_GROUPS[2]}."
    )


def _is_sparse(config: Any) -> bool:
    return bool(config) and config.get("format") != "dense"


def scale_name(name: str) -> str:
    """Name of the scales of a matrix."""
    return f"{name}_scale"


def stored_names(name: str, kind: Quantize) -> tuple[str, ...]:
    """Names of the tensors that stand for one matrix."""
    return (name, scale_name(name)) if kind not in PACKED else (f"{name}_packed", scale_name(name), f"{name}_shape")


def stored_as(name: str, kind: Quantize, shape: Sequence[int]) -> dict[str, tuple[tuple[str, ...], list[list[int]]]]:
    """Names of the tensors that stand for one of `shape`, with the types (safetensors' names) and the shapes that each may have."""
    if not kind or len(shape) != 2:
        return {name: (FLOATS, [list(shape)])}
    N, D = shape
    scales = (FLOATS, [[N, D // group] for group in INT4_GROUPS if D % group == 0] or [[N, -1]] if kind == "int4" else [[N, 1], [N]])
    if kind not in PACKED:
        return dict(zip(stored_names(name, kind), ((STORED_DTYPES[kind], [[N, D]]), scales), strict=True))
    parts = (("I32",), [[N, -(-D // (8 if kind == "int4" else 4))]]), scales, (("I64", "I32"), [[2]])
    return dict(zip(stored_names(name, kind), parts, strict=True))


def compress(name: str, weight_ND: Tensor, kind: Quantize, *, group: int = INT4_GROUP) -> dict[str, Tensor]:
    """Compress one matrix to the tensors that stand for it on disk; `group` of int4."""
    if kind == "int4":
        check_groups(weight_ND.shape[1], group)
        values_ND, scale_NG = grouped(weight_ND, group)
        raised = (values_ND + 8).view(torch.uint8)
        packed = (raised[:, ::2] | raised[:, 1::2] << 4).view(torch.int32)
        parts = packed, scale_NG.bfloat16(), torch.tensor(weight_ND.shape, dtype=torch.int64)
        return dict(zip(stored_names(name, kind), parts, strict=True))
    values_ND, scale_N = scaled(weight_ND, DTYPES[kind])
    if kind not in PACKED:
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
        values = values.contiguous().view(torch.uint8)
        if kind == "int4":
            values = torch.stack((values & 15, values >> 4), -1).flatten(1)
        values = values[:, : max(0, int(shape[0][1]))].int() - (8 if kind == "int4" else 128)
        if list(values.shape) != shape[0].tolist():
            raise ValueError(f"{name} has the shape {list(values.shape)}, not {shape[0].tolist()}")
    if kind == "int4":
        return (values.float().unflatten(1, (scale.shape[1], -1)) * scale.float()[:, :, None]).flatten(1)
    if scale.numel() != len(values):
        raise ValueError(f"{name} has {len(values)} rows and {scale.numel()} scales")
    return values.float() * scale.float().view(-1, 1)
