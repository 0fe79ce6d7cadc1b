"""The one training loop: every objective runs in it, resumes exactly, and is divided by one global count.

Shape legend: see packing.py.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gristmill.core.errors import InputError
from gristmill.core.io import disk_errors
from gristmill.core.threads import Map, num_workers, workers
from gristmill.model.transformer import PRECISIONS
from gristmill.train.batches import (
    AnySample,
    Batch,
    BatchPlan,
    RatedGroup,
    Unit,
    collate,
    fingerprint_samples,
    group_rated,
    parts_of,
    split_micro_batches,
)
from gristmill.train.checkpoint import Checkpoint, CheckpointStore, Identity, fingerprint_model, fingerprint_text
from gristmill.train.optim import SCHEDULES, Optimizer, OptimSettings, schedule_scale


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
    warmup_steps: int = 0
    min_lr_ratio: float = 0.0  # of the peak, reached on the last step
    epochs: float | None = None
    steps: int | None = None
    batch_size: int | None = None  # samples a step
    batch_tokens: int | None = None  # tokens a step, on average
    micro_batch_tokens: int = 8192  # memory bound: tokens that go through the model at once
    max_tokens: int | None = None  # longer samples are dropped and counted
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0  # largest gradient norm; 0 does not clip
    seed: int = 0
    shuffle: bool = True  # False: samples in the order given
    precision: str = "fp32"  # "fp32" or "bf16"
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
            if value is not None and not value > 0:
                raise InputError(f"{name} is {value}; it must be above zero")
        if self.schedule not in SCHEDULES:
            raise InputError(f"unknown schedule {self.schedule!r}; choose one of {', '.join(SCHEDULES)}")
        if self.precision not in PRECISIONS:
            raise InputError(f"unknown precision {self.precision!r}; choose one of {', '.join(PRECISIONS)}")


@dataclass(frozen=True)
class LossOutput:
    """What an objective returns: a loss sum over ``count`` terms, and named metrics as (sum, count)."""

    sum: Tensor
    count: int
    metrics: Mapping[str, tuple[Tensor | float, float]] = field(default_factory=dict)


Objective = Callable[[Any, Any], LossOutput]
OnStep = Callable[[int, int, dict[str, float]], None]


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


def train(
    model: nn.Module,
    objective: Objective,
    samples: Sequence[AnySample],
    settings: TrainSettings,
    folder: Path | None = None,
    *,
    validation: Sequence[AnySample] = (),
    on_step: OnStep | None = None,
) -> TrainResult:
    """Train ``model`` in place; with a ``folder``, resume from it and write metrics and checkpoints to it.

    A folder whose run has finished gives its weights and result at once. With ``validation`` data the mean
    loss over it is measured every ``validate_every`` steps, and the model ends with the weights of the
    lowest (the rule of the report's reward model). ``on_step(step, total_steps, metrics)`` is called after
    each step, counted from 1.

    Raises InputError for data with nothing to train on, a folder that another run wrote, a full disk, or a
    loss that is no longer finite.
    """
    return _Run(model, objective, samples, settings, folder, validation, on_step).run()


class _Run:
    """The state of one call of ``train``."""

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        samples: Sequence[AnySample],
        settings: TrainSettings,
        folder: Path | None,
        validation: Sequence[AnySample],
        on_step: OnStep | None,
    ) -> None:
        self.model, self.objective, self.settings, self.on_step = model, objective, settings, on_step
        usable, long, untrained = _usable(samples, settings.max_tokens)
        valid, _, _ = _usable(validation, settings.max_tokens) if validation else ([], [], [])
        self.samples, self.validation = (
            group_rated(some, settings.batch_size or len(some), min(settings.micro_batch_tokens, settings.batch_tokens or math.inf))
            for some in (usable, valid)
        )
        check_vocabulary(model, [*self.samples, *self.validation])
        _check_masters(model)
        self.device = next(model.parameters()).device
        self.num_workers = num_workers(model)
        self.map: Map
        self.plan = BatchPlan(
            [sample.num_tokens for sample in self.samples],
            seed=settings.seed,
            epochs=settings.epochs,
            steps=settings.steps,
            batch_size=settings.batch_size,
            batch_tokens=settings.batch_tokens,
            shuffle=settings.shuffle,
            rows=[len(sample.answers) if isinstance(sample, RatedGroup) else 1 for sample in self.samples],
        )
        names = ("optimizer", "lr", "muon_lr", "betas", "weight_decay")
        self.optimizer = Optimizer(model, OptimSettings(**{name: getattr(settings, name) for name in names}))
        self.result = TrainResult(0, 0, 0.0, {}, long, untrained)
        self.best: dict[str, Tensor] = {}
        self.best_loss = math.inf
        self.folder = folder
        self.store = CheckpointStore(folder, self._identity()) if folder is not None else None

    def _identity(self) -> Identity:
        # the interval of checkpoints changes nothing that is computed, so a run may be continued with another
        settings = asdict(self.settings) | {"checkpoint_every": None, "objective": _describe(self.objective)}
        return Identity(
            fingerprint_model(self.model),
            fingerprint_samples([*self.samples, *self.validation]),
            fingerprint_text(json.dumps(settings, sort_keys=True)),
        )

    def run(self) -> TrainResult:
        with (
            torch.random.fork_rng(),
            compute_precision(self.model, self.settings.precision),
            workers(self.num_workers) as self.map,
        ):
            torch.manual_seed(self.settings.seed)
            saved = self.store.load() if self.store else None
            if saved is not None:
                self._restore(saved)
                if saved.finished:
                    return self.result
            self._train()
            if self.best:
                self.model.load_state_dict(self.best)
            self._save(finished=True)
        return self.result

    def _train(self) -> None:
        log = MetricsLog(self.folder, self.result.steps)
        self.model.train()
        before = self.result.seconds
        started = last_saved = time.monotonic()
        while self.result.steps < self.plan.num_steps:
            metrics = self._step(self.result.steps)
            self.result.steps += 1
            step = self.result.steps
            if self.validation and (step % self.settings.validate_every == 0 or step == self.plan.num_steps):
                metrics["validation_loss"] = self._validate()
            self.result.metrics = metrics
            now = time.monotonic()
            self.result.seconds = before + now - started
            log.write(step, metrics)
            if self.on_step:
                self.on_step(step, self.plan.num_steps, metrics)
            every = self.settings.checkpoint_every
            if every and now - last_saved >= every and step < self.plan.num_steps:
                self._save(finished=False)
                last_saved = time.monotonic()
        log.close()

    def _step(self, step: int) -> dict[str, float]:
        """One optimizer step on the samples that the plan names."""
        started = time.monotonic()
        chosen = [self.samples[index] for index in self.plan.step(step)]
        groups = split_micro_batches(chosen, self.settings.micro_batch_tokens, self.num_workers)
        batches = self.map(lambda group: collate(group, self.device), groups)
        totals = _Totals()
        for output in self._backward(batches, global_count(batches)):
            totals.add(output)
        parameters = self.optimizer.parameters
        norm = float(nn.utils.clip_grad_norm_(parameters, self.settings.clip or math.inf))
        metrics = totals.means()
        if not math.isfinite(metrics["loss"]) or not math.isfinite(norm):
            raise InputError(
                f"the loss is {metrics['loss']} and the gradient norm {norm} at step {step + 1}; "
                "lower the learning rate or look at the samples of that step"
            )
        settings = self.settings
        scale = schedule_scale(settings.schedule, step, self.plan.num_steps, settings.warmup_steps, settings.min_lr_ratio)
        self.optimizer.set_scale(scale)
        self.optimizer.step()
        self.optimizer.zero_grad()
        num_tokens = sum(batch.num_tokens for batch in batches)
        self.result.tokens += num_tokens
        seconds = time.monotonic() - started
        return metrics | {
            "lr": settings.lr * scale,
            "grad_norm": norm,
            "tokens": float(self.result.tokens),
            "tokens_per_second": num_tokens / seconds,
        }

    def _backward(self, batches: Sequence[Batch], count: int) -> Iterator[LossOutput]:
        """Add the gradients of all micro-batches, in their order. Each worker makes its own: there is only one `.grad` to add to."""
        if self.num_workers == 1:
            for batch in batches:
                output = self.objective(self.model, batch)
                (output.sum / count).backward()
                yield output
            return
        parameters = self.optimizer.parameters

        def gradients(batch: Batch) -> tuple[LossOutput, tuple[Tensor | None, ...]]:
            output = self.objective(self.model, batch)
            return output, torch.autograd.grad(output.sum / count, parameters, allow_unused=True)

        for start in range(0, len(batches), self.num_workers):
            for output, grads in self.map(gradients, batches[start : start + self.num_workers]):
                for parameter, grad in zip(parameters, grads, strict=True):
                    if grad is not None:
                        parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)
                yield output

    @torch.no_grad()
    def _validate(self) -> float:
        """Mean loss over the validation data; keeps a copy of the weights when it is the lowest so far."""
        self.model.eval()
        totals = _Totals()
        groups = split_micro_batches(self.validation, self.settings.micro_batch_tokens, self.num_workers)
        for output in self.map(torch.no_grad()(lambda group: self.objective(self.model, collate(group, self.device))), groups):
            totals.add(output)
        self.model.train()
        loss = totals.means()["loss"]
        if loss < self.best_loss:
            self.best_loss, self.result.best_step = loss, self.result.steps
            self.best = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        return loss

    def _save(self, *, finished: bool) -> None:
        if self.store is None:
            return
        tensors = _prefixed("model", self.model.state_dict())
        if not finished:
            tensors |= _prefixed("best", self.best) | _prefixed("optimizer", self.optimizer.state_tensors())
            tensors["rng"] = torch.get_rng_state()
        best_loss = self.best_loss if math.isfinite(self.best_loss) else None
        info = {"result": asdict(self.result), "best_loss": best_loss}
        self.store.save(Checkpoint(self.result.steps, finished, info, tensors))

    def _restore(self, saved: Checkpoint) -> None:
        self.model.load_state_dict(_unprefixed("model", saved.tensors))
        self.result = TrainResult(**saved.info["result"])
        if saved.finished:
            return
        self.best = _unprefixed("best", saved.tensors)
        self.best_loss = math.inf if saved.info["best_loss"] is None else saved.info["best_loss"]
        state = _unprefixed("optimizer", saved.tensors)
        self.optimizer.load_state_tensors({name: tensor.to(self.device) for name, tensor in state.items()})
        torch.set_rng_state(saved.tensors["rng"])


class _Totals:
    """Sums and counts of a loss and its metrics over micro-batches."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor | float] = {}
        self._counts: dict[str, float] = {}

    def add(self, output: LossOutput) -> None:
        loss = {"loss": (output.sum.detach(), float(output.count))}
        for name, (value, count) in {**output.metrics, **loss}.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0.0) + count

    def means(self) -> dict[str, float]:
        return {name: float(total) / max(self._counts[name], 1) for name, total in self._sums.items()}


