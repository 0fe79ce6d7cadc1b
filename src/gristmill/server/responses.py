"""OpenAI response builders, whole or streamed, errors, and the incremental detokenizer. Source: OpenAI's API reference."""

import codecs
import json
import secrets
import time
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from gristmill.core.response_text import ReasoningParser
from gristmill.engine.async_engine import TokenEvent
from gristmill.engine.engine import Engine
from gristmill.engine.sequence import RequestState
from gristmill.generation.api import Completion
from gristmill.server.protocol import CompletionRequest
from gristmill.server.tool_parser import CallDelta
from gristmill.server.tools import ToolUse

RETRY_SECONDS = 1
MAX_PIECE = 1000  # entries that are written as JSON at once
ERROR_CODES = {401: "invalid_api_key", 429: "rate_limit_exceeded"}


class IncrementalDetokenizer:
    """Incremental detokenizer of a stream. What may yet turn out to be no text, or the beginning of a stop string, is held back.

    Args:
        keep: control tokens whose names are a part of the text.
    """

    def __init__(self, engine: Engine, stop: Sequence[str], *, continued: bool = False, keep: Set[int] = frozenset()) -> None:
        self.engine, self.continued, self.keep = engine, continued, keep
        self.hold = max([len(engine.chat_format.close), *(len(s) - 1 for s in stop)])
        self.ids: list[int] = []
        self.done = ""  # text of ids before `start`, which ends where characters do
        self.start = 0
        self.sent = 0

    def add(self, token: int) -> str:
        """Text that can be sent now."""
        self.ids.append(token)
        text = self.done + self._decode(self.start, len(self.ids))
        if len(self.ids) - self.start > 64:  # so that long answers do not cost more and more
            middle = len(self.ids) - 16
            head = self._decode(self.start, middle)
            if text.startswith(self.done + head) and self.done + head + self._decode(middle, len(self.ids)) == text:
                self.done, self.start = self.done + head, middle
        if text.endswith("\ufffd"):  # in the middle of a character
            return ""
        end = max(self.sent, len(text) - self.hold)
        delta, self.sent = text[self.sent : end], end
        return delta

    def _decode(self, start: int, stop: int) -> str:
        return decode_keeping(self.engine, self.ids[start:stop], self.keep, continued=self.continued or start > 0)

    def finish(self, text: str) -> str:
        """The rest of the whole text."""
        return text[self.sent :]


def decode_keeping(engine: Engine, ids: Sequence[int], keep: Set[int], *, continued: bool) -> str:
    """Text of token ids, with the names of the control tokens in `keep`."""
    parts, begin = [], 0
    for place in [*(i for i, token in enumerate(ids) if token in keep), len(ids)] if keep else [len(ids)]:
        parts.append(engine.tokenizer.decode(ids[begin:place], continued=continued or begin > 0))
        if place < len(ids):
            parts.append(engine.tokenizer.name_of(ids[place]))
        begin = place + 1
    return "".join(parts)


def text_keeping(engine: Engine, state: RequestState, out: Completion, keep: Set[int]) -> str:
    """Text of a completion, with the names of the control tokens in `keep`."""
    if keep.isdisjoint(out.tokens):
        return out.text
    text = decode_keeping(engine, out.tokens, keep, continued=state.request.continues_text)
    cuts = [place for stop in state.request.sampling.stop if (place := text.find(stop)) >= 0]
    if cuts:
        return text[: min(cuts)]
    return text.removesuffix(engine.chat_format.close) if state.request.messages else text


