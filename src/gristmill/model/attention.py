"""Causal attention inside each document of a packed, token-major batch.

Shapes: T tokens of all documents one after the other, N documents, H query heads, K key-value heads,
d head_dim, C cells of all padded views together, B documents of one padded view, L its length.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# A padded view closes when its next document would leave more than this share of its row empty.
MAX_EMPTY_SHARE = 0.25
# Documents of this many tokens or more keep the bf16 kernels on a CPU busy without others beside them.
LONG_DOCUMENT = 96
# Queries that go through their backward pass together.
STRETCH = 192


@dataclass(frozen=True, eq=False)
class PaddedPlan:
    """How packed documents become padded views of similar length, one after the other in C cells, and back.

    token_C: the token of each cell. Cells past a document's end repeat its last token: causal attention
    hides them from all real tokens, and their own outputs are never read. cell_T: the cell of each token.
    views: (B, L) of each view, B * L cells each.
    """

    token_C: Tensor
    cell_T: Tensor
    views: list[tuple[int, int]]


@dataclass(frozen=True, eq=False)
class View:
    """Documents that go through attention together, as B rows of L cells.

    cells: where a single document (B = 1) lies among the tokens, which needs no copy; otherwise the token of each cell, as in
    `PaddedPlan`. real_R: the cells that hold a document's own tokens; empty_E: all others.
    """

    num_rows: int
    length: int
    cells: slice | Tensor
    real_R: Tensor
    empty_E: Tensor

    def take(self, x_TXd: Tensor, *, clear: bool = False) -> Tensor:
        """The cells [B, X, L, d] of tokens [T, X, d]; with ``clear``, zero where no document has a token."""
        if isinstance(self.cells, slice):
            part = x_TXd[self.cells]
        else:
            part = x_TXd.index_select(0, self.cells)
            if clear:
                part.index_fill_(0, self.empty_E, 0.0)
        return part.unflatten(0, (self.num_rows, self.length)).transpose(1, 2)

    def put(self, x_BXLd: Tensor, into_TXd: Tensor) -> None:
        """Write cells to their tokens, in the type of those."""
        part = x_BXLd.transpose(1, 2).flatten(0, 1)
        if isinstance(self.cells, slice):
            into_TXd[self.cells] = part
        else:
            into_TXd[self.cells[self.real_R]] = part[self.real_R].to(into_TXd.dtype)


@dataclass(frozen=True, eq=False)
class PackedShape:
    """Where documents begin and end in a packed batch.

    cu_seqlens: int32 [N + 1], starts of the documents and, last, T. positions_T: int64, from 0 in each.
    What a backend derives from them is computed on first use and kept, so all layers share it.
    """

    cu_seqlens: Tensor
    lengths: list[int]
    positions_T: Tensor

    @staticmethod
    def from_lengths(lengths: Sequence[int], device: torch.device | str = "cpu") -> "PackedShape":
        """The shape of documents with these lengths (each at least 1), in this order."""
        sizes = [int(length) for length in lengths]
        assert sizes and min(sizes) > 0, "a packed batch holds documents of at least one token"
        lengths_N = torch.tensor(sizes)
        ends_N = lengths_N.cumsum(0)
        starts_T = torch.repeat_interleave(ends_N - lengths_N, lengths_N)
        positions_T = torch.arange(len(starts_T)) - starts_T
        cu_seqlens = F.pad(ends_N, (1, 0)).to(torch.int32)
        return PackedShape(cu_seqlens.to(device), sizes, positions_T.to(device))

    @property
    def num_tokens(self) -> int:
        return self.positions_T.shape[0]

    @cached_property
    def max_length(self) -> int:
        return max(self.lengths)

    @cached_property
    def padded_plan(self) -> PaddedPlan:
        lengths_N = torch.tensor(self.lengths)
        starts_N = lengths_N.cumsum(0) - lengths_N
        order_N = torch.argsort(lengths_N, descending=True, stable=True)
        token_C, cell_T, views = [], torch.empty(self.num_tokens, dtype=torch.int64), []
        num_cells = begin = 0
        while begin < len(order_N):
            longest = int(lengths_N[order_N[begin]])
            num_fit = int((lengths_N[order_N[begin:]] >= longest * (1 - MAX_EMPTY_SHARE)).sum())
            documents_B = order_N[begin : begin + num_fit]
            position_L, last_B1 = torch.arange(longest), lengths_N[documents_B][:, None] - 1
            token_BL = starts_N[documents_B][:, None] + torch.minimum(position_L, last_B1)
            real_BL = position_L <= last_B1
            cell_BL = torch.arange(num_cells, num_cells + token_BL.numel()).view_as(token_BL)
            cell_T[token_BL[real_BL]] = cell_BL[real_BL]
            token_C.append(token_BL.flatten())
            views.append((num_fit, longest))
            num_cells += token_BL.numel()
            begin += num_fit
        device = self.positions_T.device
        return PaddedPlan(torch.cat(token_C).to(device), cell_T.to(device), views)

    @cached_property
    def views(self) -> list[View]:
        """Every long document alone, the others in padded views."""
        starts = [0, *torch.tensor(self.lengths).cumsum(0).tolist()]
        none = torch.empty(0, dtype=torch.int64)
        views = [
            View(1, length, slice(start, start + length), none, none)
            for start, length in zip(starts, self.lengths, strict=False)
            if length >= LONG_DOCUMENT
        ]
        short = [number for number, length in enumerate(self.lengths) if length < LONG_DOCUMENT]
        if not short:
            return views
        # The plan of the short documents alone, as if they were all, and then their tokens' places in the whole batch.
        plan = PackedShape.from_lengths([self.lengths[number] for number in short]).padded_plan
        place_S = torch.cat([torch.arange(starts[number], starts[number + 1]) for number in short])
        is_real_C = torch.zeros(len(plan.token_C), dtype=torch.bool).index_fill_(0, plan.cell_T, True)
        sizes = [B * L for B, L in plan.views]
        for (B, L), token_C, real_C in zip(plan.views, plan.token_C.split(sizes), is_real_C.split(sizes), strict=True):
            views.append(View(B, L, place_S[token_C], real_C.nonzero()[:, 0], (~real_C).nonzero()[:, 0]))
        return views


def varlen_attention(q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, shape: PackedShape) -> Tensor:
    """Causal grouped-query attention within each document, scale 1/sqrt(d).

    Returns [T, H, d] in the type of q_THd.
    """
    if q_THd.is_cuda and q_THd.dtype in (torch.bfloat16, torch.float16):
        from torch.nn.attention.varlen import varlen_attn

        # A window that reaches all the way back but not ahead is plain causal attention.
        ends, longest = (shape.cu_seqlens,) * 2, (shape.max_length,) * 2
        out = varlen_attn(q_THd, k_TKd, v_TKd, *ends, *longest, window_size=(-1, 0), enable_gqa=True)
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
            cells = (view.take(x) for x in (q_THd, k_TKd, v_TKd))
            out_BHLd, sum_BHL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*cells, 0.0, True)
            view.put(out_BHLd, out_THd)
            sums.append(sum_BHL)
        ctx.save_for_backward(q_THd, k_TKd, v_TKd, out_THd, *sums)
        ctx.views = views
        return out_THd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q_THd, k_TKd, v_TKd, out_THd, *sums = ctx.saved_tensors
        grads_T = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_THd, k_TKd, v_TKd)]
        for view, sum_BHL in zip(ctx.views, sums, strict=True):
            q_BHLd, k_BKLd, v_BKLd, out_BHLd = (view.take(x).float() for x in (q_THd, k_TKd, v_TKd, out_THd))
            grad_BHLd = view.take(grads[0], clear=True).float()
            parts = _backward_in_stretches(grad_BHLd, q_BHLd, k_BKLd, v_BKLd, out_BHLd, sum_BHL)
            for part, into in zip(parts, grads_T, strict=True):
                view.put(part, into)
        return *grads_T, None


def _backward_in_stretches(
    grad_BHLd: Tensor, q_BHLd: Tensor, k_BKLd: Tensor, v_BKLd: Tensor, out_BHLd: Tensor, sum_BHL: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of queries, keys and values, one stretch of queries after another.

    The kernel also computes what causality hides, so each stretch sees its own keys causally and the earlier ones in full.
    """
    totals = tuple(torch.zeros_like(x) for x in (q_BHLd, k_BKLd, v_BKLd))
    length = q_BHLd.shape[2]
    for start in range(0, length, STRETCH):
        own = slice(start, start + STRETCH)
        for keys, is_causal in ((own, True), (slice(0, start), False)):
            if keys.stop == 0:
                continue
            parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *(x[:, :, own] for x in (grad_BHLd, q_BHLd)),
                *(x[:, :, keys] for x in (k_BKLd, v_BKLd)),
                *(x[:, :, own] for x in (out_BHLd, sum_BHL)),
                0.0,
                is_causal,
            )
            for total, part, where in zip(totals, parts, (own, keys, keys), strict=True):
                total[:, :, where] += part
    return totals


