"""Text cleaning: mojibake, control characters, leftovers of HTML, cookie and privacy notices, runs of empty lines.

A pass over the bytes finds the documents that need something; all others are not touched. A document is repaired until nothing
changes any more, so that cleaning twice is cleaning once.

Shapes: N documents, B bytes of all of them.
"""

import html as entities
import re
import unicodedata
from html.entities import html5
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numba import njit

from gristmill.core.config import Section
from gristmill.curate.outcome import Outcome, split, with_text
from gristmill.curate.text.text_column import TextColumn

UNICODE, CONTROL, HTML, BOILERPLATE, NEWLINES = 1, 2, 4, 8, 16  # what a document may need
KINDS = {"unicode": UNICODE, "control": CONTROL, "html": HTML, "boilerplate": BOILERPLATE, "newlines": NEWLINES}
MAX_ROUNDS = 100

_TERMINAL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_ENDS = re.compile("\r\n?|[\x0b\x0c\x85\u2028]")
# C0, C1, soft hyphen, zero-width space, word joiner and invisible operators, byte order mark; the joiners only where the letter
# before is ASCII, for Persian, the scripts of India and emoji are written with them
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\xad\u200b\u2060-\u2064\ufeff]+|(?<![^\x00-\x7f])[\u200c\u200d]+")
# what ftfy takes out; C1 is a sign of mojibake to it
_FTFY_CONTROL = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f\u206a-\u206f\ufeff\ufff9-\ufffc]")
# every sign of mojibake to ftfy has one of these: two characters beyond ASCII with at most one of ASCII between, or one of a few
_SUSPECT = re.compile("[^\x00-\x7f][\x00-\x7f]?[^\x00-\x7f]|[\x80-\x9fÂÃŒœ]")
MAX_LINE = 1_000_000  # characters: ftfy cuts longer lines and looks at each piece
_RUNS = re.compile("\n{3,}")

_BLOCKS = "br|p|div|li|ul|ol|tr|table|tbody|thead|hr|h[1-6]|blockquote|center"
_INLINE = "span|b|i|u|s|a|em|strong|font|small|big|sup|sub|strike|img|td|th"
_TAG = re.compile(rf"<(/?)(?:({_BLOCKS})|({_INLINE}))(\s[^<>\n]{{0,1000}})?/?>", re.IGNORECASE)
# their names as numbers, as the scan reads them: eight letters at most
_NAMES = f"{_BLOCKS}|{_INLINE}".replace("h[1-6]", "h1|h2|h3|h4|h5|h6").split("|")
_TAGS = np.array([int.from_bytes(name[:8].encode(), "big") for name in _NAMES], np.int64)
# bytes that the scan passes over: tab, and printable ASCII but for & < and the rarest letters of what boilerplate holds
_PLAIN = np.array([byte == 9 or (32 <= byte < 127 and chr(byte) not in "&<kKvVmM") for byte in range(256)])
_ENTITY = re.compile(r"&(?:amp;)*(#[0-9]{1,7}|#[xX][0-9A-Fa-f]{1,6}|[A-Za-z][A-Za-z0-9]{1,24});")
# Texts about markup, or of it: an escaped tag, a whole page, a quoted or indented leftover, a block of code.
_MARKUP = re.compile(
    r"<(?:!doctype|html|head|body|script|style|svg|\?xml|\?php|template)\b|&lt;[A-Za-z/!?]|```|<%|\{%"
    r"|[\"'`=(\[{](?:</?[A-Za-z]|&#?[A-Za-z0-9]+;)|^(?: {4}|\t)[^\n]*(?:</?[A-Za-z]|&#?[A-Za-z0-9]+;)",
    re.IGNORECASE | re.MULTILINE,
)
_CODE_LINE = re.compile(
    r"^\s*(?:import |from \S+ import|def |class |#include|#define|return\b|var |const |let |//|/\*|\*/|>>> )|[;{}]\s*$", re.M
)
_LINE = re.compile(r"^.*\S", re.M)
MAX_CODE = 0.1  # share of lines that look like code, in a text

_POLICY = re.compile(
    r"terms of use|privacy policy|cookie policy|privacy (?:&|and) cookies? policy|privacy overview|uses cookies|use (?:of )?cookies"
    r"|accept (?:all )?cookies|cookie settings|lorem ipsum",
    re.IGNORECASE,
)
# each of them holds one of these
_POLICY_BEGINS = (
    *("terms of use", "privacy policy", "privacy overview", "privacy & cookie", "privacy and cookie", "cookie policy", "cookie settings"),
    *("uses cookies", "use cookies", "use of cookies", "accept cookies", "accept all cookies", "lorem ipsum"),
)
_PARAGRAPHS = re.compile(r"\n\s*\n")


