"""What a training is asked for, and what it tells when it has ended."""

from dataclasses import dataclass
from typing import Literal

from gristmill.core.errors import InputError
from gristmill.model.transformer import TRAINING_PRECISIONS
from gristmill.train.optim import SCHEDULES
from gristmill.train.settings import BatchSize, ramp_of


@dataclass(frozen=True)
class TrainSettings:
    """How to train.

    Give exactly one of ``epochs`` and ``steps``, and one of ``batch_size`` and ``batch_tokens``. Weights are
    always fp32; ``precision`` is what the model computes in. ``lr`` is AdamW's rate, ``muon_lr`` that of the
    hidden matrices with ``optimizer="muon"``, where AdamW keeps embeddings, heads, norms and biases.
    """

    optimizer: str = "adamw"  # "adamw" or "muon"
    lr: float = 1e-3
    muon_lr: float = 0.02
    schedule: str = "cosine"  # "constant", "cosine" or "linear", after the warmup
    warmup_ratio: float = 0.0  # share of the steps
    warmup_steps: int | None = None  # instead of warmup_ratio
    min_lr_ratio: float = 0.0  # of the peak, reached on the last step
    epochs: float | None = None
    steps: int | None = None
    batch_size: BatchSize | None = None  # samples a step; or pairs of a sample and the samples of a step from there on
    batch_tokens: int | None = None  # tokens a step, on average
    micro_batch_tokens: int | None = None  # tokens that go through the model at once; None: as many as pay, within the free memory
    checkpoint_activations: Literal["auto", "selective"] | bool = "auto"  # compute activations again in the backward pass; "auto": to fit
    compile: bool = False  # operations between products by torch.compile, where there are no kernels for them
    max_tokens: int | None = None  # longer samples are dropped and counted
    weight_decay: float = 0.1
    b_lr_ratio: float = 1.0  # LoRA+: learning rate of B, in those of A
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0  # largest gradient norm; 0 does not clip
    seed: int = 0
    shuffle: bool = True  # False: samples in the order given
    precision: str = "fp32"  # "fp32", "bf16", "fp8" (rowwise) or "fp8_tensorwise"
    checkpoint_every: float = 0.0  # seconds between checkpoints; 0 writes only the finished state
    validate_every: int = 10  # steps between validations, where there is validation data

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise InputError("give exactly one of epochs and steps")
        if (self.batch_size is None) == (self.batch_tokens is None):
            raise InputError("give exactly one of batch_size and batch_tokens")
        for name in (
            "epochs",
            "steps",
            "batch_size",
            "batch_tokens",
            "micro_batch_tokens",
            "max_tokens",
            "validate_every",
        ):
            value = getattr(self, name)
            if name == "batch_size" and value is not None:
                ramp_of(value)
            elif value is not None and not value > 0:
                raise InputError(f"{name} is {value}; it must be above zero")
        if self.schedule not in SCHEDULES:
            raise InputError(f"unknown schedule {self.schedule!r}; choose one of {', '.join(SCHEDULES)}")
        if self.precision not in TRAINING_PRECISIONS:
            raise InputError(f"unknown precision {self.precision!r}; choose one of {', '.join(TRAINING_PRECISIONS)}")


@dataclass
class TrainResult:
    """What a finished training run did. ``metrics`` are those of the last step."""

    steps: int
    tokens: int
    seconds: float
    metrics: dict[str, float]
    dropped_long: list[str]  # samples over max_tokens, by id (or position)
    dropped_untrained: list[str]  # samples without a single trained target
    best_step: int | None = None  # with validation data: the step whose weights the model now has
