"""Tools of a request: which there are, whether one must be called, and the grammar that holds calls to them and their schemas.

Sources: OpenAI's API reference for `tools` and `tool_choice`; llguidance's for grammars in Lark's form.
"""

import json
import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

from gristmill.core.errors import InputError
from gristmill.data.chat_format import ChatFormat
from gristmill.data.template_format import TemplateFormat
from gristmill.data.tokenizer import Tokenizer
from gristmill.engine.grammar import MAX_GRAMMAR_SECONDS, WHITESPACE, json_schema_grammar
from gristmill.server.protocol import FieldError, shown
from gristmill.server.tool_parser import FORMS, NAME, ToolCallParser, ToolForm, parse_calls, property_schema, takes_text

MAX_TOOLS = 128  # as with OpenAI
MAX_PROBED_CHARS = 100_000
ALIASES = {"granite4": "hermes", "llama4_json": "llama3_json", "llama4_pythonic": "pythonic", "qwen3_xml": "qwen3_coder"}
LONG_ID, SHORT_ID = "call_0123456789abcdef01234567", "abcdefghi"  # Mistral's templates take those of nine letters alone
# What llguidance says of a schema that is right, and of which it does not know a part.
_UNKNOWN = re.compile(r"Unimplemented|Unknown format|look-around|look-ahead|not supported|too large|too many|limit", re.I)


@dataclass(frozen=True)
class Tool:
    """Tool that a model may call.

    Attributes:
        schema: of its arguments, an object.
        strict: whether calls must keep to all of it, and be refused where that cannot be promised.
        place: in the request, for errors.
    """

    name: str
    schema: Mapping[str, Any]
    strict: bool = False
    place: str = "tools"


@dataclass(frozen=True)
class ToolSupport:
    """How a model calls tools.

    Attributes:
        form: of calls; None: no known one.
        name: of the form, for people.
        takes_tools: whether its chat format has a place for tools.
        parallel: whether it can be shown several calls in one turn.
        short_ids: ids of calls must have nine letters.
    """

    form: ToolForm | None = None
    name: str = "unknown: calls stay text"
    takes_tools: bool = False
    parallel: bool = True
    short_ids: bool = False


def _own_id(form: ToolForm, name: str, index: int) -> str:
    return form.call_id.replace("{}", name).replace("#", str(index))


def form_of(name: str) -> ToolForm:
    """The form of a name, or of another name that vLLM has for it.

    Raises:
        InputError: there is none.
    """
    if (name := ALIASES.get(name, name)) not in FORMS:
        raise InputError(f"--tool-call-parser {name} is not one of {', '.join(FORMS)}.")
    return FORMS[name]


def find_support(chat_format: ChatFormat, tokenizer: Tokenizer, parser: str = "") -> ToolSupport:
    """How a model's chat template writes calls: the form whose parser reads back what it has written.

    Args:
        parser: name of a form, to be taken whatever the template writes; "": find it out.

    Raises:
        InputError: there is no such form.
    """
    named, name = (form_of(parser), parser) if parser else (None, ToolSupport.name)
    if not isinstance(chat_format, TemplateFormat):
        return ToolSupport(named, name)
    tool = {
        "type": "function",
        "function": {"name": "mill_wheel", "description": "Grinds.", "parameters": {"type": "object", "properties": {"sacks": _INTEGER}}},
    }

    def written(num_calls: int, call_id: str) -> str:
        function = {"name": "mill_wheel", "arguments": {"sacks": 12}}
        calls = [{"id": call_id, "type": "function", "function": function} for _ in range(num_calls)]
        return chat_format.write_answer({"content": None, "tool_calls": calls}, tools=[tool])

    short = False
    if not (text := written(1, LONG_ID)):
        text, short = written(1, SHORT_ID), True
    parallel = not text or bool(written(2, SHORT_ID if short else LONG_ID))
    expected = [("mill_wheel", {"sacks": 12})]
    for known, form in FORMS.items() if named is None else ():
        text = written(1, _own_id(form, "mill_wheel", 0)) if form.call_id else text
        # what a template puts before a call, such as an empty thought, is no part of it
        for start in (0, text.rfind("</think>") + len("</think>")) if "</think>" in text else (0,):
            said, calls = parse_calls(text[start:MAX_PROBED_CHARS], form, {"mill_wheel": {"properties": {"sacks": _INTEGER}}})
            if not said.strip() and [(name, json.loads(arguments)) for name, arguments in calls] == expected:
                # the white space before the first call, in which templates of a form differ
                lead = re.search(rf"{re.escape(form.begin)}(\s*\[?\s*)\{{", text) if form.begin and form.kind == "json" else None
                form = form if lead is None or lead[1] == form.lead else replace(form, lead=lead[1])
                return ToolSupport(form, known, chat_format.takes_tools, parallel, short)
    return ToolSupport(named, name, chat_format.takes_tools, parallel, bool(text) and short)


