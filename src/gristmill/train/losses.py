"""Losses, chunked over the vocabulary: pure functions on tensors that return a sum and a count, or one value a pair; the loop divides.

Shape legend: R rows (hidden states that predict a trained target), D hidden size, V vocabulary, C rows of a
chunk, S rows of a slice of it, P preference pairs, N rated samples, E hidden size of a teacher, K its tokens that are known.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gristmill.core.errors import InputError
from gristmill.model import fused
from gristmill.model.flops import CHUNK_LOGITS, MIN_CHUNK_ROWS
from gristmill.model.kernels import library as kernels
from gristmill.model.transformer import soft_cap
from gristmill.parallel.context import LossRows
from gristmill.parallel.tensor import VocabularyShard
from gristmill.train.batches import IGNORE_LABEL

# The softmax is made for a slice of the chunk, on a GPU of 256 MiB, to launch less.
GPU_SLICE_LOGITS = 2**26
# Values over the vocabulary that token_logprobs may keep for its backward pass, not making them again (32 MiB). Logits of a single chunk
# are always kept where compiled kernels need no others: the loss holds as much in any case.
KEPT_LOGITS = 2**23
# Rows are padded to a multiple of this (or of a chunk's rows): see ``packed.filled_length``. In fp32 on a CPU no code is made for a
# shape, and each row of a product with so many weights costs more than that of a smaller one.
ROW_STEP = 128
UNPADDED_WEIGHTS = 2**24
# Rows of logits get a gap behind them where the next would begin a multiple of 512 bytes later: of such rows a processor's cache holds few.
CACHE_STEP, ROW_GAP = 128, 64

PREFERENCE_LOSSES = ("dpo", "cdpo", "ipo", "rpo_bwd_kl", "rpo_fwd_kl", "rpo_sq")
OutputMatrix = Tensor | VocabularyShard | LossRows  # the whole, or what several processes have
_ALIASES = {"rpo": "rpo_bwd_kl"}


def _chunk_rows(vocab_size: int) -> int:
    return max(MIN_CHUNK_ROWS, CHUNK_LOGITS // vocab_size)


def _width(weight_VD: Tensor, shard: VocabularyShard | None) -> int:
    """Logits of a row, as many on all processes that share the vocabulary: they exchange something for each chunk."""
    return len(weight_VD) if shard is None else shard.num_rows


def _logits(hidden_CD: Tensor, weight_VD: Tensor) -> Tensor:
    """hidden @ weight.T, which its gradient may replace."""
    if hidden_CD.device.type != "cpu" or hidden_CD.dtype != torch.float32 or len(weight_VD) % CACHE_STEP:
        return hidden_CD @ weight_VD.T
    logits_CV = hidden_CD.new_empty(len(hidden_CD), len(weight_VD) + ROW_GAP)[:, : len(weight_VD)]
    return torch.mm(hidden_CD, weight_VD.T, out=logits_CV)


def _slices(num_rows: int, step: int) -> Iterator[slice]:
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


def _softmax_slices(logits_CV: Tensor) -> Iterator[slice]:
    limit = GPU_SLICE_LOGITS if logits_CV.is_cuda else CHUNK_LOGITS
    return _slices(len(logits_CV), max(1, limit // logits_CV.shape[1]))


def _log_softmax(logits_SV: Tensor, cap: float | None, statistics_S2: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Of the logits, in fp32 whatever the matmul's dtype: bf16 has 8 bits, a vocabulary needs more.

    With a cap also the slope of the capped logits: (cap tanh(x / cap))' = 1 - tanh(x / cap)^2.

    Args:
        statistics_S2: of the softmax over the whole vocabulary, of which there is a part.
    """
    if cap is None and statistics_S2 is None:
        return torch.log_softmax(logits_SV, dim=-1, dtype=torch.float32), None
    capped_SV = soft_cap(logits_SV.float(), cap)
    slope_SV = None if cap is None else 1 - (capped_SV / cap).square_()
    if statistics_S2 is None:
        return torch.log_softmax(capped_SV, dim=-1), slope_SV
    return capped_SV - statistics_S2[:, :1] - statistics_S2[:, 1:], slope_SV


