"""Variable-length causal attention: inside each document of a packed, token-major batch.

Shapes: T tokens of all documents one after the other, H query heads, K key-value heads, d head_dim, B documents of one view,
L its keys and Q its queries (see packed.py).
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from gristmill.core.device import has_bf16_products
from gristmill.model.kernels import library as kernels
from gristmill.model.packed import PackedShape, PaddedPlan, View

# Queries that go through their backward pass together.
QUERY_CHUNK = 192
# Queries whose mask is held at once.
MASKED_QUERY_CHUNK = 1024


@dataclass(frozen=True)
class ScoreMod:
    """Score modification: what a layer does to the products of queries and keys.

    Attributes:
        window: tokens that a token sees, itself included; 0 for all before it.
        scale: of the products; None for 1/sqrt(d).
        soft_cap: scaled scores become cap * tanh(score / cap).
    """

    window: int = 0
    scale: float | None = None
    soft_cap: float | None = None


PLAIN = ScoreMod()


def group_heads(q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor) -> Tensor:
    """Queries, keys and values [T, H + 2K, d], grouped by key-value head: its queries, its key, its value."""
    return torch.cat([q_THd.unflatten(1, (k_TKd.shape[1], -1)), k_TKd.unsqueeze(2), v_TKd.unsqueeze(2)], 2).flatten(1, 2)


def split_heads(qkv_TXd: Tensor, num_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """What `group_heads` was given."""
    grouped_TKXd = qkv_TXd.unflatten(1, (num_kv_heads, -1))
    q_TKGd, k_TK1d, v_TK1d = grouped_TKXd.split([grouped_TKXd.shape[2] - 2, 1, 1], dim=2)
    return q_TKGd.flatten(1, 2), k_TK1d.flatten(1, 2), v_TK1d.flatten(1, 2)


def has_compiled_attention(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there is a compiled kernel for tensors of this type, and it is the fastest there.

    bf16 goes through tile products (AMX) where the CPU has them. Where it has other products in bf16 torch's own kernels are the faster
    ones, and elsewhere ours in fp32.
    """
    if device.type != "cpu" or dtype not in kernels.TYPES or kernels.load() is None:
        return False
    return dtype != torch.bfloat16 or kernels.has_tiles() or not has_bf16_products()


def compiled_attention(
    qkv_TXd: Tensor, shape: PackedShape, *, num_heads: int, angles: tuple[Tensor, Tensor] | None = None, mod: ScoreMod = PLAIN
) -> Tensor | None:
    """Causal grouped-query attention inside each document by the compiled kernel, rotation included.

    Args:
        qkv_TXd: queries, keys and values as `group_heads` lays them out, before the rotation, X = H + 2K.
        num_heads: H.
        angles: cosines and sines [T, R], fp32; None without a rotation.

    Returns:
        [T, H, d] in the type of qkv_TXd; None where the kernel does not compute with such tensors.
    """
    if not has_compiled_attention(qkv_TXd.device, qkv_TXd.dtype):
        return None
    cos_TR, sin_TR = angles or (torch.empty(qkv_TXd.shape[0], 0),) * 2
    return _CompiledAttention.apply(qkv_TXd, cos_TR, sin_TR, shape, num_heads, mod)


