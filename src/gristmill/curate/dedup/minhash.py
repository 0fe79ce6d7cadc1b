"""Shingling of texts, and their MinHash signatures (`data/minhash.py`).

A shingle is n words that follow each other (a word: letters and digits of ASCII, lower-cased, and whatever is not ASCII), or n characters
of the words joined by single spaces; a text with fewer is one shingle.

Shapes: N documents, H hashes of a signature.
"""

import numpy as np
from numba import njit

from gristmill.curate.text.text_column import TextColumn, longest
from gristmill.curate.text.words import BYTES, VALUE, buffers, tokenize
from gristmill.data.minhash import EMPTY, GOLDEN, mix64, permutations, update


@njit(cache=True, nogil=True)
def shingles_of(data, table, words, size, out, start_W, stop_W):  # type: ignore[no-untyped-def]
    """Hashes of the shingles of one text into out (twice as long as the text and two more), by way of its words; their number."""
    count = 0
    if words:
        num_words = tokenize(data, 0, len(data), table, np.uint64(0), out, start_W, stop_W)  # shingles over them
        if num_words == 0:
            return 0
        span = min(size, num_words)
        for first in range(num_words - span + 1):
            whole = np.uint64(0)
            for k in range(span):
                whole = whole * GOLDEN + out[first + k]
            out[count] = mix64(whole)
            count += 1
        return count
    # characters: a rolling sum over the normalised text, whose last `size` begins of characters are kept
    ring = np.zeros(size, np.uint64)  # hashes of the last characters
    power = np.uint64(1)
    for _ in range(size):
        power *= GOLDEN
    whole = np.uint64(0)
    seen = 0
    gap = False
    i = 0
    while i < len(data):
        byte = table[data[i]] & VALUE
        if byte == 0:
            gap = seen > 0
            i += 1
            continue
        char = np.uint64(byte)
        i += 1
        if byte >= 192:  # the rest of a character of several bytes
            while i < len(data) and (data[i] & 0xC0) == 0x80:
                char = (char << np.uint64(8)) | np.uint64(data[i])
                i += 1
        for part in range(2 if gap else 1):
            value = mix64(char if part == (1 if gap else 0) else np.uint64(32))
            whole = whole * GOLDEN + value - ring[seen % size] * power
            ring[seen % size] = value
            seen += 1
            if seen >= size:
                out[count] = mix64(whole)
                count += 1
        gap = False
    if 0 < seen < size:
        out[0] = mix64(whole)
        count = 1
    return count


@njit(cache=True, nogil=True)
def _signatures(data_B, begin_N, table, words, size, factors, shifts, signature_NH, counts_N):  # type: ignore[no-untyped-def]
    shingles = np.empty(2 * longest(begin_N), np.uint64)
    _, start_W, stop_W = buffers(begin_N)
    for n in range(len(begin_N) - 1):
        counts_N[n] = shingles_of(data_B[begin_N[n] : begin_N[n + 1]], table, words, size, shingles, start_W, stop_W)
        update(signature_NH[n], shingles, counts_N[n], factors, shifts)


def signatures(texts: TextColumn, words: bool, size: int, *, num_hashes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Signatures uint32 [N, H], and how many shingles each text has; a text with none has a signature of EMPTY."""
    signature_NH = np.full((len(texts), num_hashes), EMPTY, np.uint32)
    counts_N = np.zeros(len(texts), np.int64)
    _signatures(texts.data_B, texts.begin_N, BYTES, words, size, *permutations(num_hashes, seed), signature_NH, counts_N)
    return signature_NH, counts_N


@njit(cache=True, nogil=True)
def _unique(data, table, words, size):  # type: ignore[no-untyped-def]
    out = np.empty(2 * len(data) + 2, np.uint64)
    count = shingles_of(data, table, words, size, out, np.empty(len(data), np.int64), np.empty(len(data), np.int64))
    sorted_ = np.sort(out[:count])
    kept = 0
    for i in range(count):
        if i == 0 or sorted_[i] != sorted_[i - 1]:
            sorted_[kept] = sorted_[i]
            kept += 1
    return sorted_[:kept].copy()


def shingle_set(text: np.ndarray, words: bool, size: int) -> np.ndarray:
    """The different shingles of one text (uint8 bytes), sorted uint64."""
    return _unique(text, BYTES, words, size)