def _statistics(logits_CV: Tensor, cap: float | None) -> Tensor:
    """The largest logit of each row, and the logarithm of the sum of exp(logit - largest), [C, 2] in fp32."""
    found = []
    for rows in _softmax_slices(logits_CV):
        capped_SV = soft_cap(logits_CV[rows].float(), cap)
        largest_S = capped_SV.amax(-1)
        found.append(torch.stack([largest_S, (capped_SV - largest_S[:, None]).exp_().sum(-1).log_()], 1))
    return torch.cat(found)


def _add_products(
    grad_CV: Tensor,
    weight_VD: Tensor,
    hidden_CD: Tensor,
    grad_hidden_CD: Tensor | None,
    grad_weight_VD: Tensor | None,
    *,
    into: Tensor | None = None,
) -> None:
    """From the gradient of a chunk's logits, that of its states; it is added to that of the weight, or to the one of `into`."""
    if grad_hidden_CD is not None:
        torch.mm(grad_CV, weight_VD, out=grad_hidden_CD)
    if grad_weight_VD is not None:
        fused.add_product(grad_weight_VD, grad_CV, hidden_CD)
    if into is not None:
        fused.add_gradient(into, grad_CV, hidden_CD)


def _target_logprobs(logits_CV: Tensor, statistics_C2: Tensor, targets_C1: Tensor) -> Tensor:
    """Log-probability of each row's target."""
    return logits_CV.gather(1, targets_C1)[:, 0].float() - statistics_C2[:, 0] - statistics_C2[:, 1]


def _sharded_logprobs(
    logits_CV: Tensor, statistics_C2: Tensor, targets_C1: Tensor, cap: float | None, shard: VocabularyShard
) -> tuple[Tensor, Tensor]:
    """The same of logits that are cut over processes, and the statistics over all logits."""
    own_C1 = soft_cap(logits_CV.gather(1, targets_C1.clamp(min=0)).float(), cap).masked_fill(targets_C1 < 0, 0.0)
    statistics_C2, logits_C = shard.combined(statistics_C2, own_C1)
    return logits_C - statistics_C2[:, 0] - statistics_C2[:, 1], statistics_C2


def _add_onehot(grad_SV: Tensor, targets_S1: Tensor, values_S1: Tensor) -> Tensor:
    """Add a number to the target of each row, in place; targets below zero are elsewhere."""
    return grad_SV.scatter_add_(1, targets_S1.clamp(min=0), values_S1.masked_fill(targets_S1 < 0, 0.0))


