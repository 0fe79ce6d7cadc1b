"""Training settings by model size: what a recipe or a command leaves out. docs/settings.md names the source of every number."""

from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch

from gristmill.core.device import pick_precision
from gristmill.train.settings import PreferenceTraining, Training

Kind = Literal["demonstration_sft", "sft", "code_sft", "reward", "preference"]
AnyTraining = TypeVar("AnyTraining", bound=Training)
MIN_BATCH = 8  # below which a batch is not lowered for few rows
WANTED_STEPS = 50  # that a batch is lowered for
LORA_LR_FACTOR = 10  # learning rate of an adapter, in those of all weights


@dataclass(frozen=True)
class _Stage:
    lr: float
    batch_size: int
    epochs: float | None = None
    steps: int | None = None
    sft_weight: float = 0.0


# Largest number of parameters -> settings by kind of stage.
TABLE: tuple[tuple[float, dict[Kind, _Stage]], ...] = (
    (
        20e6,
        {
            "demonstration_sft": _Stage(1e-3, 16, 15),
            "sft": _Stage(1e-3, 32, 5),
            "code_sft": _Stage(1e-4, 64, steps=15),
            "reward": _Stage(1e-3, 32, 3),
            "preference": _Stage(5e-5, 32, 3, sft_weight=1.0),
        },
    ),
    (
        500e6,
        {
            "demonstration_sft": _Stage(3e-4, 8, 2),
            "sft": _Stage(3e-4, 8, 1),
            "code_sft": _Stage(3e-4, 8, 1),
            "reward": _Stage(1e-4, 32, 2),
            "preference": _Stage(4e-5, 8, 1, sft_weight=0.01),
        },
    ),
    (
        3e9,
        {
            "demonstration_sft": _Stage(3e-5, 128, 2),
            "sft": _Stage(3e-5, 128, 2),
            "code_sft": _Stage(3e-5, 128, 1),
            "reward": _Stage(1e-5, 128, 2),
            "preference": _Stage(2.5e-6, 128, 1, sft_weight=1e-3),
        },
    ),
    (
        20e9,
        {
            "demonstration_sft": _Stage(1e-5, 128, 2),
            "sft": _Stage(1e-5, 128, 2),
            "code_sft": _Stage(1e-5, 128, 1),
            "reward": _Stage(3e-6, 128, 2),
            "preference": _Stage(1e-6, 128, 1, sft_weight=1e-3),
        },
    ),
    (
        100e9,
        {
            "demonstration_sft": _Stage(2e-6, 128, 2),
            "sft": _Stage(2e-6, 128, 2),
            "code_sft": _Stage(2e-6, 128, 1),
            "reward": _Stage(2e-6, 128, 2),
            "preference": _Stage(2e-7, 128, 1, sft_weight=1e-3),
        },
    ),
    (
        float("inf"),
        {
            "demonstration_sft": _Stage(3e-7, 128, 3),
            "sft": _Stage(3e-7, 128, 3),
            "code_sft": _Stage(3e-7, 128, 1),
            "reward": _Stage(7e-7, 128, 2),
            "preference": _Stage(1e-7, 256, 1, sft_weight=1e-5),
        },
    ),
)


def fill(
    settings: AnyTraining, kind: Kind, num_parameters: int, *, device: torch.device, num_rows: int | None = None, precision: str = ""
) -> AnyTraining:
    """A training section without gaps: what it leaves out is chosen by the model's size and the device; what it says stays.

    Args:
        num_parameters: of the model.
        num_rows: samples or pairs, where they are known: the batch is lowered for few of them.
        precision: instead of the device's, where the section names none.
    """
    chosen = next(of_kind[kind] for largest, of_kind in TABLE if num_parameters <= largest)
    values: dict[str, Any] = {}
    if settings.lr is None:
        values["lr"] = chosen.lr * (1 if settings.lora is None else LORA_LR_FACTOR)
    if settings.epochs is None and settings.steps is None:
        values |= {"epochs": chosen.epochs, "steps": chosen.steps}
    if settings.batch_size is None:
        epochs = values.get("epochs") or settings.epochs
        values["batch_size"] = _batch_size(chosen.batch_size, num_rows * epochs if num_rows and epochs else None)
    if settings.precision == "auto":
        values["precision"] = precision or pick_precision(device)
    if isinstance(settings, PreferenceTraining) and settings.sft_weight is None:
        values["sft_weight"] = chosen.sft_weight
    return settings.model_copy(update=values)


def _batch_size(largest: int, num_samples: float | None) -> int:
    """The table's batch, halved while it would leave too few steps."""
    size = largest
    while num_samples is not None and size > MIN_BATCH and num_samples / size < WANTED_STEPS:
        size //= 2
    return size


def described(settings: Training) -> str:
    """A filled section in one line."""
    length = f"{settings.steps} steps" if settings.steps is not None else f"{settings.epochs:g} epochs"
    warmup = f"{settings.warmup_steps} steps" if settings.warmup_steps is not None else f"{settings.warmup_ratio:.0%}"
    more = f", beta {settings.beta:g}, SFT weight {settings.sft_weight:g}" if isinstance(settings, PreferenceTraining) else ""
    return f"lr {settings.lr:g}, batch {settings.batch_size}, {length}, warm-up {warmup}, {settings.precision}{more}"
