"""Trainer: the one training loop of every objective, with exact resume and one global divisor a step.

Shape legend: see batches.py.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from gristmill.core.device import check_dtype, kept_heap, pick_device, trim_heap, zeros_outside_heap
from gristmill.core.errors import InputError
from gristmill.core.threads import MAX_THREADED_PARAMETERS, Map, num_workers, workers
from gristmill.model import fused
from gristmill.model.compiled import compiling
from gristmill.model.compiled_blocks import unchanged
from gristmill.model.fp8 import check_float8, computing_in_float8
from gristmill.model.packed import filled_length
from gristmill.model.transformer import TRAINING_PRECISIONS, Transformer
from gristmill.parallel.mesh import Group, Mesh, accumulate, whole
from gristmill.parallel.pipeline import Pipeline, num_micro_batches
from gristmill.train.arguments import TrainResult, TrainSettings
from gristmill.train.batch_plan import BatchPlan
from gristmill.train.batches import (
    AnySample,
    Batch,
    DataItem,
    collate,
    fills,
    fingerprint_samples,
    group_answers,
    share_out,
    split_micro_batches,
)
from gristmill.train.checkpoint import SHAPES, Checkpoint, CheckpointStore, Identity, fingerprint_model, fingerprint_text
from gristmill.train.data import ListData, SampleData, backbone, check_vocabulary, drop_long
from gristmill.train.memory import always_checkpointed, choose_micro_batch, fitting, record_micro_batch, recorded_micro_batch
from gristmill.train.metrics import LossOutput, MetricsLog, MetricSums
from gristmill.train.optim import Optimizer, OptimSettings, gradient_values, has_kernel, schedule_scale
from gristmill.train.settings import ramp_of
from gristmill.train.sharded import ShardedModel, read_parts

__all__ = ["LossOutput", "Objective", "OnStep", "TrainResult", "TrainSettings", "Trainer", "compute_precision", "global_count"]

Objective = Callable[[Any, Any], LossOutput]
OnStep = Callable[[int, int, dict[str, float]], None]


class Trainer:
    """Trains a model in place: one optimizer step at a time (`step`), or a whole plan with checkpoints and metrics (`fit`).

    Optimizer and checkpoints hold what is trained: of a model with adapters (`model.lora`), these alone.

    On several processes (`mesh`) each has its part of weights, gradients and optimizer states, and its share of every step's samples. Loss
    and gradients do not depend on their number, nor does a checkpoint. What `fit` trained is then `trainer.model`, whole again.

    Args:
        model: with fp32 weights, of which those that need a gradient are trained.
        objective: from model and micro-batch to a loss sum.
        device: where to train, as `pick_device` takes it; None for where the model is.
        folder: `fit` resumes from it and writes metrics and checkpoints to it.
        on_step: `fit` calls ``on_step(step, num_steps, metrics)`` after each step, counted from 1.
        mesh: the processes that train together; default this one alone.

    Raises:
        InputError: a weight is not fp32, or what several processes cannot train.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        settings: TrainSettings,
        *,
        device: torch.device | str | None = None,
        folder: Path | None = None,
        on_step: OnStep | None = None,
        mesh: Mesh | None = None,
    ) -> None:
        _check_fp32_weights(model)
        self.mesh = mesh or Mesh()
        self.model = model if device is None else model.to(pick_device(device))
        self.objective, self.settings, self.folder, self.on_step = objective, settings, folder, on_step
        self.device = next(model.parameters()).device
        check_dtype(self.device, TRAINING_PRECISIONS[settings.precision])
        check_float8(self.device, settings.precision)
        self.num_workers = num_workers(model) if self.mesh.size == 1 else 1
        self._fills = fills(self.device, settings.precision, self.num_workers)
        # Holes between activations count as memory that is held. They go back where it is scarce, before the loss, and nowhere else: new
        # pages took 6 % of a step's time.
        self._trims_heap = self.device.type == "cpu" and sum(p.numel() for p in model.parameters()) >= MAX_THREADED_PARAMETERS
        chosen = settings.micro_batch_tokens or recorded_micro_batch(folder)
        self.micro_batch_tokens = chosen or choose_micro_batch(
            model, settings.optimizer, precision=settings.precision, device=self.device, loaded=True, mesh=self.mesh
        )
        self.micro_batch_tokens = min(self.mesh.gather(self.micro_batch_tokens))
        self._checkpointed: bool | str = settings.checkpoint_activations if settings.checkpoint_activations != "auto" else False
        self.num_steps = settings.steps  # `fit` knows it of epochs too
        self._sharded: ShardedModel | None = None
        if self.mesh.size > 1:
            self._sharded = ShardedModel(self.model, objective, self.mesh)
            self.model = self._sharded.local
        names = ("optimizer", "lr", "muon_lr", "betas", "weight_decay", "b_lr_ratio")
        optim_settings = OptimSettings(**{name: getattr(settings, name) for name in names})
        self.optimizer = Optimizer(self.model, optim_settings, self.mesh, self.num_workers)
        self.result = TrainResult(0, 0, 0.0, {}, [], [])
        self._best: dict[str, Tensor] = {}
        self._best_loss = math.inf
        # memory outside the heap of gradients, and of matrices in the type that is computed in
        self._places: dict[Tensor, Tensor] = {}
        self._copies: dict[Tensor, Tensor] = {}
        self._used: set[Tensor] = set()  # those whose copies are computed with
        self._fresh: dict[Tensor, tuple[int, Tensor]] = {}  # those whose copies are up to date, with what tells of a change since
        self._map: Map | None = None

    def fit(self, data: Sequence[AnySample] | SampleData, validation: Sequence[AnySample] | SampleData = ()) -> TrainResult:
        """Train on all steps that the settings plan over the data; resume where the trainer's folder or `load_state` left off.

        A folder whose run has finished gives its weights and result at once. With ``validation`` data the mean
        loss over it is measured every ``validate_every`` steps, and the model ends with the weights of the
        lowest (the rule of the report's reward model). Gradients and optimizer states are let go before the last save.

        Raises InputError for data with nothing to train on, a folder that another run wrote, a full disk, or a
        loss that is no longer finite.
        """
        data = self._usable(data, self.result)
        held_out = self._usable(validation) if len(validation) else None
        settings = self.settings
        plan = BatchPlan(
            data.lengths,
            seed=settings.seed,
            epochs=settings.epochs,
            steps=settings.steps,
            batch_size=settings.batch_size,
            batch_tokens=settings.batch_tokens,
            shuffle=settings.shuffle,
            rows=data.rows if isinstance(data, ListData) else None,
        )
        self.num_steps = plan.num_steps
        longest = max(int(part.lengths.max()) for part in (data, held_out) if part is not None)
        checkpointed = fitting(
            self.model if self._sharded is None else self._sharded.skeleton,
            settings.optimizer,
            precision=settings.precision,
            tokens=self.micro_batch_tokens,
            device=self.device,
            loaded=True,
            checkpoint=always_checkpointed(settings.checkpoint_activations),
            longest=longest,
            mesh=self.mesh,
        ).checkpointed
        if settings.checkpoint_activations == "auto":
            self._checkpointed = any(self.mesh.gather(checkpointed))
        store = None
        if self.folder is not None:
            identity = self._identity(data, held_out)
            self.mesh.agree(asdict(identity), "models, data or settings")
            store = CheckpointStore(self.folder, identity, mesh=self.mesh)
            if self.mesh.is_writer:
                record_micro_batch(self.folder, self.micro_batch_tokens)
        gpus = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(gpus), self._running():
            if self.result.steps == 0:
                torch.manual_seed(settings.seed)
            saved = store.load() if store else None
            self.mesh.agree(None if saved is None else saved.step, "checkpoints")
            if saved is not None:
                self._take_state(saved, self._tensors_of(saved))
            if saved is None or not saved.finished:
                self._train(data, held_out, plan, store)
                self.optimizer.release()
                self._places, self._copies, self._used, self._fresh = {}, {}, set(), {}
                if self._best:
                    self._restore(self._best)
                    self._best = {}
                if store:
                    store.save(self.state(finished=True))
        if self._sharded is not None:
            self.model = self._sharded.assembled()
        return self.result

    def _usable(self, data: Sequence[AnySample] | SampleData, result: TrainResult | None = None) -> SampleData:
        """Data without what cannot be trained on, which is named in the result."""
        settings = self.settings
        if isinstance(data, Sequence):
            data = ListData(
                data,
                max_tokens=settings.max_tokens,
                max_answers=min(size for _, size in ramp_of(settings.batch_size or len(data))),
                max_group_tokens=min(self.micro_batch_tokens, settings.batch_tokens or math.inf),
            )
        usable, long = drop_long(data, None if isinstance(data, ListData) else settings.max_tokens)
        if isinstance(data, ListData):  # other data are checked as they are read
            check_vocabulary(self.model, data.items)
            long = data.dropped_long
        if result is not None:
            result.dropped_long = long
            result.dropped_untrained = data.dropped_untrained if isinstance(data, ListData) else []
        return usable

    def _identity(self, data: SampleData, validation: SampleData | None) -> Identity:
        # the interval of checkpoints changes nothing that is computed, so a run may be continued with another
        # (nor do activations that are computed twice)
        settings = asdict(self.settings) | {"checkpoint_every": None, "objective": _describe(self.objective)}
        settings["micro_batch_tokens"] = self.micro_batch_tokens
        del settings["checkpoint_activations"]
        if self.settings.b_lr_ratio == 1.0:  # as before there was one
            del settings["b_lr_ratio"]
        if not self.settings.compile:
            del settings["compile"]
        return Identity(
            self._sharded.started_from if self._sharded else fingerprint_model(self.model),
            data.fingerprint() if validation is None else _fingerprint_both(data, validation),
            fingerprint_text(json.dumps(settings, sort_keys=True)),
        )

    @contextmanager
    def _running(self) -> Iterator[None]:
        """The model in the settings' precision, and workers to share micro-batches out to."""
        self.model.train()
        backbone(self.model).checkpoint_activations = self._checkpointed
        backbone(self.model).after_blocks = trim_heap if self._trims_heap else None
        try:
            precision, compiled = compute_precision(self.model, self.settings.precision), compiling(self.settings.compile)
            with kept_heap(), precision, compiled, workers(self.num_workers) as self._map:
                yield
        finally:
            self._map = None
            backbone(self.model).checkpoint_activations = False
            backbone(self.model).after_blocks = None

    def _train(self, data: SampleData, validation: SampleData | None, plan: BatchPlan, store: CheckpointStore | None) -> None:
        log = MetricsLog(self.folder if self.mesh.is_writer else None, self.result.steps)
        before = self.result.seconds
        started = last_saved = time.monotonic()
        while self.result.steps < plan.num_steps:
            metrics = self.step([data[index] for index in plan.step(self.result.steps)])
            step = self.result.steps
            if validation is not None and (step % self.settings.validate_every == 0 or step == plan.num_steps):
                metrics["validation_loss"] = self._validate(validation)
            self.result.metrics = metrics
            now = time.monotonic()
            self.result.seconds = before + now - started
            log.write(step, metrics)
            if self.on_step and self.mesh.is_writer:
                self.on_step(step, plan.num_steps, metrics)
            every = self.settings.checkpoint_every
            if store and every and step < plan.num_steps and self.mesh.first(now - last_saved >= every):
                self._save(store)
                last_saved = time.monotonic()
            elif store:
                store.settle()
        log.close()

    def step(self, samples: Sequence[AnySample | DataItem] | Sequence[Batch]) -> dict[str, float]:
        """One optimizer step; returns its metrics. Between steps weights may be changed by any operation, but not by one on `.data`.

        Args:
            samples: those of the step, or its micro-batches on the model's device. All micro-batches of a step share one divisor.

        Raises:
            InputError: the loss is not finite (before any weight has changed), or a token is not in the model's vocabulary.
        """
        if self._map is None:
            with self._running():
                return self.step(samples)
        started = time.monotonic()
        scale = self._lr_scale()
        batches, fillers = self._micro_batches(samples)
        data = self.mesh.data
        count, num_tokens = global_count(batches, data)
        totals = MetricSums()
        plain = self._sharded is None or (self._sharded.is_replicated and self.mesh.dims.together == 1)
        in_place = self._in_place(len(batches) + len(fillers)) if plain and self.num_workers == 1 else nullcontext()
        decoder = backbone(self.model)
        with in_place, unchanged(decoder, self._map) if plain and isinstance(decoder, Transformer) else nullcontext():
            for output in self._backward(batches, fillers, count):
                totals.add(output)
        if self._sharded is not None:
            self._sharded.add_up_gradients()
        norm = self._grad_norm()
        metrics = totals.means(self.mesh)
        if not math.isfinite(metrics["loss"]) or not math.isfinite(norm):
            self.optimizer.zero_grad()
            raise InputError(
                f"the loss is {metrics['loss']} and the gradient norm {norm} at step {self.result.steps + 1}; "
                "lower the learning rate or look at the samples of that step"
            )
        self.optimizer.set_scale(scale)
        copies = {weight: self._copies[weight] for weight in self._used}
        self.optimizer.step(self._map, max_norm=self.settings.clip or math.inf, norm=norm, copies=copies)
        self._fresh = {weight: (weight._version, weight.detach()) for weight in copies}
        self.optimizer.zero_grad()
        self.result.steps += 1
        self.result.tokens += num_tokens
        seconds = time.monotonic() - started
        return metrics | {
            "lr": self.settings.lr * scale,
            "grad_norm": norm,
            "tokens": float(self.result.tokens),
            "tokens_per_second": num_tokens / seconds,
        }

    def _grad_norm(self) -> float:
        if isinstance(self.model, Pipeline):
            return self.model.grad_norm()
        assert self._map is not None

        def norm_of(share: Sequence[nn.Parameter]) -> Tensor:
            return nn.utils.get_total_norm([gradient_values(parameter) for parameter in share if parameter.grad is not None])

        norms = self._map(norm_of, self.optimizer.shares)
        return float(whole(norms[0])) if len(norms) == 1 else math.hypot(*map(float, norms))

    def _lr_scale(self) -> float:
        settings = self.settings
        if self.num_steps is None:
            raise InputError("the number of steps is not known before fit has seen the data; give steps instead of epochs")
        return schedule_scale(
            settings.schedule,
            self.result.steps,
            self.num_steps,
            warmup_steps=round(settings.warmup_ratio * self.num_steps) if settings.warmup_steps is None else settings.warmup_steps,
            min_lr_ratio=settings.min_lr_ratio,
        )

    def _micro_batches(self, samples: Sequence[AnySample | DataItem] | Sequence[Batch]) -> tuple[Sequence[Batch], Sequence[Batch]]:
        """This process's micro-batches of a step, and those that it computes only because another process has more."""
        if not samples:
            raise InputError("there is nothing to train on: the step has no samples")
        if not isinstance(samples[0], AnySample | DataItem):
            return cast(Sequence[Batch], samples), ()
        items = group_answers(cast(Sequence[AnySample | DataItem], samples), len(samples), self.micro_batch_tokens)
        check_vocabulary(self.model, items)
        return self._collated(items)

    def _collated(self, items: Sequence[DataItem]) -> tuple[Sequence[Batch], Sequence[Batch]]:
        assert self._map is not None
        batch_of = partial(collate, device=self.device, fill=self._fills)
        data = self.mesh.data
        if self.mesh.pipeline is not None:
            return self._collated_alike(items)
        if data.size == 1:
            return self._map(batch_of, split_micro_batches(items, self.micro_batch_tokens, self.num_workers)), ()
        shares = share_out(items, self.micro_batch_tokens, data.size)
        mine = shares[data.rank]
        num_fillers = max(map(len, shares)) - len(mine)
        filler = batch_of([min(items, key=lambda item: item.num_tokens)])
        return self._map(batch_of, mine), [filler] * num_fillers

    def _collated_alike(self, items: Sequence[DataItem]) -> tuple[Sequence[Batch], Sequence[Batch]]:
        """Micro-batches for a pipeline, filled up to the tokens of the largest: as many in all pipelines, and enough for all stages."""
        data, dims = self.mesh.data, self.mesh.dims
        longest = max(item.num_tokens for item in items)
        share = sum(item.num_tokens for item in items) // (data.size * num_micro_batches(1, dims))
        shares = share_out(items, min(self.micro_batch_tokens, max(share, longest)), data.size)
        mine = shares[data.rank]
        num_fillers = num_micro_batches(max(map(len, shares)), dims) - len(mine)
        shortest = [min(items, key=lambda item: item.num_tokens)]
        size = max(sum(item.num_tokens for item in group) for group in [*mine, shortest])
        batch_of = partial(collate, device=self.device, fill=filled_length(size) if self._fills else size)
        return [batch_of(group) for group in mine], [batch_of(shortest)] * num_fillers

    def _backward(self, batches: Sequence[Batch], fillers: Sequence[Batch], count: int) -> Iterator[LossOutput]:
        """Add the gradients of all micro-batches, in their order. Each worker makes its own: there is only one `.grad` to add to.

        Processes that share weights compute equally often, so one with fewer micro-batches goes on with fillers, which count nothing.
        """
        if isinstance(self.model, Pipeline):
            yield from self.model.run([*batches, *fillers], len(fillers), count)
            return
        if self.num_workers == 1:
            for number, batch in enumerate([*batches, *fillers]):
                accumulate(self.model, last=number == len(batches) + len(fillers) - 1)
                output = self.objective(self.model, batch)
                is_filler = number >= len(batches)
                (output.sum * 0 if is_filler else output.sum / count).backward()
                if not is_filler:
                    yield output
            return
        assert self._map is not None
        parameters = self.optimizer.parameters
        made: list[dict[nn.Parameter, Tensor]] = []

        def gradients(batch: Batch) -> tuple[LossOutput, dict[nn.Parameter, Tensor]]:
            output = self.objective(self.model, batch)
            grads = torch.autograd.grad(output.sum / count, parameters, allow_unused=True)
            return output, {parameter: grad for parameter, grad in zip(parameters, grads, strict=True) if grad is not None}

        def add_up(share: Sequence[nn.Parameter]) -> None:
            for grads in made:
                later = [parameter for parameter in share if parameter in grads and parameter.grad is not None]
                if later:
                    torch._foreach_add_([cast(Tensor, parameter.grad) for parameter in later], [grads[parameter] for parameter in later])
                for parameter in share:
                    if parameter.grad is None:
                        parameter.grad = grads.get(parameter)

        for start in range(0, len(batches), self.num_workers):
            outputs, made[:] = zip(*self._map(gradients, batches[start : start + self.num_workers]), strict=True)
            self._map(add_up, self.optimizer.shares)
            yield from outputs

    @contextmanager
    def _in_place(self, num_batches: int) -> Iterator[None]:
        """Add gradients in place. Those that others will be added to lie outside the heap, else they were scattered over what activations
        leave there, and in every step at the same place, since new pages cost as much as a small micro-batch. So do copies of matrices.
        """
        parameters, dtype = self.optimizer.parameters, TRAINING_PRECISIONS[self.settings.precision]
        if num_batches > 1 and self.device.type == "cpu" and not self._places:
            self._places = dict(zip(parameters, zeros_outside_heap(parameters), strict=True))
        if self.device.type == "cpu" and dtype != torch.float32 and not self._copies:
            matrices = [parameter for parameter in parameters if parameter.ndim == 2]
            self._copies = dict(zip(matrices, zeros_outside_heap(matrices, dtype), strict=True))

        def move(parameter: Tensor) -> None:
            place = self._places[parameter]
            if parameter.grad is not None and parameter.grad is not place and not parameter.grad.is_sparse:
                parameter.grad = place.copy_(parameter.grad)

        hooks = [parameter.register_post_accumulate_grad_hook(move) for parameter in self._places]
        try:
            # torch counts what writes to a weight; one with other memory has another address, since the old is held
            fresh = [w for w, (version, held) in self._fresh.items() if (w._version, w.data_ptr()) == (version, held.data_ptr())]
            sparse = self.mesh.size == 1 and all(map(has_kernel, parameters))
            with fused.accumulating_in_place(parameters, self._places, self._copies, fresh, sparse=sparse) as copied:
                yield
                self._used = {*fresh, *copied}
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def _validate(self, data: SampleData) -> float:
        """Mean loss over the validation data; keeps a copy of the weights when it is the lowest so far."""
        assert self._map is not None
        self.model.eval()
        totals = MetricSums()
        batches, fillers = self._collated([data[index] for index in range(len(data))])
        if isinstance(self.model, Pipeline):
            outputs = self.model.run([*batches, *fillers], len(fillers), 1, backward=False)
        else:
            outputs = self._map(torch.no_grad()(lambda batch: self.objective(self.model, batch)), [*batches, *fillers])[: len(batches)]
        for output in outputs:
            totals.add(output)
        self.model.train()
        loss = totals.means(self.mesh)["loss"]
        if loss < self._best_loss:
            self._best_loss, self.result.best_step = loss, self.result.steps
            self._best = {name: tensor.clone() for name, tensor in self._trained().items()}
        return loss

    def _trained(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def _restore(self, trained: dict[str, Tensor]) -> None:
        if self._sharded is not None:
            self._sharded.restore(trained)
        else:
            self.model.load_state_dict(self.model.state_dict() | trained)

    def _save(self, store: CheckpointStore) -> None:
        """Write a checkpoint: of several processes, all do, and training goes on meanwhile."""
        if self._sharded is None or self._sharded.is_padded or self._sharded.is_replicated:
            store.save(self.state())
            return
        store.begin(self.state(whole=False))

    def _tensors_of(self, saved: Checkpoint) -> dict[str, Tensor]:
        if saved.shards is None:
            return saved.tensors
        return read_parts(saved.shards, saved.info[SHAPES], dict(self.model.named_parameters()))

    def state(self, *, finished: bool = False, whole: bool = True) -> Checkpoint:
        """All that the next step depends on: weights, optimizer, random state and counts; when finished, only what is asked for later.

        Args:
            whole: tensors of all processes, which the first one has then; else this one's parts, of a sharded checkpoint.
        """
        tensors = _prefixed("model", self._trained())
        if not finished:
            tensors |= _prefixed("best", self._best) | _prefixed("optimizer", self.optimizer.state_tensors())
        best_loss = self._best_loss if math.isfinite(self._best_loss) else None
        info: dict[str, Any] = {"result": asdict(self.result), "best_loss": best_loss}
        if self._sharded is not None and not whole:  # nothing is random there but initial weights
            tensors, info[SHAPES] = self._sharded.own(tensors)
            return Checkpoint(self.result.steps, finished, info, tensors)
        if self._sharded is not None:  # all take part, and one keeps what it will write
            tensors = {name: tensor.cpu() for name, tensor in self._sharded.gathered(tensors) if self.mesh.is_writer}
        if not finished:
            tensors["rng"] = torch.get_rng_state()
            if self.device.type == "cuda":
                tensors["rng_cuda"] = torch.cuda.get_rng_state(self.device)
        return Checkpoint(self.result.steps, finished, info, tensors)

    def load_state(self, saved: Checkpoint) -> None:
        """Continue from what `state` gave, on whichever device it was made. The tensors are copied."""
        self._take_state(saved, dict(saved.tensors))

    def _take_state(self, saved: Checkpoint, tensors: dict[str, Tensor]) -> None:
        """Copy the state out of tensors, each of which is let go as it is copied: there is no room for all of them twice."""
        self._restore(_unprefixed("model", tensors))
        self.result = TrainResult(**saved.info["result"])
        if saved.finished:
            return
        self._best, optimizer = _unprefixed("best", tensors), _unprefixed("optimizer", tensors)
        if self._sharded is not None:
            self._best = self._sharded.parts_of(self._best) if self._best else {}
            optimizer = self._sharded.with_tied(optimizer)
        self._best_loss = math.inf if saved.info["best_loss"] is None else saved.info["best_loss"]
        self.optimizer.load_state_tensors(optimizer)
        if saved.shards is None:
            torch.set_rng_state(saved.tensors["rng"].cpu())
        if self.device.type == "cuda" and "rng_cuda" in saved.tensors:
            torch.cuda.set_rng_state(saved.tensors["rng_cuda"].cpu(), self.device)


def _fingerprint_both(data: SampleData, validation: SampleData) -> str:
    if isinstance(data, ListData) and isinstance(validation, ListData):
        return fingerprint_samples([*data.items, *validation.items])
    return fingerprint_text(f"{data.fingerprint()} {validation.fingerprint()}")


def global_count(batches: Sequence[Batch], mesh: Group | None = None) -> tuple[int, int]:
    """The one divisor of a step, trained terms over the micro-batches of all processes, at least 1; and the step's tokens."""
    counts = (mesh or Group()).gather([sum(batch.count for batch in batches), sum(batch.num_tokens for batch in batches)])
    return max(1, sum(count for count, _ in counts)), sum(tokens for _, tokens in counts)


def _check_fp32_weights(model: nn.Module) -> None:
    """InputError unless every trained weight is fp32: a bf16 weight near 1 does not move at small learning rates."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            raise InputError(f"{name} is {parameter.dtype}; load the model in fp32 (precision bf16 still computes in bf16)")


@contextmanager
def compute_precision(model: nn.Module, precision: str) -> Iterator[None]:
    """Let the model compute in ``precision`` meanwhile; its fp32 weights stay as they are."""
    decoder = backbone(model)
    before = decoder.compute_dtype
    decoder.compute_dtype = TRAINING_PRECISIONS[precision]
    try:
        with computing_in_float8(decoder.decoders if isinstance(decoder, Pipeline) else [decoder], precision):
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
    """Take what has a prefix out of tensors."""
    start = f"{prefix}|"
    return {name.removeprefix(start): tensors.pop(name) for name in list(tensors) if name.startswith(start)}