class Clean(Section):
    """Text cleaning: repairs, in the order they are made."""

    step: Literal["clean"] = "clean"
    unicode: bool = True  # mojibake, C1 controls that were meant as Windows-1252, composed characters (NFC); see `mend`
    control: bool = True  # control and invisible characters out, one kind of line end
    html: bool = True  # entities and stray tags, in texts that are no code and not about markup
    boilerplate: bool = True  # paragraphs on policies and cookies at the top and the bottom
    newlines: bool = True  # at most one empty line in a row


@njit(cache=True, nogil=True)
def _same(data_B: np.ndarray, i: int, end: int, word: np.ndarray) -> bool:
    """Whether the bytes at i are the lower-case word, in either case."""
    if i + len(word) > end:
        return False
    for k in range(len(word)):
        c = data_B[i + k]
        if (c | 0x20 if 65 <= c <= 90 else c) != word[k]:
            return False
    return True


@njit(cache=True, nogil=True)
def _one_of(name: np.int64, names: np.ndarray) -> bool:
    for one in names:  # noqa: SIM110 (numba has no any)
        if one == name:
            return True
    return False


@njit(cache=True, nogil=True)
def _scan(data_B, begin_N, tags, cookie, privacy, terms, lorem):  # type: ignore[no-untyped-def]
    """uint8[N]: what each text may need. A bit too many costs time; one too few is a repair that is not made."""
    needs_N = np.zeros(len(begin_N) - 1, np.uint8)
    for n in range(len(needs_N)):
        begin, end = begin_N[n], begin_N[n + 1]
        i, needs = begin, 0
        while i < end:
            c = data_B[i]
            if _PLAIN[c]:
                i += 1
                continue
            if c >= 128:
                size = 2 if c < 0xE0 else 3 if c < 0xF0 else 4
                a = data_B[i + 1] if i + 1 < end else 0
                b = data_B[i + 2] if size > 2 and i + 2 < end else 0
                point = (c & 0x1F) << 6 | (a & 0x3F) if size == 2 else (c & 0x0F) << 12 | (a & 0x3F) << 6 | (b & 0x3F)
                # ftfy changes no text of these: dashes, curly quotes, bullet, ellipsis; arrows; kana without marks; ideographs; Hangul;
                # emoji, and what makes one of a sign
                inert = (
                    (size == 4 and c == 0xF0 and a == 0x9F and 0x8C <= b <= 0xAB)
                    or size == 3
                    and (
                        point == 0x2013
                        or point == 0x2014
                        or (0x2018 <= point <= 0x2019)
                        or (0x201C <= point <= 0x201D)
                        or point == 0x2022
                        or point == 0x2026
                        or (0x2190 <= point <= 0x21FF)
                        or (0x3001 <= point <= 0x3002)
                        or (0x3041 <= point <= 0x3096)
                        or (0x30A1 <= point <= 0x30FA)
                        or (0x4E00 <= point <= 0x9FFF)
                        or (0xAC00 <= point <= 0xD7A3)
                        or point == 0xFE0F
                    )
                )
                if not inert:
                    needs |= UNICODE
                    low = size == 2 and (point <= 0x9F or point == 0xAD)
                    if low or (size == 3 and (0x200B <= point <= 0x200D or point in (0x2028, 0x2029, 0xFEFF) or 0x2060 <= point <= 0x2064)):
                        needs |= CONTROL
                i += size
                continue
            if c == 10:
                if i >= begin + 2 and data_B[i - 1] == 10 and data_B[i - 2] == 10:
                    needs |= NEWLINES
            elif c < 32:
                needs |= CONTROL
                if c != 13 and c != 12:
                    needs |= UNICODE
            elif c == 127:
                needs |= CONTROL | UNICODE
            elif c == 38:  # &
                for k in range(i + 1, min(end, i + 300)):
                    x = data_B[k]
                    if x == 59:
                        if k > i + 2:
                            needs |= HTML
                        break
                    if not (48 <= x <= 57 or 65 <= x <= 90 or 97 <= x <= 122 or x == 35):
                        break
            elif c == 60 and not needs & HTML:  # <
                k = i + 2 if i + 1 < end and data_B[i + 1] == 47 else i + 1
                name = np.int64(0)
                while k < end and (65 <= data_B[k] <= 90 or 97 <= data_B[k] <= 122 or 48 <= data_B[k] <= 57) and name < 1 << 56:
                    name = name << 8 | np.int64(data_B[k] | 0x20)  # digits keep their value
                    k += 1
                if _one_of(name, tags):
                    for j in range(k, min(end, k + 4100)):
                        if data_B[j] == 62:
                            needs |= HTML
                            break
                        if data_B[j] == 60 or data_B[j] == 10:
                            break
            elif not needs & BOILERPLATE:
                low, three, four = c | 0x20, max(begin, i - 3), max(begin, i - 4)
                if (
                    (low == 107 and _same(data_B, three, end, cookie))
                    or (low == 118 and _same(data_B, three, end, privacy))
                    or (low == 109 and (_same(data_B, three, end, terms) or _same(data_B, four, end, lorem)))
                ):
                    needs |= BOILERPLATE
            i += 1
        needs_N[n] = needs
    return needs_N


