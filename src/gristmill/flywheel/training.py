"""The flywheel's training stages: each takes a model folder and rows, and leaves a model folder."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gristmill.flywheel.mill import Mill, on_step
from gristmill.model.reward import REWARD_WEIGHTS, RewardModel
from gristmill.model.weights import load_model, save_model, save_reward
from gristmill.recipe import PreferenceTraining, Training
from gristmill.rows import Demonstration, Pair, Rated
from gristmill.train.loop import TrainResult, TrainSettings, train
from gristmill.train.preference import PreferenceObjective, compute_reference_logprobs, pair_samples
from gristmill.train.reward import rated_samples, reward_objective
from gristmill.train.sft import demonstration_samples, sft_objective

MODEL = "model"  # the stage's subfolder that holds the model
CHECKPOINT_SECONDS = 20.0


def settings_of(recipe: Training, seed: int, max_tokens: int) -> TrainSettings:
    """The loop's settings from the recipe's."""
    values = {k: v for k, v in recipe.model_dump().items() if k in TrainSettings.__dataclass_fields__}
    return TrainSettings(**values, seed=seed, max_tokens=max_tokens, checkpoint_every=CHECKPOINT_SECONDS)


def sft(mill: Mill, start: Path, rows: Sequence[Demonstration], recipe: Training, folder: Path) -> dict[str, Any]:
    """Supervised fine-tuning on assistant turns."""
    model, tokenizer = load_model(start)
    samples = demonstration_samples(rows, mill.format, tokenizer)
    settings = settings_of(recipe, mill.recipe.seed, model.config.max_positions)
    result = train(model, sft_objective, samples, settings, folder / "train", on_step=on_step(mill.progress))
    save_model(model, tokenizer, folder / MODEL)
    return _summary(result, len(rows))


def reward(mill: Mill, start: Path, rows: Sequence[Rated], recipe: Training, folder: Path) -> dict[str, Any]:
    """Regression of the five attributes from the Base model."""
    backbone, tokenizer = load_model(start)
    model = RewardModel(backbone, REWARD_WEIGHTS[mill.recipe.judging.weights], seed=mill.recipe.seed)
    samples = rated_samples(rows, mill.format, tokenizer)
    settings = settings_of(recipe, mill.recipe.seed, backbone.config.max_positions)
    result = train(model, reward_objective, samples, settings, folder / "train", on_step=on_step(mill.progress))
    save_reward(model, tokenizer, folder / MODEL)
    return _summary(result, len(rows))


def preference(mill: Mill, start: Path, rows: Sequence[Pair], recipe: PreferenceTraining, folder: Path) -> dict[str, Any]:
    """DPO or RPO from a model that is also the reference."""
    model, tokenizer = load_model(start)
    samples = pair_samples(rows, mill.format, tokenizer)
    settings = settings_of(recipe, mill.recipe.seed, model.config.max_positions)
    objective = PreferenceObjective(recipe.loss, recipe.beta, recipe.eta, recipe.label_smoothing, recipe.sft_weight, recipe.logprobs)
    samples = compute_reference_logprobs(
        model, samples, folder / "train", precision=settings.precision, micro_batch_tokens=settings.micro_batch_tokens
    )
    result = train(model, objective, samples, settings, folder / "train", on_step=on_step(mill.progress))
    save_model(model, tokenizer, folder / MODEL)
    return _summary(result, len(rows))


def _summary(result: TrainResult, num_rows: int) -> dict[str, Any]:
    facts = asdict(result)
    return {
        "rows": num_rows,
        "steps": result.steps,
        "tokens": result.tokens,
        "train_seconds": round(result.seconds, 2),
        "tokens_per_second": round(result.tokens / max(result.seconds, 1e-9)),
        "metrics": {k: round(v, 5) for k, v in result.metrics.items()},
        "dropped": len(facts["dropped_long"]) + len(facts["dropped_untrained"]),
    }
