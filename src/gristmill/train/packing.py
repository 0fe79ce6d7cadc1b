"""Samples, and the one batch layout that every objective trains on: packed and token-major.

A batch lays its documents end to end in one ``ids_T`` vector; there is no batch axis. Shape legend:

    T  tokens of a batch          R  rows of the hidden states that predict a trained target
    N  documents of a batch       P  preference pairs (N = 2 P: chosen 0, rejected 0, chosen 1, ...)
    5  attributes of a rating
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import zip_longest
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from gristmill.errors import InputError
from gristmill.model.attention import PackedShape

MISSING = -100.0  # a label with this value is absent; the value NeMo-Aligner's regression data uses


@dataclass
class Sample:
    """One document; ``mask[i]`` says that token i is a trained target (of the first, nothing can predict it).

    ``ids`` and ``mask`` may be given as lists; they are kept as int32 and bool arrays, since a Python list
    of a million tokens takes 36 MB.
    """

    ids: Sequence[int] | np.ndarray
    mask: Sequence[bool] | np.ndarray
    id: str = ""

    def __post_init__(self) -> None:
        self.ids = np.asarray(self.ids, dtype=np.int32)
        self.mask = np.asarray(self.mask, dtype=np.bool_)
        if self.ids.ndim != 1 or self.ids.shape != self.mask.shape:
            raise InputError(
                f"sample {self.id or '(no id)'} has {self.ids.size} tokens but a mask of {self.mask.size}; "
                "give one mask entry for every token"
            )

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

    @cached_property
    def num_targets(self) -> int:
        """Tokens that the loss is taken over."""
        return int(np.count_nonzero(np.asarray(self.mask)[1:]))


@dataclass
class PairSample:
    """Two responses to one prompt, the better one first.

    Each side holds prompt and response; its mask marks the response. Rewards are the r* of the report's
    section 3.3; a missing one counts as chosen 1, rejected 0, as in NeMo-Aligner. ``ref_chosen`` and
    ``ref_rejected`` are the reference model's summed log-probabilities of the responses.
    """

    chosen: Sample
    rejected: Sample
    chosen_reward: float = 1.0
    rejected_reward: float = 0.0
    id: str = ""
    ref_chosen: float | None = None
    ref_rejected: float | None = None

    @property
    def num_tokens(self) -> int:
        return self.chosen.num_tokens + self.rejected.num_tokens

    @property
    def num_targets(self) -> int:
        """One loss term a pair; a pair with an empty side has none, since there is nothing to compare."""
        return int(self.chosen.num_targets > 0 and self.rejected.num_targets > 0)


@dataclass
class RatedSample:
    """A conversation and its five ratings; ``end`` indexes the end-of-turn token whose state is scored."""

    ids: Sequence[int] | np.ndarray
    end: int
    labels: Sequence[float]
    id: str = ""
    num_targets: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.ids = np.asarray(self.ids, dtype=np.int32)
        self.labels = [float(label) for label in self.labels]
        if not 0 <= self.end < len(self.ids):
            raise InputError(
                f"sample {self.id or '(no id)'} is scored at token {self.end} of {len(self.ids)}; "
                "give the index of its last end-of-turn token"
            )
        self.num_targets = sum(label != MISSING for label in self.labels)

    @property
    def num_tokens(self) -> int:
        return len(self.ids)


AnySample = Sample | PairSample | RatedSample


@dataclass(frozen=True)
class TokenBatch:
    """Documents for next-token losses: row ``rows_R[i]`` of the states predicts token ``targets_R[i]``."""

    ids_T: Tensor
    shape: PackedShape
    num_tokens: int
    rows_R: Tensor
    targets_R: Tensor

    @property
    def count(self) -> int:
        """Number of loss terms: the divisor of this batch's loss sum."""
        return len(self.targets_R)


@dataclass(frozen=True)
class PairBatch:
    """Preference pairs. ``documents_R`` says to which of the N = 2 P documents a row belongs."""

    tokens: TokenBatch
    documents_R: Tensor
    lengths_N: Tensor  # trained targets of each document
    rewards_P2: Tensor  # chosen, rejected
    reference_P2: Tensor | None

    @property
    def num_tokens(self) -> int:
        return self.tokens.num_tokens

    @property
    def count(self) -> int:
        return len(self.rewards_P2)