class _CompiledAttention(torch.autograd.Function):
    """Attention by kernels.cpp, or in bf16 by amx_attention.cpp. Of scores only the logarithm of each row's sum is kept."""

    @staticmethod
    def forward(ctx: Any, qkv_TXd: Tensor, cos_TR: Tensor, sin_TR: Tensor, shape: PackedShape, num_heads: int, mod: ScoreMod) -> Tensor:
        qkv_TXd, cos_TR, sin_TR = (x.contiguous() for x in (qkv_TXd, cos_TR, sin_TR))
        library = kernels.load()
        assert library is not None and qkv_TXd.shape[0] == shape.num_tokens
        tiles = qkv_TXd.dtype == torch.bfloat16 and kernels.has_tiles()
        attend = library.gristmill_amx_attention_forward if tiles else library.gristmill_attention_forward
        read_TXd = qkv_TXd if tiles else qkv_TXd.float()
        out_THd = read_TXd.new_empty(shape.num_tokens, num_heads, qkv_TXd.shape[2])
        log_sum_TH = torch.empty(shape.num_tokens, num_heads) if ctx.needs_input_grad[0] else None
        call = attention_call(_heads(qkv_TXd, num_heads), (cos_TR, sin_TR), shape=shape, mod=mod)
        attend(call, read_TXd.data_ptr(), out_THd.data_ptr(), kernels.pointer_of(log_sum_TH))
        out_THd = out_THd.to(qkv_TXd.dtype)
        ctx.save_for_backward(qkv_TXd, cos_TR, sin_TR, out_THd, log_sum_TH)
        ctx.shape, ctx.mod, ctx.tiles = shape, mod, tiles
        return out_THd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        qkv_TXd, cos_TR, sin_TR, out_THd, log_sum_TH = ctx.saved_tensors
        library = kernels.load()
        assert library is not None
        grad_TXd = torch.empty_like(qkv_TXd, dtype=torch.float32)
        call = attention_call(_heads(qkv_TXd, out_THd.shape[1]), (cos_TR, sin_TR), shape=ctx.shape, mod=ctx.mod)
        differentiate = library.gristmill_amx_attention_backward if ctx.tiles else library.gristmill_attention_backward
        qkv, out, grad = (x.contiguous() if ctx.tiles else x.float().contiguous() for x in (qkv_TXd, out_THd, grads[0]))
        differentiate(call, *(x.data_ptr() for x in (qkv, out, log_sum_TH, grad, grad_TXd)))
        return grad_TXd.to(qkv_TXd.dtype), None, None, None, None, None


def _heads(qkv_TXd: Tensor, num_heads: int) -> tuple[int, int, int]:
    return num_heads, (qkv_TXd.shape[1] - num_heads) // 2, qkv_TXd.shape[2]


def attention_call(heads: tuple[int, int, int], angles: tuple[Tensor, Tensor], *, shape: PackedShape, mod: ScoreMod) -> kernels.Attention:
    """What the kernel is told; angles and shape must live while it runs.

    Args:
        heads: number of query heads and of key-value heads, and their size.
    """
    documents, groups = shape.documents
    return kernels.Attention(
        *heads,
        angles[0].shape[1],
        mod.window,
        torch.get_num_threads(),
        len(documents),
        len(groups) - 1,
        heads[2] ** -0.5 if mod.scale is None else mod.scale,
        mod.soft_cap or 0.0,
        *(x.data_ptr() for x in (documents, groups, *angles)),
    )


def varlen_attention(q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, shape: PackedShape, *, mod: ScoreMod = PLAIN) -> Tensor:
    """Causal grouped-query attention inside each document. With `shape.gather` keys and values are those of all processes.

    Returns [T, H, d] in the type of q_THd.
    """
    gathered = shape.gather is not None
    if kernels.library_for(q_THd) is not None and not gathered:
        out_THd = compiled_attention(group_heads(q_THd, k_TKd, v_TKd), shape, num_heads=q_THd.shape[1], mod=mod)
        if out_THd is not None:
            return out_THd
    window = mod.window if mod.window < shape.max_length else 0
    flash = q_THd.dtype in (torch.bfloat16, torch.float16) and q_THd.shape[2] % 8 == 0 and q_THd.shape[2] <= 256 and mod.soft_cap is None
    if q_THd.is_cuda and flash:
        from torch.nn.attention.varlen import varlen_attn

        if any(shape.shared) or gathered:
            k_TKd, v_TKd = (x.index_select(0, shape.keys_S) for x in (k_TKd, v_TKd))
        # A window that reaches all the way back but not ahead is plain causal attention; the last query sees the last key.
        longest = (shape.max_length,) * 2
        kwargs: dict[str, Any] = {"scale": mod.scale, "window_size": (window - 1, 0), "enable_gqa": True}
        out = varlen_attn(q_THd, k_TKd, v_TKd, shape.cu_seqlens, shape.cu_keys, *longest, **kwargs)
        assert isinstance(out, Tensor)  # a pair only where auxiliary outputs are asked for
        return out
    if gathered:
        return _attention_of_pieces(q_THd, k_TKd, v_TKd, shape, mod)
    if q_THd.device.type == "cpu" and q_THd.dtype == torch.bfloat16 and mod.soft_cap is None:
        return _CpuBf16Attention.apply(q_THd, k_TKd, v_TKd, shape.views, mod)
    return _padded_attention(q_THd, k_TKd, v_TKd, shape.padded_plan, mod)


