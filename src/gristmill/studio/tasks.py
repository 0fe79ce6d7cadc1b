"""Annotation tasks: what an answer of each kind of project says, and which side of a pair a person sees on the left."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from gristmill.core.errors import InputError
from gristmill.data.rows import ATTRIBUTES
from gristmill.runs.checks import REPAIR, VERDICTS
from gristmill.studio.consensus import NEITHER, Consensus, check_consensus, preference_consensus, rating_consensus
from gristmill.studio.database import clean

RATE, PAIR = "rate", "pair"
CHECK = "check"  # of a round's rows; such a project is made by the studio itself, when a run asks
KINDS = (RATE, PAIR)
FLAGS = ("pii", "not English", "unsafe", "broken", "unsure")
MAX_VALUE, MAX_STRENGTH, MAX_CONFIDENCE = 4, 3, 3
MAX_NEED = 25  # people an item
MAX_NOTE_CHARS, MAX_REPAIR_CHARS = 4000, 100_000


FIELDS: dict[str, set[str]] = {
    RATE: {*ATTRIBUTES, "unsafe", "confidence", "reason"},
    PAIR: {"preference", NEITHER, "reason"},
    CHECK: {"verdict", "text", "reason"},
}


def check_content(kind: str, content: Any) -> dict[str, Any]:
    """An answer's content, with every field that it has.

    Raises:
        InputError: a value is missing, is of another type, or is out of its range.
    """
    if not isinstance(content, Mapping):
        raise InputError("An answer needs its values as an object.")
    fields = FIELDS[kind]
    if unknown := sorted(map(str, set(content) - fields)):
        raise InputError(f"An answer has no field {clean(unknown[0])[:40]!r}: it has {', '.join(sorted(fields))}.")
    if kind == RATE:
        out: dict[str, Any] = {name: _whole(content, name, 0, MAX_VALUE) for name in ATTRIBUTES}
        out["unsafe"] = _flag(content, "unsafe")
        if content.get("confidence") is not None:
            out["confidence"] = _whole(content, "confidence", 1, MAX_CONFIDENCE)
    elif kind == CHECK:
        out = _verdict(content)
    else:
        neither = _flag(content, NEITHER)
        out = {"preference": 0 if neither else _whole(content, "preference", -MAX_STRENGTH, MAX_STRENGTH), NEITHER: neither}
    return out | {"reason": check_note(content.get("reason", ""))}


def _verdict(content: Mapping[str, Any]) -> dict[str, Any]:
    """A verdict on a row that is about to be trained on; of a repaired one, its answer as it should be."""
    verdict, text = content.get("verdict"), content.get("text", "")
    if verdict not in VERDICTS:
        raise InputError(f"verdict must be one of {', '.join(VERDICTS)}.")
    if verdict != REPAIR:
        return {"verdict": verdict}
    if not isinstance(text, str) or not text.strip() or len(text) > MAX_REPAIR_CHARS:
        raise InputError(f"A repaired answer needs its new text, of at most {MAX_REPAIR_CHARS:,} characters.")
    return {"verdict": verdict, "text": clean(text)}


def _whole(content: Mapping[str, Any], name: str, low: int, high: int) -> int:
    value = content.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        given = "nothing" if value is None else repr(value)[:40] if isinstance(value, int | float) else "something else"
        raise InputError(f"{name} must be a whole number from {low} to {high}, and it is {given}.")
    return value


def _flag(content: Mapping[str, Any], name: str) -> bool:
    value = content.get(name, False)
    if not isinstance(value, bool):
        raise InputError(f"{name} must be true or false.")
    return value


def check_note(text: Any) -> str:
    """A person's words, as they can be stored.

    Raises:
        InputError: they are no text, or too long.
    """
    if not isinstance(text, str) or len(text) > MAX_NOTE_CHARS:
        raise InputError(f"A note must be text of at most {MAX_NOTE_CHARS:,} characters.")
    return clean(text)


def check_need(need: Any) -> int:
    """How many people an item needs.

    Raises:
        InputError: it is no number, or out of its range.
    """
    if isinstance(need, bool) or not isinstance(need, int) or not 1 <= need <= MAX_NEED:
        raise InputError(f"An item needs from 1 to {MAX_NEED} people.")
    return need


def swapped(item: str, person: str) -> bool:
    """Whether a person sees the second answer of a pair on the left: by a hash, so always the same, and half of the time."""
    return bool(hashlib.blake2b(f"{item}/{person}".encode(), digest_size=1).digest()[0] & 1)


def from_sides(content: dict[str, Any], turned: bool) -> dict[str, Any]:
    """Content in which -3 means that the first answer is far better, of content in which it means the left one; and back."""
    return content | {"preference": -content["preference"]} if turned and content.get("preference") else content


def consensus_of(kind: str, answers: Sequence[Mapping[str, Any]]) -> Consensus:
    """Consensus of the contents of an item's answers, in the order in which they came."""
    rules = {RATE: rating_consensus, PAIR: preference_consensus, CHECK: check_consensus}
    return rules[kind](answers)