_INTEGER = {"type": "integer"}


@dataclass
class ToolUse:
    """Use of tools in a request.

    Attributes:
        tools: that may be called.
        required: whether one must be.
        parallel: whether several may be.
        held: whether a grammar holds calls to their schemas.
        free: whether an answer without a call may be any text.
        begun: content of the assistant's message that the answer goes on with.
    """

    support: ToolSupport
    tools: Sequence[Tool]
    required: bool
    parallel: bool
    held: bool = False
    free: bool = True
    begun: str = ""

    @property
    def lets_think(self) -> bool:
        """Whether an answer may begin with something else than a call."""
        return not self.required and self.free

    def parser(self, *, live: bool) -> ToolCallParser:
        """Parser of an answer; `live` as in `ToolCallParser`, where a grammar holds its calls."""
        assert self.support.form is not None
        schemas = {tool.name: tool.schema for tool in self.tools}
        return ToolCallParser(self.support.form, schemas, live=live and self.held, begun=self.begun)

    def kept(self, tokenizer: Tokenizer) -> frozenset[int]:
        """Control tokens that are a part of calls."""
        assert self.support.form is not None
        ids = (tokenizer.special_id(tag) for tag in self.support.form.tags if tokenizer.has(tag))
        return frozenset(token for token in ids if tokenizer.is_special(token))

    def new_id(self, name: str, index: int) -> str:
        """Id of a call, of a tool of this name, after so many others."""
        if self.support.form is not None and self.support.form.call_id:
            return _own_id(self.support.form, name, index)
        return secrets.token_hex(5)[:9] if self.support.short_ids else f"call_{secrets.token_hex(12)}"

    def build_grammar(self, answer: str, tokenizer: Tokenizer, validate: Callable[[str], None], stops: Set[int] = frozenset()) -> str:
        """Grammar of an answer that may or must call tools; where it may, "" if no grammar can hold it.

        Args:
            answer: grammar of answers without a call; "" for any text.
            validate: raises `InputError` for a grammar that cannot be used.
            stops: tokens that end an answer.

        Raises:
            FieldError: the schema of a tool cannot be met, or held to where that is due.
        """
        self.free = not answer
        if self.begun and self.parser(live=False).goes_on:
            if self.required or answer or any(tool.strict for tool in self.tools):
                words = "the last message has begun a call, of which no grammar can hold the rest: end the message before it, or ask with"
                raise FieldError("continue_final_message", f'{words} tool_choice "auto" and neither `strict` nor a response format')
            return ""
        why: InputError | None = None
        for lenient in (False, True):
            if lenient and self.required:
                break
            grammar = self._grammar(answer, tokenizer, stops, lenient=lenient)
            try:
                validate(grammar)
            except InputError as e:
                why = e
                continue
            self.held = True
            return grammar
        assert why is not None
        started = time.thread_time()
        for tool in self.tools:
            if time.thread_time() - started > MAX_GRAMMAR_SECONDS:
                break
            try:
                validate(json_schema_grammar(_object(tool.schema)))
            except InputError as e:
                if self.required or tool.strict or not _UNKNOWN.search(str(e)):
                    reason = str(e).removeprefix("the grammar cannot be used: ")
                    raise FieldError(
                        tool.place, f"no call of {tool.name!r} can be held to its schema ({reason}): change it, or leave the tool out"
                    ) from e
        if self.required or answer or any(tool.strict for tool in self.tools):
            raise why
        return ""

    def _grammar(self, answer: str, tokenizer: Tokenizer, stops: Set[int], *, lenient: bool) -> str:
        form = self.support.form
        assert form is not None
        lark = _Lark(tokenizer, lenient)
        # an answer's first lexeme must tell a call from a text, so what leads to a call is one with its beginning
        lead = "" if form.begin else form.lead
        first = lark.rule(" | ".join(lark.rule(lark.call(form, tool, lead)) for tool in self.tools))
        call = lark.rule(" | ".join(lark.rule(lark.call(form, tool)) for tool in self.tools)) if lead else first
        several = f"({lark.literal(form.joint)} {call})*" if form.grouped and self.parallel else ""
        body = lark.rule(" ".join((lark.literal("" if lead else form.lead), first, several, lark.literal(form.end))))
        tag = lark.literal(form.begin)
        if form.also and tokenizer.has(form.also):
            tag = f"({lark.literal(form.also)})?"
        more = f"({lark.literal(form.between)} {tag} {body})*" if self.parallel and not form.grouped else ""
        only = f"{tag} {body} {more}"
        # other control tokens may stand in a text, such as those around thinking
        others = sorted(tokenizer.control_ids - stops - self.kept(tokenizer))
        control = f"<[{','.join(map(str, others))}]>" if others else ""
        noise = lark.rule(f"(TEXT {control})*") if control else ""
        several_tags = self.parallel and not form.grouped
        if self.required:
            start = only
        elif answer and not form.begin and form.kind == "json":
            start = lark.json(self._either(answer))
        elif answer:
            start = f"{only} | @answer"
        elif not form.begin:
            begun = r"\[[ \n]*[A-Za-z_][A-Za-z0-9_.]*\(" if form.kind == "python" else r"\{[ \n]*\"name\""
            lark.lines.append(rf"NO_CALL: TEXT & ~/[ \t\r\n]*{begun}(.|\n)*/")
            start = f"NO_CALL {f'({control} TEXT)*' if control else ''} | {only}"
        elif tokenizer.has(form.begin) and tokenizer.is_special(tokenizer.special_id(form.begin)):
            start = f"({noise} TEXT {tag} {body})* {noise} TEXT" if several_tags else f"{noise} TEXT ({tag} {body})?"
        else:
            lark.lines.append(f"trigger[lazy]: TEXT {json.dumps(form.begin)}")
            start = f"({noise} trigger {body})* {noise} TEXT" if several_tags else f"{noise} (TEXT | trigger {body})"
        grammars: list[dict[str, Any]] = [{"lark_grammar": "\n".join((f"start: {start}", r"TEXT: /(.|\n)*/", *lark.lines))}]
        if "@answer" in start:
            grammars += [one | {"name": "answer"} for one in json.loads(answer)["grammars"]]
        return json.dumps({"grammars": grammars})

    def _either(self, answer: str) -> dict[str, Any]:
        """Schema of an answer by another schema, or of a call, where nothing but the object itself tells them apart."""
        form = self.support.form
        assert form is not None
        (told,) = json.loads(answer)["grammars"]
        if told.get("json_schema") is None:
            raise FieldError("structured_outputs", "with tools this model's answers can keep to JSON alone: leave one out")
        defs = {"answer": _at("#/$defs/answer", told["json_schema"])}
        calls: list[dict[str, Any]] = [{"$ref": "#/$defs/answer"}]
        for place, tool in enumerate(self.tools):
            defs[f"tool{place}"] = _at(f"#/$defs/tool{place}", _object(tool.schema))
            parts = {"name": {"const": tool.name}, form.key: {"$ref": f"#/$defs/tool{place}"}}
            calls.append({"type": "object", "properties": parts, "required": list(parts), "additionalProperties": False})
        return {"anyOf": calls, "$defs": defs}


