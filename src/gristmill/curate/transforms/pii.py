"""PII detection and redaction: e-mail addresses, telephone and account numbers, IP addresses and keys, found by shape and checksum.

A compiled scan of the bytes names the places where something could begin; a regular expression, a checksum and the words
around it confirm each place (`pii_patterns.py`). Texts in which nothing is found are neither decoded nor copied.

Not reported: IP addresses that are not of the public internet (loopback, private, documentation, multicast), nor what the words around
it call a version; nor those whose first two numbers are single digits (most are versions and sections) unless the words say that they
are addresses; nor barcodes and the numbers of books and devices, where they are called so; nor `user@host:path` and `ssh://user@host`;
nor national telephone numbers other than North American ones, nor national identity numbers other than the US social security number.

Shapes: N documents, B bytes of all of them, C places where something could begin.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Literal

import numpy as np
import pyarrow as pa
from numba import njit
from pydantic import Field

from gristmill.core.config import Section
from gristmill.curate.outcome import Metric, Outcome, none_dropped, split, with_text
from gristmill.curate.text.text_column import TextColumn, read_only
from gristmill.curate.transforms.pii_patterns import CARD, EMAIL, IBAN, IP, KEY, KINDS, PHONE, SSN, Kind, confirm

FINDINGS = "personal data found in a document, of the kinds that are looked for"
ROUNDS = 8  # a placeholder may uncover what touched the finding that it stands for


class Pii(Section):
    """Redact personal data, or drop the documents that hold it (the others then stay as they are)."""

    step: Literal["pii"] = "pii"
    kinds: list[Kind] = Field(default=list(KINDS), min_length=1, description="what to look for")
    action: Literal["redact", "drop"] = "redact"
    max_findings: int = Field(0, ge=0, description="findings that a document may hold, where the action is drop")


def _merged(spans: Iterable[tuple[int, int, int]]) -> Iterator[tuple[int, int, int]]:
    """Findings (begin, end, kind) that overlap become one: all of it is hidden."""
    last: tuple[int, int, int] | None = None
    for begin, end, kind in sorted(spans):
        if last and begin < last[1]:
            last = (last[0], max(last[1], end), min(last[2], kind))
            continue
        if last:
            yield last
        last = (begin, end, kind)
    if last:
        yield last


# --- the scan ------------------------------------------------------------------------------------------------------------

_WORD, _DIGIT, _LOCAL, _HEX, _FIRST, _VALUES, _DIALLED, _SIGN = 1, 2, 4, 8, 16, 32, 64, 128


def _table() -> np.ndarray:
    """uint8 for each byte: the classes above. `_FIRST` begins something where a word begins, `_SIGN` anywhere, if its neighbours allow."""
    table = np.zeros(256, np.uint8)
    digits, letters = b"0123456789", b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    sets = {
        _WORD: letters + digits + b"_", _DIGIT: digits, _LOCAL: letters + digits + b"_.%+-", _HEX: digits + b"abcdefABCDEF",
        _FIRST: digits + bytes(range(65, 91)) + b"sgxhner", _SIGN: b"@+(-=:>",
        _VALUES: letters + digits + b"+/_-", _DIALLED: digits + b" .-()" + bytes(range(128, 256)),
    }  # fmt: skip
    for bit, members in sets.items():
        table[list(members)] |= bit
    return table


_CLASSES = _table()
_STARTS = [b"sk-", b"sk_", b"rk_", b"gh", b"gi", b"gl", b"AK", b"AS", b"xo", b"AI", b"hf_", b"np", b"ey", b"gs", b"xa", b"SG"]


@njit(cache=True, nogil=True)
def _run(data_B: np.ndarray, at: int, end: int, table: np.ndarray, bit: int) -> int:
    """Where the run of bytes of a class that begins at `at` ends."""
    while at < end and table[data_B[at]] & bit:
        at += 1
    return at


@njit(cache=True, nogil=True)
def _count(data_B: np.ndarray, at: int, end: int, table: np.ndarray, bit: int, other: int) -> int:
    """How many bytes are of class `bit` in the run of bytes of class `bit` or `other` that begins at `at`."""
    count = 0
    while at < end and table[data_B[at]] & (bit | other):
        count += (table[data_B[at]] & bit) != 0
        at += 1
    return count


@njit(cache=True, nogil=True)
def _mark(data_B: np.ndarray, at: int, end: int) -> tuple[int, int]:
    """What parts two groups of digits at `at`: a blank (32), hyphen (45) or point (46) of any kind, or neither (0), and its bytes."""
    if at >= end:
        return 0, 1
    first = data_B[at]
    if first < 128:
        return (first if first == 32 or first == 45 or first == 46 else 0), 1
    if at + 1 < end and first == 0xC2:
        second = data_B[at + 1]
        return (32 if second == 0xA0 else 45 if second == 0xAD else 0), 2
    if at + 2 < end:
        second, third = data_B[at + 1], data_B[at + 2]
        if first == 0xE2:
            if second == 0x80:
                return (32 if third <= 0x8A or third == 0xAF else 45 if 0x90 <= third <= 0x95 else 0), 3
            if second == 0x81:
                return (32 if third == 0x9F else 45 if third == 0x83 else 0), 3
            return (45 if second == 0x88 and third == 0x92 else 0), 3
        if first == 0xE3:
            return (32 if second == 0x80 and third == 0x80 else 0), 3
        if first == 0xEF:
            return (45 if (second == 0xB9 and third == 0xA3) or (second == 0xBC and third == 0x8D) else 0), 3
    return 0, 1


@njit(cache=True, nogil=True)
def _numeric(data_B: np.ndarray, at: int, end: int, table: np.ndarray) -> int:
    """What the number that begins at `at` may be, as bits of kinds: its groups of digits and what parts them."""
    groups = np.zeros(4, np.int64)
    marks = np.zeros(4, np.uint8)
    j, found = at, 0
    for k in range(4):
        stop = _run(data_B, j, min(end, j + 20), table, _DIGIT)
        groups[k] = stop - j
        mark, width = _mark(data_B, stop, end)
        marks[k] = mark
        j = stop + width
        if groups[k] == 0 or mark == 0:
            break
    first = data_B[at]
    grouped = groups[0] == 4 and 4 <= groups[1] <= 6 and marks[0] != 46
    if 50 <= first <= 57 and first != 55 and (14 <= groups[0] <= 19 or grouped or (groups[0] == 6 and groups[1] == 13)):
        found |= 1 << CARD
    if groups[0] == 9 or (groups[0] == 3 and groups[1] == 2 and groups[2] == 4 and marks[0] != 46):
        found |= 1 << SSN
    if groups[0] == 3 and groups[1] == 3 and groups[2] == 4:
        found |= 1 << PHONE
    # a country code of 1, then the area code, bare or in parentheses
    if first == 49 and groups[0] == 1 and (groups[1] == 3 or (groups[1] == 0 and marks[0] > 0)):
        found |= 1 << PHONE
    if marks[0] == 46 and marks[1] == 46 and marks[2] == 46 and groups[0] <= 3 and 0 < groups[3] <= 3:
        found |= 1 << IP
    if 50 <= first <= 51:
        stop = _run(data_B, at, min(end, at + 5), table, _HEX)
        if stop == at + 4 and stop < end and data_B[stop] == 58:
            found |= 1 << IP
    return found


@njit(cache=True, nogil=True)
def _secret(data_B: np.ndarray, at: int, begin: int, end: int, table: np.ndarray) -> int:
    """Where the value begins that the `=`, `:` or `>` at `at` gives to a name such as password, token or key; or -1."""
    j = at - 1
    while j >= begin and at - j < 8 and (data_B[j] in (9, 10, 11, 12, 13, 32, 34, 39, 58, 61)):
        j -= 1
    if j < begin or (data_B[j] | 32) not in (100, 116, 110, 121):  # passwor-d, secre-t, toke-n, ke-y
        return -1
    j, limit = at + 1, min(end, at + 6)
    while j < limit and data_B[j] in (9, 10, 11, 12, 13, 32, 34, 39):
        j += 1
    if j + 6 < end and (data_B[j] | 32) == 98 and data_B[j + 5] == 114 and data_B[j + 6] == 32:  # Bearer
        j += 7
    stop = _run(data_B, j, min(end, j + 201), table, _VALUES)
    if not 16 <= stop - j <= 200 or _count(data_B, j, stop, table, _DIGIT, _VALUES) < 2:
        return -1
    return j


@njit(cache=True, nogil=True)
def _scan(data_B: np.ndarray, begin_N: np.ndarray, table: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where something could begin.

    Args:
        starts: uint8 [256, 256], whether a key may begin with these two bytes.

    Returns:
        int64 of each place: its document, and its byte in `data_B` times 8 and its kind.
    """
    where_C, what_C, count = np.empty(1024, np.int64), np.empty(1024, np.int64), 0
    for doc in range(len(begin_N) - 1):
        begin, end = begin_N[doc], begin_N[doc + 1]
        members = 0
        for i in range(begin, end):
            byte, wanted = data_B[i], _SIGN if members & _WORD else _SIGN | _FIRST
            members = table[byte]
            if not members & wanted:
                continue
            found, at = 0, i
            if members & _WORD:
                if members & _DIGIT:
                    found = _numeric(data_B, i, end, table)
                elif i + 8 < end:
                    second = data_B[i + 1]
                    if starts[byte, second]:
                        found |= 1 << KEY
                    if byte <= 90 and 65 <= second <= 90 and table[data_B[i + 2]] & table[data_B[i + 3]] & _DIGIT:
                        found |= 1 << IBAN
            elif byte == 64:  # @
                if i > begin and i + 1 < end and (table[data_B[i + 1]] & _WORD or data_B[i + 1] > 127):
                    last = data_B[i - 1]
                    if table[last] & _LOCAL or last > 127 or last == 34:
                        found = 1 << EMAIL
            elif byte == 43:  # +
                if i + 1 < end and 49 <= data_B[i + 1] <= 57 and _count(data_B, i + 1, min(end, i + 80), table, _DIGIT, _DIALLED) >= 7:
                    found = 1 << PHONE
            elif byte == 40:  # (
                if i + 4 < end and data_B[i + 4] == 41 and 50 <= data_B[i + 1] <= 57 and table[data_B[i + 2]] & _DIGIT:
                    found = 1 << PHONE
            elif byte == 45:  # -
                if i + 40 < end and data_B[i + 4] == 45 and data_B[i + 5] == 66 and data_B[i + 1] == 45:  # -----B
                    found = 1 << KEY
            else:
                at = _secret(data_B, i, begin, end, table)
                if at >= 0:
                    found = 1 << KEY
            kind = 0
            while found:
                if found & 1:
                    if count == len(where_C):
                        where_C = np.concatenate((where_C, np.empty_like(where_C)))
                        what_C = np.concatenate((what_C, np.empty_like(what_C)))
                    where_C[count], what_C[count] = doc, at * 8 + kind
                    count += 1
                found >>= 1
                kind += 1
    return where_C[:count], what_C[:count]


