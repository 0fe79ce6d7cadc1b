"""The loop: one global count, fp32 masters, dropped samples, metrics, validation."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gristmill.core.errors import InputError
from gristmill.model import fused
from gristmill.model.config import ModelConfig, uniform_blocks
from gristmill.model.kernels import library as kernels
from gristmill.model.transformer import Transformer
from gristmill.train.batch_plan import BatchPlan
from gristmill.train.batches import RatedGroup, RatedSample, Sample, TokenBatch, collate, collate_tokens, split_micro_batches
from gristmill.train.checkpoint import Checkpoint, CheckpointStore
from gristmill.train.objectives.next_token import next_token_objective
from gristmill.train.optim import AdamW, Optimizer
from gristmill.train.trainer import LossOutput, Trainer, TrainSettings, compute_precision, global_count

Make = Callable[..., Transformer]
MakeSamples = Callable[..., list[Sample]]
CPU = torch.device("cpu")
ONE_STEP = TrainSettings(steps=1, batch_size=12, schedule="constant", clip=0.0)


def gradients(model: Transformer, samples: list[Sample], micro_batch_tokens: int) -> dict[str, Tensor]:
    batches = [collate_tokens(group, CPU) for group in split_micro_batches(samples, micro_batch_tokens)]
    count, _ = global_count(batches)
    model.zero_grad()
    for batch in batches:
        (next_token_objective(model, batch).sum / count).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}  # type: ignore[union-attr]


def test_accumulation_gives_one_gradient(make_model: Make, make_samples: MakeSamples) -> None:
    model, samples = make_model(), make_samples(16)
    # documents apart, each in its own micro-batch, are the hardest case
    total = sum(sample.num_tokens for sample in samples)
    whole = gradients(model, samples, total)
    for limit in (total // 2 + 24, total // 4 + 24, 1):
        for name, gradient in gradients(model, samples, limit).items():
            torch.testing.assert_close(gradient, whole[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_where_gradients_and_states_lie_changes_nothing(
    make_model: Make, make_samples: MakeSamples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    torch.set_num_threads(1)  # with several workers gradients are added up elsewhere
    samples, settings = make_samples(16), TrainSettings(optimizer=optimizer, steps=3, batch_size=8, micro_batch_tokens=60)
    models, places = [make_model(), make_model()], []
    moved = Trainer(models[0], next_token_objective, settings)

    def look(model: Transformer, batch: Any) -> LossOutput:
        places.append([parameter.grad.data_ptr() for parameter in model.parameters() if parameter.grad is not None])
        return next_token_objective(model, batch)

    moved.objective = look
    moved.fit(samples)
    spans = [max(found) - min(found) for found in places if found]
    assert spans and max(spans) < sum(parameter.nbytes for parameter in models[0].parameters())  # side by side
    monkeypatch.setattr("gristmill.train.trainer.zeros_outside_heap", lambda like: [torch.full_like(one, math.nan) for one in like])
    monkeypatch.setattr("gristmill.train.optim.zeros_outside_heap", lambda like: [torch.zeros_like(one) for one in like])
    Trainer(models[1], next_token_objective, settings).fit(samples)
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models), strict=True))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_copies_that_the_optimizer_wrote_are_computed_with_while_weights_are_theirs(
    make_model: Make, make_samples: MakeSamples, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    torch.set_num_threads(1)
    samples, ends = make_samples(6), []
    settings = TrainSettings(optimizer=optimizer, lr=1e-2, steps=4, batch_size=6, micro_batch_tokens=60, precision="bf16")
    for never_fresh in (False, True):
        model = make_model()
        trainer = Trainer(model, next_token_objective, settings)
        other = Trainer(model, next_token_objective, settings)  # which steps in turn
        copied: list[int] = []
        for step in range(4):
            if never_fresh:
                trainer._fresh, other._fresh = {}, {}
            copied.append(len(trainer._fresh))
            trainer.step(samples)
            if step == 1:
                other.step(samples)
            with torch.no_grad():  # somebody else changes weights
                model.blocks["0"].mlp.up.weight.mul_(1.5 if step == 1 else 1.0)
                if step == 2:
                    model.blocks["1"].mlp.up.weight.data = model.blocks["1"].mlp.up.weight.data * 1.5
        ends.append([parameter.detach().clone() for parameter in model.parameters()])
        assert copied[0] == 0 and (copied[1] == 0) == never_fresh
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize(("precision", "threads"), [("fp32", 1), ("bf16", 1), ("fp32", 2)])
def test_batches_in_fp32_of_a_single_worker_are_not_filled_up(make_model: Make, precision: str, threads: int) -> None:
    torch.set_num_threads(threads)
    extra: list[int] = []

    def look(model: Transformer, batch: TokenBatch) -> LossOutput:
        extra.append(len(batch.ids_T) - batch.num_tokens)
        return next_token_objective(model, batch)

    samples = [Sample([3] * 97, [True] * 97)] * 2
    Trainer(make_model(), look, replace(ONE_STEP, batch_size=2, micro_batch_tokens=194, precision=precision)).fit(samples, samples)
    assert all(extra) == any(extra) == (precision == "bf16" or threads == 2)


def test_a_large_model_gives_holes_back_before_each_loss(
    make_model: Make, make_samples: MakeSamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    samples, settings, calls = make_samples(16), replace(ONE_STEP, batch_size=16, micro_batch_tokens=60), []
    models = [make_model(), make_model()]
    Trainer(models[0], next_token_objective, settings).step(samples)
    monkeypatch.setattr("gristmill.train.trainer.MAX_THREADED_PARAMETERS", 0)
    monkeypatch.setattr("gristmill.train.trainer.trim_heap", lambda: calls.append(1))
    Trainer(models[1], next_token_objective, settings).step(samples)
    assert len(calls) == len(split_micro_batches(samples, 60)) and models[1].after_blocks is None
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models), strict=True))


def test_the_last_save_finds_gradients_and_states_gone(
    make_model: Make, make_samples: MakeSamples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(make_model(), next_token_objective, TrainSettings(steps=2, batch_size=8), folder=tmp_path)
    held: list[int] = []
    save = CheckpointStore.save

    def look(store: CheckpointStore, checkpoint: Checkpoint) -> None:
        held.append(len(trainer.optimizer.state_tensors()))
        save(store, checkpoint)

    monkeypatch.setattr(CheckpointStore, "save", look)
    trainer.fit(make_samples(16))
    assert held == [0] and all(parameter.grad is None for parameter in trainer.model.parameters())


def test_several_workers_train_the_same_model(make_model: Make, make_samples: MakeSamples, tmp_path: Path) -> None:
    samples, settings = make_samples(16), TrainSettings(lr=1e-2, steps=3, batch_size=8, micro_batch_tokens=60)
    models = [make_model(), make_model()]
    for model, threads in zip(models, (1, 3), strict=True):
        torch.set_num_threads(threads)
        results = Trainer(model, next_token_objective, settings).fit(samples, make_samples(4, seed=1))
        assert torch.get_num_threads() == threads
        assert results.metrics["validation_loss"] > 0
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_fully_masked_samples_change_nothing(make_model: Make, make_samples: MakeSamples) -> None:
    samples = make_samples(12)
    masked = [Sample(s.ids, [False] * s.num_tokens, f"masked {s.id}") for s in make_samples(5, seed=9)]
    results = []
    for data in (samples, [*samples, *masked]):
        model = make_model()
        result = Trainer(model, next_token_objective, ONE_STEP).fit(data)
        results.append((result, model.state_dict()))
    assert results[0][0].metrics["loss"] == results[1][0].metrics["loss"]
    assert results[1][0].dropped_untrained == [sample.id for sample in masked]
    for name, value in results[0][1].items():
        assert torch.equal(value, results[1][1][name])
    # and beside trained samples in one batch they do not enter the divisor
    model = make_model()
    alone, beside = gradients(model, samples, 10_000), gradients(model, [*samples, *masked], 10_000)
    for name, gradient in alone.items():
        torch.testing.assert_close(gradient, beside[name], rtol=1e-6, atol=1e-6)


def test_an_all_masked_batch_has_zero_loss_and_gradient(make_model: Make, make_samples: MakeSamples) -> None:
    masked = [Sample(s.ids, [False] * s.num_tokens) for s in make_samples(3)]
    model = make_model()
    batch = collate_tokens(masked, CPU)
    assert next_token_objective(model, batch).sum.item() == 0 and global_count([batch])[0] == 1
    assert all(float(gradient.abs().max()) == 0 for gradient in gradients(model, masked, 1000).values())


def test_packed_logprobs_are_the_separate_ones(make_model: Make, make_samples: MakeSamples) -> None:
    model, samples = make_model(), make_samples(6, seed=3)
    for order in ([0, 1, 2, 3, 4, 5], [5, 0, 3, 1, 4, 2]):
        packed = collate_tokens([samples[i] for i in order], CPU)
        together = next_token_objective(model, packed)
        apart = [next_token_objective(model, collate_tokens([samples[i]], CPU)) for i in order]
        separate_sum = sum(out.sum.item() for out in apart)
        assert together.sum.item() == pytest.approx(separate_sum, abs=1e-4)
        logits = model.logits(model.hidden(packed.ids_T, packed.shape))
        alone = [collate_tokens([samples[i]], CPU) for i in order]
        separate = torch.cat([model.logits(model.hidden(batch.ids_T, batch.shape)) for batch in alone])
        torch.testing.assert_close(logits.log_softmax(-1), separate.log_softmax(-1), rtol=0, atol=1e-5)


def test_two_forward_passes_are_identical(make_model: Make, make_samples: MakeSamples) -> None:
    model, batch = make_model(), collate_tokens(make_samples(4), CPU)
    model.train()
    assert torch.equal(next_token_objective(model, batch).sum, next_token_objective(model, batch).sum)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_parameter_moves_in_bf16(make_model: Make, make_samples: MakeSamples, optimizer: str) -> None:
    model = make_model()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)  # where bf16 weights would stay for ever at this learning rate
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings = TrainSettings(optimizer=optimizer, lr=1e-6, muon_lr=1e-6, weight_decay=0.0, steps=1, batch_size=32, precision="bf16")
    Trainer(model, next_token_objective, settings).fit(make_samples(32))
    assert model.compute_dtype == torch.float32
    for name, value in model.state_dict().items():
        assert value.dtype == torch.float32
        moved = (value != before[name]).float().mean()
        # Adam's first step is the whole learning rate wherever there is a gradient: not in rows of the
        # embedding whose token is never an input
        assert moved > (0.9 if "embedding" in name else 0.95), (name, float(moved))


def test_bf16_loss_is_near_the_fp32_one(make_model: Make, make_samples: MakeSamples) -> None:
    model, batch = make_model(), collate_tokens(make_samples(8), CPU)
    exact = next_token_objective(model, batch)
    with compute_precision(model, "bf16"):
        rough = next_token_objective(model, batch)
    assert rough.sum.dtype == torch.float32
    assert (rough.sum - exact.sum).abs().item() / batch.count < 0.01


def test_bf16_weights_are_refused(make_model: Make, make_samples: MakeSamples) -> None:
    with pytest.raises(InputError, match="load the model in fp32"):
        Trainer(make_model().bfloat16(), next_token_objective, ONE_STEP).fit(make_samples(3))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training_learns(make_model: Make, optimizer: str) -> None:
    data = [Sample([1, 2, 3, 4, 5], [True] * 5), Sample([7, 2, 9, 4, 11], [True] * 5)]
    settings = TrainSettings(optimizer=optimizer, lr=1e-2, steps=60, batch_size=2)
    losses: list[float] = []
    Trainer(make_model(), next_token_objective, settings, on_step=lambda s, n, m: losses.append(m["loss"])).fit(data)
    assert losses[0] == pytest.approx(math.log(48), abs=0.5) and losses[-1] < 0.3


def test_long_samples_are_dropped_and_named(make_model: Make, make_samples: MakeSamples) -> None:
    samples = [
        *make_samples(4, longest=10),
        Sample([1] * 11, [True] * 11, "long"),
        Sample([1] * 10, [True] * 10),
    ]
    result = Trainer(make_model(), next_token_objective, replace(ONE_STEP, max_tokens=10, batch_size=5)).fit(samples)
    assert result.dropped_long == ["long"]
    assert result.tokens == sum(sample.num_tokens for sample in samples) - 11
    with pytest.raises(InputError, match="sample long and all others are over 5 tokens"):
        Trainer(make_model(), next_token_objective, replace(ONE_STEP, max_tokens=5)).fit(samples[4:])


def test_data_with_nothing_to_train_on_is_refused(make_model: Make) -> None:
    first_only = Sample([1, 2], [True, False], "first")  # the first token has nothing before it
    with pytest.raises(InputError, match="sample first has no trained target"):
        Trainer(make_model(), next_token_objective, ONE_STEP).fit([first_only, Sample([1, 2], [False, False])])
    with pytest.raises(InputError, match="the data set is empty"):
        Trainer(make_model(), next_token_objective, ONE_STEP).fit([])


def test_a_token_outside_the_vocabulary_is_refused(make_model: Make) -> None:
    with pytest.raises(InputError, match="sample odd has token 48 but the model has 48"):
        Trainer(make_model(), next_token_objective, ONE_STEP).fit([Sample([1, 48], [False, True], "odd")])


def test_an_infinite_loss_stops_before_the_weights_change(make_model: Make, make_samples: MakeSamples) -> None:
    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def broken(model: Transformer, batch: TokenBatch) -> LossOutput:
        output = next_token_objective(model, batch)
        return LossOutput(output.sum * math.inf, output.count)

    with pytest.raises(InputError, match="the loss is inf .* at step 1; lower the learning rate"):
        Trainer(model, broken, ONE_STEP).fit(make_samples(3))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_metrics_are_written(make_model: Make, make_samples: MakeSamples, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    settings = TrainSettings(lr=0.01, schedule="linear", warmup_steps=1, epochs=2, batch_tokens=60)
    samples = make_samples(12)
    trainer = Trainer(make_model(), next_token_objective, settings, folder=tmp_path, on_step=lambda s, n, m: seen.append((s, n)))
    result = trainer.fit(samples)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, result.steps + 1))
    assert seen == [(step, result.steps) for step in range(1, result.steps + 1)]
    assert {"loss", "lr", "grad_norm", "tokens", "tokens_per_second"} <= lines[0].keys()
    assert lines[0]["lr"] == pytest.approx(0.005) and lines[1]["lr"] == pytest.approx(0.01)
    assert lines[-1]["tokens"] == result.tokens == 2 * sum(sample.num_tokens for sample in samples)
    assert list((tmp_path / "tensorboard").glob("events.*"))


@pytest.mark.parametrize(("given", "warm"), [({"warmup_ratio": 0.25}, 2), ({"warmup_ratio": 0.25, "warmup_steps": 1}, 1), ({}, 0)])
def test_warmup_is_a_share_of_the_steps(given: dict[str, Any], warm: int, make_model: Make, make_samples: MakeSamples) -> None:
    rates: list[float] = []
    settings = TrainSettings(lr=1.0e-3, schedule="constant", steps=8, batch_size=2, **given)
    Trainer(make_model(), next_token_objective, settings, on_step=lambda s, n, m: rates.append(m["lr"])).fit(make_samples(4))
    assert sum(rate < 1e-3 for rate in rates) == warm and len(rates) == 8


def test_clipping_bounds_the_gradient(make_model: Make, make_samples: MakeSamples, monkeypatch: pytest.MonkeyPatch) -> None:
    norms: list[float] = []
    original = AdamW.step

    def step(self: AdamW, parameters: Sequence[torch.nn.Parameter], clip: float, *rest: Any) -> None:
        norms.append(clip * float(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).norm()))
        original(self, parameters, clip, *rest)

    def steep(model: Transformer, batch: TokenBatch) -> LossOutput:
        output = next_token_objective(model, batch)
        return LossOutput(output.sum * 1000, output.count)

    monkeypatch.setattr(AdamW, "step", step)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        norms.clear()
        result = Trainer(make_model(), steep, replace(ONE_STEP, clip=0.5)).fit(make_samples(3))
        assert result.metrics["grad_norm"] > 100 and len(norms) == threads
        assert math.hypot(*norms) == pytest.approx(0.5, rel=1e-4)  # each worker has its share


def test_validation_keeps_the_best_weights(make_model: Make, make_samples: MakeSamples, tmp_path: Path) -> None:
    # the validation data contradict the training data, so training longer is worse
    training = [Sample([1, 2, 3], [False, True, True])] * 4
    held_out = [Sample([1, 5, 6], [False, True, True])]
    settings = TrainSettings(lr=3e-2, schedule="constant", steps=6, batch_size=4, validate_every=2)
    model = make_model()
    seen: list[float] = []

    def on_step(step: int, total: int, metrics: dict[str, float]) -> None:
        if "validation_loss" in metrics:
            seen.append(metrics["validation_loss"])

    result = Trainer(model, next_token_objective, settings, folder=tmp_path, on_step=on_step).fit(training, held_out)
    assert len(seen) == 3 and result.best_step == 2 * (1 + seen.index(min(seen))) < 6
    output = next_token_objective(model, collate(held_out, CPU))  # type: ignore[arg-type]
    assert output.sum.item() / output.count == pytest.approx(min(seen), rel=1e-5)
    again = make_model()
    assert Trainer(again, next_token_objective, settings, folder=tmp_path).fit(training, held_out) == result
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 1}, "exactly one of epochs and steps"),
        ({"steps": 1, "epochs": 1, "batch_size": 1}, "exactly one of epochs and steps"),
        ({"steps": 1}, "exactly one of batch_size and batch_tokens"),
        ({"steps": 0, "batch_size": 1}, "steps is 0; it must be above zero"),
        (
            {"steps": 1, "batch_size": 1, "schedule": "step"},
            "unknown schedule 'step'; choose one of constant",
        ),
        (
            {"steps": 1, "batch_size": 1, "precision": "fp4"},
            "unknown precision 'fp4'; choose one of fp32, bf16, fp8",
        ),
    ],
)
def test_wrong_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        TrainSettings(**settings)


def test_counts_of_all_kinds_add_up(make_samples: MakeSamples) -> None:
    rated = collate([RatedGroup([RatedSample([1, 2], 1, [1, 2, 3, -100, -100])])], CPU)
    tokens = collate(make_samples(2), CPU)  # type: ignore[arg-type]
    assert global_count([rated, tokens])[0] == 3 + sum(sample.num_targets for sample in make_samples(2))


def test_steps_taken_one_by_one_are_those_of_fit(make_model: Make, make_samples: MakeSamples) -> None:
    samples, settings = make_samples(10), TrainSettings(lr=1e-2, steps=4, batch_size=4, warmup_steps=1, micro_batch_tokens=40)
    whole, by_hand, ready = (Trainer(make_model(), next_token_objective, settings) for _ in range(3))
    result = whole.fit(samples)
    plan = BatchPlan([sample.num_tokens for sample in samples], seed=0, steps=4, batch_size=4)
    for step in range(4):
        chosen = [samples[index] for index in plan.step(step)]
        metrics = by_hand.step(chosen)
        ready.step([collate(group, CPU) for group in split_micro_batches(chosen, 40)])  # type: ignore[type-var]
    assert metrics["loss"] == result.metrics["loss"] and by_hand.result.tokens == result.tokens
    for other in (by_hand, ready):
        assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), other.model.parameters(), strict=True))


@pytest.mark.skipif(kernels.load() is None, reason="no compiler")
def test_an_embedding_of_which_few_rows_are_read_trains_by_these_alone(monkeypatch: pytest.MonkeyPatch, make_samples: MakeSamples) -> None:
    blocks = uniform_blocks(num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, ffn_size=32)
    config = ModelConfig("nemotron", 2000, 16, blocks, max_positions=256)
    settings = TrainSettings(lr=1e-2, steps=3, batch_size=4, micro_batch_tokens=40, clip=0.0)
    models: list[Transformer] = []
    for share in (0.0, fused.MAX_ROWS):
        monkeypatch.setattr(fused, "MAX_ROWS", share)
        models.append(Transformer(config))
        models[-1].init_weights(0)
        trainer = Trainer(models[-1], next_token_objective, settings)
        trainer.num_workers = 1
        kinds: list[bool] = []

        def step(*args: Any, trainer: Trainer = trainer, kinds: list[bool] = kinds, **kwargs: Any) -> None:
            kinds.append(models[-1].embedding.grad.is_sparse)  # type: ignore[union-attr]
            Optimizer.step(trainer.optimizer, *args, **kwargs)

        monkeypatch.setattr(trainer.optimizer, "step", step)
        trainer.fit(make_samples(12))
        assert kinds == [share > 0] * 3
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


def test_a_loaded_state_goes_on_as_the_trainer_that_gave_it(make_model: Make, make_samples: MakeSamples) -> None:
    samples, settings = make_samples(12), TrainSettings(optimizer="muon", lr=1e-2, steps=6, batch_size=4)
    whole, first, second = (Trainer(make_model(seed), next_token_objective, settings) for seed in (0, 0, 1))
    expected = whole.fit(samples)
    plan = BatchPlan([sample.num_tokens for sample in samples], seed=0, steps=6, batch_size=4)
    for step in range(3):
        first.step([samples[index] for index in plan.step(step)])
    second.load_state(first.state())
    first.step(samples)  # what it does from now on is no matter of the other's
    result = second.fit(samples)
    assert (result.steps, result.tokens, result.metrics["loss"]) == (6, expected.tokens, expected.metrics["loss"])
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True))


def test_steps_that_cannot_be_taken(make_model: Make, make_samples: MakeSamples) -> None:
    model = make_model()
    with pytest.raises(InputError, match="give steps instead of epochs"):
        Trainer(model, next_token_objective, TrainSettings(epochs=1, batch_size=4)).step(make_samples(3))
    with pytest.raises(InputError, match="the step has no samples"):
        Trainer(model, next_token_objective, ONE_STEP).step([])
    with pytest.raises(InputError, match="sample odd has token 48"):
        Trainer(model, next_token_objective, ONE_STEP).step([Sample([1, 48], [False, True], "odd")])
    for name, value in make_model().state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