class _ChunkGradients:
    """Gradients of a sum over rows of logits, made in the forward pass, chunk by chunk.

    The logits of one chunk are freed before the next is made, and none is computed twice.

    Where the weight's gradient is added in place, that of the last chunk's logits waits for the backward pass: nothing as large as
    the weight lies in between.

    Args:
        into_VD: the weight, if its gradient is added in place.
        step: rows of a chunk.
        of_weight: whether the weight gets a gradient.
    """

    def __init__(
        self, hidden_RD: Tensor, weight_VD: Tensor, into_VD: Tensor | None, step: int, *, need_grad: bool, of_weight: bool
    ) -> None:
        self._hidden_RD, self._weight_VD, self._into_VD = hidden_RD, weight_VD, into_VD
        self.grad_hidden_RD = torch.empty_like(hidden_RD) if need_grad else None
        single = 0 < len(hidden_RD) <= step
        has_sum = need_grad and (not single if into_VD is not None else of_weight)
        self._grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if has_sum else None
        self._last: tuple[Tensor, ...] = ()

    def add(self, chunk: slice, grad_CV: Tensor) -> None:
        """From the gradient of a chunk's logits."""
        if self.grad_hidden_RD is None:
            return
        hidden_CD, waits = self._hidden_RD[chunk], self._into_VD is not None and chunk.stop == len(self._hidden_RD)
        _add_products(grad_CV, self._weight_VD, hidden_CD, self.grad_hidden_RD[chunk], None if waits else self._grad_weight_VD)
        self._last = (grad_CV, hidden_CD) if waits else ()

    def save(self, ctx: Any) -> None:
        """For `backward`."""
        ctx.save_for_backward(self.grad_hidden_RD, self._grad_weight_VD, *self._last)
        ctx.into_VD, ctx.weight_dtype = self._into_VD, self._weight_VD.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gradients of the states, and of the weight where it is not added in place."""
        grad_hidden_RD, grad_weight_VD, *last = ctx.saved_tensors
        grad_hidden_RD = grad_hidden_RD * grad.to(grad_hidden_RD.dtype)
        if (into_VD := ctx.into_VD) is None:
            if grad_weight_VD is not None:
                grad_weight_VD = grad_weight_VD.mul_(grad).to(ctx.weight_dtype)  # in place: a second backward pass is an error
            return grad_hidden_RD, grad_weight_VD
        if grad_weight_VD is not None and into_VD.grad is not None:
            fused.dense_gradient(into_VD).add_(grad_weight_VD, alpha=float(grad))
        elif grad_weight_VD is not None:
            into_VD.grad = grad_weight_VD.mul_(grad)
        if last:
            fused.add_gradient(into_VD, *last, factor=float(grad))
        return grad_hidden_RD, None


class _CrossEntropySum(torch.autograd.Function):
    """Sum of -log softmax(hidden @ weight.T)[target] over the first ``num_rows`` rows, with `_ChunkGradients`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_RD: Tensor,
        weight_VD: Tensor,
        into_VD: Tensor | None,
        targets_R: Tensor,
        num_rows: int,
        need_grad: bool,
        shard: VocabularyShard | None,
        cap: float | None,
    ) -> Tensor:
        total = hidden_RD.new_zeros((), dtype=torch.float32)
        step = _chunk_rows(_width(weight_VD, shard))
        gradients = _ChunkGradients(hidden_RD, weight_VD, into_VD, step, need_grad=need_grad, of_weight=ctx.needs_input_grad[1])
        for chunk in _slices(len(hidden_RD), step):
            targets_C1 = targets_R[chunk, None]
            num_real = max(0, num_rows - chunk.start)  # those behind are padding
            logits_CV = _logits(hidden_RD[chunk], weight_VD)  # the gradient takes their place
            statistics_C2 = fused.softmax_statistics(logits_CV) if cap is None else None
            compiled = statistics_C2 is not None
            if shard is not None:
                statistics_C2 = _statistics(logits_CV, cap) if statistics_C2 is None else statistics_C2
                logp_C, statistics_C2 = _sharded_logprobs(logits_CV, statistics_C2, targets_C1, cap, shard)
                total -= logp_C[:num_real].sum()
            elif statistics_C2 is not None:
                total -= _target_logprobs(logits_CV, statistics_C2, targets_C1)[:num_real].sum()
            if compiled and need_grad:
                assert statistics_C2 is not None
                real_C = (torch.arange(len(logits_CV)) < num_real).float()
                fused.softmax_gradient(logits_CV, statistics_C2, targets_C1, real_C, out_RV=logits_CV)
            for rows in _softmax_slices(logits_CV) if not compiled else ():
                logp_SV, slope_SV = _log_softmax(logits_CV[rows], cap, None if statistics_C2 is None else statistics_C2[rows])
                targets_S1, real = targets_C1[rows], max(0, num_real - rows.start)
                if shard is None:
                    total -= logp_SV.gather(1, targets_S1)[:real].sum()
                if need_grad:
                    # d loss / d logits = softmax - onehot
                    grad_SV = logp_SV.exp_()
                    _add_onehot(grad_SV, targets_S1, grad_SV.new_full(targets_S1.shape, -1.0))
                    grad_SV[real:] = 0.0
                    logits_CV[rows] = grad_SV if slope_SV is None else grad_SV.mul_(slope_SV)
            gradients.add(chunk, logits_CV)
        if shard is not None and gradients.grad_hidden_RD is not None:
            gradients.grad_hidden_RD = shard.group.sum(gradients.grad_hidden_RD)
        gradients.save(ctx)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *_ChunkGradients.backward(ctx, grads[0]), *(None,) * 6


