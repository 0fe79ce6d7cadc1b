"""Parsing of free-form answers: lists without a second call, as JSON, YAML, numbered, bulleted or plain lines."""

import itertools
import json
import re
import unicodedata
from collections.abc import Iterable
from typing import Any

from gristmill.core.response_text import answer_text, code_blocks

# Headings, quotations and emphasis about a number (`### 1.`, `**1.**`, `**2) Bees**`) are no part of the item.
MARKER = re.compile(
    r"^(?P<indent>[ \t]*)(?P<quote>(?:>[ \t]?)*)(?:#{1,6}[ \t]+)?(?P<bold>\*{2,3}|__)?"
    r"(?P<marker>(?:[(\[]?\d{1,3}\\?(?:[.):\]\uff0e\uff09\u3001]|\.?[\u00ba\u00aa\u00b0])\)?(?=(?:\*{2,3}|__)?(?:\s|$)|(?P<close>\*{2,3}|__)|[^\x00-\x7f])"
    r"|(?:topic|item|question|task|prompt|idea|number|no\.?|\#)[ \t]?\#?\d{1,3}(?:[.):](?=\W)|(?=[ \t]*$))|\#\d{1,3}(?=[ \t]+\S)"
    r"|[-*+\u2013\u2014\u00b7\u2219](?=\s)(?:[ \t]+\[[ xX]\](?=\s))?"
    r"|[\u2022\u2023\u2043\u2190-\u21ff\u25a0-\u27bf\u2b00-\u2bff\u30fb\U0001f300-\U0001faff]\ufe0f?(?=\s|[^\W\d_])))"
    r"[ \t]*(?P<text>.*)$",
    re.I,
)
# Marks only where they run on from the first: `a) Bees`, `ii. Bees`, `1 - Bees`, `Step 1: Bees`, `1.Bees`, numbers of other scripts.
SIGNS = "\u2460-\u249b\u24ea-\u24ff\u2776-\u2793\u20e3\u2160-\u216b\u2170-\u217b"
RUNNING = re.compile(
    r"(?P<indent>[ \t]*)(?P<before>(?:\*\*)?[(\[\uff08]?(?:[a-z]{1,12}[ \t]?(?=\d))?)"
    rf"(?P<value>[a-z]|[ivx]{{2,6}}|\d{{1,3}}(?:\ufe0f?\u20e3)?|[{SIGNS}]|[\u4e00\u4e8c\u4e09\u56db\u4e94\u516d\u4e03\u516b\u4e5d\u5341]{{1,3}})"
    rf"(?P<after>(?:[.)\]\uff0e\uff09\u3001]|(?<=\d)(?:[:\uff1a]|[ \t][-\u2013\u2014](?=[ \t]))|(?<=[{SIGNS}]))(?:\*\*)?[ \t]*)(?=[^\s\d])",
    re.I,
)
RULE = re.compile(r"^[ \t]*\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$")  # below the head of a Markdown table
HEADING = re.compile(
    r"[ \t]*(?:#{1,6}[ \t]|(?:-[ \t]*){3,}$|(?:\*[ \t]*){3,}$|(?:_[ \t]*){3,}$|(?:\*\*|__)[^*_]+(?:\*\*:?|__:?|:\*\*)[ \t]*$)"
)
NUMBERED = re.compile(r"(?<!\S)(\d{1,3})[.)][ \t]+(?=\S)")
WRAPPER = re.compile(r"<[A-Za-z]\w{0,30}>")  # round a list, on a line of its own
COMMENT = re.compile(r"(?:(?<=[,\[])|^)[ \t]*(?://|#)[^\n]*$", re.M)  # in an array
EMPHASIS = re.compile(r"(\*\*\*|\*\*|__(?![a-z_]+__))(?=\S)((?:(?!\1).)+?)(?<=\S)\1(?=$|[\s:.,;!?)-])")
STRING = re.compile(  # of an array, even where its own quotes are not escaped: it ends where a comma or a bracket follows
    r"\s*(?:\"((?:\\.|\"(?!\s{0,99}(?:[,\]]|$|(?<=\s)\"))|[^\"\\])*+)\"|'((?:\\.|'(?!\s{0,99}(?:[,\]]|$|(?<=\s)'))|[^'\\])*+)'"
    r"|\u201c([^\u201c\u201d]*)\u201d)\s*(?:,|(?=\])|(?<=\s)(?=[\"'])|$)",
    re.S,
)
CELL = re.compile(r"(?<!\\)\|")
ARRAY = re.compile(r"(?:^|(?<=[:=(]))[ \t]*(?:[`*]+[ \t]*)?\[(?![^\W\d]\w*\])", re.M)
NAMES = ("item", "topic", "subtopic", "name", "title", "question", "prompt", "instruction", "task", "text", "content", "value")
LIST_TAG = re.compile(rf"<(li|(?:{'|'.join(NAMES)})[_-]?\d{{0,3}})(?:\s[^<>]{{0,99}})?>((?:(?!</?\1\b).)*)", re.I | re.S)
QUOTES = {"*": "*", "_": "_", '"': '"', "'": "'", "\u201c": "\u201d", "\u2018": "\u2019", "`": "`"}
AROUND = " .,;:!?\"'`*_\u201c\u201d\u2018\u2019\u2026()[]"
MAX_MENDED = 3  # arrays that are put right before they are read
MAX_ARRAYS = 100  # of a text that are looked at
MAX_ITEM_CHARS = 20_000  # characters of an item; more is no item of a list


