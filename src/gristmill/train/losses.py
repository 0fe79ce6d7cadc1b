"""Losses, chunked over the vocabulary: pure functions on tensors that return a sum and a count, or one value a pair; the loop divides.

Shape legend: R rows (hidden states that predict a trained target), D hidden size, V vocabulary, C rows of a
chunk, P preference pairs, N rated samples.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gristmill.core.errors import InputError
from gristmill.train.batches import IGNORE_LABEL

# Logits alive at once: 8 MiB in fp32, which on a CPU is within a tenth of the fastest size for vocabularies
# of 1K to 32K. The memory of a loss does not depend on rows x vocabulary.
CHUNK_LOGITS = 2**21
# Log-softmax values that token_logprobs may keep for its backward pass, not making them again (32 MiB).
KEPT_LOGITS = 2**23
# Rows are padded to a multiple of this (or of a chunk's rows): see ``packed.filled_length``.
ROW_STEP = 128

PREFERENCE_LOSSES = ("dpo", "cdpo", "ipo", "rpo_bwd_kl", "rpo_fwd_kl", "rpo_sq")
_ALIASES = {"rpo": "rpo_bwd_kl"}


def _chunk_rows(vocab_size: int) -> int:
    return max(1, CHUNK_LOGITS // vocab_size)


def _chunks(num_rows: int, vocab_size: int) -> Iterator[slice]:
    rows = _chunk_rows(vocab_size)
    for start in range(0, num_rows, rows):
        yield slice(start, min(start + rows, num_rows))


def _log_softmax(hidden_CD: Tensor, weight_VD: Tensor) -> Tensor:
    """Of the logits, in fp32 whatever the matmul's dtype: bf16 has 8 bits, a vocabulary needs more."""
    return torch.log_softmax(hidden_CD @ weight_VD.T, dim=-1, dtype=torch.float32)


def _add_product(sum_VD: Tensor, left_CV: Tensor, right_CD: Tensor) -> None:
    """sum += left.T @ right, accumulated in fp32."""
    if left_CV.dtype == torch.float32:
        sum_VD.addmm_(left_CV.T, right_CD)
    else:
        sum_VD += left_CV.T @ right_CD


class _CrossEntropySum(torch.autograd.Function):
    """Sum of -log softmax(hidden @ weight.T)[target] over the first ``num_rows`` rows.

    The gradient is made in the forward pass, chunk by chunk: the logits of one are freed before the next is
    made, and none is computed twice.
    """

    @staticmethod
    def forward(ctx: Any, hidden_RD: Tensor, weight_VD: Tensor, targets_R: Tensor, num_rows: int, need_grad: bool) -> Tensor:
        total = hidden_RD.new_zeros((), dtype=torch.float32)
        grad_hidden_RD = torch.empty_like(hidden_RD) if need_grad else None
        need_weight = need_grad and ctx.needs_input_grad[1]  # it may be frozen
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if need_weight else None
        for chunk in _chunks(len(hidden_RD), len(weight_VD)):
            hidden_CD, targets_C1 = hidden_RD[chunk], targets_R[chunk, None]
            num_real = min(chunk.stop, num_rows) - chunk.start
            logp_CV = _log_softmax(hidden_CD, weight_VD)
            total -= logp_CV.gather(1, targets_C1)[:num_real].sum()
            if grad_hidden_RD is not None:
                # d loss / d logits = softmax - onehot
                grad_CV = logp_CV.exp_()
                grad_CV.scatter_add_(1, targets_C1, grad_CV.new_full(targets_C1.shape, -1.0))
                grad_CV[num_real:] = 0.0
                grad_CV = grad_CV.to(hidden_RD.dtype)
                torch.mm(grad_CV, weight_VD, out=grad_hidden_RD[chunk])
                if grad_weight_VD is not None:
                    _add_product(grad_weight_VD, grad_CV, hidden_CD)
        ctx.save_for_backward(grad_hidden_RD, grad_weight_VD)
        ctx.weight_dtype = weight_VD.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden_RD, grad_weight_VD = ctx.saved_tensors
        grad_weight_VD = None if grad_weight_VD is None else (grad_weight_VD * grad).to(ctx.weight_dtype)
        return grad_hidden_RD * grad.to(grad_hidden_RD.dtype), grad_weight_VD, None, None, None


