"""Parity of sampler and trainer, before and after a step of training, and of quantized layers and cache."""

from pathlib import Path
from queue import SimpleQueue

import pytest
import torch

from gristmill.core.errors import InputError
from gristmill.data.chat import Message
from gristmill.data.chat_format import FORMATS
from gristmill.engine.async_engine import AsyncEngine, TokenEvent
from gristmill.engine.engine import Engine
from gristmill.engine.parity import divergence, logprob_parity, read_sample, saved_divergence
from gristmill.generation.api import Completion, Request, SamplingParams
from gristmill.model.convert import quantize_folder
from gristmill.model.hf import load_model
from gristmill.model.quantized import Quantize
from gristmill.model.transformer import Transformer

REQUESTS = [Request(f"r{i}", (Message("user", f"Name a land. {i}"),), SamplingParams(max_tokens=20, n=2), seed=i) for i in range(5)]


def engine_of(tiny_base: Path, **options: object) -> Engine:
    model, tokenizer = load_model(tiny_base)
    return Engine(model, tokenizer, FORMATS["nemotron"], name="tiny", max_batch=8, cache_tokens=2048, **options)  # type: ignore[arg-type]


def change(model: Transformer) -> None:
    """What a step of training does to weights."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))


def answers(engine: Engine) -> list[tuple[Request, list[Completion]]]:
    return list(engine.generate(REQUESTS))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 0.2)])
def test_sampler_and_trainer_agree_also_after_training(tiny_base: Path, dtype: torch.dtype, bound: float) -> None:
    model, tokenizer = load_model(tiny_base)
    engine = Engine(model, tokenizer, FORMATS["nemotron"], name="tiny", max_batch=8, dtype=dtype, cache_tokens=2048)
    before = answers(engine)
    model.compute_dtype = dtype
    found = logprob_parity(engine, model, before)
    assert found["tokens"] == sum(out.num_tokens for _, outs in before for out in outs) > 30
    assert found["max"] < bound
    change(model)
    assert logprob_parity(engine, model, before)["max"] > 10 * bound or dtype == torch.bfloat16
    engine.refresh()
    assert logprob_parity(engine, model, answers(engine))["max"] < bound


def test_an_async_engine_takes_over_new_weights(tiny_base: Path) -> None:
    engine = engine_of(tiny_base)
    ended: SimpleQueue[TokenEvent] = SimpleQueue()
    async_engine = AsyncEngine(engine, lambda events: [ended.put(event) for event in events if event.sample < 0])
    async_engine.start()

    def ask() -> list[Completion]:
        state = engine.prepare(REQUESTS[0])
        async_engine.submit(state)
        assert ended.get(timeout=20).state is state
        return [c for c in state.completions if c is not None]

    try:
        first, again = ask(), ask()
        assert [c.text for c in first] == [c.text for c in again]
        change(engine.model)
        async_engine.refresh()
        assert logprob_parity(engine, engine.model, [(REQUESTS[0], ask())])["max"] < 1e-4, "no block of the old weights is read"
    finally:
        assert async_engine.stop()


@pytest.mark.parametrize("cache", [None, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize(("quantize", "bound"), [("", 0.01), ("int8", 0.05), ("int8-weight", 0.01), ("int4", 0.3), ("fp8", 0.1)])
def test_quantization_is_near(tiny_base: Path, quantize: Quantize, bound: float, cache: torch.dtype | None) -> None:
    engine = engine_of(tiny_base, quantize=quantize, cache_dtype=cache)
    before = answers(engine_of(tiny_base))
    conversations = [(*r.messages, Message("assistant", outs[0].text or "x")) for r, outs in before]
    found = divergence(engine, conversations)
    assert (
        0 <= found["kl"] < bound + (0.05 if cache else 0)
        and found["agreement"] > (0.7 if quantize == "int4" else 0.8)
        and found["tokens"] > 20
    )
    found_answers = answers(engine)
    released = engine_of(tiny_base, quantize=quantize, cache_dtype=cache, own=True)
    assert [outs for _, outs in found_answers] == [outs for _, outs in answers(released)]
    for request, outs in found_answers:
        scored = released.prompt_logprobs([*(prompt := engine.prepare(request).prompt_ids), *outs[0].tokens], 0)[0][len(prompt) - 1 :]
        probs, generated = torch.tensor(scored).exp(), torch.tensor(outs[0].logprobs).exp()  # activations of int4 are coarser in few rows
        assert torch.allclose(probs, generated, atol=0.08 if quantize == "int4" else 0.04), "texts are scored as they are generated"


@pytest.mark.parametrize("own", [False, True])
def test_an_output_matrix_in_eight_bits_is_near(tiny_base: Path, own: bool) -> None:
    plain = answers(engine_of(tiny_base))
    engine = engine_of(tiny_base, head="int8", own=own)
    assert engine.is_quantized and (engine.model.lm_head is None or engine.model.lm_head.weight.is_meta == own)
    found = answers(engine)
    assert [outs for _, outs in found] == [outs for _, outs in answers(engine)]
    if not own:
        conversations = [(*r.messages, Message("assistant", outs[0].text or "x")) for r, outs in plain]
        assert 0 < divergence(engine, conversations)["kl"] < 0.01
    for request, outs in found:
        scored = engine.prompt_logprobs([*(prompt := engine.prepare(request).prompt_ids), *outs[0].tokens], 0)[0][len(prompt) - 1 :]
        assert torch.allclose(torch.tensor(scored), torch.tensor(outs[0].logprobs), atol=0.01), "texts are scored as they are generated"


def test_a_saved_folder_is_compared_with_the_one_it_was_made_of(tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("Name a land. It is one of many, and its city lies by the sea. " * 20)
    sample = read_sample(tmp_path / "text.txt")
    found = {}
    for kind in ("int8-weight", "int4"):
        quantize_folder(tiny_base, tmp_path / kind, kind, dtype="fp32")  # type: ignore[arg-type]
        found[kind] = saved_divergence(tiny_base, tmp_path / kind, sample)
    assert 0 <= found["int8-weight"]["kl"] < found["int4"]["kl"] < 1 and found["int4"]["tokens"] > 100
    assert len(read_sample(None)) > 2000 and read_sample(None).isascii()
    (tmp_path / "empty.txt").write_text(" ")
    with pytest.raises(InputError, match="holds none"):
        read_sample(tmp_path / "empty.txt")


def test_a_quantized_engine_takes_over_new_weights(tiny_base: Path) -> None:
    engine = engine_of(tiny_base, quantize="int8")
    change(engine.model)
    engine.refresh()
    new = Engine(engine.model, engine.tokenizer, engine.chat_format, name="x", max_batch=8, cache_tokens=2048, quantize="int8")
    assert [outs for _, outs in answers(engine)] == [outs for _, outs in answers(new)]
