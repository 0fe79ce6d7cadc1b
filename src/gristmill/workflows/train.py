"""One training stage: a model folder and rows in, a model folder or the folder of a LoRA adapter out."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from gristmill.core.device import check_dtype, pick_device, pick_precision
from gristmill.core.errors import InputError
from gristmill.data.chat_format import ChatFormat
from gristmill.data.find_format import find_format, with_template_of
from gristmill.data.readers import read_demonstrations, read_pairs, read_ratings
from gristmill.data.tokenizer import Tokenizer
from gristmill.judge.guard_head import GuardScorer, fit_thresholds, read_labelled, split_held_out
from gristmill.judge.guards import AEGIS, Taxonomy
from gristmill.model.adapters import (
    base_of,
    is_adapter,
    is_reward_adapter,
    load_model,
    load_reward,
    load_unmerged,
    merge_folder,
    save_adapter,
)
from gristmill.model.config import ModelConfig
from gristmill.model.flops import num_parameters
from gristmill.model.fp8 import check_float8
from gristmill.model.guard import GuardModel
from gristmill.model.hf import fingerprint
from gristmill.model.hf_config import read_config
from gristmill.model.hf_save import save_guard, save_model, save_reward
from gristmill.model.lora import LoraConfig, adapters_disabled, add_adapters
from gristmill.model.reward import RewardModel
from gristmill.model.transformer import TRAINING_PRECISIONS, Transformer
from gristmill.parallel.mesh import Mesh
from gristmill.train.batches import AnySample, Sample, collate, split_micro_batches
from gristmill.train.by_size import Kind, described, fill
from gristmill.train.data import ListData, check_vocabulary
from gristmill.train.memory import MIN_MICRO_BATCH, MemoryEstimate, always_checkpointed, choose_micro_batch, fitting, recorded_micro_batch
from gristmill.train.objectives.distillation import DistillationObjective, TopKDistillation, paired_loss
from gristmill.train.objectives.guard import guard_objective, guard_samples
from gristmill.train.objectives.preference import PreferenceObjective, compute_reference_logprobs, pair_samples
from gristmill.train.objectives.reward import rated_samples, reward_objective
from gristmill.train.objectives.sft import demonstration_samples, sft_objective
from gristmill.train.settings import DistillationLoss, DistillationTraining, Lora, PreferenceTraining, Training
from gristmill.train.sharded import check_parallel
from gristmill.train.top_logprobs import Tick, check_top_k, taught_samples
from gristmill.train.trainer import Objective, OnStep, Trainer, TrainResult, TrainSettings

MODEL, ADAPTER = "model", "adapter"  # the subfolders that hold the model, and the adapter of a training with LoRA
READERS = {"sft": read_demonstrations, "distill": read_demonstrations, "reward": read_ratings}  # any other kind is a preference loss


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
    taxonomy: Taxonomy = AEGIS,
    max_fpr: float = 0.05,
    teacher: Path | None = None,
    on_step: OnStep | None = None,
    tick: Tick = lambda done, total, note: None,
    say: Callable[[str], object] = lambda line: None,
    mesh: Mesh | None = None,
) -> TrainResult:
    """Train a model on rows, or on those of a user's file; it goes to `out/model`, log and checkpoints to `out/train`.

    With `recipe.lora` an adapter is trained, which goes to `out/adapter`; `merge_folder` makes a model of it.

    Args:
        kind: sft, reward, guard, distill, or the name of a preference loss.
        start: folder of the model to begin from; for preference losses it is also the reference.
        recipe: a `Training`, or a `PreferenceTraining` or `DistillationTraining` for these kinds; gaps are filled by the model's size.
        device: where to train, as `pick_device` takes it.
        checkpoint_every: seconds between checkpoints.
        weights: aggregation weights that a reward model is saved with.
        taxonomy: categories of a guard.
        max_fpr: share of safe rows that each category of a guard may call unsafe; a fifth of the rows fits the thresholds.
        teacher: folder of the model that a student is distilled from; with the student's tokenizer.
        tick: hears how far a teacher is whose log-probabilities are kept on disk.
        say: hears, before any weight is read, which settings were chosen and how much memory training will take.
        mesh: the processes that train one model together (`process_mesh`), of which the first writes it; default this one alone.

    Raises:
        InputError: the model or a row cannot be used, or training does not fit into the memory.
    """
    where, mesh = pick_device(device), mesh or Mesh()
    lora = recipe.lora
    if lora is not None and is_adapter(start):
        raise InputError(f"Merge the adapter first (`gristmill merge {start} --out DIR`), and train on what it made: {start} is no model.")
    config = read_config(base_of(start) if is_adapter(start) else start)[1]
    check_parallel(config, mesh.dims, bases=() if lora is None else (lora.base,))
    if kind == "guard" and lora is not None:
        raise InputError("A guard is trained whole: leave --lora-rank out.")
    if isinstance(recipe, DistillationTraining):
        _check_distillation(start, teacher, recipe, mesh)
    if isinstance(rows, Path) and kind == "guard":
        rows = cast(Sequence[Any], read_labelled(rows, taxonomy))
    if isinstance(rows, Path):
        rows = cast(Sequence[Any], READERS.get(kind, read_pairs)(rows))
    if isinstance(recipe, PreferenceTraining) and recipe.sft_weight is None:
        recipe = recipe.model_copy(update={"sft_weight": 0.0})  # the loss that was named, and no other
    sized: Kind = "sft" if kind in ("sft", "distill") else "reward" if kind in ("reward", "guard") else "preference"
    held_out: Sequence[Any] = ()
    if kind == "guard":
        rows, held_out = cast(tuple[Sequence[Any], Sequence[Any]], split_held_out(rows))
    precision = mesh.first(pick_precision(where)) if mesh.size > 1 else ""  # it is chosen by measuring
    recipe = fill(recipe, sized, num_parameters(config), device=where, num_rows=len(rows), precision=precision)
    say(f"{num_parameters(config) / 1e6:,.4g}M parameters, {len(rows):,} rows, {where}: {described(recipe)}")
    check_dtype(where, TRAINING_PRECISIONS[recipe.precision])
    check_float8(where, recipe.precision)
    needed = training_memory(config, recipe, where, out / "train", mesh)
    say(f"memory of training: {needed}")
    # what is frozen in fewer bits is not held in more
    model, tokenizer = load_model(start, torch.float32 if lora is None or lora.base == "fp32" else torch.bfloat16)
    form = find_format(chat_format, tokenizer) if isinstance(chat_format, str) else chat_format
    saved = with_template_of(form, tokenizer)
    values = {k: v for k, v in recipe.model_dump().items() if k in TrainSettings.__dataclass_fields__}
    values |= {"micro_batch_tokens": needed.tokens, "max_tokens": model.config.max_positions}
    if lora is not None:
        values["b_lr_ratio"] = lora.b_lr_ratio
        add_adapters(model.to(where), lora_config(lora), seed=seed, base=lora.base)
    settings = TrainSettings(**values, seed=seed, checkpoint_every=checkpoint_every)

    def fit(model: nn.Module, objective: Objective, samples: Sequence[AnySample]) -> tuple[Any, TrainResult]:
        trainer = Trainer(model, objective, settings, device=where, folder=out / "train", on_step=on_step, mesh=mesh)
        result = trainer.fit(samples)
        return trainer.model, result

    reward: RewardModel | None = None
    if kind == "sft":
        model, result = fit(model, sft_objective, demonstration_samples(rows, form, tokenizer))
    elif isinstance(recipe, DistillationTraining):
        assert teacher is not None
        documents: Sequence[Sample] = demonstration_samples(rows, form, tokenizer)
        objective: Objective
        objective, documents = distillation_from(
            teacher, recipe, documents, settings, model.config, device=where, cache=out / "train", tick=tick
        )
        model, result = fit(model, objective, documents)
    elif kind == "reward":  # the head is drawn on the CPU, so that it is the same on every device
        reward = RewardModel(model, seed=seed) if weights is None else RewardModel(model, weights, seed=seed)
        reward, result = fit(reward, reward_objective, rated_samples(rows, form, tokenizer))
    elif kind == "guard":
        guard = GuardModel(model, taxonomy.codes, caution=taxonomy.caution, seed=seed)
        guard, result = fit(guard, guard_objective, guard_samples(rows, form, tokenizer))
        scores = GuardScorer(guard, tokenizer, form).probabilities([row.messages for row in held_out])
        guard.thresholds = tuple(fit_thresholds(scores, [row.labels for row in held_out], max_fpr)) or guard.thresholds
        if mesh.is_writer:
            save_guard(guard, saved, out / MODEL)
        return result
    else:
        options = recipe.model_dump()
        names = ("beta", "eta", "label_smoothing", "sft_weight", "logprobs")
        objective = PreferenceObjective(kind, **{k: options[k] for k in names})
        score = partial(
            compute_reference_logprobs,
            model.to(where),
            cache_folder=out / "train",
            precision=settings.precision,
            micro_batch_tokens=needed.tokens,
        )
        pairs = pair_samples(rows, form, tokenizer)
        if mesh.size == 1:
            pairs = score(pairs)
        else:
            mine = score(pairs[mesh.rank :: mesh.size])
            shares = mesh.gather([(pair.ref_chosen, pair.ref_rejected) for pair in mine])
            for index, pair in enumerate(pairs):
                pair.ref_chosen, pair.ref_rejected = shares[index % mesh.size][index // mesh.size]
        model, result = fit(model, objective, pairs)
    if not mesh.is_writer:
        return result
    if lora is not None:
        save_adapter(model if reward is None else reward, lora_config(lora), out / ADAPTER, base=start, base_dtype=lora.base)
    elif reward is not None:
        save_reward(reward, saved, out / MODEL)
    else:
        save_model(model, saved, out / MODEL)
    return result


def _check_distillation(student: Path, teacher: Path | None, recipe: DistillationTraining, mesh: Mesh) -> None:
    """InputError where a student cannot learn from a teacher, before any weight is read."""
    if teacher is None:
        raise InputError("Give --teacher: the folder of the model to distil from.")
    if mesh.size > 1 or recipe.lora is not None:
        raise InputError("Distillation trains all weights in one process: start without torchrun, and leave --lora-rank out.")
    student_tokenizer, teacher_tokenizer = Tokenizer.load(student), Tokenizer.load(teacher)
    configs = [read_config(folder)[1] for folder in (student, teacher)]
    if student_tokenizer.fingerprint() != teacher_tokenizer.fingerprint() or configs[0].vocab_size != configs[1].vocab_size:
        raise InputError(
            f"{teacher} has another vocabulary than {student}: distributions over other tokens cannot be compared. Take a teacher with "
            "the student's tokenizer, or train on its answers (`gristmill train sft`)."
        )
    paired_loss("kl" if recipe.teacher_top_k else recipe.loss, configs[0], configs[1])
    check_top_k(recipe.teacher_top_k, configs[0].vocab_size)


def load_teacher(
    folder: Path,
    loss: Literal["auto"] | DistillationLoss,
    student: ModelConfig,
    *,
    precision: str,
    device: torch.device,
    layers: tuple[int, ...] = (),
) -> DistillationObjective:
    """Distillation from the model of a folder, which computes in this precision.

    Args:
        layers: as of `DistillationObjective`; none: all layers pair in order, or the loss has no cosine.

    Raises:
        InputError: the models' layers do not pair and the loss has a cosine.
    """
    teacher = _load_frozen(folder, precision, device)
    return DistillationObjective(teacher, fingerprint(folder), paired_loss(loss, student, teacher.config, layers), layers)


def distillation_from(
    folder: Path,
    recipe: DistillationTraining,
    samples: Sequence[Sample],
    settings: TrainSettings,
    student: ModelConfig,
    *,
    device: torch.device,
    cache: Path,
    tick: Tick,
    layers: tuple[int, ...] = (),
) -> tuple[Objective, Sequence[Sample]]:
    """Distillation from the model of a folder, and the samples for it.

    With `recipe.teacher_top_k` the model is in memory only while a file in `cache` is written, and the samples bring what it says.

    Args:
        layers: as of `load_teacher`.

    Raises:
        InputError: the models' layers do not pair and the loss has a cosine, or the disk has no room for the file.
    """
    precision = settings.precision
    if recipe.teacher_top_k is None:
        return load_teacher(folder, recipe.loss, student, precision=precision, device=device, layers=layers), samples
    identity = fingerprint(folder)
    taught = taught_samples(
        samples,
        cache,
        lambda: _load_frozen(folder, precision, device),
        identity=identity,
        top_k=recipe.teacher_top_k,
        max_tokens=settings.max_tokens or student.max_positions,
        precision=precision,
        tick=tick,
    )
    return TopKDistillation(identity, recipe.teacher_top_k, "kl" if recipe.loss == "auto" else recipe.loss), taught


def _load_frozen(folder: Path, precision: str, device: torch.device) -> Transformer:
    return load_model(folder, TRAINING_PRECISIONS[precision], vector_dtype=torch.float32)[0].to(device).requires_grad_(False)


def merge_adapter_folder(
    adapter: Path, out: Path, rows: Path | None = None, *, base: Path | None = None, dtype: str = "fp32"
) -> dict[str, Any]:
    """Merge an adapter folder, as `merge_folder`, and with rows measure their mean loss before and after: SFT's, or a reward model's.

    Returns:
        What `merge_folder` tells. With rows also `loss`, all computed in fp32: of the base alone (a reward model's with the adapter's
        head), of the base with the adapter beside it, and of the folder that was stored; and the number of rows, and of those left
        out as too long or without a trained token.

    Raises:
        InputError: as `merge_folder`, or a row cannot be used.
    """
    if rows is None:
        return merge_folder(adapter, out, base=base, dtype=dtype)
    start = base_of(adapter) if base is None else base
    tokenizer = Tokenizer.load(start)
    form, rated = find_format("auto", tokenizer), is_reward_adapter(adapter)
    read = read_ratings(rows) if rated else read_demonstrations(rows)
    samples: Sequence[AnySample] = rated_samples(read, form, tokenizer) if rated else demonstration_samples(read, form, tokenizer)  # type: ignore[arg-type]
    data = ListData(samples, max_tokens=read_config(start)[1].max_positions)
    objective = reward_objective if rated else sft_objective
    facts = merge_folder(adapter, out, base=base, dtype=dtype)
    model = load_unmerged(adapter, base)
    check_vocabulary(model, data.items)
    with adapters_disabled():
        losses = {"base": mean_loss(model, objective, data)}
    losses["adapter"] = mean_loss(model, objective, data)
    del model
    losses["stored"] = mean_loss((load_reward if rated else load_model)(out)[0], objective, data)
    dropped = len(data.dropped_long) + len(data.dropped_untrained)
    return facts | {"loss": losses, "rows": len(read), "dropped": dropped}


@torch.no_grad()
def mean_loss(model: nn.Module, objective: Objective, data: ListData) -> float:
    """Mean loss of an objective over data."""
    model.eval()
    device = next(model.parameters()).device
    outputs = [objective(model, collate(group, device)) for group in split_micro_batches(data.items, MIN_MICRO_BATCH)]
    return sum(float(output.sum) for output in outputs) / max(1, sum(output.count for output in outputs))


def training_memory(
    config: ModelConfig, recipe: Training, device: torch.device, folder: Path | None = None, mesh: Mesh | None = None
) -> MemoryEstimate:
    """Memory of a training stage, whose micro-batches are the recipe's, those that the run of the folder has, or as large as fit.

    Of several processes it is that of the one that holds the most.

    Raises:
        InputError: none fit.
    """
    with torch.device("meta"):
        model = Transformer(config)
    if recipe.lora is not None:
        add_adapters(model, lora_config(recipe.lora), seed=0, base=recipe.lora.base)
    optimizer, precision = recipe.optimizer, recipe.precision
    tokens = recipe.micro_batch_tokens or recorded_micro_batch(folder)
    tokens = tokens or choose_micro_batch(model, optimizer, precision=precision, device=device, loaded=False, mesh=mesh)
    checkpoint = always_checkpointed(recipe.checkpoint_activations)
    return fitting(model, optimizer, precision=precision, tokens=tokens, device=device, loaded=False, checkpoint=checkpoint, mesh=mesh)


def lora_config(lora: Lora) -> LoraConfig:
    """What a recipe's section means.

    Raises:
        InputError: a target that is not adapted.
    """
    alpha = 2.0 * lora.rank if lora.alpha is None else lora.alpha
    return LoraConfig(rank=lora.rank, alpha=alpha, targets=lora.targets, rslora=lora.rslora, dora=lora.dora)