class _TokenLogprobs(torch.autograd.Function):
    """log softmax(hidden @ weight.T)[target] of every row. The backward pass makes the chunks' logits again.

    The rows' gradients are not known in the forward pass, so it cannot make the gradient there. Up to
    KEPT_LOGITS values are kept instead, which saves a matmul.
    """

    @staticmethod
    def forward(ctx: Any, hidden_RD: Tensor, weight_VD: Tensor, targets_R: Tensor, need_grad: bool) -> Tensor:
        logp_R = hidden_RD.new_empty(len(hidden_RD), dtype=torch.float32)
        kept = need_grad and len(hidden_RD) * len(weight_VD) <= KEPT_LOGITS
        chunks: list[Tensor] = []
        for chunk in _chunks(len(hidden_RD), len(weight_VD)):
            logp_CV = _log_softmax(hidden_RD[chunk], weight_VD)
            logp_R[chunk] = logp_CV.gather(1, targets_R[chunk, None])[:, 0]
            if kept:
                chunks.append(logp_CV)
        if need_grad:
            ctx.save_for_backward(hidden_RD, weight_VD, targets_R, *chunks)
        return logp_R

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_R: Tensor) -> tuple[Tensor | None, ...]:
        hidden_RD, weight_VD, targets_R, *chunks = ctx.saved_tensors
        grad_hidden_RD = torch.empty_like(hidden_RD)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for number, chunk in enumerate(_chunks(len(hidden_RD), len(weight_VD))):
            hidden_CD, grad_C1 = hidden_RD[chunk], grad_R[chunk, None]
            prob_CV = chunks[number].exp() if chunks else _log_softmax(hidden_CD, weight_VD).exp_()
            grad_CV = prob_CV.mul_(-grad_C1).scatter_add_(1, targets_R[chunk, None], grad_C1)
            grad_CV = grad_CV.to(hidden_RD.dtype)
            torch.mm(grad_CV, weight_VD, out=grad_hidden_RD[chunk])
            if grad_weight_VD is not None:
                _add_product(grad_weight_VD, grad_CV, hidden_CD)
        return grad_hidden_RD, None if grad_weight_VD is None else grad_weight_VD.to(weight_VD.dtype), None, None


def _prepare(hidden_RD: Tensor, weight_VD: Tensor, targets_R: Tensor) -> tuple[Tensor, Tensor, Tensor, bool]:
    """Rows and targets padded to ROW_STEP, the weight in the states' dtype, and whether a gradient is due."""
    num_extra = -len(hidden_RD) % min(ROW_STEP, _chunk_rows(len(weight_VD)))
    need_grad = torch.is_grad_enabled() and (hidden_RD.requires_grad or weight_VD.requires_grad)
    padded_RD, padded_R = F.pad(hidden_RD, (0, 0, 0, num_extra)), F.pad(targets_R, (0, num_extra))
    return padded_RD, weight_VD.to(hidden_RD.dtype), padded_R, need_grad


def cross_entropy_sum(hidden_RD: Tensor, weight_VD: Tensor, targets_R: Tensor) -> tuple[Tensor, int]:
    """Next-token loss: (sum over rows of -log softmax(hidden @ weight.T)[target], number of rows).

    Never holds more than ``CHUNK_LOGITS`` logits (or those of one row). Select the rows that predict a
    trained target beforehand. No rows give a sum of 0 with a zero gradient.
    """
    num_rows = len(targets_R)
    hidden_RD, weight_VD, targets_R, need_grad = _prepare(hidden_RD, weight_VD, targets_R)
    return _CrossEntropySum.apply(hidden_RD, weight_VD, targets_R, num_rows, need_grad), num_rows


def token_logprobs(hidden_RD: Tensor, weight_VD: Tensor, targets_R: Tensor) -> Tensor:
    """log softmax(hidden @ weight.T)[target] of each row, (R,) in fp32, within the same memory bound."""
    num_rows = len(targets_R)
    hidden_RD, weight_VD, targets_R, need_grad = _prepare(hidden_RD, weight_VD, targets_R)
    return _TokenLogprobs.apply(hidden_RD, weight_VD, targets_R, need_grad)[:num_rows]


def masked_mse(scores_N5: Tensor, labels_N5: Tensor) -> tuple[Tensor, Tensor]:
    """Attribute regression: (sum of squared errors over present labels, their number).

    A label of -100 is missing and contributes to neither. Source: HelpSteer2 (2406.08673), section 3.
    """
    present_N5 = labels_N5 != IGNORE_LABEL
    error_N5 = torch.where(present_N5, scores_N5.float() - labels_N5, 0.0)
    return error_N5.square().sum(), present_N5.sum()


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
