"""Responses API of OpenAI: requests as chats, and responses as items, whole or streamed as events. Nothing is stored.

Source: OpenAI's API reference for /v1/responses and its streaming events.
"""

import json
import secrets
import time
from collections.abc import Sequence
from typing import Any

from pydantic import Field, StrictBool, StrictInt, StrictStr

from gristmill.engine.async_engine import TokenEvent
from gristmill.engine.sequence import RequestState
from gristmill.server.protocol import ChatCompletionRequest, FieldError, Number, RequestBody, TemplateChatRequest, shown
from gristmill.server.responses import AnswerParser, ChatResponseBuilder, ResponseBuilder, Thought, num_output_tokens, text_keeping
from gristmill.server.tool_parser import CallDelta

TEXTS = ("text", "input_text", "output_text")
LOGPROBS = "message.output_text.logprobs"
INCLUDED = (LOGPROBS, "reasoning.encrypted_content")  # the latter is for servers that hide thinking, which this does not


class ResponsesRequest(RequestBody):
    """Body of /v1/responses: OpenAI's fields for text and functions, and the settings of a chat that OpenAI has not."""

    input: Any
    instructions: StrictStr | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    parallel_tool_calls: StrictBool | None = None
    text: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    include: list[StrictStr] | None = None
    store: StrictBool | None = None
    max_output_tokens: StrictInt | None = None
    max_thinking_tokens: StrictInt | None = Field(None, ge=0)
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: StrictInt | None = None
    min_p: Number | None = None
    seed: StrictInt | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    repetition_penalty: Number | None = None
    top_logprobs: StrictInt | None = Field(None, ge=0, le=20)
    stream: StrictBool | None = None
    stream_options: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def check(self) -> None:
        for name in self.include or ():
            if name not in INCLUDED:
                raise FieldError("include", f"'{shown(name)}' is not implemented: leave it out, or say {' or '.join(INCLUDED)}")
        effort = (self.reasoning or {}).get("effort")
        if effort not in (None, "none"):
            raise FieldError("reasoning.effort", "this server does not implement it: leave it out")

    @property
    def told_logprobs(self) -> bool:
        """Whether log-probabilities are asked for."""
        return LOGPROBS in (self.include or ()) or bool(self.top_logprobs)

    def to_chat(self, *, template: bool) -> ChatCompletionRequest:
        """The same request as a chat. Tools only with a `template`.

        Raises:
            FieldError: the input or the format of the text is not so that a chat could say it.
        """
        same = (
            "model",
            "max_thinking_tokens",
            "chat_template_kwargs",
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "seed",
            "presence_penalty",
            "frequency_penalty",
            "repetition_penalty",
        )
        fields: dict[str, Any] = {name: getattr(self, name) for name in (*same, "stream", "stream_options")}
        fields |= {"messages": to_messages(self.input, self.instructions), "max_tokens": self.max_output_tokens}
        fields |= {"response_format": self._response_format(), "logprobs": self.told_logprobs or None, "top_logprobs": self.top_logprobs}
        if template:
            # functions as the templates know them
            tools = [
                {"type": "function", "function": {k: v for k, v in tool.items() if k != "type" and v is not None}}
                for tool in self.tools or ()
                if self.tool_choice != "none"
            ]
            fields |= {"tools": tools or None}
        chat = (TemplateChatRequest if template else ChatCompletionRequest).model_validate(fields)
        chat.check()
        return chat

    def _response_format(self) -> dict[str, Any] | None:
        text = {name: value for name, value in (self.text or {}).items() if value is not None}
        for name, value in text.items():
            if name != "format" and (name, value) != ("verbosity", "medium"):
                raise FieldError(f"text.{shown(name)}", "this server does not implement it: leave it out")
        asked = text.get("format")
        if asked is not None and not isinstance(asked, dict):
            raise FieldError("text.format", "must be an object with a `type`")
        if asked is None or asked.get("type") != "json_schema":
            return asked
        return {"type": "json_schema", "json_schema": {name: value for name, value in asked.items() if name != "type"}}


