"""Blocks in one call against the same layer by layer."""

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from gristmill.core.threads import workers
from gristmill.model import compiled_blocks, fused
from gristmill.model.compiled_blocks import takes, unchanged
from gristmill.model.config import BlockConfig, ModelConfig, uniform_blocks
from gristmill.model.kernels import library as kernels
from gristmill.model.lora import LoraConfig, add_adapters
from gristmill.model.packed import PackedShape
from gristmill.model.transformer import Transformer

pytestmark = pytest.mark.skipif(not kernels.has_tiles(), reason="no AMX")
NEMOTRON = ModelConfig("nemotron", 50, 64, uniform_blocks(3, 4, 2, 32, 96), 128, init_std=0.1, rotary_fraction=0.5)
WIDE, NARROW = BlockConfig(4, 2, 32, 96), BlockConfig(4, 1, 32, 32)
BARE, ATTENDS, EMPTY = BlockConfig(0, 0, 0, 64), BlockConfig(4, 2, 32, 0), BlockConfig(0, 0, 0, 0)
GEMMA = (BlockConfig(4, 2, 32, 96, 20), BlockConfig(4, 2, 32, 96))
CONFIGS = {
    "nemotron": NEMOTRON,
    "llama": replace(NEMOTRON, family="llama", rotary_fraction=1.0),
    "gemma": replace(NEMOTRON, family="gemma", rotary_fraction=1.0),
    "windows": replace(NEMOTRON, family="mistral", blocks=GEMMA, rotary_fraction=1.0),
    "child": replace(NEMOTRON, blocks=(WIDE, BARE, NARROW, ATTENDS, EMPTY, WIDE, BARE)),  # the last has no attention to pick behind
    "gated child": replace(NEMOTRON, family="llama", blocks=(BARE, NARROW, ATTENDS, WIDE, ATTENDS), rotary_fraction=1.0),
}
SHAPE = PackedShape.from_lengths([40, 70, 90, 33, 1], shared=[0, 0, 60, 0, 0])  # 174 tokens: no whole rows of the kernel
PICKED = torch.tensor([5, 100, 3, 170, 64, 3])  # one of them twice


def model_of(config: ModelConfig) -> Transformer:
    model = Transformer(config)
    model.compute_dtype = torch.bfloat16
    return model


def run(model: Transformer, rows_S: Tensor | None, *, by_layer: tuple[int, ...] | None = None) -> tuple[Tensor, list[Tensor]]:
    """States and the gradients of all parameters, a random gradient coming from above, and into the states behind some layers."""
    ids_T = torch.randint(0, 50, (SHAPE.num_tokens,), generator=torch.Generator().manual_seed(0))
    layers: list[Tensor] | None = None if by_layer is None else []
    states = model.states(ids_T, SHAPE, rows_S, layers=layers)
    assert layers is None or (len(layers) == model.config.num_layers and layers[-1] is states)
    given = [states, *([] if layers is None or by_layer is None else [layers[number] for number in by_layer])]
    upstream = [torch.randn(x.shape, generator=torch.Generator().manual_seed(1 + i)).to(x.dtype) for i, x in enumerate(given)]
    used = [x for name, x in model.named_parameters() if name.startswith(("embedding", "blocks"))]
    told = states if layers is None else torch.cat(layers)
    return told.detach().float(), list(torch.autograd.grad(given, used, upstream))


def one_by_one() -> Any:
    return patch.object(compiled_blocks, "takes", lambda decoder: False)


@pytest.mark.parametrize("rows_S", [None, PICKED], ids=["all", "picked"])
@pytest.mark.parametrize("by_layer", [None, (), (0,), "all"], ids=str)
@pytest.mark.parametrize("family", CONFIGS)
def test_states_and_gradients_are_those_of_the_blocks_one_by_one(family: str, by_layer: Any, rows_S: Tensor | None) -> None:
    """Of the states behind layers too, of which some or all have a gradient of their own."""
    model = model_of(CONFIGS[family])
    by_layer = tuple(range(model.config.num_layers - 1)) if by_layer == "all" else by_layer
    assert takes(model)
    states, grads = run(model, rows_S, by_layer=by_layer)
    with one_by_one():
        layered, layered_grads = run(model, rows_S, by_layer=by_layer)
        model.compute_dtype = torch.float32
        exact, exact_grads = run(model, rows_S, by_layer=by_layer)
    for ours, theirs, right in zip([states, *grads], [layered, *layered_grads], [exact, *exact_grads], strict=True):
        limit = 1.5 * float((theirs - right).norm()) + 1e-3 * float(right.norm())  # what bf16 costs there
        assert float((ours - right).norm()) <= limit and float(right.norm()) > 0


