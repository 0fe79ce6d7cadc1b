"""Readers of users' files, checked before any work is spent: conversations, ratings, prompts, pairs, documents."""

import math
from pathlib import Path
from typing import Any

from gristmill.core.errors import InputError
from gristmill.data.chat import Conversation, check_turns, conversation
from gristmill.data.rows import ATTRIBUTES, Demonstration, Pair, Prompt, Rated, make_id, read_records
from gristmill.data.truths import read_truth
from gristmill.verify.verify import check_truth


def _rows(path: Path, what: str) -> list[tuple[int, dict[str, Any]]]:
    records = read_records(path)
    if not records:
        raise InputError(f"{path} holds no rows: {what} must not be empty.")
    return list(enumerate(records, 1))


def _messages(path: Path, number: int, record: dict[str, Any], ends: str) -> Conversation:
    try:
        if record.get("messages") is not None:
            messages = conversation(record["messages"])
        elif ends == "assistant":
            messages = conversation([{"role": "user", "content": record["prompt"]}, {"role": "assistant", "content": record["response"]}])
        else:
            messages = conversation([{"role": "user", "content": record["prompt"]}])
        check_turns(messages)
    except KeyError as e:
        raise InputError(f"Row {number} of {path} lacks {e}: give `messages`, or `prompt` (and `response`).") from e
    except (InputError, TypeError) as e:
        raise InputError(f"Row {number} of {path}: {e}") from e
    if messages[-1].role != ends:
        raise InputError(f"Row {number} of {path} must end with the {ends}.")
    return messages


def read_demonstrations(path: Path) -> list[Demonstration]:
    """Conversations that end with the assistant."""
    out = []
    for number, r in _rows(path, "demonstrations"):
        messages = _messages(path, number, r, "assistant")
        out.append(Demonstration(make_id("human", number, [m.content for m in messages]), _task(path, number, r), messages, "human"))
    return out


def read_ratings(path: Path) -> list[Rated]:
    """Conversations with ratings of their last answer."""
    out = []
    for number, r in _rows(path, "ratings"):
        messages = _messages(path, number, r, "assistant")
        labels = tuple(_label(path, number, a, r.get(a)) for a in ATTRIBUTES)
        if all(x is None for x in labels):
            raise InputError(f"Row {number} of {path} has none of the columns {', '.join(ATTRIBUTES)}.")
        pair = make_id([m.content for m in messages[:-1]])
        out.append(Rated(make_id("rated", number, [m.content for m in messages]), _task(path, number, r), messages, labels, pair))
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
        messages = _messages(path, number, r, "user")
        out.append(Prompt(make_id(origin, number, [m.content for m in messages]), _task(path, number, r), messages, origin, (), known))
    return out


def _task(path: Path, number: int, record: dict[str, Any]) -> str:
    task = record.get("task")
    if task is not None and not isinstance(task, str):
        raise InputError(f"Row {number} of {path} has the task {task!r}: give a name.")
    return task or "general"


def _label(path: Path, number: int, name: str, value: Any) -> float | None:
    """A mark, or None where there is none (NaN in tables that have no other way to say so)."""
    try:
        mark = math.nan if value is None else float(value)
    except (TypeError, ValueError) as e:
        raise InputError(f"Row {number} of {path} has {name} {value!r}: give a number from 0 to 4.") from e
    if math.isinf(mark):
        raise InputError(f"Row {number} of {path} has {name} {value!r}: give a number from 0 to 4.")
    return None if math.isnan(mark) else mark


def read_pairs(path: Path) -> list[Pair]:
    """Pairs of our own files, or plain ones: `prompt` (or `messages`), `chosen`, `rejected`, optional rewards."""
    out = []
    for number, r in enumerate(read_records(path), 1):
        try:
            turns = r["messages"] if r.get("messages") is not None else [{"role": "user", "content": r["prompt"]}]
            for answer in (r["chosen"], r["rejected"]):
                talk = conversation([*turns, {"role": "assistant", "content": answer}])
                check_turns(talk)
        except KeyError as e:
            raise InputError(f"Row {number} of {path} lacks {e}: give prompt (or messages), chosen and rejected.") from e
        except (InputError, TypeError) as e:
            raise InputError(f"Row {number} of {path}: {e}") from e
        rewards = _reward(path, number, r, "chosen_reward", 1.0), _reward(path, number, r, "rejected_reward", 0.0)
        name = str(r.get("id") or make_id(number, r["chosen"]))
        out.append(Pair(name, "", r.get("task") or "", talk[:-1], r["chosen"], r["rejected"], *rewards, "file"))
    if not out:
        raise InputError(f"{path} holds no pairs.")
    return out


def _reward(path: Path, number: int, record: dict[str, Any], name: str, default: float) -> float:
    value = default if record.get(name) is None else record[name]
    try:
        reward = float(value)
    except (TypeError, ValueError):
        reward = math.nan
    if not math.isfinite(reward):
        raise InputError(f"Row {number} of {path} has {name} {value!r}: give a number, or leave it out.")
    return reward
