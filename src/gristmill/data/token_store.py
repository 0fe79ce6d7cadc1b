"""Tokenized documents in files, read through a memory map: what `gristmill blend` writes and pretraining reads.

A folder holds `tokens-*.bin` (int32, little-endian, documents after each other), `ends.npy` (int64: where each document ends, counted over
all files) and `blend.json`, which is written last.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gristmill.core.errors import InputError
from gristmill.core.io import read_json, reason
from gristmill.core.untrusted import existing_file, is_bare_name
from gristmill.data.tokenizer import Tokenizer

TOKEN = np.dtype("<i4")
BLOCK = 1 << 16  # documents whose places are in memory at once


class TokenStore:
    """Memory-mapped store of tokenized documents, as a finished blend leaves it.

    Args:
        folder: what `blend` wrote.
        tokenizer: the model's, if it shall be checked that the blend was made with it.

    Raises:
        InputError: the folder holds no whole blend, or one of another tokenizer.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer | None = None) -> None:
        try:
            facts = read_json(folder / "blend.json")
            if not all(is_bare_name(shard["file"]) for shard in facts["shards"]):
                raise ValueError("it names files outside of it")
            for name in ("ends.npy", *(shard["file"] for shard in facts["shards"])):
                existing_file(folder / name, "The blend is not whole")
            self.ends_N: np.ndarray = np.load(folder / "ends.npy", mmap_mode="r")
            self.shards = [np.memmap(folder / shard["file"], TOKEN, "r") for shard in facts["shards"]]
            sizes, made_with = [shard["tokens"] for shard in facts["shards"]], facts["tokenizer"]["fingerprint"]
        except (OSError, ValueError, TypeError, LookupError, EOFError) as e:
            raise InputError(f"{folder} holds no finished blend ({reason(e)}): run `gristmill blend` with --out {folder}.") from e
        if [len(shard) for shard in self.shards] != sizes or self.ends_N.dtype != np.int64 or self.ends_N[-1:].sum() != sum(sizes):
            raise InputError(f"The tokens in {folder} are not those that blend.json speaks of: copy the folder again, or blend again.")
        if tokenizer is not None and tokenizer.fingerprint() != made_with:
            raise InputError(f"{folder} was made with another tokenizer than the model's: blend again with this one.")
        if self.ends_N.ndim != 1 or any((np.diff(ends, prepend=begin) < 0).any() for begin, ends in blocks_of(self.ends_N)):
            raise InputError(f"{folder} is damaged (where its documents end): copy the folder again, or blend again.")
        self.max_id = np.iinfo(TOKEN).max if tokenizer is None else tokenizer.max_id
        self.facts: dict[str, Any] = facts


def blocks_of(ends_N: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Where each block of documents begins, and its documents end."""
    for first in range(0, len(ends_N), BLOCK):
        yield int(ends_N[first - 1]) if first else 0, np.asarray(ends_N[first : first + BLOCK])


class Pieces:
    """Documents of a token store, cut into samples of at most `max_tokens`: where each begins, and its length.

    Both are found for a block of documents when they are asked for, so that memory does not grow with the store. A piece of one token
    predicts nothing and is left out.

    Args:
        ends_N: where documents end, through a memory map.

    Attributes:
        num_tokens: of all samples.
    """

    def __init__(self, ends_N: np.ndarray, max_tokens: int) -> None:
        self._ends, self._max_tokens, self._longest = ends_N, max_tokens, 0
        counts, tokens = [0], [0]
        for begin, ends in blocks_of(ends_N):
            _, lengths_P = self._cut(begin, ends)
            counts.append(len(lengths_P))
            tokens.append(int(lengths_P.sum()))
            self._longest = max(self._longest, int(lengths_P.max(initial=0)))
        self._counts, self._tokens = np.cumsum(counts), np.cumsum(tokens)  # before each block
        self.num_tokens = int(self._tokens[-1])
        self._latest: tuple[int, tuple[np.ndarray, np.ndarray]] | None = None

    def __len__(self) -> int:
        return int(self._counts[-1])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All lengths."""
        lengths = [self._cut(begin, ends)[1] for begin, ends in blocks_of(self._ends)]
        return np.concatenate([np.zeros(0, np.int64), *lengths]).astype(dtype or np.int64)

    def max(self) -> int:
        return self._longest

    def at(self, index: int) -> tuple[int, int]:
        """First token in the store, and length, of a sample."""
        block = int(np.searchsorted(self._counts, index, side="right")) - 1
        starts_P, lengths_P = self._block(block)
        return int(starts_P[index - self._counts[block]]), int(lengths_P[index - self._counts[block]])

    def beginning(self, low: int, high: int) -> range:
        """The samples that begin at or after one token of all samples, and before another."""
        return range(self._first_from(low), self._first_from(high))

    def _first_from(self, token: int) -> int:
        block = int(np.searchsorted(self._tokens, max(token, 0), side="right")) - 1
        if block == len(self._tokens) - 1:
            return len(self)
        lengths_P = self._block(block)[1]
        return int(self._counts[block] + np.searchsorted(np.cumsum(lengths_P) - lengths_P, token - self._tokens[block]))

    def _block(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        if self._latest is None or self._latest[0] != number:
            first = number * BLOCK
            begin = int(self._ends[first - 1]) if first else 0
            self._latest = number, self._cut(begin, np.asarray(self._ends[first : first + BLOCK]))
        return self._latest[1]

    def _cut(self, begin: int, ends_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        starts_N = np.append(begin, ends_N[:-1])
        pieces_N = -(-(ends_N - starts_N) // self._max_tokens)
        first_N = np.cumsum(pieces_N) - pieces_N  # of each document its first piece
        document_P = np.repeat(np.arange(len(ends_N)), pieces_N)
        starts_P = starts_N[document_P] + (np.arange(len(document_P)) - first_N[document_P]) * self._max_tokens
        lengths_P = np.minimum(starts_P + self._max_tokens, ends_N[document_P]) - starts_P
        return starts_P[lengths_P > 1], lengths_P[lengths_P > 1]
