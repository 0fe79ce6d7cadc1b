"""Repetition in one document: unique lines and paragraphs, and the characters that repeated n-grams cover.

Equal is what has the same 64-bit hash. Shapes: W words, C n-grams that may be repeated, T places of the hash table.
"""

import numpy as np

from gristmill.curate.text.text_counts import IS_CLUSTER, IS_HAN, ONE, PRIME, SEED, compiled

TOP, DUPLICATE = (2, 3, 4), (2, 3, 4, 5, 6, 7, 8, 9, 10)  # lengths of n-grams
_FINAL, _SHIFT, _ZERO, _COUNT = np.uint64(0xD6E8FEB86659FD93), np.uint64(32), np.uint64(0), np.uint64(0xFFFFFFFF)


@compiled
def mixed(a, b):  # type: ignore[no-untyped-def]
    """One hash of two, in their order."""
    a = a * PRIME + b
    a = (a ^ (a >> _SHIFT)) * _FINAL
    return a ^ (a >> _SHIFT)


@compiled
def _put(table_T2, mask, epoch, key):  # type: ignore[no-untyped-def]
    """Count a key. Returns its place, and how often it has come.

    A place holds a key and, in one number, the epoch it is of and the count: with the next epoch the whole table is empty.
    """
    place = key & mask
    while table_T2[place, 1] >> _SHIFT == epoch:
        if table_T2[place, 0] == key:
            table_T2[place, 1] += ONE
            return place, table_T2[place, 1] & _COUNT
        place = (place + ONE) & mask
    table_T2[place, 0], table_T2[place, 1] = key, (epoch << _SHIFT) | ONE
    return place, ONE


@compiled
def table_mask(num):  # type: ignore[no-untyped-def]
    """Of a part of the table that num keys fill at most half."""
    size = 16
    while size < 2 * num:
        size *= 2
    return np.uint64(size - 1)


@compiled
def unique_lines(words, num, table_T2, epoch, at_C, key_C):  # type: ignore[no-untyped-def]
    """How many lines, how many different, characters of all, of the different. Leaves the first word and the hash of each."""
    total, unique, chars, unique_chars = 0, 0, 0, 0
    first, key, mask = 0, SEED, table_mask(num)
    for w in range(num):
        key = mixed(key, words.hash_W[w] ^ (words.gap_W[w] if w > first else _ZERO))
        if w + 1 < num and words.breaks_W[w + 1] == 0:
            continue
        size = words.at_W[w] + words.size_W[w] - words.at_W[first]
        _, times = _put(table_T2, mask, epoch, key)
        at_C[total], key_C[total] = first, key
        total, chars = total + 1, chars + size
        if times == ONE:
            unique, unique_chars = unique + 1, unique_chars + size
        first, key = w + 1, SEED
    return total, unique, chars, unique_chars


@compiled
def unique_paragraphs(words, num, num_lines, table_T2, epoch, at_C, key_C):  # type: ignore[no-untyped-def]
    """The same of paragraphs, from the lines."""
    total, unique, chars, unique_chars = 0, 0, 0, 0
    first, key, mask = 0, SEED, table_mask(num_lines)
    for c in range(num_lines):
        key = mixed(key, key_C[c])
        after = at_C[c + 1] if c + 1 < num_lines else num
        if after < num and words.breaks_W[after] == 1:
            key = mixed(key, words.gap_W[after])
            continue
        size = words.at_W[after - 1] + words.size_W[after - 1] - words.at_W[first]
        _, times = _put(table_T2, mask, epoch, key)
        total, chars = total + 1, chars + size
        if times == ONE:
            unique, unique_chars = unique + 1, unique_chars + size
        first, key = after, SEED
    return total, unique, chars, unique_chars


@compiled
def _is_apart(words, w):  # type: ignore[no-untyped-def]
    """Whether white space stands before a word that is not the first."""
    return words.begin_W[w] > words.stop_W[w - 1]


@compiled
def _covered_by_top(words, n, at_C, place_C, num, table_T2):  # type: ignore[no-untyped-def]
    """Characters in the most frequent run of n words."""
    best, top, size = ONE, _ZERO, 0
    for c in range(num):
        times = table_T2[place_C[c], 1] & _COUNT
        if times > best:
            at = at_C[c]
            best, top, size = times, place_C[c], words.size_W[at]
            for w in range(at + 1, at + n):
                size += words.size_W[w] + _is_apart(words, w)
    covered, free = 0, 0
    for c in range(num if best > ONE else 0):
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
        key = mixed(key, words.hash_W[w])
    return key


@compiled
def _step(words, num):  # type: ignore[no-untyped-def]
    """How many words of a document stand for one in n-grams."""
    han = clusters = 0
    for w in range(num):
        han += (words.kind_W[w] & IS_HAN) != 0
        clusters += (words.kind_W[w] & IS_CLUSTER) != 0
    return 3 if 2 * clusters > num else 2 if 2 * (han + clusters) > num else 1


@compiled
def cover_ngrams(words, num_words, table_T2, epoch, at_C, key_C, place_C, again_C, top_3, again_9):  # type: ignore[no-untyped-def]
    """Characters that `top_*` and `duplicate_*` speak of, by n. An n-gram is looked at only where both (n-1)-grams in it are repeated
    (where several letters stand for a word, the first of them)."""
    step = _step(words, num_words)
    num = max(num_words - 2 * step + 1, 0)
    for c in range(num):
        at_C[c], key_C[c] = c, mixed(_gram(words, c, step), _gram(words, c + step, step))
    for n in range(2, 11):
        mask = table_mask(num)
        for c in range(num):
            place_C[c], times = _put(table_T2, mask, epoch, key_C[c])
            again_C[c] = times > ONE
        if n <= 4:
            top_3[n - 2] = _covered_by_top(words, n * step, at_C, place_C, num, table_T2)
        again_9[n - 2] = _covered_by_duplicates(words, n * step, at_C, again_C, num)
        kept = 0
        for c in range(num):
            at = at_C[c]
            if at + (n + 1) * step > num_words or (table_T2[place_C[c], 1] & _COUNT) == ONE:
                continue
            if step == 1 and (c + 1 == num or at_C[c + 1] != at + 1 or (table_T2[place_C[c + 1], 1] & _COUNT) == ONE):
                continue
            at_C[kept], key_C[kept] = at, mixed(key_C[c], _gram(words, at + n * step, step))
            kept += 1
        num, epoch = kept, epoch + ONE
        if num == 0:
            break
    return epoch
