"""Paged-attention kernel in Triton: the blocks of attention.py read where they lie, one program a tile and head.

Shapes: a tile has R rows, (token, query head) pairs that read the same keys; D dimensions of a head, rounded up to a power of two.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gristmill.engine.block_manager import BLOCK_SIZE
from gristmill.model.attention import ScoreMod


def attend(
    q_THd: Tensor,
    memory: Tensor,
    scales: Tensor | None,
    *,
    offsets: tuple[int, int, int],
    tiles_N4: Tensor,
    block_tables_NP: Tensor,
    out_THd: Tensor,
    kv_heads: int,
    rows: int,
    mod: ScoreMod,
) -> None:
    """Paged attention of some of a step's tokens, into out.

    Args:
        memory: of the KV cache, in the type of its elements.
        scales: the same memory as fp32, where it has scales.
        offsets: of a layer's keys, values and scales in a block.
        tiles_N4: int32: sequence, its first token in this step, that token's position, tokens.
        block_tables_NP: int32, of each sequence.
        rows: of a tile; a power of two, at least 16 and at least tokens * query heads of a key head.
        mod: window, scale and cap.
    """
    heads, size = q_THd.shape[1:]
    _attend[(len(tiles_N4), kv_heads)](
        q_THd,
        memory,
        memory if scales is None else scales,
        out_THd,
        tiles_N4,
        block_tables_NP,
        block_tables_NP.stride(0),
        memory.stride(0),
        offsets[0],
        offsets[1],
        offsets[2] // torch.float32.itemsize,
        size**-0.5 if mod.scale is None else mod.scale,
        mod.soft_cap or 0.0,
        mod.window,
        heads,
        heads // kv_heads,
        size,
        -(-size // 16) * 16,
        BLOCK_SIZE,
        rows,
        max(16, triton.next_power_of_2(size)),
        scales is not None,
        mod.soft_cap is not None,
        num_warps=4,
    )


@triton.jit
def _attend(
    q_ptr,
    memory_ptr,
    scales_ptr,
    out_ptr,
    tiles_ptr,
    table_ptr,
    table_stride,
    block_stride,
    k_at,
    v_at,
    s_at,
    scale,
    cap,
    window,
    heads,
    group: tl.constexpr,
    size: tl.constexpr,
    padded: tl.constexpr,
    BLOCK: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    SCALED: tl.constexpr,
    CAPPED: tl.constexpr,
):
    tile, head = tl.program_id(0), tl.program_id(1)
    sequence, token = tl.load(tiles_ptr + tile * 4), tl.load(tiles_ptr + tile * 4 + 1)
    position, count = tl.load(tiles_ptr + tile * 4 + 2), tl.load(tiles_ptr + tile * 4 + 3)
    row, dim, place = tl.arange(0, R), tl.arange(0, D), tl.arange(0, BLOCK)
    mine = row // group
    at = ((token + mine) * heads + head * group + row % group).to(tl.int64)[:, None] * size + dim[None, :]
    live = (mine < count)[:, None] & (dim < size)[None, :]
    q = tl.load(q_ptr + at, mask=live, other=0.0)
    top = tl.full([R], -1e30, tl.float32)
    total = tl.zeros([R], tl.float32)
    out = tl.zeros([R, D], tl.float32)
    end = position + count
    begin = 0  # of the window of the tile's first token
    if window > 0:
        begin = tl.maximum(position - window + 1, 0) // BLOCK
    for number in range(begin, (end + BLOCK - 1) // BLOCK):
        block = tl.load(table_ptr + sequence * table_stride + number).to(tl.int64)
        here = number * BLOCK + place
        k_ptr = memory_ptr + block * block_stride + k_at + (head * size + dim)[:, None] * BLOCK + place[None, :]
        k = tl.load(k_ptr, mask=(dim < size)[:, None] & (here < end)[None, :], other=0.0)
        scores = tl.dot(q, k.to(q.dtype), input_precision="ieee") * scale
        scale_ptr = scales_ptr + block * (block_stride // 4) + s_at + head * BLOCK + place  # four bytes each
        if SCALED:
            scores *= tl.load(scale_ptr, mask=here < end, other=0.0)[None, :]
        if CAPPED:  # cap * tanh(score / cap)
            scores = cap * (2.0 / (1.0 + tl.exp(-2.0 / cap * scores)) - 1.0)
        at_row = (position + mine)[:, None]
        seen = here[None, :] <= at_row
        if window > 0:
            seen = seen & (here[None, :] > at_row - window)
        scores = tl.where(seen, scores, -1e30)
        new_top = tl.maximum(top, tl.max(scores, 1))
        shrink = tl.exp(top - new_top)
        weights = tl.exp(scores - new_top[:, None])
        total = total * shrink + tl.sum(weights, 1)
        if SCALED:
            values_scale_ptr = scale_ptr + tl.num_programs(1) * BLOCK
            weights *= tl.load(values_scale_ptr, mask=here < end, other=0.0)[None, :]
        v_ptr = memory_ptr + block * block_stride + v_at + (head * BLOCK + place)[:, None] * padded + dim[None, :]
        v = tl.load(v_ptr, mask=(here < end)[:, None] & (dim < size)[None, :], other=0.0)
        out = out * shrink[:, None] + tl.dot(weights.to(q.dtype), v.to(q.dtype), input_precision="ieee")
        top = new_top
    tl.store(out_ptr + at, (out / total[:, None]).to(q.dtype), mask=live)
