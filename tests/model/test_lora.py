"""Low-rank updates: the first step is the base's, gradients and merging are those of W + s B A, and small bases cost no dense copy."""

import math
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gristmill.core.errors import InputError
from gristmill.model.config import ModelConfig, uniform_blocks
from gristmill.model.hf_tensors import hf_rows, hf_tensors
from gristmill.model.lora import (
    LoraConfig,
    LoraLinear,
    adapter_parts,
    adapters_disabled,
    add_adapters,
    merge_adapter,
)
from gristmill.model.packed import PackedShape, pack
from gristmill.model.transformer import Transformer

LLAMA = ModelConfig("llama", 64, 32, uniform_blocks(2, 4, 2, 8, 48), 64, init_std=0.2)
FAMILIES = [LLAMA, replace(LLAMA, family="qwen2"), replace(LLAMA, family="nemotron", rotary_fraction=0.5, tie_embeddings=True)]
VARIANTS: list[dict[str, Any]] = [{}, {"rslora": True}, {"dora": True}, {"targets": ("q_proj", "v_proj", "down_proj")}]
CONFIG = LoraConfig(rank=4, alpha=6.0)
IDS, SHAPE, _ = pack([[[1, 2, 3, 4, 5], [1, 2, 3, 9, 8, 7]], [[6, 5, 4]]], torch.device("cpu"))  # two answers share a prompt


