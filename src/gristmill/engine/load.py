"""Engine arguments, and loading: a model folder as an engine that is ready to generate."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from gristmill.core.device import pick_device
from gristmill.data.chat import Message, find_format
from gristmill.engine.engine import Engine
from gristmill.generation.api import Request, SamplingParams
from gristmill.model.hf import load_model, saved_as
from gristmill.model.quantized import Quantize
from gristmill.model.transformer import PRECISIONS

CACHES = PRECISIONS | {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


@dataclass(frozen=True)
class EngineArgs:
    """How a model computes in the engine.

    Attributes:
        dtype: of activations, and of matrices that are not quantized.
        quantize: as in `Engine`; "" for what the model's folder was saved as.
        cache: type of keys and values; "" for `dtype`.
        max_batch, cache_tokens: as in `Engine`.
        chat_format: "auto", or a name.
        device: as `pick_device` takes it.
    """

    dtype: Literal["fp32", "bf16"] = "fp32"
    quantize: Quantize = ""
    cache: Literal["", "fp32", "bf16", "int8", "fp8"] = ""
    max_batch: int = 256
    cache_tokens: int | None = None
    chat_format: str = "auto"
    device: str = "auto"


def load_engine(folder: Path, how: EngineArgs = EngineArgs(), name: str = "", *, own: bool = True) -> Engine:
    """A model folder, ready to generate. `own` as in `Engine`."""
    device = pick_device(how.device)
    model, tokenizer = load_model(folder)
    return Engine(
        model.to(device),
        tokenizer,
        find_format(how.chat_format, tokenizer),
        name or folder.resolve().name,
        how.max_batch,
        PRECISIONS[how.dtype],
        how.cache_tokens,
        CACHES[how.cache] if how.cache else None,
        how.quantize or saved_as(folder),
        own,
    )


def answer_rows(engine: Engine, prompts: Sequence[Sequence[Message]], sampling: SamplingParams, *, seed: int) -> Iterator[dict[str, Any]]:
    """Answers as rows, as they finish."""
    requests = [Request(str(i), tuple(messages), sampling, seed) for i, messages in enumerate(prompts)]
    for request, completions in engine.generate(requests):
        yield {
            "index": int(request.id),
            "messages": [asdict(m) for m in request.messages],
            "responses": [
                {"text": c.text, "num_tokens": c.num_tokens, "logprob": sum(c.logprobs), "finish": c.finish} for c in completions
            ],
        }