class _TokenLogprobs(torch.autograd.Function):
    """log softmax(hidden @ weight.T)[target] of every row. The backward pass makes the chunks' logits again.

    The rows' gradients are not known in the forward pass, so it cannot make the gradient there. Up to
    KEPT_LOGITS values are kept instead, or the logits of a single chunk, which saves a matmul.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_RD: Tensor,
        weight_VD: Tensor,
        into_VD: Tensor | None,
        targets_R: Tensor,
        need_grad: bool,
        shard: VocabularyShard | None,
        cap: float | None,
    ) -> Tensor:
        logp_R = hidden_RD.new_empty(len(hidden_RD), dtype=torch.float32)
        few = len(hidden_RD) * len(weight_VD) <= KEPT_LOGITS
        single = len(hidden_RD) <= _chunk_rows(_width(weight_VD, shard)) and kernels.library_for(hidden_RD) is not None
        kept = need_grad and (few or single) and cap is None
        slices: list[Tensor] = []  # of log-softmax values; or, of each chunk, its logits and their statistics
        # a part of the vocabulary does not tell the softmax over all of it, so that its statistics are kept
        statistics_R2 = None if shard is None else hidden_RD.new_empty(len(hidden_RD), 2, dtype=torch.float32)
        for chunk in _slices(len(hidden_RD), _chunk_rows(_width(weight_VD, shard))):
            logits_CV = _logits(hidden_RD[chunk], weight_VD)
            statistics_C2 = fused.softmax_statistics(logits_CV) if cap is None else None
            compiled = statistics_C2 is not None
            if shard is not None and statistics_R2 is not None:
                statistics_C2 = _statistics(logits_CV, cap) if statistics_C2 is None else statistics_C2
                logp_R[chunk], statistics_C2 = _sharded_logprobs(logits_CV, statistics_C2, targets_R[chunk, None], cap, shard)
                statistics_R2[chunk] = statistics_C2
            elif statistics_C2 is not None:
                logp_R[chunk] = _target_logprobs(logits_CV, statistics_C2, targets_R[chunk, None])
            if compiled and statistics_C2 is not None:
                slices += [logits_CV, statistics_C2] if kept else []
                continue
            for rows in _softmax_slices(logits_CV) if kept or shard is None else ():
                logp_SV, _ = _log_softmax(logits_CV[rows], cap, None if statistics_C2 is None else statistics_C2[rows])
                if shard is None:
                    logp_R[chunk][rows] = logp_SV.gather(1, targets_R[chunk][rows, None])[:, 0]
                if kept:
                    slices.append(logp_SV)
        if need_grad:
            ctx.save_for_backward(hidden_RD, weight_VD, targets_R, statistics_R2, *slices)
            ctx.into_VD = into_VD
            ctx.cap, ctx.shard = cap, shard
        return logp_R

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_R: Tensor) -> tuple[Tensor | None, ...]:
        hidden_RD, weight_VD, targets_R, statistics_R2, *slices = ctx.saved_tensors
        kept = iter(slices)
        grad_hidden_RD = torch.empty_like(hidden_RD)
        into = ctx.into_VD
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if ctx.needs_input_grad[1] and into is None else None
        for chunk in _slices(len(hidden_RD), _chunk_rows(_width(weight_VD, ctx.shard))):
            hidden_CD, grad_C1, targets_C1 = hidden_RD[chunk], grad_R[chunk, None], targets_R[chunk, None]
            if ctx.cap is None and kernels.library_for(hidden_RD) is not None:
                logits_CV = next(kept) if slices else _logits(hidden_CD, weight_VD)
                statistics_C2 = next(kept) if slices else statistics_R2
                if not slices:
                    statistics_C2 = fused.softmax_statistics(logits_CV) if statistics_R2 is None else statistics_R2[chunk]
                assert statistics_C2 is not None
                # in place: a second backward pass is an error
                fused.softmax_gradient(logits_CV, statistics_C2, targets_C1, -grad_C1, out_RV=logits_CV)
                _add_products(logits_CV, weight_VD, hidden_CD, grad_hidden_RD[chunk], grad_weight_VD, into=into)
                continue
            logits_CV = hidden_CD.new_empty(len(hidden_CD), len(weight_VD)) if slices else _logits(hidden_CD, weight_VD)
            for rows in _softmax_slices(logits_CV):
                over_all = None if statistics_R2 is None else statistics_R2[chunk][rows]
                logp_SV, slope_SV = (next(kept), None) if slices else _log_softmax(logits_CV[rows], ctx.cap, over_all)
                prob_SV = logp_SV.exp() if slices else logp_SV.exp_()
                grad_SV = _add_onehot(prob_SV.mul_(-grad_C1[rows]), targets_C1[rows], grad_C1[rows])
                logits_CV[rows] = grad_SV if slope_SV is None else grad_SV.mul_(slope_SV)
            _add_products(logits_CV, weight_VD, hidden_CD, grad_hidden_RD[chunk], grad_weight_VD, into=into)
        if ctx.shard is not None:
            grad_hidden_RD = ctx.shard.group.sum(grad_hidden_RD)
        if grad_weight_VD is None:
            return grad_hidden_RD, None, None, None, None, None, None
        return grad_hidden_RD, grad_weight_VD.to(weight_VD.dtype), None, None, None, None, None


def _prepare(
    hidden_RD: Tensor, weight: Tensor | VocabularyShard, targets_R: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, bool, VocabularyShard | None]:
    """As `_padded`; the targets, padded too; whether a gradient is due; and the shard, if the weight is one: its targets are numbers of own
    rows then.
    """
    shard = weight if isinstance(weight, VocabularyShard) else None
    weight_VD = weight.weight_VD if isinstance(weight, VocabularyShard) else weight
    if shard is not None:
        targets_R = shard.targets(targets_R)
    padded_RD, used_VD, into_VD = _padded(hidden_RD, weight_VD, _width(weight_VD, shard))
    need_grad = _needs_grad(hidden_RD, weight_VD)
    return padded_RD, used_VD, into_VD, F.pad(targets_R, (0, len(padded_RD) - len(targets_R))), need_grad, shard


def _needs_grad(hidden_RD: Tensor, weight_VD: Tensor) -> bool:
    return torch.is_grad_enabled() and (hidden_RD.requires_grad or weight_VD.requires_grad)


def _padded(hidden_RD: Tensor, weight_VD: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows padded to ROW_STEP; the weight in the states' type; and the weight itself if its gradient is to be added in place."""
    num_weights = weight_VD.shape[1] * width
    on_cpu, dtype = hidden_RD.device.type == "cpu", hidden_RD.dtype
    unpadded = on_cpu and dtype == torch.float32 and num_weights >= UNPADDED_WEIGHTS
    num_extra = 0 if unpadded else -len(hidden_RD) % min(ROW_STEP, _chunk_rows(width))
    in_place = fused.accumulates(weight_VD) and (on_cpu or weight_VD.dtype == dtype)
    used_VD = fused.working_copy(weight_VD, dtype) if in_place else weight_VD.to(dtype)
    return F.pad(hidden_RD, (0, 0, 0, num_extra)), used_VD, weight_VD if in_place else None


