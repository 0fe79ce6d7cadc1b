"""Scoring answers with the reward model: five attributes each, and their weighted sum."""

from collections.abc import Iterator, Sequence

import torch

from gristmill.chat import ChatFormat, Message
from gristmill.errors import InputError
from gristmill.model.attention import PackedShape
from gristmill.model.reward import RewardModel
from gristmill.rows import Rating
from gristmill.tokenizer import Tokenizer
from gristmill.workers import num_workers, workers

PACKED_TOKENS = 4096


class RewardScorer:
    """A reward model with its tokenizer and chat format.

    Args:
        weights: aggregation weights of the five attributes; default the model's own.
    """

    def __init__(self, model: RewardModel, tokenizer: Tokenizer, chat_format: ChatFormat, weights: Sequence[float] | None = None):
        self.model = model.eval()
        self.tokenizer, self.chat_format = tokenizer, chat_format
        self.weights = tuple(weights or model.weights)

    def score(self, conversations: Sequence[Sequence[Message]]) -> list[Rating]:
        """Ratings of the last assistant turn of each conversation: raw floats, as the report advises for ranking and filtering.

        Raises:
            InputError: a conversation does not end with the assistant, or exceeds the model's context.
        """
        limit = self.model.backbone.config.max_positions
        rendered = []
        for i, messages in enumerate(conversations):
            if not messages or messages[-1].role != "assistant":
                raise InputError(f"Conversation {i} does not end with the assistant: there is no answer to score.")
            ids = self.chat_format.render(messages, self.tokenizer).ids
            if len(ids) > limit:
                raise InputError(f"Conversation {i} has {len(ids)} tokens and the reward model's context is {limit}: shorten it.")
            rendered.append(ids)
        ratings: list[Rating | None] = [None] * len(rendered)
        groups = list(_groups(rendered))
        with workers(num_workers(self.model)) as each:
            for group, rows in zip(groups, each(lambda group: self._score([rendered[i] for i in group]), groups), strict=True):
                for i, row in zip(group, rows, strict=True):
                    ratings[i] = Rating(*row)
        return [r for r in ratings if r is not None]

    @torch.inference_mode()
    def _score(self, conversations: list[list[int]]) -> list[list[float]]:
        end = self.chat_format.end_of_turn_id(self.tokenizer)
        device = self.model.backbone.embedding.device
        shape = PackedShape.from_lengths([len(ids) for ids in conversations], device)
        ids_T = torch.tensor([t for ids in conversations for t in ids], device=device)
        last_N = torch.tensor([len(ids) - 1 - ids[::-1].index(end) for ids in conversations], device=device)
        return self.model(ids_T, shape, last_N + shape.cu_seqlens[:-1]).tolist()

    def total(self, rating: Rating) -> float:
        """Weighted sum of a rating."""
        return rating.score(self.weights)


def _groups(rendered: list[list[int]]) -> Iterator[list[int]]:
    """Indices in packs of about PACKED_TOKENS tokens, alike in length."""
    group: list[int] = []
    size = 0
    for i in sorted(range(len(rendered)), key=lambda i: len(rendered[i])):
        if group and size + len(rendered[i]) > PACKED_TOKENS:
            yield group
            group, size = [], 0
        group.append(i)
        size += len(rendered[i])
    if group:
        yield group