@cache
def _key_starts() -> np.ndarray:
    table = np.zeros((256, 256), np.uint8)
    for start in _STARTS:
        table[start[0], start[1]] = 1
    return table


# --- the step ------------------------------------------------------------------------------------------------------------


def _find(texts: TextColumn, kinds: Iterable[Kind]) -> dict[int, list[tuple[int, int, int]]]:
    """Findings (begin, end, kind) of each document that has any; bytes within the document."""
    wanted = {KINDS.index(kind) for kind in kinds}
    if texts.begin_N[0] == texts.begin_N[-1]:
        return {}
    where_C, what_C = _scan(read_only(texts.data_B), read_only(texts.begin_N), _CLASSES, _key_starts())
    found: dict[int, list[tuple[int, int, int]]] = {}
    last, text, begin = -1, b"", 0
    for doc, what in zip(where_C.tolist(), what_C.tolist(), strict=True):
        kind = what & 7
        if kind not in wanted:
            continue
        if doc != last:
            last, text, begin = doc, bytes(texts.bytes_of(doc)), int(texts.begin_N[doc])
        span = confirm(kind, text, (what >> 3) - begin)
        if span:
            found.setdefault(doc, []).append((*span, kind))
    return {doc: list(_merged(spans)) for doc, spans in found.items()}


