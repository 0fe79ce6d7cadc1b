"""Next-token training on whole documents."""

from collections.abc import Iterable
from typing import Protocol

import numpy as np

from gristmill.data.token_store import TokenStore
from gristmill.model.transformer import Transformer
from gristmill.train.batches import Sample, TokenBatch
from gristmill.train.losses import cross_entropy_sum
from gristmill.train.trainer import LossOutput


class Encoder(Protocol):
    """The part of a tokenizer that pretraining needs."""

    eos_id: int

    def encode(self, text: str) -> list[int]: ...


def next_token_objective(model: Transformer, batch: TokenBatch) -> LossOutput:
    """Cross entropy over the trained targets of packed documents; the objective of pretraining and of SFT."""
    hidden_RD = model.hidden(batch.ids_T, batch.shape)[batch.rows_R]
    total, count = cross_entropy_sum(hidden_RD, model.unembedding(), batch.targets_R)
    return LossOutput(total, count)


def document_samples(documents: Iterable[str], tokenizer: Encoder, max_tokens: int) -> list[Sample]:
    """One sample a document: its tokens and an end-of-document token, all trained but the first.

    A document over ``max_tokens`` is split into pieces, so that no token is lost or doubled. Documents
    without text are left out.
    """
    return token_samples(([*tokenizer.encode(text), tokenizer.eos_id] for text in documents if text), max_tokens)


def token_samples(documents: Iterable[list[int]], max_tokens: int) -> list[Sample]:
    """Samples of documents that are token ids already, end-of-document token included."""
    samples = []
    for number, ids in enumerate(documents):
        for start in range(0, len(ids), max_tokens):
            piece = np.asarray(ids[start : start + max_tokens], dtype=np.int32)
            name = f"document {number}" if len(ids) <= max_tokens else f"document {number} from token {start}"
            samples.append(Sample(piece, np.arange(len(piece)) > 0, name))
    return samples


def store_samples(store: TokenStore, max_tokens: int, tokens: int | None = None) -> list[Sample]:
    """The documents in their order, each cut into pieces of at most `max_tokens`; see `token_samples`.

    Ids are int32 views of the map and masks are views of one array: neither is a copy.

    Args:
        tokens: no further document is given once there are so many.
    """
    mask = np.arange(max_tokens) > 0
    mask.flags.writeable = False
    out: list[Sample] = []
    number = first = 0
    for facts, shard in zip(store.facts["shards"], map(np.asarray, store.shards), strict=True):
        begin = 0
        for end in (store.ends_N[number : number + facts["documents"]] - first).tolist():
            if tokens is not None and first + begin >= tokens:
                return out
            for start in range(begin, end, max_tokens):
                name = f"document {number}" if end - begin <= max_tokens else f"document {number} from token {start - begin}"
                ids = shard[start : min(start + max_tokens, end)]
                out.append(Sample(ids, mask[: len(ids)], name))
            number += 1
            begin = end
        first += begin
    return out
