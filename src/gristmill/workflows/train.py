"""One training stage: a model folder and rows in, a model folder out."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from gristmill.core.device import pick_device
from gristmill.data.chat import ChatFormat, find_format
from gristmill.data.readers import read_demonstrations, read_pairs, read_ratings
from gristmill.model.flops import num_parameters
from gristmill.model.hf import load_model, save_model, save_reward
from gristmill.model.reward import RewardModel
from gristmill.train.batches import AnySample
from gristmill.train.by_size import Kind, described, fill
from gristmill.train.objectives.preference import PreferenceObjective, compute_reference_logprobs, pair_samples
from gristmill.train.objectives.reward import rated_samples, reward_objective
from gristmill.train.objectives.sft import demonstration_samples, sft_objective
from gristmill.train.settings import PreferenceTraining, Training
from gristmill.train.trainer import Objective, OnStep, Trainer, TrainResult, TrainSettings

MODEL = "model"  # the subfolder that holds the model
READERS = {"sft": read_demonstrations, "reward": read_ratings}  # any other kind is a preference loss


def train_model(
    kind: str,
    start: Path,
    rows: Sequence[Any] | Path,
    *,
    out: Path,
    recipe: Training,
    device: str | torch.device = "auto",
    chat_format: ChatFormat | str = "auto",
    seed: int = 0,
    checkpoint_every: float = 60.0,
    weights: Sequence[float] | None = None,
    on_step: OnStep | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> TrainResult:
    """Train a model on rows, or on those of a user's file; it goes to `out/model`, log and checkpoints to `out/train`.

    Args:
        kind: sft, reward, or the name of a preference loss.
        start: folder of the model to begin from; for preference losses it is also the reference.
        recipe: a `Training`, or a `PreferenceTraining` for preference losses; what it leaves out is chosen by the model's size.
        device: where to train, as `pick_device` takes it.
        checkpoint_every: seconds between checkpoints.
        weights: aggregation weights that a reward model is saved with.
        say: gets one line with the settings.
    """
    where = pick_device(device)
    model, tokenizer = load_model(start)
    form = find_format(chat_format, tokenizer) if isinstance(chat_format, str) else chat_format
    if isinstance(rows, Path):
        rows = cast(Sequence[Any], READERS.get(kind, read_pairs)(rows))
    sized: Kind = "sft" if kind == "sft" else "reward" if kind == "reward" else "preference"
    size = num_parameters(model.config)
    if isinstance(recipe, PreferenceTraining) and recipe.sft_weight is None:
        recipe = recipe.model_copy(update={"sft_weight": 0.0})  # the loss that was named, and no other
    recipe = fill(recipe, sized, size, device=where, num_rows=len(rows))
    say(f"{size / 1e6:,.4g}M parameters, {len(rows):,} rows, {where}: {described(recipe)}")
    values = {k: v for k, v in recipe.model_dump().items() if k in TrainSettings.__dataclass_fields__}
    settings = TrainSettings(**values, seed=seed, max_tokens=model.config.max_positions, checkpoint_every=checkpoint_every)

    def fit(model: nn.Module, objective: Objective, samples: Sequence[AnySample]) -> TrainResult:
        return Trainer(model, objective, settings, device=where, folder=out / "train", on_step=on_step).fit(samples)

    if kind == "sft":
        result = fit(model, sft_objective, demonstration_samples(rows, form, tokenizer))
    elif kind == "reward":  # the head is drawn on the CPU, so that it is the same on every device
        reward = RewardModel(model, seed=seed) if weights is None else RewardModel(model, weights, seed=seed)
        result = fit(reward, reward_objective, rated_samples(rows, form, tokenizer))
        save_reward(reward, tokenizer, out / MODEL)
        return result
    else:
        options = recipe.model_dump()
        names = ("beta", "eta", "label_smoothing", "sft_weight", "logprobs")
        objective = PreferenceObjective(kind, **{k: options[k] for k in names})
        pairs = compute_reference_logprobs(
            model.to(where),
            pair_samples(rows, form, tokenizer),
            out / "train",
            precision=settings.precision,
            micro_batch_tokens=settings.micro_batch_tokens,
        )
        result = fit(model, objective, pairs)
    save_model(model, tokenizer, out / MODEL)
    return result