def _column(pieces: list[bytes]) -> TextColumn:
    return TextColumn(np.frombuffer(b"".join(pieces), np.uint8), np.cumsum([0, *map(len, pieces)]).astype(np.int64))


def _redacted(texts: TextColumn, kinds: Iterable[Kind]) -> tuple[dict[int, bytes], Counter[str], np.ndarray]:
    """The documents that change, how many findings of each kind were replaced, and how many in each document (float64)."""
    changed: dict[int, bytes] = {}
    counts: Counter[str] = Counter()
    names, findings_N = np.arange(len(texts)), np.zeros(len(texts))
    for _ in range(ROUNDS):
        fresh: list[int] = []
        for doc, spans in _find(texts, kinds).items():
            text, at, pieces = bytes(texts.bytes_of(doc)), 0, []
            for begin, end, kind in spans:
                pieces += [text[at:begin], b"<%b>" % KINDS[kind].upper().encode()]
                at = end
                counts[KINDS[kind]] += 1
            fresh.append(int(names[doc]))
            findings_N[fresh[-1]] += len(spans)
            changed[fresh[-1]] = b"".join([*pieces, text[at:]])
        if not fresh:
            break
        names = np.array(fresh)
        texts = _column([changed[name] for name in fresh])
    return changed, counts, findings_N


