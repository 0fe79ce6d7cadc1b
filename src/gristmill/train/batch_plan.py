"""The plan of batches: which samples each step trains on, by (seed, step), in rows or tokens, with a ramp of batch sizes."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gristmill.core.errors import InputError
from gristmill.data.token_store import Pieces
from gristmill.train.settings import BatchSize, Ramp, ramp_of


@dataclass(frozen=True)
class _Stretch:
    """Steps of equal size, over rows (or tokens) of the stream from `begin` to `end`."""

    begin: int
    end: int
    num_steps: int


def _stretches(ramp: Ramp, total: float, max_steps: float) -> Iterator[_Stretch]:
    """The steps of a ramp, over a stream of `total` or as many as there shall be."""
    begin = 0
    for index, (_, size) in enumerate(ramp):
        until = ramp[index + 1][0] if index + 1 < len(ramp) else math.inf
        count = min(max_steps, -(-(until - begin) // size) if until < math.inf else math.inf)
        if count <= 0:
            continue
        if begin + (count + 1) * size > total:  # the last: what is left is less than a step
            yield _Stretch(begin, int(total), max(1, int(total - begin) // size))
            return
        end, max_steps = begin + int(count) * size, max_steps - count
        yield _Stretch(begin, end, int(count))
        begin = end


class BatchPlan:
    """Which samples each step trains on: a pure function of (seed, step), found without replaying steps.

    The stream is one shuffle of all samples after another (without ``shuffle``, the samples as they are). A step
    is a stretch of that stream, measured in rows (``batch_size``) or in tokens (``batch_tokens``): a sample has
    ``lengths`` tokens and counts as one row, or as ``rows``. With ``epochs`` the stream ends after that many
    shuffles and is cut into floor(length / batch) *equal* stretches, so that every sample is seen exactly
    ``epochs`` times and no small remainder is trained on as a noisy last step. With ``steps`` it goes on as long as needed.

    A ramp of batch sizes names the row from which on each holds: the first step that begins there or later has it.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray | Pieces,
        *,
        seed: int,
        epochs: float | None = None,
        steps: int | None = None,
        batch_size: BatchSize | None = None,
        batch_tokens: int | None = None,
        rows: Sequence[int] | np.ndarray | None = None,
        shuffle: bool = True,
    ) -> None:
        longest = lengths.max() if isinstance(lengths, Pieces) else int(np.max(lengths))
        if batch_tokens is not None and longest > batch_tokens:
            raise InputError(
                f"the longest sample has {longest} tokens, more than batch_tokens {batch_tokens}; raise batch_tokens or set max_tokens"
            )
        self._pieces = lengths if isinstance(lengths, Pieces) and not shuffle else None
        self._in_tokens, self._seed, self._shuffled = batch_tokens is not None, seed, shuffle
        if self._pieces is not None:  # no array of all samples
            self._epoch_weight = self._pieces.num_tokens if self._in_tokens else len(self._pieces)
        else:
            weights = lengths if self._in_tokens else np.ones(len(lengths)) if rows is None else rows
            self._weights = np.asarray(weights, dtype=np.int64)
            self._epoch_weight = int(self._weights.sum())
        batch = batch_tokens if batch_tokens is not None else batch_size
        assert batch is not None and (steps is None) != (epochs is None)
        total = math.inf if epochs is None else int(self._epoch_weight * epochs)
        self._stretches = list(_stretches(ramp_of(batch), total, math.inf if steps is None else steps))
        self.num_steps = sum(stretch.num_steps for stretch in self._stretches)
        self._order: tuple[int, np.ndarray, np.ndarray] | None = None

    def _shuffle(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Sample indices in the epoch's order, and the offset within the epoch at which each begins."""
        if self._order is None or self._order[0] != epoch:
            everyone = np.arange(len(self._weights))
            order = np.random.default_rng([self._seed, epoch]).permutation(everyone) if self._shuffled else everyone
            weights = self._weights[order]
            self._order = (epoch, order, np.cumsum(weights) - weights)
        return self._order[1], self._order[2]

    def step(self, step: int) -> list[int]:
        """Indices of the samples of step ``step`` (counted from 0)."""
        number = step
        for stretch in self._stretches:
            if number < stretch.num_steps:
                break
            number -= stretch.num_steps
        low, high = (stretch.begin + (number + i) * (stretch.end - stretch.begin) // stretch.num_steps for i in (0, 1))
        chosen: list[int] = []
        for epoch in range(low // self._epoch_weight, (high - 1) // self._epoch_weight + 1):
            base = epoch * self._epoch_weight
            chosen.extend(self._between(epoch, max(0, low - base), min(self._epoch_weight, high - base)))
        return chosen

    def _between(self, epoch: int, low: int, high: int) -> Iterable[int]:
        """Samples that begin in a stretch of an epoch."""
        if self._pieces is not None:
            return self._pieces.beginning(low, high) if self._in_tokens else range(low, high)
        order, starts = self._shuffle(epoch)
        first, last = np.searchsorted(starts, [low, high])
        return map(int, order[first:last])