def _at(place: str, schema: Any) -> Any:
    """A schema whose references begin at a place of another."""
    if isinstance(schema, dict):
        refer = lambda name, value: name == "$ref" and isinstance(value, str) and value.startswith("#")  # noqa: E731
        return {k: place + v[1:] if refer(k, v) else _at(place, v) for k, v in schema.items() if k != "x-guidance"}
    return [_at(place, one) for one in schema] if isinstance(schema, list) else schema


def _object(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Schema of arguments by which calls are held: what it does not name is no argument, unless it says otherwise."""
    whole = dict(schema) | {"type": "object"}
    return whole if '"allOf"' in json.dumps(whole) else dict(_closed(whole))  # of what is put together no part can be closed


def _closed(schema: Any) -> Any:
    """A schema whose objects have no properties but those that they name, where it says nothing about others."""
    if not isinstance(schema, dict):
        return schema
    out, named = dict(schema), isinstance(schema.get("properties"), dict)
    for name in ("properties", "$defs", "definitions"):
        if isinstance(schema.get(name), dict):
            out[name] = {key: _closed(value) for key, value in schema[name].items()}
    for name in ("anyOf", "oneOf", "prefixItems"):
        if isinstance(schema.get(name), list) and not named:
            out[name] = [_closed(value) for value in schema[name]]
    if isinstance(schema.get("items"), dict):
        out["items"] = _closed(schema["items"])
    if named and not _OPEN & schema.keys():
        out["additionalProperties"] = False
    return out


_OPEN = {"additionalProperties", "patternProperties", "unevaluatedProperties", "anyOf", "oneOf", "$ref", "if", "not", "dependentSchemas"}


class _Lark:
    """Rules of a grammar in Lark's form, as they are made."""

    def __init__(self, tokenizer: Tokenizer, lenient: bool) -> None:
        self.tokenizer, self.lenient = tokenizer, lenient
        self.lines: list[str] = []

    def rule(self, body: str) -> str:
        """Name of a new rule."""
        self.lines.append(f"r{len(self.lines)}: {body}")
        return self.lines[-1].partition(":")[0]

    def literal(self, text: str) -> str:
        """A text in which names of control tokens are these tokens."""
        names = [name for form in FORMS.values() for name in form.tags if name in text and self.tokenizer.has(name)]
        control = {name: i for name in names if self.tokenizer.is_special(i := self.tokenizer.special_id(name))}
        parts = re.split("(" + "|".join(map(re.escape, control)) + ")", text) if control else [text]
        return " ".join(f"<[{control[part]}]>" if part in control else json.dumps(part) for part in parts if part)

    def json(self, schema: Mapping[str, Any], *, strict: bool = False) -> str:
        """JSON that a schema accepts."""
        told = schema.get("x-guidance")
        guidance = (told if isinstance(told, dict) else {}) | {"whitespace_pattern": WHITESPACE}
        guidance |= {"lenient": True} if self.lenient and not strict else {}
        return f"%json {json.dumps(dict(schema) | {'x-guidance': guidance})}"

    def call(self, form: ToolForm, tool: Tool, lead: str = "") -> str:
        """A call of a tool, behind what leads to it."""
        name = tool.name
        if form.kind == "json":
            begin = json.dumps(f'{lead}{{"name": "{name}", "{form.key}": ')
            return f'{begin} {self.json(_object(tool.schema), strict=tool.strict)} "}}"'
        head = form.head.replace("{}", name)
        if form.kind == "named":
            head = head if self.tokenizer.has("[ARGS]") else head.removesuffix("[ARGS]")
            begin = " /[0-9]+/ ".join(map(self.literal, head.split("#")))
            return f"{begin} {self.json(_object(tool.schema), strict=tool.strict)} {self.literal(form.shut)}"
        if form.kind == "xml":
            tags = [(self.rule(self._tag(form, tool, key)), needed) for key, needed in _fields(tool.schema)]
            fields = " ".join(tag if needed else f"({tag})?" for tag, needed in tags)
            return f"{self.literal(head)} {fields} {self.literal(form.shut)}"
        begin = json.dumps(f"{lead}{name}(")
        return f'{begin} {self._keywords(tool)} ")"'

    def _tag(self, form: ToolForm, tool: Tool, key: str) -> str:
        """An argument between tags; a text ends where its end tag begins."""
        schema, end = property_schema(tool.schema, key), form.field[1]
        begin = json.dumps(form.field[0].replace("{}", key))
        values = schema.get("enum", [schema["const"]] if "const" in schema else None)
        if isinstance(values, list):
            texts = (value if isinstance(value, str) else json.dumps(value) for value in values)
            return f"{begin} ({' | '.join(map(json.dumps, texts))}) {json.dumps(end)}"
        if takes_text(schema):
            text = self._text(schema, strict=tool.strict)
            self.lines.append(f"r{len(self.lines)}[lazy]: {text} {json.dumps(end)}")
            return f"{begin} {self.lines[-1].partition('[')[0]}"
        return f"{begin} {self.json(_with_definitions(schema, tool.schema), strict=tool.strict)} {json.dumps(end)}"

    def _text(self, schema: Mapping[str, Any], *, strict: bool) -> str:
        """Terminal of a text that is not quoted."""
        least, most, pattern = schema.get("minLength"), schema.get("maxLength"), schema.get("pattern")
        terms = []
        if isinstance(least, int) or isinstance(most, int):
            terms.append(f"/(.|\\n){{{least or 0},{'' if most is None else most}}}/")
        if isinstance(pattern, str) and (strict or not self.lenient):
            inner = pattern.removeprefix("^").removesuffix("$").replace("/", "\\/")
            head, tail = ("" if pattern.startswith("^") else "(.|\\n)*"), ("" if pattern.endswith("$") else "(.|\\n)*")
            terms.append(f"/{head}({inner}){tail}/")
        if not terms:
            return "TEXT"
        self.lines.append(f"T{len(self.lines)}: {' & '.join(terms)}")
        return self.lines[-1].partition(":")[0]

    def _keywords(self, tool: Tool) -> str:
        """Arguments as Python's keywords, those that are needed first."""
        fields = sorted(_fields(tool.schema), key=lambda one: not one[1])
        pairs = [(self.rule(f"{json.dumps(key + '=')} {self._python(tool, key)}"), needed) for key, needed in fields]
        needed = ' ", " '.join(name for name, must in pairs if must)
        rest = ""
        options = [name for name, must in pairs if not must]
        tails = [""]  # what may follow from each option on
        for name in reversed(options):
            rest = self.rule(f'(", " {name})? {rest}'.strip())
            tails.append(rest)
        if needed:
            return f"{needed} {rest}"
        firsts = [f"{name} {tails[len(options) - 1 - place]}" for place, name in enumerate(options)]
        return f"({' | '.join(firsts)})?" if firsts else ""

    def _python(self, tool: Tool, key: str) -> str:
        schema = property_schema(tool.schema, key)
        if schema.get("type") == "boolean" and "enum" not in schema and "const" not in schema:
            return '("True" | "False")'
        return self.json(_with_definitions(schema, tool.schema), strict=tool.strict)


def _fields(schema: Mapping[str, Any]) -> list[tuple[str, bool]]:
    """Names of arguments, and whether each is needed."""
    needed = schema.get("required") or []
    names = list(schema.get("properties") or {})
    return [(name, name in needed) for name in [*names, *(name for name in needed if name not in names)]]


def _with_definitions(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Mapping[str, Any]:
    return _closed({name: root[name] for name in ("$defs", "definitions") if name in root} | dict(schema))


# ---- requests ----


def parse_tools(tools: Sequence[Any], *, flat: bool = False) -> list[Tool]:
    """Tools of a request.

    Args:
        flat: as the Responses API has them, without `function` around name and parameters.

    Raises:
        FieldError: one is none, is of a kind that this server does not have, or has a name that is taken.
    """
    if len(tools) > MAX_TOOLS:
        raise FieldError("tools", f"there are {len(tools):,}, and at most {MAX_TOOLS} are taken: leave some out")
    found: dict[str, Tool] = {}
    for place, tool in enumerate(tools):
        where = f"tools.{place}"
        if not isinstance(tool, dict):
            raise FieldError(where, "a tool must be an object with `type` and the function's `name`")
        kind = tool.get("type")
        if kind != "function":
            raise FieldError(f"{where}.type", f"only functions can be called here, and this is '{shown(str(kind))}': leave it out")
        function = tool if flat else tool.get("function")
        where = where if flat else f"{where}.function"
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(function, dict) or not isinstance(name, str) or not re.fullmatch(NAME, name):
            raise FieldError(f"{where}.name", "a function needs a name of 1 to 64 letters, digits, dots, dashes or underscores")
        if name in found:
            raise FieldError(f"{where}.name", f"there is another tool {name!r}: choose another name")
        schema = function.get("parameters")
        if schema is None:
            schema = {"type": "object", "properties": {}, "additionalProperties": False}
        kinds = schema.get("type", "object") if isinstance(schema, dict) else None
        if not isinstance(schema, dict) or "object" not in (kinds if isinstance(kinds, list) else [kinds]):
            raise FieldError(f"{where}.parameters", "they must be the JSON schema of an object: its `type` is `object`")
        if not isinstance(schema.get("properties", {}), dict) or not isinstance(schema.get("required", []), list):
            raise FieldError(f"{where}.parameters", "`properties` must be an object of schemas, and `required` a list of names")
        strict = function.get("strict")
        if strict not in (None, True, False):
            raise FieldError(f"{where}.strict", "must be true or false")
        found[name] = Tool(name, schema, bool(strict), f"{where}.parameters")
    return list(found.values())


def use_tools(
    support: ToolSupport, tools: Sequence[Any], choice: Any = None, *, parallel: bool | None = None, flat: bool = False
) -> ToolUse | None:
    """Use of tools that a request asks for; None where none is to be called, or calls cannot be told from text.

    Args:
        tools, choice, parallel: fields of the request.
        flat: as in `parse_tools`.

    Raises:
        FieldError: a field is wrong, or asks for what this model cannot do.
    """
    found = parse_tools(tools, flat=flat)
    names, required = [tool.name for tool in found], choice == "required"
    several = support.parallel and parallel is not False
    match choice:
        case None | "auto" | "none" | "required":
            pass
        case {"type": "function", "function": {"name": str(name)}} | {"type": "function", "name": str(name)}:
            names, required, several = [name], True, False
        case {"type": "allowed_tools", "allowed_tools": {"mode": "auto" | "required" as mode, "tools": list(some)}} | {
            "type": "allowed_tools",
            "mode": "auto" | "required" as mode,
            "tools": list(some),
        }:
            names, required = [_name_of(one) for one in some], mode == "required"
        case _:
            words = 'must be "auto", "none", "required", {"type": "function", ...} with a name, or {"type": "allowed_tools", ...}'
            raise FieldError("tool_choice", words)
    if (unknown := next((name for name in names if name not in {tool.name for tool in found}), None)) is not None:
        raise FieldError("tool_choice", f"there is no tool '{shown(unknown)}' among the tools: name one that there is")
    if not found or not names or choice == "none":
        if required:
            raise FieldError("tool_choice", "a tool must be called, and there are no tools: give some, or leave it out")
        return None
    if not support.takes_tools:
        raise FieldError("tools", "the chat template of this model has no place for tools: leave them out, or serve a model that has it")
    if support.form is None:
        if required or any(tool.strict for tool in found):
            why = "the form in which this model writes calls is not known: start the server with --tool-call-parser NAME"
            raise FieldError("tool_choice" if required else "tools", why)
        return None
    return ToolUse(support, [tool for tool in found if tool.name in names], required, several)


def _name_of(tool: Any) -> str:
    name = tool.get("name", (tool.get("function") or {}).get("name")) if isinstance(tool, dict) else None
    return name if isinstance(name, str) else ""
