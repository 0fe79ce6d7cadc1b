"""Near-duplicate detection by MinHash and LSH, one text at a time: texts that share most of their word triples."""

import numpy as np
import xxhash

from gristmill.synth.parsing import normalize

BANDS, ROWS = 16, 4  # two texts with a Jaccard similarity of .8 meet in a band with probability .9998, of .5 with .64
SHINGLE = 3  # words


class NearDuplicates:
    """MinHash index of the texts seen so far, which says whether a new one is like one of them.

    Args:
        threshold: estimated Jaccard similarity of the sets of word triples from which on two texts are alike.
    """

    def __init__(self, threshold: float = 0.8):
        from gristmill.data import minhash  # numba takes half a second to load

        self._threshold, self._minhash = threshold, minhash
        self._permutations = minhash.permutations(BANDS * ROWS)
        self._exact: set[bytes] = set()
        self._buckets: dict[int, list[int]] = {}  # band key: places in `_signatures`
        self._signatures: list[np.ndarray] = []

    def add(self, text: str) -> bool:
        """Whether a text is new. Only a new one is remembered."""
        folded = normalize(text) or text
        digest = xxhash.xxh3_128_digest(folded.encode())
        if digest in self._exact:
            return False
        words = folded.split()
        shingles = {" ".join(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1))}
        hashes = np.array([xxhash.xxh3_64_intdigest(shingle.encode()) for shingle in shingles], np.uint64)
        signature = np.full(BANDS * ROWS, self._minhash.EMPTY, np.uint32)
        self._minhash.update(signature, hashes, len(hashes), *self._permutations)
        keys = self._minhash.band_keys(signature[None], BANDS, ROWS)[0].tolist()
        near = {other for key in keys for other in self._buckets.get(key, ())}
        if any(float((self._signatures[other] == signature).mean()) >= self._threshold for other in near):
            return False
        for key in keys:
            self._buckets.setdefault(key, []).append(len(self._signatures))
        self._signatures.append(signature)
        self._exact.add(digest)
        return True
