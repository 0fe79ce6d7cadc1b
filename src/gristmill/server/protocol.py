"""OpenAI request schemas: bodies checked field by field, and the sampling parameters that they mean.

Sources: OpenAI's API reference; vLLM's for `structured_outputs` and the settings that OpenAI has not.
"""

from typing import Annotated, Any, Literal

from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr, ValidationError

from gristmill.core.errors import InputError
from gristmill.data.chat import Conversation, check_turns, conversation
from gristmill.engine.grammar import choice_grammar, json_schema_grammar, regex_grammar
from gristmill.generation.api import SamplingParams

MAX_N = 128
MAX_TOP_K = 1 << 20
MAX_STOPS, MAX_STOP_CHARS, MAX_BIASES = 16, 500, 1024
Number = StrictFloat | StrictInt
Stop = Annotated[StrictStr, Field(max_length=MAX_STOP_CHARS)]


class CompletionRequestBase(BaseModel):
    """Fields of chat and text completion requests."""

    model_config = ConfigDict(extra="forbid")
    model: StrictStr | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: StrictInt | None = None
    min_p: Number | None = None
    max_tokens: StrictInt | None = None
    n: StrictInt | None = Field(None, le=MAX_N)
    seed: StrictInt | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[StrictInt], Field(max_length=MAX_STOPS)] | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    repetition_penalty: Number | None = None
    logit_bias: dict[str, Number] | None = Field(None, max_length=MAX_BIASES)
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

    def to_sampling_params(self, default_tokens: int, max_tokens: int, top_logprobs: int) -> SamplingParams:
        """Sampling parameters: at most `max_tokens`, and `default_tokens` where the request does not say."""
        wanted = default_tokens if self.max_tokens is None else self.max_tokens
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        try:
            bias = tuple((int(token), _number(value, 0.0)) for token, value in (self.logit_bias or {}).items())
        except ValueError as e:
            raise InputError("the keys of logit_bias must be token ids") from e
        return SamplingParams(
            temperature=_number(self.temperature, 1.0),
            top_p=_number(self.top_p, 1.0),
            top_k=min(self.top_k or 0, MAX_TOP_K),
            max_tokens=min(wanted, max_tokens),
            n=1 if self.n is None else self.n,
            min_p=_number(self.min_p, 0.0),
            repetition_penalty=_number(self.repetition_penalty, 1.0),
            presence_penalty=_number(self.presence_penalty, 0.0),
            frequency_penalty=_number(self.frequency_penalty, 0.0),
            stop=stop,
            stop_tokens=tuple(self.stop_token_ids or ()),
            logit_bias=bias,
            top_logprobs=top_logprobs,
            grammar=_grammar(self.response_format, self.structured_outputs),
        )


class ChatCompletionRequest(CompletionRequestBase):
    """Body of /v1/chat/completions."""

    messages: list[Any]
    max_completion_tokens: StrictInt | None = None
    logprobs: StrictBool | None = None
    top_logprobs: StrictInt | None = Field(None, ge=0, le=20)


class CompletionRequest(CompletionRequestBase):
    """Body of /v1/completions."""

    prompt: StrictStr | list[StrictInt] | list[StrictStr] | list[list[StrictInt]]
    logprobs: StrictInt | None = Field(None, ge=0, le=20)
    echo: StrictBool | None = None


class RewardRequest(BaseModel):
    """Body of /v1/rewards."""

    model_config = ConfigDict(extra="forbid")
    model: StrictStr | None = None
    messages: list[Any]


async def parse_body(http: web.Request, schema: type[Any]) -> Any:
    """Validate a request's body. Raises `InputError` with the first field that is wrong."""
    raw = await http.read()
    try:
        return schema.model_validate_json(raw)
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


def parse_messages(messages: list[Any]) -> Conversation:
    """Chat messages as a conversation."""
    messages = [_normalize(message) for message in messages]
    try:
        parsed = conversation(messages)
    except TypeError as e:
        raise InputError("messages must be objects with `role` and `content`") from e
    check_turns(parsed)
    return parsed


def _normalize(message: Any) -> Any:
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


def parse_prompts(prompt: Any) -> list[str | list[int]]:
    """Prompts of a completion request, texts or token ids."""
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        return [prompt]
    if not prompt:
        raise InputError("a prompt is empty")
    return list(prompt)


def _grammar(response_format: dict[str, Any] | None, structured: dict[str, Any] | None) -> str:
    """Grammar of OpenAI's `response_format`, or of vLLM's `structured_outputs`."""
    if response_format and structured:
        raise InputError("give response_format or structured_outputs, not both")
    match response_format:
        case None | {"type": "text"}:
            pass
        case {"type": "json_object"}:
            return json_schema_grammar({})
        case {"type": "json_schema", "json_schema": {"schema": dict(schema)}}:
            return json_schema_grammar(schema)
        case _:
            raise InputError("response_format must be of type text, json_object, or json_schema with json_schema.schema")
    if structured is None:
        return ""
    match list(structured.items()):
        case [("json", dict(schema))]:
            return json_schema_grammar(schema)
        case [("regex", str(regex))]:
            return regex_grammar(regex)
        case [("choice", list(choices))] if all(isinstance(one, str) for one in choices):
            return choice_grammar(choices)
    raise InputError("structured_outputs must hold one of json (a schema), regex (a string) and choice (strings)")


def _number(value: float | None, default: float) -> float:
    try:
        return default if value is None else float(value)
    except OverflowError as e:
        raise InputError("a number is too large") from e
