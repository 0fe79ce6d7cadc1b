"""Triton attention and CUDA graphs: on a GPU where there is one, else by Triton's interpreter, which knows no bfloat16."""

import os
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when it is imported
pytest.importorskip("triton")

from gristmill.engine import attention, model_runner  # noqa: E402
from gristmill.engine.attention import AttentionMetadata, TritonAttention  # noqa: E402
from gristmill.engine.core import Core  # noqa: E402
from gristmill.engine.kernels import library as kernels  # noqa: E402
from gristmill.engine.layers import Norm  # noqa: E402
from gristmill.engine.speculative import SpeculativeConfig  # noqa: E402
from gristmill.model.config import BlockConfig, ModelConfig  # noqa: E402
from gristmill.model.layers import LayerNorm1P, RMSNorm  # noqa: E402
from tests.engine.test_core import compare, core_of, finish, model_of, states_of  # noqa: E402


@pytest.mark.parametrize("dtype", [torch.float32] if DEVICE == "cpu" else [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cache", list(kernels.CACHE_TYPES))
@settings(deadline=None, max_examples=5 if DEVICE == "cpu" else 50)
@given(seed=st.integers(0, 10**6))
def test_attention_equals_torchs(dtype: torch.dtype, cache: torch.dtype, seed: int) -> None:
    compare(TritonAttention, dtype, cache, seed, DEVICE)


@pytest.mark.parametrize("cache", [torch.int8, torch.float8_e4m3fn])
def test_eight_bits_are_rounded_as_torch_rounds_them(cache: torch.dtype) -> None:
    """All numbers of e4m3 and those halfway between two, which int8 has some of."""
    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    halves = (numbers[1:] + numbers[:-1]) / 2
    values = torch.cat([numbers, halves, -halves, torch.zeros(-3 * 127 % 15)])[: 15 * 25].view(25, 15)
    top = torch.full((25, 1), 448.0 if cache == torch.float8_e4m3fn else 127.0)
    key = torch.cat([top, values if cache == torch.float8_e4m3fn else values.clamp(-127, 127)], 1)
    qkv = torch.stack([key, key, key.flip(1)], 1).to(DEVICE)  # a query, a key, a value
    config = ModelConfig("smollm3", 10, 16, (BlockConfig(1, 1, 16, 16, rope="none"),), 64)
    positions, one = np.arange(25), np.array([25], np.int32)
    step = AttentionMetadata(np.array([0, 25], np.int32), one, one * 0, np.array([[1]], np.int32), positions, 0)
    kept = []
    for make in (TritonAttention, attention.TorchAttention):
        stored = attention.KVCache(config, cache, torch.device(DEVICE))
        stored.allocate(2)
        stored.memory.zero_()
        backend = make(config, stored, angles={"none": (torch.zeros(64, 0, device=DEVICE),) * 2})
        backend.prepare(step)
        backend.attend(0, qkv)
        kept.append(torch.where(stored.memory == 128, 0, stored.memory) if cache == torch.float8_e4m3fn else stored.memory)  # -0 is 0
    assert torch.equal(*kept) and int(kept[0].count_nonzero()) > 600


@pytest.mark.parametrize("most", [1, 2, 16])
def test_split_keys_give_the_same(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(attention, "MAX_SPLITS", most)
    for seed in range(3):
        compare(TritonAttention, torch.float32, torch.float32, seed, DEVICE)


@pytest.mark.parametrize("rows", [16, 32, 64, 128])
def test_tiles_of_any_size_give_the_same(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(attention, "TILE_ROWS", rows)
    compare(TritonAttention, torch.float32, torch.float32, 3, DEVICE)


@pytest.mark.parametrize("family", ["nemotron", "llama"])
@pytest.mark.parametrize("size", [1, 40, 64])
def test_a_fused_norm_equals_torchs(family: str, size: int) -> None:
    torch.manual_seed(0)
    module = model_of(family).final_norm if size == 32 else norm_of(family, size)
    norm = Norm(module.to(DEVICE))
    norm.library = None
    x, delta = (3 * torch.randn(5, size, device=DEVICE) + 1 for _ in range(2))
    for added in (None, delta):
        norm.fused = False
        expected = norm(x.clone(), added)
        norm.fused = True
        mine = x.clone()
        found = norm(mine, added)
        assert found[0] is mine and torch.equal(mine, expected[0]) and torch.allclose(found[1], expected[1], atol=1e-5)


def norm_of(family: str, size: int) -> torch.nn.Module:
    norm: torch.nn.Module = LayerNorm1P(size, 1e-5) if family == "nemotron" else RMSNorm(size, 1e-5)
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    return norm.requires_grad_(False)


@pytest.mark.parametrize(
    "options", [{"max_batch": 2, "blocks": 12}, {"max_batch": 2, "speculative": SpeculativeConfig(prompt_lookup_min=1)}]
)
def test_captured_steps_give_the_same_answers(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    model = model_of().to(DEVICE)
    plain = finish(core_of(model, **options), states_of(2, longest=20, answer=5))
    monkeypatch.setattr(model_runner, "select_backend", lambda config, cache, dtype, **angles: TritonAttention(config, cache, **angles))
    core: Core = core_of(model, **options)
    assert finish(core, states_of(2, longest=20, answer=5)) == plain
    graphs = core.model_runner.cuda_graphs
    assert graphs is not None and len(graphs.captured) == core.batch_state.num_slots, "of every size, at the start"
    core.refresh()
    assert not graphs.captured
