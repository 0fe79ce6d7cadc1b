"""OpenAI request schemas: bodies checked field by field, and the sampling parameters that they mean.

A field at null is as good as absent. One that is not implemented is taken where its value changes nothing, and else refused by its name.

Sources: OpenAI's API reference; vLLM's for `structured_outputs`, LoRA adapters and the settings that OpenAI has not.
"""

import json
import json.scanner
import re
from typing import Annotated, Any, TypeVar, cast, get_args

from pydantic import BaseModel, Field, StrictBool, StrictFloat, StrictInt, StrictStr, TypeAdapter, ValidationError

from gristmill.core.errors import InputError
from gristmill.data.chat import SPOKEN, Conversation, Message, Role, template_fields
from gristmill.engine.grammar import MAX_GRAMMAR_CHARS, choice_grammar, json_schema_grammar, regex_grammar
from gristmill.generation.api import SamplingParams

MAX_N = 128
MAX_TOP_K = 1 << 20
MAX_STOPS, MAX_STOP_CHARS, MAX_BIASES = 16, 500, 1024
MAX_INLINE_VALUES = 10_000  # of a body, that are parsed at once; more take a thread that lets others run
MAX_JSON_CONTAINERS, MAX_JSON_VALUES = 60_000, 600_000  # of a body: lists, objects and their names; values
MAX_NAME_CHARS, MAX_PATH_CHARS = 200, 4096  # of an adapter
MAX_PRIORITY = 100  # either way
MAX_SHOWN = 60  # characters of a request that an error repeats
Number = StrictFloat | StrictInt
Stop = Annotated[StrictStr, Field(max_length=MAX_STOP_CHARS)]
JSON = TypeAdapter[Any](Any)
Schema = TypeVar("Schema", bound="RequestBody")

# What clients send along and what changes no answer.
HARMLESS = frozenset(
    ("metadata", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "service_tier", "user")
    + ("cache_prompt", "cache_salt", "client_metadata")
)
# Settings that are not implemented, and the values at which they change nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_special_tokens": (False,),
    "background": (False,),
    "bad_words": ([],),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "early_stopping": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "ignore_eos": (False,),
    "include_reasoning": (True,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "reasoning_effort": ("none",),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "truncation": ("disabled",),
    "typical_p": (1,),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
}
NO_TOOLS = "the chat format of this model has no place for tools"
NOT_STORED = "no response is stored here: send the turns before again, in input"
REASONS = {
    "conversation": NOT_STORED,
    "functions": "this is the former name of tools: say tools",
    "function_call": "this is the former name of tool_choice: say tool_choice",
    "previous_response_id": NOT_STORED,
    "tool_choice": NO_TOOLS,
    "tools": NO_TOOLS,
}
HINTS = {
    "guided_json": "say structured_outputs: {json: ...}",
    "guided_regex": "say structured_outputs: {regex: ...}",
    "guided_choice": "say structured_outputs: {choice: ...}",
}
_TYPE = re.compile(r"list\[.*|int|float|str|bool|constrained.*")  # which pydantic names where a field may be of several


class FieldError(InputError):
    """Input error that names a field of the body."""

    def __init__(self, field: str, words: str) -> None:
        super().__init__(f"{field}: {words}")
        self.field = field


class RequestBody(BaseModel):
    """Body of any request."""

    model: StrictStr | None = None

    def check(self) -> None:
        """Raise `InputError` where fields do not go together, or an option of one is not implemented."""


