"""Engine arguments, and the engine of a model folder."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch

from gristmill.core.device import Arena, pick_device, trim_heap
from gristmill.core.errors import InputError
from gristmill.data.chat import Message, to_dicts
from gristmill.data.find_format import find_format
from gristmill.engine.engine import Engine
from gristmill.engine.layers import DecoderLayer, release
from gristmill.engine.speculative import SpeculativeConfig
from gristmill.generation.api import Request, SamplingParams
from gristmill.model.adapters import is_adapter, load_model
from gristmill.model.dtype import pick_dtype
from gristmill.model.hf import saved_as
from gristmill.model.hf_config import read_config
from gristmill.model.quantized import Head, Quantize, check_widths
from gristmill.model.transformer import PRECISIONS, Block

CACHE_DTYPES = PRECISIONS | {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


@dataclass(frozen=True, kw_only=True)
class EngineArgs:
    """Engine arguments: types, quantization and sizes.

    Attributes:
        dtype: of activations, and of matrices that are not quantized; as `pick_dtype` takes it.
        quantize: as in `Engine`; "" for what the model's folder was saved as.
        head: as in `Engine`.
        cache: type of keys and values; "" for `dtype`.
        max_batch, max_loras, cache_tokens, step_tokens, speculative: as in `Engine`.
        chat_format: "auto", or a name.
        device: as `pick_device` takes it.

    Raises:
        InputError: a step of no tokens.
    """

    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    quantize: Quantize = ""
    head: Head = ""
    cache: Literal["", "fp32", "bf16", "int8", "fp8"] = ""
    max_batch: int = 256
    max_loras: int = 8
    cache_tokens: int | None = None
    step_tokens: int | None = None
    speculative: SpeculativeConfig | None = None
    chat_format: str = "auto"
    device: str = "auto"

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "EngineArgs":
        """Those among a caller's options, by the command line's names; what else there is, as in `locals()`, is left out."""
        named = dict(options)
        if "format" in named:
            named["chat_format"] = named["format"]
        if "speculative_config" in named:
            named["speculative"] = SpeculativeConfig.parse(named["speculative_config"])
        return cls(**{field.name: named[field.name] for field in fields(cls) if field.name in named})

    def resolved(self, folder: Path) -> "EngineArgs":
        """With the type that "auto" stands for with a model folder, as what is kept of its answers records it."""
        return replace(self, dtype=pick_dtype(self.dtype, folder, pick_device(self.device), quiet=True))

    def __post_init__(self) -> None:
        if self.step_tokens is not None and self.step_tokens < 1:
            raise InputError(f"A step must have at least 1 token, got {self.step_tokens}: raise --step-tokens, or leave it out.")


def load_engine(folder: Path, args: EngineArgs = EngineArgs(), *, name: str = "", own: bool = True) -> Engine:
    """Load a model folder, or an adapter folder merged into its base, into an engine. `own` as in `Engine`."""
    device = pick_device(args.device)
    dtype = PRECISIONS[pick_dtype(args.dtype, folder, device)]
    adapter = is_adapter(folder)
    # quantizing what was merged would lose what was trained: only who asks for it gets it
    quantize = args.quantize or ("" if adapter else saved_as(folder))
    if quantize == "int4" and not adapter:
        check_widths(read_config(folder)[1])
    layers: list[DecoderLayer] = []
    arena = Arena()

    def quantized(block: Block) -> None:  # before the next is read, so that only one has its matrices in fp32
        layers.append(DecoderLayer(block, dtype, quantize, len(layers), arena))
        release(block)

    by_block = own and bool(quantize) and not adapter
    model, tokenizer = load_model(
        folder,
        torch.float32 if quantize and not by_block else dtype,
        vector_dtype=torch.float32,
        device=device,
        on_block=quantized if by_block else None,
    )
    chat_format = find_format(args.chat_format, tokenizer)
    trim_heap()  # a template's language leaves tens of megabytes
    return Engine(
        model,
        tokenizer,
        chat_format,
        name=name or folder.resolve().name,
        max_batch=args.max_batch,
        max_loras=args.max_loras,
        dtype=dtype,
        cache_tokens=args.cache_tokens,
        step_tokens=args.step_tokens,
        speculative=args.speculative,
        cache_dtype=CACHE_DTYPES[args.cache] if args.cache else None,
        quantize=quantize,
        head=args.head,
        own=own,
        layers=layers if by_block else None,
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
