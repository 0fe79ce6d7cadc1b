"""Distillation: the loss by hand, its gradient, a student that is its teacher, students of other sizes, other vocabularies refused."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

from gristmill.cli.main import app
from gristmill.core.errors import InputError
from gristmill.model.config import BlockConfig, ModelConfig, uniform_blocks
from gristmill.model.transformer import Transformer
from gristmill.train import top_logprobs
from gristmill.train.batches import Sample, TaughtSample, collate_tokens
from gristmill.train.losses import kl_divergence_sum, top_kl_divergence_sum
from gristmill.train.objectives.distillation import DistillationObjective, TopKDistillation, _CosineDistances, paired_loss
from gristmill.train.top_logprobs import taught_samples
from gristmill.train.trainer import Trainer, TrainSettings

CONFIG = ModelConfig("nemotron", 80, 32, uniform_blocks(2, 4, 2, 8, 64), 64, init_std=0.2)


def model(seed: int, config: ModelConfig = CONFIG) -> Transformer:
    made = Transformer(config)
    made.init_weights(seed)
    return made


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    rng = np.random.default_rng(0)
    return [Sample(rng.integers(0, 80, size=n), np.arange(n) > 2, str(n)) for n in (12, 20, 9, 31)]


@pytest.mark.parametrize(("cap", "teacher_cap"), [(None, None), (3.0, 5.0), (None, 5.0), (3.0, None)])
@pytest.mark.parametrize("num_rows", [0, 7, 1500])
def test_the_chunked_divergence_and_its_gradients_are_those_of_torch(num_rows: int, cap: float | None, teacher_cap: float | None) -> None:
    """Student and teacher of other widths; more rows than a chunk holds."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    hidden_RD, weight_VD = drawn(num_rows, 8).requires_grad_(), drawn(50, 8).requires_grad_()
    teacher_RE, teacher_VE = drawn(num_rows, 12), drawn(50, 12)

    def capped(x: torch.Tensor, limit: float | None) -> torch.Tensor:
        return x if limit is None else limit * torch.tanh(x / limit)

    log_q = capped(hidden_RD @ weight_VD.T, cap).log_softmax(-1)
    log_p = capped(teacher_RE @ teacher_VE.T, teacher_cap).log_softmax(-1)
    expected = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    found = kl_divergence_sum(hidden_RD, weight_VD, teacher_RE, teacher_VE, cap=cap, teacher_cap=teacher_cap)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for mine, theirs in zip(*(torch.autograd.grad(2 * loss, [hidden_RD, weight_VD]) for loss in (found, expected)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


def test_a_teacher_may_compute_in_another_type() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden_RD, weight_VD, teacher_RE, teacher_VE = (torch.randn(*shape, generator=generator) for shape in ((7, 8), (50, 8)) * 2)
    found = kl_divergence_sum(hidden_RD, weight_VD, teacher_RE.bfloat16(), teacher_VE)
    torch.testing.assert_close(found, kl_divergence_sum(hidden_RD, weight_VD, teacher_RE, teacher_VE), rtol=0.05, atol=0.0)


def test_a_student_that_is_its_teacher_has_nothing_to_learn(samples: list[Sample]) -> None:
    batch = collate_tokens(samples, torch.device("cpu"))
    student = model(0)
    output = DistillationObjective(model(0), "t")(student, batch)
    assert output.count == batch.count and float(output.sum.detach()) == pytest.approx(0, abs=1e-4)
    output.sum.backward()
    assert max(float(p.grad.abs().max()) for p in student.parameters() if p.grad is not None) < 1e-4


def test_every_term_counts_as_named(samples: list[Sample]) -> None:
    """Cosine by hand from the states behind both layers; the sum is that of the terms."""
    batch = collate_tokens(samples, torch.device("cpu"), fill=False)
    student, teacher = model(0), model(1)
    sums = {loss: DistillationObjective(teacher, "t", loss)(student, batch) for loss in ("cosine+kl", "kl", "cosine+kl+lm", "kl+lm", "lm")}
    both: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for one, states in zip((student, teacher), both, strict=True):
        one.hidden(batch.ids_T, batch.shape, layers=states)
    cosine = sum((1 - F.cosine_similarity(a, b, dim=-1))[batch.rows_R].sum() for a, b in zip(*both, strict=True))
    kl, lm = sums["kl"].sum, sums["lm"].sum
    torch.testing.assert_close(sums["cosine+kl"].sum, kl + cosine)
    torch.testing.assert_close(sums["cosine+kl+lm"].sum, kl + cosine + lm)
    torch.testing.assert_close(sums["kl+lm"].sum, kl + lm)
    assert all("kl" in output.metrics for output in sums.values())


def test_directions_and_their_gradients_are_those_of_torch() -> None:
    """Over rows of all lengths, zero too."""
    x, y = (torch.randn(6, 16, generator=torch.Generator().manual_seed(seed)) * torch.logspace(-3, 3, 6)[:, None] for seed in (0, 1))
    y[1] = 0
    x.requires_grad_()
    ours, exact = _CosineDistances.apply(x, y), (1 - F.cosine_similarity(x.double(), y.double(), dim=-1)).sum()
    assert float(ours.detach()) == pytest.approx(float(exact.detach()), abs=1e-5)
    for one, other in zip(*(torch.autograd.grad(3 * total, x) for total in (ours, exact)), strict=True):
        torch.testing.assert_close(one, other.float(), rtol=1e-4, atol=1e-6)


def test_layers_pair_as_they_are_told(samples: list[Sample]) -> None:
    """A child without the parent's middle layer: its second stands for the third."""
    batch = collate_tokens(samples, torch.device("cpu"), fill=False)
    teacher = model(0, replace(CONFIG, blocks=CONFIG.blocks[:1] * 3))
    for name in ("attention.output", "mlp.down"):
        teacher.get_submodule(f"blocks.1.{name}").weight.data.zero_()  # so that it changes nothing
    student = model(5)
    state = {name.replace("blocks.2.", "blocks.1."): value for name, value in teacher.state_dict().items() if "blocks.1." not in name}
    student.load_state_dict(state)
    output = DistillationObjective(teacher, "t", "cosine+kl", (0, 2))(student, batch)
    assert float(output.sum.detach()) == pytest.approx(0, abs=1e-4)


def test_auto_takes_the_cosine_where_layers_pair() -> None:
    wide, deep = replace(CONFIG, hidden_size=64), replace(CONFIG, blocks=CONFIG.blocks * 2)
    bare = replace(CONFIG, blocks=(BlockConfig(0, 0, 0, 32), CONFIG.blocks[1]))
    assert paired_loss("auto", bare, CONFIG) == "cosine+kl" and paired_loss("auto", CONFIG, wide) == "kl"
    assert paired_loss("auto", CONFIG, deep, (0, 2)) == "cosine+kl"
    with pytest.raises(InputError, match="2 of width 32. do not pair with the teacher's .4 of width 32.: take the loss kl"):
        paired_loss("cosine+kl", CONFIG, deep)


def test_a_narrower_student_comes_closer(samples: list[Sample]) -> None:
    teacher = model(0, replace(CONFIG, hidden_size=48, blocks=uniform_blocks(3, 4, 2, 12, 64)))
    settings = TrainSettings(lr=1e-2, steps=30, batch_size=4, micro_batch_tokens=256)
    trainer = Trainer(model(1), DistillationObjective(teacher.requires_grad_(False), "t", "kl"), settings)
    losses = [trainer.step(samples)["kl"] for _ in range(30)]
    assert losses[-1] < losses[0] / 4


# ---- a teacher's largest log-probabilities on disk ----


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("top_k", [1, 6, 50])
def test_the_divergence_to_known_tokens_and_the_rest_is_that_of_torch(top_k: int, cap: float | None) -> None:
    """At most the full one, which it is of the whole vocabulary; more rows than a chunk holds."""
    generator = torch.Generator().manual_seed(0)
    hidden_RD, weight_VD, teacher_RE, teacher_VE = (torch.randn(*shape, generator=generator) for shape in ((1500, 8), (50, 8)) * 2)
    hidden_RD.requires_grad_(), weight_VD.requires_grad_()
    log_p, logits = (teacher_RE @ teacher_VE.T).log_softmax(-1), hidden_RD @ weight_VD.T
    log_q = (logits if cap is None else cap * torch.tanh(logits / cap)).log_softmax(-1)
    top, ids = log_p.topk(top_k)
    expected = (top.exp() * (top - log_q.gather(1, ids))).sum()
    if top_k < 50:
        rest = [1 - log.gather(1, ids).exp().sum(-1) for log in (log_p, log_q)]
        expected = expected + (rest[0] * (rest[0] / rest[1]).log()).sum()
    found = top_kl_divergence_sum(hidden_RD, weight_VD, ids, top, cap=cap)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for mine, theirs in zip(*(torch.autograd.grad(2 * loss, [hidden_RD, weight_VD]) for loss in (found, expected)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)
    full = float(kl_divergence_sum(hidden_RD.detach(), weight_VD.detach(), teacher_RE, teacher_VE, cap=cap))
    assert float(found.detach()) == pytest.approx(full, rel=1e-4) if top_k == 50 else float(found.detach()) < full


def top_of(samples: list[Sample], folder: Path, top_k: int, teacher: Transformer | None = None) -> list[Sample]:
    def load() -> Transformer:
        assert teacher is not None, "nothing is missing"
        return teacher.requires_grad_(False)

    options: dict[str, Any] = {"identity": "t", "max_tokens": 31, "precision": "fp32"}
    return taught_samples(samples, folder, load, top_k=top_k, **options)


def test_the_whole_vocabulary_gives_the_gradients_of_the_teacher_in_memory(samples: list[Sample], tmp_path: Path) -> None:
    teacher, student = model(1), model(0)
    taught = top_of(samples, tmp_path, 80, teacher)
    grads, losses = [], []
    for objective, rows in ((DistillationObjective(teacher, "t", "kl+lm"), samples), (TopKDistillation("t", 80, "kl+lm"), taught)):
        output = objective(student, collate_tokens(rows, torch.device("cpu")))
        losses.append({name: float(value) for name, (value, _) in output.metrics.items()} | {"sum": float(output.sum.detach())})
        grads.append(torch.autograd.grad(output.sum, list(student.parameters())))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0]["sum"] == pytest.approx(losses[0]["kl"] + losses[0]["lm"])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_killed_teacher_goes_on_behind_its_last_group(samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(top_logprobs, "GROUP_TOKENS", 29)  # three groups: the first sample, the next two, the last
    given = [*samples, Sample([1] * 40, [True] * 40, "long"), Sample([1, 2], [False] * 2, "untrained")]
    taught = top_of(given, tmp_path / "calm", 5, model(1))
    assert [type(one) for one in taught] == [TaughtSample] * 4 + [Sample] * 2
    (whole,) = (tmp_path / "calm").iterdir()
    assert whole.stat().st_size == 8 * 5 * sum(sample.num_targets for sample in samples)
    part = tmp_path / "killed" / f"{whole.stem}.part"
    part.parent.mkdir()
    first = samples[0].num_targets
    part.write_bytes(whole.read_bytes()[: 40 * first] + b"torn" * 11)
    teacher, read = model(1), []
    hidden = teacher.hidden
    monkeypatch.setattr(teacher, "hidden", lambda ids_T, *args: read.append(len(ids_T)) or hidden(ids_T, *args))
    again = top_of(given, part.parent, 5, teacher)
    assert len(read) == 2, "the first group is not read again"
    assert (part.parent / whole.name).read_bytes() == whole.read_bytes() and not part.exists()
    assert all(np.array_equal(a.top, b.top) for a, b in zip(taught[:4], again[:4], strict=True))  # type: ignore[attr-defined]
    top_of(given, part.parent, 5)
    with pytest.raises(AssertionError, match="nothing is missing"):
        top_of([*given, samples[0]], part.parent, 5)  # another text


def test_a_disk_without_room_for_a_teacher_is_said_before_it_is_loaded(
    samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))
    with pytest.raises(InputError, match="5 largest log-probabilities of 60 tokens take .* lower teacher_top_k"):
        top_of(samples, tmp_path, 5)


# ---- the command ----


def distil(*args: Any) -> Any:
    return CliRunner().invoke(app, ["train", "distill", "--quiet", "--json", *map(str, args)])


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    lines = [{"messages": [{"role": "user", "content": f"Say {w}."}, {"role": "assistant", "content": w * 3}]} for w in ("a", "b", "c")]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_command_distils_a_model_folder(tiny_base: Path, rows: Path, tmp_path: Path) -> None:
    shown = distil(
        "--model", tiny_base, "--teacher", tiny_base, "--data", rows, "--out", tmp_path / "out", "--epochs", 2, "--precision", "fp32"
    )
    assert shown.exit_code == 0, shown.output
    first, *_ = (json.loads(line) for line in (tmp_path / "out/train/metrics.jsonl").read_text().splitlines())
    assert first["kl"] == pytest.approx(0, abs=1e-5) and first["cosine"] == pytest.approx(0, abs=1e-4), "its own teacher"
    assert json.loads(shown.stdout)["model"] == str(tmp_path / "out/model") and (tmp_path / "out/model/config.json").exists()


def test_the_command_keeps_a_teacher_on_disk(tiny_base: Path, rows: Path, tmp_path: Path) -> None:
    args = ["--model", tiny_base, "--teacher", tiny_base, "--data", rows, "--teacher-top-k", 8, "--precision", "fp32"]
    shown = distil(*args, "--epochs", 2, "--out", tmp_path / "out")
    assert shown.exit_code == 0, shown.output
    first, *_ = (json.loads(line) for line in (tmp_path / "out/train/metrics.jsonl").read_text().splitlines())
    assert first["kl"] == pytest.approx(0, abs=1e-5) and "cosine" not in first
    assert len(list((tmp_path / "out/train").glob("teacher-*.bin"))) == 1


def test_what_cannot_be_distilled_is_told_before_work(tiny_base: Path, random_base: Path, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    given: Callable[..., list[Any]] = lambda *more: ["--model", tiny_base, "--data", rows, "--out", out, *more]  # noqa: E731
    for args, words in (
        (given(), "Give --teacher"),
        (given("--teacher", random_base), "has another vocabulary than"),
        (given("--teacher", tiny_base, "--lora-rank", 4), "trains all weights in one process"),
        (given("--teacher", tiny_base, "--distill-loss", "mse"), "mse"),
        (given("--teacher", tiny_base, "--distill-loss", "cosine+kl", "--teacher-top-k", 4), "not its states: take the loss kl"),
        (given("--teacher", tiny_base, "--teacher-top-k", 10**6), "more than the 512 tokens of the vocabulary"),
    ):
        shown = distil(*args)
        assert shown.exit_code == 2 and words in shown.stderr, shown.output
    assert not out.exists()
    other = CliRunner().invoke(app, ["train", "sft", *map(str, given("--teacher", tiny_base))])
    assert other.exit_code == 2 and "are of distillation" in other.stderr
