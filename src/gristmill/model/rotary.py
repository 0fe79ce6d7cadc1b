"""Rotary position embedding: the angles of a config's RoPE scaling (rope.py), and heads rotated by them.

Shapes: T tokens, H query heads, K key-value heads, X = H + 2K, G queries of a key-value head, d head_dim, R pairs of rotated dimensions.
"""

import math
from typing import Any

import torch
from torch import Tensor

from gristmill.model import compiled
from gristmill.model.config import ModelConfig
from gristmill.model.rope import RopeScaling

Angles = tuple[Tensor, Tensor]  # cosines and sines of rotary angles, [T, R]


def rotate(x_THd: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """Rotate the first 2R dimensions of each head, pairing i with i + R; the rest passes through. Heads may have several axes."""
    if not cos_TR.shape[1]:
        return x_THd
    axes = (slice(None), *(None,) * (x_THd.ndim - 2))
    return _Rotate.apply(x_THd, cos_TR[axes], sin_TR[axes])


def rotate_heads(qkv_TXd: Tensor, num_kv_heads: int, angles: Angles) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [T, H, d] and keys [T, K, d] after the rotation, and values [T, K, d], of rows that are grouped by key-value head."""
    grouped_TKXd = qkv_TXd.unflatten(1, (num_kv_heads, -1))
    qk_TKXd, v_TK1d = grouped_TKXd.split([grouped_TKXd.shape[2] - 1, 1], dim=2)
    q_TKGd, k_TK1d = rotate(qk_TKXd, *angles).split([grouped_TKXd.shape[2] - 2, 1], dim=2)
    return q_TKGd.flatten(1, 2), k_TK1d.flatten(1, 2), v_TK1d.flatten(1, 2)


class _Rotate(torch.autograd.Function):
    """In place of a dozen autograd nodes; the gradient is rotated back by the same angles."""

    @staticmethod
    def forward(ctx: Any, x_THd: Tensor, cos_T1R: Tensor, sin_T1R: Tensor) -> Tensor:
        ctx.save_for_backward(cos_T1R, sin_T1R)
        return _turn(x_THd, cos_T1R, sin_T1R)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos_T1R, sin_T1R = ctx.saved_tensors
        return _turn(grads[0], cos_T1R, -sin_T1R), None, None


def _turn(x_THd: Tensor, cos_T1R: Tensor, sin_T1R: Tensor) -> Tensor:
    made = compiled.call(_rotated, x_THd, cos_T1R, sin_T1R)
    return _rotated(x_THd, cos_T1R, sin_T1R) if made is None else made


def _rotated(x_THd: Tensor, cos_T1R: Tensor, sin_T1R: Tensor) -> Tensor:
    num_pairs = cos_T1R.shape[-1]
    out_THd = x_THd.clone(memory_format=torch.contiguous_format)
    pairs = x_THd[..., : 2 * num_pairs].float()
    others = pairs.roll(num_pairs, -1)  # each beside the one it is paired with
    out_THd[..., : 2 * num_pairs] = pairs * torch.cat([cos_T1R, cos_T1R], -1) + others * torch.cat([-sin_T1R, sin_T1R], -1)
    return out_THd


def inverse_frequencies(config: ModelConfig, theta: float, scaling: RopeScaling | None) -> tuple[Tensor, float]:
    """Inverse frequencies [R], and the factor of cosines and sines."""
    dims = config.rotary_dims
    exponents_R = torch.arange(0, dims, 2, dtype=torch.float32) / max(1, dims)
    inverse_R = 1.0 / (theta**exponents_R)
    if scaling is None or scaling.kind == "dynamic":  # which changes nothing within max_positions
        return inverse_R, 1.0
    if scaling.kind == "longrope":
        factor = scaling.extended_max_positions / scaling.original_max_positions if scaling.factor is None else scaling.factor
        grown = math.sqrt(1 + math.log(factor) / math.log(scaling.original_max_positions)) if factor > 1 else 1.0
        short_R = torch.tensor(scaling.short_factor, dtype=torch.float32)
        return 1.0 / (short_R * theta**exponents_R), grown if scaling.attention_factor is None else scaling.attention_factor
    assert scaling.factor is not None
    if scaling.kind == "linear":
        return inverse_R / scaling.factor, 1.0
    if scaling.kind == "yarn":
        return _yarn(dims, theta, scaling, scaling.factor)
    # Llama 3.1: short wavelengths stay, long ones are slowed by `factor`, and between the two limits the
    # share of each changes linearly in original_max_positions / wavelength.
    turns_R = scaling.original_max_positions * inverse_R / (2 * math.pi)
    kept_R = (turns_R - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept_R = kept_R.clamp(0.0, 1.0)
    return inverse_R * (kept_R + (1.0 - kept_R) / scaling.factor), 1.0


def _yarn(dims: int, theta: float, scaling: RopeScaling, factor: float) -> tuple[Tensor, float]:
    """YaRN (arXiv 2309.00071, section 3): as Llama 3.1, but linear in the dimension's number, and with a factor of cosines and sines."""

    def dimension(turns: float) -> float:  # which turns so often within the original positions
        return dims * math.log(scaling.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

    def temperature(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    low, high = dimension(scaling.beta_fast or 32), dimension(scaling.beta_slow or 1)
    if scaling.truncate is not False:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    ramp_R = (torch.arange(dims // 2, dtype=torch.float32) - low) / (high - low if high != low else 0.001)
    kept_R = 1 - ramp_R.clamp(0, 1)
    frequencies_R = theta ** (torch.arange(0, dims, 2, dtype=torch.float32) / dims)
    inverse_R = 1.0 / (factor * frequencies_R) * (1 - kept_R) + 1.0 / frequencies_R * kept_R
    if scaling.attention_factor is not None:
        return inverse_R, scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return inverse_R, temperature(scaling.mscale) / temperature(scaling.mscale_all_dim)
    return inverse_R, temperature(1)
