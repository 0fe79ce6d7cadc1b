"""Readers of users' files, checked before any work is spent: conversations, ratings, prompts, pairs, documents."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gristmill.core.config import CONTROL
from gristmill.core.errors import InputError
from gristmill.core.untrusted import quoted
from gristmill.data.chat import Conversation
from gristmill.data.formats import REWARDS, parse_conversation, parse_pair
from gristmill.data.rows import ATTRIBUTES, Demonstration, Pair, Prompt, Rated, make_id, read_records
from gristmill.data.truths import TRUTH_COLUMNS, read_truth
from gristmill.verify.verify import check_truth

MAX_TASK_CHARS = 200  # of a name that stands in tables
MISSING = -100  # how HelpSteer's files write a mark that nobody gave


def _rows(path: Path, what: str) -> list[tuple[int, dict[str, Any]]]:
    records = read_records(path)
    if not records:
        raise InputError(f"{path} holds no rows: {what} must not be empty.")
    return list(enumerate(records, 1))


COLUMNS = ("id", "task")  # which every row may have
FINISHED = ("chosen_finished", "rejected_finished")  # of pairs: false for an answer that was cut off


def _messages(
    path: Path, number: int, record: dict[str, Any], known: Sequence[str] = (), *, answered: bool, tools: bool = False
) -> tuple[Conversation, dict[str, Any]]:
    try:
        return parse_conversation(record, answered=answered, known=(*COLUMNS, *known), tools=tools)
    except InputError as e:
        raise InputError(f"Row {number} of {path}: {e}") from e


def read_demonstrations(path: Path) -> list[Demonstration]:
    """Conversations that end with the assistant; calls of tools are taken, where the model's chat template has them."""
    out = []
    for number, r in _rows(path, "demonstrations"):
        messages, meta = _messages(path, number, r, answered=True, tools=True)
        if not any(m.trained for m in messages if m.role == "assistant"):
            raise InputError(f"Row {number} of {path} has no answer to learn from: all have weight 0. Leave it out.")
        name = make_id("human", number, [m.content for m in messages])
        out.append(Demonstration(name, _task(path, number, r), messages, "human", meta=meta))
    return out


def read_ratings(path: Path) -> list[Rated]:
    """Conversations with ratings of their last answer."""
    out = []
    for number, r in _rows(path, "ratings"):
        messages, meta = _messages(path, number, r, (*ATTRIBUTES, "labels", "pair"), answered=True)
        own = r.get("labels")  # our own rows hold them so
        marks = own if isinstance(own, list) and len(own) == len(ATTRIBUTES) else [r.get(a) for a in ATTRIBUTES]
        labels = tuple(_label(path, number, a, mark) for a, mark in zip(ATTRIBUTES, marks, strict=True))
        if all(x is None for x in labels):
            raise InputError(f"Row {number} of {path} has none of the columns {', '.join(ATTRIBUTES)}.")
        pair = make_id([m.content for m in messages[:-1]])
        name = make_id("rated", number, [m.content for m in messages])
        out.append(Rated(name, _task(path, number, r), messages, labels, pair, meta))
    return out


def read_prompts(path: Path, origin: str, truth: bool = False) -> list[Prompt]:
    """Conversations that end with the user; with `truth` each must say what is right (truths.py)."""
    out = []
    for number, r in _rows(path, "prompts"):
        try:
            known = read_truth(r)
            if known is not None:
                check_truth(known)
        except InputError as e:
            raise InputError(f"Row {number} of {path}: {e}") from e
        if truth and known is None:
            raise InputError(
                f"Row {number} of {path} has neither `truth` nor `answer`, and no tests: the evaluation must know what is right."
            )
        messages, meta = _messages(path, number, r, TRUTH_COLUMNS, answered=False)
        name = make_id(origin, number, [m.content for m in messages])
        out.append(Prompt(name, _task(path, number, r), messages, origin, (), known, meta=meta))
    return out


def _task(path: Path, number: int, record: dict[str, Any]) -> str:
    task = record.get("task")
    if task is not None and (not isinstance(task, str) or len(task) > MAX_TASK_CHARS or CONTROL.search(task)):
        raise InputError(f"Row {number} of {path} has the task {quoted(task)}: give a name, on one line.")
    return task or "general"


def _label(path: Path, number: int, name: str, value: Any) -> float | None:
    """A mark, or None where there is none (NaN in tables that have no other way to say so, -100 in HelpSteer's)."""
    try:
        mark = math.nan if value is None else float(value)
    except (TypeError, ValueError) as e:
        raise InputError(f"Row {number} of {path} has {name} {value!r}: give a number from 0 to 4.") from e
    if math.isnan(mark) or mark == MISSING:
        return None
    if not 0 <= mark <= 4:
        raise InputError(f"Row {number} of {path} has {name} {value!r}: give a number from 0 to 4.")
    return mark


def read_pairs(path: Path) -> list[Pair]:
    """Pairs of our own files and exports, or of TRL's forms: a prompt, `chosen`, `rejected`, optional rewards."""
    out = []
    known = (*COLUMNS, "judge", "parents", *FINISHED, *(name for names in REWARDS for name in names))
    for number, r in enumerate(read_records(path), 1):
        try:
            messages, chosen, rejected, meta = parse_pair(r, known=known)
        except InputError as e:
            raise InputError(f"Row {number} of {path}: {e}") from e
        better, worse = next((names for names in REWARDS if r.get(names[0]) is not None or r.get(names[1]) is not None), REWARDS[0])
        rewards = _reward(path, number, r, better, 1.0), _reward(path, number, r, worse, 0.0)
        name = str(r.get("id") or make_id(number, chosen))
        ended = [_flag(path, number, r, key) for key in FINISHED]
        task = _task(path, number, r) if r.get("task") else ""
        out.append(Pair(name, "", task, messages, chosen, rejected, *rewards, "file", (), meta, *ended))
    if not out:
        raise InputError(f"{path} holds no pairs.")
    if all(_repeats(pair.messages[-1].content, pair.chosen, pair.rejected) for pair in out):
        raise InputError(
            f"In every row of {path} both answers begin with the prompt (TRL's form of plain texts): take it out of `chosen` and "
            "`rejected`, or it would be learnt as a part of the answer."
        )
    return out


def _flag(path: Path, number: int, record: dict[str, Any], name: str) -> bool:
    flag = record.get(name)
    if flag not in (None, True, False):
        raise InputError(f"Row {number} of {path} has {name} {flag!r}: give true, or false for an answer that was cut off.")
    return flag is not False


def _repeats(prompt: str, *answers: str) -> bool:
    return bool(prompt) and all(answer.startswith(prompt) and answer != prompt for answer in answers)


def _reward(path: Path, number: int, record: dict[str, Any], name: str, default: float) -> float:
    value = default if record.get(name) is None else record[name]
    try:
        reward = float(value)
    except (TypeError, ValueError):
        reward = math.nan
    if not math.isfinite(reward):
        raise InputError(f"Row {number} of {path} has {name} {value!r}: give a number, or leave it out.")
    return reward
