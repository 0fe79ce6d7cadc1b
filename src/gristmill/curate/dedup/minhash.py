"""MinHash signatures, their bands, and exact Jaccard similarity, of sets of shingles.

Shapes: N documents, H hashes of a signature, B bands of R hashes each.

A shingle is n words that follow each other (a word: letters and digits of ASCII, lower-cased, and whatever is not ASCII), or n characters
of the words joined by single spaces; a text with fewer is one shingle. Jaccard similarity is that of the sets of 64-bit hashes of shingles.
A signature keeps the least of each of H affine functions, mod 2^32, of those hashes' mixed upper half: two signatures agree at a place with
the probability of the Jaccard similarity (Broder 1997), within sqrt(J (1 - J) / H).
"""

import numpy as np
from numba import njit

from gristmill.curate.text.text_column import Texts, mixed

EMPTY = np.uint32(0xFFFFFFFF)


def _ascii() -> np.ndarray:
    table = np.zeros(256, np.uint8)  # 0 parts words; else the byte as it counts
    for byte in range(256):
        char = chr(byte)
        table[byte] = byte if byte >= 128 else ord(char.lower()) if char.isalnum() else 0
    return table


LOWER = _ascii()


@njit(cache=True, nogil=True)
def shingles_of(data, lower, words, size, out):  # type: ignore[no-untyped-def]
    """Hashes of the shingles of one text into out (as long as the text and one more); their number."""
    count = 0
    if words:
        num_words = 0
        here = np.uint64(0)
        inside = False
        for i in range(len(data) + 1):
            byte = lower[data[i]] if i < len(data) else np.uint8(0)
            if byte:
                here = (here ^ np.uint64(byte)) * np.uint64(0x100000001B3)
                inside = True
            elif inside:
                out[num_words] = mixed(here)  # words first, shingles over them
                num_words += 1
                here = np.uint64(0)
                inside = False
        if num_words == 0:
            return 0
        span = min(size, num_words)
        for first in range(num_words - span + 1):
            whole = np.uint64(0)
            for k in range(span):
                whole = whole * np.uint64(0x9E3779B97F4A7C15) + out[first + k]
            out[count] = mixed(whole)
            count += 1
        return count
    # characters: a rolling sum over the normalised text, whose last `size` begins of characters are kept
    ring = np.zeros(size, np.uint64)  # hashes of the last characters
    power = np.uint64(1)
    for _ in range(size):
        power *= np.uint64(0x9E3779B97F4A7C15)
    whole = np.uint64(0)
    seen = 0
    gap = False
    i = 0
    while i < len(data):
        byte = lower[data[i]]
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
            value = mixed(char if part == (1 if gap else 0) else np.uint64(32))
            whole = whole * np.uint64(0x9E3779B97F4A7C15) + value - ring[seen % size] * power
            ring[seen % size] = value
            seen += 1
            if seen >= size:
                out[count] = mixed(whole)
                count += 1
        gap = False
    if 0 < seen < size:
        out[0] = mixed(whole)
        count = 1
    return count


@njit(cache=True, nogil=True)
def _signatures(data, begin, lower, words, size, factors, shifts, out, counts):  # type: ignore[no-untyped-def]
    longest = 0
    for n in range(len(begin) - 1):
        longest = max(longest, begin[n + 1] - begin[n])
    shingles = np.empty(2 * longest + 2, np.uint64)
    eight = np.empty(8, np.uint32)
    for n in range(len(begin) - 1):
        count = shingles_of(data[begin[n] : begin[n + 1]], lower, words, size, shingles)
        counts[n] = count
        row = out[n]
        for at in range(0, count, 8):  # eight meet each function at once, so that it is loaded once
            for k in range(8):  # the last few are taken twice: the least does not mind
                eight[k] = np.uint32(shingles[min(at + k, count - 1)] >> np.uint64(32))
            x0, x1, x2, x3, x4, x5, x6, x7 = eight[0], eight[1], eight[2], eight[3], eight[4], eight[5], eight[6], eight[7]
            for j in range(len(factors)):
                a, b = factors[j], shifts[j]
                low = min(np.uint32(a * x0 + b), np.uint32(a * x1 + b))
                low = min(low, min(np.uint32(a * x2 + b), np.uint32(a * x3 + b)))
                low = min(low, min(np.uint32(a * x4 + b), np.uint32(a * x5 + b)))
                low = min(low, min(np.uint32(a * x6 + b), np.uint32(a * x7 + b)))
                row[j] = min(row[j], low)


def signatures(texts: Texts, words: bool, size: int, num_hashes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Signatures uint32 [N, H], and how many shingles each text has; a text with none has a signature of EMPTY."""
    draw = np.random.default_rng(seed)
    factors = draw.integers(0, 2**31, num_hashes, np.uint32) * np.uint32(2) + np.uint32(1)
    shifts = draw.integers(0, 2**32, num_hashes, np.uint32)
    out = np.full((len(texts), num_hashes), EMPTY, np.uint32)
    counts = np.zeros(len(texts), np.int64)
    _signatures(texts.data_B, texts.begin_N, LOWER, words, size, factors, shifts, out, counts)
    return out, counts


@njit(cache=True, nogil=True)
def _bands(signature, bands, rows, out):  # type: ignore[no-untyped-def]
    for n in range(len(signature)):
        for band in range(bands):
            key = np.uint64(band + 1) * np.uint64(0x9E3779B97F4A7C15)
            for r in range(rows):
                key = mixed(key ^ np.uint64(signature[n, band * rows + r])) + np.uint64(0x9E3779B97F4A7C15)
            out[n, band] = key


def band_keys(signature: np.ndarray, bands: int, rows: int) -> np.ndarray:
    """uint64 [N, B]: equal where all the R hashes of a band are."""
    out = np.empty((len(signature), bands), np.uint64)
    _bands(signature, bands, rows, out)
    return out


@njit(cache=True, nogil=True)
def _unique(data, lower, words, size):  # type: ignore[no-untyped-def]
    out = np.empty(2 * len(data) + 2, np.uint64)
    count = shingles_of(data, lower, words, size, out)
    sorted_ = np.sort(out[:count])
    kept = 0
    for i in range(count):
        if i == 0 or sorted_[i] != sorted_[i - 1]:
            sorted_[kept] = sorted_[i]
            kept += 1
    return sorted_[:kept].copy()


def shingle_set(text: np.ndarray, words: bool, size: int) -> np.ndarray:
    """The different shingles of one text (uint8 bytes), sorted uint64."""
    return _unique(text, LOWER, words, size)


@njit(cache=True, nogil=True)
def jaccard(left, right):  # type: ignore[no-untyped-def]
    """Jaccard similarity of two sorted sets; 0 if both are empty."""
    i = j = common = 0
    while i < len(left) and j < len(right):
        if left[i] == right[j]:
            common += 1
            i += 1
            j += 1
        elif left[i] < right[j]:
            i += 1
        else:
            j += 1
    total = len(left) + len(right) - common
    return common / total if total else 0.0


def candidate_probability(similarity: float, bands: int, rows: int) -> float:
    """Probability that two documents of this Jaccard similarity share a band: 1 - (1 - J^R)^B."""
    return 1.0 - (1.0 - similarity**rows) ** bands
