"""Paged-attention kernels in Triton: the blocks of attention.py written and read where they lie, one program a
tile, head and split of the keys.

Shapes: a tile has R rows, (token, query head) pairs that read the same keys; D dimensions of a head, rounded up to a power of two.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gristmill.engine.block_manager import BLOCK_SIZE
from gristmill.model.attention import ScoreMod
from gristmill.model.quantized import MAX_VALUES
from gristmill.model.rotary import Angles


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
    num_splits: int = 1,
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
        num_splits: programs that share the keys of a tile of one token, a power of two; a second pass joins what they found
            (flash-decoding: Dao and others, 2023). The tiles are then those of the first tokens.
    """
    heads, size = q_THd.shape[1:]
    parts, stats = out_THd, out_THd  # unused
    if num_splits > 1:
        parts = q_THd.new_empty(num_splits, len(tiles_N4), heads, size, dtype=torch.float32)
        stats = q_THd.new_empty(2, num_splits, len(tiles_N4), heads, dtype=torch.float32)
    dims = max(16, triton.next_power_of_2(size))
    _attend[(len(tiles_N4), kv_heads, num_splits)](
        q_THd,
        memory,
        memory if scales is None else scales,
        out_THd,
        parts,
        stats,
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
        dims,
        scales is not None,
        mod.soft_cap is not None,
        num_splits,
        num_warps=8 if rows >= 128 else 4,
    )
    if num_splits > 1:
        _join[(len(tiles_N4), heads)](parts, stats, out_THd, size, num_splits, dims)