class MetricsLog:
    """``metrics.jsonl`` and TensorBoard events in a folder; nowhere without one.

    A resumed run first cuts off the lines of steps that it will do again.
    """

    def __init__(self, folder: Path | None, resumed_step: int) -> None:
        self._folder = folder
        if folder is None:
            return
        # TensorBoard is heavy to import, so only a run that writes pays for it
        from torch.utils.tensorboard import SummaryWriter

        path = folder / "metrics.jsonl"
        with disk_errors(folder):
            lines = path.read_text().splitlines() if path.exists() else []
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= resumed_step]
            path.write_text("".join(line + "\n" for line in kept))
            self._file = path.open("a")
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_step + 1)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        if self._folder is None:
            return
        with disk_errors(self._folder):
            self._file.write(json.dumps({"step": step} | metrics) + "\n")
            self._file.flush()
            for name, value in metrics.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        if self._folder is not None:
            with disk_errors(self._folder):
                self._file.close()
                self._board.close()


def global_count(batches: Sequence[Batch]) -> int:
    """The one divisor of a step: trained terms over all its micro-batches, at least 1.

    Every reduction over processes belongs here and nowhere else.
    """
    return max(1, sum(batch.count for batch in batches))


def _usable(samples: Sequence[AnySample], max_tokens: int | None) -> tuple[list[AnySample], list[str], list[str]]:
    """Samples that fit and have a trained target, and the names of those that are too long or have none."""
    usable: list[AnySample] = []
    long: list[str] = []
    untrained: list[str] = []
    for position, sample in enumerate(samples):
        name = sample.id or f"#{position}"
        if max_tokens is not None and max(part.num_tokens for part in parts_of(sample)) > max_tokens:
            long.append(name)
        elif sample.num_targets == 0:
            untrained.append(name)
        else:
            usable.append(sample)
    if usable:
        return usable, long, untrained
    if untrained:
        raise InputError(
            f"there is nothing to train on: sample {untrained[0]} has no trained target, nor has any other; "
            "mark what the model shall learn (assistant turns, or at least one label)"
        )
    if long:
        raise InputError(f"there is nothing to train on: sample {long[0]} and all others are over {max_tokens} tokens")
    raise InputError("there is nothing to train on: the data set is empty")