def cross_entropy_sum(hidden_RD: Tensor, weight_VD: OutputMatrix, targets_R: Tensor, *, cap: float | None = None) -> tuple[Tensor, int]:
    """Next-token loss: (sum over rows of -log softmax(hidden @ weight.T)[target], number of rows). `cap`: soft cap of logits.

    With a shard of the weight, the same on all processes of its group, and so is the gradient of the states.

    Holds the logits of ``MIN_CHUNK_ROWS`` rows (more where that is still within ``CHUNK_LOGITS``), however many rows there are. Select
    the rows that predict a trained target beforehand. No rows give a sum of 0 with a zero gradient.
    """
    num_rows = len(targets_R)
    if isinstance(weight_VD, LossRows):
        own_RD, own_R = weight_VD.own(hidden_RD, targets_R)
        total, _ = cross_entropy_sum(own_RD, weight_VD.weight, own_R, cap=cap)
        return weight_VD.sum(total), num_rows
    *tensors, need_grad, shard = _prepare(hidden_RD, weight_VD, targets_R)
    return _CrossEntropySum.apply(*tensors, num_rows, need_grad, shard, cap), num_rows


def token_logprobs(hidden_RD: Tensor, weight_VD: OutputMatrix, targets_R: Tensor, *, cap: float | None = None) -> Tensor:
    """log softmax(hidden @ weight.T)[target] of each row, (R,) in fp32, within the same memory bound. `cap`: soft cap of the logits."""
    num_rows = len(targets_R)
    if isinstance(weight_VD, LossRows):
        own_RD, own_R = weight_VD.own(hidden_RD, targets_R)
        return weight_VD.whole(token_logprobs(own_RD, weight_VD.weight, own_R, cap=cap), num_rows)
    return _TokenLogprobs.apply(*_prepare(hidden_RD, weight_VD, targets_R), cap)[:num_rows]


