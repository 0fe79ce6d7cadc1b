"""Supervised fine-tuning: the loss is taken over assistant turns only (report section 3.3.1)."""

from collections.abc import Iterable

from gristmill.core.errors import InputError
from gristmill.data.chat_format import ChatFormat
from gristmill.data.rows import Demonstration
from gristmill.data.tokenizer import Tokenizer
from gristmill.train.batches import Sample
from gristmill.train.objectives.next_token import next_token_objective

__all__ = ["demonstration_samples", "sft_objective"]

sft_objective = next_token_objective  # what differs from pretraining is the mask, and that is the samples' matter


def demonstration_samples(rows: Iterable[Demonstration], chat_format: ChatFormat, tokenizer: Tokenizer) -> list[Sample]:
    """Samples of conversations: every assistant turn and the token that ends it is trained, nothing else.

    A conversation is one sample, or several where its chat template changes earlier answers once there are later turns.

    Raises InputError, naming the row, for a conversation that cannot be rendered or has no assistant turn
    to learn.
    """
    samples = []
    for row in rows:
        try:
            rendered = chat_format.render_samples(row.messages, tokenizer, tools=row.meta.get("tools") or ())
        except InputError as error:
            raise InputError(f"conversation {row.id}: {error}") from error
        parts = [Sample(one.ids, one.mask, f"{row.id}#{number}" if number else row.id) for number, one in enumerate(rendered)]
        if parts[0].num_targets == 0:
            raise InputError(f"conversation {row.id} has nothing to learn from; give it at least one assistant turn")
        samples += parts
    return samples
