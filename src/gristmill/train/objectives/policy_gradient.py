"""Clipped policy gradients over groups of sampled answers: GRPO, DAPO, Dr.GRPO, GSPO, RLOO and CISPO, as switches of one loss.

Shape legend: see batches.py. Sources: 2402.03300 (GRPO), 2503.14476 (DAPO), 2503.20783 (Dr.GRPO), 2507.18071 (GSPO), 2402.14740 (RLOO),
2506.13585 (CISPO), 2506.09477 (the gradient of the KL term).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from gristmill.core.errors import InputError
from gristmill.model.transformer import Transformer
from gristmill.train.batches import Rollout, RolloutBatch, collate, documents_of, fills, group_answers, split_micro_batches
from gristmill.train.losses import token_logprobs
from gristmill.train.metrics import LossOutput
from gristmill.train.trainer import compute_precision

Advantage = Literal["std", "mean", "leave_one_out"]
Normalize = Literal["token", "sequence", "constant"]
Kl = Literal["k1", "k2", "k3"]
METHODS: dict[str, dict[str, Any]] = {
    "grpo": {"advantage": "std", "normalize": "sequence", "clip_low": 0.2, "clip_high": 0.2},
    "dapo": {"advantage": "std", "normalize": "token", "clip_low": 0.2, "clip_high": 0.28},
    "dr_grpo": {"advantage": "mean", "normalize": "constant", "clip_low": 0.2, "clip_high": 0.2},
    "gspo": {"advantage": "std", "normalize": "sequence", "clip_low": 3e-4, "clip_high": 4e-4, "ratio": "sequence"},
    "rloo": {"advantage": "leave_one_out", "normalize": "constant", "surrogate": "reinforce"},
    "cispo": {"advantage": "std", "normalize": "token", "clip_low": 1.0, "clip_high": 5.0, "surrogate": "cispo"},
}
# k3 is exp(l) - 1 - l: beyond these its gradient is noise that drowns all others
MAX_LOG_RATIO, MAX_KL = 20.0, 10.0


@dataclass(frozen=True)
class PolicyGradientObjective:
    """Minus the advantage-weighted likelihood of sampled tokens, in the terms of PPO's clipped surrogate, for ``Trainer.step``.

    Attributes:
        clip_low, clip_high: the ratio counts between 1 - clip_low and 1 + clip_high.
        ratio: of "token"s, or the geometric mean of a "sequence"'s (GSPO).
        surrogate: "clip"; "cispo", whose clipped ratio is a weight of log pi; or "reinforce", without a ratio.
        beta: weight of the KL divergence from the reference model; 0: there is none.
        kl: its estimator: k1, k2 or k3.
        max_importance: largest weight of a token for what the sampler and the trainer's old policy differ in; None: all weigh 1.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    ratio: Literal["token", "sequence"] = "token"
    surrogate: Literal["clip", "cispo", "reinforce"] = "clip"
    beta: float = 0.0
    kl: Kl = "k3"
    max_importance: float | None = None

    def __call__(self, model: Transformer, batch: RolloutBatch) -> LossOutput:
        """Weighted sum over the batch's sampled tokens. Without old log-probabilities these are the policy's own, and the ratio is 1."""
        logp_R = sampled_logprobs(model, batch)
        old_R = logp_R.detach() if batch.old_R is None else batch.old_R
        rows = batch.documents_R
        advantage_R, weight_R = batch.advantages_R, batch.weights_N[rows]
        log_ratio_R = logp_R - old_R
        if self.ratio == "sequence":
            means_N = torch.zeros_like(batch.weights_N).index_add(0, rows, log_ratio_R) / batch.lengths_N
            log_ratio_R = means_N[rows]
        ratio_R = log_ratio_R.exp()
        clipped_R = ratio_R.clamp(1 - self.clip_low, 1 + self.clip_high)
        if self.surrogate == "clip":
            loss_R = torch.maximum(-advantage_R * ratio_R, -advantage_R * clipped_R)
        else:
            factor_R = clipped_R.detach() if self.surrogate == "cispo" else 1.0
            loss_R = -advantage_R * factor_R * logp_R
        if self.max_importance is not None:
            loss_R = loss_R * (old_R - batch.sampler_R).exp().clamp(max=self.max_importance)
        if self.beta:
            if batch.reference_R is None:
                raise InputError("rollouts have no reference log-probabilities, which beta needs; compute them first")
            loss_R = loss_R + self.beta * kl_terms(self.kl, logp_R, batch.reference_R) * (logp_R - logp_R.detach()).exp()
        return LossOutput(
            (loss_R * weight_R).sum(), batch.count, self._metrics(logp_R.detach(), ratio_R.detach(), clipped_R.detach(), batch)
        )

    def _metrics(self, logp_R: Tensor, ratio_R: Tensor, clipped_R: Tensor, batch: RolloutBatch) -> dict[str, tuple[Tensor | float, float]]:
        difference_R = logp_R - batch.sampler_R if batch.old_R is None else batch.old_R - batch.sampler_R
        values = {
            "ratio": ratio_R,
            "clipped": (ratio_R != clipped_R).float() if self.surrogate != "reinforce" else torch.zeros_like(ratio_R),
            "entropy": -batch.sampler_R,  # of sampled tokens, an unbiased estimate
            "mismatch": difference_R.abs(),
            "token_mult_prob_error": difference_R.abs().exp(),
        }
        if batch.reference_R is not None:
            values["kl"] = kl_terms("k3", logp_R, batch.reference_R)
        return {name: (value_R.sum(), float(len(logp_R))) for name, value_R in values.items()}


