"""Links from pages into the studio; and the files of samples that evaluations and curations write, as rows that it can show."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from gristmill.core.io import read_json
from gristmill.data.rows import read_records
from gristmill.report.markup import Markup, el

STUDIO_PORT = 8600  # where `gristmill studio` listens unless told otherwise
PATTERNS = ("samples.json", "samples.jsonl", "*.samples.jsonl", "samples/*.jsonl")  # in the folder of a run, a stage or an evaluation
MAX_FACT_CHARS = 60  # of a value that is shown beside the texts
TEXTS = frozenset(  # fields that are shown as texts, however short
    {"text", "answer", "out", "context", "reply", "question", "instruction", "first", "second", "output_1", "output_2", "baseline"}
)


def studio_link(source: str, place: int) -> Markup:
    """A link to a row in the studio, which shows the other answers to its prompt beside it.

    Args:
        source: the row's file, by its path in the folder that the studio has open.
        place: its number in there, from 0.
    """
    row = urlencode({"source": source, "place": place})
    return el("a", "open in the studio", href=f"http://127.0.0.1:{STUDIO_PORT}/#/rows?{row}", rel="noreferrer")


@dataclass(frozen=True)
class Sample:
    """A sample for reading.

    Attributes:
        id: its own, or the place.
        text: all that it says, to be searched.
        meta: `messages` that were asked, `parts` (label and text each), `facts`, and `at`, its place in the file.
    """

    id: str
    text: str
    meta: dict[str, Any]


def sample_files(folder: Path) -> list[Path]:
    """Files of samples in a folder, in a fixed order."""
    return [path for pattern in PATTERNS for path in sorted(folder.glob(pattern)) if path.is_file()]


def read_samples(path: Path) -> Iterator[Sample]:
    """The samples of a file: a line each, or of a JSON object the objects in its lists, as `walk` finds them.

    Raises:
        InputError: the file is damaged.
    """
    if path.suffix == ".json":
        found = ((record, ", ".join(place)) for place, record in walk(read_json(path)))
    else:
        found = ((record, f"line {number}") for number, record in enumerate(read_records(path) if path.stat().st_size else (), 1))
    for record, at in found:
        yield _sample(record, at)


def walk(value: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """The objects with a text in nested objects and lists, in order, each with the names that lead to it."""
    if isinstance(value, Mapping):
        if "text" in value and not isinstance(value["text"], list | Mapping):
            yield place, value
            return
        for name, one in value.items():
            yield from walk(one, (*place, name))
    elif isinstance(value, list):
        for number, one in enumerate(value, 1):
            yield from walk(one, (*place[:-1], f"{place[-1]} {number}".strip()) if place else (str(number),))


def _sample(record: Mapping[str, Any], at: str) -> Sample:
    """A record: turns as such, long values as texts with their names, short ones as facts."""
    messages, parts, facts = list[dict[str, str]](), list[tuple[str, str]](), dict[str, Any]()
    for name, value in record.items():
        if name == "messages" and _are_turns(value):
            messages = [{"role": str(turn["role"]), "content": str(turn.get("content") or "")} for turn in value]
            continue
        texts = value if isinstance(value, list) and value and all(isinstance(one, str) for one in value) else [value]
        for number, one in enumerate(texts, 1):
            said = one if isinstance(one, str) else json.dumps(one, ensure_ascii=False)
            if name in TEXTS or len(said) > MAX_FACT_CHARS or len(texts) > 1:
                parts.append((name if len(texts) == 1 else f"{name} {number}", said))
            elif one not in (None, "", [], {}):
                facts[name] = one if isinstance(one, str | int | float) else said
    said = "\n".join([*(turn["content"] for turn in messages), *(text for _, text in parts)])
    meta = {"at": at, "messages": messages, "parts": parts, "facts": facts}
    return Sample(str(record.get("id") or record.get("doc_id") or at), said, meta)


def _are_turns(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(turn, Mapping) and "role" in turn for turn in value)