class _CpuBf16Attention(torch.autograd.Function):
    """The kernels that PyTorch itself chooses on a CPU, in bf16 forward and in fp32 backward.

    Against fp32, the forward kernel is three times faster in bf16, the backward kernel up to nine times slower (64 tokens).
    """

    @staticmethod
    def forward(ctx: Any, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, views: list[View], mod: ScoreMod) -> Tensor:
        out_THd = torch.empty_like(q_THd, memory_format=torch.contiguous_format)
        sums = []
        for view in views:
            cells = view.queries.take(q_THd), view.keys.take(k_TKd), view.keys.take(v_TKd)
            out_BHQd, sum_BHQ = _forward_chunked(*cells, view.num_earlier, mod)
            view.queries.put(out_BHQd, out_THd)
            sums.append(sum_BHQ)
        ctx.save_for_backward(q_THd, k_TKd, v_TKd, out_THd, *sums)
        ctx.views, ctx.mod = views, mod
        return out_THd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q_THd, k_TKd, v_TKd, out_THd, *sums = ctx.saved_tensors
        grads_T = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_THd, k_TKd, v_TKd)]
        for view, sum_BHQ in zip(ctx.views, sums, strict=True):
            q_BHQd, out_BHQd = (view.queries.take(x).float() for x in (q_THd, out_THd))
            k_BKLd, v_BKLd = (view.keys.take(x).float() for x in (k_TKd, v_TKd))
            grad_BHQd = view.queries.take(grads[0], own=True).float()
            parts = _backward_chunked(grad_BHQd, q_BHQd, k_BKLd, v_BKLd, out_BHQd, sum_BHQ, ctx.mod)
            for part, into, cells in zip(parts, grads_T, (view.queries, view.keys, view.keys), strict=True):
                cells.put(part, into)
        return *grads_T, None, None


def hidden_keys(num_queries: int, num_keys: int, window: int, device: torch.device | None = None) -> Tensor:
    """bool [Q, L]: the keys that are hidden from queries which belong to the last of them: those ahead, and those before the window."""
    ones_QL = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    ahead_QL = ones_QL.triu(num_keys - num_queries + 1)
    return ahead_QL | ones_QL.tril(num_keys - num_queries - window) if window else ahead_QL


def _forward_chunked(q_BHQd: Tensor, k_BKLd: Tensor, v_BKLd: Tensor, num_earlier: int, mod: ScoreMod) -> tuple[Tensor, Tensor]:
    """Outputs of queries that belong to the last keys, and the logarithms of their scores' sums.

    Where there are keys before, or a window, the kernel needs a mask, which is made for one chunk of queries at a time.
    """
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    if num_earlier == 0 and (not mod.window or mod.window >= q_BHQd.shape[2]):
        return attend(q_BHQd, k_BKLd, v_BKLd, 0.0, True, scale=mod.scale)
    outputs, sums = [], []
    for start in range(0, q_BHQd.shape[2], MASKED_QUERY_CHUNK):
        chunk_BHSd = q_BHQd[:, :, start : start + MASKED_QUERY_CHUNK]
        keys = _seen_keys(num_earlier + start, chunk_BHSd.shape[2], mod.window)
        hidden_SL = hidden_keys(chunk_BHSd.shape[2], keys.stop - keys.start, mod.window)
        mask_SL = torch.zeros(hidden_SL.shape, dtype=q_BHQd.dtype).masked_fill_(hidden_SL, -torch.inf)
        out, log_sum = attend(chunk_BHSd, k_BKLd[:, :, keys], v_BKLd[:, :, keys], 0.0, False, attn_mask=mask_SL, scale=mod.scale)
        outputs.append(out)
        sums.append(log_sum)
    return torch.cat(outputs, 2), torch.cat(sums, 2)