class TextOffsets:
    """Text offsets of tokens: how many characters the tokens before have completed. Bytes that are no text count as what replaces them.

    Args:
        continued: the text goes on from another.
    """

    def __init__(self, engine: Engine, *, continued: bool = False) -> None:
        self.tokenizer, self.chars, self.first = engine.tokenizer, 0, not continued
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int, *, keep_special: bool) -> int:
        """Where a token begins. Control tokens have no text unless `keep_special`."""
        offset = self.chars
        if keep_special or not self.tokenizer.is_special(token):
            data = self.tokenizer.token_bytes(token, first=self.first)
            begun, first = self._decoder.getstate()[0], self._decoder.decode(data[:1])
            if begun and data and (not 0x80 <= data[0] < 0xC0 or len(first) > 1):  # it does not go on with the character that was begun
                offset += 1
            self.chars += len(first) + len(self._decoder.decode(data[1:]))
            self.first = False
        return offset

    def end(self) -> None:
        """End a text: what follows is another, even in the middle of a character."""
        self.chars += len(self._decoder.decode(b"", final=True))
        self.first = False
        self._decoder.reset()


@dataclass(frozen=True)
class Thought:
    """Piece of thinking."""

    text: str


class AnswerParser:
    """Parser of an answer: thinking, content and calls of tools, as they come.

    Args:
        reasoning: tells thinking apart, if anything does.
        tools: that the answer may call.
        live: as in `ToolCallParser`, where a grammar holds calls.
    """

    def __init__(self, reasoning: Callable[[], ReasoningParser] | None, tools: ToolUse | None, *, live: bool = False) -> None:
        self._reasoning = reasoning() if reasoning is not None else None
        # behind thinking a grammar does not hold calls that have no tag
        tagged = tools is not None and tools.support.form is not None and tools.support.form.begin != ""
        self._calls = tools.parser(live=live and (tagged or reasoning is None)) if tools is not None else None

    @property
    def num_calls(self) -> int:
        return self._calls.num_calls if self._calls is not None else 0

    def add(self, text: str, *, last: bool = False) -> list[Thought | str | CallDelta]:
        """What can be told now, in order; with the `last` piece, all that is left."""
        thought = ""
        if self._reasoning is not None:
            thought, text = self._reasoning.add(text, last=last)
        said = self._calls.add(text, last=last) if self._calls is not None else [text] if text else []
        return [*([Thought(thought)] if thought else []), *said]


class ResponseBuilder:
    """Response builder of an endpoint.

    Attributes:
        echoes: whether answers begin with their prompts.
        model: name that the response bears.
        keep: control tokens whose names are a part of the text that is parsed.
        done: what a stream ends with.
    """

    echoes = False
    model = ""
    keep: Set[int] = frozenset()
    done = b"data: [DONE]\n\n"

    def response(self, states: list[RequestState], n: int) -> dict[str, Any]:
        """The whole response."""
        raise NotImplementedError

    def prompt_choices(self) -> list[dict[str, Any]]:
        """Choices that a stream begins with, before anything is sampled: echoed prompts."""
        return []

    def choice_deltas(self, index: int, text: str, event: TokenEvent, *, finish: str | None) -> list[dict[str, Any]]:
        """Streamed choices: a token and the text that it completes."""
        raise NotImplementedError

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """A stream chunk."""
        raise NotImplementedError

    def token_chunks(self, index: int, text: str, event: TokenEvent, *, finish: str | None) -> list[dict[str, Any]]:
        """Stream chunks of a token."""
        return [self.chunk([choice]) for choice in self.choice_deltas(index, text, event, finish=finish)]

    def last_chunks(self, states: list[RequestState], include_usage: bool) -> list[dict[str, Any]]:
        """Stream chunks behind the last token."""
        return [self.chunk([]) | {"usage": self.usage(states)}] if include_usage else []

    def usage(self, states: list[RequestState]) -> dict[str, Any]:
        """Usage object of the whole response."""
        return usage_counts(sum(len(state.prompt_ids) for state in states), num_output_tokens(states))

    def encode(self, chunk: dict[str, Any]) -> bytes:
        """A stream chunk as an event."""
        return b"data: " + json.dumps(chunk).encode() + b"\n\n"


