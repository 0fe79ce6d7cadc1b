"""Parsing of free-form answers: lists without a second call, as JSON, YAML, numbered, bulleted or plain lines."""

import json
import re
import unicodedata
from collections.abc import Iterable

MARKER = re.compile(r"^(?P<indent>[ \t]*)(?P<marker>\(?\d{1,4}[.):](?=\s|$)|[-*+\u2022\u2013](?=\s))[ \t]*(?P<text>.*)$")
FENCE = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)^[ \t]*```", re.S | re.M)
QUOTES = {'"': '"', "'": "'", "\u201c": "\u201d", "\u2018": "\u2019", "`": "`"}
AROUND = " .,;:!?\"'`*_\u201c\u201d\u2018\u2019\u2026()[]"
MAX_ITEM_CHARS = 20_000  # characters of an item; more is no item of a list


def parse_list(text: str) -> list[str]:
    """Parse a list: its items in order; [] where there is none.

    A JSON array is read as such. Otherwise lines with the outermost marker (`1.`, `2)`, `-`, `*`) begin items, and what follows
    a marked line belongs to its item, nested lists included. Without markers every line is an item, introductions aside.
    """
    blocks = FENCE.findall(text)
    for source in (*blocks, text):
        if found := _json_list(source):
            return found
    return _clean(next((found for source in (*blocks, text) if (found := _marked(source))), []) or _plain(text))


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
    """Parse a yes/no answer by its first word; None where it is neither."""
    word = re.match(r"[\s*_\"'`(\[]*(yes|no)\b", text, re.I)
    return None if word is None else word[1].lower() == "yes"


def _json_list(text: str) -> list[str]:
    start, end = text.find("["), text.rfind("]")
    if start < 0 or end < start or text[:start].strip().count("\n") > 3:
        return []
    try:
        found = json.loads(text[start : end + 1])
    except (ValueError, RecursionError):
        return []
    items = []
    for item in found if isinstance(found, list) else ():
        if isinstance(item, dict) and len(item) == 1:
            item = next(iter(item.values()))
        if not isinstance(item, str):
            return []
        items.append(item)
    return _clean(items)


def _marked(text: str) -> list[str]:
    lines = text.split("\n")
    found = [(number, match) for number, line in enumerate(lines) if (match := MARKER.match(line))]
    if not found:
        return []
    outermost = min(len(match["indent"].expandtabs(4)) for _, match in found)
    outer = [(number, match) for number, match in found if len(match["indent"].expandtabs(4)) == outermost]
    if any(match["marker"].strip("(")[0].isdigit() for _, match in outer):  # bullets between numbers belong to them
        outer = [(number, match) for number, match in outer if match["marker"].strip("(")[0].isdigit()]
    items = []
    for (number, match), (following, _) in zip(outer, [*outer[1:], (len(lines), None)], strict=True):
        rest = lines[number + 1 : following]
        while rest and not rest[-1].strip():
            rest.pop()
        if following == len(lines) and "" in [line.strip() for line in rest]:  # words after a blank line close the list
            rest = rest[: [line.strip() for line in rest].index("")]
        items.append("\n".join([match["text"], *(line.strip() for line in rest)]).strip())
    return items


def _plain(text: str) -> list[str]:
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    return [line for line in lines if not line.endswith(":")] if len(lines) > 1 else []


def _clean(items: Iterable[str]) -> list[str]:
    out = []
    for item in items:
        item = item.strip().strip("*").strip() if item.startswith("**") and item.endswith("**") else item.strip()
        if len(item) > 1 and QUOTES.get(item[0]) == item[-1] and item[0] not in item[1:-1]:
            item = item[1:-1].strip()
        if item and len(item) <= MAX_ITEM_CHARS:
            out.append(item)
    return out
