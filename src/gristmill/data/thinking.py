"""The thinking toggle: a system line that switches thinking on or off, the form of an answer that thinks, and records that hold both.

Source: Llama-Nemotron (2505.00949), section 4: the lines, and on/off pairs of answers to the same prompts.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from gristmill.core.errors import InputError
from gristmill.data.chat import Conversation, Message, to_dicts
from gristmill.data.tokenizer import Tokenizer

THINKING_ON, THINKING_OFF = "detailed thinking on", "detailed thinking off"
OPEN, CLOSE = "<think>", "</think>"
Mode = Literal["on", "off"]
LINES: dict[Mode, str] = {"on": THINKING_ON, "off": THINKING_OFF}
_TAG = re.compile(r"<\s*/?\s*think", re.I)


def hidden_tag(tokenizer: Tokenizer) -> str | None:
    """The tag of thinking that is a control token, so that no answer shows it; None where both can be read."""
    return next((tag for tag in (OPEN, CLOSE) if tokenizer.has(tag) and not tokenizer.decode([tokenizer.special_id(tag)])), None)


def check_shown(tokenizer: Tokenizer, name: object, otherwise: str) -> None:
    """InputError where a model's tags of thinking are not to be seen in its answers.

    Args:
        otherwise: what else the reader can do.
    """
    if (tag := hidden_tag(tokenizer)) is not None:
        raise InputError(
            f"{name}: {tag} is a control token there, which no answer shows, so that its thinking cannot be told apart: "
            f'set "special": false for it in tokenizer.json, or {otherwise}.'
        )


def toggle_of(messages: Sequence[Message]) -> Mode | None:
    """The mode that a conversation's system turn asks for; None where it says nothing of it.

    Raises:
        InputError: it asks for both.
    """
    lines = {line.strip().lower() for m in messages if m.role == "system" for line in m.content.splitlines()}
    found: list[Mode] = [mode for mode, line in LINES.items() if line in lines]
    if len(found) > 1:
        raise InputError(f"The system turn says both {THINKING_ON!r} and {THINKING_OFF!r}: keep one of the lines.")
    return found[0] if found else None


def thinks(messages: Sequence[Message]) -> bool:
    """Whether a prompt's system turn switches thinking on."""
    return any(line.strip().lower() == THINKING_ON for m in messages if m.role == "system" for line in m.content.splitlines())


def with_toggle(messages: Sequence[Message], mode: Mode) -> Conversation:
    """The conversation with the toggle's line for a mode in front of its system turn, in place of one that is there."""
    first = messages[0] if messages and messages[0].role == "system" else None
    said = [line for line in (first.content.splitlines() if first else ()) if line.strip().lower() not in LINES.values()]
    rest = "\n".join(said).strip("\n")
    content = f"{LINES[mode]}\n\n{rest}" if rest else LINES[mode]
    system = Message("system", content) if first is None else replace(first, content=content)
    return (system, *(messages if first is None else messages[1:]))


def thinking_answer(trace: str, reply: str) -> str:
    """An answer that thinks first."""
    return f"{OPEN}{trace}{CLOSE}{reply}"


def split_answer(text: str) -> tuple[str, str]:
    """Trace and reply of an answer that keeps the form; all of another is its reply."""
    body, close, reply = text.removeprefix(OPEN).partition(CLOSE)
    return (body, reply) if text.startswith(OPEN) and close else ("", text)


def keeps_form(text: str, thinking: bool) -> bool:
    """With thinking: one block that is not empty, in front, and a reply behind it. Without: no tag at all."""
    if not thinking:
        return not _TAG.search(text)
    body, close, reply = text.removeprefix(OPEN).partition(CLOSE)
    return text.startswith(OPEN) and bool(close and body.strip() and reply.strip()) and not _TAG.search(body) and not _TAG.search(reply)


def nemotron_record(messages: Sequence[Message], *, category: str, generator: str) -> dict[str, Any]:
    """A conversation that ends with its answer, as a record of the Llama-Nemotron post-training dataset."""
    system = messages[0].content if messages[0].role == "system" else ""
    return {
        "input": to_dicts([m for m in messages[:-1] if m.role != "system"]),
        "output": messages[-1].content,
        "reasoning": toggle_of(messages) or ("on" if messages[-1].content.startswith(OPEN) else "off"),
        "system_prompt": system,
        "category": category,
        "generator": generator,
    }


def with_recorded_toggle(messages: Sequence[Message], mode: Any) -> Conversation:
    """A record's conversation with the toggle that its `reasoning` names, where its system turn does not say it itself.

    Raises:
        InputError: both are there and differ.
    """
    said = toggle_of(messages)
    if mode not in LINES or said == mode:
        return tuple(messages)
    if said is not None:
        raise InputError(f"`reasoning` is {mode!r} and the system turn says {LINES[said]!r}: correct one of them.")
    return with_toggle(messages, mode)
