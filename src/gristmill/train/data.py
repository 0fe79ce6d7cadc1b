"""Map-style training data: samples by index, from a list in memory or from a token store on disk."""

import json
import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from torch import nn

from gristmill.core.errors import InputError
from gristmill.data.token_store import Pieces, TokenStore
from gristmill.train.batches import MAX_ANSWERS, AnySample, DataItem, RatedGroup, Sample, documents_of, fingerprint_samples, group_answers
from gristmill.train.checkpoint import fingerprint_text


class SampleData(Protocol):
    """Map-style dataset that knows the length of every sample without reading it, so that start-up reads no tokens."""

    @property
    def lengths(self) -> np.ndarray | Pieces:
        """int64 [len]: tokens of each sample that go through the model."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> DataItem: ...

    def fingerprint(self) -> str:
        """Differs between different data; a checkpoint is only continued with its own."""
        ...


class ListData:
    """Samples in memory. What cannot be trained on is dropped and named; rated answers to one prompt are grouped.

    Args:
        max_tokens: a sample with a longer document is dropped.
        max_answers: rated answers of a group, at most.
        max_group_tokens: tokens of a group of several, at most.

    Raises:
        InputError: nothing is left.
    """

    def __init__(
        self,
        samples: Sequence[AnySample],
        *,
        max_tokens: int | None = None,
        max_answers: int = MAX_ANSWERS,
        max_group_tokens: float = math.inf,
    ) -> None:
        usable: list[AnySample] = []
        self.dropped_long: list[str] = []
        self.dropped_untrained: list[str] = []
        for position, sample in enumerate(samples):
            name = sample.id or f"#{position}"
            if max_tokens is not None and max(document.num_tokens for document in documents_of(sample)) > max_tokens:
                self.dropped_long.append(name)
            elif sample.num_targets == 0:
                self.dropped_untrained.append(name)
            else:
                usable.append(sample)
        if not usable:
            _refuse_empty(self.dropped_long, self.dropped_untrained, max_tokens)
        self.items = group_answers(usable, max_answers, max_group_tokens)
        self.lengths = np.array([item.num_tokens for item in self.items], dtype=np.int64)
        self.rows = np.array([len(item.answers) if isinstance(item, RatedGroup) else 1 for item in self.items])

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int, /) -> DataItem:
        return self.items[index]

    def fingerprint(self) -> str:
        return fingerprint_samples(self.items)


class TokenStoreData:
    """Next-token samples of a token store, in its order: documents, each cut into pieces of at most `max_tokens`.

    Ids are views of the memory map and are read when a step asks for them. A piece of one token predicts nothing and is left out.

    Args:
        num_tokens: no further document is given once there are so many.
    """

    def __init__(self, store: TokenStore, max_tokens: int, *, num_tokens: int | None = None) -> None:
        ends_N = store.ends_N
        if num_tokens is not None:
            ends_N = ends_N[: int(np.searchsorted(ends_N, num_tokens)) + 1]
        self.lengths = Pieces(ends_N, max_tokens)
        self._ends, self._max_tokens = ends_N, max_tokens
        self._shards, self._max_id = store.shards, store.max_id
        self._shard_starts = np.cumsum([0, *map(len, self._shards)])
        self._mask = np.arange(max_tokens) > 0
        self._mask.flags.writeable = False
        self._facts = {key: store.facts.get(key) for key in ("key", "tokens", "documents", "shards", "tokenizer")} | {
            "max_tokens": max_tokens,
            "num_tokens": num_tokens,
        }

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int, /) -> Sample:
        start, length = self.lengths.at(index)
        document = int(np.searchsorted(self._ends, start, side="right"))
        begin = int(self._ends[document - 1]) if document else 0
        whole = int(self._ends[document]) - begin <= self._max_tokens
        shard = int(np.searchsorted(self._shard_starts, start, side="right")) - 1
        first = start - int(self._shard_starts[shard])
        name = f"document {document}" if whole else f"document {document} from token {start - begin}"
        ids = np.asarray(self._shards[shard][first : first + length])
        if not 0 <= ids.min() <= ids.max() <= self._max_id:
            raise InputError(f"The blend is damaged: {name} has a token that is not in the tokenizer's vocabulary. Blend again.")
        return Sample(ids, self._mask[:length], name)

    def fingerprint(self) -> str:
        """Of what `blend.json` records: its key is made of the blend's inputs and settings, so no token is read."""
        return fingerprint_text(json.dumps(self._facts, sort_keys=True))


class _Subset:
    """Some samples of other data."""

    def __init__(self, data: SampleData, indices: np.ndarray) -> None:
        self._data, self._indices = data, indices
        self.lengths = np.asarray(data.lengths)[indices]

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int, /) -> DataItem:
        return self._data[int(self._indices[index])]

    def fingerprint(self) -> str:
        return self._data.fingerprint()


def drop_long(data: SampleData, max_tokens: int | None) -> tuple[SampleData, list[str]]:
    """The samples of at most `max_tokens` tokens, and the places of the others. InputError when none is left."""
    if len(data) and (max_tokens is None or data.lengths.max() <= max_tokens):
        return data, []
    fits = np.asarray(data.lengths) <= (math.inf if max_tokens is None else max_tokens)
    long = [f"#{index}" for index in np.flatnonzero(~fits)]
    if not fits.any():
        _refuse_empty(long, [], max_tokens)
    return _Subset(data, np.flatnonzero(fits)), long


def _refuse_empty(long: Sequence[str], untrained: Sequence[str], max_tokens: int | None) -> None:
    if untrained:
        raise InputError(
            f"there is nothing to train on: sample {untrained[0]} has no trained target, nor has any other; "
            "mark what the model shall learn (assistant turns, or at least one label)"
        )
    if long:
        raise InputError(f"there is nothing to train on: sample {long[0]} and all others are over {max_tokens} tokens")
    raise InputError("there is nothing to train on: the data set is empty")


def backbone(model: nn.Module) -> Any:
    """The Transformer inside a model (a reward model holds one; a Transformer is its own)."""
    return getattr(model, "backbone", model)


def check_vocabulary(model: nn.Module, samples: Sequence[AnySample | DataItem]) -> None:
    """InputError when a token id is outside the model's vocabulary: the data are of another tokenizer."""
    vocab_size = backbone(model).config.vocab_size
    for position, sample in enumerate(samples):
        for document in documents_of(sample):
            highest = int(np.max(document.ids))
            if highest >= vocab_size:
                raise InputError(
                    f"sample {sample.id or f'#{position}'} has token {highest} but the model has "
                    f"{vocab_size}; encode the data with the model's own tokenizer"
                )
