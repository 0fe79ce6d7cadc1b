"""Engine arguments, and the engine of a model folder."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from gristmill.core.device import pick_device, pick_precision
from gristmill.data.chat import Message, find_format, to_dicts
from gristmill.engine.engine import Engine
from gristmill.generation.api import Request, SamplingParams
from gristmill.model.hf import load_model, saved_as
from gristmill.model.quantized import Quantize
from gristmill.model.transformer import PRECISIONS

CACHE_DTYPES = PRECISIONS | {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


@dataclass(frozen=True, kw_only=True)
class EngineArgs:
    """Engine arguments: types, quantization and sizes.

    Attributes:
        dtype: of activations, and of matrices that are not quantized; "auto": bf16 on a GPU, else fp32.
        quantize: as in `Engine`; "" for what the model's folder was saved as.
        cache: type of keys and values; "" for `dtype`.
        max_batch, cache_tokens: as in `Engine`.
        chat_format: "auto", or a name.
        device: as `pick_device` takes it.
    """

    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    quantize: Quantize = ""
    cache: Literal["", "fp32", "bf16", "int8", "fp8"] = ""
    max_batch: int = 256
    cache_tokens: int | None = None
    chat_format: str = "auto"
    device: str = "auto"


def load_engine(folder: Path, args: EngineArgs = EngineArgs(), *, name: str = "", own: bool = True) -> Engine:
    """Load a model folder into an engine. `own` as in `Engine`."""
    device = pick_device(args.device)
    model, tokenizer = load_model(folder)
    return Engine(
        model.to(device),
        tokenizer,
        find_format(args.chat_format, tokenizer),
        name=name or folder.resolve().name,
        max_batch=args.max_batch,
        dtype=PRECISIONS[pick_precision(device, cpu="fp32") if args.dtype == "auto" else args.dtype],
        cache_tokens=args.cache_tokens,
        cache_dtype=CACHE_DTYPES[args.cache] if args.cache else None,
        quantize=args.quantize or saved_as(folder),
        own=own,
    )


def answer_rows(engine: Engine, prompts: Sequence[Sequence[Message]], sampling: SamplingParams, *, seed: int) -> Iterator[dict[str, Any]]:
    """Batch generation: answers as rows, as they finish."""
    requests = [Request(str(i), tuple(messages), sampling, seed) for i, messages in enumerate(prompts)]
    for request, completions in engine.generate(requests):
        yield {
            "index": int(request.id),
            "messages": to_dicts(request.messages),
            "responses": [
                {"text": c.text, "num_tokens": c.num_tokens, "logprob": sum(c.logprobs), "finish": c.finish} for c in completions
            ],
        }