class ChatResponseBuilder(ResponseBuilder):
    """Chat completions and their chunks.

    Args:
        reasoning_parser: makes a parser for each answer, where thinking is told apart from content.
        tools: that the answers may call.
        continued: the answers go on with a message.
    """

    def __init__(
        self,
        engine: Engine,
        logprobs: bool,
        reasoning_parser: Callable[[], ReasoningParser] | None = None,
        *,
        model: str,
        continued: bool = False,
        tools: ToolUse | None = None,
    ) -> None:
        self.engine, self.logprobs, self.reasoning_parser, self.model = engine, logprobs, reasoning_parser, model
        self.continued, self.tools = continued, tools
        self.keep = tools.kept(engine.tokenizer) if tools is not None else frozenset()
        self.parsers: dict[int, AnswerParser] = {}  # of choices that are streamed
        self.name = f"chatcmpl-{secrets.token_hex(12)}"
        self.with_role: set[int] = set()  # choices whose role was sent
        self.thoughts: list[str] = []  # pieces of thinking so far

    def response(self, states: list[RequestState], n: int) -> dict[str, Any]:
        (state,) = states
        choices: list[dict[str, Any]] = []
        for index, out in enumerate(c for c in state.completions if c is not None):
            message, finish = self._message(state, out)
            entries = {"content": self._entries(out)} if self.logprobs else None
            choices.append({"index": index, "message": message, "logprobs": entries, "finish_reason": finish})
        usage = self.usage(states)
        return envelope("chat.completion", self.name, self.model, choices=choices, usage=usage)

    def _message(self, state: RequestState, out: Completion) -> tuple[dict[str, Any], str]:
        """Message of a completion, and why it ended."""
        if self.reasoning_parser is None and self.tools is None:
            return {"role": "assistant", "content": out.text}, out.finish
        parser = self.parser(live=False)
        thought, said, calls = "", "", list[dict[str, Any]]()
        for piece in parser.add(text_keeping(self.engine, state, out, self.keep), last=True):
            if isinstance(piece, Thought):
                thought += piece.text
                self.thoughts.append(piece.text)
            elif isinstance(piece, str):
                said += piece
            elif piece.name:
                calls.append(self._call(piece))
            else:
                calls[-1]["function"]["arguments"] += piece.arguments
        blank = None if calls or self.reasoning_parser is not None else ""
        message: dict[str, Any] = {"role": "assistant", "content": said or blank}
        message |= _reasoning(thought or None) if self.reasoning_parser is not None else {}
        if calls:
            message["tool_calls"] = [{name: value for name, value in call.items() if name != "index"} for call in calls]
        return message, "tool_calls" if calls and out.finish == "stop" else out.finish

    def usage(self, states: list[RequestState]) -> dict[str, Any]:
        """Usage object; where thinking is told apart, with the number of its tokens."""
        usage = super().usage(states)
        if self.reasoning_parser is None:
            return usage
        num = len(self.engine.tokenizer.encode("".join(self.thoughts)))
        return usage | {"completion_tokens_details": {"reasoning_tokens": min(usage["completion_tokens"], num)}}

    def parser(self, *, live: bool) -> AnswerParser:
        """Parser of an answer; `live` as in `AnswerParser`."""
        return AnswerParser(self.reasoning_parser, self.tools, live=live)

    def new_call_id(self, name: str, index: int) -> str:
        """Id of a call, as `ToolUse.new_id`."""
        assert self.tools is not None
        return self.tools.new_id(name, index)

    def token_entry(self, event: TokenEvent, *, first: bool) -> dict[str, Any]:
        """Log-probabilities of a streamed token."""
        return self._entry(event.token, event.logprob, event.top_logprobs, first)

    def _call(self, piece: CallDelta) -> dict[str, Any]:
        function = {"name": piece.name, "arguments": ""}
        return {"index": piece.index, "id": self.new_call_id(piece.name, piece.index), "type": "function", "function": function}

    def choice_deltas(self, index: int, text: str, event: TokenEvent, *, finish: str | None) -> list[dict[str, Any]]:
        deltas: list[dict[str, Any]] = [{"content": text}]
        if self.reasoning_parser is not None or self.tools is not None:
            parser = self.parsers.get(index)
            if parser is None:
                parser = self.parsers[index] = self.parser(live=True)
            deltas = []
            for piece in parser.add(text, last=finish is not None):
                if isinstance(piece, Thought):
                    self.thoughts.append(piece.text)
                    deltas.append(_reasoning(piece.text))
                elif isinstance(piece, str):
                    deltas.append({"content": piece})
                elif piece.name:
                    deltas.append({"tool_calls": [self._call(piece)]})
                else:
                    deltas.append({"tool_calls": [{"index": piece.index, "function": {"arguments": piece.arguments}}]})
            if len(deltas) == 2 and isinstance(deltas[1].get("content"), str) and "reasoning" in deltas[0]:
                deltas = [deltas[1] | deltas[0]]  # the end of thinking and the beginning of content, which one token may hold
            finish = "tool_calls" if parser.num_calls and finish == "stop" else finish
        deltas = deltas or [{}]
        first = index not in self.with_role
        if first:
            self.with_role.add(index)
            deltas[0]["role"] = "assistant"
        entries = {"content": [self._entry(event.token, event.logprob, event.top_logprobs, first)]} if self.logprobs else None
        last = len(deltas) - 1
        return [
            {"index": index, "delta": delta, "logprobs": None if place else entries, "finish_reason": finish if place == last else None}
            for place, delta in enumerate(deltas)
        ]

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return envelope("chat.completion.chunk", self.name, self.model, choices=choices)

    def _entries(self, out: Completion) -> list[dict[str, Any]]:
        tops = out.top_logprobs or ((),) * len(out.tokens)
        told = zip(out.tokens, out.logprobs, tops, strict=True)
        return [self._entry(token, value, top, number == 0) for number, (token, value, top) in enumerate(told)]

    def _entry(self, token: int, logprob: float, top: Sequence[tuple[int, float]], first: bool) -> dict[str, Any]:
        first = first and not self.continued
        return self._one(token, logprob, first) | {"top_logprobs": [self._one(*other, first) for other in top]}

    def _one(self, token: int, logprob: float, first: bool) -> dict[str, Any]:
        told = self.engine.tokenizer.token_bytes(token, first=first)
        return {"token": _shown(told), "logprob": logprob, "bytes": list(told)}