@njit(cache=True, nogil=True)
def _assemble(data_B, begin_N, runs_N, slot_N, other_B, other_begin_M, out_B, out_begin_N):  # type: ignore[no-untyped-def]
    """Write the texts after each other: slot_N >= 0 takes a mended one of M, runs_N shortens runs of newlines on the way.

    Returns:
        bool[N]: nothing but white space is in the text.
    """
    blank_N = np.ones(len(begin_N) - 1, np.bool_)
    at = 0
    for n in range(len(begin_N) - 1):
        out_begin_N[n] = at
        source = data_B[begin_N[n] : begin_N[n + 1]]
        if slot_N[n] >= 0:
            source = other_B[other_begin_M[slot_N[n]] : other_begin_M[slot_N[n] + 1]]
        for c in source:
            if c > 32:
                blank_N[n] = False
                break
        first = 0
        for i in range(2, len(source) if runs_N[n] and slot_N[n] < 0 else 0):
            if source[i] == 10 and source[i - 1] == 10 and source[i - 2] == 10:  # all up to here, but for this one
                out_B[at : at + i - first] = source[first:i]
                at, first = at + i - first, i + 1
        out_B[at : at + len(source) - first] = source[first:]
        at += len(source) - first
    out_begin_N[len(begin_N) - 1] = at
    return blank_N


def _word(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8)


def needs(texts: TextColumn) -> np.ndarray:
    """uint8[N]: the repairs that each text may need, as bits."""
    return np.asarray(_scan(texts.data_B, texts.begin_N, _TAGS, *map(_word, ("cookie", "privacy", "terms of use", "lorem ipsum"))))


def mend(text: str) -> str:
    """ftfy, without its opinions on quotes, ligatures, widths, line ends and entities.

    ftfy works line by line, so that the lines that it would give back need not go through it: those of plain ASCII, and those
    without a sign of mojibake that are composed already.
    """
    from ftfy import TextFixerConfig, fix_text
    from ftfy.badness import is_bad

    plain = TextFixerConfig(
        unescape_html=False, uncurl_quotes=False, fix_latin_ligatures=False, fix_character_width=False, fix_line_breaks=False, explain=False
    )
    lines = text.split("\n")
    controls = _FTFY_CONTROL.search(text) is not None
    for i, line in enumerate(lines):
        if line.isascii() and not (controls and _FTFY_CONTROL.search(line)):
            continue
        line += "\n" if i < len(lines) - 1 else ""  # the signs look at it
        bad = (controls and _FTFY_CONTROL.search(line)) or (_SUSPECT.search(line) and is_bad(line))
        if bad or not unicodedata.is_normalized("NFC", line) or len(line) > MAX_LINE:
            lines[i] = fix_text(line, plain).removesuffix("\n")
    return "\n".join(lines)


def _control(text: str) -> str:
    return _CONTROL.sub("", _ENDS.sub("\n", _TERMINAL.sub("", text)).replace("\u2029", "\n\n"))


def _html(text: str) -> str:
    if not (_TAG.search(text) or _ENTITY.search(text)) or _MARKUP.search(text):
        return text
    lines = sum(1 for _ in _LINE.finditer(text))
    without = _ENTITY.sub("", text)  # whose semicolons end no statement
    if sum(1 for _ in _CODE_LINE.finditer(without)) > MAX_CODE * lines:
        return text
    lower = text.lower()

    def tag(match: re.Match[str]) -> str:
        if match[2]:
            return "\n"
        name = match[3].lower()
        if name in ("a", "b", "i", "u", "s") and f"</{name}>" not in lower:  # a placeholder rather than a tag
            return match[0]
        return " " if name in ("td", "th") else ""

    return _ENTITY.sub(_character, _TAG.sub(tag, text))


