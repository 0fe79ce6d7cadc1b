"""PII detection and redaction: e-mail addresses, telephone and account numbers, IP addresses and keys, found by shape and checksum.

A compiled scan of the bytes names the places where something could begin; a regular expression, a checksum and the words
before it confirm each place. Every pattern is bounded or cannot step back, so the time is linear in the text. Patterns are
read on UTF-8 bytes, and texts in which nothing is found are neither decoded nor copied.

Not reported: IP addresses that are not of the public internet (loopback, private, documentation, multicast), nor
those whose first two numbers are single digits (most are versions and sections); nor national
telephone numbers other than North American ones.

Sources: IBAN registry (ISO 13616), card prefixes (ISO/IEC 7812), E.164 telephone numbers, RFC 5321 addresses.
Shapes: N documents, B bytes of all of them, C places where something could begin.
"""

import ipaddress
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Literal, get_args

import numpy as np
import pyarrow as pa
from numba import njit
from pydantic import Field

from gristmill.core.config import Section
from gristmill.curate.outcome import Metric, Outcome, none_dropped, split, with_text
from gristmill.curate.text.text_column import TextColumn, read_only

Kind = Literal["key", "email", "iban", "card", "ssn", "ip", "phone"]
# In this order: where findings overlap, the first kind names them all.
KINDS: tuple[Kind, ...] = get_args(Kind)
FINDINGS = "personal data found in a document, of the kinds that are looked for"
KEY, EMAIL, IBAN, CARD, SSN, IP, PHONE = range(len(KINDS))
ROUNDS = 8  # a placeholder may uncover what touched the finding that it stands for


class Pii(Section):
    """Redact personal data, or drop the documents that hold it (the others then stay as they are)."""

    step: Literal["pii"] = "pii"
    kinds: list[Kind] = Field(default=list(KINDS), min_length=1, description="what to look for")
    action: Literal["redact", "drop"] = "redact"
    max_findings: int = Field(0, ge=0, description="findings that a document may hold, where the action is drop")


# --- patterns: matched at one place; the group "it" is the finding -------------------------------------------------------

_NUMBER = rb"(?<![A-Za-z0-9_])(?<![0-9][.-])(?<!\.)"  # before and after a number that is no part of a longer one
_END = rb"(?![A-Za-z0-9_])"
_NUMBER_END = _END + rb"(?![.-][0-9])"
_OCTET = rb"(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"

