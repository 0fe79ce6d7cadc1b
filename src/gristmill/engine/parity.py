"""Parity of engine and model: the KL divergence that quantization costs, and the train-inference mismatch of log-probabilities.

Shapes: T tokens of packed conversations, P of them at a time, V vocabulary.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from gristmill.data.chat import Message
from gristmill.engine.engine import MAX_LOGIT_ELEMENTS, MAX_PACKED_TOKENS, Engine
from gristmill.generation.api import Completion, Request
from gristmill.model.packed import PackedShape
from gristmill.model.transformer import Transformer


@torch.inference_mode()
def divergence(engine: Engine, conversations: Sequence[Sequence[Message]]) -> dict[str, float]:
    """KL divergence of the engine, with its quantized layers and cache, from its model, on every token that an assistant says.

    Returns:
        kl: mean of KL(model || quantized), nats a token; kl_max: the largest; agreement: share of tokens whose argmax is the same;
        tokens: how many.
    """
    model = engine.model
    rendered = [engine.chat_format.render(conversation, engine.tokenizer) for conversation in conversations]
    total, kl_max, same, count = 0.0, 0.0, 0, 0
    at = 0
    while at < len(rendered):
        end, size = at, 0
        while end < len(rendered) and (end == at or size + len(rendered[end].ids) <= MAX_PACKED_TOKENS):
            size += len(rendered[end].ids)
            end += 1
        part, at = rendered[at:end], end
        shape = PackedShape.from_lengths([len(one.ids) for one in part], engine.device)
        ids_T = torch.tensor([token for one in part for token in one.ids], device=engine.device)
        mask_T = torch.tensor([trained for one in part for trained in one.mask], device=engine.device)
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