def _seen_keys(start: int, num_queries: int, window: int) -> slice:
    """Keys that some of the queries at these positions see."""
    return slice(max(0, start - window + 1) if window else 0, start + num_queries)


def _backward_chunked(
    grad_BHQd: Tensor, q_BHQd: Tensor, k_BKLd: Tensor, v_BKLd: Tensor, out_BHQd: Tensor, sum_BHQ: Tensor, mod: ScoreMod
) -> tuple[Tensor, ...]:
    """Gradients of queries, keys and values, one chunk of queries after another. The queries belong to the last keys.

    The kernel also computes what causality hides, so each chunk sees its own keys causally and the earlier ones in full; with a window
    it sees all that reach into the window, under a mask.
    """
    totals = tuple(torch.zeros_like(x) for x in (q_BHQd, k_BKLd, v_BKLd))
    num_queries, num_keys = q_BHQd.shape[2], k_BKLd.shape[2]
    num_earlier = num_keys - num_queries
    windowed = 0 < mod.window < num_keys
    for start in range(0, num_queries, QUERY_CHUNK):
        queries = slice(start, start + QUERY_CHUNK)
        parts_of_keys: list[tuple[slice, bool, Tensor | None]] = [
            (slice(num_earlier + start, num_earlier + start + QUERY_CHUNK), True, None),
            (slice(0, num_earlier + start), False, None),
        ]
        if windowed:
            count = min(QUERY_CHUNK, num_queries - start)
            seen = _seen_keys(num_earlier + start, count, mod.window)
            hidden_SL = hidden_keys(count, seen.stop - seen.start, mod.window)
            parts_of_keys = [(seen, False, torch.zeros(hidden_SL.shape).masked_fill_(hidden_SL, -torch.inf))]
        for keys, is_causal, mask_SL in parts_of_keys:
            if keys.stop == 0:
                continue
            parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *(x[:, :, queries] for x in (grad_BHQd, q_BHQd)),
                *(x[:, :, keys] for x in (k_BKLd, v_BKLd)),
                *(x[:, :, queries] for x in (out_BHQd, sum_BHQ)),
                0.0,
                is_causal,
                attn_mask=mask_SL,
                scale=mod.scale,
            )
            for total, part, where in zip(totals, parts, (queries, keys, keys), strict=True):
                total[:, :, where] += part
    return totals


def _padded_attention(q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, plan: PaddedPlan, mod: ScoreMod) -> Tensor:
    cells = [_Pad.apply(x, plan) for x in (q_THd, k_TKd, v_TKd)]
    q_views, k_views, v_views = (x.split([B * L for B, L in plan.views]) for x in cells)
    outputs = []
    for (B, L), *views in zip(plan.views, q_views, k_views, v_views, strict=True):
        q_BHLd, k_BKLd, v_BKLd = (x.unflatten(0, (B, L)).transpose(1, 2) for x in views)
        if mod.soft_cap is None and not 0 < mod.window < L:
            out_BHLd = F.scaled_dot_product_attention(q_BHLd, k_BKLd, v_BKLd, is_causal=True, scale=mod.scale, enable_gqa=True)
        else:
            out_BHLd = _masked_attention(q_BHLd, k_BKLd, v_BKLd, mod)
        outputs.append(out_BHLd.transpose(1, 2).flatten(0, 1))
    return _Unpad.apply(torch.cat(outputs), plan)