def _padded_attention(q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, plan: PaddedPlan) -> Tensor:
    cells = [_Pad.apply(x, plan.token_C, plan.cell_T) for x in (q_THd, k_TKd, v_TKd)]
    q_views, k_views, v_views = (x.split([B * L for B, L in plan.views]) for x in cells)
    outputs = []
    for (B, L), *views in zip(plan.views, q_views, k_views, v_views, strict=True):
        q_BHLd, k_BKLd, v_BKLd = (x.unflatten(0, (B, L)).transpose(1, 2) for x in views)
        out_BHLd = F.scaled_dot_product_attention(q_BHLd, k_BKLd, v_BKLd, is_causal=True, enable_gqa=True)
        outputs.append(out_BHLd.transpose(1, 2).flatten(0, 1))
    return _Unpad.apply(torch.cat(outputs), plan.token_C, plan.cell_T)


class _Pad(torch.autograd.Function):
    """Tokens to cells. Padding cells receive no gradient, so the way back is a gather instead of a sum."""

    @staticmethod
    def forward(ctx: Any, x_T: Tensor, token_C: Tensor, cell_T: Tensor) -> Tensor:
        ctx.cell_T = cell_T
        return x_T.index_select(0, token_C)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].index_select(0, ctx.cell_T), None, None


class _Unpad(torch.autograd.Function):
    """Cells to tokens; padding cells are dropped, so their gradient is zero."""

    @staticmethod
    def forward(ctx: Any, x_C: Tensor, token_C: Tensor, cell_T: Tensor) -> Tensor:
        ctx.num_cells, ctx.cell_T = len(token_C), cell_T
        return x_C.index_select(0, cell_T)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad_T,) = grads
        grad_C = grad_T.new_zeros(ctx.num_cells, *grad_T.shape[1:])
        return grad_C.index_copy_(0, ctx.cell_T, grad_T), None, None
