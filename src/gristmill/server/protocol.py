"""What requests may say: their bodies, checked field by field, and what they mean to the engine.

Sources: OpenAI's API reference; vLLM's for `structured_outputs` and the settings that OpenAI has not.
"""

from typing import Annotated, Any, Literal

from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr, ValidationError

from gristmill.core.errors import InputError
from gristmill.data.chat import Conversation, check_turns, conversation
from gristmill.engine import grammar as constraints
from gristmill.generation.api import SamplingParams

MOST_SAMPLES = 128
MOST_TOP_K = 1 << 20
MOST_STOPS, LONGEST_STOP, MOST_BIASES = 16, 500, 1024
Number = StrictFloat | StrictInt
Stop = Annotated[StrictStr, Field(max_length=LONGEST_STOP)]


class Body(BaseModel):
    """What chat and text completions share."""

    model_config = ConfigDict(extra="forbid")
    model: StrictStr | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: StrictInt | None = None
    min_p: Number | None = None
    max_tokens: StrictInt | None = None
    n: StrictInt | None = Field(None, le=MOST_SAMPLES)
    seed: StrictInt | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    stop_token_ids: Annotated[list[StrictInt], Field(max_length=MOST_STOPS)] | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    repetition_penalty: Number | None = None
    logit_bias: dict[str, Number] | None = Field(None, max_length=MOST_BIASES)
    stream: StrictBool | None = None
    stream_options: dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    # what clients send along and what changes nothing here
    best_of: Annotated[StrictInt, Field(ge=1, le=1)] | None = None
    metadata: Any = None
    parallel_tool_calls: StrictBool | None = None
    service_tier: Any = None
    store: Literal[False] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    user: Any = None

    def sampling(self, default_tokens: int, most_tokens: int, top_logprobs: int) -> SamplingParams:
        wanted = default_tokens if self.max_tokens is None else self.max_tokens
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        try:
            bias = tuple((int(token), _or(value, 0.0)) for token, value in (self.logit_bias or {}).items())
        except ValueError as e:
            raise InputError("the keys of logit_bias must be token ids") from e
        return SamplingParams(
            temperature=_or(self.temperature, 1.0),
            top_p=_or(self.top_p, 1.0),
            top_k=min(self.top_k or 0, MOST_TOP_K),
            max_tokens=min(wanted, most_tokens),
            n=1 if self.n is None else self.n,
            min_p=_or(self.min_p, 0.0),
            repetition_penalty=_or(self.repetition_penalty, 1.0),
            presence_penalty=_or(self.presence_penalty, 0.0),
            frequency_penalty=_or(self.frequency_penalty, 0.0),
            stop=stop,
            stop_tokens=tuple(self.stop_token_ids or ()),
            logit_bias=bias,
            top_logprobs=top_logprobs,
            grammar=_grammar(self.response_format, self.structured_outputs),
        )


class ChatBody(Body):
    messages: list[Any]
    max_completion_tokens: StrictInt | None = None
    logprobs: StrictBool | None = None
    top_logprobs: StrictInt | None = Field(None, ge=0, le=20)


class TextBody(Body):
    prompt: StrictStr | list[StrictInt] | list[StrictStr] | list[list[StrictInt]]
    logprobs: StrictInt | None = Field(None, ge=0, le=20)
    echo: StrictBool | None = None


class RewardBody(BaseModel):
    model_config = ConfigDict(extra="forbid")
    model: StrictStr | None = None
    messages: list[Any]


async def read(http: web.Request, kind: type[Any]) -> Any:
    raw = await http.read()
    try:
        return kind.model_validate_json(raw)
    except ValidationError as e:
        first = e.errors()[0]
        if first["type"] == "json_invalid":
            raise InputError("the body is not JSON") from e
        if first["type"] in ("model_type", "model_attributes_type"):
            raise InputError("the body must be an object") from e
        where = ".".join(str(part) for part in first["loc"] if not str(part).startswith(("list[", "int", "float", "str", "constrained")))
        if first["type"] == "extra_forbidden":
            raise InputError(f"unknown field {where!r}") from e
        raise InputError(f"{where}: {first['msg'].lower()}") from e


def talk_of(messages: list[Any]) -> Conversation:
    messages = [_plain(message) for message in messages]
    try:
        talk = conversation(messages)
    except TypeError as e:
        raise InputError("messages must be objects with `role` and `content`") from e
    check_turns(talk)
    return talk


def _plain(message: Any) -> Any:
    """A message whose content is text, where its parts are; a developer is a system."""
    if not isinstance(message, dict):
        return message
    out = dict(message)
    parts = out.get("content")
    if isinstance(parts, list) and parts and all(isinstance(p, dict) and p.get("type") == "text" for p in parts):
        out["content"] = "\n".join(str(p.get("text", "")) for p in parts)
    if out.get("role") == "developer":
        out["role"] = "system"
    return {name: value for name, value in out.items() if value is not None and name != "name"}


def prompts_of(prompt: Any) -> list[str | list[int]]:
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        return [prompt]
    if not prompt:
        raise InputError("a prompt is empty")
    return list(prompt)


def _grammar(response_format: dict[str, Any] | None, structured: dict[str, Any] | None) -> str:
    """OpenAI's `response_format`, or vLLM's `structured_outputs`, as a constraint."""
    if response_format and structured:
        raise InputError("give response_format or structured_outputs, not both")
    match response_format:
        case None | {"type": "text"}:
            pass
        case {"type": "json_object"}:
            return constraints.of_json_schema({})
        case {"type": "json_schema", "json_schema": {"schema": dict(schema)}}:
            return constraints.of_json_schema(schema)
        case _:
            raise InputError("response_format must be of type text, json_object, or json_schema with json_schema.schema")
    if structured is None:
        return ""
    match list(structured.items()):
        case [("json", dict(schema))]:
            return constraints.of_json_schema(schema)
        case [("regex", str(regex))]:
            return constraints.of_regex(regex)
        case [("choice", list(choices))] if all(isinstance(one, str) for one in choices):
            return constraints.of_choice(choices)
    raise InputError("structured_outputs must hold one of json (a schema), regex (a string) and choice (strings)")


def _or(value: float | None, default: float) -> float:
    try:
        return default if value is None else float(value)
    except OverflowError as e:
        raise InputError("a number is too large") from e
