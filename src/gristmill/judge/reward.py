"""Scoring answers with the reward model: five attributes each, and their weighted sum."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from gristmill.core.device import pick_device
from gristmill.core.errors import InputError
from gristmill.core.threads import num_workers, workers
from gristmill.data.chat import Message
from gristmill.data.chat_format import ChatFormat
from gristmill.data.find_format import find_format
from gristmill.data.readers import read_demonstrations
from gristmill.data.rows import Rating
from gristmill.data.tokenizer import Tokenizer
from gristmill.model.adapters import load_reward
from gristmill.model.compiled_blocks import unchanged
from gristmill.model.dtype import pick_dtype
from gristmill.model.packed import pack
from gristmill.model.reward import RewardModel
from gristmill.model.transformer import PRECISIONS

PACKED_TOKENS = 4096
# Rated in one pass, so that the model reads their prompt once.
ANSWERS_TOGETHER = 8


class RewardScorer:
    """A reward model with its tokenizer and chat format; it computes where the model is.

    Args:
        weights: aggregation weights of the five attributes; default the model's own.
    """

    def __init__(self, model: RewardModel, tokenizer: Tokenizer, chat_format: ChatFormat, *, weights: Sequence[float] | None = None):
        self.model = model.eval()
        self.tokenizer, self.chat_format = tokenizer, chat_format
        self.weights = tuple(weights or model.weights)

    def fits(self, messages: Sequence[Message]) -> bool:
        """Whether the model's context has room for a conversation."""
        return self.chat_format.fits(messages, self.tokenizer, self.model.backbone.config.max_positions)

    def score(self, conversations: Sequence[Sequence[Message]]) -> list[Rating]:
        """Ratings of the last assistant turn of each conversation: raw floats, as the report advises for ranking and filtering.

        Raises:
            InputError: a conversation does not end with the assistant, or exceeds the model's context.
        """
        return [Rating(*row) for row in self._each(conversations, self.model)]

    def states(self, conversations: Sequence[Sequence[Message]]) -> list[list[float]]:
        """Hidden states of the ends of the answers, from which the head rates: what other heads can be trained on.

        Raises:
            InputError: as `score`.
        """
        return self._each(conversations, lambda *packed: self.model.backbone.hidden(*packed).float())

    def _each(self, conversations: Sequence[Sequence[Message]], compute: Callable[..., torch.Tensor]) -> list[list[float]]:
        limit = self.model.backbone.config.max_positions
        rendered = []
        for i, messages in enumerate(conversations):
            if not messages or messages[-1].role != "assistant":
                raise InputError(f"Conversation {i} does not end with the assistant: there is no answer to score.")
            ids = self.chat_format.render(messages, self.tokenizer).ids
            if len(ids) > limit:
                raise InputError(f"Conversation {i} has {len(ids)} tokens and the reward model's context is {limit}: shorten it.")
            rendered.append(ids)
        answers_of: dict[tuple[Message, ...], list[int]] = {}
        for i, messages in enumerate(conversations):
            answers_of.setdefault(tuple(messages[:-1]), []).append(i)
        found: list[list[float]] = [[]] * len(rendered)
        packs = list(_packs(list(answers_of.values()), rendered))
        with workers(num_workers(self.model)) as each, unchanged(self.model.backbone, each):
            scored = each(lambda groups: self._compute([[rendered[i] for i in group] for group in groups], compute), packs)
            for groups, rows in zip(packs, scored, strict=True):
                for i, row in zip((i for group in groups for i in group), rows, strict=True):
                    found[i] = row
        return found

    @torch.inference_mode()
    def _compute(self, groups: list[list[list[int]]], compute: Callable[..., torch.Tensor]) -> list[list[float]]:
        end = self.chat_format.end_of_turn_id(self.tokenizer)
        ids_T, shape, _ = pack(groups, self.model.backbone.embedding.device)
        last = [len(ids) - 1 - ids[::-1].index(end) for group in groups for ids in group]
        last_N = shape.keys_S[shape.cu_keys[: len(last)] + torch.tensor(last, device=ids_T.device)]
        values: list[list[float]] = compute(ids_T, shape, last_N).tolist()
        return values

    def total(self, rating: Rating) -> float:
        """Weighted sum of a rating."""
        return rating.score(self.weights)


def _packs(groups: list[list[int]], rendered: list[list[int]]) -> Iterator[list[list[int]]]:
    """Answers to one prompt stay together, ANSWERS_TOGETHER at most; packs of about PACKED_TOKENS tokens, alike in length."""
    pieces = [group[start : start + ANSWERS_TOGETHER] for group in groups for start in range(0, len(group), ANSWERS_TOGETHER)]
    together: list[list[int]] = []
    size = 0
    for piece in sorted(pieces, key=lambda piece: max(len(rendered[i]) for i in piece)):
        num_tokens = sum(len(rendered[i]) for i in piece)
        if together and size + num_tokens > PACKED_TOKENS:
            yield together
            together, size = [], 0
        together.append(piece)
        size += num_tokens
    if together:
        yield together


def load_scorer(folder: Path, chat_format: str = "auto", *, device: str = "auto", dtype: str = "auto") -> RewardScorer:
    """The scorer of a reward model's folder, on a device as `pick_device` takes it, computing in a type as `pick_dtype` takes it."""
    where = pick_device(device)
    precision = PRECISIONS[pick_dtype(dtype, folder, where)]
    model, tokenizer = load_reward(folder, precision, vector_dtype=torch.float32, device=where)
    return RewardScorer(model, tokenizer, find_format(chat_format, tokenizer))


def rate_file(folder: Path, data: Path, chat_format: str = "auto", *, device: str = "auto", dtype: str = "auto") -> list[dict[str, Any]]:
    """Ratings of every conversation of a file."""
    scorer = load_scorer(folder, chat_format, device=device, dtype=dtype)
    rows = read_demonstrations(data)
    ratings = scorer.score([r.messages for r in rows])
    return [{"id": r.id, **asdict(x), "score": round(scorer.total(x), 4)} for r, x in zip(rows, ratings, strict=True)]