_EMAIL = re.compile(
    rb"(?<![A-Za-z0-9_.%+-])[.%+-]{0,8}(?P<it>[A-Za-z0-9_][A-Za-z0-9_.%+-]{0,63}@"
    rb"(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8}(?!(?:png|jpe?g|gif|svg|webp|css|html?|json)\b)[A-Za-z]{2,24})"
    rb"(?![A-Za-z0-9_(@-])"
)
_CARD = re.compile(
    _NUMBER + rb"(?P<it>[2-6][0-9]{12,18}|[2-6][0-9]{3}([ -])[0-9]{4}\2[0-9]{4}\2[0-9]{4}(?:\2[0-9]{3})?"
    rb"|3[0-9]{3}([ -])[0-9]{6}\3[0-9]{4,5})" + _NUMBER_END
)
_ISSUER = re.compile(
    rb"4(?:.{12}|.{15}|.{18})|(?:5[1-5]..|222[1-9]|22[3-9].|2[3-6]..|27[01].|2720).{12}|3[47].{13}|3(?:0[0-5]|[689].).{11}"
    rb"|(?:6011|65..|64[4-9].|35[2-8].|62..|5018|5020|5038|5893|6304|6759|676[1-3]).{12,15}"
)
_SSN = re.compile(_NUMBER + rb"(?P<it>(?!000|666|9)[0-9]{3}-(?!00)[0-9]{2}-(?!0000)[0-9]{4})" + _NUMBER_END)
_V4 = re.compile(
    rb"(?<![A-Za-z0-9_.])(?<![A-Za-z_][/-])(?P<it>(?:" + _OCTET + rb"\.){3}" + _OCTET + rb")" + _END + rb"(?!\.[A-Za-z0-9_])(?!-[A-Za-z_])"
)
_V6 = re.compile(rb"(?<![A-Za-z0-9_:.])(?P<it>[23][0-9A-Fa-f]{3}(?::{1,2}[0-9A-Fa-f]{1,4}){2,7}(?:::)?)(?![A-Za-z0-9_]|:[0-9A-Fa-f:])")
_PHONE = re.compile(
    rb"(?<![A-Za-z0-9_+])(?<![0-9][.-])(?<!\.)(?P<it>"
    rb"\+1[ .-]?(?:\([2-9][0-9]{2}\)|[2-9][0-9]{2})[ .-]?[0-9]{3}[ .-]?[0-9]{4}"
    rb"|\+(?!1)[1-9][0-9]{0,2}(?:[ .-]?\([0-9]{1,5}\))?(?:[ .-]?[0-9]){6,13}"
    rb"|(?:1[ .-])?(?:\([2-9][0-9]{2}\)[ .-]?[0-9]{3}[ .-]|[2-9][0-9]{2}-[0-9]{3}-|[2-9][0-9]{2}\.[0-9]{3}\.|[2-9][0-9]{2} [0-9]{3}-)"
    rb"[0-9]{4})" + _NUMBER_END
)
_TOKEN = re.compile(
    rb"(?<![A-Za-z0-9_])(?P<it>(?<!-)(?:sk-[A-Za-z0-9_-]{20,250}+|xox[abeprs]-[A-Za-z0-9-]{20,250}+|AIza[A-Za-z0-9_-]{35}"
    rb"|glpat-[A-Za-z0-9_-]{20,250}+|eyJ[A-Za-z0-9_-]{8,4000}+\.eyJ[A-Za-z0-9_-]{8,8000}+\.[A-Za-z0-9_-]{16,2000}+)"
    rb"|[sr]k_(?:live|test)_[A-Za-z0-9]{16,250}+|gh[pousr]_[A-Za-z0-9]{36,250}+|github_pat_[A-Za-z0-9_]{22,250}+"
    rb"|(?:AKIA|ASIA)[A-Z0-9]{16}|hf_[A-Za-z0-9]{30,60}+|npm_[A-Za-z0-9]{36})(?![A-Za-z0-9_])"
)
_PEM = re.compile(
    rb"(?P<it>-----BEGIN [A-Z ]{0,30}PRIVATE KEY(?: BLOCK)?-----(?:[^-]++|-(?!----))*+-----END [A-Z ]{0,30}PRIVATE KEY(?: BLOCK)?-----)"
)
_VALUE = re.compile(rb"(?<=[\s\"'=:>])(?P<it>[A-Za-z0-9+/_-]{16,200}={0,2})(?![A-Za-z0-9+/_=.(\[-])")
_SECRET = re.compile(
    rb"(?:password|passwd|pwd|secret|token|(?:api|access|auth|account|encryption|secret)[_-]?key)[\"']?\s{0,3}(?::=|=>|=|:)\s{0,3}[\"']?\Z",
    re.IGNORECASE,
)
_VERSION = re.compile(rb"(?:version|(?<![a-z])ver\.?|release|section|chapter|\boid)[\s_:=\"'(>]{0,6}\Z|[=<>~!]= ?\Z", re.IGNORECASE)
_DATE = re.compile(rb"\+?[0-9]{4}[.-][0-9]{2}[.-][0-9]{2}")
# Characters of an IBAN, by country.
_IBAN_SIZES = {
    code: size
    for size, codes in {
        15: "NO", 16: "BE", 18: "DK FI FK FO GL NL SD", 19: "MK SI", 20: "AT BA EE KZ LT LU MN XK", 21: "CH HR LI LV",
        22: "BG BH CR DE GB GE IE ME RS VA", 23: "AE GI IL IQ OM SO TL", 24: "AD CZ ES MD PK RO SA SE SK TN VG",
        25: "LY PT ST", 26: "IS TR", 27: "BI DJ FR GR IT MC MR SM", 28: "AL AZ BY CY DO GT HN HU LB NI PL SV", 29: "BR EG PS QA UA",
        30: "JO KW MU", 31: "MT SC", 32: "LC", 33: "RU",
    }.items()
    for code in codes.split()
}  # fmt: skip


@cache
def _iban(size: int) -> re.Pattern[bytes]:
    """An IBAN of so many characters, written whole or in groups of four."""
    groups, rest = divmod(size - 4, 4)
    tail = rb"(?: [A-Z0-9]{%d})" % rest if rest else b""
    return re.compile(
        rb"(?<![A-Za-z0-9_])(?P<it>[A-Z]{2}[0-9]{2}(?:[A-Z0-9]{%d}|(?: [A-Z0-9]{4}){%d}%b))" % (size - 4, groups, tail) + _END
    )


def _luhn(digits: bytes) -> bool:
    """The checksum of ISO/IEC 7812: every second digit from the right counts double, its digits summed."""
    total = sum(c - 48 for c in digits[-1::-2]) + sum((0, 2, 4, 6, 8, 1, 3, 5, 7, 9)[c - 48] for c in digits[-2::-2])
    return total % 10 == 0


def _random(value: bytes) -> bool:
    """Whether a value looks drawn and not written: letters and digits, at least 3.2 bits a character, digits in its midst."""
    counts = Counter(value)
    bits = -sum(n / len(value) * math.log2(n / len(value)) for n in counts.values())
    digits = len(re.findall(rb"[0-9]", value))
    # words with a number after them change class once; drawn characters do so all the time
    changes = len(re.findall(rb"[0-9](?=[A-Za-z])|[A-Za-z](?=[0-9])", value))
    return bits >= 3.2 and digits >= 2 and changes >= 4