class CompletionResponseBuilder(ResponseBuilder):
    """Text completions and their chunks.

    Args:
        scored: log-probabilities of the prompts' tokens, where they are echoed.
    """

    def __init__(self, engine: Engine, body: CompletionRequest, prompts: list[list[int]], *, scored: list[Any] | None, model: str) -> None:
        self.engine, self.body, self.prompts, self.scored, self.model = engine, body, prompts, scored, model
        self.echoes = bool(body.echo)
        self.name = f"cmpl-{secrets.token_hex(12)}"
        self.offsets: dict[int, TextOffsets] = {}  # of choices that are streamed

    def response(self, states: list[RequestState], n: int) -> dict[str, Any]:
        choices: list[dict[str, Any]] = []
        for place, ids in enumerate(self.prompts):
            outs = [c for c in states[place].completions if c is not None] if states else [Completion("", 0, (), "length")] * n
            for out in outs:
                choices.append(self._choice(len(choices), place, ids, out))
        usage = usage_counts(sum(map(len, self.prompts)), num_output_tokens(states))
        return envelope("text_completion", self.name, self.model, choices=choices, usage=usage)

    def prompt_choices(self) -> list[dict[str, Any]]:
        n = 1 if self.body.n is None else self.body.n
        none, finish = Completion("", 0, (), "length"), None if self.body.max_tokens != 0 else "length"
        places = [(place, ids, sample) for place, ids in enumerate(self.prompts) for sample in range(n)]
        return [self._choice(place * n + sample, place, ids, none) | {"finish_reason": finish} for place, ids, sample in places]

    def choice_deltas(self, index: int, text: str, event: TokenEvent, *, finish: str | None) -> list[dict[str, Any]]:
        logprobs = None
        if self.body.logprobs is not None:
            word = _token(self.engine, event.token)
            tops = [self._top(event.top_logprobs)] if self.body.logprobs else None
            offset = self.offsets.setdefault(index, TextOffsets(self.engine, continued=True)).add(event.token, keep_special=False)
            logprobs = {"tokens": [word], "token_logprobs": [event.logprob], "top_logprobs": tops, "text_offset": [offset]}
        return [{"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}]

    def _top(self, top_logprobs: Sequence[tuple[int, float]]) -> dict[str, float]:
        return {_token(self.engine, token): value for token, value in top_logprobs}

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return envelope("text_completion", self.name, self.model, choices=choices)

    def _choice(self, index: int, place: int, ids: list[int], out: Completion) -> dict[str, Any]:
        engine = self.engine
        text = (engine.tokenizer.decode(ids, keep_special=True) if self.body.echo else "") + out.text
        logprobs = None
        if self.body.logprobs is not None:
            tokens, values = list(out.tokens), list[float | None](out.logprobs)
            tops: list[dict[str, float] | None] = [self._top(top) for top in out.top_logprobs]
            if self.scored is not None:
                given, top_logprobs = self.scored[place]
                tokens, values = [*ids, *tokens], [None, *given, *values]
                tops = [None, *(self._top(top) for top in top_logprobs), *tops]
            words = [_token(engine, token, first=self.echoes and not number) for number, token in enumerate(tokens)]
            where = self.offsets[index] = TextOffsets(engine, continued=not self.body.echo)
            given_ids = ids if self.body.echo else []
            offsets = [where.add(token, keep_special=True) for token in given_ids]
            where.end()
            offsets = offsets[: len(tokens) - len(out.tokens)] + [where.add(token, keep_special=False) for token in out.tokens]
            told = tops if self.body.logprobs else None
            logprobs = {"tokens": words, "token_logprobs": values, "top_logprobs": told, "text_offset": offsets}
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": out.finish}


def envelope(kind: str, name: str, model: str, *, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> dict[str, Any]:
    """Response object of a kind."""
    out = {"id": name, "object": kind, "created": int(time.time()), "model": model, "choices": choices}
    return out if usage is None else out | {"usage": usage}


def _reasoning(thought: str | None) -> dict[str, Any]:
    """Thinking, by vLLM's name of it and the earlier one, which is DeepSeek's."""
    return {"reasoning": thought, "reasoning_content": thought}


def usage_counts(prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    """Usage object."""
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": prompt_tokens + completion_tokens}


def error_response(status: int, message: str, *, param: str | None = None, code: str | None = None) -> web.Response:
    """Error in OpenAI's form; it says to come back where that may help."""
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    error = {"message": message, "type": kind, "param": param, "code": code or ERROR_CODES.get(status)}
    headers = {"Retry-After": str(RETRY_SECONDS)} if status in (429, 503) else {}
    headers |= {"WWW-Authenticate": "Bearer"} if status == 401 else {}
    return web.json_response({"error": error}, status=status, headers=headers)


def dump_json(value: Any) -> str:
    """JSON of a large response, written in pieces, between which other threads have their turn."""
    if isinstance(value, dict) and any(isinstance(one, dict | list) for one in value.values()):
        return "{" + ", ".join(f"{json.dumps(name)}: {dump_json(one)}" for name, one in value.items()) + "}"
    if isinstance(value, list) and (len(value) > MAX_PIECE or any(isinstance(one, dict | list) for one in value)):
        return "[" + ", ".join(dump_json(one) for one in value) + "]"
    return json.dumps(value)


def num_output_tokens(states: list[RequestState]) -> int:
    """Tokens of all completions."""
    return sum(c.num_tokens for state in states for c in state.completions if c is not None)


def _token(engine: Engine, token: int, *, first: bool = False) -> str:
    return _shown(engine.tokenizer.token_bytes(token, first=first))


def _shown(told: bytes) -> str:
    """Bytes of a token as text; of a part of a character, written out."""
    try:
        return told.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in told)