def check_vocabulary(model: nn.Module, samples: Sequence[AnySample | Unit]) -> None:
    """InputError when a token id is outside the model's vocabulary: the data are of another tokenizer."""
    vocab_size = backbone(model).config.vocab_size
    for position, sample in enumerate(samples):
        for part in parts_of(sample):
            highest = int(np.max(part.ids))
            if highest >= vocab_size:
                raise InputError(
                    f"sample {sample.id or f'#{position}'} has token {highest} but the model has "
                    f"{vocab_size}; encode the data with the model's own tokenizer"
                )


def _check_masters(model: nn.Module) -> None:
    """InputError unless every weight is fp32: a bf16 weight near 1 does not move at small learning rates."""
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32:
            raise InputError(f"{name} is {parameter.dtype}; load the model in fp32 (precision bf16 still computes in bf16)")


def backbone(model: nn.Module) -> Any:
    """The Transformer inside a model (a reward model holds one; a Transformer is its own)."""
    return getattr(model, "backbone", model)


@contextmanager
def compute_precision(model: nn.Module, precision: str) -> Iterator[None]:
    """Let the model compute in ``precision`` meanwhile; its fp32 weights stay as they are."""
    decoder = backbone(model)
    before = decoder.compute_dtype
    decoder.compute_dtype = PRECISIONS[precision]
    try:
        yield
    finally:
        decoder.compute_dtype = before


def _describe(objective: Objective) -> str:
    """A text that differs between objectives, and between settings of one objective."""
    if is_dataclass(objective):
        return repr(objective)
    return str(getattr(objective, "__qualname__", type(objective).__qualname__))


def _prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}|{name}": tensor for name, tensor in tensors.items()}


def _unprefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    start = f"{prefix}|"
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
