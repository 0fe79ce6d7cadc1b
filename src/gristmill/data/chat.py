"""Conversations: turns with roles, from dicts and to dicts, and what they must be."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

from gristmill.core.errors import InputError
from gristmill.data.tokenizer import SURROGATE

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Attributes:
        trained: false for an answer that is context, on which no loss is taken (`weight: 0` in files).
        fields: JSON of what else a chat template may read (`tool_calls`, `tool_call_id`, `reasoning_content`, ...), or "".
    """

    role: Role
    content: str
    trained: bool = field(default=True, repr=False)
    fields: str = field(default="", repr=False)


Conversation = tuple[Message, ...]
SPOKEN: tuple[Role, ...] = ("system", "user", "assistant")  # roles that every format has


def check_turns(messages: Sequence[Message]) -> None:
    """Raise `InputError` unless turns alternate user, assistant, ... after an optional system turn.

    An assistant that calls tools may be followed by their answers, and goes on after them.
    """
    turns = list(messages)
    if turns and turns[0].role == "system":
        turns = turns[1:]
    if not turns:
        raise InputError("The conversation has no user turn: start with a message whose role is 'user'.")
    expected = "user"
    for i, message in enumerate(turns):
        if message.role == "tool" and i > 0 and (turns[i - 1].role == "tool" or '"tool_calls"' in turns[i - 1].fields):
            expected = "assistant"
            continue
        if message.role != expected:
            raise InputError(
                f"Turn {i + 1} of the conversation has role {message.role!r} where {expected!r} is due: "
                "turns must alternate, starting with the user."
            )
        expected = "assistant" if expected == "user" else "user"


def conversation(turns: Sequence[Mapping[str, Any]] | Sequence[Message], *, tools: bool = False) -> Conversation:
    """Messages from dicts with `role` and `content` (or from messages, unchanged).

    `weight: 0`, `train: false` or `training: false` marks an answer as context that is not trained.

    Args:
        tools: take calls of tools, their answers and thoughts (`reasoning_content`), which only a chat template can say.

    Raises:
        InputError: a turn lacks a field, has an unknown role, calls a tool, or its content is not text.
    """
    out = []
    for turn in turns:
        if isinstance(turn, Message):
            out.append(turn)
            continue
        fields = template_fields(turn) if tools and isinstance(turn, Mapping) else ""
        if fields and turn.get("content") is None:
            turn = {**turn, "content": ""}
        if not isinstance(turn, Mapping) or not {"role", "content"} <= turn.keys():
            raise InputError(f"A message must have 'role' and 'content', got {turn!r:.200}.")
        roles = get_args(Role) if tools else SPOKEN
        if turn["role"] not in roles or not isinstance(turn["content"], str):
            raise InputError(f"A message needs a role of {roles} and text as content, got {turn!r:.200}.")
        unsaid = ("function_call", "audio") if tools else ("tool_calls", "function_call", "tool_call_id", "audio")
        if name := next((name for name in unsaid if turn.get(name)), None):
            raise InputError(f"A message has {name!r}, which the chat formats cannot say: write it as text, or leave the message out.")
        if SURROGATE.search(turn["content"]):
            raise InputError(f"A message of the {turn['role']} holds half of a surrogate pair, which is no text: mend or remove it.")
        weights = [turn[name] for name in ("weight", "train", "training") if turn.get(name) is not None]
        if any(weight not in (0, 1) for weight in weights):  # which are False and True, too
            raise InputError(f"A message has the weight {weights[0]!r}: give 1 to train on an answer, or 0 not to.")
        out.append(Message(cast(Role, turn["role"]), turn["content"], turn["role"] != "assistant" or all(weights), fields))
    return tuple(out)


def template_fields(turn: Mapping[str, Any]) -> str:
    """JSON of what only a chat template can say of a turn: calls of tools, whose call an answer belongs to, thoughts; "" for none of them.

    Arguments of a call that are written as JSON become what they say, as templates want them.

    Raises:
        InputError: a call is of no known form.
    """
    fields: dict[str, Any] = {}
    thoughts = (turn[name] for name in ("reasoning_content", "thinking", "reasoning") if turn.get(name) and isinstance(turn[name], str))
    if turn.get("role") == "assistant" and (thought := next(thoughts, "")):
        fields["reasoning_content"] = thought
    if calls := turn.get("tool_calls"):
        fields["tool_calls"] = [_tool_call(call) for call in (calls if isinstance(calls, list | tuple) else [calls])]
    if turn.get("role") == "tool":
        fields |= {name: turn[name] for name in ("tool_call_id", "name") if isinstance(turn.get(name), str)}
    if fields and turn.get("content") is None:
        fields["content"] = None
    try:
        text = json.dumps(fields, ensure_ascii=False) if fields else ""
    except (TypeError, ValueError, RecursionError) as e:
        raise InputError(f"A call of a tool holds what is no JSON ({e}): correct it.") from None
    if SURROGATE.search(text):
        raise InputError("A call of a tool holds half of a surrogate pair, which is no text: mend or remove it.")
    return text


def _tool_call(call: Any) -> dict[str, Any]:
    inner = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise InputError("A call of a tool needs a `function` with its `name` and `arguments`.")
    arguments = inner.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            raise InputError(f"The arguments of the call of {inner['name'][:80]!r} are no JSON: correct them.") from None
    function = {k: v for k, v in inner.items() if v is not None} | {"arguments": arguments}
    return {k: v for k, v in call.items() if v is not None} | {"function": function} if inner is not call else function


def to_dicts(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The plain form of a conversation, as in JSONL files and the OpenAI API: with a `weight` only where it is 0."""
    return [
        {"role": m.role, "content": m.content} | (json.loads(m.fields) if m.fields else {}) | ({} if m.trained else {"weight": 0})
        for m in messages
    ]
