"""Sections of recipes about training."""

from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import Discriminator, Field, Tag, model_validator

from gristmill.core.config import Section, check
from gristmill.core.errors import InputError

MIN_STEPS = 20  # under which a training stage hardly changes a model
CHECKPOINTING = "compute activations twice; selective: but products of matrices; auto: where memory is short"
COMPILE = "norms, activations and rotations by torch.compile, where there are no kernels for them: for GPUs"
DistillationLoss = Literal["cosine+kl", "kl", "cosine+kl+lm", "kl+lm", "lm"]
Loss = Literal["dpo", "cdpo", "ipo", "rpo", "rpo_bwd_kl", "rpo_fwd_kl", "rpo_sq"]


class Lora(Section):
    """A LoRA adapter in place of the model's own weights."""

    rank: int = Field(16, gt=0, le=4096)
    alpha: float | None = Field(None, gt=0, le=1e6, description="alpha / rank scales the update; default twice the rank")
    targets: tuple[str, ...] = Field((), description="q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj; none: all there are")
    rslora: bool = Field(False, description="alpha / sqrt(rank) in place of alpha / rank")
    dora: bool = Field(False, description="the lengths of the updated rows are trained too")
    b_lr_ratio: float = Field(1.0, gt=0, le=1e4, description="LoRA+: learning rate of B, in those of A; the paper's is 16")
    base: Literal["fp32", "bf16", "int8", "nf4"] = Field("fp32", description="type that the frozen matrices are kept in; nf4: bitsandbytes")


Ramp = tuple[tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(gt=0)]], ...]  # (from which sample on, samples a step), in order
BatchSize = Annotated[
    Annotated[int, Field(gt=0), Tag("number")] | Annotated[Ramp, Tag("pairs")],
    Discriminator(lambda value: "pairs" if isinstance(value, list | tuple) else "number"),
]


def ramp_of(batch_size: BatchSize) -> Ramp:
    """A batch size as a ramp, of one entry where it never changes.

    Raises:
        InputError: it does not begin at sample 0, does not go on from there, or a size is no number above zero.
    """
    ramp = ((0, batch_size),) if isinstance(batch_size, int) else tuple((begin, size) for begin, size in batch_size)
    begins = [begin for begin, _ in ramp]
    if not ramp or begins[0] != 0 or begins != sorted(set(begins)) or min(size for _, size in ramp) <= 0:
        raise InputError(
            f"batch_size is {batch_size}: give a number above zero, or pairs of the sample from which on it holds and a number, "
            "from sample 0 on and in order"
        )
    return ramp


class Training(Section):
    """One training stage, as long as `steps` or `epochs` say. What is left out is chosen by the model's size (docs/settings.md)."""

    added: ClassVar[frozenset[str]] = frozenset({"compile", "lora"})

    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: float | None = Field(None, gt=0, description="default by the model's size")
    muon_lr: float = Field(0.02, gt=0)
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    warmup_ratio: float = Field(0.1, ge=0, lt=1, description="share of the steps")
    warmup_steps: int | None = Field(None, ge=0, description="instead of warmup_ratio")
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    steps: int | None = Field(None, gt=0)
    epochs: float | None = Field(None, gt=0, description="default by the model's size, unless steps are given")
    batch_size: BatchSize | None = Field(
        None, description="samples a step, or pairs [from sample, samples a step]; default by the model's size"
    )
    micro_batch_tokens: int | None = Field(None, gt=0, description="tokens at once; null: as many as pay, within the free memory")
    checkpoint_activations: Literal["auto", "selective"] | bool = Field("auto", description=CHECKPOINTING)
    compile: bool = Field(False, description=COMPILE)
    weight_decay: float = Field(0.1, ge=0)
    clip: float = Field(1.0, ge=0)
    precision: Literal["auto", "fp32", "bf16", "fp8", "fp8_tensorwise"] = Field(
        "auto", description="of computing; auto: bf16 where the device is made for it; fp8: with scales by rows (docs/scale.md)"
    )
    lora: Lora | None = Field(None, description="train an adapter; none: all weights")

    @model_validator(mode="after")
    def _length(self) -> Self:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give either steps or epochs, not both")
        if self.batch_size is not None:
            ramp_of(self.batch_size)
        if self.lora is not None and self.optimizer != "adamw":
            raise ValueError("lora trains with optimizer: adamw, since muon is made for whole matrices")
        if self.steps is not None and (self.warmup_steps or 0) > self.steps:
            raise ValueError(f"warmup_steps is {self.warmup_steps}, and there are {self.steps} steps: it would never end")
        if self.optimizer != "muon" and self.muon_lr != type(self).model_fields["muon_lr"].default:
            raise ValueError("muon_lr is of optimizer: muon, and would not be read")
        return self


class PreferenceTraining(Training):
    """DPO and its relatives."""

    added: ClassVar[frozenset[str]] = Training.added | {"temperatures"}

    loss: Loss = "dpo"
    beta: float = Field(0.1, gt=0)
    eta: float = Field(1.0, gt=0)
    label_smoothing: float = Field(0.1, ge=0, lt=0.5, description="cdpo only")
    sft_weight: float | None = Field(None, ge=0, description="of -log p(chosen), added to the loss; default by the model's size")
    logprobs: Literal["sum", "mean"] = "sum"
    num_prompts: int = Field(400, gt=0, description="prompts that pairs are made for")
    num_pairs: int = Field(10_000, gt=0, description="pairs to train on, at most")
    temperatures: tuple[float, ...] = Field((), description="of the answers that pairs are made of; none: those of answers")
    keep_chosen: str = Field("", description="instead of judging.keep_chosen, for this stage")

    @model_validator(mode="after")
    def _of_the_loss(self) -> Self:
        for name, losses in (("label_smoothing", "cdpo"), ("eta", "rpo")):
            if getattr(self, name) != type(self).model_fields[name].default and not self.loss.startswith(losses):
                raise ValueError(f"{name} is of the loss {losses}, and would not be read with {self.loss}")
        return self


class DistillationTraining(Training):
    """Knowledge distillation."""

    loss: Literal["auto"] | DistillationLoss = Field("auto", description="auto: cosine+kl where the models' layers pair, else kl")
    teacher_top_k: int | None = Field(
        None, gt=0, description="keep so many of the teacher's log-probabilities a token on disk, in place of the teacher in memory"
    )

    @model_validator(mode="after")
    def _top_k_has_no_states(self) -> Self:
        if self.teacher_top_k is not None and self.loss not in ("auto", "kl", "kl+lm"):
            raise ValueError(
                f"teacher_top_k keeps the teacher's distributions and not its states: take the loss kl or kl+lm, not {self.loss}"
            )
        return self


def training_section(objective: str, values: dict[str, Any]) -> Training:
    """A checked training section from plain values.

    Args:
        objective: sft, reward, guard, distill, or a preference loss, which becomes the section's.

    Raises:
        InputError: a key is unknown or a value is wrong.
    """
    if objective in ("sft", "reward", "guard"):
        return check(Training, values, f"train {objective}")
    if objective == "distill":
        return check(DistillationTraining, values, "train distill")
    if objective not in get_args(Loss):
        raise InputError(f"There is no training {objective!r}: choose one of sft, reward, guard, distill, {', '.join(get_args(Loss))}.")
    return check(PreferenceTraining, {**values, "loss": objective}, f"train {objective}")