class CompletionRequestBase(RequestBody):
    """Fields of chat and text completion requests."""

    temperature: Number | None = None
    top_p: Number | None = None
    top_k: StrictInt | None = None
    min_p: Number | None = None
    max_tokens: StrictInt | None = None
    max_thinking_tokens: StrictInt | None = Field(None, ge=0)  # NVIDIA NIM's name
    n: StrictInt | None = Field(None, le=MAX_N)
    seed: StrictInt | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[StrictInt], Field(max_length=MAX_STOPS)] | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    repetition_penalty: Number | None = None
    logit_bias: dict[str, Number] | None = Field(None, max_length=MAX_BIASES)
    priority: StrictInt | None = Field(None, ge=-MAX_PRIORITY, le=MAX_PRIORITY)
    stream: StrictBool | None = None
    stream_options: dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    best_of: StrictInt | None = None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return bool((self.stream_options or {}).get("include_usage"))

    def to_sampling_params(self, default_tokens: int, max_tokens: int, *, top_logprobs: int, grammar: str) -> SamplingParams:
        """Sampling parameters: at most `max_tokens`, and `default_tokens` where the request does not say."""
        wanted = default_tokens if self.max_tokens is None else self.max_tokens
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        try:
            bias = tuple((int(token.encode("ascii")), _number(value, 0.0)) for token, value in (self.logit_bias or {}).items())
        except ValueError as e:
            raise FieldError("logit_bias", "the keys of logit_bias must be token ids") from e
        return SamplingParams(
            temperature=_number(self.temperature, 1.0),
            top_p=_number(self.top_p, 1.0),
            top_k=0 if self.top_k is None or self.top_k == -1 else min(self.top_k, MAX_TOP_K),
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
            grammar=grammar,
            max_thinking_tokens=self.max_thinking_tokens,
        )

    def to_grammar(self) -> str:
        """Grammar of OpenAI's `response_format`, or of vLLM's `structured_outputs`; "" is none."""
        return _grammar(self.response_format, self.structured_outputs)

    def check(self) -> None:
        if self.best_of is not None and self.best_of != (1 if self.n is None else self.n):
            raise FieldError("best_of", "all answers are returned, so it must be as large as n: leave it out")
        options = {name: value for name, value in (self.stream_options or {}).items() if value is not None}
        if options and not self.stream:
            raise FieldError("stream_options", "only a stream has them: leave them out, or say stream: true")
        for name, value in options.items():
            if name not in ("include_usage", "include_obfuscation") and value is not False:
                raise FieldError(f"stream_options.{shown(name)}", "this server does not implement it: leave it out")
            if not isinstance(value, bool):
                raise FieldError(f"stream_options.{name}", "must be true or false")


class ChatCompletionRequest(CompletionRequestBase):
    """Body of /v1/chat/completions."""

    messages: list[Any]
    max_completion_tokens: StrictInt | None = None
    logprobs: StrictBool | None = None
    top_logprobs: StrictInt | None = Field(None, ge=0, le=20)
    add_generation_prompt: StrictBool | None = None
    continue_final_message: StrictBool | None = None
    echo: StrictBool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    enable_thinking: StrictBool | None = None

    def check(self) -> None:
        super().check()
        if self.enable_thinking is not None:
            self.chat_template_kwargs = {"enable_thinking": self.enable_thinking} | (self.chat_template_kwargs or {})
        self.chat_template_kwargs = self.chat_template_kwargs or None
        if self.top_logprobs and not self.logprobs:
            raise FieldError("top_logprobs", "needs logprobs: true")
        if self.echo:
            raise FieldError("echo", "only /v1/completions repeats its prompt: leave it out")
        last = self.messages[-1] if self.messages else None
        if isinstance(last, dict) and last.get("prefix") is True:  # as with Mistral and DeepSeek
            self.continue_final_message = True
        if self.continue_final_message and self.add_generation_prompt:
            raise FieldError("continue_final_message", "the last message goes on, or a new one begins: leave out add_generation_prompt")
        given = self.max_tokens, self.max_completion_tokens
        if None not in given and given[0] != given[1]:
            raise FieldError("max_tokens", "is the older name of max_completion_tokens, which says another number: leave one out")
        self.max_tokens = given[0] if given[1] is None else given[1]


class TemplateChatRequest(ChatCompletionRequest):
    """Body of /v1/chat/completions of a model whose folder brings a chat template; names as vLLM's."""

    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    parallel_tool_calls: StrictBool | None = None

    def check(self) -> None:
        super().check()
        if self.tool_choice not in (None, *NEUTRAL["tool_choice"]) and not self.tools:
            raise FieldError("tool_choice", "there are no tools to call: give some, or leave it out")
        if self.tool_choice == "none":
            self.tools = None


class CompletionRequest(CompletionRequestBase):
    """Body of /v1/completions."""

    prompt: Any
    logprobs: StrictInt | None = Field(None, ge=0, le=20)
    echo: StrictBool | None = None


class RewardRequest(RequestBody):
    """Body of /v1/rewards."""

    messages: list[Any]


class LoadAdapterRequest(RequestBody):
    """Body of /v1/load_lora_adapter."""

    lora_name: StrictStr = Field(min_length=1, max_length=MAX_NAME_CHARS)
    lora_path: StrictStr = Field(min_length=1, max_length=MAX_PATH_CHARS)


