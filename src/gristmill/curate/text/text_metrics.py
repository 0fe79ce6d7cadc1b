"""Text metrics: counts and shares of characters, words, lines, paragraphs and n-grams of documents, in one pass.

The bytes are read once, into words; everything else is counted over the words. Units:

- character: a code point. Word: what `str.split()` gives, and of scripts without spaces (Chinese, Thai, ...) each letter, with the marks on
  it and what stands between it and the next. Letter: of Unicode's kind L. Digit: of kind Nd.
- line: of the pieces between newlines, one that is not blank, stripped at both ends.
- paragraph: lines with no blank one between, with what stands between them, stripped at both ends.
- n-gram: n words that follow each other; its characters are those of the words joined by one space where there is white space. In a
  text that is mainly without spaces, two letters (East Asian) or three (others) stand for a word.
- end of a sentence: . ! ? before white space, the marks of other scripts anywhere; of Thai and Lao, which have none, white space.
- upper and lower case of ASCII are the same, except to `common_words`.

Every metric has a value for every text. A share or mean of no words, lines, paragraphs or characters is 0, but the shares that rules
want high (`unique_*`, `words_with_letter`) are 1. The first rule that an empty text breaks is that for words, lines or sentences.
Fewer than n words repeat no n-gram: 0. One word, one line or one paragraph is unique: 1.

Sources: Gopher (2112.11446), C4 (1910.10683), FineWeb (2406.17557), StarCoder (2305.06161) for code.
Shapes: N documents, B bytes of all, W words of one, C n-grams of one that may be repeated, T places of the hash table.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import numba
import numpy as np

from gristmill.curate.text.text_column import CLOSER, DIGIT, LETTER, TERMINAL, TextColumn, char_classes, decode_utf8, read_only
from gristmill.curate.text.words import CLUSTER, FNV_OFFSET, HAN, first_entry, split, tokenize

TOP, DUPLICATE = (2, 3, 4), (2, 3, 4, 5, 6, 7, 8, 9, 10)  # lengths of n-grams

# What is counted, in the order in which `_counts` gives it.
COUNTS = (
    *("words", "characters", "others", "letters", "digits", "letters_and_digits", "white_space", "brackets"),
    *("newlines", "hashes", "curly_brackets", "ellipses"),
    *("word_characters", "longest_word", "urls", "lettered", "symbols", "common", "sentences"),
    *("lines", "unique_lines", "line_characters", "unique_line_characters"),
    *("parts", "unique_parts", "part_characters", "unique_part_characters"),
    *("longest_line", "bare_lines", "ellipsis_lines", "bullet_lines", "short_lines", "javascript_lines"),
    *("policies", "lorem_ipsum", "xml_header"),
    *(f"top_{n}" for n in TOP),
    *(f"duplicate_{n}" for n in DUPLICATE),
)
# Metric: the count, the count that it is divided by, and what it says.
_PARTS: dict[str, tuple[str, str, str]] = {
    "non_alphanumeric": ("others", "characters", "share of characters other than a-z A-Z 0-9 newline ? ! , . (a space counts)"),
    "symbol_words": ("symbols", "words", "share of words that are an ellipsis mark, or more than half hash signs"),
    "digits": ("digits", "characters", "share of characters that are digits"),
    "urls": ("urls", "characters", "share of characters from http://, https:// or www. to the end of the word"),
    "white_space": ("white_space", "characters", "share of characters that are tab, newline, carriage return, backspace or space"),
    "brackets": ("brackets", "characters", "share of characters that are ( ) [ ] { } or the angle brackets U+27E8 and U+27E9"),
    "policy_paragraphs": ("policies", "parts", "share of paragraphs on cookies, privacy or terms of use; 1 where lorem ipsum is anywhere"),
    "unique_lines": ("unique_lines", "lines", "different lines for each line"),
    "unique_paragraphs": ("unique_parts", "parts", "different paragraphs for each paragraph"),
    "unique_line_characters": ("unique_line_characters", "line_characters", "share of the lines' characters that are in different lines"),
    "unique_paragraph_characters": (
        "unique_part_characters",
        "part_characters",
        "share of the paragraphs' characters that are in different paragraphs",
    ),
    "words": ("words", "", "number of words"),
    "unpunctuated_lines": ("bare_lines", "lines", "share of lines that end in none of . ? ! \" ' or the like of other scripts"),
    "words_with_letter": ("lettered", "words", "share of words that have a letter"),
    "common_words": ("common", "", "how many words are one of: the, be, to, of, and, that, have, with"),
    "mean_word": (
        "word_characters",
        "words",
        "characters of a word, in the mean; a letter of scripts without spaces counts as a word of 5",
    ),
    "longest_word": ("longest_word", "", "characters of the longest word"),
    "ellipsis_lines": ("ellipsis_lines", "lines", "share of lines that end in an ellipsis, or in 'read more'"),
    # the first of equals, twice or more, from the left, none over another
    **{f"top_{n}gram": (f"top_{n}", "characters", f"share of characters in the most frequent run of {n} words") for n in TOP},
    **{
        f"duplicate_{n}gram": (f"duplicate_{n}", "characters", f"share of characters in runs of {n} words that stood before, each once")
        for n in DUPLICATE
    },
    "bullet_lines": ("bullet_lines", "lines", "share of lines that start with a bullet"),
    "lines": ("lines", "", "number of lines"),
    "sentences": ("sentences", "", "number of ends of sentences"),
    "hashes_per_word": ("hashes", "words", "hash signs for each word"),
    "ellipses_per_word": ("ellipses", "words", "ellipses (three dots, or U+2026) for each word"),
    "lorem_ipsum": ("lorem_ipsum", "", "1 where lorem ipsum is anywhere, or 0"),
    "javascript_lines": ("javascript_lines", "lines", "share of lines that name JavaScript"),
    "curly_brackets": ("curly_brackets", "", "number of {"),
    "short_lines": ("short_lines", "lines", "share of lines of at most 30 characters"),
    "newlines_per_word": ("newlines", "words", "newlines for each word"),
    "letters": ("letters", "characters", "share of characters that are letters"),
    "letters_and_digits": ("letters_and_digits", "characters", "share of characters that are letters or digits"),
    "xml_header": ("xml_header", "", "1 where an XML header is within the first 100 characters, or 0"),
    "mean_line": ("line_characters", "lines", "characters of a line, in the mean"),
    "longest_line": ("longest_line", "", "characters of the longest line"),
}
DESCRIPTIONS = {name: says for name, (_, _, says) in _PARTS.items()}
METRICS = tuple(_PARTS)
NGRAMS = frozenset([*(f"top_{n}gram" for n in TOP), *(f"duplicate_{n}gram" for n in DUPLICATE)])  # metrics that take time of their own


# ---- what is looked for, as arrays that numba reads ----


def _rows(*patterns: str) -> np.ndarray:
    """uint8 [patterns, length of the longest]: each in UTF-8, zeros after it."""
    return np.array([list(p.encode()) + [0] * (max(len(q.encode()) for q in patterns) - len(p.encode())) for p in patterns], np.uint8)


def _bits(*members: str) -> np.ndarray:
    """uint16 [256]: bit k is set for the characters of the k-th string."""
    return np.array([sum(1 << k for k, those in enumerate(members) if byte < 128 and chr(byte) in those) for byte in range(256)], np.uint16)


_LOWER, _DIGITS = "abcdefghijklmnopqrstuvwxyz", "0123456789"
_LETTERS = _LOWER + _LOWER.upper()
_BLANK, _WIDE, _LETTER, _J, _K, _M, _V, _W, _DOT, _SLASH, _HASH, _HAN, _CLUSTER = (1 << k for k in range(13))
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
# Of each metric: its count, the count that it is divided by (-1: none), and what it is where that is 0.
PART = np.array([COUNTS.index(part) for part, _, _ in _PARTS.values()])
WHOLE = np.array([COUNTS.index(whole) if whole else -1 for _, whole, _ in _PARTS.values()])
OF_NOTHING = np.array([float(name.startswith("unique") or name == "words_with_letter") for name in METRICS])
ELLIPSES_SIZE = np.count_nonzero(ELLIPSES, axis=1)
TERMS, COOKIE, PRIVACY, LOREM = _rows("terms of use"), _rows("cookie"), _rows("privacy"), _rows("lorem ipsum")
JAVASCRIPT, XML = _rows("javascript"), _rows("<?xml version=")
# as numbers: a byte 1, then those of the word
COMMON = np.array([int.from_bytes(b"\1" + w) for w in (b"the", b"be", b"to", b"of", b"and", b"that", b"have", b"with")], np.uint64)
BULLETS = np.array([0x2022, 0x2023, 0x2043, 0x204C, 0x204D, 0x2219, 0x25CB, 0x25CF, 0x25D8, 0x25E6, 0x29BE, 0x29BF])

_PRIME, _FINAL, _SEED = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93), np.uint64(0xCBF29CE484222325)
_SHIFT, _ONE, _ZERO = np.uint64(32), np.uint64(1), np.uint64(0)
_COUNT = np.uint64(0xFFFFFFFF)

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
def _mixed(a, b):  # type: ignore[no-untyped-def]
    """One hash of two, in their order."""
    a = a * _PRIME + b
    a = (a ^ (a >> _SHIFT)) * _FINAL
    return a ^ (a >> _SHIFT)


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
def _read(data_B, begin, end, table, classes, words, count_256):  # type: ignore[no-untyped-def]
    """Cut a document into words, and count its bytes.

    Returns: words, characters; and of those beyond ASCII letters, digits, angle brackets, ellipses and ends of sentences.
    """
    num = tokenize(data_B, begin, end, table, FNV_OFFSET, words.hash_W, words.begin_W, words.stop_W)
    extra, letters, digits, brackets, ellipses, sentences = 0, 0, 0, 0, 0, 0
    i = begin
    for w in range(num + 1):
        start, stop = (words.begin_W[w], words.stop_W[w]) if w < num else (end, end)
        gap, breaks = _SEED, 0
        while i < start:
            byte = data_B[i]
            count_256[byte] += 1
            breaks += byte == 10
            gap = (gap ^ np.uint64(byte)) * _PRIME
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
            kinds |= np.uint16(_HAN if entry & HAN else _CLUSTER if entry & CLUSTER else 0)
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
def _of_ascii(count_256):  # type: ignore[no-untyped-def]
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
    word, found = _ONE, False
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
def _of_words(data_B, words, num):  # type: ignore[no-untyped-def]
    """Characters of all, of the longest and of URLs; how many have a letter, are symbols, are common, end a sentence. And "..." in them."""
    total, longest, urls, lettered, symbols, common, sentences, ellipses = 0, 0, 0, 0, 0, 0, 0, 0
    for w in range(num):
        begin, stop, kind, size = words.begin_W[w], words.stop_W[w], words.kind_W[w], words.size_W[w]
        total += MEAN_WORD if kind & (_HAN | _CLUSTER) else size
        longest = max(longest, size)
        if kind & _CLUSTER and (w + 1 == num or words.begin_W[w + 1] > stop):
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
def _of_lines(data_B, words, num, classes):  # type: ignore[no-untyped-def]
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
def _boilerplate(data_B, begin, end, words, num):  # type: ignore[no-untyped-def]
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
def _put(table_T2, mask, epoch, key):  # type: ignore[no-untyped-def]
    """Count a key. Returns its place, and how often it has come.

    A place holds a key and, in one number, the epoch it is of and the count: with the next epoch the whole table is empty.
    """
    place = key & mask
    while table_T2[place, 1] >> _SHIFT == epoch:
        if table_T2[place, 0] == key:
            table_T2[place, 1] += _ONE
            return place, table_T2[place, 1] & _COUNT
        place = (place + _ONE) & mask
    table_T2[place, 0], table_T2[place, 1] = key, (epoch << _SHIFT) | _ONE
    return place, _ONE


@compiled
def _mask(num):  # type: ignore[no-untyped-def]
    """Of a part of the table that num keys fill at most half."""
    size = 16
    while size < 2 * num:
        size *= 2
    return np.uint64(size - 1)


@compiled
def _lines(words, num, table_T2, epoch, at_C, key_C):  # type: ignore[no-untyped-def]
    """How many lines, how many different, characters of all, of the different. Leaves the first word and the hash of each."""
    total, unique, chars, unique_chars = 0, 0, 0, 0
    first, key, mask = 0, _SEED, _mask(num)
    for w in range(num):
        key = _mixed(key, words.hash_W[w] ^ (words.gap_W[w] if w > first else _ZERO))
        if w + 1 < num and words.breaks_W[w + 1] == 0:
            continue
        size = words.at_W[w] + words.size_W[w] - words.at_W[first]
        _, times = _put(table_T2, mask, epoch, key)
        at_C[total], key_C[total] = first, key
        total, chars = total + 1, chars + size
        if times == _ONE:
            unique, unique_chars = unique + 1, unique_chars + size
        first, key = w + 1, _SEED
    return total, unique, chars, unique_chars


@compiled
def _paragraphs(words, num, num_lines, table_T2, epoch, at_C, key_C):  # type: ignore[no-untyped-def]
    """The same of paragraphs, from the lines."""
    total, unique, chars, unique_chars = 0, 0, 0, 0
    first, key, mask = 0, _SEED, _mask(num_lines)
    for c in range(num_lines):
        key = _mixed(key, key_C[c])
        after = at_C[c + 1] if c + 1 < num_lines else num
        if after < num and words.breaks_W[after] == 1:
            key = _mixed(key, words.gap_W[after])
            continue
        size = words.at_W[after - 1] + words.size_W[after - 1] - words.at_W[first]
        _, times = _put(table_T2, mask, epoch, key)
        total, chars = total + 1, chars + size
        if times == _ONE:
            unique, unique_chars = unique + 1, unique_chars + size
        first, key = after, _SEED
    return total, unique, chars, unique_chars


@compiled
def _is_apart(words, w):  # type: ignore[no-untyped-def]
    """Whether white space stands before a word that is not the first."""
    return words.begin_W[w] > words.stop_W[w - 1]


@compiled
def _covered_by_top(words, n, at_C, place_C, num, table_T2):  # type: ignore[no-untyped-def]
    """Characters in the most frequent run of n words."""
    best, top, size = _ONE, _ZERO, 0
    for c in range(num):
        times = table_T2[place_C[c], 1] & _COUNT
        if times > best:
            at = at_C[c]
            best, top, size = times, place_C[c], words.size_W[at]
            for w in range(at + 1, at + n):
                size += words.size_W[w] + _is_apart(words, w)
    covered, free = 0, 0
    for c in range(num if best > _ONE else 0):
        if place_C[c] == top and at_C[c] >= free:
            covered, free = covered + size, at_C[c] + n
    return covered


@compiled
def _covered_by_duplicates(words, n, at_C, again_C, num):  # type: ignore[no-untyped-def]
    """Characters in runs of n words that stood before."""
    covered, free = 0, 0
    for c in range(num):
        if again_C[c]:
            at = at_C[c]
            for w in range(max(at, free), at + n):
                covered += words.size_W[w] + (w > at and _is_apart(words, w))
            free = at + n
    return covered


@compiled
def _gram(words, at, step):  # type: ignore[no-untyped-def]
    """Hash of the letters that stand for one word."""
    key = words.hash_W[at]
    for w in range(at + 1, at + step):
        key = _mixed(key, words.hash_W[w])
    return key


@compiled
def _step(words, num):  # type: ignore[no-untyped-def]
    """How many words of a document stand for one in n-grams."""
    han = clusters = 0
    for w in range(num):
        han += (words.kind_W[w] & _HAN) != 0
        clusters += (words.kind_W[w] & _CLUSTER) != 0
    return 3 if 2 * clusters > num else 2 if 2 * (han + clusters) > num else 1


@compiled
def _ngrams(words, num_words, table_T2, epoch, at_C, key_C, place_C, again_C, top_3, again_9):  # type: ignore[no-untyped-def]
    """Characters that `top_*` and `duplicate_*` speak of, by n. An n-gram is looked at only where both (n-1)-grams in it are repeated
    (where several letters stand for a word, the first of them)."""
    step = _step(words, num_words)
    num = max(num_words - 2 * step + 1, 0)
    for c in range(num):
        at_C[c], key_C[c] = c, _mixed(_gram(words, c, step), _gram(words, c + step, step))
    for n in range(2, 11):
        mask = _mask(num)
        for c in range(num):
            place_C[c], times = _put(table_T2, mask, epoch, key_C[c])
            again_C[c] = times > _ONE
        if n <= 4:
            top_3[n - 2] = _covered_by_top(words, n * step, at_C, place_C, num, table_T2)
        again_9[n - 2] = _covered_by_duplicates(words, n * step, at_C, again_C, num)
        kept = 0
        for c in range(num):
            at = at_C[c]
            if at + (n + 1) * step > num_words or (table_T2[place_C[c], 1] & _COUNT) == _ONE:
                continue
            if step == 1 and (c + 1 == num or at_C[c + 1] != at + 1 or (table_T2[place_C[c + 1], 1] & _COUNT) == _ONE):
                continue
            at_C[kept], key_C[kept] = at, _mixed(key_C[c], _gram(words, at + n * step, step))
            kept += 1
        num, epoch = kept, epoch + _ONE
        if num == 0:
            break
    return epoch


@compiled
def _has_xml_header(data_B, begin, end):  # type: ignore[no-untyped-def]
    """Within the first 100 characters."""
    stop, left = begin, 101
    while stop < end:
        left -= (data_B[stop] & 0xC0) != 0x80
        if left == 0:
            break
        stop += 1
    return _find(data_B, begin, stop, XML) >= 0


@compiled
def _counts(data_B, begin, end, table, classes, words, count_256, table_T2, epoch, at_C, key_C, counts_K):  # type: ignore[no-untyped-def]
    """Write the counts of one document, but for those of n-grams. Returns its words."""
    count_256[:] = 0
    num, characters, letters, digits, brackets, ellipses, sentences = _read(data_B, begin, end, table, classes, words, count_256)
    alphanumeric, ascii_letters, ascii_digits, white_space, ascii_brackets = _of_ascii(count_256)
    letters, digits = letters + ascii_letters, digits + ascii_digits
    of_words, dots = _of_words(data_B, words, num)
    lines = _lines(words, num, table_T2, epoch, at_C, key_C)
    paragraphs = _paragraphs(words, num, lines[0], table_T2, epoch + _ONE, at_C, key_C)
    policies, lorem = _boilerplate(data_B, begin, end, words, num)
    counts = (
        (num, characters, characters - alphanumeric, letters, digits, letters + digits, white_space, brackets + ascii_brackets)
        + (count_256[10], count_256[35], count_256[123], ellipses + dots)  # newline, hash sign, curly bracket
        + of_words[:-1]
        + (of_words[-1] + sentences,)
        + lines
        + paragraphs
        + _of_lines(data_B, words, num, classes)
        + (paragraphs[0] if lorem else policies, np.int64(lorem), np.int64(count_256[60] > 0 and _has_xml_header(data_B, begin, end)))
    )
    for k in range(len(counts)):
        counts_K[k] = counts[k]
    return num


@compiled
def _divide(counts_K, metrics_F):  # type: ignore[no-untyped-def]
    for f in range(len(PART)):
        whole = counts_K[WHOLE[f]] if WHOLE[f] >= 0 else 1
        metrics_F[f] = counts_K[PART[f]] / whole if whole > 0 else OF_NOTHING[f]


@compiled
def _max_words(data_B, begin_N):  # type: ignore[no-untyped-def]
    """No document has more words: what may be white space, and one; letters of scripts without spaces, and what stands before them."""
    words = 0
    for d in range(len(begin_N) - 1):
        num = 1
        for byte in data_B[begin_N[d] : begin_N[d + 1]]:
            num += (byte <= 32 or byte == 0xC2) + 2 * (byte >= 0xE0)
        words = max(words, num)
    return words


@compiled
def _count_all(data_B, begin_N, table, classes, words, limits_F2, at_C, key_C, place_C, again_C, metrics_NF):  # type: ignore[no-untyped-def]
    table_T2, epoch = np.zeros((np.int64(_mask(len(at_C))) + 1, 2), np.uint64), _ONE
    count_256 = np.empty(256, np.int64)
    counts_K = np.empty(len(COUNTS), np.int64)
    top_3, again_9 = counts_K[-len(TOP) - len(DUPLICATE) : -len(DUPLICATE)], counts_K[-len(DUPLICATE) :]
    for d in range(len(begin_N) - 1):
        counts_K[:] = 0
        num = _counts(data_B, begin_N[d], begin_N[d + 1], table, classes, words, count_256, table_T2, epoch, at_C, key_C, counts_K)
        epoch += _ONE + _ONE
        _divide(counts_K, metrics_NF[d])
        within = True
        for f in range(len(limits_F2)):
            within = within and limits_F2[f, 0] <= metrics_NF[d, f] <= limits_F2[f, 1]
        if within:
            epoch = _ngrams(words, num, table_T2, epoch, at_C, key_C, place_C, again_C, top_3, again_9)
            _divide(counts_K, metrics_NF[d])


def compute(texts: TextColumn, within: Mapping[str, tuple[float, float]] | None = MappingProxyType({})) -> np.ndarray:
    """float64 [N, METRICS] of the texts, which must be valid UTF-8.

    Args:
        within: min and max of other metrics. Beyond them a document's n-grams are not looked at, and NGRAMS are 0; with None,
            everywhere.
    """
    data_B, begin_N = read_only(texts.data_B), read_only(texts.begin_N)
    room = _max_words(data_B, begin_N)
    words = Words(*(np.empty(room, kind) for kind in ("u8", "u8", "i4", "i8", "i8", "i8", "i8", "u2")))
    at_C, key_C, place_C, again_C = (np.empty(room, kind) for kind in ("i8", "u8", "u8", "?"))
    limits_F2 = np.array([(1, 0) if within is None else within.get(name, (-np.inf, np.inf)) for name in METRICS], np.float64)
    metrics_NF = np.empty((len(texts), len(METRICS)))
    _count_all(data_B, begin_N, split(), char_classes(), words, limits_F2, at_C, key_C, place_C, again_C, metrics_NF)
    return metrics_NF