def _character(match: re.Match[str]) -> str:
    name = match[1]
    if not name.startswith("#") and name + ";" not in html5:
        return match[0]
    point = entities.unescape(f"&{name};")
    return " " if point == "\xa0" else point


def _boilerplate(text: str) -> str:
    """Without the paragraphs on policies at both ends; as it was if others lie between, or there are no others."""
    lower = text.lower()
    if not any(phrase in lower for phrase in _POLICY_BEGINS) or not _POLICY.search(text):  # the search alone takes a hundred times as long
        return text
    spans = []
    begin = 0
    for gap in _PARAGRAPHS.finditer(text):
        spans.append((begin, gap.start()))
        begin = gap.end()
    spans = [(a, b) for a, b in [*spans, (begin, len(text))] if text[a:b].strip()]
    policy = [_POLICY.search(text, a, b) is not None for a, b in spans]
    if all(policy):
        return text
    first, last = policy.index(False), len(policy) - 1 - policy[::-1].index(False)
    if any(policy[first : last + 1]) or (first == 0 and last == len(policy) - 1):
        return text
    return text[spans[first][0] if first else 0 : spans[last][1] if last < len(policy) - 1 else len(text)]


def _newlines(text: str) -> str:
    return _RUNS.sub("\n\n", text)


_REPAIRS = {UNICODE: mend, CONTROL: _control, HTML: _html, BOILERPLATE: _boilerplate, NEWLINES: _newlines}


def repair(text: str, first: int, wanted: int) -> tuple[str, int]:
    """A text after the repairs it needs at `first`; if they change it, after all that are wanted, until none changes it any more.

    Returns:
        The text, and the bits of the repairs that changed something.
    """
    made, bits = 0, first
    for _ in range(MAX_ROUNDS):
        before = text
        for bit, change in _REPAIRS.items():
            if bits & bit and (changed := change(text)) != text:
                text, made, bits = changed, made | bit, wanted
        if text == before:
            break
        bits = wanted
    return text, made


def clean(table: pa.Table, settings: Clean) -> Outcome:
    """Repair every text; those of which nothing but white space is left are dropped as "empty", as they were (figure and limit: 0).

    Returns:
        Counts: the documents that each kind of repair changed.
    """
    wanted = sum(bit for kind, bit in KINDS.items() if getattr(settings, kind))
    texts = TextColumn.of(table["text"])
    needs_N = needs(texts) & wanted
    made_N = needs_N & NEWLINES  # the pass is exact on these, where nothing else is needed
    slot_N = np.full(len(texts), -1, np.int64)
    mended: list[bytes] = []
    for n in np.flatnonzero(needs_N & ~np.uint8(NEWLINES)).tolist():
        text, made = repair(bytes(texts.bytes_of(n)).decode(), int(needs_N[n]) & ~NEWLINES, wanted)  # runs alone are left to the pass
        made_N[n] = made or made_N[n]
        if made:
            slot_N[n] = len(mended)
            mended.append(text.encode())
    counts = {kind: int(np.count_nonzero(made_N & bit)) for kind, bit in KINDS.items() if wanted & bit}
    column, blank_N = _column(texts, (made_N & NEWLINES) > 0, slot_N, mended)
    nothing_N = np.zeros(len(texts))
    outcome = split(table, "clean", ["empty" if blank else None for blank in blank_N.tolist()], nothing_N, nothing_N)
    kept = with_text(outcome.kept, column.filter(pa.array(~blank_N))) if made_N.any() else outcome.kept
    return Outcome(kept, outcome.dropped, counts)


def _column(texts: TextColumn, runs_N: np.ndarray, slot_N: np.ndarray, mended: list[bytes]) -> tuple[Any, np.ndarray]:
    """The texts as they are now, and bool[N]: blank."""
    other_begin_M = np.cumsum([0, *map(len, mended)], dtype=np.int64)
    out_B = np.empty(int(texts.sizes_N.sum() + other_begin_M[-1]), np.uint8)
    out_begin_N = np.empty(len(texts) + 1, np.int64)
    other_B = np.frombuffer(b"".join(mended), np.uint8)
    blank_N = _assemble(texts.data_B, texts.begin_N, runs_N, slot_N, other_B, other_begin_M, out_B, out_begin_N)
    data = pa.py_buffer(out_B[: out_begin_N[-1]])
    return pa.LargeStringArray.from_buffers(len(texts), pa.py_buffer(out_begin_N), data), blank_N