def redact(text: str, kinds: Iterable[Kind] = KINDS) -> tuple[str, Counter[str]]:
    """A text with `<EMAIL>`, `<PHONE>` and so on in place of what was found, and how many were found of each kind."""
    raw = text.encode("utf-8", "surrogatepass")
    changed, counts, _ = _redacted(_column([raw]), kinds)
    return changed.get(0, raw).decode("utf-8", "surrogatepass"), counts


def pii(table: pa.Table, settings: Pii) -> Outcome:
    """Redact, or drop documents with more than `max_findings` findings. Counts are findings, by kind."""
    texts = TextColumn.of(table["text"])
    if settings.action == "drop":
        found = _find(texts, settings.kinds)
        counts = Counter[str](KINDS[kind] for spans in found.values() for _, _, kind in spans)
        figures = np.array([len(found.get(i, ())) for i in range(len(texts))], np.float64)
        reasons = ["pii" if figure > settings.max_findings else None for figure in figures.tolist()]
        outcome = split(table, "pii", reasons, figures, np.full(len(texts), settings.max_findings, np.float64))
        metrics = {"findings": Metric(figures, max=settings.max_findings, description=FINDINGS)}
        return Outcome(outcome.kept, outcome.dropped, dict(counts), metrics)
    changed, counts, findings_N = _redacted(texts, settings.kinds)
    metrics = {"findings": Metric(findings_N, description=FINDINGS)}
    if not changed:
        return Outcome(table, none_dropped(), metrics=metrics)
    pieces: list[bytes | memoryview] = []
    sizes = texts.sizes_N.copy()
    at = 0
    for doc in sorted(changed):
        pieces += [memoryview(texts.data_B[texts.begin_N[at] : texts.begin_N[doc]]), changed[doc]]  # type: ignore[arg-type]
        sizes[doc], at = len(changed[doc]), doc + 1
    pieces.append(memoryview(texts.data_B[texts.begin_N[at] : texts.begin_N[-1]]))  # type: ignore[arg-type]
    offsets = np.concatenate(([0], np.cumsum(sizes)))
    column = pa.LargeStringArray.from_buffers(len(texts), pa.py_buffer(offsets), pa.py_buffer(b"".join(pieces)))
    return Outcome(with_text(table, column), none_dropped(), dict(counts), metrics)