def sampled_logprobs(model: Transformer, batch: RolloutBatch) -> Tensor:
    """log pi of each sampled token, (R,) in fp32."""
    tokens = batch.tokens
    hidden_RD = model.hidden(tokens.ids_T, tokens.shape, tokens.rows_R)
    return token_logprobs(hidden_RD, model.unembedding(), tokens.targets_R, cap=model.config.logits_soft_cap)


@torch.no_grad()
def with_logprobs(
    model: Transformer, rollouts: Sequence[Rollout], name: Literal["old", "reference"], *, precision: str, micro_batch_tokens: int
) -> list[Rollout]:
    """The rollouts with a model's log-probabilities of their sampled tokens, as the trainer computes them, in `old` or `reference`."""
    device, was_training = next(model.parameters()).device, model.training
    found: dict[str, np.ndarray] = {}
    model.eval()
    groups = split_micro_batches(group_answers(rollouts, len(rollouts), micro_batch_tokens), micro_batch_tokens)
    with compute_precision(model, precision):
        for group in groups:
            batch = collate(group, device, fill=fills(device, precision, 1))
            assert isinstance(batch, RolloutBatch)
            values = sampled_logprobs(model, batch).cpu().split(batch.lengths_N.tolist())
            ids = [answer.id for item in group for answer in documents_of(item)]
            found |= {id_: logps.numpy() for id_, logps in zip(ids, values, strict=True)}
    model.train(was_training)
    return [replace(rollout, **{name: found[rollout.id]}) for rollout in rollouts]  # type: ignore[arg-type]


def kl_terms(name: Kl, logp_R: Tensor, reference_R: Tensor) -> Tensor:
    """Estimates of KL(pi || reference) from single samples of pi: with l = log reference - log pi, k1 = -l, k2 = l^2 / 2, k3 = e^l - 1 - l.

    Source: Schulman, "Approximating KL Divergence"; k1 and k3 are unbiased, and k3 is never negative.
    """
    log_R = (reference_R - logp_R).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if name == "k1":
        return -log_R
    if name == "k2":
        return log_R.square() / 2
    return (log_R.exp() - 1 - log_R).clamp(max=MAX_KL)


def group_advantages(kind: Advantage, rewards: Sequence[float]) -> list[float]:
    """Advantages of the answers of one group.

        std            (r - mean) / population standard deviation
        mean           r - mean
        leave_one_out  r - mean of the others

    All are 0 where all rewards are equal: spread is told by equality, since a deviation of rounding errors is none.
    """
    low, high = min(rewards), max(rewards)
    if low == high:
        return [0.0] * len(rewards)
    mean = fmean(rewards)
    if kind == "leave_one_out":
        return [(reward - mean) * len(rewards) / (len(rewards) - 1) for reward in rewards]
    scale = float(np.std(rewards)) if kind == "std" else 1.0
    return [(reward - mean) / scale for reward in rewards]


def normalized(rollouts: Sequence[Rollout], kind: Normalize, max_tokens: int) -> list[Rollout]:
    """Rollouts with the weights of their tokens and their share of the step's divisor.

    token     every sampled token of the step weighs the same
    sequence  every answer does, whatever its length
    constant  every token weighs 1 / max_tokens, and the divisor is the number of answers
    """
    if kind == "token":
        return [replace(rollout, weight=1.0, num_terms=rollout.num_targets) for rollout in rollouts]
    if kind == "sequence":
        return [replace(rollout, weight=1 / max(1, rollout.num_targets), num_terms=1) for rollout in rollouts]
    return [replace(rollout, weight=1 / max_tokens, num_terms=1) for rollout in rollouts]


def overlong_penalty(num_tokens: int, max_tokens: int, buffer: int) -> float:
    """DAPO's soft punishment of long answers: 0 up to `max_tokens` - `buffer`, from there down to -1 at `max_tokens`, -1 beyond."""
    start = max_tokens - buffer
    return 0.0 if num_tokens <= start else max(-1.0, (start - num_tokens) / buffer)
