"""Perplexity of documents by a Kneser-Ney trigram model, in the manner of CCNet (1911.00359): the less, the more a text is like its own.

A token is a run of letters and digits (those of ASCII in lower case) and of whatever else is not ASCII, a single mark, or a single
Chinese or Japanese character. Probabilities are those of interpolated Kneser-Ney smoothing with one discount an order (Ney, Essen and
Kneser 1994), with

    P(c | a b) = max(n(abc) - D, 0) / n(ab) + gamma(ab) P(c | b)

where the shorter n-grams count the different words before them instead of their occurrences. A rare word counts as unknown; the
probability of the unknown is shared by as many words as were rare in training, or else a text of gibberish would be easy to foretell.

Shapes: N documents, B bytes of all of them, T tokens, V words that the model knows, G n-grams, S slots of a hash table.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numba import njit
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from gristmill.core.errors import InputError
from gristmill.core.io import DamagedFile, read_json, replacing, write_json
from gristmill.curate.text.text_column import TextColumn, hash_table, lookup, read_only
from gristmill.curate.text.words import BYTES_AND_MARKS, FNV_OFFSET, buffers, tokenize
from gristmill.data.minhash import mix64

WEIGHTS_FILE, SETTINGS_FILE = "model.safetensors", "model.json"
UNKNOWN, START = 0, 1  # words that no text has; others follow
_BITS = 21  # of a word's number: three of them fit into 63 bits
_WORD = np.int64(2**_BITS - 1)
_PAIR = np.int64(2 ** (2 * _BITS) - 1)
_FREE = np.int64(-1)  # a slot without n-gram

# --- files of a trained model --------------------------------------------------------------------------------------------


def write_model(folder: Path, tensors: dict[str, np.ndarray], settings: dict[str, Any]) -> None:
    """Tensors and settings into a folder; the settings come last, so that a folder that has them is whole.

    Raises:
        InputError: the folder cannot be written.
    """
    with replacing(folder / WEIGHTS_FILE) as temporary:
        (folder / SETTINGS_FILE).unlink(missing_ok=True)
        save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, temporary)
    write_json(folder / SETTINGS_FILE, settings)


def read_model(folder: Path, kind: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """What `write_model` wrote.

    Args:
        kind: what the model must be, as its settings say.

    Raises:
        InputError: the folder is missing, damaged, or holds a model of another kind.
    """
    try:
        settings = read_json(folder / SETTINGS_FILE)
        tensors = load_file(folder / WEIGHTS_FILE)
    except (DamagedFile, OSError, SafetensorError) as e:
        raise InputError(f"The folder {folder} holds no trained {kind} model ({e}): check the path or train it again.") from e
    found = settings.get("kind") if isinstance(settings, dict) else None
    if found != kind:
        raise InputError(f"The folder {folder} holds a model of kind {found!r}, not {kind!r}: check the path.")
    return tensors, settings


# --- the model -----------------------------------------------------------------------------------------------------------


@njit(cache=True, nogil=True)
def _slots(keys_G, values_G):  # type: ignore[no-untyped-def]
    """Open addressing: keys int64 [S] with _FREE in free slots, float32 values [S, K]. S is a power of 2, at least 2 G."""
    size = 16
    while size < 2 * len(keys_G):
        size *= 2
    keys_S, values_S = np.full(size, _FREE, np.int64), np.zeros((size, values_G.shape[1]), np.float32)
    for g in range(len(keys_G)):
        at = np.int64(mix64(np.uint64(keys_G[g])) & np.uint64(size - 1))
        while keys_S[at] != _FREE:
            at = (at + 1) & (size - 1)
        keys_S[at] = keys_G[g]
        values_S[at] = values_G[g]
    return keys_S, values_S


@njit(cache=True, nogil=True, inline="always")
def _slot(keys_S, key):  # type: ignore[no-untyped-def]
    """Where a key is, or -1."""
    at = np.int64(mix64(np.uint64(key)) & np.uint64(len(keys_S) - 1))
    while keys_S[at] != _FREE:
        if keys_S[at] == key:
            return at
        at = (at + 1) & (len(keys_S) - 1)
    return np.int64(-1)


@njit(cache=True, nogil=True)
def _bits(data_B, begin_N, table, words_V, table_S, single_V, pairs, pair_values, triples, triple_values, rare, bits_N):  # type: ignore[no-untyped-def]
    """float64 bits per token of each text; NaN where there is none. Args: `rare`, bits to pick one of the unknown words."""
    tokens_T, start_T, stop_T = buffers(begin_N)
    for n in range(len(begin_N) - 1):
        count = tokenize(data_B, begin_N[n], begin_N[n + 1], table, FNV_OFFSET, tokens_T, start_T, stop_T)
        total, a, b = 0.0, np.int64(START), np.int64(START)
        context = _slot(pairs, (a << _BITS) | b)
        for t in range(count):
            place = lookup(tokens_T[t], words_V, table_S)
            c = np.int64(place + 2 if place >= 0 else UNKNOWN)
            pair = _slot(pairs, (b << _BITS) | c)
            triple = _slot(triples, (((a << _BITS) | b) << _BITS) | c) if context >= 0 and pair >= 0 else -1
            if triple >= 0:
                total -= triple_values[triple, 0]
            else:
                if context >= 0:
                    total -= pair_values[context, 1]
                total -= pair_values[pair, 0] if pair >= 0 else single_V[b, 1] + single_V[c, 0]
            if c == UNKNOWN:
                total += rare
            a, b, context = b, c, pair
        bits_N[n] = total / count if count else np.nan


@dataclass(frozen=True)
class Trigrams:
    """A trained model. Probabilities are logarithms to base 2; a second column is that of gamma, of the n-gram as a context.

    Attributes:
        words_V: uint64, hashes of the known words by number, from 2.
        single_V: float32 [V + 2, 2].
        pairs, triples: int64 [G], n-grams as their words' numbers of 21 bits each, sorted.
        pair_values, triple_values: float32 [G, 2] and [G, 1].
        settings: of training, and what it counted.
    """

    words_V: np.ndarray
    single_V: np.ndarray
    pairs: np.ndarray
    pair_values: np.ndarray
    triples: np.ndarray
    triple_values: np.ndarray
    settings: dict[str, Any]

    @cached_property
    def _tables(self) -> tuple[np.ndarray, ...]:
        pairs = _slots(read_only(self.pairs), read_only(self.pair_values))
        return (
            hash_table(read_only(self.words_V)),
            read_only(self.single_V),
            *pairs,
            *_slots(read_only(self.triples), read_only(self.triple_values)),
        )

    def bits(self, texts: TextColumn) -> np.ndarray:
        """float64 [N]: bits per token of each text; NaN where it has none."""
        bits_N = np.empty(len(texts), np.float64)
        rare = float(np.log2(max(self.settings["rare_words"], 1)))
        words, single, pairs, pair_values, triples, triple_values = self._tables
        data_B, begin_N, words_V = read_only(texts.data_B), read_only(texts.begin_N), read_only(self.words_V)
        _bits(data_B, begin_N, BYTES_AND_MARKS, words_V, words, single, pairs, pair_values, triples, triple_values, rare, bits_N)
        return bits_N

    def perplexity(self, texts: TextColumn) -> np.ndarray:
        """float64 [N]: 2 to the power of `bits`."""
        return np.exp2(self.bits(texts))


def load(folder: Path) -> Trigrams:
    """A model that `train` wrote.

    Raises:
        InputError: the folder is missing, damaged, or holds a model of another kind.
    """
    tensors, settings = read_model(folder, "trigrams")
    return Trigrams(**tensors, settings=settings)


# --- training ------------------------------------------------------------------------------------------------------------


@njit(cache=True, nogil=True)
def _stream(data_B, begin_N, table):  # type: ignore[no-untyped-def]
    """Tokens of all texts (uint64), two zeros before those of each."""
    room = 2 * len(begin_N) + begin_N[-1] - begin_N[0] + 1
    out_T, count = np.empty(room, np.uint64), 0
    _, start_T, stop_T = buffers(begin_N)
    for n in range(len(begin_N) - 1):
        out_T[count : count + 2] = 0
        count += 2
        count += tokenize(data_B, begin_N[n], begin_N[n + 1], table, FNV_OFFSET, out_T[count:], start_T, stop_T)
    return out_T[:count].copy()


def _summed(keys: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Different keys, sorted, and the sum of the counts of each."""
    if len(keys) == 0:
        return keys, counts
    order = np.argsort(keys, kind="stable")
    keys, counts = keys[order], counts[order]
    first = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1])))
    return keys[first], np.add.reduceat(counts, first)