def to_messages(given: Any, instructions: str | None) -> list[dict[str, Any]]:
    """Messages of a chat that say what instructions and input items say.

    Raises:
        FieldError: an item is none, or of a kind that a chat cannot say.
    """
    messages: list[dict[str, Any]] = [{"role": "system", "content": instructions}] if instructions else []
    if isinstance(given, str):
        return [*messages, {"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise FieldError("input", "must be a text, or a list of items with one at least")
    turn: dict[str, Any] | None = None  # of the assistant, to which calls and thoughts belong
    for place, item in enumerate(given):
        where = f"input.{place}"
        kind = item.get("type", "message") if isinstance(item, dict) else None
        if kind == "message":
            said = {"role": item.get("role"), "content": _text(f"{where}.content", item.get("content"))}
            if said["role"] != "assistant":
                turn = None
            elif turn is not None and not turn.get("content") and "tool_calls" not in turn:
                turn |= said
                continue
            else:
                turn = said
            messages.append(said)
        elif kind in ("function_call", "reasoning"):
            if turn is None or (kind == "reasoning" and ("tool_calls" in turn or turn.get("content"))):
                turn = {"role": "assistant", "content": None}
                messages.append(turn)
            if kind == "reasoning":
                thought = _text(f"{where}.content", item.get("content") or [])
                turn["reasoning_content"] = "\n".join(filter(None, (turn.get("reasoning_content"), thought)))
            else:
                function = {"name": item.get("name"), "arguments": item.get("arguments")}
                turn.setdefault("tool_calls", []).append({"id": item.get("call_id"), "type": "function", "function": function})
        elif kind == "function_call_output":
            turn = None
            said = {"role": "tool", "tool_call_id": item.get("call_id"), "content": _text(f"{where}.output", item.get("output"))}
            messages.append(said)
        else:
            what = f"an item of the type '{shown(str(kind))}'" if kind is not None else "something that is no item"
            raise FieldError(where, f"{what} is not implemented: give messages, function calls and their outputs")
    # a thought that no answer has followed is none of a turn
    return [one | {"content": ""} if one["content"] is None and "tool_calls" not in one else one for one in messages]


def _text(where: str, content: Any) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [None]
    told = [part.get("text") if isinstance(part, dict) and part.get("type") in (*TEXTS, "reasoning_text") else None for part in parts]
    texts = [text for text in told if isinstance(text, str)]
    if len(texts) < len(told):
        raise FieldError(where, "must be a text, or parts of the types input_text and output_text: no other is implemented")
    return "\n".join(texts)


class ResponseItems:
    """Output items of a response, as they come, and the events that tell of them."""

    def __init__(self, builder: ChatResponseBuilder) -> None:
        self._builder = builder
        self.items: list[dict[str, Any]] = []
        self._text = ""
        self._logprobs: list[dict[str, Any]] = []

    def add(self, piece: Thought | str | CallDelta, logprobs: Sequence[dict[str, Any]] = ()) -> list[dict[str, Any]]:
        """Take a piece of an answer; the events that it makes."""
        kind = "message" if isinstance(piece, str) else "reasoning" if isinstance(piece, Thought) else "function_call"
        events = []
        if self._kind != kind or (isinstance(piece, CallDelta) and piece.name):
            events = self.close() + self._open(kind, piece.name if isinstance(piece, CallDelta) else "")
        delta = piece if isinstance(piece, str) else piece.text if isinstance(piece, Thought) else piece.arguments
        self._text += delta
        if not delta:
            return events
        names = {"message": "output_text", "reasoning": "reasoning_text", "function_call": "function_call_arguments"}
        event = self._event(f"response.{names[kind]}.delta") | {"delta": delta}
        if kind == "message":
            self._logprobs += logprobs
            event["logprobs"] = list(logprobs)
        return [*events, event]

    @property
    def _kind(self) -> str:
        """Kind of the item that is open."""
        return str(self.items[-1]["type"]) if self.items and self.items[-1]["status"] == "in_progress" else ""

    def _event(self, kind: str) -> dict[str, Any]:
        place = {} if self._kind == "function_call" else {"content_index": 0}
        return {"type": kind, "item_id": self.items[-1]["id"], "output_index": len(self.items) - 1} | place

    def _open(self, kind: str, name: str) -> list[dict[str, Any]]:
        prefix = {"message": "msg", "reasoning": "rs", "function_call": "fc"}[kind]
        item: dict[str, Any] = {"id": f"{prefix}_{secrets.token_hex(12)}", "type": kind, "status": "in_progress"}
        if kind == "message":
            item |= {"role": "assistant", "content": []}
        elif kind == "reasoning":
            item |= {"summary": [], "content": []}
        else:
            num_calls = sum(one["type"] == "function_call" for one in self.items)
            item |= {"call_id": self._builder.new_call_id(name, num_calls), "name": name, "arguments": ""}
        self.items.append(item)
        self._text, self._logprobs = "", []
        added = {"type": "response.output_item.added", "output_index": len(self.items) - 1, "item": dict(item)}
        if kind == "function_call":
            return [added]
        return [added, self._event("response.content_part.added") | {"part": self._part()}]

    def _part(self) -> dict[str, Any]:
        if self._kind == "reasoning":
            return {"type": "reasoning_text", "text": self._text}
        return {"type": "output_text", "text": self._text, "annotations": [], "logprobs": self._logprobs}

    def close(self, status: str = "completed") -> list[dict[str, Any]]:
        """End the item that is open, if one is."""
        kind = self._kind
        if not kind:
            return []
        item = self.items[-1]
        if kind == "function_call":
            item["arguments"] = self._text
            events = [self._event("response.function_call_arguments.done") | {"name": item["name"], "arguments": self._text}]
        else:
            part = self._part()
            item["content"] = [part]
            name = "output_text" if kind == "message" else "reasoning_text"
            logprobs = {"logprobs": self._logprobs} if kind == "message" else {}
            events = [
                self._event(f"response.{name}.done") | {"text": self._text} | logprobs,
                self._event("response.content_part.done") | {"part": part},
            ]
        item["status"] = status
        return [*events, {"type": "response.output_item.done", "output_index": len(self.items) - 1, "item": dict(item)}]


class ResponsesBuilder(ResponseBuilder):
    """Responses and their streams of events.

    Args:
        chat: what the same answer would be as a chat: how it is parsed, and its log-probabilities.
    """

    done = b""

    def __init__(self, body: ResponsesRequest, chat: ChatResponseBuilder) -> None:
        self.body, self.chat, self.keep, self.model = body, chat, chat.keep, chat.model
        self.name = f"resp_{secrets.token_hex(16)}"
        self.created = int(time.time())
        self.items = ResponseItems(chat)
        self._parser: AnswerParser | None = None  # of a stream
        self._entries: list[dict[str, Any]] = []  # log-probabilities of tokens whose text is not told yet
        self._finish = "stop"
        self._number = 0

    def response(self, states: list[RequestState], n: int) -> dict[str, Any]:
        (state,) = states
        (out,) = state.completions
        assert out is not None
        entries = self.chat._entries(out) if self.body.told_logprobs else []
        for piece in self.chat.parser(live=False).add(text_keeping(self.chat.engine, state, out, self.keep), last=True):
            self.items.add(piece, entries)
            entries = [] if isinstance(piece, str) else entries
        return self._ended(states, out.finish)

    def token_chunks(self, index: int, text: str, event: TokenEvent, *, finish: str | None) -> list[dict[str, Any]]:
        events = []
        if self._parser is None:
            self._parser = self.chat.parser(live=True)
            begun = self._response("in_progress")
            events = [{"type": f"response.{kind}", "response": begun} for kind in ("created", "in_progress")]
        if self.body.told_logprobs:
            self._entries.append(self.chat.token_entry(event, first=len(events) > 0))
        for piece in self._parser.add(text, last=finish is not None):
            events += self.items.add(piece, self._entries)
            self._entries = [] if isinstance(piece, str) else self._entries
        self._finish = finish or self._finish
        return events

    def last_chunks(self, states: list[RequestState], include_usage: bool) -> list[dict[str, Any]]:
        events = [] if self.items.items else self.items.add("")
        events += self.items.close("completed" if self._finish == "stop" else "incomplete")
        ended = self._ended(states, self._finish)
        return [*events, {"type": f"response.{ended['status']}", "response": ended}]

    def encode(self, chunk: dict[str, Any]) -> bytes:
        numbered = chunk | {"sequence_number": self._number}
        self._number += 1
        return f"event: {chunk['type']}\ndata: {json.dumps(numbered)}\n\n".encode()

    def _ended(self, states: list[RequestState], finish: str) -> dict[str, Any]:
        """The whole response at its end."""
        status = "completed" if finish == "stop" else "incomplete"
        if not self.items.items:
            self.items.add("")
        self.items.close(status)
        given, told = sum(len(state.prompt_ids) for state in states), num_output_tokens(states)
        thoughts = "".join(item["content"][0]["text"] for item in self.items.items if item["type"] == "reasoning")
        usage = {
            "input_tokens": given,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": told,
            "output_tokens_details": {"reasoning_tokens": min(told, len(self.chat.engine.tokenizer.encode(thoughts))) if thoughts else 0},
            "total_tokens": given + told,
        }
        return self._response(status) | {"output": self.items.items, "usage": usage}

    def _response(self, status: str) -> dict[str, Any]:
        body = self.body
        return {
            "id": self.name,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": {},
            "model": self.model,
            "output": [],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {"format": (body.text or {}).get("format") or {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": None,
        }
