"""Word tokenizer: the one kernel by which all scanners cut texts into words, and hash them.

A table says of each character (or of each byte) whether it parts words, is a piece of one, or a token of its own, and as what it is hashed
(lower case, say). The scanners differ in their tables, because they want different words:

- text metrics: what `str.split()` gives, as it is (`split`);
- near duplicates, hashed embeddings: ASCII letters and digits in lower case, what is beyond ASCII, and signs (`signs_and_lower`);
- trigrams and classifiers: bytes; ASCII marks and ideographs are tokens of their own (BYTES_AND_MARKS);
- exact substrings: letters and digits of Unicode as they are, and every other character but spaces (`letters_and_marks`);
- decontamination: letters and digits of Unicode, each in lower case, and signs (`lower_letters`), first without (`lower_letters_alone`).

But for the third, which models were trained with: in scripts that put no spaces between words each letter is a word, with the combining
marks on it (Chinese, Japanese, Thai, Lao, Khmer, Burmese, Tibetan and others); everywhere a combining mark belongs to its word.

A sign is what changes the meaning of what stands beside it: the plus of 3 + 4 and of C++, the minus of n - 1, but not a hyphen, a dash,
the mark before a point of a list, emphasis, a heading or a ruled line (`_is_sign`). Symbols of mathematics and currencies beyond ASCII
always are.
"""

import unicodedata
from functools import cache

import numpy as np
from numba import njit

from gristmill.curate.text.text_column import COMBINING, DIGIT, LETTER, NUMERIC, SPACE, SYMBOL, char_classes, decode_utf8, longest
from gristmill.data.minhash import mix64

VERSION = 2  # of what a word is; signatures of another one are of other words
# Flags of a table's entries, above the value that is hashed; an entry of 0 parts words.
VALUE = 0x1FFFFF
CLINGS = 1 << 21  # beside JOINS: no word begins with it
NUMBER = 1 << 22  # beside others: a digit, or another character that says a number
SIGN = 1 << 23  # beside SINGLE: only where `_is_sign` finds that it is one
WORD = 1 << 24  # a piece of a word
SINGLE = 1 << 25  # a token of its own, hashed as a word of one piece
MARK = 1 << 26  # the same, its value mixed as it is
IDEOGRAPH = 1 << 27  # the same, of this byte and the two that follow
JOINS = 1 << 28  # beside WORD: a piece of the SINGLE right before it, too
HAN, CLUSTER = 1 << 29, 1 << 30  # beside SINGLE: a letter of an East Asian script without spaces, or of another one
FNV_OFFSET, FNV_PRIME = np.uint64(0xCBF29CE484222325), np.uint64(0x100000001B3)
# Scripts without spaces: ideographs, kana, bopomofo, Yi, Tangut, Nushu; Thai, Lao, Tibetan, Burmese, Khmer, Tai, Balinese, Javanese.
_HAN = (
    *((0x2E80, 0x2FDF), (0x3005, 0x3007), (0x3021, 0x312F), (0x31A0, 0x31FF), (0x3400, 0x4DBF), (0x4E00, 0xA48C), (0xF900, 0xFAFF)),
    *((0xFF66, 0xFF9F), (0x16FE0, 0x18DFF), (0x1AFF0, 0x1B2FF), (0x20000, 0x323AF)),
)
_CLUSTER = (0x0E00, 0x109F), (0x1780, 0x17FF), (0x1950, 0x19DF), (0x1A20, 0x1AAF), (0x1B00, 0x1B7F), (0xA980, 0xA9FF), (0xAA60, 0xAADF)
_JOINERS = (0xAD, 0x200C, 0x200D, 0x2060)  # soft hyphen, zero-width non-joiner and joiner, word joiner


# ---- signs ----

