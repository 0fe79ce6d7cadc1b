"""Scores of documents by a language model: mean-pooled hidden states, and bits per byte; of their first MAX_TOKENS tokens.

Shapes: N documents, D dimensions of the model, T tokens read at once.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from gristmill.core.device import pick_device
from gristmill.model.hf_config import read_config

MAX_TOKENS = 512  # of a document's beginning
PACK_TOKENS = 16_384  # read at once


def check(folder: Path) -> None:
    """Raise `InputError` unless there is a model of a kind that we know, and its tokenizer. Its weights are not looked at."""
    from gristmill.data.tokenizer import Tokenizer

    read_config(folder)
    Tokenizer.load(folder)


@cache
def _model(folder: Path) -> Any:
    from gristmill.model.hf import load_model

    model, tokenizer = load_model(folder)
    return model.eval().to(pick_device()), tokenizer


def _hidden(model: Any, ids: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], Any]]:
    """The states [T, D] of packs of the sequences that hold a token, and which these are."""
    import torch

    from gristmill.model.packed import PackedShape

    some = [n for n, one in enumerate(ids) if one]
    while some:
        count, size = 0, 0
        while count < len(some) and (count == 0 or size + len(ids[some[count]]) <= PACK_TOKENS):
            size += len(ids[some[count]])
            count += 1
        pack, some = some[:count], some[count:]
        device = model.embedding.device
        tokens_T = torch.tensor([token for n in pack for token in ids[n]], device=device)
        yield pack, model.hidden(tokens_T, PackedShape.from_lengths([len(ids[n]) for n in pack], device))


def mean_hidden_states(texts: Sequence[str], folder: Path) -> np.ndarray:
    """float32 [N, D]: means of the states over the first tokens of each text; 0 for a text of none."""
    import torch

    model, tokenizer = _model(folder)
    max_tokens = min(MAX_TOKENS, model.config.max_positions)
    ids = [one[:max_tokens] for one in tokenizer.encode_batch(texts)]
    mean_ND = np.zeros((len(texts), model.embedding.shape[1]), np.float32)
    with torch.inference_mode():
        for pack, h_TD in _hidden(model, ids):
            lengths = [len(ids[n]) for n in pack]
            begins = np.concatenate([[0], np.cumsum(lengths)[:-1]])
            mean_ND[pack] = np.add.reduceat(h_TD.float().cpu().numpy(), begins) / np.array(lengths, np.float32)[:, None]
    return mean_ND


def bits_per_byte(texts: Sequence[str], folder: Path) -> np.ndarray:
    """float64 [N]: bits a byte of the beginning of each text, as one that follows the end of another; NaN for a text of no token."""
    import torch

    from gristmill.train.losses import token_logprobs

    model, tokenizer = _model(folder)
    max_tokens = min(MAX_TOKENS, model.config.max_positions)
    targets = [one[:max_tokens] for one in tokenizer.encode_batch(texts)]
    ids = [[tokenizer.eos_id, *one[:-1]] if one else [] for one in targets]
    bits_N = np.full(len(texts), np.nan)
    with torch.inference_mode():
        for pack, h_TD in _hidden(model, ids):
            target_T = torch.tensor([token for n in pack for token in targets[n]], device=h_TD.device)
            nats_T = -token_logprobs(h_TD, model.unembedding(), target_T, cap=model.config.logits_soft_cap).double().cpu().numpy()
            lengths = [len(ids[n]) for n in pack]
            begins = np.concatenate([[0], np.cumsum(lengths)[:-1]])
            sizes = np.array([len(tokenizer.decode(targets[n], keep_special=True).encode()) for n in pack])
            bits_N[pack] = np.add.reduceat(nats_T, begins) / np.log(2) / np.maximum(sizes, 1)
    return bits_N
