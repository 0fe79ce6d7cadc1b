"""Near-duplicate detection by MinHash and LSH, one text at a time: texts that share most of their word triples.

In scripts without spaces a letter is a word. Short texts whose numbers or signs differ are no near duplicates: `3 + 4` is not `3 - 4`.
"""

import re
import unicodedata

import numpy as np
import xxhash

from gristmill.synth.parsing import normalize

BANDS, ROWS = 16, 4  # two texts with a Jaccard similarity of .8 meet in a band with probability .9998, of .5 with .64
SHINGLE = 3  # words
MAX_SHORT = 300  # words of a text whose numbers and signs tell it from others; a longer one's are details
# A letter of Thai to Burmese, Khmer, kana or an ideograph, with its marks; else a word, or a sign between two operands.
LETTER = "[\u0e00-\u109f\u1780-\u17ff\u1a20-\u1aaf\u1b00-\u1b7f\u3041-\u30ff\u3400-\u9fff\ua980-\ua9df\U00020000-\U000323af]"
OPERATOR = r"(?:(?<=[\d)\]])|(?<=[\d)\]] )|(?<=\b\w )|(?<=\d\w ))[-*/](?= ?(?:[\d(\[\\]|\w\b))"  # no hyphen, and no mark of a list
SIGN = rf"[+=<>^%\u00d7\u00f7\u2200-\u22ff]|{OPERATOR}|(?<=\w)#"
WORD = re.compile(rf"(?P<letter>{LETTER})|(?P<fact>\d[\d.,]*\w*|{SIGN})|(?:(?!{LETTER})[\w'\u2019])+")
SPELT = (
    "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty "
    "thirty forty fifty sixty seventy eighty ninety hundred thousand million billion half third quarter twice double triple "
    "\u4e00 \u4e8c \u4e09 \u56db \u4e94 \u516d \u4e03 \u516b \u4e5d \u5341 \u767e \u5343 \u4e07 \u534a"
)
NUMERALS = frozenset(SPELT.split())


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
        shingles = _shingles(folded)
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


def _shingles(text: str) -> set[str]:
    """Triples of words, each with all numbers and signs of a short text, in their order."""
    words: list[str] = []
    facts: list[str] = []
    for m in WORD.finditer(text):
        if m["letter"] and unicodedata.category(m[0]).startswith("M") and words:  # a mark belongs to its letter
            words[-1] += m[0]
            continue
        words.append(m[0])
        if m["fact"] or m[0] in NUMERALS:
            facts.append(m[0].rstrip(".,"))
    about = " ".join(facts) if len(words) <= MAX_SHORT else ""
    words = words or [text]
    return {f"{' '.join(words[i : i + SHINGLE])}\n{about}" for i in range(max(1, len(words) - SHINGLE + 1))}
