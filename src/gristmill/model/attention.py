"""Variable-length causal attention: inside each document of a packed, token-major batch.

Shapes: T tokens of all documents one after the other, H query heads, K key-value heads, d head_dim, B documents of one view,
L its keys and Q its queries (see packed.py).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gristmill.model.packed import PackedShape, PaddedPlan, View

# Queries that go through their backward pass together.
QUERY_CHUNK = 192
# Queries whose mask is held at once.
MASKED_QUERY_CHUNK = 1024


def varlen_attention(q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, shape: PackedShape) -> Tensor:
    """Causal grouped-query attention inside each document, scale 1/sqrt(d).

    Returns [T, H, d] in the type of q_THd.
    """
    if q_THd.is_cuda and q_THd.dtype in (torch.bfloat16, torch.float16):
        from torch.nn.attention.varlen import varlen_attn

        if any(shape.shared):
            k_TKd, v_TKd = (x.index_select(0, shape.keys_S) for x in (k_TKd, v_TKd))
        # A window that reaches all the way back but not ahead is plain causal attention; the last query sees the last key.
        longest = (shape.max_length,) * 2
        out = varlen_attn(q_THd, k_TKd, v_TKd, shape.cu_seqlens, shape.cu_keys, *longest, window_size=(-1, 0), enable_gqa=True)
        assert isinstance(out, Tensor)  # a pair only where auxiliary outputs are asked for
        return out
    if q_THd.device.type == "cpu" and q_THd.dtype == torch.bfloat16:
        return _CpuBf16Attention.apply(q_THd, k_TKd, v_TKd, shape.views)
    return _padded_attention(q_THd, k_TKd, v_TKd, shape.padded_plan)


class _CpuBf16Attention(torch.autograd.Function):
    """The kernels that PyTorch itself chooses on a CPU, in bf16 forward and in fp32 backward.

    Against fp32, the forward kernel is three times faster in bf16, the backward kernel up to nine times slower (64 tokens).
    """

    @staticmethod
    def forward(ctx: Any, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, views: list[View]) -> Tensor:
        out_THd = torch.empty_like(q_THd, memory_format=torch.contiguous_format)
        sums = []
        for view in views:
            cells = view.queries.take(q_THd), view.keys.take(k_TKd), view.keys.take(v_TKd)
            out_BHQd, sum_BHQ = _forward_chunked(*cells, view.num_earlier)
            view.queries.put(out_BHQd, out_THd)
            sums.append(sum_BHQ)
        ctx.save_for_backward(q_THd, k_TKd, v_TKd, out_THd, *sums)
        ctx.views = views
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
            parts = _backward_chunked(grad_BHQd, q_BHQd, k_BKLd, v_BKLd, out_BHQd, sum_BHQ)
            for part, into, cells in zip(parts, grads_T, (view.queries, view.keys, view.keys), strict=True):
                cells.put(part, into)
        return *grads_T, None


def _forward_chunked(q_BHQd: Tensor, k_BKLd: Tensor, v_BKLd: Tensor, num_earlier: int) -> tuple[Tensor, Tensor]:
    """Outputs of queries that belong to the last keys, and the logarithms of their scores' sums.

    Where there are keys before, the kernel needs a mask, which is made for one chunk of queries at a time.
    """
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    if num_earlier == 0:
        return attend(q_BHQd, k_BKLd, v_BKLd, 0.0, True)
    outputs, sums = [], []
    for start in range(0, q_BHQd.shape[2], MASKED_QUERY_CHUNK):
        chunk_BHSd = q_BHQd[:, :, start : start + MASKED_QUERY_CHUNK]
        num_keys = num_earlier + start + chunk_BHSd.shape[2]
        hidden_SL = torch.ones(chunk_BHSd.shape[2], num_keys, dtype=torch.bool).triu(num_earlier + start + 1)
        mask_SL = torch.zeros(hidden_SL.shape, dtype=q_BHQd.dtype).masked_fill_(hidden_SL, -torch.inf)
        out, log_sum = attend(chunk_BHSd, k_BKLd[:, :, :num_keys], v_BKLd[:, :, :num_keys], 0.0, False, attn_mask=mask_SL)
        outputs.append(out)
        sums.append(log_sum)
    return torch.cat(outputs, 2), torch.cat(sums, 2)


def _backward_chunked(
    grad_BHQd: Tensor, q_BHQd: Tensor, k_BKLd: Tensor, v_BKLd: Tensor, out_BHQd: Tensor, sum_BHQ: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of queries, keys and values, one chunk of queries after another. The queries belong to the last keys.

    The kernel also computes what causality hides, so each chunk sees its own keys causally and the earlier ones in full.
    """
    totals = tuple(torch.zeros_like(x) for x in (q_BHQd, k_BKLd, v_BKLd))
    num_queries, num_keys = q_BHQd.shape[2], k_BKLd.shape[2]
    num_earlier = num_keys - num_queries
    for start in range(0, num_queries, QUERY_CHUNK):
        queries = slice(start, start + QUERY_CHUNK)
        for keys, is_causal in (
            (slice(num_earlier + start, num_earlier + start + QUERY_CHUNK), True),
            (slice(0, num_earlier + start), False),
        ):
            if keys.stop == 0:
                continue
            parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *(x[:, :, queries] for x in (grad_BHQd, q_BHQd)),
                *(x[:, :, keys] for x in (k_BKLd, v_BKLd)),
                *(x[:, :, queries] for x in (out_BHQd, sum_BHQ)),
                0.0,
                is_causal,
            )
            for total, part, where in zip(totals, parts, (queries, keys, keys), strict=True):
                total[:, :, where] += part
    return totals


def _padded_attention(q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, plan: PaddedPlan) -> Tensor:
    cells = [_Pad.apply(x, plan) for x in (q_THd, k_TKd, v_TKd)]
    q_views, k_views, v_views = (x.split([B * L for B, L in plan.views]) for x in cells)
    outputs = []
    for (B, L), *views in zip(plan.views, q_views, k_views, v_views, strict=True):
        q_BHLd, k_BKLd, v_BKLd = (x.unflatten(0, (B, L)).transpose(1, 2) for x in views)
        out_BHLd = F.scaled_dot_product_attention(q_BHLd, k_BKLd, v_BKLd, is_causal=True, enable_gqa=True)
        outputs.append(out_BHLd.transpose(1, 2).flatten(0, 1))
    return _Unpad.apply(torch.cat(outputs), plan)


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