# KL(teacher || student) of each row of a chunk, from the student's logits and their soft cap. The gradient in the logits takes their place,
# if there shall be one. That of padding, whose states are zeros, reaches nothing.
_Teacher = Callable[[slice, Tensor, float | None, bool], Tensor]


class _KlSum(torch.autograd.Function):
    """Sum of KL(teacher || student) over the first ``num_rows`` rows, with `_ChunkGradients`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_RD: Tensor,
        weight_VD: Tensor,
        into_VD: Tensor | None,
        num_rows: int,
        need_grad: bool,
        cap: float | None,
        teacher: _Teacher,
    ) -> Tensor:
        total = hidden_RD.new_zeros((), dtype=torch.float32)
        step = _chunk_rows(len(weight_VD))
        gradients = _ChunkGradients(hidden_RD, weight_VD, into_VD, step, need_grad=need_grad, of_weight=ctx.needs_input_grad[1])
        for chunk in _slices(len(hidden_RD), step):
            logits_CV = _logits(hidden_RD[chunk], weight_VD)
            total += teacher(chunk, logits_CV, cap, need_grad)[: max(0, num_rows - chunk.start)].sum()
            gradients.add(chunk, logits_CV)
        gradients.save(ctx)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *_ChunkGradients.backward(ctx, grads[0]), *(None,) * 5


def _whole_teacher(
    teacher_RE: Tensor, teacher_VE: Tensor, teacher_cap: float | None, chunk: slice, logits_CV: Tensor, cap: float | None, keeps: bool
) -> Tensor:
    teacher_CV = _logits(teacher_RE[chunk], teacher_VE)
    if cap is None and teacher_cap is None and (kl_C := fused.kl_divergence(logits_CV, teacher_CV, keeps=keeps)) is not None:
        return kl_C
    kl = []
    for rows in _softmax_slices(logits_CV):
        (log_q_SV, slope_SV), (log_p_SV, _) = _log_softmax(logits_CV[rows], cap), _log_softmax(teacher_CV[rows], teacher_cap)
        p_SV = log_p_SV.exp()
        kl.append((p_SV * log_p_SV.sub_(log_q_SV)).sum(1))
        if keeps:  # d KL / d logits = q - p
            _keep_gradient(logits_CV[rows], log_q_SV.exp_().sub_(p_SV), slope_SV)
    return torch.cat(kl)


def _top_of_teacher(ids_RK: Tensor, logprobs_RK: Tensor, chunk: slice, logits_CV: Tensor, cap: float | None, keeps: bool) -> Tensor:
    """Over K tokens of a teacher, and all others as one. In the gradient the teacher's rest is spread as the student's is."""
    kl = []
    for rows in _softmax_slices(logits_CV):
        log_q_SV, slope_SV = _log_softmax(logits_CV[rows], cap)
        ids_SK, log_p_SK = ids_RK[chunk][rows], logprobs_RK[chunk][rows]
        p_SK, log_q_SK = log_p_SK.exp(), log_q_SV.gather(1, ids_SK)
        rest_S1 = (1 - p_SK.sum(1, keepdim=True)).clamp_(min=0) * (ids_SK.shape[1] < log_q_SV.shape[1])
        student_rest_S1 = log_q_SV.scatter(1, ids_SK, -math.inf).logsumexp(1, keepdim=True)
        ratio_S1 = torch.where(rest_S1 > 0, rest_S1.log() - student_rest_S1, -math.inf)  # log (p / q) of the rest
        of_rest_S1 = torch.where(rest_S1 > 0, rest_S1 * ratio_S1, 0.0)
        kl.append((p_SK * (log_p_SK - log_q_SK)).sum(1) + of_rest_S1[:, 0])
        if keeps:
            grad_SV = log_q_SV.exp() - log_q_SV.add_(ratio_S1).exp_()  # q - p, with p = rest * q / (q of the rest) outside
            _keep_gradient(logits_CV[rows], grad_SV.scatter_(1, ids_SK, log_q_SK.exp() - p_SK), slope_SV)
    return torch.cat(kl)


def _keep_gradient(logits_SV: Tensor, grad_SV: Tensor, slope_SV: Tensor | None) -> None:
    """Put the gradient of (capped) logits in their place."""
    logits_SV.copy_(grad_SV if slope_SV is None else grad_SV.mul_(slope_SV))


def kl_divergence_sum(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    teacher_RE: Tensor,
    teacher_VE: Tensor,
    *,
    cap: float | None = None,
    teacher_cap: float | None = None,
) -> Tensor:
    """Distillation loss: the sum over rows of KL(teacher || student) of the next token, nats.

    Both are given by their states and output matrices, whose widths D and E may differ; `cap` and `teacher_cap` are soft caps of logits.
    Only the student gets a gradient. Memory as of `cross_entropy_sum`, twice.
    """
    teacher_RE = teacher_RE.detach()
    padded_RD, *weights = _padded(hidden_RD, weight_VD, len(weight_VD))
    teacher = partial(_whole_teacher, _with_rows(teacher_RE, padded_RD), teacher_VE.detach().to(teacher_RE.dtype), teacher_cap)
    return _KlSum.apply(padded_RD, *weights, len(hidden_RD), _needs_grad(hidden_RD, weight_VD), cap, teacher)


def top_kl_divergence_sum(hidden_RD: Tensor, weight_VD: Tensor, ids_RK: Tensor, logprobs_RK: Tensor, *, cap: float | None = None) -> Tensor:
    """Distillation loss from a teacher's K largest log-probabilities: the sum over rows of KL(teacher || student), nats.

    All other tokens count as one, whose probability is what is left; so it is at most `kl_divergence_sum`, which it is where K is the
    vocabulary. Only the student gets a gradient.
    """
    padded_RD, *weights = _padded(hidden_RD, weight_VD, len(weight_VD))
    teacher = partial(_top_of_teacher, _with_rows(ids_RK, padded_RD), _with_rows(logprobs_RK, padded_RD))
    return _KlSum.apply(padded_RD, *weights, len(hidden_RD), _needs_grad(hidden_RD, weight_VD), cap, teacher)


def _with_rows(x_RX: Tensor, padded_RD: Tensor) -> Tensor:
    """With as many rows as these have, zeros behind its own."""
    return F.pad(x_RX, (0, 0, 0, len(padded_RD) - len(x_RX)))


def masked_mse(scores_N5: Tensor, labels_N5: Tensor) -> tuple[Tensor, Tensor]:
    """Attribute regression: (sum of squared errors over present labels, their number).

    A label of -100 is missing and contributes to neither. Source: HelpSteer2 (2406.08673), section 3.
    """
    present_N5 = labels_N5 != IGNORE_LABEL
    error_N5 = torch.where(present_N5, scores_N5.float() - labels_N5, 0.0)
    return error_N5.square().sum(), present_N5.sum()


def masked_bce(logits_NC: Tensor, labels_NC: Tensor) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy: (sum of -y log s(z) - (1 - y) log s(-z) over present labels, their number).

    A label of -100 is missing and contributes to neither.
    """
    present_NC = labels_NC != IGNORE_LABEL
    targets_NC = torch.where(present_NC, labels_NC, 0.0)
    losses_NC = torch.nn.functional.binary_cross_entropy_with_logits(logits_NC.float(), targets_NC, reduction="none")
    return torch.where(present_NC, losses_NC, 0.0).sum(), present_NC.sum()


