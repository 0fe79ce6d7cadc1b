"""Knowledge distillation: a student learns a teacher's distributions of the next token, and the directions of its states.

Source: Puzzle (arXiv 2411.19146), global distillation: sum over layers of 1 - cos(student, teacher), and KL(teacher || student).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch.autograd.function import once_differentiable

from gristmill.core.errors import InputError
from gristmill.model.compiled_blocks import freeze
from gristmill.model.config import ModelConfig
from gristmill.model.transformer import Transformer
from gristmill.train.batches import TokenBatch
from gristmill.train.losses import cross_entropy_sum, kl_divergence_sum, top_kl_divergence_sum
from gristmill.train.settings import DistillationLoss
from gristmill.train.trainer import LossOutput

MIN_LENGTH = 1e-8  # of a state, whose direction is none below


@dataclass(frozen=True)
class DistillationObjective:
    """Global distillation on packed documents, a mean over their trained targets.

    Attributes:
        teacher: in the type that it computes in; it gets no gradient, and does not change.
        identity: fingerprint of the teacher, for checkpoints.
        loss: its terms, each with weight 1: `cosine` of the states behind every layer, `kl` from the teacher, `lm` (cross-entropy).
        layers: the teacher's layer that each of the student's layers stands for; none: they pair in order.
    """

    teacher: Transformer = field(repr=False)
    identity: str
    loss: DistillationLoss = "cosine+kl"
    layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.loss not in get_args(DistillationLoss):
            raise InputError(f"loss is {self.loss!r}; choose one of {', '.join(get_args(DistillationLoss))}")
        freeze(self.teacher)

    def __call__(self, model: Transformer, batch: TokenBatch) -> LossOutput:
        terms, rows_R = self.loss.split("+"), batch.rows_R
        states: list[torch.Tensor] | None = [] if "cosine" in terms else None
        teacher_states: list[torch.Tensor] | None = None if states is None else []
        with torch.no_grad():
            teacher_RE = self.teacher.hidden(batch.ids_T, batch.shape, rows_R, layers=teacher_states)
        hidden_RD = model.hidden(batch.ids_T, batch.shape, rows_R, layers=states)
        count, total, metrics = batch.count, hidden_RD.new_zeros((), dtype=torch.float32), {}
        if states is not None and teacher_states is not None:
            cosine = _cosine_sum(states, teacher_states, self.layers or range(len(states)), rows_R)
            total, metrics["cosine"] = total + cosine, (cosine.detach(), float(count))
        kl = kl_divergence_sum(
            hidden_RD if "kl" in terms else hidden_RD.detach(),
            model.unembedding() if "kl" in terms else model.unembedding().detach(),
            teacher_RE,
            self.teacher.unembedding(),
            cap=model.config.logits_soft_cap,
            teacher_cap=self.teacher.config.logits_soft_cap,
        )
        metrics["kl"] = (kl.detach(), float(count))
        total = total + kl if "kl" in terms else total
        if "lm" in terms:
            lm, _ = cross_entropy_sum(hidden_RD, model.unembedding(), batch.targets_R, cap=model.config.logits_soft_cap)
            total, metrics["lm"] = total + lm, (lm.detach(), float(count))
        return LossOutput(total, count, metrics)


@dataclass(frozen=True)
class TopKDistillation:
    """Distillation from a teacher's largest log-probabilities, which the samples bring (`TaughtSample`): the teacher itself is not there.

    Attributes:
        identity: fingerprint of the teacher, for checkpoints.
        top_k: of each target; the rest of the vocabulary counts as one token.
        loss: kl or kl+lm.
    """

    identity: str
    top_k: int
    loss: DistillationLoss = "kl"

    def __call__(self, model: Transformer, batch: TokenBatch) -> LossOutput:
        assert batch.teacher_RK is not None
        cap, count = model.config.logits_soft_cap, float(batch.count)
        hidden_RD = model.hidden(batch.ids_T, batch.shape, batch.rows_R)
        total = top_kl_divergence_sum(hidden_RD, model.unembedding(), *batch.teacher_RK, cap=cap)
        metrics = {"kl": (total.detach(), count)}
        if self.loss == "kl+lm":
            lm, _ = cross_entropy_sum(hidden_RD, model.unembedding(), batch.targets_R, cap=cap)
            total, metrics["lm"] = total + lm, (lm.detach(), count)
        return LossOutput(total, batch.count, metrics)


def _cosine_sum(
    states: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], layers: Sequence[int], rows_R: torch.Tensor
) -> torch.Tensor:
    """Sum over layers and rows of 1 - cos. The last layer of a model has computed these rows alone."""

    def rows(found: Sequence[torch.Tensor], layer: int) -> torch.Tensor:
        return found[layer][: len(rows_R)] if layer == len(found) - 1 else found[layer][rows_R]

    total = states[0].new_zeros((), dtype=torch.float32)
    for number, layer in enumerate(layers):
        total = total + _CosineDistances.apply(rows(states, number), rows(teacher, layer))
    return total


class _CosineDistances(torch.autograd.Function):
    """Sum over rows [R, D] of 1 - cos(x, y), in fp32. As of the losses, the gradient in x is made in the forward pass."""

    @staticmethod
    def forward(ctx: Any, x_RD: torch.Tensor, y_RD: torch.Tensor) -> torch.Tensor:
        x, y = x_RD.float(), y_RD.float()
        lengths_R, other_R = (torch.linalg.vector_norm(z, dim=-1).clamp_(min=MIN_LENGTH) for z in (x, y))
        cos_R = torch.linalg.vecdot(x, y) / (lengths_R * other_R)
        if ctx.needs_input_grad[0]:  # d cos / d x = (y / |y| - cos x / |x|) / |x|
            grad_RD = (x * (cos_R / lengths_R.square())[:, None]).addcmul_(y, (1 / (lengths_R * other_R))[:, None], value=-1)
            ctx.save_for_backward(grad_RD.to(x_RD.dtype))
        return (1 - cos_R).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (grad_RD,) = ctx.saved_tensors
        return grad_RD * grads[0].to(grad_RD.dtype), None


def paired_loss(
    loss: DistillationLoss | Literal["auto"], student: ModelConfig, teacher: ModelConfig, layers: Sequence[int] = ()
) -> DistillationLoss:
    """The loss that is taken: "auto" is cosine + KL where the layers pair, else KL.

    Args:
        layers: the teacher's layer of each of the student's, where that is known.

    Raises:
        InputError: cosine of models of other widths or depths.
    """
    sizes = [(config.hidden_size, config.num_layers) for config in (student, teacher)]
    pair = sizes[0][0] == sizes[1][0] and (len(layers) == sizes[0][1] or sizes[0] == sizes[1])
    if loss == "auto":
        return "cosine+kl" if pair else "kl"
    if loss.startswith("cosine") and not pair:
        raise InputError(
            f"The student's layers ({sizes[0][1]} of width {sizes[0][0]}) do not pair with the teacher's ({sizes[1][1]} of width "
            f"{sizes[1][0]}): take the loss kl."
        )
    return loss