class UnloadAdapterRequest(RequestBody):
    """Body of /v1/unload_lora_adapter."""

    lora_name: StrictStr = Field(max_length=MAX_NAME_CHARS)
    lora_int_id: StrictInt | None = None  # vLLM's number, which it does not need either


def is_small(raw: bytes) -> bool:
    """Whether a body can be parsed at once, without holding others up.

    Raises:
        InputError: it holds more values than are taken at all.
    """
    containers = raw.count(b"{") + raw.count(b"[") + raw.count(b":")
    values = containers + raw.count(b",")
    if containers > MAX_JSON_CONTAINERS or values > MAX_JSON_VALUES:
        raise InputError(
            f"the body holds {containers:,} marks of lists and objects and {values:,} of values, and at most {MAX_JSON_CONTAINERS:,} and "
            f"{MAX_JSON_VALUES:,} are taken: send less at once"
        )
    return values <= MAX_INLINE_VALUES


def parse_body(raw: bytes, schema: type[Schema]) -> Schema:
    """Validate a request's body. Raises `InputError` with the first field that is wrong."""
    small = is_small(raw) and b"NaN" not in raw and b"Infinity" not in raw  # which are no JSON, and pydantic takes them
    try:
        body = JSON.validate_json(raw) if small else _Decoder().decode(raw.decode())
    except RecursionError as e:
        raise InputError("the body is not JSON that is read here: it is nested too deep") from e
    except ValueError as e:  # of a text that is no UTF-8, too
        told = e.errors(include_input=False, include_url=False)[0]["msg"] if isinstance(e, ValidationError) else str(e)
        reason = "" if isinstance(e, UnicodeError) else f" ({told[: 2 * MAX_SHOWN]})"
        raise InputError(f"the body is not JSON in UTF-8{reason}") from e
    if not isinstance(body, dict):
        raise InputError("the body must be an object")
    for name, value in body.items():
        if name not in schema.model_fields and value is not None and name not in HARMLESS and value not in NEUTRAL.get(name, ()):
            _refuse_field(name)
        if name not in ("messages", "input", "prompt", "metadata") and isinstance(value, list | dict) and len(value) > MAX_BIASES:
            raise FieldError(shown(name), f"has {len(value):,} entries, and at most {MAX_BIASES:,} are taken")
    try:
        found = schema.model_validate({name: value for name, value in body.items() if name in schema.model_fields})
    except ValidationError as e:
        first = e.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"] if not _TYPE.fullmatch(str(part)))
        raise FieldError(shown(where), first["msg"].lower()) from e
    found.check()
    return found


def _refuse_field(name: str) -> None:
    if name in NEUTRAL:
        taken = " or ".join(json.dumps(value) for value in NEUTRAL[name])
        raise FieldError(name, f"{REASONS.get(name, 'this server does not implement it')}: leave it out, or say {taken}")
    if name in REASONS:
        raise FieldError(name, REASONS[name])
    hint = f": {HINTS[name]}" if name in HINTS else ": leave it out"
    raise FieldError(shown(name), f"unknown field '{shown(name)}'{hint}")


class _Decoder(json.JSONDecoder):
    """JSON decoder in Python's own steps, between which other threads have their turn, and which takes no half of a surrogate pair."""

    def __init__(self) -> None:
        super().__init__(parse_constant=self._refuse)

        def parse_string(text: str, at: int, strict: bool = True) -> tuple[str, int]:
            value, end = json.decoder.scanstring(text, at, strict)  # type: ignore[attr-defined]
            if not value.isascii():
                value.encode()
            return value, end

        self.parse_string = parse_string
        self.scan_once = json.scanner.py_make_scanner(self)  # type: ignore[attr-defined]

    @staticmethod
    def _refuse(name: str) -> Any:
        raise ValueError(f"{name} is no number of JSON")


def parse_messages(messages: list[Any], max_messages: int, *, tools: bool = False) -> Conversation:
    """Chat messages as a conversation; their turns may come in any order. With `tools` they may call tools, answer and think.

    Raises:
        InputError: a message is none, or holds what is not implemented. It says which.
    """
    if not messages:
        raise FieldError("messages", "there is no user turn: send a message at least")
    if len(messages) > max_messages:
        raise FieldError(
            "messages", f"there are {len(messages):,}, more than the {max_messages:,} tokens of the model's context: shorten it"
        )
    return tuple(_message(f"messages.{place}", message, tools) for place, message in enumerate(messages))


