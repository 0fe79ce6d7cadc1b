"""The compiled decoder beside the layers one by one."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gristmill.engine import linear, model_runner
from gristmill.engine.attention import TorchAttention
from gristmill.engine.kernels import library as kernels
from gristmill.engine.layers import Decoder
from gristmill.engine.model_runner import ModelRunner
from gristmill.engine.scheduler import SchedulerOutput
from gristmill.engine.sequence import BatchState
from gristmill.model.config import FAMILIES, BlockConfig, ModelConfig
from gristmill.model.quantized import Head, Quantize
from gristmill.model.transformer import Transformer

pytestmark = pytest.mark.skipif(kernels.load() is None, reason="no compiler")
FP32, BF16, VOCABULARY, LONGEST = torch.float32, torch.bfloat16, 64, 128
# type of activations, quantization of layers and head, type of the cache
Kind = tuple[torch.dtype, Quantize, Head, torch.dtype]
KINDS: list[Kind] = [
    (FP32, "", "", FP32),
    (BF16, "", "", BF16),
    (FP32, "int8", "", torch.int8),
    (BF16, "int8", "int8", BF16),
    (BF16, "int8-weight", "int8", torch.int8),
    (BF16, "int4", "int8", BF16),
    (FP32, "int4", "", torch.float8_e4m3fn),
]


@pytest.fixture(autouse=True)
def any_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """All products compiled, as on a CPU that has no instructions for eight bits and bf16."""
    monkeypatch.setattr(linear, "has_bf16_products", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)


def model_of(family: str, seed: int = 0, num_blocks: int = 5) -> Transformer:
    draw = np.random.default_rng(seed)
    parts = FAMILIES[family]
    window, rope = (int(draw.choice([0, 7])) if parts.windows else 0), "local" if parts.rope == "local" else "global"
    blocks = (
        BlockConfig(4, 2, 8, 64, window, rope if window else "global"),
        BlockConfig(4, 4, 8, 32),
        BlockConfig(0, 0, 0, 32),
        BlockConfig(4, 1, 8, 0),
        BlockConfig(4, 1, 8, 96, window, rope if window else "global"),
    )
    options: dict[str, object] = {"tie_embeddings": bool(draw.integers(2)), "rotary_fraction": 0.5 if parts.partial_rotary else 1.0}
    options |= {bias: bool(draw.integers(2)) for bias in parts.optional_biases}
    if family == "granite":
        options |= {"residual_multiplier": 0.3, "logits_scaling": 2.0, "attention_scale": 0.2, "embedding_multiplier": 3.0}
    if family == "gemma2":
        options |= {"attention_soft_cap": 5.0, "logits_soft_cap": 3.0}
    model = Transformer(ModelConfig(family, VOCABULARY, 32, blocks[:num_blocks], LONGEST, init_std=0.3, **options))  # type: ignore[arg-type]
    torch.manual_seed(seed)
    for parameter in model.parameters():  # biases and gains too
        parameter.data += torch.randn_like(parameter) * 0.1
    return model.requires_grad_(False)


def decode(
    model: Transformer, kind: Kind, prompts: list[list[int]], num_steps: int = 4, *, compiled: bool = True
) -> tuple[list[list[int]], Tensor]:
    """Greedy tokens of some sequences that are decoded together, and the logits of all steps [steps, sequences, V]."""
    dtype, quantize, head, cache = kind
    decoder = Decoder(model if quantize else model.to(dtype), dtype, quantize, head=head)
    batch = BatchState(len(prompts), LONGEST)
    runner = ModelRunner(decoder, batch, cache)
    num_blocks = batch.block_tables.size
    runner.allocate_kv_cache(num_blocks)
    batch.block_tables[:] = np.arange(num_blocks).reshape(-1, len(prompts)).T  # neighbours' blocks lie between each other's
    made = runner.compiled_decoder
    assert made is not None
    due, taken, hidden, rows, logits = [0], [0], made.hidden, [list(prompt) for prompt in prompts], []

    def counted(x_TD: Tensor, last_R: np.ndarray | None = None) -> Tensor:
        taken[0] += 1
        return hidden(x_TD, last_R)

    made.hidden, made.max_rows = counted, made.max_rows if compiled else 0  # type: ignore[method-assign]
    sequences: list[Any] = [SimpleNamespace(slot=slot, state=SimpleNamespace(adapter=None)) for slot in range(len(rows))]
    for number in range(num_steps):
        counts = [1 if number else len(row) for row in rows]
        due[0] += sum(counts) <= made.max_rows
        step = SchedulerOutput(sequences, len(rows) if number else 0, num_tokens=counts, num_drafts=[0] * len(rows))
        step.starts, step.sample_rows = [len(row) - count for row, count in zip(rows, counts, strict=True)], list(range(len(rows)))
        for slot, row in enumerate(rows):
            batch.token_ids[slot, : len(row)] = row
        logits.append(runner.run(step).clone())
        for row, token in zip(rows, logits[-1].argmax(-1).tolist(), strict=True):
            row.append(token)
    assert taken == due and taken[0] >= (num_steps - 1 if compiled else 0)
    return rows, torch.stack(logits)


def near(left: Tensor, right: Tensor, kind: Kind) -> bool:
    """Where a cache rounds to eight bits, another last bit of fp32 may become another value."""
    dtype, _, _, cache = kind
    return bool((left - right).abs().max() <= (1e-4 if dtype == cache == FP32 else 0.02) * right.abs().max())


def prompts_of(seed: int, count: int) -> list[list[int]]:
    draw = np.random.default_rng(seed)
    return [draw.integers(VOCABULARY, size=int(draw.integers(2, 40))).tolist() for _ in range(count)]


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=6, derandomize=True)  # the likeliest tokens of other models may be equally likely
@given(family=st.sampled_from(sorted(FAMILIES)), seed=st.integers(0, 10**6), count=st.integers(1, 6), threads=st.integers(1, 2))
def test_it_computes_what_the_layers_do(kind: Kind, family: str, seed: int, count: int, threads: int) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        made, prompts = model_of(family, seed), prompts_of(seed, count)
        rows, logits = decode(made, kind, prompts)
        other_rows, other_logits = decode(made, kind, prompts, compiled=False)
    finally:
        torch.set_num_threads(before)
    assert near(logits, other_logits, kind)
    assert rows == other_rows


@pytest.mark.parametrize("kind", KINDS[:2])
def test_a_last_layer_without_attention_goes_on_with_the_last_tokens(kind: Kind) -> None:
    made, prompts = model_of("llama", num_blocks=3), prompts_of(3, 2)
    (rows, logits), (other_rows, other_logits) = (decode(made, kind, prompts, compiled=compiled) for compiled in (True, False))
    assert rows == other_rows and near(logits, other_logits, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_reads_its_own_cache_alone(kind: Kind) -> None:
    made, prompts = model_of("qwen3"), prompts_of(5, 5)
    rows, logits = decode(made, kind, prompts)
    for slot, prompt in enumerate(prompts):
        (alone,), alone_logits = decode(made, kind, [prompt])
        assert alone == rows[slot] and near(alone_logits[:, 0], logits[:, slot], kind)


def test_changed_weights_are_read() -> None:
    made = model_of("llama").to(FP32)
    decoder, batch = Decoder(made, FP32), BatchState(1, LONGEST)
    runner = ModelRunner(decoder, batch, FP32)
    runner.allocate_kv_cache(1)
    before = runner.compiled_decoder
    for parameter in made.parameters():
        parameter.data *= 1.5
    decoder.refresh()
    assert before is not None and runner.fits_compiled_decoder(1) and runner.compiled_decoder is not before
    assert runner.compiled_decoder is not None and runner.compiled_decoder.layers is decoder.layers


def test_what_torch_has_a_part_in_goes_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    made = model_of("llama")
    batch = BatchState(1, LONGEST)
    assert ModelRunner(Decoder(made, FP32), batch, FP32).compiled_decoder is not None
    assert ModelRunner(Decoder(made, FP32, "fp8"), batch, FP32).compiled_decoder is None
    monkeypatch.setattr(model_runner, "select_backend", lambda config, cache, dtype, angles: TorchAttention(config, cache, angles=angles))
    assert ModelRunner(Decoder(made, FP32), batch, FP32).compiled_decoder is None
