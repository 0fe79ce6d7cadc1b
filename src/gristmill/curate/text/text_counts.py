"""Counts of the characters, words and lines of one document: its bytes are read once, into words, and the rest is counted over those.

What each count is of stands in text_metrics.py. Shapes: B bytes of all documents, W words of one.
"""

from typing import NamedTuple

import numba
import numpy as np

from gristmill.curate.text.text_column import CLOSER, DIGIT, LETTER, TERMINAL, decode_utf8
from gristmill.curate.text.words import CLUSTER, FNV_OFFSET, HAN, first_entry, tokenize

# ---- what is looked for, as arrays that numba reads ----


def _rows(*patterns: str) -> np.ndarray:
    """uint8 [patterns, length of the longest]: each in UTF-8, zeros after it."""
    return np.array([list(p.encode()) + [0] * (max(len(q.encode()) for q in patterns) - len(p.encode())) for p in patterns], np.uint8)


def _bits(*members: str) -> np.ndarray:
    """uint16 [256]: bit k is set for the characters of the k-th string."""
    return np.array([sum(1 << k for k, those in enumerate(members) if byte < 128 and chr(byte) in those) for byte in range(256)], np.uint16)


_LOWER, _DIGITS = "abcdefghijklmnopqrstuvwxyz", "0123456789"
_LETTERS = _LOWER + _LOWER.upper()
_BLANK, _WIDE, _LETTER, _J, _K, _M, _V, _W, _DOT, _SLASH, _HASH, IS_HAN, IS_CLUSTER = (1 << k for k in range(13))
MEAN_WORD = 5  # characters that a letter of a script without spaces counts for
# What a word is made of is known from these bits of its bytes; the rest is only looked at in words that may have it.
KIND = _bits("".join(map(chr, (9, 10, 11, 12, 13, 28, 29, 30, 31, 32))), "", _LETTERS, "jJ", "kK", "mM", "vV", "wW", ".", "/", "#")
KIND[128:] = _WIDE
COUNTED = _bits(_LETTERS + _DIGITS + "\n?!,.", _LETTERS, _DIGITS, "\t\n\r\b ", "()[]{}")
END_MARK = _bits(".?!\"'", ".?!")

POLICY = _rows(
    *("privacy policy", "cookie policy", "privacy overview"),
    *("uses cookies", "use of cookies", "use cookies", "privacy cookies policy", "privacy & cookies policy", "privacy and cookies policy"),
)
ELLIPSES = _rows("...", "\u2026", "[...]", "(...)", "[\u2026]", "-\u00bb", "read more", "read more..")
URLS = _rows("http://", "https://", "www.")
ELLIPSES_SIZE = np.count_nonzero(ELLIPSES, axis=1)
TERMS, COOKIE, PRIVACY, LOREM = _rows("terms of use"), _rows("cookie"), _rows("privacy"), _rows("lorem ipsum")
JAVASCRIPT, XML = _rows("javascript"), _rows("<?xml version=")
# as numbers: a byte 1, then those of the word
COMMON = np.array([int.from_bytes(b"\1" + w) for w in (b"the", b"be", b"to", b"of", b"and", b"that", b"have", b"with")], np.uint64)
BULLETS = np.array([0x2022, 0x2023, 0x2043, 0x204C, 0x204D, 0x2219, 0x25CB, 0x25CF, 0x25D8, 0x25E6, 0x29BE, 0x29BF])

PRIME, SEED, ONE = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xCBF29CE484222325), np.uint64(1)

compiled = numba.njit(cache=True, nogil=True)  # every function is its own small piece; LLVM inlines them


class Words(NamedTuple):
    """The words of a document, and room for those of the longest one."""

    hash_W: np.ndarray  # uint64
    gap_W: np.ndarray  # uint64, hash of the white space before it
    breaks_W: np.ndarray  # int32, newlines in that
    begin_W: np.ndarray  # int64, its first byte, and
    stop_W: np.ndarray  # int64, the one after its last
    at_W: np.ndarray  # int64, characters before it
    size_W: np.ndarray  # int64, characters of it
    kind_W: np.ndarray  # uint16, KIND of all its bytes; of what script without spaces it is


@compiled
def _matches(data_B, i, end, patterns, k):  # type: ignore[no-untyped-def]
    """Bytes of the k-th pattern, where it stands at i and ends by `end`; or 0."""
    length = 0
    while length < patterns.shape[1] and patterns[k, length]:
        if i + length >= end:
            return 0
        byte, wanted = data_B[i + length], patterns[k, length]
        if byte != wanted and not (65 <= byte <= 90 and byte + 32 == wanted):
            return 0
        length += 1
    return length


@compiled
def _find(data_B, begin, end, patterns):  # type: ignore[no-untyped-def]
    """Where the first of the patterns starts; -1 if nowhere."""
    for i in range(begin, end):
        for k in range(len(patterns)):
            if data_B[i] | 32 == patterns[k, 0] | 32 and _matches(data_B, i, end, patterns, k):
                return i
    return -1


