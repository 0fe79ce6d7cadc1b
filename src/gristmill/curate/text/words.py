"""Word tokenizer: the one kernel by which all scanners cut texts into words, and hash them.

A table says of each character (or of each byte) whether it parts words, is a piece of one, or a token of its own, and as what it is hashed
(lower case, say). The scanners differ in their tables, because they want different words:

- text metrics: what `str.split()` gives, as it is (`split`);
- near duplicates, hashed embeddings: ASCII letters and digits in lower case, and all bytes beyond ASCII (BYTES);
- trigrams and classifiers: the same, but ASCII marks and ideographs are tokens of their own (BYTES_AND_MARKS);
- exact substrings: letters and digits of Unicode as they are, and every other character but spaces (`letters_and_marks`);
- decontamination: letters and digits of Unicode, each in lower case (`lower_letters`).
"""

from functools import cache

import numpy as np
from numba import njit

from gristmill.curate.text.text_column import DIGIT, LETTER, SPACE, char_classes, decode_utf8, longest
from gristmill.data.minhash import mix64

# Flags of a table's entries, above the value that is hashed; an entry of 0 parts words.
VALUE = 0x1FFFFF
WORD = 1 << 24  # a piece of a word
SINGLE = 1 << 25  # a token of its own, hashed as a word of one piece
MARK = 1 << 26  # the same, its value mixed as it is
IDEOGRAPH = 1 << 27  # the same, of this byte and the two that follow
FNV_OFFSET, FNV_PRIME = np.uint64(0xCBF29CE484222325), np.uint64(0x100000001B3)


@njit(cache=True, nogil=True)
def tokenize(data_B, begin, end, table, seed, hash_W, start_W, stop_W):  # type: ignore[no-untyped-def]
    """Cut one text, the bytes from `begin` to `end`, into words.

    Args:
        table: uint32 [256], of bytes, or longer, of code points.
        seed: what the hash of a word begins with.
        hash_W, start_W, stop_W: where the hash of each word goes (uint64) and the bytes where it starts and stops (int64).

    Returns:
        How many words there are.
    """
    points = len(table) > 256
    count, i, inside, value = 0, begin, False, seed
    while i < end:
        point, size = np.int64(data_B[i]), 1
        if points and point >= 0x80:
            point, size = decode_utf8(data_B, i)
        entry = table[point]
        if entry & WORD:
            if not inside:
                inside, value = True, seed
                start_W[count] = i
            value = (value ^ np.uint64(entry & VALUE)) * FNV_PRIME
        else:
            if inside:
                inside = False
                hash_W[count], stop_W[count] = mix64(value), i
                count += 1
            if entry:
                value = np.uint64(entry & VALUE)
                if entry & IDEOGRAPH:
                    value = value << np.uint64(16) | np.uint64(data_B[i + 1]) << np.uint64(8) | np.uint64(data_B[i + 2])
                    size = 3
                hash_W[count] = mix64((seed ^ value) * FNV_PRIME if entry & SINGLE else value)
                start_W[count], stop_W[count] = i, i + size
                count += 1
        i += size
    if inside:
        hash_W[count], stop_W[count] = mix64(value), end
        count += 1
    return count


@njit(cache=True, nogil=True)
def buffers(begin_N):  # type: ignore[no-untyped-def]
    """Where `tokenize` writes: room for the words of the longest text, one a byte."""
    size = longest(begin_N)
    return np.empty(size, np.uint64), np.empty(size, np.int64), np.empty(size, np.int64)


# ---- tables ----


def _of_bytes(marks: bool) -> np.ndarray:
    table = np.zeros(256, np.uint32)
    for byte in range(256):
        char = chr(byte)
        if byte >= 128:
            table[byte] = byte | (IDEOGRAPH if marks and 0xE3 <= byte <= 0xE9 else WORD)  # first bytes of U+3000 to U+9FFF
        elif char.isalnum():
            table[byte] = ord(char.lower()) | WORD
        elif marks and char.isprintable() and char != " ":
            table[byte] = byte | MARK
    return table


BYTES, BYTES_AND_MARKS = _of_bytes(False), _of_bytes(True)


def _of_points(words: int, others: int) -> np.ndarray:
    """Code points of the classes in `words` are pieces of words; `others` is what all others are, but for spaces."""
    classes = char_classes()
    table = np.where((classes & words) != 0, WORD, others) | np.arange(len(classes))
    return np.where(((classes & SPACE) != 0) | (table < WORD), 0, table).astype(np.uint32)


@cache
def split() -> np.ndarray:
    """The words of `str.split()`."""
    return _of_points(0, WORD)


@cache
def letters_and_marks() -> np.ndarray:
    """Runs of letters and digits; every other character that is no space is a token of its own."""
    return _of_points(LETTER | DIGIT, SINGLE)


@cache
def lower_letters() -> np.ndarray:
    """Runs of letters and digits, in lower case (the first character of it)."""
    table = _of_points(LETTER | DIGIT, 0)
    for point in np.nonzero(table[:0x20000])[0].tolist():
        table[point] = WORD | ord(chr(point).lower()[0])
    return table
