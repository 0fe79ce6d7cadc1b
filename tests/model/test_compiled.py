"""Operations by torch.compile: the same loss and gradients as without, one graph each, few of them for many lengths."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from gristmill.model import compiled
from gristmill.model.compiled import compiling
from gristmill.model.config import ModelConfig, uniform_blocks
from gristmill.model.kernels import library as kernels
from gristmill.model.packed import PackedShape
from gristmill.model.transformer import Transformer
from gristmill.train.objectives.next_token import next_token_objective, token_samples
from gristmill.train.trainer import Trainer, TrainSettings


@pytest.fixture(autouse=True)
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a device that has none, with a backend that takes no C++ compiler."""
    monkeypatch.setattr(kernels, "library_for", lambda x: None)
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def small(family: str) -> Transformer:
    return Transformer(ModelConfig(family, 40, 16, uniform_blocks(2, 4, 2, 8, 24), 64))


def gradients(model: Transformer, lengths: list[int], *, active: bool, checkpoint: Any = False) -> list[torch.Tensor]:
    model.zero_grad()
    model.checkpoint_activations = checkpoint
    ids_T = torch.arange(sum(lengths)) % 40
    with compiling(active):
        loss = model(ids_T, PackedShape.from_lengths(lengths)).float().logsumexp(-1).square().sum()
        loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]


CASES = [(family, dtype, False) for family in ("nemotron", "llama", "phi3", "gemma2") for dtype in (torch.float32, torch.bfloat16)]


@pytest.mark.parametrize(
    ("family", "dtype", "checkpoint"), [*CASES, ("nemotron", torch.float32, True), ("llama", torch.float32, "selective")]
)
def test_loss_and_gradients_are_those_without(family: str, dtype: torch.dtype, checkpoint: Any) -> None:
    model = small(family)
    model.compute_dtype = dtype
    plain = gradients(model, [5, 3], active=False)
    for one, other in zip(gradients(model, [5, 3], active=True, checkpoint=checkpoint), plain, strict=True):
        tolerance = 1e-5 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * float(other.abs().max()))


def test_lengths_share_graphs() -> None:
    model = small("llama")
    torch._dynamo.utils.counters.clear()
    for length in range(4, 14):
        gradients(model, [length, 3], active=True)
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"] and 0 < counters["stats"]["unique_graphs"] <= 16


def test_training_compiles_where_it_is_told_to() -> None:
    samples, losses = token_samples([[1, 2, 3, 4, 5], [7, 8, 9]], 64), {}
    for active in (False, True):
        torch._dynamo.utils.counters.clear()
        trainer = Trainer(small("nemotron"), next_token_objective, TrainSettings(steps=2, batch_size=2, compile=active))
        losses[active] = [trainer.step(samples)["loss"] for _ in range(2)]
        assert bool(torch._dynamo.utils.counters["stats"]["unique_graphs"]) == active
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)


def test_nothing_is_compiled_by_itself() -> None:
    torch._dynamo.utils.counters.clear()
    gradients(small("nemotron"), [5], active=False)
    assert not torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("family", ["nemotron", "llama", "phi3", "gemma2"])
def test_a_block_is_one_graph(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a break, forward and backward, once the tables of a packed shape are made."""
    monkeypatch.setattr(kernels, "load", lambda: None)
    model, shape = small(family), PackedShape.from_lengths([5, 3])
    block, found = model.blocks["0"], []
    for call in (block, torch.compile(block, backend="aot_eager", fullgraph=True)):
        block.zero_grad()
        torch.manual_seed(0)
        x_TD = torch.randn(8, 16, requires_grad=True)
        out_TD = call(x_TD, *model.rope(shape.positions_T)[block.config.rope], shape)
        out_TD.square().sum().backward()
        found.append([out_TD, x_TD.grad, *(parameter.grad for parameter in block.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
