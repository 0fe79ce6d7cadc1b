"""What holds of sampled answers whatever else is in flight, and what does not: why a step that was cut off is sampled again as a whole."""

from pathlib import Path
from statistics import fmean
from typing import Literal

import pytest
import torch

from gristmill.data.chat import Message
from gristmill.data.find_format import find_format
from gristmill.engine import engine as engine_module
from gristmill.engine.engine import Engine
from gristmill.generation.api import Completion, Request, SamplingParams
from gristmill.model.hf import load_model

REQUESTS = [
    Request(f"r{i}", (Message("user", f"Say {word}{' please' * (i % 5)}."),), SamplingParams(temperature=1.0, max_tokens=16, n=2), 0)
    for i, word in enumerate(["bee", "moss", "rain", "salt", "wind", "tree", "owl", "sea", "oak", "fog"])
]
Answers = dict[str, list[Completion]]


@pytest.fixture(autouse=True)
def _every_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "STEP_PRODUCTS", 1)


def sample(base: Path, dtype: torch.dtype, quantize: Literal["", "int8"], *, max_batch: int, workers: int) -> Answers:
    model, tokenizer = load_model(base)
    engine = Engine(model, tokenizer, find_format("auto", tokenizer), name="x", max_batch=max_batch, dtype=dtype, quantize=quantize)
    engine.num_workers = workers
    return {request.id: answers for request, answers in engine.generate(REQUESTS)}


def differences(one: Answers, other: Answers) -> list[float]:
    """Of the log-probabilities of tokens that both say, up to the first that they do not share."""
    out = []
    for name, answers in one.items():
        for a, b in zip(answers, other[name], strict=True):
            for x, y, p, q in zip(a.tokens, b.tokens, a.logprobs, b.logprobs, strict=False):
                if x != y:
                    break
                out.append(abs(p - q))
    return out


def same(one: Answers, other: Answers) -> int:
    return sum(a.tokens == b.tokens for name in one for a, b in zip(one[name], other[name], strict=True))


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("dtype", "quantize", "largest", "mean"),
    [(torch.float32, "", 1e-3, 1e-5), (torch.bfloat16, "", 1.0, 0.02), (torch.bfloat16, "int8", 1.0, 0.02)],
    ids=["fp32", "bf16", "int8"],
)
def test_answers_with_many_and_with_few_in_flight(
    tiny_base: Path, dtype: torch.dtype, quantize: Literal["", "int8"], largest: float, mean: float, workers: int
) -> None:
    """The same requests in the same engine give the same bits. With fewer in flight the last digits differ, since products of few rows
    are summed in another order; in fp32 the tokens are the same all the same.
    """
    many = sample(tiny_base, dtype, quantize, max_batch=256, workers=workers)
    again = sample(tiny_base, dtype, quantize, max_batch=256, workers=workers)
    assert {n: [(a.tokens, a.logprobs) for a in out] for n, out in many.items()} == {
        n: [(a.tokens, a.logprobs) for a in out] for n, out in again.items()
    }
    few = sample(tiny_base, dtype, quantize, max_batch=4, workers=workers)
    found, total = differences(many, few), 2 * len(REQUESTS)
    assert max(found) < largest and fmean(found) < mean and len(found) > total
    assert same(many, few) == total if dtype == torch.float32 else same(many, few) >= total // 2