def preference_name(name: str) -> str:
    """The canonical name of a preference loss ("rpo" is the report's "rpo_bwd_kl"); InputError for an
    unknown one.
    """
    name = _ALIASES.get(name, name)
    if name not in PREFERENCE_LOSSES:
        raise InputError(f"unknown preference loss {name!r}; choose one of {', '.join(PREFERENCE_LOSSES)}")
    return name


def preference_loss(
    name: str,
    margin_P: Tensor,
    reward_gap_P: Tensor,
    *,
    beta: float,
    eta: float = 1.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Loss of each pair, (P,), without the SFT term. Give margins in fp32 or better.

    With d the margin [log pi(yc) - log ref(yc)] - [log pi(yl) - log ref(yl)], g = eta (r*(yc) - r*(yl)) and
    s the sigmoid:

        dpo         -log s(beta d)
        cdpo        -(1 - e) log s(beta d) - e log s(-beta d)          e = label_smoothing
        ipo         (d - 1 / (2 beta))^2
        rpo_bwd_kl  KL(Bern(s(g)) || Bern(s(beta d)))                  the report's
        rpo_fwd_kl  KL(Bern(s(beta d)) || Bern(s(g)))
        rpo_sq      (beta d - g)^2

    Everything is made of log-sigmoids and so stays finite at |beta d|, |g| of 100 and beyond.
    Source: Nemotron-4 340B report, section 3.3.2; the names are NeMo-Aligner's.
    """
    name = preference_name(name)
    logit_P, target_P = beta * margin_P, eta * reward_gap_P
    if name == "dpo":
        return -F.logsigmoid(logit_P)
    if name == "cdpo":
        return -(1 - label_smoothing) * F.logsigmoid(logit_P) - label_smoothing * F.logsigmoid(-logit_P)
    if name == "ipo":
        return (margin_P - 1 / (2 * beta)).square()
    if name == "rpo_bwd_kl":
        return bernoulli_kl(target_P, logit_P)
    if name == "rpo_fwd_kl":
        return bernoulli_kl(logit_P, target_P)
    return (logit_P - target_P).square()


def bernoulli_kl(p_logit: Tensor, q_logit: Tensor) -> Tensor:
    """KL(Bern(sigmoid(p_logit)) || Bern(sigmoid(q_logit))), element by element."""
    return torch.sigmoid(p_logit) * (F.logsigmoid(p_logit) - F.logsigmoid(q_logit)) + torch.sigmoid(-p_logit) * (
        F.logsigmoid(-p_logit) - F.logsigmoid(-q_logit)
    )