@dataclass(frozen=True)
class RatedBatch:
    """Rated conversations. ``ends_N`` index the scored tokens in ``ids_T``."""

    ids_T: Tensor
    shape: PackedShape
    num_tokens: int
    ends_N: Tensor
    labels_N5: Tensor

    @cached_property
    def count(self) -> int:
        return int((self.labels_N5 != MISSING).sum())


Batch = TokenBatch | PairBatch | RatedBatch


def filled_length(num_tokens: int) -> int:
    """``num_tokens`` rounded up to one of sixteen sizes an octave (by 3 % on average).

    In bf16 the CPU library generates code for every new shape of a matrix and keeps about 1 MB for each: a
    run of 100 batches of different lengths grew to 2.4 GiB; with rounded lengths it stays at 0.7.
    """
    step = max(1, 2 ** (num_tokens.bit_length() - 5))
    return -(-num_tokens // step) * step


def _pack(documents: Sequence[Sequence[int] | np.ndarray], device: torch.device) -> tuple[Tensor, PackedShape, int]:
    """Ids, shape, and the number of real tokens. Documents of one untrained token fill the batch up."""
    lengths = [len(ids) for ids in documents]
    num_tokens = sum(lengths)
    num_fill = filled_length(num_tokens) - num_tokens
    ids = np.concatenate([*documents, np.zeros(num_fill, dtype=np.int32)]).astype(np.int64)
    return (
        torch.from_numpy(ids).to(device),
        PackedShape.from_lengths(lengths + [1] * num_fill, device),
        num_tokens,
    )


def collate_tokens(samples: Sequence[Sample], device: torch.device) -> TokenBatch:
    """Lay samples end to end.

    The row of document d that ends it predicts nothing, so no target ever crosses from one document into
    the next.
    """
    ids_T, shape, num_tokens = _pack([sample.ids for sample in samples], device)
    # predicts_T[i]: token i+1 is a trained target of the same document. A document's own first mask entry
    # is void.
    predicts = [np.append(np.asarray(sample.mask)[1:], False) for sample in samples]
    rows_R = torch.from_numpy(np.flatnonzero(np.concatenate(predicts))).to(device)
    return TokenBatch(ids_T, shape, num_tokens, rows_R, ids_T[rows_R + 1])


def collate_pairs(pairs: Sequence[PairSample], device: torch.device) -> PairBatch:
    """Lay pairs end to end, chosen before rejected. References are set when every pair has them."""
    sides = [side for pair in pairs for side in (pair.chosen, pair.rejected)]
    lengths = np.array([side.num_targets for side in sides])
    references = [(pair.ref_chosen, pair.ref_rejected) for pair in pairs]
    known = all(chosen is not None and rejected is not None for chosen, rejected in references)
    return PairBatch(
        tokens=collate_tokens(sides, device),
        documents_R=torch.from_numpy(np.repeat(np.arange(len(sides)), lengths)).to(device),
        lengths_N=torch.from_numpy(lengths).to(device),
        rewards_P2=torch.tensor([(p.chosen_reward, p.rejected_reward) for p in pairs], device=device),
        # fp32 holds a summed log-probability of -1000 to 6e-5, which is all the model's own arithmetic gives
        reference_P2=torch.tensor(references, dtype=torch.float32, device=device) if known else None,
    )


def collate_rated(samples: Sequence[RatedSample], device: torch.device) -> RatedBatch:
    """Lay rated conversations end to end."""
    ids_T, shape, num_tokens = _pack([sample.ids for sample in samples], device)
    starts = np.cumsum([0] + [sample.num_tokens for sample in samples[:-1]])
    ends_N = torch.from_numpy(starts + np.array([sample.end for sample in samples])).to(device)
    labels_N5 = torch.tensor([sample.labels for sample in samples], dtype=torch.float32, device=device)
    return RatedBatch(ids_T, shape, num_tokens, ends_N, labels_N5)


def collate(samples: Sequence[AnySample], device: torch.device) -> Batch:
    """Pack samples of one kind into the batch of that kind."""
    first = samples[0]
    if isinstance(first, Sample):
        return collate_tokens(samples, device)  # type: ignore[arg-type]
    if isinstance(first, PairSample):
        return collate_pairs(samples, device)  # type: ignore[arg-type]
    return collate_rated(samples, device)  # type: ignore[arg-type]


AnySampleT = TypeVar("AnySampleT", Sample, PairSample, RatedSample, AnySample)


def split_micro_batches(samples: Sequence[AnySampleT], max_tokens: int, num_workers: int = 1) -> list[list[AnySampleT]]:
    """Cut the samples of one step into micro-batches, of which any ``num_workers`` neighbours hold at most ``max_tokens`` tokens.

    A longer sample gets one of its own. Sorted by length, so that the documents of a micro-batch are
    alike and attention pads little. Several workers get equal shares of long and short ones.
    """
    ordered = sorted(samples, key=lambda sample: sample.num_tokens, reverse=True)
    shares = [_groups(ordered[i::num_workers], max_tokens // num_workers) for i in range(num_workers)]
    return [group for turn in zip_longest(*shares) for group in turn if group]


def _groups(samples: Sequence[AnySampleT], max_tokens: int) -> Iterator[list[AnySampleT]]:
    group: list[AnySampleT] = []
    size = 0
    for sample in samples:
        if group and size + sample.num_tokens > max_tokens:
            yield group
            group, size = [], 0
        group.append(sample)
        size += sample.num_tokens
    if group:
        yield group


class BatchPlan:
    """Which samples each step trains on: a pure function of (seed, step), found without replaying steps.

    The stream is one shuffle of all samples after another. A step is a stretch of that stream, measured in
    samples (``batch_size``) or in tokens (``batch_tokens``). With ``epochs`` the stream ends after that
    many shuffles and is cut into floor(length / batch) *equal* stretches, so that every sample is seen
    exactly ``epochs`` times and no small remainder is trained on as a noisy last step. With ``steps`` it
    goes on as long as needed.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        seed: int,
        epochs: float | None = None,
        steps: int | None = None,
        batch_size: int | None = None,
        batch_tokens: int | None = None,
    ) -> None:
        if batch_tokens is not None and max(lengths) > batch_tokens:
            raise InputError(
                f"the longest sample has {max(lengths)} tokens, more than batch_tokens {batch_tokens}; raise batch_tokens or set max_tokens"
            )
        self._weights = np.asarray(lengths if batch_tokens is not None else np.ones(len(lengths)), dtype=np.int64)
        self._epoch_weight = int(self._weights.sum())
        self._seed = seed
        batch = batch_tokens if batch_tokens is not None else batch_size
        assert batch is not None and batch > 0
        if steps is not None:
            self.num_steps, self._total = steps, steps * batch
        else:
            assert epochs is not None
            self._total = int(self._epoch_weight * epochs)
            self.num_steps = max(1, self._total // batch)
        self._order: tuple[int, np.ndarray, np.ndarray] | None = None

    def _shuffle(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Sample indices in the epoch's order, and the offset within the epoch at which each begins."""
        if self._order is None or self._order[0] != epoch:
            order = np.random.default_rng([self._seed, epoch]).permutation(len(self._weights))
            weights = self._weights[order]
            self._order = (epoch, order, np.cumsum(weights) - weights)
        return self._order[1], self._order[2]

    def step(self, step: int) -> list[int]:
        """Indices of the samples of step ``step`` (counted from 0)."""
        low = step * self._total // self.num_steps
        high = (step + 1) * self._total // self.num_steps
        chosen: list[int] = []
        for epoch in range(low // self._epoch_weight, (high - 1) // self._epoch_weight + 1):
            order, starts = self._shuffle(epoch)
            base = epoch * self._epoch_weight
            first, last = np.searchsorted(starts, [low - base, high - base])
            chosen.extend(int(i) for i in order[first:last])
        return chosen


def fingerprint_samples(samples: Sequence[AnySample]) -> str:
    """A hash of everything in the samples that training can see, in their order. 16 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=8)
    for sample in samples:
        for part in (sample.chosen, sample.rejected) if isinstance(sample, PairSample) else (sample,):
            digest.update(np.int64(part.num_tokens).tobytes() + np.asarray(part.ids).tobytes())
            if isinstance(part, Sample):
                digest.update(np.asarray(part.mask).tobytes())
            else:
                digest.update(np.array([part.end, *part.labels], dtype=np.float64).tobytes())
        if isinstance(sample, PairSample):
            numbers = (sample.chosen_reward, sample.rejected_reward, sample.ref_chosen, sample.ref_rejected)
            digest.update(repr(numbers).encode())
    return digest.hexdigest()