def _smoothed(
    keys: np.ndarray, counts: np.ndarray, min_count: int, lower: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """One order of the model from the next shorter one.

    Args:
        keys: int64 [G], sorted. counts: int64 [G]. min_count: n-grams with fewer are left to the shorter ones.
        lower: float64 [G], probability of each n-gram's last word after the context without its first word.

    Returns:
        Which n-grams are kept, bool [G], and the probability of each, float64 [G]; the contexts, and gamma of each.
    """
    ones, twos = int((counts == 1).sum()), int((counts == 2).sum())
    discount = min(max(ones / max(ones + 2 * twos, 1), 0.1), 0.9)  # Ney, Essen and Kneser's estimate, within reason
    contexts, first, place = np.unique(keys >> _BITS, return_index=True, return_inverse=True)
    total = np.add.reduceat(counts, first).astype(np.float64)
    kept = counts >= min_count
    share = np.where(kept, counts - discount, 0.0) / total[place]
    gamma = np.maximum(1.0 - np.bincount(place, share, len(contexts)), 1e-9)
    return kept, share + gamma[place] * lower, contexts, gamma


def train(tables: Iterable[pa.Table], folder: Path, *, min_word_count: int = 2, min_count: int = 2) -> Trigrams:
    """Train a model on the texts of tables and write it. Needs about 20 times the texts' size of memory.

    Args:
        min_word_count: occurrences of a word, below which it is unknown.
        min_count: occurrences of a trigram, below which it is left to the shorter n-grams.

    Raises:
        InputError: there is no word, or the folder cannot be written.
    """
    streams, documents, size = [], 0, 0
    for table in tables:
        texts = TextColumn.of(table["text"])
        streams.append(_stream(read_only(texts.data_B), read_only(texts.begin_N), BYTES_AND_MARKS))
        documents += len(texts)
        size += int(texts.begin_N[-1] - texts.begin_N[0])
    stream_T = np.concatenate([np.empty(0, np.uint64), *streams])
    del streams
    words, place_T, counts = np.unique(stream_T, return_inverse=True, return_counts=True)
    is_word = words != 0
    if not is_word.any():
        raise InputError("There is no word to train a model of perplexity on: check the files.")
    known = is_word & (counts >= min_word_count)
    max_known = 2**_BITS - 2
    if known.sum() > max_known:  # the most frequent; of equals those of the smaller hash
        order = np.argsort(np.where(known, -counts, 1), kind="stable")
        known[order[max_known:]] = False
    numbers = np.where(is_word, UNKNOWN, START)
    numbers[known] = np.arange(2, 2 + known.sum())
    words_V = words[known]
    ids_T = numbers[place_T]
    del stream_T, place_T
    keys_T = (ids_T[:-2] << 2 * _BITS) | (ids_T[1:-1] << _BITS) | ids_T[2:]
    triples, triple_counts = _summed(keys_T[ids_T[2:] != START], np.ones(int((ids_T[2:] != START).sum()), np.int64))
    del keys_T
    pairs, pair_counts = _summed(triples & _PAIR, np.ones(len(triples), np.int64))
    single, single_counts = _summed(pairs & _WORD, np.ones(len(pairs), np.int64))

    size_V, alike = len(words_V) + 2, 1.0 / (len(words_V) + 1)  # no text has the word START
    _, probability, _, gamma = _smoothed(single, single_counts, 1, np.full(len(single), alike))
    single_P = np.full(size_V, gamma[0] * alike)
    single_P[single] = probability
    _, pair_P, contexts, gamma = _smoothed(pairs, pair_counts, 1, single_P[pairs & _WORD])
    single_V = np.stack([np.log2(single_P), np.zeros(size_V)], 1).astype(np.float32)
    single_V[contexts, 1] = np.log2(gamma)
    kept, triple_P, contexts, gamma = _smoothed(triples, triple_counts, min_count, pair_P[np.searchsorted(pairs, triples & _PAIR)])
    # contexts of trigrams are pairs, but for that of a text's first word
    all_pairs = np.union1d(pairs, contexts)
    pair_values = np.zeros((len(all_pairs), 2), np.float32)
    pair_values[np.searchsorted(all_pairs, pairs), 0] = np.log2(pair_P)
    pair_values[np.searchsorted(all_pairs, contexts), 1] = np.log2(gamma)
    triple_values = np.log2(triple_P[kept])[:, None].astype(np.float32)

    settings = {
        "kind": "trigrams",
        "least_words": min_word_count,
        "least": min_count,
        "documents": documents,
        "bytes": size,
        "tokens": int((ids_T != START).sum()),
        "words": len(words_V),
        "rare_words": int((is_word & ~known).sum()),
        "pairs": len(all_pairs),
        "triples": len(triple_values),
    }
    tensors = {
        "words_V": words_V,
        "single_V": single_V,
        "pairs": all_pairs,
        "pair_values": pair_values,
        "triples": triples[kept],
        "triple_values": triple_values,
    }
    write_model(folder, tensors, settings)
    return Trigrams(**tensors, settings=settings)
