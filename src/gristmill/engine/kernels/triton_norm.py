"""Residual add and norm in Triton, one program a row.

Shapes: T rows, D elements of one, in the kernel rounded up to a power of two.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


def add_norm(x_TD: Tensor, delta_TD: Tensor | None, gain_D: Tensor, bias_D: Tensor | None, *, eps: float, centred: bool) -> Tensor:
    """Norm of x + delta, which takes the place of x: a layer norm where it is centred, else an RMS norm.

    Args:
        gain_D, bias_D: fp32.
    """
    assert x_TD.is_contiguous()
    out_TD = torch.empty_like(x_TD)
    size = x_TD.shape[1]
    delta_TD = x_TD if (plain := delta_TD is None) else delta_TD.contiguous()
    bias = gain_D if bias_D is None else bias_D
    width = triton.next_power_of_2(size)
    if len(x_TD):
        kinds = size, width, not plain, centred, bias_D is not None
        _add_norm[(len(x_TD),)](x_TD, delta_TD, gain_D, bias, out_TD, eps, *kinds, num_warps=8 if width >= 4096 else 4)
    return out_TD


@triton.jit
def _add_norm(
    x_ptr,
    delta_ptr,
    gain_ptr,
    bias_ptr,
    out_ptr,
    eps,
    size: tl.constexpr,
    D: tl.constexpr,
    ADDS: tl.constexpr,
    CENTRED: tl.constexpr,
    BIASED: tl.constexpr,
):
    dim = tl.arange(0, D)
    live = dim < size
    at = tl.program_id(0).to(tl.int64) * size + dim
    x = tl.load(x_ptr + at, mask=live, other=0.0)
    if ADDS:
        x = (x.to(tl.float32) + tl.load(delta_ptr + at, mask=live, other=0.0).to(tl.float32)).to(x.dtype)
        tl.store(x_ptr + at, x, mask=live)
    y = x.to(tl.float32)
    if CENTRED:
        y = tl.where(live, y - tl.sum(y, 0) / size, 0.0)
    y = y * tl.rsqrt(tl.sum(y * y, 0) / size + eps) * tl.load(gain_ptr + dim, mask=live, other=0.0)
    if BIASED:
        y += tl.load(bias_ptr + dim, mask=live, other=0.0)
    tl.store(out_ptr + at, y.to(x.dtype), mask=live)
