"""MinHash signatures, LSH band keys and Jaccard similarity, of sets of 64-bit shingle hashes (Broder 1997).

A signature keeps the least of each of H affine functions, mod 2^32, of the shingles' mixed upper halves: two signatures agree at a place
with the probability of the Jaccard similarity J, within sqrt(J (1 - J) / H).

Shapes: N documents, S shingles of one, H hashes of a signature, B bands of R hashes each.
"""

import numpy as np
from numba import njit

EMPTY = np.uint32(0xFFFFFFFF)  # at every place of the signature of no shingles
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # an odd number to multiply hashes with: no bit is lost


@njit(cache=True, nogil=True, inline="always")
def mix64(x):  # type: ignore[no-untyped-def]
    """SplitMix64's finalizer: a uint64 every bit of which depends on every bit of x."""
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permutations(num_hashes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The affine functions a x + b of a signature: uint32 [H] each, a odd."""
    draw = np.random.default_rng(seed)
    factors = draw.integers(0, 2**31, num_hashes, np.uint32) * np.uint32(2) + np.uint32(1)
    return factors, draw.integers(0, 2**32, num_hashes, np.uint32)


@njit(cache=True, nogil=True)
def update(signature_H, shingle_S, count, factors, shifts):  # type: ignore[no-untyped-def]
    """Add the first `count` shingles to a signature, in place."""
    eight = np.empty(8, np.uint32)
    for at in range(0, count, 8):  # eight meet each function at once, so that it is loaded once
        for k in range(8):  # the last few are taken twice: the least does not mind
            eight[k] = np.uint32(shingle_S[min(at + k, count - 1)] >> np.uint64(32))
        x0, x1, x2, x3, x4, x5, x6, x7 = eight[0], eight[1], eight[2], eight[3], eight[4], eight[5], eight[6], eight[7]
        for j in range(len(factors)):
            a, b = factors[j], shifts[j]
            low = min(np.uint32(a * x0 + b), np.uint32(a * x1 + b))
            low = min(low, min(np.uint32(a * x2 + b), np.uint32(a * x3 + b)))
            low = min(low, min(np.uint32(a * x4 + b), np.uint32(a * x5 + b)))
            low = min(low, min(np.uint32(a * x6 + b), np.uint32(a * x7 + b)))
            signature_H[j] = min(signature_H[j], low)


@njit(cache=True, nogil=True)
def _bands(signature_NH, bands, rows, key_NB):  # type: ignore[no-untyped-def]
    for n in range(len(signature_NH)):
        for band in range(bands):
            key = np.uint64(band + 1) * GOLDEN
            for r in range(rows):
                key = mix64(key ^ np.uint64(signature_NH[n, band * rows + r])) + GOLDEN
            key_NB[n, band] = key


def band_keys(signature_NH: np.ndarray, bands: int, rows: int) -> np.ndarray:
    """LSH keys, uint64 [N, B]: equal where all the R hashes of a band are."""
    key_NB = np.empty((len(signature_NH), bands), np.uint64)
    _bands(signature_NH, bands, rows, key_NB)
    return key_NB


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
