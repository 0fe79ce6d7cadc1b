"""Next-token training on whole documents."""

from collections.abc import Iterable
from typing import Protocol

import numpy as np

from gristmill.model.transformer import Transformer
from gristmill.train.loop import LossOutput
from gristmill.train.losses import cross_entropy_sum
from gristmill.train.packing import Sample, TokenBatch


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