def _attention_of_pieces(q_PHd: Tensor, k_TKd: Tensor, v_TKd: Tensor, shape: PackedShape, mod: ScoreMod) -> Tensor:
    """Attention of pieces of documents, one after another, whose queries are the last of their keys."""
    starts, starts_of_keys = shape.cu_seqlens.tolist(), shape.cu_keys.tolist()
    outputs = [q_PHd[:0]]
    for number, (start, end) in enumerate(pairwise(starts)):
        keys_L = shape.keys_S[starts_of_keys[number] : starts_of_keys[number + 1]]
        q_1HQd, k_1KLd, v_1KLd = (x.transpose(0, 1)[None] for x in (q_PHd[start:end], k_TKd[keys_L], v_TKd[keys_L]))
        outputs.append(_masked_attention(q_1HQd, k_1KLd, v_1KLd, mod)[0].transpose(0, 1))
    return torch.cat(outputs)


def _masked_attention(q_BHLd: Tensor, k_BKLd: Tensor, v_BKLd: Tensor, mod: ScoreMod) -> Tensor:
    """Attention of queries that belong to the last keys, maybe within a window or with a soft cap, one chunk after another: masks and
    scores of all are never held at once.
    """
    outputs = []
    num_earlier = k_BKLd.shape[2] - q_BHLd.shape[2]
    for start in range(0, q_BHLd.shape[2], MASKED_QUERY_CHUNK):
        chunk_BHSd = q_BHLd[:, :, start : start + MASKED_QUERY_CHUNK]
        keys = _seen_keys(num_earlier + start, chunk_BHSd.shape[2], mod.window)
        seen_SL = ~hidden_keys(chunk_BHSd.shape[2], keys.stop - keys.start, mod.window, q_BHLd.device)
        k_BKMd, v_BKMd = k_BKLd[:, :, keys], v_BKLd[:, :, keys]
        if mod.soft_cap is None:
            outputs.append(F.scaled_dot_product_attention(chunk_BHSd, k_BKMd, v_BKMd, seen_SL, scale=mod.scale, enable_gqa=True))
        else:  # no kernel has caps; scores are made again for the backward pass
            args = (chunk_BHSd, k_BKMd, v_BKMd, seen_SL, mod)
            outputs.append(checkpoint(capped_attention, *args, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(outputs, 2)


def capped_attention(q_BHSd: Tensor, k_BKLd: Tensor, v_BKLd: Tensor, seen: Tensor, mod: ScoreMod) -> Tensor:
    """Attention with a soft cap of the scores, in fp32: softmax(cap tanh(scale q k / cap)) v, over the keys that are seen."""
    group = q_BHSd.shape[1] // k_BKLd.shape[1]
    k_BHLd, v_BHLd = (x.float().repeat_interleave(group, 1) for x in (k_BKLd, v_BKLd))
    scale = q_BHSd.shape[-1] ** -0.5 if mod.scale is None else mod.scale
    scores_BHSL = torch.matmul(q_BHSd.float() * scale, k_BHLd.transpose(2, 3))
    if mod.soft_cap is not None:
        scores_BHSL = mod.soft_cap * torch.tanh(scores_BHSL / mod.soft_cap)
    return torch.matmul(scores_BHSL.masked_fill(~seen, -torch.inf).softmax(-1), v_BHLd).to(q_BHSd.dtype)


class _Pad(torch.autograd.Function):
    """Tokens to cells. Padding cells receive no gradient, so the way back is a gather, and a sum only over shared tokens."""

    @staticmethod
    def forward(ctx: Any, x_T: Tensor, plan: PaddedPlan) -> Tensor:
        ctx.plan = plan
        return x_T.index_select(0, plan.token_C)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad_C,), plan = grads, ctx.plan
        grad_T = grad_C.index_select(0, plan.cell_T)
        return grad_T.index_add_(0, plan.token_C[plan.shared_S], grad_C[plan.shared_S]), None


class _Unpad(torch.autograd.Function):
    """Cells to tokens; padding cells are dropped, so their gradient is zero."""

    @staticmethod
    def forward(ctx: Any, x_C: Tensor, plan: PaddedPlan) -> Tensor:
        ctx.num_cells, ctx.cell_T = len(plan.token_C), plan.cell_T
        return x_C.index_select(0, plan.cell_T)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad_T,) = grads
        grad_C = grad_T.new_zeros(ctx.num_cells, *grad_T.shape[1:])
        return grad_C.index_copy_(0, ctx.cell_T, grad_T), None