def make(config: ModelConfig = LLAMA, lora: LoraConfig | None = CONFIG, base: str = "fp32", trained: bool = False) -> Transformer:
    model = Transformer(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    if lora is not None:
        add_adapters(model, lora, seed=1, base=base)
    if trained:
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("lora_B"):
                    parameter.normal_(0, 0.1, generator=generator)
                elif name.endswith("magnitude"):
                    parameter.mul_(1.3)
    return model


def explicit(model: Transformer, config: LoraConfig) -> dict[str, Tensor]:
    """W' of every adapted matrix, by the formulas of the papers."""
    dense = hf_tensors(make(model.config, None))
    out = {}
    for name, part in adapter_parts(model).items():
        scale = config.alpha / (math.sqrt(part.rank) if config.rslora else part.rank)
        updated = dense[f"{name}.weight"] + scale * part.lora_B.detach() @ part.lora_A.detach()
        if part.magnitude is not None:
            updated = part.magnitude.detach()[:, None] * updated / updated.norm(dim=1, keepdim=True)
        out[name] = updated
    return out


@pytest.mark.parametrize("config", FAMILIES, ids=lambda c: c.family)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("base", ["fp32", "bf16", "int8"])
def test_the_first_step_is_the_base_bit_for_bit(config: ModelConfig, variant: dict[str, Any], base: str) -> None:
    model = make(config, replace(CONFIG, **variant), base)
    with torch.no_grad(), adapters_disabled():
        frozen = model(IDS, SHAPE)
    assert torch.equal(model(IDS, SHAPE), frozen)
    plain = make(config, None)(IDS, SHAPE)
    if base == "fp32":
        assert torch.equal(frozen, plain)
    else:
        assert 0 < float((frozen - plain).abs().max()) < 0.1 * float(plain.abs().max())


@pytest.mark.parametrize("config", FAMILIES, ids=lambda c: c.family)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_merging_gives_the_model_of_the_formula(config: ModelConfig, variant: dict[str, Any]) -> None:
    lora = replace(CONFIG, **variant)
    model, merged, by_hand = make(config, lora, trained=True), make(config, None), make(config, None)
    found = merge_adapter(merged, adapter_parts(model))
    views = hf_rows(by_hand)
    ratios = {}
    for name, updated in explicit(model, lora).items():
        rows = views[f"{name}.weight"]
        weight = torch.cat(rows)
        ratios.setdefault(name.rpartition(".")[2], []).append(((updated - weight).norm() ** 2, weight.norm() ** 2))
        for view, piece in zip(rows, updated.split([len(view) for view in rows]), strict=True):
            view.copy_(piece)
    torch.testing.assert_close(merged.state_dict(), by_hand.state_dict())
    torch.testing.assert_close(merged(IDS, SHAPE), model(IDS, SHAPE), rtol=1e-4, atol=1e-4)
    assert float((merged(IDS, SHAPE) - make(config, None)(IDS, SHAPE)).abs().max()) > 0.1
    for kind, pairs in ratios.items():
        assert found[kind]["update"] == pytest.approx(math.sqrt(sum(d for d, _ in pairs) / sum(w for _, w in pairs)), rel=1e-4)
        assert found[kind]["rounding"] == 0
    gate = set() if config.family == "nemotron" else {"gate_proj"}
    assert set(found) == set(lora.targets or {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"} | gate)


@pytest.mark.parametrize("variant", [VARIANTS[0], VARIANTS[1], VARIANTS[3]], ids=str)
def test_gradients_are_those_of_the_whole_matrix_in_a_packed_batch_with_shared_prompts(variant: dict[str, Any]) -> None:
    lora = replace(CONFIG, **variant)
    model, dense = make(lora=lora, trained=True), make(lora=None)
    merge_adapter(dense, adapter_parts(model))
    weights = torch.randn(IDS.shape[0], 64, generator=torch.Generator().manual_seed(0))
    (model(IDS, SHAPE) * weights).sum().backward()
    (dense(IDS, SHAPE) * weights).sum().backward()
    for parameter in dense.parameters():
        assert parameter.grad is not None
        parameter.data = parameter.grad  # so that the views by name show gradients
    gradients = hf_tensors(dense)
    parts = adapter_parts(model)
    assert len(parts) == 2 * (7 if not lora.targets else 3)
    for name, part in parts.items():
        full = gradients[f"{name}.weight"]
        assert part.lora_A.grad is not None and part.lora_B.grad is not None
        torch.testing.assert_close(part.lora_B.grad, part.scaling * full @ part.lora_A.detach().T, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(part.lora_A.grad, part.scaling * part.lora_B.detach().T @ full, rtol=1e-3, atol=1e-3)
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)


def test_dora_takes_the_lengths_of_rows_as_constants() -> None:
    model = make(lora=LoraConfig(rank=2, alpha=2.0, targets=("o_proj",), dora=True), trained=True)
    layer = model.blocks["0"].attention.output  # type: ignore[union-attr]
    assert isinstance(layer, LoraLinear)
    part = layer.parts["o_proj"]
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    weights = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    (layer(x) * weights).sum().backward()
    grads = {name: parameter.grad for name, parameter in part.named_parameters()}
    a, b, m = (parameter.detach().clone().requires_grad_() for parameter in (part.lora_A, part.lora_B, part.magnitude))
    updated = layer.weight + b @ a
    lengths = updated.detach().norm(dim=1)
    (x @ (updated * (m / lengths)[:, None]).T * weights).sum().backward()
    for ours, theirs in zip(("lora_A", "lora_B", "magnitude"), (a, b, m), strict=True):
        torch.testing.assert_close(grads[ours], theirs.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("base", ["bf16", "int8"])
def test_a_small_base_is_held_small_and_its_gradient_passes(base: str) -> None:
    model, whole = make(base=base, trained=True), make(trained=True)
    for module, other in zip(model.modules(), whole.modules(), strict=True):
        if isinstance(module, LoraLinear) and isinstance(other, LoraLinear):
            assert module.weight.element_size() == (2 if base == "bf16" else 1)
            other.weight.data = module.dense(torch.float32)
    whole.embedding.data = model.embedding.float()
    whole.lm_head.weight.data = model.unembedding().float()  # type: ignore[union-attr]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        loss = model(IDS, SHAPE).square().mean()
    dense_shapes = {tuple(module.weight.shape) for module in model.modules() if isinstance(module, LoraLinear)}
    assert not any(t.dtype == torch.float32 and tuple(t.shape) in dense_shapes for t in kept)  # no dense copy waits for backward
    loss.backward()
    whole(IDS, SHAPE).square().mean().backward()
    for ours, theirs in zip(adapter_parts(model).values(), adapter_parts(whole).values(), strict=True):
        torch.testing.assert_close(ours.lora_A.grad, theirs.lora_A.grad, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(ours.lora_B.grad, theirs.lora_B.grad, rtol=1e-4, atol=1e-6)


def test_one_thread_switches_adapters_off_for_itself_alone() -> None:
    model = make(trained=True)
    with ThreadPoolExecutor(1) as pool, torch.no_grad():
        on = model(IDS, SHAPE)
        with adapters_disabled():
            off, meanwhile = model(IDS, SHAPE), pool.submit(torch.no_grad()(model), IDS, SHAPE).result()
    assert torch.equal(meanwhile, on) and torch.equal(off, make(lora=None)(IDS, SHAPE)) and not torch.equal(on, off)


def test_rounding_of_a_small_update_is_told() -> None:
    model = make(lora=LoraConfig(rank=4, alpha=0.004), trained=True)
    found = merge_adapter(make(lora=None), adapter_parts(model), stored_as=torch.bfloat16)["up_proj"]
    assert found["update"] < 0.001 and found["rounding"] > 0.5 and found["unmoved"] > 0.5


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: LoraConfig(rank=0, alpha=1.0), "rank of at least 1"),
        (lambda: LoraConfig(rank=1, alpha=0.0), "alpha above 0"),
        (lambda: LoraConfig(rank=1, alpha=1.0, targets=("lm_head",)), "Leave lm_head out"),
        (lambda: LoraConfig(rank=1, alpha=1.0, targets=("query",)), "'query' is none of them"),
        (lambda: make(lora=replace(CONFIG, rank=17)), "at most 16, not 17: model.layers.0.self_attn.k_proj has 16 rows and 32 columns"),
        (lambda: make(FAMILIES[2], replace(CONFIG, targets=("gate_proj",))), "Leave gate_proj out"),
        (lambda: make(base="nf4"), "Install bitsandbytes"),
    ],
)
def test_what_does_not_fit_is_one_sentence(build: Callable[[], object], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)  # wherever it is installed
    with pytest.raises(InputError, match=said):
        build()


def test_nf4_goes_through_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Functional:
        @staticmethod
        def quantize_4bit(weight: Tensor, blocksize: int, compress_statistics: bool, quant_type: str) -> tuple[Tensor, Tensor]:
            assert (blocksize, compress_statistics, quant_type) == (64, True, "nf4")
            return torch.zeros(weight.numel() // 2, 1, dtype=torch.uint8), weight.sign()

        @staticmethod
        def dequantize_4bit(packed: Tensor, state: Tensor) -> Tensor:
            return state

    monkeypatch.setattr("importlib.import_module", lambda name: Functional)
    layer = make(base="nf4").blocks["0"].mlp.up  # type: ignore[union-attr]
    assert isinstance(layer, LoraLinear) and layer.weight.dtype == torch.uint8
    torch.testing.assert_close(layer(torch.eye(32)).T, make(lora=None).blocks["0"].mlp.up.weight.sign())  # type: ignore[union-attr]


def test_nf4_moves_with_its_model() -> None:
    class State:
        def to(self, device: torch.device) -> None:
            self.device = device

    layer = make().blocks["0"].mlp.up  # type: ignore[union-attr]
    assert isinstance(layer, LoraLinear)
    state = layer._state = State()
    layer.to("meta")
    assert state.device.type == "meta"


def test_nf4_by_bitsandbytes_itself() -> None:
    pytest.importorskip("bitsandbytes")
    layer, plain = make(base="nf4").blocks["0"].mlp.up, make(lora=None).blocks["0"].mlp.up  # type: ignore[union-attr]
    assert isinstance(layer, LoraLinear) and layer.weight.nbytes == plain.weight.numel() // 2
    for dtype in (torch.float32, torch.bfloat16):
        error = layer.dense(dtype).float() - plain.weight
        assert layer.dense(dtype).dtype == dtype and 0.01 < float(error.norm() / plain.weight.norm()) < 0.15


def test_other_shapes_of_batches_compute_the_same() -> None:
    model = make(trained=True)
    alone = model(torch.tensor([6, 5, 4]), PackedShape.from_lengths([3], torch.device("cpu")))
    torch.testing.assert_close(model(IDS, SHAPE)[-3:], alone, rtol=1e-4, atol=1e-4)