@compiled
def _is_ellipsis(data_B, begin, end, whole):  # type: ignore[no-untyped-def]
    """Whether the text is one of ELLIPSES, or only ends in it."""
    last, found = data_B[end - 1], False
    for k in range(len(ELLIPSES)):
        length = ELLIPSES_SIZE[k]
        start = end - length
        if last | 32 == ELLIPSES[k, length - 1] | 32 and (start == begin or start > begin and not whole):
            found = found or _matches(data_B, start, end, ELLIPSES, k) > 0
    return found


@compiled
def read_words(data_B, begin, end, table, classes, words, count_256):  # type: ignore[no-untyped-def]
    """Cut a document into words, and count its bytes.

    Returns: words, characters; and of those beyond ASCII letters, digits, angle brackets, ellipses and ends of sentences.
    """
    num = tokenize(data_B, begin, end, table, FNV_OFFSET, words.hash_W, words.begin_W, words.stop_W)
    extra, letters, digits, brackets, ellipses, sentences = 0, 0, 0, 0, 0, 0
    i = begin
    for w in range(num + 1):
        start, stop = (words.begin_W[w], words.stop_W[w]) if w < num else (end, end)
        gap, breaks = SEED, 0
        while i < start:
            byte = data_B[i]
            count_256[byte] += 1
            breaks += byte == 10
            gap = (gap ^ np.uint64(byte)) * PRIME
            extra += (byte & 0xC0) == 0x80
            i += 1
        if w == num:
            break
        before, kinds = extra, np.uint16(0)
        for i in range(start, stop):
            byte = data_B[i]
            count_256[byte] += 1
            kinds |= KIND[byte]
        if kinds & _WIDE:
            entry = first_entry(data_B, start, table)
            kinds |= np.uint16(IS_HAN if entry & HAN else IS_CLUSTER if entry & CLUSTER else 0)
        i, ends = start, False
        while kinds & _WIDE and i < stop:
            point, size = np.int64(data_B[i]), 1
            if point < 0x80:
                ends = False
            else:
                point, size = decode_utf8(data_B, i)
                members = classes[point]
                if members & LETTER:
                    letters += 1
                    kinds |= np.uint16(_LETTER)
                digits += (members & DIGIT) != 0
                sentences += (members & TERMINAL) != 0 and not ends
                ends = (members & TERMINAL) != 0
                brackets += point == 0x27E8 or point == 0x27E9
                ellipses += point == 0x2026
                extra += size - 1
            i += size
        i = stop
        words.gap_W[w], words.breaks_W[w], words.kind_W[w] = gap, breaks, kinds
        words.at_W[w], words.size_W[w] = start - begin - before, stop - start - (extra - before)
    return num, end - begin - extra, letters, digits, brackets, ellipses, sentences


@compiled
def count_ascii(count_256):  # type: ignore[no-untyped-def]
    """Of the ASCII bytes: alphanumeric, letters, digits, white space, brackets."""
    alphanumeric, letters, digits, white, brackets = 0, 0, 0, 0, 0
    for byte in range(128):
        count, bits = count_256[byte], np.int64(COUNTED[byte])
        alphanumeric += count * (bits & 1)
        letters += count * (bits >> 1 & 1)
        digits += count * (bits >> 2 & 1)
        white += count * (bits >> 3 & 1)
        brackets += count * (bits >> 4)
    return alphanumeric, letters, digits, white, brackets


@compiled
def _is_common(data_B, begin, stop):  # type: ignore[no-untyped-def]
    """Whether a word of two to four bytes is one of COMMON."""
    word, found = ONE, False
    for i in range(begin, stop):
        word = word << np.uint64(8) | data_B[i]
    for common in COMMON:
        found = found or word == common
    return found


@compiled
def _count(data_B, begin, stop, byte, length):  # type: ignore[no-untyped-def]
    """How often a byte stands `length` times in a row, none counted twice."""
    found, row = 0, 0
    for i in range(begin, stop):
        row = row + 1 if data_B[i] == byte else 0
        if row == length:
            found, row = found + 1, 0
    return found


@compiled
def _is_thai_or_lao(data_B, i):  # type: ignore[no-untyped-def]
    """Whether the three bytes at i are a character of U+0E00 to U+0EFF."""
    return data_B[i] == 0xE0 and data_B[i + 1] >= 0xB8 and data_B[i + 1] <= 0xBB


@compiled
def _has_end_mark(data_B, begin, stop, classes):  # type: ignore[no-untyped-def]
    """Whether a line ends as a sentence does, but for brackets and quotes beyond ASCII; in Thai and Lao every line does."""
    while stop > begin:
        if data_B[stop - 1] < 0x80:
            return END_MARK[data_B[stop - 1]] & 1 != 0
        start = stop - 1
        while start > begin and data_B[start] & 0xC0 == 0x80:
            start -= 1
        point, _ = decode_utf8(data_B, start)
        if not classes[point] & CLOSER:
            return classes[point] & TERMINAL != 0 or 0xE00 <= point <= 0xEFF
        stop = start
    return False


