"""Shingling of texts, and their MinHash signatures (`data/minhash.py`).

A shingle is n words that follow each other (`words.signs_and_lower`), or n characters of the words joined by single spaces; a text with
fewer is one shingle. In a text of at most MAX_SHORT words that says numbers or has signs, each shingle knows all of these: so it is like
no text that says others.

Shapes: N documents, H hashes of a signature, W words of one document.
"""

from functools import cache

import numpy as np
from numba import njit

from gristmill.curate.text.text_column import TextColumn, decode_utf8, longest
from gristmill.curate.text.words import CLUSTER, FNV_PRIME, HAN, NUMBER, SINGLE, VALUE, buffers, first_entry, signs_and_lower, tokenize
from gristmill.data.minhash import EMPTY, GOLDEN, mix64, permutations, update

MAX_SHORT = 100  # words of a text in which every number and sign counts
_SPELT = (
    "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty "
    "thirty forty fifty sixty seventy eighty ninety hundred thousand million billion half third quarter twice double triple"
)


@njit(cache=True, nogil=True)
def _shingles_of(data, table, words, size, spelt, out, start_W, stop_W):  # type: ignore[no-untyped-def]
    """Hashes of the shingles of one text into out (twice as long as the text and two more), by way of its words; their number.

    Args:
        spelt: hashes of words that say a number; where there are none, shingles know only their own words.
    """
    count = 0
    num_words = tokenize(data, 0, len(data), table, np.uint64(0), out, start_W, stop_W)
    if num_words == 0:
        return 0
    facts = np.uint64(0)
    if len(spelt) and num_words <= MAX_SHORT:
        facts = _facts(data, table, spelt, out[:num_words], start_W, stop_W)
    if words:  # shingles over the words
        span = min(size, num_words)
        whole, power = np.uint64(0), np.uint64(1)
        for w in range(span - 1):
            whole, power = whole * GOLDEN + out[w], power * GOLDEN
        for count in range(num_words - span + 1):
            whole = whole * GOLDEN + out[count + span - 1]
            first = out[count]
            out[count] = mix64(whole)
            whole -= power * first
        count = num_words - span + 1
    else:
        count = _of_characters(data, table, num_words, size, out, start_W, stop_W)
    if facts:
        for k in range(count):
            out[k] = mix64(out[k] ^ facts)
    return count


@njit(cache=True, nogil=True)
def _facts(data, table, spelt, hash_W, start_W, stop_W):  # type: ignore[no-untyped-def]
    """One hash of the numbers and signs of a text, in their order, of what parts two numbers, and, beside signs, of brackets; or 0."""
    facts, found, signs = np.uint64(0), False, False
    for w in range(len(hash_W)):
        entry = first_entry(data, start_W[w], table)
        signs = signs or (entry & SINGLE and not entry & (HAN | CLUSTER))
    last_number = -2
    for w in range(len(hash_W)):
        if signs and w:
            for i in range(stop_W[w - 1], start_W[w]):
                if data[i] in (40, 41, 91, 93, 123, 125):
                    facts = (facts ^ np.uint64(data[i])) * FNV_PRIME
        entry = first_entry(data, start_W[w], table)
        sign, number, i = entry & SINGLE and not entry & (HAN | CLUSTER), False, start_W[w]
        while i < stop_W[w] and not number:
            number = first_entry(data, i, table) & NUMBER != 0
            i += 1
            while i < stop_W[w] and data[i] & 0xC0 == 0x80:
                i += 1
        for k in range(len(spelt)):
            number = number or hash_W[w] == spelt[k]
        if number and last_number == w - 1 and start_W[w] == stop_W[w - 1] + 1:  # 1.5 and 1,5
            facts = (facts ^ np.uint64(data[start_W[w] - 1])) * FNV_PRIME
        if number:
            last_number = w
        if number or sign:
            facts, found = (facts ^ hash_W[w]) * FNV_PRIME, True
    return mix64(facts) | np.uint64(1) if found else np.uint64(0)