def parse_list(text: str) -> list[str]:
    """Parse a list: its items in order; [] where there is none.

    Lines with the outermost marker (`1.`, `2)`, `-`, `*`) begin items, and what follows a marked line belongs to its item, nested lists,
    arrays and code included. Without markers a JSON array is read, also one with a comma too many, with single quotes or cut off;
    else every line is an item, introductions aside. Letters, Roman numerals and the like are markers where they run on from the first.
    Of a table each row is an item, by its first column that is no number. What the model thinks, fences, and marks of headings and
    emphasis are no item.
    """
    text = answer_text(text)
    blocks = [block.code for block in code_blocks(text)]
    marked = _marked(text)
    if not marked:
        if rows := _table(text.split("\n")):
            return _clean(rows)
        if tagged := LIST_TAG.findall(text):
            return _clean(item for _, item in tagged)
        for source in (*blocks, text):
            if found := _json_list(source):
                return found
    return _clean(marked or next((found for source in blocks if (found := _marked(source))), []) or _plain(text))


def normalize(text: str) -> str:
    """Normalize a text for comparison: without case, runs of space, and the punctuation around it."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).strip(AROUND)


def unique(items: Iterable[str]) -> list[str]:
    """Deduplicate: items without those that an earlier one equals but for case, punctuation and space."""
    kept: dict[str, str] = {}
    for item in items:
        kept.setdefault(normalize(item) or item, item)
    return list(kept.values())


def parse_yes_no(text: str) -> bool | None:
    """Parse a yes/no answer by its first word, or the one after "answer:"; None where it is neither."""
    word = re.match(
        r"(?:\W|1[.)])*(?:(?:the\s+)?(?:final\s+)?(?:answer|verdict|judge?ment|decision|conclusion|result)(?:\s+is)?\W+|boxed\W+)?"
        r"(yes|no)\b(?!\s*(?:/|or\b))",
        answer_text(text),
        re.I,
    )
    return None if word is None else word[1].lower() == "yes"


def _json_list(text: str) -> list[str]:
    """The items of an array that is no part of a sentence: it begins its line, or follows a colon, and nothing but a mark follows it."""
    stripped = text.strip()
    if stripped.startswith("{"):
        try:
            return _clean(_items(json.loads(stripped)))
        except (ValueError, RecursionError):
            try:
                return _clean(_items([json.loads(line) for line in stripped.split("\n") if line.strip()]))
            except (ValueError, RecursionError):
                pass
    for number, m in enumerate(itertools.islice(ARRAY.finditer(text), MAX_ARRAYS)):
        source = text[m.end() - 1 :]
        for read in (_array, _loose_array, _mended_array) if number < MAX_MENDED else (_array, _loose_array):
            found, rest = read(source)
            if (items := _clean(_items(found))) and not rest.partition("\n")[0].strip(" \t\r.,;)`*}"):
                return items
    return []


def _array(text: str) -> tuple[Any, str]:
    try:
        found, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return None, ""
    return found, text[end:]


def _mended_array(text: str) -> tuple[Any, str]:
    """JSON with comments, commas too many or single quotes, put right."""
    text = re.sub(r",(\s{0,99}[\]}])", r"\1", COMMENT.sub("", text))
    if '"' not in text:
        text = re.sub(r"(?<=[\[{,:\s])'|'(?=\s{0,99}[\]},:])", '"', text)
    return _array(text)


def _items(found: Any) -> list[str]:
    """The texts in a JSON value: an array of texts or of objects with one, or an object that holds such an array or numbered texts."""
    if isinstance(found, dict):
        arrays = [value for value in found.values() if isinstance(value, (list, dict))]
        if len(arrays) == 1:
            return _items(arrays[0])
        numbered = len({re.sub(r"[ _-]?\d+$", "", key) for key in found}) == 1 and all(key[-1:].isdigit() for key in found)
        return list(found.values()) if numbered and all(isinstance(value, str) for value in found.values()) else []
    items = []
    for item in found if isinstance(found, list) else ():
        if isinstance(item, dict):
            texts = {key.lower(): value for key, value in item.items() if isinstance(value, str)}
            item = next((texts[name] for name in NAMES if name in texts), next(iter(texts.values())) if len(texts) == 1 else None)
        if not isinstance(item, str):
            return []
        items.append(item)
    return items


def _loose_array(text: str) -> tuple[list[str], str]:
    """The texts of an array that is not quite JSON, or cut off, and what follows it."""
    items, at = [], 1
    while m := STRING.match(text, at):
        item = next(group for group in m.groups() if group is not None)
        items.append(re.sub(r"\\(.)", lambda c: {"n": "\n", "t": "\t"}.get(c[1], c[1]), item, flags=re.S))
        at = m.end()
    end = re.compile(r"\s*(\]|$)").match(text, at)
    return (items, text[end.end() :]) if end and (end[1] or len(items) > 1) else ([], "")


def _table(lines: list[str]) -> list[str]:
    """The rows of a Markdown table: of each the column with one of `NAMES` as its head, else the first that is no number."""
    at = next((n for n in range(1, len(lines)) if "|" in lines[n] and RULE.match(lines[n]) and "|" in lines[n - 1]), 0)
    if not at:
        return []
    rows = list(itertools.takewhile(lambda line: "|" in line, lines[at + 1 :]))
    bare = (re.sub(r"^[ \t]*\||\|[ \t]*$", "", row) for row in (lines[at - 1], *rows))
    head, *cells = ([cell.strip().replace("\\|", "|") for cell in CELL.split(row)] for row in bare)
    columns = range(len(head))
    named = (n for n in columns if normalize(head[n]).rstrip("s") in NAMES)
    worded = (n for n in columns if any(n < len(row) and re.search(r"[^\W\d_]", row[n]) for row in cells))
    column = next(named, next(worded, None))
    return [] if column is None else [row[column] for row in cells if column < len(row)]


def _with_numbers(lines: list[str]) -> list[str]:
    """The same lines, with plain numbers for marks of other kinds where these run on from the first."""
    found = [
        (n, m) for n, line in enumerate(lines) if (m := RUNNING.match(line)) and not (m["value"].isalpha() and m["after"][-1] in ".)]")
    ]
    outer = min((len(m["indent"].expandtabs(4)) for _, m in found), default=0)
    found = [(n, m) for n, m in found if len(m["indent"].expandtabs(4)) == outer]
    if len(found) < 2 or len({m["before"] for _, m in found}) > 1:
        return lines
    if not any([of(m["value"]) for _, m in found] == list(range(1, len(found) + 1)) for of in (_letter, _roman, _numeral)):
        return lines
    marks = ((n, m) for n, line in enumerate(lines) if (m := MARKER.match(line)) and len(m["indent"].expandtabs(4)) <= outer)
    if any(_is_number(m) or n < found[0][0] for n, m in marks):
        return lines
    lines = lines.copy()
    for k, (n, m) in enumerate(found, 1):
        bold, closed = ("**" if "**" in m[side] else "" for side in ("before", "after"))
        lines[n] = f"{m['indent']}{bold}{k}.{closed} {lines[n][m.end() :]}"
    return lines


def _letter(value: str) -> int:
    return ord(value) - ord("A" if value.isupper() else "a") + 1 if len(value) == 1 else 0


def _roman(value: str) -> int:
    digits = [{"I": 1, "V": 5, "X": 10}.get(c, 0) for c in value.upper()]
    return sum(-d if d < max(digits[n:]) else d for n, d in enumerate(digits))


def _numeral(value: str) -> int:
    digits = [int(unicodedata.numeric(c, 0)) for c in value if c not in "\ufe0f\u20e3"]
    if 10 not in digits or len(digits) == 1:
        return sum(d * 10**n for n, d in enumerate(reversed(digits)))
    ten = digits.index(10)  # as in Chinese: two, ten, three
    return sum(digits[:ten] or [1]) * 10 + sum(digits[ten + 1 :])


def _unfolded(text: str) -> str:
    """A text with line breaks before its numbers 1, 2, 3 ... where all stand in one line, or the first stands behind words."""
    if "```" in text:
        return text
    found = list(NUMBERED.finditer(text))
    if [int(m[1]) for m in found] != list(range(1, len(found) + 1)):
        return text
    begins = [re.search(r"\w", text[: m.start()].rpartition("\n")[2]) is None for m in found]
    if all(begins):
        return text
    in_one_line = "\n" not in text[found[0].start() : found[-1].start()]
    if begins[0] and not in_one_line or in_one_line and len(found) < 3:  # an item speaks of a number
        return text
    places = [0, *(m.start() for m, begin in zip(found, begins, strict=True) if not begin), len(text)]
    return "\n".join(text[start:end].rstrip(" \t") for start, end in itertools.pairwise(places))


def _marked(text: str) -> list[str]:
    text = _unfolded(text)
    lines = _with_numbers(text.split("\n"))
    blocks = [block.lines for block in code_blocks(text)]
    fenced = {n for block in blocks for n in block if n > block[0] or not MARKER.match(lines[n])}  # a fence may share a marker's line
    found = [(number, match) for number, line in enumerate(lines) if number not in fenced and (match := MARKER.match(line))]
    found = [(number, match) for number, match in found if not HEADING.match(lines[number]) or _is_number(match)]
    if not found:
        return []
    outermost = min(len(match["indent"].expandtabs(4)) for _, match in found)
    outer = [(number, match) for number, match in found if len(match["indent"].expandtabs(4)) == outermost]
    if any(_is_number(match) for _, match in outer):  # bullets between numbers belong to them
        outer = [(number, match) for number, match in outer if _is_number(match)]
    items = []
    for (number, match), (following, _) in zip(outer, [*outer[1:], (len(lines), None)], strict=True):
        rest = range(number + 1, following)
        end = next((n for n in rest if n not in fenced and HEADING.match(lines[n])), following)
        if following == len(lines):  # words after a blank line close the list, unless they are indented as the item's
            blank = (n for n in rest if not lines[n].strip() and n not in fenced)
            end = min(end, next((n for n in blank if not re.match(rf"\s{{{outermost + 1}}}", "\n".join(lines[n + 1 : n + 2]))), end))
        kept = lines[number + 1 : end]
        inside = [line for n, line in zip(range(number + 1, end), kept, strict=True) if n in fenced and line.strip()]
        width = min((len(line) - len(line.lstrip()) for line in inside), default=0)
        words = [line[width:] if n in fenced else line.strip() for n, line in zip(range(number + 1, end), kept, strict=True)]
        if match["quote"]:
            words = [re.sub(r"^(?:>[ \t]?)+", "", line) for line in words]
        first = match["text"]
        if match["bold"] and not match["close"]:  # `**1. Bees**`: the other end of what began before the number
            first = first.replace(match["bold"], "", 1)
        items.append("\n".join([first, *words]).strip())
    return items


def _is_number(match: re.Match[str]) -> bool:
    return any(c.isdigit() for c in match["marker"])


def _plain(text: str) -> list[str]:
    fences = {number for block in code_blocks(text) for number in (block.lines[0], block.lines[-1])}
    lines = [line.strip() for number, line in enumerate(text.split("\n")) if line.strip() and number not in fences]
    lines = [line.removesuffix(",") if line[:1] in QUOTES and line[-2:-1] == QUOTES[line[0]] else line for line in lines]
    if lines and WRAPPER.fullmatch(lines[0]) and lines[-1] == f"</{lines[0][1:]}":
        lines = lines[1:-1]
    if len(lines) < 2 or lines[0][0] in "[{":  # JSON that is no list
        return []
    if not all(HEADING.match(line) for line in lines):
        lines = [line for line in lines if not line.startswith("#") and not re.fullmatch(r"[-*_ ]+", line)]
    return [line for line in lines if not line.rstrip("*_ ").endswith(":")]


def _clean(items: Iterable[str]) -> list[str]:
    out = []
    for item in items:
        item = EMPHASIS.sub(r"\2", re.sub(r"^#{1,6}[ \t]+", "", item.strip()), count=1) if item.lstrip()[:1] in "*_#" else item.strip()
        item = item.strip()
        if len(item) > 1 and QUOTES.get(item[0]) == item[-1] and item[0] not in item[1:-1]:
            item = item[1:-1].strip()
        if item and len(item) <= MAX_ITEM_CHARS:
            out.append(item)
    return out
