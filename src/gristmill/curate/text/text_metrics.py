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

import numpy as np

from gristmill.curate.text.repetition import DUPLICATE, TOP, cover_ngrams, table_mask, unique_lines, unique_paragraphs
from gristmill.curate.text.text_column import TextColumn, char_classes, read_only
from gristmill.curate.text.text_counts import (
    ONE,
    Words,
    compiled,
    count_ascii,
    count_boilerplate,
    count_lines,
    count_words,
    has_xml_header,
    read_words,
)
from gristmill.curate.text.words import split

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
# Of each metric: its count, the count that it is divided by (-1: none), and what it is where that is 0.
PART = np.array([COUNTS.index(part) for part, _, _ in _PARTS.values()])
WHOLE = np.array([COUNTS.index(whole) if whole else -1 for _, whole, _ in _PARTS.values()])
OF_NOTHING = np.array([float(name.startswith("unique") or name == "words_with_letter") for name in METRICS])


@compiled
def _counts(data_B, begin, end, table, classes, words, count_256, table_T2, epoch, at_C, key_C, counts_K):  # type: ignore[no-untyped-def]
    """Write the counts of one document, but for those of n-grams. Returns its words."""
    count_256[:] = 0
    num, characters, letters, digits, brackets, ellipses, sentences = read_words(data_B, begin, end, table, classes, words, count_256)
    alphanumeric, ascii_letters, ascii_digits, white_space, ascii_brackets = count_ascii(count_256)
    letters, digits = letters + ascii_letters, digits + ascii_digits
    of_words, dots = count_words(data_B, words, num)
    lines = unique_lines(words, num, table_T2, epoch, at_C, key_C)
    paragraphs = unique_paragraphs(words, num, lines[0], table_T2, epoch + ONE, at_C, key_C)
    policies, lorem = count_boilerplate(data_B, begin, end, words, num)
    counts = (
        (num, characters, characters - alphanumeric, letters, digits, letters + digits, white_space, brackets + ascii_brackets)
        + (count_256[10], count_256[35], count_256[123], ellipses + dots)  # newline, hash sign, curly bracket
        + of_words[:-1]
        + (of_words[-1] + sentences,)
        + lines
        + paragraphs
        + count_lines(data_B, words, num, classes)
        + (paragraphs[0] if lorem else policies, np.int64(lorem), np.int64(count_256[60] > 0 and has_xml_header(data_B, begin, end)))
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
    table_T2, epoch = np.zeros((np.int64(table_mask(len(at_C))) + 1, 2), np.uint64), ONE
    count_256 = np.empty(256, np.int64)
    counts_K = np.empty(len(COUNTS), np.int64)
    top_3, again_9 = counts_K[-len(TOP) - len(DUPLICATE) : -len(DUPLICATE)], counts_K[-len(DUPLICATE) :]
    for d in range(len(begin_N) - 1):
        counts_K[:] = 0
        num = _counts(data_B, begin_N[d], begin_N[d + 1], table, classes, words, count_256, table_T2, epoch, at_C, key_C, counts_K)
        epoch += ONE + ONE
        _divide(counts_K, metrics_NF[d])
        within = True
        for f in range(len(limits_F2)):
            within = within and limits_F2[f, 0] <= metrics_NF[d, f] <= limits_F2[f, 1]
        if within:
            epoch = cover_ngrams(words, num, table_T2, epoch, at_C, key_C, place_C, again_C, top_3, again_9)
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