# What a byte is to a sign beside it: 0, no operand; 1, a word; 2, an operand (a bracket); 3, a number; 4, a letter, of a word or alone; 5,
# what begins a number where a digit follows.
_IN_WORD = np.array([byte >= 0x80 or chr(byte).isalnum() or byte == 95 for byte in range(256)])
_KINDS = [1 if byte >= 0x80 or byte == 95 else 3 if 48 <= byte <= 57 else 4 if chr(byte).isalpha() else 0 for byte in range(256)]
_LEFT, _RIGHT = np.array(_KINDS, np.uint8), np.array(_KINDS, np.uint8)
_LEFT[list(b")]}")], _RIGHT[list(b"([{\\")], _RIGHT[list(b".-+")] = 2, 2, 5
_ANYWHERE = np.array([chr(byte) in "%&+<=>^|~" for byte in range(256)])  # within a line no mark of writing


@njit(cache=True, nogil=True)
def _left(data_B, begin, i):  # type: ignore[no-untyped-def]
    """What stands to the left of byte i: 2 or more, an operand (3, a number); 1, another word; 0, neither."""
    if i == begin:
        return np.uint8(0)
    kind = _LEFT[data_B[i - 1]]
    if kind == 4:
        kind = np.uint8(1 if i - 1 > begin and _IN_WORD[data_B[i - 2]] else 2)
    return kind


@njit(cache=True, nogil=True)
def _right(data_B, end, i):  # type: ignore[no-untyped-def]
    """The same of byte i and what follows it."""
    if i == end:
        return np.uint8(0)
    kind = _RIGHT[data_B[i]]
    if kind == 4:
        kind = np.uint8(1 if i + 1 < end and _IN_WORD[data_B[i + 1]] else 2)
    elif kind == 5:
        kind = np.uint8(3 if i + 1 < end and 48 <= data_B[i + 1] <= 57 else 0)
    return kind