def rotate_and_store(
    qkv: Tensor,
    memory: Tensor,
    scales: Tensor | None,
    *,
    offsets: tuple[int, int, int],
    positions_T: Tensor,
    blocks_T: Tensor,
    angles: Angles,
    kv_heads: int,
) -> Tensor:
    """Queries [T, H, d] after the rotation; keys, rotated, and values go into their blocks. qkv [T, H + 2K, d] as `group_heads` gives it.

    Args:
        memory, scales, offsets: as in `attend`; with scales the memory is int8 or float8_e4m3fn.
        positions_T, blocks_T: int64, where each token belongs.
        angles: fp32, of all positions.
    """
    num_tokens, (heads, size) = len(positions_T), (qkv.shape[1] - 2 * kv_heads, qkv.shape[2])
    cos_LR, sin_LR = (angle_LR.contiguous() for angle_LR in angles)
    assert qkv.stride(2) == 1
    q_THd = qkv.new_empty(num_tokens, heads, size)
    _rotate_and_store[(num_tokens, heads + 2 * kv_heads)](
        qkv,
        qkv.stride(0),
        qkv.stride(1),
        q_THd,
        memory,
        memory if scales is None else scales,
        positions_T,
        blocks_T,
        cos_LR,
        sin_LR,
        memory.stride(0),
        offsets[0],
        offsets[1],
        offsets[2] // torch.float32.itemsize,
        heads,
        kv_heads,
        size,
        -(-size // 16) * 16,
        cos_LR.shape[1],
        BLOCK_SIZE,
        max(16, triton.next_power_of_2(size)),
        0.0 if scales is None else MAX_VALUES[memory.dtype],
        memory.dtype == torch.float8_e4m3fn,
        num_warps=1,
    )
    return q_THd


@triton.jit
def _attend(
    q_ptr,
    memory_ptr,
    scales_ptr,
    out_ptr,
    parts_ptr,
    stats_ptr,
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
    SPLITS: tl.constexpr,
):
    tile, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
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
    last = (end + BLOCK - 1) // BLOCK
    if SPLITS > 1:
        share = (last - begin + SPLITS - 1) // SPLITS
        begin += split * share
        last = tl.minimum(begin + share, last)
    for number in range(begin, last):
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
    if SPLITS > 1:  # one token a tile
        row_at = (split * tl.num_programs(0) + tile) * heads + head * group + row
        tl.store(parts_ptr + row_at[:, None] * size + dim[None, :], out, mask=live)
        tl.store(stats_ptr + row_at, top, mask=row < group)
        tl.store(stats_ptr + SPLITS * tl.num_programs(0) * heads + row_at, total, mask=row < group)
    else:
        tl.store(out_ptr + at, (out / total[:, None]).to(q.dtype), mask=live)


@triton.jit
def _join(parts_ptr, stats_ptr, out_ptr, size: tl.constexpr, SPLITS: tl.constexpr, D: tl.constexpr):
    rows = tl.num_programs(0) * tl.num_programs(1)
    row = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    split, dim = tl.arange(0, SPLITS), tl.arange(0, D)
    top = tl.load(stats_ptr + split * rows + row)
    weight = tl.exp(top - tl.max(top, 0))
    total = tl.sum(weight * tl.load(stats_ptr + (SPLITS + split) * rows + row), 0)
    at = (split * rows + row)[:, None] * size + dim[None, :]
    parts = tl.load(parts_ptr + at, mask=(dim < size)[None, :], other=0.0)
    out = tl.sum(weight[:, None] * parts, 0) / total
    tl.store(out_ptr + row * size + dim, out.to(out_ptr.dtype.element_ty), mask=dim < size)


@triton.jit
def _rotate_and_store(
    qkv_ptr,
    token_stride,
    head_stride,
    q_ptr,
    memory_ptr,
    scales_ptr,
    positions_ptr,
    blocks_ptr,
    cos_ptr,
    sin_ptr,
    block_stride,
    k_at,
    v_at,
    s_at,
    heads: tl.constexpr,
    kv_heads: tl.constexpr,
    size: tl.constexpr,
    padded: tl.constexpr,
    pairs: tl.constexpr,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    LARGEST: tl.constexpr,
    FP8: tl.constexpr,
):
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    group: tl.constexpr = heads // kv_heads
    own, inner = head // (group + 2), head % (group + 2)  # queries of a key-value head, its key, its value
    dim = tl.arange(0, D)
    x_ptr = qkv_ptr + token * token_stride + head * head_stride
    position = tl.load(positions_ptr + token)
    x = tl.load(x_ptr + dim, mask=dim < size, other=0.0)
    if pairs > 0:  # noqa: SIM102 (one is known when it is compiled)
        if inner <= group:  # pairs i with i + R
            turned, low = dim < 2 * pairs, dim < pairs
            pair = tl.where(low, dim, dim - pairs)
            other = tl.load(x_ptr + tl.where(low, dim + pairs, pair), mask=turned, other=0.0).to(tl.float32)
            cos = tl.load(cos_ptr + position * pairs + pair, mask=turned, other=1.0)
            sin = tl.load(sin_ptr + position * pairs + pair, mask=turned, other=0.0)
            x = (x.to(tl.float32) * cos + other * tl.where(low, -sin, sin)).to(x.dtype)
    if inner < group:
        tl.store(q_ptr + (token * heads + own * group + inner) * size + dim, x, mask=dim < size)
    else:
        block, place, value = tl.load(blocks_ptr + token), position % BLOCK, inner - group
        at = tl.where(value == 0, k_at + (own * size + dim) * BLOCK + place, v_at + (own * BLOCK + place) * padded + dim)
        kept = x.to(tl.float32)
        if LARGEST > 0:
            scale = tl.max(tl.abs(kept), 0) / LARGEST
            tl.store(scales_ptr + block * (block_stride // 4) + s_at + (value * kv_heads + own) * BLOCK + place, scale)
            kept = kept / tl.maximum(scale, 1e-30)
            # A float to which 1.5 * 2**23 units were added keeps whole units, rounded to even. The unit is 1; in e4m3 an eighth of the
            # number's power of two, or of 2**-6: a conversion of its own would round in another way on every device.
            units = tl.full([D], 12582912.0, tl.float32)
            if FP8:
                exponent = tl.maximum((kept.to(tl.int32, bitcast=True) >> 23) & 255, 127 - 6)
                units = (((exponent + 20) << 23) | (1 << 22)).to(tl.float32, bitcast=True)
            kept = (kept + units) - units
        tl.store(memory_ptr + block * block_stride + at, kept.to(memory_ptr.dtype.element_ty), mask=dim < size)
