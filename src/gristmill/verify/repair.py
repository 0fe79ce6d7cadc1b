"""Answer repair: text edits that make a failing answer follow verifiable instructions (IFEval's 25 types, lists, JSON for a schema).

Rejection sampling learns nothing where no sample passes. An edit by a program starts from 0: lower case, an end phrase, sections, a
title. The edits of instructions are in `instruction_edits.py`. The verifier that failed the answer looks again, and only what passes is
given back. An answer's own words stay: a length is met by whole sentences, of this answer or of others to the same prompt, never by filler.
"""

import json
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from gristmill.core.response_text import answer_text, repetition, strip_thinking
from gristmill.verify.ifeval import check_instructions, sentence_ends
from gristmill.verify.instruction_edits import EDITS
from gristmill.verify.json_schema import extract_json, schema_error, validation_error
from gristmill.verify.text_edits import MAX_REPETITION, MIN_WORDS, WORD, RepairJob
from gristmill.verify.verify import verify

REPAIRED_KINDS = ("instructions", "list", "schema")  # to repair a number or a program would be to write the solution down
MAX_TRIES = 4  # a limit on words is met again with less room, for what later edits add
MAX_CHARS = 100_000  # of an answer that is edited


@dataclass(frozen=True)
class Repaired:
    """A repaired answer.

    Attributes:
        edits: what failed and now holds: ids of instructions, or the truth's kind. None: the answer passed as it is.
        sources: places of the other answers that sentences were taken from.
    """

    text: str
    edits: tuple[str, ...] = ()
    sources: tuple[int, ...] = ()


def repair(truth: dict[str, Any], answer: str, others: Sequence[str] = ()) -> Repaired | None:
    """Repair an answer so that it passes its truth; None where no edit does that without harm.

    Args:
        truth: of the kind `instructions`, `list` or `schema` (verify.py); of any other kind no answer can be repaired.
        others: other answers to the same prompt, whose sentences may be joined where an answer is too short.

    Raises:
        InputError: as `verify`.
    """
    if truth.get("kind") not in REPAIRED_KINDS:
        return None
    if verify(truth, answer):
        return Repaired(answer)
    if not answer.strip() or len(answer) > MAX_CHARS:
        return None
    if truth["kind"] == "instructions":
        return _repair_instructions(truth, answer, others)
    text = (_repair_list if truth["kind"] == "list" else _repair_schema)(truth, answer)
    return Repaired(text, (truth["kind"],)) if text is not None and verify(truth, text) else None


def _repair_instructions(truth: dict[str, Any], answer: str, others: Sequence[str]) -> Repaired | None:
    said = strip_thinking(answer)
    thought = answer.removesuffix(said) if answer.endswith(said) else ""
    job = RepairJob(truth["checks"], [strip_thinking(o) for o in others], bool(truth.get("loose")), random.Random(answer))
    first = job.passed(said)
    order = {name: place for place, name in enumerate(EDITS)}
    ordered = sorted(job.checks, key=lambda check: order[check["id"]])
    for _ in range(MAX_TRIES):
        text = said.strip()
        job.sources.clear()
        for _ in range(2):  # what a later edit has broken is mended once more
            for check in ordered:
                if not check_instructions([check], text, loose=job.loose)[0]:
                    kwargs = {key: value for key, value in check.items() if key != "id" and value is not None}
                    text = EDITS[check["id"]](text, job, **kwargs)
        if all(job.passed(text)):
            whole = thought + text
            edits = tuple(str(check["id"]) for check, ok in zip(job.checks, first, strict=True) if not ok)
            fine = _is_natural(text, said) and verify(truth, whole)
            return Repaired(whole, edits, tuple(sorted(job.sources))) if fine else None
        if not _make_room(job, text):
            return None
    return None


def _make_room(job: RepairJob, text: str) -> bool:
    """Take note of how far an answer is over its limits of words and sentences; whether it is."""
    over = False
    for check, ok in zip(job.checks, job.passed(text), strict=True):
        if ok or check.get("relation") != "less than" or not check["id"].startswith("length_constraints:"):
            continue
        num = len(re.findall(r"\w+", text)) if "num_words" in check else len(sentence_ends(text)) + 1
        limit = check.get("num_words", check.get("num_sentences", 0))
        job.spare[check["id"]] = job.spare.get(check["id"], 0) + num - limit + 1
        over = True
    return over


