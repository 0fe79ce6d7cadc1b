"""Greedy text of the engine equals that of transformers' generate, in every family, with windows smaller than the text."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from gristmill.engine.core import Core
from gristmill.engine.kernels import library as kernels
from gristmill.engine.layers import Decoder
from gristmill.engine.sequence import RequestState
from gristmill.generation.api import Request, SamplingParams
from gristmill.model.hf_save import save_model
from gristmill.model.packed import PackedShape
from gristmill.model.transformer import Transformer
from tests.engine.test_core import words
from tests.model.test_huggingface import CONFIGS, TOKENIZER, randomise

NAMES = ["llama_biases", "qwen3_windows", "mistral_windows", "smollm3_windows", "olmo2_bias", "granite", "phi3", "gemma2", "gemma3"]
PROMPTS = [list(range(5, 35)), [*range(5, 25), 3, 4], [9] * 11]
NUM_TOKENS = 24


def model_of(name: str) -> Transformer:
    model = Transformer(CONFIGS[name])
    randomise(model)
    return model.requires_grad_(False)


def answers(model: Transformer, **options: object) -> list[tuple[int, ...]]:
    """Greedy answers to PROMPTS, from one engine core; prompts are read in pieces, and the first two begin alike."""
    never = np.zeros(model.config.vocab_size, np.bool_)
    dtypes = {"dtype": torch.float32, "quantize": "", "cache_dtype": torch.float32, "max_batched_tokens": 8} | options
    decoder = Decoder(model, dtypes.pop("dtype"), dtypes.pop("quantize"))  # type: ignore[arg-type]
    core = Core(decoder, 4, never, response_text=words, decode=words, cache_tokens=None, **dtypes)  # type: ignore[arg-type]
    states = []
    for number, prompt in enumerate(PROMPTS):
        sampling = SamplingParams(0.0, max_tokens=NUM_TOKENS)
        states.append(RequestState(Request(str(number), (), sampling), np.array(prompt, np.int32), NUM_TOKENS, number))
        core.add(states[-1])
    while not core.idle:
        core.step()
    return [state.completions[0].tokens for state in states if state.completions[0] is not None]


@pytest.mark.parametrize("backend", ["compiled", "torch"])
@pytest.mark.parametrize("name", NAMES)
def test_greedy_text_is_transformers(name: str, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "torch":
        monkeypatch.setattr("gristmill.engine.attention.supported_by_kernels", lambda *args: False)
    elif kernels.load() is None:
        pytest.skip("no compiler")
    model = model_of(name)
    save_model(model, TOKENIZER, tmp_path / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager")
    said = answers(model)
    assert len(set(said)) == len(PROMPTS)
    for prompt, tokens in zip(PROMPTS, said, strict=True):
        with torch.no_grad():
            logits_TV = theirs(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
        assert tokens == tuple(logits_TV.argmax(-1).tolist())
    if backend == "compiled":  # and through their own cache
        out = theirs.generate(torch.tensor([PROMPTS[0]]), do_sample=False, max_new_tokens=NUM_TOKENS, eos_token_id=-1, pad_token_id=0)
        assert said[0] == tuple(out[0, len(PROMPTS[0]) :].tolist())


@pytest.mark.parametrize("name", ["smollm3_windows", "olmo2_bias", "granite", "phi3", "gemma2"])
@pytest.mark.parametrize(
    ("quantize", "cache", "far"), [("", torch.float32, 1e-4), ("int8", torch.int8, 0.15), ("fp8", torch.float32, 0.35)]
)
def test_scores_of_engines_are_near_the_models(name: str, quantize: str, cache: torch.dtype, far: float) -> None:
    model, shape = model_of(name), PackedShape.from_lengths([30, 11, 20])
    ids_T = torch.randint(0, 272, (61,), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        exact_TV = model(ids_T, shape)
        decoder = Decoder(model, torch.float32, quantize)  # type: ignore[arg-type]
        rough_TV = decoder.logits(decoder.hidden(ids_T, shape, cache))
    assert (rough_TV - exact_TV).norm() <= far * exact_TV.norm()


@pytest.mark.parametrize("name", ["smollm3_windows", "gemma2", "gemma3"])
@pytest.mark.parametrize("cache", [torch.bfloat16, torch.int8, torch.float8_e4m3fn])
def test_generation_agrees_with_scoring(name: str, cache: torch.dtype) -> None:
    """A greedy token is the likeliest, or nearly, by scores of the whole text with the same matrices and cache."""
    model = model_of(name)
    said = answers(model, quantize="int8", cache_dtype=cache)
    decoder = Decoder(model, torch.float32, "int8")
    with torch.inference_mode():
        for prompt, tokens in zip(PROMPTS, said, strict=True):
            ids_T = torch.tensor([*prompt, *tokens])
            h_TD = decoder.hidden(ids_T, PackedShape.from_lengths([len(ids_T)]), cache)
            logits_TV = decoder.logits(h_TD)[len(prompt) - 1 : -1]
            chosen_T = logits_TV.gather(1, ids_T[len(prompt) :, None])[:, 0]
            assert (logits_TV.amax(1) - chosen_T).max() < 0.15 * logits_TV.std()
