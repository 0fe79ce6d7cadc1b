"""Next-token objective (cross entropy), and its samples of whole documents: pretraining."""

from collections.abc import Iterable

import numpy as np

from gristmill.model.transformer import Transformer
from gristmill.train.batches import Sample, TokenBatch
from gristmill.train.losses import cross_entropy_sum
from gristmill.train.metrics import LossOutput


def next_token_objective(model: Transformer, batch: TokenBatch) -> LossOutput:
    """Cross entropy over the trained targets of packed documents; the objective of pretraining and of SFT."""
    hidden_RD = model.hidden(batch.ids_T, batch.shape, batch.rows_R)
    total, count = cross_entropy_sum(hidden_RD, model.unembedding(), batch.targets_R, cap=model.config.logits_soft_cap)
    return LossOutput(total, count)


def token_samples(documents: Iterable[list[int]], max_tokens: int) -> list[Sample]:
    """Samples of documents of token ids, end-of-document token included: all trained but the first.

    A document over ``max_tokens`` is split into pieces, so that no token is lost or doubled.
    """
    samples = []
    for number, ids in enumerate(documents):
        for start in range(0, len(ids), max_tokens):
            piece = np.asarray(ids[start : start + max_tokens], dtype=np.int32)
            name = f"document {number}" if len(ids) <= max_tokens else f"document {number} from token {start}"
            samples.append(Sample(piece, np.arange(len(piece)) > 0, name))
    return samples