def _message(where: str, message: Any, tools: bool) -> Message:
    """A message whose content is text, or parts of text; a developer is a system."""
    if not isinstance(message, dict):
        raise FieldError(where, "a message must be an object with `role` and `content`")
    role = "system" if message.get("role") == "developer" else message.get("role")
    if role not in (get_args(Role) if tools else SPOKEN):
        raise FieldError(f"{where}.role", "must be system, developer, user or assistant: nothing else is implemented")
    known = ["role", "content", "name", "annotations", *(("tool_calls", "tool_call_id", "reasoning_content") if tools else ())]
    if role == "assistant":  # the thinking of earlier turns, as our own answers have it; only templates that ask for it are shown it
        known += ["reasoning", "reasoning_content", "prefix"]
    for name, value in message.items():
        if name not in known and value is not None and value != [] and value != {} and value is not False:
            raise FieldError(f"{where}.{shown(name)}", "this server does not implement it: leave it out")
    try:
        fields = template_fields(message) if tools else ""
    except InputError as e:
        raise FieldError(where, str(e)) from e
    content = message.get("content")
    if content is None and fields:
        return Message(cast(Role, role), "", fields=fields)
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else part for part in parts]
    plain = [text for text in texts if isinstance(text, str)]
    if len(plain) < len(texts):
        raise FieldError(f"{where}.content", "a message needs text as content, or parts of the type text: nothing else is implemented")
    return Message(cast(Role, role), "\n".join(plain), fields=fields)


def parse_prompts(prompt: Any) -> list[str | list[int]]:
    """Prompts of a completion request, texts or token ids."""
    several = isinstance(prompt, list) and not (prompt and type(prompt[0]) is int)
    prompts = prompt if several else [prompt]
    for one in prompts:
        if not isinstance(one, str) and not (isinstance(one, list) and all(type(token) is int for token in one)):
            raise FieldError("prompt", "must be a text, a list of texts, a list of token ids, or a list of such lists")
    if not prompts or not all(prompts):
        raise FieldError("prompt", "a prompt is empty")
    return list(prompts)


def shown(text: str) -> str:
    """What a client wrote, as far as an error repeats it."""
    return ascii(text[:MAX_SHOWN])[1:-1]


def _grammar(response_format: dict[str, Any] | None, structured: dict[str, Any] | None) -> str:
    """Grammar of OpenAI's `response_format`, or of vLLM's `structured_outputs`."""
    response_format = {
        name: value for name, value in ({"type": "text"} if response_format is None else response_format).items() if value is not None
    }
    match response_format:
        case {"type": "text", **more}:
            grammar = ""
        case {"type": "json_object", "schema": dict(schema), **more} | {"type": "json_schema", "schema": dict(schema), **more}:
            grammar = json_schema_grammar(schema)  # llama.cpp's form
        case {"type": "json_object", **more}:
            grammar = json_schema_grammar({})
        case {"type": "json_schema", "json_schema": dict(named), **more} if isinstance(named.get("schema"), dict):
            for name, value in named.items():
                if name not in ("name", "description", "strict", "schema") and value is not None:
                    raise FieldError(f"response_format.json_schema.{shown(name)}", "unknown field: leave it out")
            grammar = json_schema_grammar(named["schema"])
        case _:
            raise FieldError("response_format", "must be of type text, json_object, or json_schema with json_schema.schema, an object")
    for name in more:
        raise FieldError(f"response_format.{shown(name)}", "unknown field: leave it out")
    structured = {name: value for name, value in (structured or {}).items() if value is not None}
    if not structured:
        return grammar
    if grammar:
        raise FieldError("structured_outputs", "response_format says what an answer looks like already: leave one out")
    match list(structured.items()):
        case [("json", dict(schema))]:
            return json_schema_grammar(schema)
        case [("json", str(text))] if len(text) <= MAX_GRAMMAR_CHARS:
            try:
                schema = JSON.validate_json(text)
            except ValueError as e:
                raise FieldError("structured_outputs.json", "is not JSON") from e
            if isinstance(schema, dict):
                return json_schema_grammar(schema)
        case [("json_object", True)]:
            return json_schema_grammar({})
        case [("regex", str(regex))]:
            return regex_grammar(regex)
        case [("choice", list(choices))] if all(isinstance(one, str) for one in choices):
            return choice_grammar(choices)
    raise FieldError("structured_outputs", "must hold one of json (a schema), json_object (true), regex (a string) and choice (strings)")


def _number(value: float | None, default: float) -> float:
    try:
        return default if value is None else float(value)
    except OverflowError as e:
        raise InputError("a number is too large") from e