def _confirm(kind: int, text: bytes, at: int) -> tuple[int, int] | None:
    """The finding of one kind whose pattern begins at a byte: where it begins and ends."""
    if kind == EMAIL:
        match = _EMAIL.match(text, at)
    elif kind == IBAN:
        size = _IBAN_SIZES.get(text[at : at + 2].decode("latin-1"))
        match = _iban(size).match(text, at) if size else None
        if match:
            code = match["it"].replace(b" ", b"")
            match = match if int("".join(str(int(chr(c), 36)) for c in code[4:] + code[:4])) % 97 == 1 else None
    elif kind == CARD:
        match = _CARD.match(text, at)
        if match:
            digits = re.sub(rb"[ -]", b"", match["it"])
            match = match if _ISSUER.fullmatch(digits) and _luhn(digits) else None
    elif kind == SSN:
        match = _SSN.match(text, at)
    elif kind == IP:
        match = _V4.match(text, at)
        if match and (match["it"][1:4:2] == b".." or _VERSION.search(text[max(0, at - 24) : at])):
            match = None
        match = match or _V6.match(text, at)
        if match:
            try:
                address = ipaddress.ip_address(match["it"].decode())
            except ValueError:
                return None
            match = match if address.is_global and not address.is_multicast and match["it"].count(b":") != 2 else None
    elif kind == PHONE:
        match = _PHONE.match(text, at)
        if match and text[at] == 43:
            whole = match["it"]
            digits = re.sub(rb"[^0-9]", b"", whole)
            # a bare run of digits may be a signed number, and one point makes a decimal
            bare = len(digits) == len(whole) - 1 and len(digits) < 10
            decimal = len(digits) == len(whole) - 2 and b"." in whole
            match = None if bare or decimal or len(digits) < 8 or _DATE.match(whole) else match
    else:
        match = _PEM.match(text, at)
        if match:
            return match.span("it") if len(match["it"]) > 120 else None  # less is the two lines alone
        match = _TOKEN.match(text, at)
        if match and match["it"][:3] in (b"sk-", b"hf_"):  # also the beginnings of ordinary names
            match = match if _random(match["it"]) or (match["it"][:3] == b"hf_" and not match["it"][3:].islower()) else None
        if not match:
            match = _VALUE.match(text, at)
            match = match if match and _SECRET.search(text[max(0, at - 32) : at]) and _random(match["it"]) else None
    return match.span("it") if match else None


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
        _VALUES: letters + digits + b"+/_-", _DIALLED: digits + b" .-()",
    }  # fmt: skip
    for bit, members in sets.items():
        table[list(members)] |= bit
    return table


_CLASSES = _table()
_STARTS = [b"sk-", b"sk_", b"rk_", b"gh", b"gi", b"gl", b"AK", b"AS", b"xo", b"AI", b"hf_", b"np", b"ey"]


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
def _numeric(data_B: np.ndarray, at: int, end: int, table: np.ndarray) -> int:
    """What the number that begins at `at` may be, as bits of kinds: its groups of digits and what parts them."""
    groups = np.zeros(4, np.int64)
    marks = np.zeros(4, np.uint8)
    j, found = at, 0
    for k in range(4):
        stop = _run(data_B, j, min(end, j + 20), table, _DIGIT)
        groups[k] = stop - j
        if stop < end:
            marks[k] = data_B[stop]
        j = stop + 1
        if groups[k] == 0 or marks[k] not in (32, 45, 46):
            break
    first = data_B[at]
    if 50 <= first <= 54 and (13 <= groups[0] <= 19 or (groups[0] == 4 and 4 <= groups[1] <= 6 and marks[0] != 46)):
        found |= 1 << CARD
    if groups[0] == 3 and groups[1] == 2 and groups[2] == 4 and marks[0] == 45:
        found |= 1 << SSN
    if groups[0] == 3 and groups[1] == 3 and groups[2] == 4:
        found |= 1 << PHONE
    # a country code of 1, then the area code, bare or in parentheses
    if first == 49 and groups[0] == 1 and (groups[1] == 3 or (groups[1] == 0 and marks[0] in (32, 45, 46))):
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
                if i > begin and table[data_B[i - 1]] & _LOCAL and i + 1 < end and table[data_B[i + 1]] & _WORD:
                    while at > begin and i - at < 73 and table[data_B[at - 1]] & _LOCAL:
                        at -= 1
                    found = 1 << EMAIL
            elif byte == 43:  # +
                if i + 1 < end and 49 <= data_B[i + 1] <= 57 and _count(data_B, i + 1, min(end, i + 36), table, _DIGIT, _DIALLED) >= 7:
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
        span = _confirm(kind, text, (what >> 3) - begin)
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
