"""Reward regression: five attributes from the state of the last end-of-turn token (report section 3.1)."""

from collections.abc import Iterable

import numpy as np

from gristmill.core.errors import InputError
from gristmill.data.chat_format import ChatFormat
from gristmill.data.rows import ATTRIBUTES, Rated
from gristmill.data.tokenizer import Tokenizer
from gristmill.model.reward import RewardModel
from gristmill.train.batches import IGNORE_LABEL, RatedBatch, RatedSample
from gristmill.train.checkpoint import fingerprint_text
from gristmill.train.losses import masked_mse
from gristmill.train.metrics import LossOutput


def reward_objective(model: RewardModel, batch: RatedBatch) -> LossOutput:
    """Masked mean squared error over the labels that are present, and the error of each attribute."""
    scores_N5 = model(batch.ids_T, batch.shape, batch.ends_N)
    total, count = masked_mse(scores_N5, batch.labels_N5)
    metrics = {}
    for column, name in enumerate(ATTRIBUTES):
        error, present = masked_mse(scores_N5.detach()[:, column], batch.labels_N5[:, column])
        if present:
            metrics[f"mse_{name}"] = (error, float(present))
    return LossOutput(total, int(count), metrics)


def rated_samples(rows: Iterable[Rated], chat_format: ChatFormat, tokenizer: Tokenizer) -> list[RatedSample]:
    """Samples of rated conversations, scored at their last end-of-turn token. A label of None is missing.

    Raises InputError, naming the row, when it cannot be rendered, does not end with the assistant, or does
    not hold one label an attribute.
    """
    end_id = chat_format.end_of_turn_id(tokenizer)
    samples = []
    for row in rows:
        if len(row.labels) != len(ATTRIBUTES):
            raise InputError(f"rated row {row.id} has {len(row.labels)} labels; give {', '.join(ATTRIBUTES)}")
        if not row.messages or row.messages[-1].role != "assistant":
            raise InputError(f"rated row {row.id} does not end with the assistant; give the answer that was rated")
        try:
            ids = chat_format.render(row.messages, tokenizer).ids
        except InputError as error:
            raise InputError(f"rated row {row.id}: {error}") from error
        labels = [IGNORE_LABEL if label is None else label for label in row.labels]
        prompt = fingerprint_text(repr(row.messages[:-1]))
        samples.append(RatedSample(ids, int(np.flatnonzero(np.array(ids) == end_id)[-1]), labels, id=row.id, prompt=prompt))
    return samples
