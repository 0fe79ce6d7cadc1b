"""Schedules, parameter groups, and an optimiser state that round-trips."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from gristmill.core.errors import InputError
from gristmill.model.kernels import library as kernels
from gristmill.model.lora import LoraConfig, add_adapters
from gristmill.model.reward import RewardModel
from gristmill.model.transformer import Transformer
from gristmill.train.optim import Optimizer, OptimSettings, schedule_scale

Make = Callable[..., Transformer]


def test_schedules() -> None:
    def scales(schedule: str) -> list[float]:
        return [schedule_scale(schedule, step, 9, warmup_steps=2, min_lr_ratio=0.1) for step in range(9)]

    assert scales("constant") == pytest.approx([1 / 3, 2 / 3] + [1.0] * 7)
    assert scales("linear")[2:] == pytest.approx([1, 0.85, 0.7, 0.55, 0.4, 0.25, 0.1])
    cosine = scales("cosine")
    assert (cosine[2], cosine[5], cosine[8]) == pytest.approx((1.0, 0.55, 0.1))
    assert schedule_scale("cosine", 0, 1, warmup_steps=0, min_lr_ratio=0.0) == 1.0  # a single step is taken at the full rate


def test_norms_and_biases_are_not_decayed(make_model: Make) -> None:
    model = make_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    optimizer = Optimizer(model, OptimSettings(lr=0.1, weight_decay=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        expected = 0.95 if parameter.ndim == 2 else 1.0
        assert torch.allclose(parameter, torch.full_like(parameter, expected)), name


@pytest.mark.parametrize(("num_workers", "compiled"), [(1, True), (3, True), (1, False), (3, False)])
def test_adamw_is_torchs(make_model: Make, monkeypatch: pytest.MonkeyPatch, num_workers: int, compiled: bool) -> None:
    if not compiled:
        monkeypatch.setattr("gristmill.model.kernels.library.load", lambda: None)
    models = make_model(), make_model()
    settings = OptimSettings(lr=0.03, weight_decay=0.1)
    ours = Optimizer(models[0], settings, num_workers=num_workers)
    plain = [[p for p in models[1].parameters() if (p.ndim < 2) == is_plain] for is_plain in (False, True)]
    theirs = torch.optim.AdamW(
        [{"params": plain[0], "weight_decay": 0.1}, {"params": plain[1], "weight_decay": 0.0}], 0.03, (0.9, 0.95), fused=True
    )
    assert {id(p) for share in ours.shares for p in share} == {id(p) for p in models[0].parameters()}
    for step in range(3):
        torch.manual_seed(step)
        for one, other in zip(*(model.parameters() for model in models), strict=True):
            one.grad = torch.randn_like(one) * 3
            other.grad = one.grad.clone()
        norm = torch.nn.utils.clip_grad_norm_(models[1].parameters(), 1.0)
        copies = {one: torch.zeros_like(one, dtype=torch.bfloat16) for one in models[0].parameters()}
        ours.step(max_norm=1.0, norm=float(norm), copies=copies)
        theirs.step()
        for one, other in zip(*(model.parameters() for model in models), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
            assert torch.equal(copies[one], one.bfloat16()) and not copies[one].requires_grad
            assert one._version > 0, "others see that it has changed"


@pytest.mark.skipif(kernels.load() is None, reason="no compiler")
@pytest.mark.parametrize("width", [16, 5000])  # a piece of the kernel's holds several rows, or not one
def test_a_sparse_gradient_steps_as_the_dense_one(width: int) -> None:
    models = [nn.ParameterDict({"table": torch.ones(300, width)}) for _ in range(2)]
    optimizers = [Optimizer(model, OptimSettings(lr=0.03, weight_decay=0.1)) for model in models]
    for step, rows in enumerate([[0, 7, 299], [7, 250], [1]]):
        values = torch.randn(len(rows), width, generator=torch.Generator().manual_seed(step))
        sparse = torch.sparse_coo_tensor(torch.tensor([rows]), values, (300, width), is_coalesced=True, check_invariants=True)
        for model, optimizer, grad in zip(models, optimizers, (sparse.to_dense(), sparse), strict=True):
            table = model["table"]
            table.grad, copies = grad, {table: torch.zeros(300, width, dtype=torch.bfloat16)}
            optimizer.step(max_norm=1.0, norm=3.0, copies=copies)
            assert torch.equal(copies[table], table.bfloat16())
        states = [optimizer.state_tensors() for optimizer in optimizers]
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
        assert torch.equal(models[0]["table"], models[1]["table"])


def test_muon_takes_the_hidden_matrices_only(make_model: Make) -> None:
    model = RewardModel(make_model())
    optimizer = Optimizer(model, OptimSettings(optimizer="muon"))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    muon = {name.split("|")[0] for name in optimizer.state_tensors() if name.endswith("momentum_buffer")}
    matrices = {
        f"backbone.blocks.{i}.{part}.weight" for i in (0, 1) for part in ("attention.qkv", "attention.output", "mlp.up", "mlp.down")
    }
    assert muon == matrices
    adamw = {name.split("|")[0] for name in optimizer.state_tensors() if name.endswith("exp_avg")}
    assert adamw == {name for name, _ in model.named_parameters()} - matrices


def test_lora_plus_steps_b_by_its_own_rate(make_model: Make) -> None:
    model = make_model()
    add_adapters(model, LoraConfig(rank=2, alpha=2.0, dora=True), seed=0)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = Optimizer(model, OptimSettings(lr=1e-2, weight_decay=0.0, b_lr_ratio=16.0))
    for parameter in optimizer.parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.set_scale(0.5)
    optimizer.step()
    for name, parameter in model.named_parameters():
        rate = 0.0 if not parameter.requires_grad else 0.08 if name.endswith("lora_B") else 0.005
        torch.testing.assert_close(parameter.detach(), before[name] - rate, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_round_trips(make_model: Make, name: str) -> None:
    def grads(model: Transformer, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)

    one, two = make_model(), make_model()
    first, second = (Optimizer(model, OptimSettings(optimizer=name)) for model in (one, two))
    grads(one, 1)
    first.step()
    two.load_state_dict(one.state_dict())
    second.load_state_tensors({key: value.clone() for key, value in first.state_tensors().items()})
    for model, optimizer in ((one, first), (two, second)):
        grads(model, 2)
        optimizer.set_scale(0.5)
        optimizer.step()
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)


def test_an_unknown_optimizer_is_refused(make_model: Make) -> None:
    with pytest.raises(InputError, match="unknown optimizer 'sgd'; choose one of adamw, muon"):
        Optimizer(make_model(), OptimSettings(optimizer="sgd"))
    for settings in (OptimSettings(lr=-1.0), OptimSettings(betas=(0.9, 1.0)), OptimSettings(weight_decay=-0.1)):
        with pytest.raises(InputError, match="Give AdamW a rate"):
            Optimizer(make_model(), settings)
    with pytest.raises(InputError, match="no parameter that is trained"):
        Optimizer(make_model().requires_grad_(False), OptimSettings())


def test_what_training_needed_is_let_go(make_model: Make) -> None:
    model = make_model()
    optimizer = Optimizer(model, OptimSettings())
    for parameter in optimizer.parameters[1:]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    untouched = {name.rpartition("|")[0] for name in optimizer.state_tensors()}
    assert len(untouched) == len(optimizer.parameters) - 1  # one without a gradient has no state
    optimizer.release()
    assert not optimizer.state_tensors() and all(parameter.grad is None for parameter in model.parameters())