@njit(cache=True, nogil=True)
def _is_sign(data_B, begin, end, i, size, value):  # type: ignore[no-untyped-def]
    """Whether the character at i, a mark of the given value, says what is done with its neighbours, and is no mark of writing."""
    first, stop = i, i + size
    if value == 46:  # .5
        return stop < end and 48 <= data_B[stop] <= 57 and (i == begin or data_B[i - 1] != 46) and _left(data_B, begin, i) == 0
    if size == 1:
        while first > begin and data_B[first - 1] == data_B[i] and i - first < 4:
            first -= 1
        while stop < end and data_B[stop] == data_B[i] and stop - i < 4:
            stop += 1
        if stop - first > 3:  # a ruled line
            return False
    run = stop - first if size == 1 else 1
    before, after = first, stop
    while before > begin and (data_B[before - 1] == 32 or data_B[before - 1] == 9):
        before -= 1
    opens_line = before == begin or data_B[before - 1] == 10
    if not opens_line and (value > 255 or _ANYWHERE[value]):
        return True
    while after < end and (data_B[after] == 32 or data_B[after] == 9):
        after += 1
    spaced = before < first and after > stop
    if opens_line:
        if after == end or data_B[after] == 10 or data_B[after] == 13:  # a ruled line, or nothing beside it
            return False
        if (value == 43 or value == 62) and after > stop:  # + or > before a point or a quotation
            return False
        if value == 45 and run == 1 and spaced:
            return False
    if value == 45:  # -
        if run == 1 and spaced:
            left, right = _left(data_B, begin, before), _right(data_B, end, after)
            return right >= 2 and left > 0 or left == 2
        left, right = _left(data_B, begin, first), _right(data_B, end, stop)
        if run == 2:
            return (left == 2 and right == 0) or (left == 0 and right == 2)  # i--
        return run == 1 and right >= 2 and left != 1
    if value == 42:  # *
        if spaced and not opens_line:
            return _left(data_B, begin, before) > 0 and _right(data_B, end, after) > 0
        return _left(data_B, begin, first) > 0 and _right(data_B, end, stop) > 0
    if value == 47:  # /
        if spaced:
            return run == 1 and _left(data_B, begin, before) > 0 and _right(data_B, end, after) > 0
        left, right = _left(data_B, begin, first), _right(data_B, end, stop)
        return left > 0 and right > 0 and (left > 1 or right > 1)
    if value == 35:  # #
        return _left(data_B, begin, first) > 0 or (_right(data_B, end, stop) == 3 and not opens_line)
    if value == 33:  # !
        return _left(data_B, begin, first) > 1 or _right(data_B, end, stop) > 0 or (stop < end and data_B[stop] == 61)
    if value == 36:  # $
        return _right(data_B, end, stop) == 3
    return True


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
    one = np.uint64(1)  # indexes without a sign cost nothing to check
    i, stop, size, count, value, entry = np.uint64(begin), np.uint64(end), one, np.uint64(0), seed, np.uint32(0)
    while i < stop:
        while i < stop:  # up to a character that may be a sign: judged in this loop, signs would make all of it slow
            point, size = np.uint64(data_B[i]), one
            if points and point >= 0x80:
                wide, width = decode_utf8(data_B, np.int64(i))
                point, size = np.uint64(wide), np.uint64(width)
            entry = table[point]
            if entry & WORD:
                if entry & JOINS:
                    joined = count > 0 and stop_W[count - one] == np.int64(i)
                    if joined or entry & CLINGS:
                        i += size
                        if joined:
                            value = (value ^ np.uint64(entry & VALUE)) * FNV_PRIME
                            hash_W[count - one], stop_W[count - one] = mix64(value), i
                        continue
                start_W[count], value = i, seed
                while entry & WORD:
                    value = (value ^ np.uint64(entry & VALUE)) * FNV_PRIME
                    i += size
                    if i == stop:
                        break
                    point, size = np.uint64(data_B[i]), one
                    if points and point >= 0x80:
                        wide, width = decode_utf8(data_B, np.int64(i))
                        point, size = np.uint64(wide), np.uint64(width)
                    entry = table[point]
                hash_W[count], stop_W[count] = mix64(value), i
                count += one
                if i == stop:
                    break
            if entry & SIGN:
                if point != 46 or (i + one < stop and 48 <= data_B[i + one] <= 57):  # most points are none
                    break
            elif entry:
                value = np.uint64(entry & VALUE)
                if entry & IDEOGRAPH:
                    value = value << np.uint64(16) | np.uint64(data_B[i + one]) << np.uint64(8) | np.uint64(data_B[i + one + one])
                    size = np.uint64(3)
                value = (seed ^ value) * FNV_PRIME if entry & SINGLE else value
                hash_W[count] = mix64(value)
                start_W[count], stop_W[count] = i, i + size
                count += one
            i += size
        if i < stop:
            if _is_sign(data_B, begin, end, np.int64(i), np.int64(size), np.int64(entry & VALUE)):
                value = (seed ^ np.uint64(entry & VALUE)) * FNV_PRIME
                hash_W[count] = mix64(value)
                start_W[count], stop_W[count] = i, i + size
                count += one
            i += size
    return np.int64(count)


@njit(cache=True, nogil=True)
def buffers(begin_N):  # type: ignore[no-untyped-def]
    """Where `tokenize` writes: room for the words of the longest text, one a byte."""
    size = longest(begin_N)
    return np.empty(size, np.uint64), np.empty(size, np.int64), np.empty(size, np.int64)


@njit(cache=True, nogil=True, inline="always")
def first_entry(data_B, i, table):  # type: ignore[no-untyped-def]
    """The table's entry of the character at i, by a table of code points."""
    point = np.int64(data_B[i])
    if point >= 0x80:
        point, _ = decode_utf8(data_B, i)
    return table[point]


# ---- tables ----


def _of_bytes() -> np.ndarray:
    table = np.zeros(256, np.uint32)
    for byte in range(256):
        char = chr(byte)
        if byte >= 128:
            table[byte] = byte | (IDEOGRAPH if 0xE3 <= byte <= 0xE9 else WORD)  # first bytes of U+3000 to U+9FFF
        elif char.isalnum():
            table[byte] = ord(char.lower()) | WORD
        elif char.isprintable() and char != " ":
            table[byte] = byte | MARK
    return table


