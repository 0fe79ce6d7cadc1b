"""Near-duplicates by MinHash: texts that share most of their word triples."""

import hashlib
from collections.abc import Sequence

import numpy as np

from gristmill.synth.parsing import normalize

BANDS, ROWS = 16, 4  # two texts with a Jaccard similarity of .8 meet in a band with probability .9998, of .5 with .64
SHINGLE = 3  # words


class NearDuplicates:
    """Texts seen so far, and whether a new one is like one of them.

    Args:
        threshold: estimated Jaccard similarity of the sets of word triples from which on two texts are alike.
    """

    def __init__(self, threshold: float = 0.8):
        self._threshold = threshold
        rng = np.random.default_rng(0)
        # multiply-shift: a x + b modulo 2^64, of which the upper half is random enough
        self._a = rng.integers(0, 1 << 63, BANDS * ROWS, dtype=np.uint64)[:, None] * np.uint64(2) + np.uint64(1)
        self._b = rng.integers(0, 1 << 63, BANDS * ROWS, dtype=np.uint64)[:, None]
        self._exact: set[bytes] = set()
        self._bands: list[dict[bytes, list[int]]] = [{} for _ in range(BANDS)]
        self._signatures: list[np.ndarray] = []

    def add(self, text: str) -> bool:
        """Whether a text is new. Only a new one is remembered."""
        folded = normalize(text) or text
        digest = hashlib.blake2b(folded.encode(), digest_size=16).digest()
        if digest in self._exact:
            return False
        signature = self._signature(folded.split())
        keys = [signature[band * ROWS : (band + 1) * ROWS].tobytes() for band in range(BANDS)]
        near = {other for band, key in zip(self._bands, keys, strict=True) for other in band.get(key, ())}
        if any(float((self._signatures[other] == signature).mean()) >= self._threshold for other in near):
            return False
        for band, key in zip(self._bands, keys, strict=True):
            band.setdefault(key, []).append(len(self._signatures))
        self._signatures.append(signature)
        self._exact.add(digest)
        return True

    def _signature(self, words: Sequence[str]) -> np.ndarray:
        shingles = {" ".join(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1))}
        hashes = [int.from_bytes(hashlib.blake2b(shingle.encode(), digest_size=8).digest(), "big") for shingle in shingles]
        return ((self._a * np.array(hashes, dtype=np.uint64) + self._b) >> np.uint64(32)).min(axis=1)