@compiled
def count_words(data_B, words, num):  # type: ignore[no-untyped-def]
    """Characters of all, of the longest and of URLs; how many have a letter, are symbols, are common, end a sentence. And "..." in them."""
    total, longest, urls, lettered, symbols, common, sentences, ellipses = 0, 0, 0, 0, 0, 0, 0, 0
    for w in range(num):
        begin, stop, kind, size = words.begin_W[w], words.stop_W[w], words.kind_W[w], words.size_W[w]
        total += MEAN_WORD if kind & (IS_HAN | IS_CLUSTER) else size
        longest = max(longest, size)
        if kind & IS_CLUSTER and (w + 1 == num or words.begin_W[w + 1] > stop):
            sentences += _is_thai_or_lao(data_B, stop - 3)
        lettered += (kind & _LETTER) != 0
        sentences += END_MARK[data_B[stop - 1]] >> 1
        if 2 <= stop - begin <= 4:
            common += _is_common(data_B, begin, stop)
        if kind & _SLASH or kind & (_W | _DOT) == _W | _DOT:
            start = _find(data_B, begin, stop, URLS)
            if start >= 0:
                for i in range(start, stop):
                    urls += (data_B[i] & 0xC0) != 0x80
        if kind & _HASH:
            symbols += 2 * _count(data_B, begin, stop, 35, 1) > size
        elif not kind & _LETTER and kind & (_DOT | _WIDE) and stop - begin <= 5:
            symbols += _is_ellipsis(data_B, begin, stop, True)
        if kind & _DOT and stop - begin >= 3:
            ellipses += _count(data_B, begin, stop, 46, 3)
    return (total, longest, urls, lettered, symbols, common, sentences), ellipses


@compiled
def count_lines(data_B, words, num, classes):  # type: ignore[no-untyped-def]
    """Characters of the longest; how many have no end mark, end in an ellipsis, start with a bullet, are short, name JavaScript."""
    longest, bare, ellipses, bullets, short, scripts = 0, 0, 0, 0, 0, 0
    first, script = 0, False
    for w in range(num):
        script = script or (words.kind_W[w] & _J and _find(data_B, words.begin_W[w], words.stop_W[w], JAVASCRIPT) >= 0)
        if w + 1 < num and words.breaks_W[w + 1] == 0:
            continue
        begin, stop, size = words.begin_W[first], words.stop_W[w], words.at_W[w] + words.size_W[w] - words.at_W[first]
        longest = max(longest, size)
        bare += not _has_end_mark(data_B, begin, stop, classes)
        ellipses += _is_ellipsis(data_B, begin, stop, False)
        if data_B[begin] == 0xE2:  # every bullet starts with this byte
            point, _ = decode_utf8(data_B, begin)
            for bullet in BULLETS:
                bullets += point == bullet
        short += size <= 30
        scripts += script
        first, script = w + 1, False
    return longest, bare, ellipses, bullets, short, scripts


@compiled
def _is_policy(data_B, begin, end, start, stop, kind):  # type: ignore[no-untyped-def]
    """Whether one of POLICY stands over the word from start to stop, or TERMS begins in it, in the text from begin to end."""
    if kind & _M and stop - 5 >= begin and _matches(data_B, stop - 5, end, TERMS, 0):
        return True
    if not (kind & _K and _find(data_B, start, stop, COOKIE) >= 0 or kind & _V and _find(data_B, start, stop, PRIVACY) >= 0):
        return False  # all others have one of these words
    for i in range(max(begin, start - POLICY.shape[1]), stop):
        for k in range(len(POLICY)):
            if i + _matches(data_B, i, end, POLICY, k) > max(i, start):
                return True
    return False


@compiled
def count_boilerplate(data_B, begin, end, words, num):  # type: ignore[no-untyped-def]
    """Paragraphs with a policy string; whether lorem ipsum is anywhere."""
    policies, found, lorem = 0, False, False
    for w in range(num):
        if words.breaks_W[w] > 1:
            found = False
        kind = words.kind_W[w]
        if not kind & (_K | _M | _V):
            continue
        start, stop = words.begin_W[w], words.stop_W[w]
        if not found and _is_policy(data_B, begin, end, start, stop, kind):
            policies, found = policies + 1, True
        if kind & _M and stop - 5 >= begin and not lorem:
            lorem = _matches(data_B, stop - 5, end, LOREM, 0) > 0
    return policies, lorem


@compiled
def has_xml_header(data_B, begin, end):  # type: ignore[no-untyped-def]
    """Within the first 100 characters."""
    stop, left = begin, 101
    while stop < end:
        left -= (data_B[stop] & 0xC0) != 0x80
        if left == 0:
            break
        stop += 1
    return _find(data_B, begin, stop, XML) >= 0