BYTES_AND_MARKS = _of_bytes()


def _of_points(words: int, others: int) -> np.ndarray:
    """Code points of the classes in `words` are pieces of words; `others` is what all others are, but for spaces."""
    classes = char_classes()
    points = np.arange(len(classes), dtype=np.uint32)
    table = np.where((classes & words) != 0, WORD, others).astype(np.uint32) | points
    table = np.where(((classes & SPACE) != 0) | (table < WORD), 0, table).astype(np.uint32)
    joins = (classes & COMBINING) != 0
    joins[list(_JOINERS)] = True
    table[joins] = points[joins] | WORD | JOINS
    for ranges, flag in ((_HAN, HAN), (_CLUSTER, CLUSTER)):
        for first, last in ranges:
            letters = first + np.flatnonzero(classes[first : last + 1] & LETTER)
            table[letters] = letters.astype(np.uint32) | (SINGLE | flag)
    table[0x3007] = 0x3007 | SINGLE | HAN  # zero, which is no letter
    return table


def _with_signs(table: np.ndarray, dashes: str) -> np.ndarray:
    """The same with signs as tokens, and with numbers marked."""
    classes = char_classes()
    for point in np.flatnonzero(classes & SYMBOL).tolist():
        plain = unicodedata.normalize("NFKC", chr(point)).translate({0x2212: "-", 0xD7: "*", 0xF7: "/"})
        table[point] = SINGLE | (ord(plain) if len(plain) == 1 else point)
    for char in "+-*/=<>^%&|~#!$.":
        table[ord(char)] = SINGLE | SIGN | ord(char)
    for char in dashes:
        table[ord(char)] = SINGLE | SIGN | ord("-")
    table[(table != 0) & ((classes & (NUMERIC | DIGIT)) != 0)] |= np.uint32(NUMBER)
    return table


@cache
def split() -> np.ndarray:
    """The words of `str.split()`; what is neither letter nor digit belongs to the letter without spaces before it."""
    classes, table = char_classes(), _of_points(0, WORD)
    table[0x1361] = 0  # the Ethiopic space
    table[((classes & (LETTER | DIGIT)) == 0) & (table != 0) & ((table & SINGLE) == 0)] |= np.uint32(JOINS)
    return table


@cache
def letters_and_marks() -> np.ndarray:
    """Runs of letters and digits; every other character that is no space is a token of its own."""
    return _of_points(LETTER | DIGIT, SINGLE)


@cache
def signs_and_lower() -> np.ndarray:
    """Runs of ASCII letters and digits in lower case and of all that is beyond ASCII, but for East Asian punctuation; and signs."""
    table = _of_points(0, WORD)
    for point in range(0x80):
        table[point] = ord(chr(point).lower()) | WORD if chr(point).isalnum() else 0
    for first, last in ((0x3000, 0x303F), (0xFE30, 0xFE6F), (0xFF00, 0xFF65)):
        for point in range(first, last + 1):
            if unicodedata.category(chr(point))[0] in "PZ":
                table[point] = 0
    return _with_signs(table, "")


@cache
def lower_letters() -> np.ndarray:
    """Runs of letters, digits and other numbers, in lower case (the first character of it); and signs."""
    table = _of_points(LETTER | DIGIT | NUMERIC, 0)
    for point in np.nonzero(table[:0x20000] & WORD)[0].tolist():
        table[point] = table[point] & ~np.uint32(VALUE) | np.uint32(ord(chr(point).lower()[0]))
    return _with_signs(table, "\u2010\u2011\u2012\u2013")


@cache
def lower_letters_alone() -> np.ndarray:
    """The same words without signs, and without the combining marks that a word begins with, for they may belong to a sign.

    Equal words and signs give equal words here.
    """
    table = lower_letters().copy()
    table[((table & SINGLE) != 0) & ((table & (HAN | CLUSTER)) == 0)] = 0
    table[(table & JOINS) != 0] |= np.uint32(CLINGS)
    return table