def _is_natural(text: str, before: str) -> bool:
    """Whether an edited answer is still one: it has words, and does not repeat itself more than it did."""
    num, had = len(WORD.findall(text)), len(WORD.findall(before))
    return num >= min(MIN_WORDS, had) and repetition(text) <= max(MAX_REPETITION, repetition(before))


# ---- our own formats ----


def _repair_list(truth: dict[str, Any], answer: str) -> str | None:
    """A list in its form: of the things that the answer names, those that belong, each once."""
    text = answer_text(answer)
    known = {str(word).lower(): str(word) for word in truth["words"]}
    found = dict.fromkeys(w.lower() for w in re.findall(r"[A-Za-z]+", text) if w.lower() in known)
    items = [known[w] for w in found][: truth["n"]]
    if len(items) < truth["n"]:
        return None
    extras, shape = truth["extras"], truth["shape"]
    items = sorted(items, key=str.lower) if "sorted" in extras else items
    forms = {"commas": ", ", "slashes": " / ", "brackets": " ", "dashes": "\n", "numbered": "\n"}
    shown = [f"[{w}]" if shape == "brackets" else f"- {w}" if shape == "dashes" else f"{i}. {w}" if shape == "numbered" else w
             for i, w in enumerate(items, 1)]  # fmt: skip
    out = ("here " if "start" in extras else "") + forms[shape].join(shown) + (" stop" if "end" in extras else "")
    return out.upper() if "upper" in extras else out


def _repair_schema(truth: dict[str, Any], answer: str) -> str | None:
    """JSON for a schema: commas too many, quotes of other languages, surplus fields and numbers written as text are mended."""
    schema = truth["schema"]
    text = answer_text(answer)
    loosely = [re.sub(r",\s*([}\]])", r"\1", text)]
    words = {"True": "true", "False": "false", "None": "null"}
    loosely.append(re.sub(r"\b(?:True|False|None)\b", lambda m: words[m[0]], loosely[0]))
    loosely.append(re.sub(r"(?<=[\[{,:\s])'([^'\"\n]*)'(?=\s*[,:}\]])", r'"\1"', loosely[1]))
    for candidate in (text, *loosely):
        value = extract_json(candidate)
        if value is not None and not schema_error(schema):
            value = _coerced(value, schema, 0)
            if not validation_error(value, schema):
                return json.dumps(value, indent=2, ensure_ascii=False)
    return None


def _coerced(value: Any, schema: Any, depth: int) -> Any:
    """A value nearer to its schema, where that loses nothing but what the schema forbids."""
    if not isinstance(schema, dict) or depth > 32:
        return value
    wanted = schema.get("type")
    if wanted == "object" and isinstance(value, list) and len(value) == 1:
        value = value[0]
    if wanted == "array" and not isinstance(value, list):
        value = [value]
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        kept = properties if schema.get("additionalProperties") is False else {*properties, *value}
        return {k: _coerced(v, properties.get(k), depth + 1) for k, v in value.items() if k in kept}
    if isinstance(value, list):
        return [_coerced(v, schema.get("items"), depth + 1) for v in value]
    if isinstance(value, str) and wanted in ("integer", "number") and re.fullmatch(r"\s*-?\d{1,15}(?:\.\d{1,15})?\s*", value):
        number = float(value)
        return int(number) if number.is_integer() else number
    if isinstance(value, str) and wanted == "boolean" and value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    if wanted == "string" and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return value


def instructions_of(truth: dict[str, Any] | None) -> Iterable[str]:
    """The types that an answer to a truth is counted under: ids of instructions, or the truth's kind."""
    if truth is None or truth.get("kind") not in REPAIRED_KINDS:
        return []
    return dict.fromkeys(str(check["id"]) for check in truth["checks"]) if truth["kind"] == "instructions" else [truth["kind"]]
