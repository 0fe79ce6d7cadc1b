"""Guard objective: binary cross-entropy of each category, from the state of the token that ends the judged turn."""

from collections.abc import Iterable

import numpy as np

from gristmill.core.errors import InputError
from gristmill.data.chat_format import ChatFormat
from gristmill.data.rows import Rated
from gristmill.data.tokenizer import Tokenizer
from gristmill.model.guard import GuardModel
from gristmill.train.batches import IGNORE_LABEL, RatedBatch, RatedSample
from gristmill.train.losses import masked_bce
from gristmill.train.metrics import LossOutput


def guard_objective(model: GuardModel, batch: RatedBatch) -> LossOutput:
    """Masked binary cross-entropy over the labels that are present."""
    logits_NC = model(batch.ids_T, batch.shape, batch.ends_N)
    total, count = masked_bce(logits_NC, batch.labels_N5)
    return LossOutput(total, int(count), {})


def judged_ids(row: Rated, chat_format: ChatFormat, tokenizer: Tokenizer) -> tuple[list[int], int]:
    """Ids of a conversation and the place of the token whose state is judged: the end of the assistant's turn, or the header of the
    answer that a user's turn waits for.

    Raises:
        InputError: the conversation cannot be rendered.
    """
    if row.messages[-1].role != "assistant":
        ids = list(chat_format.render_prompt(row.messages, tokenizer))
        return ids, len(ids) - 1
    ids = list(chat_format.render(row.messages, tokenizer).ids)
    return ids, int(np.flatnonzero(np.array(ids) == chat_format.end_of_turn_id(tokenizer))[-1])


def guard_samples(rows: Iterable[Rated], chat_format: ChatFormat, tokenizer: Tokenizer) -> list[RatedSample]:
    """Samples of labelled conversations. A label of None is missing.

    Raises:
        InputError: a row cannot be rendered; it is named.
    """
    samples = []
    for row in rows:
        try:
            ids, end = judged_ids(row, chat_format, tokenizer)
        except InputError as error:
            raise InputError(f"labelled row {row.id}: {error}") from error
        samples.append(RatedSample(ids, end, [IGNORE_LABEL if label is None else label for label in row.labels], id=row.id))
    return samples