def test_without_a_gradient_nothing_is_kept_and_states_are_the_same() -> None:
    for rows_S, config in itertools.product((None, PICKED), (NEMOTRON, CONFIGS["child"])):
        model = model_of(config)
        states, _ = run(model, rows_S, by_layer=())
        ids_T = torch.randint(0, 50, (SHAPE.num_tokens,), generator=torch.Generator().manual_seed(0))
        with torch.inference_mode(), patch.object(kernels, "Blocks", wraps=kernels.Blocks) as made:
            layers: list[Tensor] = []
            model.states(ids_T, SHAPE, rows_S, layers=layers)
            assert torch.equal(torch.cat(layers).float(), states)
        assert made.call_args.args[-2] is False


def test_states_behind_a_layer_may_have_the_only_gradient() -> None:
    def gradient() -> Tensor:
        model, layers = model_of(CONFIGS["child"]), list[Tensor]()
        model.states(torch.arange(SHAPE.num_tokens) % 50, SHAPE, PICKED, layers=layers)
        layers[1].float().square().sum().backward()
        grad = model.get_parameter("blocks.0.mlp.down.weight").grad
        assert grad is not None
        return grad

    ours = gradient()
    with one_by_one():
        right = gradient()
    assert float((ours - right).norm()) < 0.05 * float(right.norm())


def test_blocks_without_anything_give_back_what_they_get() -> None:
    model = model_of(replace(NEMOTRON, blocks=(EMPTY, EMPTY)))
    ids_T = torch.arange(SHAPE.num_tokens) % 50
    states = model.states(ids_T, SHAPE)
    states.sum().backward()
    assert torch.equal(states, model.embed(ids_T)) and model.embedding.grad is not None


def test_frozen_tiles_are_for_bf16_alone() -> None:
    model = model_of(NEMOTRON)
    expected, _ = run(model, None)
    compiled_blocks.freeze(model)
    assert torch.equal(run(model, None)[0], expected)
    model.compute_dtype = torch.float32
    states, _ = run(model, None)
    with one_by_one():
        model.tiles = None
        assert torch.equal(run(model, None)[0], states)


def test_gradients_are_added_in_place() -> None:
    model = model_of(NEMOTRON)
    blocks = [x for name, x in model.named_parameters() if name.startswith("blocks")]
    ids_T = torch.arange(SHAPE.num_tokens) % 50

    def backward() -> None:
        model.states(ids_T, SHAPE).sum().backward()

    backward()
    once = [parameter.grad for parameter in blocks]
    model.zero_grad()
    with fused.accumulating_in_place(list(model.parameters())):
        backward()
        first = [parameter.grad for parameter in blocks]
        backward()
    for one, place, parameter in zip(once, first, blocks, strict=True):
        assert one is not None and place is parameter.grad and one is not place
        torch.testing.assert_close(place, 2 * one)


def test_neither_threads_nor_workers_change_a_bit() -> None:
    model = model_of(CONFIGS["llama"])
    expected = run(model, PICKED)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        several = run(model, PICKED)
        with unchanged(model), workers(2) as each:
            both = each(lambda rows: run(model, rows), [PICKED, PICKED])
    finally:
        torch.set_num_threads(before)
    for states, grads in (several, *both):
        assert torch.equal(states, expected[0]) and all(map(torch.equal, grads, expected[1]))


def test_tiles_are_made_once_while_weights_do_not_change() -> None:
    model = model_of(NEMOTRON)
    with patch.object(compiled_blocks.Tiles, "_layer", autospec=True, side_effect=compiled_blocks.Tiles._layer) as made:
        with unchanged(model), ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda rows: run(model, rows), [None, PICKED, None]))
        assert made.call_count == 3
        before, _ = run(model, None)
        with torch.no_grad():
            model.get_parameter("blocks.0.mlp.down.weight").mul_(2)
        assert not torch.equal(run(model, None)[0], before)
    assert model.tiles is None


def hooked(model: Transformer) -> None:
    model.get_submodule("blocks.1.mlp.down").register_forward_pre_hook(lambda *given: None)


@pytest.mark.parametrize(
    "config, change",
    [
        (replace(NEMOTRON, family="olmo2", rotary_fraction=1.0), None),  # norms after attention and MLP
        (replace(NEMOTRON, family="qwen3", rotary_fraction=1.0), None),  # norms of heads
        (replace(NEMOTRON, family="qwen2", rotary_fraction=1.0), None),  # biases
        (replace(NEMOTRON, family="granite", rotary_fraction=1.0, residual_multiplier=0.5), None),
        (replace(NEMOTRON, blocks=uniform_blocks(3, 4, 2, 32, 80)), None),  # no whole tiles
        (replace(NEMOTRON, blocks=(*NEMOTRON.blocks, BlockConfig(4, 2, 32, 80))), None),  # nor in one layer
        (NEMOTRON, hooked),
        (NEMOTRON, lambda model: add_adapters(model, LoraConfig(rank=4, alpha=8), seed=0)),
        (NEMOTRON, lambda model: setattr(model, "checkpoint_activations", True)),
        (NEMOTRON, lambda model: setattr(model, "compute_dtype", torch.float32)),
    ],
)
def test_others_go_one_by_one(config: ModelConfig, change: Callable[[Transformer], object] | None) -> None:
    model = model_of(config)
    if change is not None:
        change(model)
    assert not takes(model)