@njit(cache=True, nogil=True)
def _of_characters(data, table, num_words, size, out, start_W, stop_W):  # type: ignore[no-untyped-def]
    """A rolling sum over the characters, of which the last `size` are kept."""
    ring = np.zeros(size, np.uint64)
    power = np.uint64(1)
    for _ in range(size):
        power *= GOLDEN
    whole, count, seen = np.uint64(0), 0, 0
    for w in range(num_words):
        i = start_W[w]
        gap = w > 0 and i > stop_W[w - 1]
        while i < stop_W[w]:
            char = np.uint64(32)
            if not gap:
                point, width = np.int64(data[i]), 1
                if point >= 0x80:
                    point, width = decode_utf8(data, i)
                char = np.uint64(table[point] & VALUE)
                i += width
            gap = False
            value = mix64(char)
            whole = whole * GOLDEN + value - ring[seen % size] * power
            ring[seen % size] = value
            seen += 1
            if seen >= size:
                out[count] = mix64(whole)
                count += 1
    if 0 < seen < size:
        out[0] = mix64(whole)
        count = 1
    return count


@cache
def _spelt_numbers() -> np.ndarray:
    data = np.frombuffer(_SPELT.encode(), np.uint8)
    hash_W, start_W, stop_W = buffers(np.array([0, len(data)]))
    return hash_W[: tokenize(data, 0, len(data), signs_and_lower(), np.uint64(0), hash_W, start_W, stop_W)].copy()


@njit(cache=True, nogil=True)
def _signatures(data_B, begin_N, table, words, size, spelt, factors, shifts, signature_NH, counts_N):  # type: ignore[no-untyped-def]
    shingles = np.empty(2 * longest(begin_N), np.uint64)
    _, start_W, stop_W = buffers(begin_N)
    for n in range(len(begin_N) - 1):
        counts_N[n] = _shingles_of(data_B[begin_N[n] : begin_N[n + 1]], table, words, size, spelt, shingles, start_W, stop_W)
        update(signature_NH[n], shingles, counts_N[n], factors, shifts)


def signatures(texts: TextColumn, words: bool, size: int, *, num_hashes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Signatures uint32 [N, H], and how many shingles each text has; a text with none has a signature of EMPTY."""
    signature_NH = np.full((len(texts), num_hashes), EMPTY, np.uint32)
    counts_N = np.zeros(len(texts), np.int64)
    functions = permutations(num_hashes, seed)
    _signatures(texts.data_B, texts.begin_N, signs_and_lower(), words, size, _spelt_numbers(), *functions, signature_NH, counts_N)
    return signature_NH, counts_N


@njit(cache=True, nogil=True)
def _unique(data, table, words, size, spelt):  # type: ignore[no-untyped-def]
    out = np.empty(2 * len(data) + 2, np.uint64)
    count = _shingles_of(data, table, words, size, spelt, out, np.empty(len(data), np.int64), np.empty(len(data), np.int64))
    sorted_ = np.sort(out[:count])
    kept = 0
    for i in range(count):
        if i == 0 or sorted_[i] != sorted_[i - 1]:
            sorted_[kept] = sorted_[i]
            kept += 1
    return sorted_[:kept].copy()


def shingle_set(text: np.ndarray, words: bool, size: int) -> np.ndarray:
    """The different shingles of one text (uint8 bytes), sorted uint64."""
    return _unique(text, signs_and_lower(), words, size, _spelt_numbers())


@njit(cache=True, nogil=True)
def word_shingles(data, table, size, out, start_W, stop_W):  # type: ignore[no-untyped-def]
    """Hashes of runs of `size` words of one text, which know nothing else of it, into `out`; their number."""
    return _shingles_of(data, table, True, size, np.empty(0, np.uint64), out, start_W, stop_W)
