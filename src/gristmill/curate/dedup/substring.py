"""Exact-substring deduplication across all shards: a span of text that recurs is cut out of all but its first occurrence.

A token is a maximal run of letters and digits, or one other character that is no space; a window is n tokens that follow each other in one
document; windows are the same if their tokens are, whatever the white space between them. The first occurrence of a window is the one of
the smallest (document number, position).

The rule: a token goes if a window over it occurred before, unless the first occurrence of a window that recurs lies over it too; runs of
fewer than n such tokens stay. Hence
- every window that occurred twice or more still stands where it occurred first, and what is cut stood elsewhere before;
- a window that recurs may stay a second time only where it overlaps the first occurrence of another one that recurs;
- the result is a function of the corpus alone, not of its division into shards and parts.
(A document that `min_left` drops takes its first occurrences with it.)

Windows are as many as tokens, too many to exchange. So each window has an anchor: of the k-grams in it (k = n / 2) the one of the least
hash, the first of equals, as in winnowing (Schleimer, Wilkerson and Aiken 2003). The same windows have the same anchor, and there are about
4 anchors to n tokens. Only windows whose anchor recurs are looked at again:

    keys of each shard -> repeats of each part -> windows of each shard -> matches of each part -> cut of each shard

A shard sends each key and each window once however often it has them, so that nothing grows with the frequency of a key: all is sorted,
nothing is compared pair by pair. Windows are compared by 128 bits of hash, as whole texts are in the step `exact`.

Memory: a shard or a part; at worst (everything recurs) about 60 bytes for each of its tokens.
Shapes: N documents, B bytes, T tokens of one document, W windows, R ranges.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from numba import njit
from pydantic import Field

from gristmill.core.config import Section
from gristmill.curate.io import shards
from gristmill.curate.outcome import Metric, Outcome, split, with_text
from gristmill.curate.text.text_column import TextColumn, decode_utf8, longest
from gristmill.curate.text.words import FNV_OFFSET, letters_and_marks, tokenize
from gristmill.data.minhash import GOLDEN, mix64

BYTES_A_PART = 128 << 20
# Ranges of windows, by the tokens where they begin: of first occurrences, or of others.
RANGES = pa.schema([("number", pa.int64()), ("begin", pa.int64()), ("end", pa.int64()), ("first", pa.bool_())])


class Substring(Section):
    """Cut out spans of text that occurred before, in any document."""

    step: Literal["substring"] = "substring"
    tokens: int = Field(50, gt=0, description="of the shortest span that is cut: words, and other characters that are no spaces")
    min_left: int = Field(0, ge=0, description="characters; a document that is cut to fewer is dropped")


def num_parts(sources: Sequence[Path]) -> int:
    """Parts of the keys' range, so that one fits into memory."""
    return max(1, -(-sum(source.stat().st_size for source in sources) // BYTES_A_PART))


# ---- tokens, windows and anchors ----


@njit(cache=True, nogil=True)
def _second_hashes(data_B, start_T, stop_T, count, low_T):  # type: ignore[no-untyped-def]
    """Other hashes of the tokens, which make 128 bits of 64."""
    for t in range(count):
        low, i = np.uint64(0x452821E638D01377), start_T[t]
        while i < stop_T[t]:
            point, size = np.int64(data_B[i]), 1
            if point >= 0x80:
                point, size = decode_utf8(data_B, i)
            low = (low + np.uint64(point)) * np.uint64(0xD6E8FEB86659FD93)
            i += size
        low_T[t] = mix64(low)


@njit(cache=True, nogil=True)
def _grams(hash_T, count, size, out_T):  # type: ignore[no-untyped-def]
    """Hashes of all runs of `size` tokens, by doubling: of 2, 4, 8, .. tokens, and of two runs that overlap in the end."""
    for i in range(count):
        out_T[i] = hash_T[i]
    span = 1
    while 2 * span <= size:
        for i in range(count - 2 * span + 1):  # in place: what is read lies ahead
            out_T[i] = mix64(out_T[i] * GOLDEN + out_T[i + span])
        span *= 2
    if span < size:
        for i in range(count - size + 1):
            out_T[i] = mix64(out_T[i] * GOLDEN + out_T[i + size - span])


@njit(cache=True, nogil=True)
def _anchors(gram_T, windows, among, queue_T, anchor_T):  # type: ignore[no-untyped-def]
    """Of each window the place of the least of its `among` k-grams, the first of equals."""
    head = tail = 0
    for i in range(windows + among - 1):
        while tail > head and gram_T[queue_T[tail - 1]] > gram_T[i]:
            tail -= 1
        queue_T[tail] = i
        tail += 1
        first = i - among + 1
        if first >= 0:
            if queue_T[head] < first:
                head += 1
            anchor_T[first] = queue_T[head]


@njit(cache=True, nogil=True)
def _four(size, like):  # type: ignore[no-untyped-def]
    kind = np.full(1, like).dtype
    return np.empty(size, kind), np.empty(size, kind), np.empty(size, kind), np.empty(size, kind)


@njit(cache=True, nogil=True)
def _grown(array, count):  # type: ignore[no-untyped-def]
    """The same with room for one more after `count`."""
    if count < len(array):
        return array
    more = np.empty(2 * len(array), array.dtype)
    more[:count] = array
    return more


@njit(cache=True, nogil=True)
def _among(sorted_, key):  # type: ignore[no-untyped-def]
    low, size = 0, len(sorted_)
    while size > 1:  # without a branch that is guessed wrong every other time
        half = size // 2
        low += half * (sorted_[low + half - 1] < key)
        size -= half
    return size == 1 and sorted_[low] == key


@njit(cache=True, nogil=True)
def _windows(data_B, begin_N, table, n, k, repeated, only_keys):  # type: ignore[no-untyped-def]
    """With `only_keys` the hashes of all anchors; else of each window whose anchor is in `repeated` (sorted): two hashes, that of its
    anchor, its document's row and its first token."""
    room = longest(begin_N)
    high_T, low_T, gram_T, work_T = _four(room, np.uint64(0))
    start_T, stop_T, queue_T, anchor_T = _four(room, np.int64(0))
    high_W, low_W, key_W, _ = _four(1024, np.uint64(0))
    row_W, at_W, _, _ = _four(1024, np.int64(0))
    found = 0
    for row in range(len(begin_N) - 1):
        count = tokenize(data_B, begin_N[row], begin_N[row + 1], table, FNV_OFFSET, high_T, start_T, stop_T)
        windows = count - n + 1
        if windows < 1:
            continue
        _grams(high_T, count, k, gram_T)
        _anchors(gram_T, windows, n - k + 1, queue_T, anchor_T)
        hashed, last, again = False, -1, False
        for i in range(windows):
            key = gram_T[anchor_T[i]]
            if anchor_T[i] != last:
                last = anchor_T[i]
                if only_keys:
                    key_W = _grown(key_W, found)
                    key_W[found] = key
                    found += 1
                else:
                    again = _among(repeated, key)
            if again:
                if not hashed:  # most documents need it not
                    hashed = True
                    _grams(high_T, count, n, work_T)
                    high_T, work_T = work_T, high_T
                    _second_hashes(data_B, start_T, stop_T, count, low_T)
                    _grams(low_T, count, n, work_T)
                    low_T, work_T = work_T, low_T
                high_W, low_W, key_W = _grown(high_W, found), _grown(low_W, found), _grown(key_W, found)
                row_W, at_W = _grown(row_W, found), _grown(at_W, found)
                high_W[found], low_W[found], key_W[found], row_W[found], at_W[found] = high_T[i], low_T[i], key, row, i
                found += 1
    return high_W[:found], low_W[:found], key_W[:found], row_W[:found], at_W[:found]


def _found(source: Path, how: Substring, repeated: np.ndarray | None) -> tuple[np.ndarray, ...]:
    texts = TextColumn.of(shards.read(source)["text"])
    none = np.empty(0, np.uint64)
    k = max(1, how.tokens // 2)
    return _windows(
        texts.data_B, texts.begin_N, letters_and_marks(), how.tokens, k, none if repeated is None else repeated, repeated is None
    )


# ---- tasks ----


def substring_keys(shard: int, source: Path, out: Path, parts: int, how: Substring) -> dict[str, int]:
    """The different anchors of a shard, and which of them it has twice or more."""
    key, counts = np.unique(_found(source, how, None)[2], return_counts=True)
    table = pa.table({"key": key, "again": counts > 1})
    shards.write_parts(out, table, (key % np.uint64(parts)).astype(np.int64), num_parts=parts)
    return {"keys": len(key)}


def substring_repeats(part: int, keys: Sequence[Path], out: Path) -> dict[str, int]:
    """Those anchors of one part that recur in the corpus, for each shard that has them."""
    tables = [shards.read_part([path], part) for path in keys]
    key = np.concatenate([table["key"].to_numpy() for table in tables])
    again = np.concatenate([table["again"].to_numpy() for table in tables])
    shard = np.repeat(np.arange(len(keys)), [len(table) for table in tables])
    order = np.argsort(key, kind="stable")
    same = key[order][1:] == key[order][:-1]
    again[order[1:][same]] = True
    again[order[:-1][same]] = True
    shards.write_parts(out, pa.table({"key": key[again]}), shard[again], num_parts=len(keys))
    return {"repeats": int(again.sum())}


def substring_windows(
    shard: int, source: Path, repeats: Sequence[Path], out: Path, own: Path, parts: int, how: Substring
) -> dict[str, int]:
    """A shard's windows whose anchor recurs, each where it occurs first in the shard, into `out`; where it occurs again into `own`."""
    repeated = np.sort(shards.read_part(repeats, shard)["key"].to_numpy())
    high, low, key, row, at = _found(source, how, repeated)
    number = shards.number(shard, row)
    first, again = _grouped(high, low)
    shards.write(own, _ranges(number[~first], at[~first], False))
    names = {"high": high, "low": low, "number": number, "at": at, "again": again}
    table = pa.table({name: column[first] for name, column in names.items()})
    shards.write_parts(out, table, (key[first] % np.uint64(parts)).astype(np.int64), num_parts=parts)
    return {"windows": len(high), "sent": len(table)}


def substring_matches(part: int, windows: Sequence[Path], out: Path, num_shards: int) -> dict[str, int]:
    """First and other occurrences of the windows of one part that recur, by shards."""
    table = shards.read_part(windows, part)
    high, low, number, at, again = (table[name].to_numpy() for name in ("high", "low", "number", "at", "again"))
    first, several = _grouped(high, low)
    again = first & (several | again)
    ranges = pa.concat_tables([_ranges(number[again], at[again], True), _ranges(number[~first], at[~first], False)])
    shards.write_parts(out, ranges, shards.shard_of(ranges["number"].to_numpy()), num_parts=num_shards)
    return {"repeats": int((~first).sum())}


def _grouped(high: np.ndarray, low: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each window, in the corpus's order: is it the first of those that are the same; is it so and there are others?"""
    order = np.argsort(high, kind="stable")
    a, b = high[order], low[order]
    if np.any((a[1:] == a[:-1]) & (b[1:] != b[:-1])):  # 64 bits were too few
        order = np.lexsort((low, high))
        a, b = high[order], low[order]
    new = np.ones(len(order), bool)
    new[1:] = (a[1:] != a[:-1]) | (b[1:] != b[:-1])
    first, several = np.empty(len(order), bool), np.zeros(len(order), bool)
    first[order] = new
    several[order[:-1]] = new[:-1] & ~new[1:]
    return first, several


def _ranges(number: np.ndarray, at: np.ndarray, first: bool) -> pa.Table:
    """Windows, in the corpus's order, as ranges of those that follow each other."""
    new = np.ones(len(at), bool)
    new[1:] = (number[1:] != number[:-1]) | (at[1:] != at[:-1] + 1)
    begins = np.flatnonzero(new)
    sizes = np.diff(np.append(begins, len(at)))
    columns = {"number": number[begins], "begin": at[begins], "end": at[begins] + sizes, "first": np.full(len(begins), first)}
    return pa.table(columns, schema=RANGES)


# ---- cut ----


@njit(cache=True, nogil=True)
def _pieces(data_B, begin, end, table, n, begin_R, end_R, first_R):  # type: ignore[no-untyped-def]
    """Bytes (from, to) that stay of one text, given the windows in it that recur; nothing if it stays whole."""
    room = max(1, end - begin)
    hash_T, start_T, stop_T = np.empty(room, np.uint64), np.empty(room, np.int64), np.empty(room, np.int64)
    count = tokenize(data_B, begin, end, table, FNV_OFFSET, hash_T, start_T, stop_T)
    goes_T = np.zeros(count, np.bool_)
    for round_first in (False, True):
        for r in range(len(begin_R)):
            if first_R[r] == round_first:
                goes_T[begin_R[r] : end_R[r] - 1 + n] = not round_first
    out = np.empty((count // n + 1, 2), np.int64)
    pieces, done, i = 0, begin, 0
    while i < count:
        j = i
        while j < count and goes_T[j]:
            j += 1
        if j - i >= n:
            if i > 0:  # with the white space before what follows, or before the end
                out[pieces, 0], out[pieces, 1] = done, (start_T[i] if j < count else stop_T[i - 1])
                pieces += 1
            done = start_T[j] if j < count else end
        i = j + 1
    if done == begin:
        return out[:0], False
    if done < end:
        out[pieces, 0], out[pieces, 1] = done, end
        pieces += 1
    return out[:pieces], True


def cut(shard: int, source: Path, own: Path, ranges: Sequence[Path], how: Substring) -> Outcome:
    """A shard without the spans that occurred before. Where nothing would part two pieces, a space does.

    Args:
        own: what `substring_windows` found in the shard alone.
        ranges: what `substring_matches` found.
    """
    table = shards.read(source)
    texts = TextColumn.of(table["text"])
    found = pa.concat_tables([shards.read(own), shards.read_part(ranges, shard)])
    row, begin, end, first = (found[name].to_numpy() for name in RANGES.names)
    order = np.argsort(row, kind="stable")
    row, begin, end, first = shards.row_of(row[order]), begin[order], end[order], first[order]
    new_texts: dict[int, str] = {}
    removed = 0
    reasons: list[str | None] = [None] * len(table)
    figures, share_N = np.zeros(len(table)), np.zeros(len(table))
    rows, starts = np.unique(row, return_index=True)
    for one, a, b in zip(rows.tolist(), starts.tolist(), [*starts.tolist(), len(row)][1:], strict=True):
        if first[a:b].all():
            continue
        pieces, is_cut = _pieces(
            texts.data_B, texts.begin_N[one], texts.begin_N[one + 1], letters_and_marks(), how.tokens, begin[a:b], end[a:b], first[a:b]
        )
        if not is_cut:
            continue
        text = ""
        for piece in (texts.data_B[x:y].tobytes().decode() for x, y in pieces.tolist()):
            text += piece if not text or text[-1].isspace() or piece[0].isspace() else " " + piece
        before = len(bytes(texts.bytes_of(one)).decode())
        removed += before - len(text)
        share_N[one] = 1 - len(text) / before
        new_texts[one] = text
        if len(text) < how.min_left:
            reasons[one], figures[one] = "substring", len(text)
    dropped = split(table, how.step, reasons, figures, np.full(len(table), float(how.min_left))).dropped
    source_N = np.arange(len(table))
    source_N[list(new_texts)] = len(table) + np.arange(len(new_texts))
    keep = np.array([reason is None for reason in reasons], bool)
    both = pa.concat_arrays([*table["text"].cast(pa.large_string()).chunks, pa.array(list(new_texts.values()), pa.large_string())])
    kept = with_text(table.filter(pa.array(keep)), both.take(pa.array(source_N[keep])))
    metrics = {"removed_share": Metric(share_N, description="share of a document's characters that stood before and were cut out")}
    return Outcome(kept, dropped, {"documents cut": len(new_texts), "characters removed": removed}, metrics)
