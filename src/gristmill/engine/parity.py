"""Parity of engine and model: the KL divergence that quantization costs, and the train-inference mismatch of log-probabilities.

Shapes: T tokens of packed conversations, P of them at a time, V vocabulary.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from gristmill.core.device import pick_precision
from gristmill.core.errors import InputError
from gristmill.core.io import read_bytes
from gristmill.data.chat import Message
from gristmill.engine.engine import MAX_LOGIT_ELEMENTS, MAX_PACKED_TOKENS, Engine
from gristmill.engine.load import EngineArgs, load_engine
from gristmill.generation.api import Completion, Request
from gristmill.model.hf import load_model
from gristmill.model.packed import PackedShape
from gristmill.model.transformer import PRECISIONS, Transformer

SAMPLE = Path(__file__).with_name("sample.txt")
MAX_SAMPLE_BYTES, MAX_SAMPLE_TOKENS, SAMPLE_PIECE = 1 << 20, 4096, 512


def divergence(engine: Engine, conversations: Sequence[Sequence[Message]]) -> dict[str, float]:
    """KL divergence of the engine, with its quantized layers and cache, from its model, on every token that an assistant says.

    Returns:
        kl: mean of KL(model || quantized), nats a token; kl_max: the largest; agreement: share of tokens whose argmax is the same;
        tokens: how many.
    """
    rendered = [engine.chat_format.render(conversation, engine.tokenizer) for conversation in conversations]
    return _divergence(engine, engine.model, [(one.ids, one.mask) for one in rendered])


def read_sample(path: Path | None) -> str:
    """The text of a file, or a built-in one: prose, talk, code and figures.

    Raises:
        InputError: the file cannot be read, or holds no text.
    """
    text = read_bytes(path or SAMPLE)[:MAX_SAMPLE_BYTES].decode("utf-8", "replace").strip()
    if not text:
        raise InputError(f"Give a file with text: {path} holds none.")
    return text


def saved_divergence(folder: Path, quantized: Path, text: str) -> dict[str, float]:
    """KL divergence of a quantized folder from the folder that it was made of, on the first tokens of a text; as `divergence` gives it."""
    dtype = pick_precision(torch.device("cpu"))
    engine = load_engine(quantized, EngineArgs(dtype=dtype, device="cpu"))  # type: ignore[arg-type]
    model, tokenizer = load_model(folder, PRECISIONS[dtype], vector_dtype=torch.float32)
    ids = tokenizer.encode(text)[:MAX_SAMPLE_TOKENS]
    size = min(SAMPLE_PIECE, model.config.max_positions)
    pieces = [ids[at : at + size] for at in range(0, len(ids), size)]
    return _divergence(engine, model, [(piece, [True] * len(piece)) for piece in pieces])


@torch.inference_mode()
def _divergence(engine: Engine, model: Transformer, texts: Sequence[tuple[Sequence[int], Sequence[bool]]]) -> dict[str, float]:
    """Of texts: ids, and whether each counts."""
    total, kl_max, same, count = 0.0, 0.0, 0, 0
    at = 0
    while at < len(texts):
        end, size = at, 0
        while end < len(texts) and (end == at or size + len(texts[end][0]) <= MAX_PACKED_TOKENS):
            size += len(texts[end][0])
            end += 1
        part, at = texts[at:end], end
        shape = PackedShape.from_lengths([len(ids) for ids, _ in part], engine.device)
        ids_T = torch.tensor([token for ids, _ in part for token in ids], device=engine.device)
        mask_T = torch.tensor([counts for _, mask in part for counts in mask], device=engine.device)
        target_T = (mask_T & (shape.positions_T > 0)).nonzero()[:, 0]
        own_TD, small_TD = model.hidden(ids_T, shape), engine.hidden(ids_T, shape)
        for rows_P in target_T.split(max(1, MAX_LOGIT_ELEMENTS // model.config.vocab_size)):
            own_PV = torch.log_softmax(model.logits(own_TD[rows_P - 1]).float(), -1)
            small_PV = torch.log_softmax(engine.logits(small_TD[rows_P - 1]), -1)
            kl_P = (own_PV.exp() * (own_PV - small_PV)).sum(-1)
            total, kl_max = total + float(kl_P.double().sum()), max(kl_max, float(kl_P.max()))
            same += int((own_PV.argmax(-1) == small_PV.argmax(-1)).sum())
            count += len(rows_P)
    return {"kl": total / max(1, count), "kl_max": kl_max, "agreement": same / max(1, count), "tokens": count}


@torch.inference_mode()
def logprob_parity(engine: Engine, model: Transformer, answered: Iterable[tuple[Request, list[Completion]]]) -> dict[str, float]:
    """Train-inference mismatch: log-probabilities of the engine beside those that the model computes for the same tokens, as training does.

    Returns:
        max and mean absolute difference, nats, and tokens compared.
    """
    differences: list[Tensor] = []
    for request, outs in answered:
        prompt = engine.chat_format.render_prompt(request.messages, engine.tokenizer)
        for out in outs:
            ids_T = torch.tensor([*prompt, *out.tokens], device=engine.device)
            h_TD = model.hidden(ids_T, PackedShape.from_lengths([len(ids_T)], engine.device))[len(prompt) - 1 : -1]
            logits_TV = model.logits(h_TD).float()
            own_T = logits_TV.log_softmax(-1).gather(-1, ids_T[len(prompt) :, None])[:, 0]
            differences.append((own_T.cpu() - torch.tensor(out.logprobs)).abs())
    all_T = torch.cat(differences) if differences else torch.zeros(1)
    return {"max": float(all_T.max()), "mean": float(all_T.mean()), "tokens": sum(map(len, differences))}
