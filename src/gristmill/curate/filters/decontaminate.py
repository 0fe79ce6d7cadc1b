"""Benchmark decontamination: word n-grams of test sets are cut out of the documents.

Words are maximal runs of letters and digits, in lower case, each with its place in the text as it is, so that cuts are made
where the match is. An item of 13 words or more gives all its 13-grams, one of 8 to 12 words is one n-gram of its own length,
and shorter items are ignored. Signs between words (3 + 4) belong to an n-gram and count for nothing; a letter of Thai and other scripts
without spaces counts for a third of a word, an ideograph or kana for a whole one. N-grams met often in the corpus are common language and
are not used, which takes two passes: `counts` over every table, then `decontaminate` with the sum. Signs take time to tell from marks of
writing, so they are looked at only in documents that have the words with which an n-gram begins.

Shapes: N documents, B bytes of all of them, W words and signs of one, G n-grams of the benchmarks, M matches, S slots of the hash table.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numba import njit
from pydantic import Field

from gristmill.core.config import FilePath, Section
from gristmill.core.errors import InputError
from gristmill.curate.outcome import DOCUMENT, Metric, Outcome, none_dropped, split
from gristmill.curate.text.text_column import TERMINALS, TextColumn, hash_table, lookup, read_only
from gristmill.curate.text.words import CLUSTER, FNV_OFFSET, HAN, WORD, buffers, first_entry, lower_letters, lower_letters_alone, tokenize
from gristmill.data.minhash import GOLDEN, mix64
from gristmill.data.rows import read_records

MAX_TOKENS = 8  # of an n-gram for each of its words; with more signs than that it is not looked for
# Where sentences end; Thai and Lao have no marks.
_END = re.compile(f"[.!?{TERMINALS}]|(?<=[\u0e00-\u0eff])\\s")


class Decontaminate(Section):
    """Benchmark decontamination: cut out what test sets hold; drop what falls into too many pieces or to nothing."""

    step: Literal["decontaminate"] = "decontaminate"
    benchmarks: list[FilePath] = Field(min_length=1, description="files .jsonl, .json, .parquet, or .txt with one item a line")
    fields: list[str] | None = Field(None, description="fields of a record to read; all its texts if not given")
    ngram: int = Field(13, gt=0, description="words of an n-gram")
    min_words: int = Field(8, gt=0, description="words of the shortest item to look for")
    max_matches: int = Field(10, ge=0, description="occurrences in the corpus above which an n-gram is common and not used")
    margin: int = Field(200, ge=0, description="characters to cut on each side of a match, then on to the end of a sentence")
    min_part: int = Field(200, ge=0, description="characters; what remains and is not longer is discarded")
    max_pieces: int = Field(10, gt=0, description="pieces that a document may be cut into")


# --- words and n-grams ---------------------------------------------------------------------------------------------------


@njit(cache=True, nogil=True, inline="always")
def _thirds(data_B, i, table):  # type: ignore[no-untyped-def]
    """What the word or sign at byte i counts, in thirds of a word."""
    entry = first_entry(data_B, i, table)
    return 3 if entry & (WORD | HAN) else 1 if entry & CLUSTER else 0


@njit(cache=True, nogil=True)
def _item_grams(data_B, begin_N, table, alone, ngram, min_words):  # type: ignore[no-untyped-def]
    """uint64 hashes of the n-grams of every item, and how long they are: in words without signs, and in thirds of words."""
    hash_W, start_W, stop_W = buffers(begin_N)
    alone_W = np.empty_like(start_W)  # where words begin, without signs
    weight_W = np.empty(len(hash_W), np.int64)
    grams, lengths, total = np.empty(1024, np.uint64), np.empty((1024, 2), np.int64), 0
    for n in range(len(begin_N) - 1):
        num_alone = tokenize(data_B, begin_N[n], begin_N[n + 1], alone, FNV_OFFSET, hash_W, alone_W, stop_W)
        words = tokenize(data_B, begin_N[n], begin_N[n + 1], table, FNV_OFFSET, hash_W, start_W, stop_W)
        for w in range(words):
            weight_W[w] = _thirds(data_B, start_W[w], table)
        whole = weight_W[:words].sum()
        if whole < 3 * min_words:
            continue
        wanted, stop, inside, a, b = min(whole, 3 * ngram), 0, 0, 0, 0
        for first in range(words):
            if weight_W[first] == 0:
                continue
            while stop < words and inside < wanted:
                inside += weight_W[stop]
                stop += 1
            if inside < wanted:
                break
            inside -= weight_W[first]
            size = stop - first
            while a < num_alone and alone_W[a] < start_W[first]:
                a += 1
            while b < num_alone and alone_W[b] < stop_W[stop - 1]:
                b += 1
            if size > MAX_TOKENS * ngram or a == b:
                continue
            value = np.uint64(0)
            for k in range(first, stop):
                value = value * GOLDEN + hash_W[k]
            if total == len(grams):
                grams, lengths = np.concatenate((grams, np.empty_like(grams))), np.concatenate((lengths, np.empty_like(lengths)))
            grams[total], lengths[total, 0], lengths[total, 1] = mix64(value + np.uint64(size)), b - a, wanted
            total += 1
    return grams[:total], lengths[:total]


@njit(cache=True, nogil=True)
def _begins(data_B, begin_N, alone, size):  # type: ignore[no-untyped-def]
    """uint64 hashes of every `size` words of the items, without signs: where no n-gram can begin, none is looked up."""
    hash_W, start_W, stop_W = buffers(begin_N)
    found, total = np.empty(1024, np.uint64), 0
    for n in range(len(begin_N) - 1):
        words = tokenize(data_B, begin_N[n], begin_N[n + 1], alone, FNV_OFFSET, hash_W, start_W, stop_W)
        for first in range(words - size + 1):
            value = np.uint64(0)
            for k in range(first, first + size):
                value = value * GOLDEN + hash_W[k]
            if total == len(found):
                found = np.concatenate((found, np.empty_like(found)))
            found[total] = value
            total += 1
    return found[:total]


@njit(cache=True, nogil=True)
def _places(hash_W, start_W, stop_W, words, begins, size):  # type: ignore[no-untyped-def]
    """int64 [places, 2]: where words stand with which an n-gram may begin. It begins after the first byte, and at the second at last.

    Args:
        stop_W: is written over.
        begins: hashes of such words, where to find them, and what bits of them there are.
    """
    first_F, table_S, seen_S = begins
    last, slot_mask, wide, one = np.uint64(1), np.uint64(len(seen_S) - 1), np.uint64(size), np.uint64(1)
    rolling, found, num = np.uint64(0), np.uint64(0), 0
    for _ in range(size):
        last *= GOLDEN
    for w in range(np.uint64(words)):
        rolling = rolling * GOLDEN + hash_W[w]
        if w >= wide:
            rolling -= last * hash_W[w - wide]
        stop_W[found] = w + one - wide  # without a branch
        found += np.uint64(seen_S[(rolling >> np.uint64(32)) & slot_mask] & (w + one >= wide))
    for p in range(np.int64(found)):
        first, value = stop_W[p], np.uint64(0)
        for k in range(first, first + size):
            value = value * GOLDEN + hash_W[k]
        if lookup(value, first_F, table_S) >= 0:
            stop_W[num] = first
            num += 1
    places = np.empty((num, 2), np.int64)
    for p in range(num):
        first = stop_W[p]
        places[p, 0], places[p, 1] = start_W[first - 1] if first > 0 else -1, start_W[first]
    return places


@njit(cache=True, nogil=True)
def _matches(data_B, begin_N, table, alone, grams_G, table_S, begins, shortest, lengths):  # type: ignore[no-untyped-def]
    """Every n-gram of the benchmarks in the documents.

    Args:
        alone: the table of the same words without signs.
        begins: as for `_places`.
        shortest: words of the shortest one.
        lengths: int64, the lengths in thirds of words that there are, ascending.

    Returns:
        int64 [M, 4]: document, n-gram, and the bytes in `data_B` where it starts and stops; by document and start.
    """
    hash_W, start_W, stop_W = buffers(begin_N)
    found, total = np.empty((64, 4), np.int64), 0
    for n in range(len(begin_N) - 1):
        words = tokenize(data_B, begin_N[n], begin_N[n + 1], alone, FNV_OFFSET, hash_W, start_W, stop_W)
        places = _places(hash_W, start_W, stop_W, words, begins, shortest)
        if len(places) == 0:
            continue
        words, first, p = tokenize(data_B, begin_N[n], begin_N[n + 1], table, FNV_OFFSET, hash_W, start_W, stop_W), -1, 0
        while first + 1 < words and p < len(places):
            first += 1
            while p < len(places) and start_W[first] > places[p, 1]:
                p += 1
            if p == len(places) or start_W[first] <= places[p, 0]:
                continue
            value, stop, inside, before = np.uint64(0), first, 0, first
            for wanted in lengths:  # where each of them would end that begins at this word
                while stop < words and inside < wanted:
                    value = value * GOLDEN + hash_W[stop]
                    inside += _thirds(data_B, start_W[stop], table)
                    stop += 1
                if inside < wanted:
                    break
                if stop == before:  # the same words, longer by a third or two than the length before
                    continue
                before = stop
                place = lookup(mix64(value + np.uint64(stop - first)), grams_G, table_S)
                if place >= 0:
                    if total == len(found):
                        found = np.concatenate((found, np.empty_like(found)))
                    found[total, 0], found[total, 1], found[total, 2], found[total, 3] = n, place, start_W[first], stop_W[stop - 1]
                    total += 1
    return found[:total]


# --- benchmarks ----------------------------------------------------------------------------------------------------------


def _strings(value: Any) -> list[str]:
    """Every text in a value of a record, at any depth."""
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [text for one in inner for text in _strings(one)]


def _items(path: Path, fields: list[str] | None) -> list[str]:
    """The texts of a benchmark file."""
    if not path.is_file():
        raise InputError(f"The benchmark {path} {'is no file' if path.exists() else 'does not exist'}: check the path.")
    try:
        if path.suffix == ".txt":
            return path.read_text(encoding="utf-8-sig").splitlines()
        records: Any = None
        if path.suffix == ".json":
            try:
                records = json.loads(path.read_text(encoding="utf-8-sig"))
            except json.JSONDecodeError:
                records = None  # perhaps a record a line
        if records is None:
            records = read_records(path)
    except OSError as e:
        raise InputError(f"The benchmark {path} cannot be read ({e.strerror}): check its permissions.") from e
    except UnicodeDecodeError as e:
        raise InputError(f"The benchmark {path} is not UTF-8 text ({e}): convert it.") from e
    if fields is None:
        return _strings(records)
    rows = [row for row in (records if isinstance(records, list) else [records]) if isinstance(row, dict)]
    for name in fields:
        if not any(name in row for row in rows):
            known = ", ".join(sorted({key for row in rows[:100] for key in row})) or "none"
            raise InputError(f"The benchmark {path} has no field {name!r}: its fields are {known}.")
    return [text for row in rows for name in fields for text in _strings(row.get(name))]


@dataclass(frozen=True)
class Benchmarks:
    """Index of the n-grams of benchmarks.

    Attributes:
        grams_G: uint64 hashes, sorted.
        table_S: int32, where to find them.
        begins: with how many words as the shortest has, without signs, one may begin: uint64 hashes, sorted, int32 where to find them, and
            bool, which bits of them there are.
        shortest: words of the shortest.
        lengths: int64, the lengths in thirds of words that there are, ascending.
    """

    grams_G: np.ndarray
    table_S: np.ndarray
    begins: tuple[np.ndarray, np.ndarray, np.ndarray]
    shortest: int
    lengths: np.ndarray

    @staticmethod
    def read(settings: Decontaminate) -> "Benchmarks":
        """The n-grams of the files.

        Raises:
            InputError: a file is missing, is not what its name says, or has not the fields; or no item is long enough.
        """
        return Benchmarks.of([text for path in settings.benchmarks for text in _items(path, settings.fields)], settings)

    @staticmethod
    def grams_of(text: str, settings: Decontaminate) -> np.ndarray:
        """uint64 hashes of the n-grams of one item."""
        texts = TextColumn.of(pa.array([text], pa.large_string()))
        data_B, begin_N = read_only(texts.data_B), read_only(texts.begin_N)
        grams, _ = _item_grams(
            data_B, begin_N, lower_letters(), lower_letters_alone(), settings.ngram, min(settings.min_words, settings.ngram)
        )
        return np.asarray(grams)

    @staticmethod
    def of(items: list[str], settings: Decontaminate) -> "Benchmarks":
        """The n-grams of these items; as `read`."""
        texts = TextColumn.of(pa.array(items, pa.large_string()))
        data_B, begin_N = read_only(texts.data_B), read_only(texts.begin_N)
        tables = lower_letters(), lower_letters_alone()
        grams, lengths = _item_grams(data_B, begin_N, *tables, settings.ngram, min(settings.min_words, settings.ngram))
        if len(grams) == 0:
            raise InputError(f"The benchmarks hold no text of {settings.min_words} words or more: check `benchmarks` and `fields`.")
        grams_G = np.unique(grams)
        shortest = int(lengths[:, 0].min())
        first_F = np.unique(_begins(data_B, begin_N, tables[1], shortest))
        seen_S = np.zeros(1 << (16 * len(first_F)).bit_length(), np.bool_)
        seen_S[(first_F >> np.uint64(32)) & np.uint64(len(seen_S) - 1)] = True
        begins = first_F, hash_table(first_F), seen_S
        return Benchmarks(grams_G, hash_table(grams_G), begins, shortest, np.unique(lengths[:, 1]))

    def __len__(self) -> int:
        return len(self.grams_G)


def _find(texts: TextColumn, benchmarks: Benchmarks) -> np.ndarray:
    """`_matches` of the documents."""
    b = benchmarks
    data_B, begin_N = read_only(texts.data_B), read_only(texts.begin_N)
    tables = lower_letters(), lower_letters_alone()
    return np.asarray(_matches(data_B, begin_N, *tables, b.grams_G, b.table_S, b.begins, b.shortest, b.lengths))


def counts(table: pa.Table, benchmarks: Benchmarks) -> np.ndarray:
    """int64 [G]: how often each n-gram of the benchmarks occurs in this table. Sum them over the corpus."""
    return np.bincount(_find(TextColumn.of(table["text"]), benchmarks)[:, 1], minlength=len(benchmarks)).astype(np.int64)


# --- the step ------------------------------------------------------------------------------------------------------------


def _parts(text: str, spans: list[tuple[int, int]], settings: Decontaminate) -> list[str]:
    """What remains of a text.

    Args:
        spans: characters of the matches, in order and apart.
    """
    parts, at = [], 0
    for begin, end in spans:
        if begin < at:  # cut already, in part: the n-gram is there no more, but its rest is benchmark text too
            begin = at
        if end <= at:
            continue
        left = max(at, begin - settings.margin)
        left = max((found.end() for found in _END.finditer(text, at, left)), default=at)
        right = min(end + settings.margin, len(text))
        stop = _END.search(text, right)
        parts.append(text[at:left])
        at = stop.end() if stop else len(text)
    parts.append(text[at:])
    return [part for part in (part.strip() for part in parts) if len(part) > settings.min_part]


def _spans(raw: bytes, matches: np.ndarray) -> list[tuple[int, int]]:
    """Matches as characters of the text, joined where they overlap. Args: int64 [M, 2], bytes of the text, by start."""
    # characters before each byte: all but the continuation bytes of UTF-8 begin one
    before = np.concatenate(([0], np.cumsum((np.frombuffer(raw, np.uint8) & 0xC0) != 0x80)))
    spans: list[tuple[int, int]] = []
    for begin, end in sorted(zip(before[matches[:, 0]].tolist(), before[matches[:, 1]].tolist(), strict=True)):
        if spans and begin <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(spans[-1][1], end))
        else:
            spans.append((begin, end))
    return spans


def decontaminate(table: pa.Table, settings: Decontaminate, benchmarks: Benchmarks, *, total_counts: np.ndarray) -> Outcome:
    """Cut benchmark text out. A document that falls apart gives a row for each part: `ID`, `ID#2`, `ID#3` and so on.

    Args:
        total_counts: int64 [G], the sum of `counts` over the corpus.
    """
    used_G = (total_counts > 0) & (total_counts <= settings.max_matches)
    if not used_G.any():
        return Outcome(table, none_dropped())
    texts = TextColumn.of(table["text"])
    found = _find(texts, benchmarks)
    found = found[used_G[found[:, 1]]]
    if len(found) == 0:
        return Outcome(table, none_dropped())
    figures, pieces_N = np.zeros(len(texts), np.float64), np.full(len(texts), np.nan)
    reasons: list[str | None] = [None] * len(texts)
    kept_parts: dict[int, list[str]] = {}
    changes = {"matches": len(found), "cut": 0, "parts": 0}
    docs, firsts = np.unique(found[:, 0], return_index=True)
    for doc, mine in zip(docs.tolist(), np.split(found, firsts[1:]), strict=True):
        raw = bytes(texts.bytes_of(doc))
        parts = _parts(raw.decode(), _spans(raw, mine[:, 2:] - texts.begin_N[doc]), settings)
        pieces_N[doc] = len(parts)
        if not parts or len(parts) > settings.max_pieces:
            reasons[doc], figures[doc] = "contaminated", len(parts) or len(mine)
        else:
            kept_parts[doc] = parts
            changes["cut"] += 1
            changes["parts"] += len(parts)
    dropped = split(table, "decontaminate", reasons, figures, np.full(len(texts), settings.max_pieces)).dropped
    # rows of the result: documents, with the texts of parts counted on after those of the documents
    rows: list[int] = []
    sources: list[int] = []
    new_texts: list[str] = []
    names: list[str] = table["id"].to_pylist()
    taken = set(names)
    ids: list[str] = []
    for doc, reason in enumerate(reasons):
        if reason is not None:
            continue
        parts = kept_parts.get(doc, [])
        number = 1
        for k in range(max(1, len(parts))):
            rows.append(doc)
            if k:
                number += 1
                while f"{names[doc]}#{number}" in taken:  # by an earlier cut
                    number += 1
            ids.append(names[doc] if k == 0 else f"{names[doc]}#{number}")
            sources.append(len(texts) + len(new_texts) + k if parts else doc)
        new_texts += parts
    whole = pa.chunked_array([*table["text"].cast(pa.large_string()).chunks, pa.array(new_texts, pa.large_string())])
    kept = table.take(pa.array(rows, pa.int64()))
    for name, column in (("id", pa.array(ids, pa.string())), ("text", whole.take(pa.array(sources, pa.int64())))):
        kept = kept.set_column(kept.schema.get_field_index(name), DOCUMENT.field(name), column)
    about = "what a document that shares text with a benchmark is cut into; 0 where nothing remains"
    return Outcome(kept, dropped, changes, {"pieces": Metric(pieces_N, 1, settings.max_pieces, about)})
