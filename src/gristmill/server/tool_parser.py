"""Tool call parsers: the forms in which models write calls, by vLLM's names, and the incremental parser of an answer.

Of what a model writes only a whole call of a tool that there is becomes one. All else, a call that breaks off too, stays text.

Sources: vLLM's documentation of tool calling; the chat templates of the model families.
"""

import ast
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

MAX_PYTHON_CHARS = 100_000  # of calls that are written as Python, which are parsed as a whole
MAX_BROKEN = 32  # calls that break off, behind which an answer is text: each may be read to the end of the answer
MAX_NAME = 64  # characters of a tool's name, as with OpenAI
NAME = rf"[A-Za-z0-9_.\-]{{1,{MAX_NAME}}}"
_HEADER = re.compile(rf'\{{\s*"name"\s*:\s*"({NAME})"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{{)')
_OUTSIDE, _IN_STRING = re.compile(r'["{}\[\]]'), re.compile(r'["\\]')
_FIRST_KEY = re.compile(r'\{\s*"([^"\\]*)"')
_PYTHON = re.compile(r"\[\s*(?:[A-Za-z_][\w.]*\s*(?:\(|\Z)|\Z)")
_OPTIONAL = ("[ARGS]", "functions.")  # which some models leave out before or behind a name
Kind = Literal["json", "named", "xml", "python"]


@dataclass(frozen=True)
class ToolForm:
    """Form of tool calls: how a family of models writes them.

    Attributes:
        begin: tag before calls; "": an answer that calls begins with the first call.
        lead: what follows it.
        kind: of a call: an object with name and arguments, a name before its arguments, tags for each parameter, or Python.
        key: what an object calls the arguments.
        joint: between calls behind one tag; "": each call has a tag of its own.
        end: behind the last of them.
        between: between the end of a call and the next one's tag.
        also: control token that may stand before a call.
        head: of a call that is no object, with {} for its name and # for a number, up to its arguments.
        shut: behind its arguments.
        field: of an argument in tags, with {} for its name, up to its value, and what is behind that.
        call_id: of ids, where the template writes these for the names of calls.
    """

    begin: str
    lead: str = ""
    kind: Kind = "json"
    key: str = "arguments"
    joint: str = ""
    end: str = ""
    between: str = ""
    also: str = ""
    head: str = ""
    shut: str = ""
    field: tuple[str, str] = ("", "")
    call_id: str = ""

    @property
    def tags(self) -> tuple[str, ...]:
        """Names that may be control tokens, of which an answer's text then tells nothing."""
        inner = _TAG.findall(self.head + self.shut) if self.kind == "named" else []
        return tuple(dict.fromkeys(tag for tag in (self.begin, self.end.strip(), *inner, self.also) if tag))

    @property
    def opener(self) -> str:
        """What is before the name of each of several calls behind one tag; "" where there is none."""
        return self.head.partition("{}")[0].removesuffix("functions.") if self.kind == "named" else ""

    @property
    def grouped(self) -> bool:
        """Whether one tag stands before several calls."""
        return bool(self.joint or self.opener)

    @cached_property
    def head_pattern(self) -> re.Pattern[str]:
        """The head of a call, with its name as a group."""
        parts = "".join(f"(?:{re.escape(part)})?" if part in _OPTIONAL else "".join(atoms) for part, atoms in self._head_parts)
        return re.compile(rf"{parts}\s*" + (r"(?=\{)" if self.kind == "named" else ""))

    @cached_property
    def head_begun(self) -> re.Pattern[str]:
        """What the head of a call may begin with."""
        pattern = r"\s*"
        for part, atoms in reversed(self._head_parts):
            pattern = f"(?:{re.escape(part)})?{pattern}|{_cut(atoms, '')}" if part in _OPTIONAL else _cut(atoms, pattern)
        return re.compile(pattern)

    @property
    def _head_parts(self) -> list[tuple[str, list[str]]]:
        """Literals, white space and places of the head, and the patterns that match each one after another."""
        optional = "|".join(map(re.escape, _OPTIONAL))
        parts = [part for part in re.split(rf"(\{{\}}|#|\s+|{optional})", self.head.rstrip()) if part]
        places = {"{}": [f"({NAME})"], "#": [r"\d+"]}
        return [(part, places.get(part) or ([r"\s*"] if part.isspace() else [re.escape(char) for char in part])) for part in parts]

    @cached_property
    def field_patterns(self) -> tuple[re.Pattern[str], re.Pattern[str], re.Pattern[str]]:
        """An argument in tags, as a name and a value; the beginning of one; the end of a call."""
        (before, behind), line = self.field[0].split("{}"), r"\n?" if self.field[0].endswith("\n") else ""
        behind = "".join(r"\s*" if part.isspace() else re.escape(part) for part in re.split(r"(\s+)", behind.rstrip()))
        value = rf"([^<>\n]{{1,200}}){behind}{line}(.*?){line}{re.escape(self.field[1].strip())}"
        end = rf"\s*{re.escape(self.shut)}" if self.shut else rf"\s*(?={re.escape(self.end.strip())})"
        begin = rf"\s*{re.escape(before)}"
        return re.compile(begin + value, re.S), re.compile(begin), re.compile(end)


def _cut(atoms: Sequence[str], pattern: str) -> str:
    """Pattern of any beginning of some patterns one after another, the last of them another one's."""
    for atom in reversed(atoms):
        pattern = f"(?:{atom}(?:{pattern}))?"
    return pattern


_TAG = re.compile(r"<[^<>{}\s]+>|\[ARGS\]")
FORMS: dict[str, ToolForm] = {
    "hermes": ToolForm("<tool_call>", "\n", end="\n</tool_call>", between="\n"),
    "qwen3_coder": ToolForm(
        "<tool_call>",
        "\n",
        kind="xml",
        end="\n</tool_call>",
        between="\n",
        head="<function={}>\n",
        shut="</function>",
        field=("<parameter={}>\n", "\n</parameter>\n"),
    ),
    "llama3_json": ToolForm("", key="parameters", joint="; ", also="<|python_tag|>"),
    "mistral": ToolForm("[TOOL_CALLS]", " [", joint=", ", end="]"),
    "mistral_args": ToolForm("[TOOL_CALLS]", kind="named", head="{}[ARGS]"),
    "granite": ToolForm("<|tool_call|>", "[", joint=", ", end="]"),
    "jamba": ToolForm("<tool_calls>", "[\n    ", joint=",\n    ", end="\n]</tool_calls>"),
    "phi4_mini_json": ToolForm("functools", "[", joint=", ", end="]"),
    "pythonic": ToolForm("", "[", kind="python", joint=", ", end="]"),
    "deepseek_v3": ToolForm(
        "<\uff5ctool\u2581calls\u2581begin\uff5c>",
        kind="named",
        joint="\n",
        end="<\uff5ctool\u2581calls\u2581end\uff5c>",
        head="<\uff5ctool\u2581call\u2581begin\uff5c>function<\uff5ctool\u2581sep\uff5c>{}\n```json\n",
        shut="\n```<\uff5ctool\u2581call\u2581end\uff5c>",
    ),
    "glm45": ToolForm(
        "<tool_call>",
        kind="xml",
        end="</tool_call>",
        between="\n",
        head="{}\n",
        field=("<arg_key>{}</arg_key>\n<arg_value>", "</arg_value>\n"),
    ),
    "kimi_k2": ToolForm(
        "<|tool_calls_section_begin|>",
        kind="named",
        end="<|tool_calls_section_end|>",
        head="<|tool_call_begin|>functions.{}:#<|tool_call_argument_begin|>",
        shut="<|tool_call_end|>",
        call_id="functions.{}:#",
    ),
}


@dataclass(frozen=True)
class CallDelta:
    """Delta of a tool call: its name, which comes first, or a piece of its arguments' JSON."""

    index: int
    name: str = ""
    arguments: str = ""


Piece = str | CallDelta


class ToolCallParser:
    """Incremental parser of an answer that may call tools.

    White space around calls is left out. Else text and arguments are told as they were written: a stream says what a whole answer does.

    Args:
        form: in which calls are written.
        tools: schema of the arguments of each tool by name.
        live: tell arguments as they come, which is for answers that a grammar holds to calls that are right.
        begun: what the answer goes on with: not told, but a call that begins in it is told whole.

    Attributes:
        num_calls: told so far.
        goes_on: whether the answer begins within a call, or right behind one.
    """

    def __init__(self, form: ToolForm, tools: Mapping[str, Mapping[str, Any]], *, live: bool = False, begun: str = "") -> None:
        self.form, self.tools, self.live = form, tools, live
        self.num_calls = 0
        self._text = ""  # what is not told yet, behind what is passed
        self._passed = ""  # what a call has begun with, and is text if it is none
        self._skip = 0  # characters of the text that are known not to begin a call
        self._num_broken = 0
        self._step: Callable[[bool], bool] = self._plain if form.begin else self._start
        self._list = self._outer = False
        self._name = ""
        self._at = self._depth = 0  # how far an object is read, and how deep it is there
        self._in_string = self._escaped = False
        self._out: list[Piece] = []
        self._known = 0  # characters of what is not told yet that `begun` has brought
        self.add(begun)
        self.goes_on = self._step not in (self._plain, self._start)
        self.num_calls = 0
        self._known = len(self._passed) + len(self._text)
        if not form.begin and self._step == self._plain:  # what goes on with a text may begin with a call
            self._step, self._text, self._known = self._start, "", 0

    def add(self, text: str, *, last: bool = False) -> list[Piece]:
        """Text and calls that can be told now, in order; with the `last` piece, all that is left."""
        self._text += text
        self._out = []
        while self._step(last):
            pass
        return self._out

    # ---- steps: each tells or passes one thing, and is False if it needs more text ----

    def _start(self, last: bool) -> bool:
        """Whether an answer begins with a call, where no tag says so."""
        also = self.form.also
        text = self._text.lstrip()
        if also and text.startswith(also):
            text = text[len(also) :].lstrip()
        if not last and (not text or (also and also.startswith(text))):
            return False
        self._passed, self._text = self._text[: len(self._text) - len(text)], text
        if self.form.kind == "python":
            return self._go(self._python) if _PYTHON.match(text) else self._broken()
        return self._go(self._call) if text.startswith("{") else self._broken()

    def _plain(self, last: bool) -> bool:
        """Text up to the next tag, or as far as none can begin in it."""
        tag, text = self.form.begin if self._num_broken < MAX_BROKEN else "", self._text
        found = text.find(tag, self._skip) if tag else -1
        if found >= 0:
            said = text[:found].rstrip()
            self._say(said)
            self._passed, self._text = text[len(said) : found + len(tag)], text[found + len(tag) :]
            self._list = False
            return self._go(self._call)
        if last:
            self._say(text.rstrip() if self.num_calls else text)
            self._text = ""
            return False
        hold = next((k for k in range(min(len(tag) - 1, len(text) - self._skip), 0, -1) if text.endswith(tag[:k])), 0)
        end = len(text[: len(text) - hold].rstrip())  # white space may yet be that before a call
        self._say(text[:end])
        self._text, self._skip = text[end:], max(0, self._skip - end)
        return False

    def _call(self, last: bool) -> bool:
        """The beginning of a call."""
        self._pass(len(self._text) - len(self._text.lstrip()))
        text, form = self._text, self.form
        if not text:
            return self._broken() if last else False
        if form.joint and form.begin and not self._list and text[0] == "[":
            self._list = True
            self._pass(1)
            return True
        if form.kind == "xml":
            return self._tags(last)
        self._rewind()
        if form.kind == "json":
            self._name = ""
            return self._go(self._object) if text[0] == "{" else self._broken()
        named = form.head_pattern.match(text)
        if named is None:
            return False if not last and form.head_begun.fullmatch(text) else self._broken()
        self._name = named[1]
        self._pass(named.end())
        return self._begin_arguments(outer=False) if self.live and self._name in self.tools else self._go(self._object)

    def _object(self, last: bool) -> bool:
        """A whole object: a call, or the arguments of the name before it."""
        text = self._text
        header = None if self._name else _HEADER.match(text)
        if self.live and header and header[1] in self.tools:
            self._name = header[1]
            self._pass(header.end())
            return self._begin_arguments(outer=True)
        if not self._name and (key := _FIRST_KEY.match(text)) and key[1] not in ("name", "arguments", "parameters", "id", "type"):
            return self._broken()
        end = self._scan()
        if not end:
            return self._broken() if last else False
        call = _read_call(text[:end], self._name, header.end() if header else 0)
        if call is None or call[0] not in self.tools:
            return self._broken()
        return self._tell(call[0], call[1], end)

    def _begin_arguments(self, *, outer: bool) -> bool:
        self._out.append(CallDelta(self.num_calls, self._name))
        self._rewind()
        self._outer = outer
        return self._go(self._arguments)

    def _arguments(self, last: bool) -> bool:
        """Arguments as they come, and what is behind them in the object of the call."""
        end = self._scan()
        if self._name and self._text:
            self._out.append(CallDelta(self.num_calls, arguments=self._text[: end or self._at]))
        self._text, self._at = self._text[end or self._at :], 0
        if not end:
            return False
        if self._name and self._outer:
            self._name, self._depth = "", 1
            return True
        self.num_calls += 1
        self._passed, self._name = "", ""
        return self._go(self._shut)

    def _tags(self, last: bool) -> bool:
        """A call in tags, with one for each parameter."""
        text = self._text
        form, end = self.form, self.form.shut or self.form.end
        if not form.head_pattern.match(text) and (last or not form.head_begun.fullmatch(text)):
            return self._broken()
        if end not in text:
            return self._broken() if last else False
        call = _read_tags(text, form, self.tools)
        if call is None:
            return self._broken()
        return self._tell(*call) if call[2] else self._broken() if last else False

    def _python(self, last: bool) -> bool:
        """Calls as a list of Python, which are the whole answer."""
        if not last:
            return False
        calls = _read_python(self._text)
        if not calls or any(name not in self.tools for name, _ in calls):
            return self._broken()
        for name, arguments in calls:
            self._tell(name, arguments, 0)
        self._text = ""
        return self._go(self._plain)

    def _shut(self, last: bool) -> bool:
        """What is behind the arguments of a call."""
        text, tag = self._text.lstrip(), self.form.shut.strip() if self.form.kind == "named" else ""
        if tag.startswith(text) and tag != text and not last:
            return False
        if tag and text.startswith(tag):
            self._drop(len(self._text) - len(text) + len(tag))
        return self._go(self._next)

    def _next(self, last: bool) -> bool:
        """What is between calls behind one tag."""
        self._drop(len(self._text) - len(self._text.lstrip()))
        text = self._text
        if not text and not last:
            return False
        if self.form.joint and text[:1] in (",", ";"):
            self._pass(1)
            return self._go(self._call)
        if (opener := self.form.opener) and text:
            if text.startswith(opener):
                return self._go(self._call)
            if opener.startswith(text) and not last:
                return False
        if self._list and text[:1] == "]":
            self._drop(1)
        return self._go(self._close)

    def _close(self, last: bool) -> bool:
        """The end tag, which some models leave out."""
        text, tag = self._text.lstrip(), self.form.end.strip().removeprefix("]")
        if tag and tag.startswith(text) and tag != text and not last:
            return False
        if tag and text.startswith(tag):
            self._drop(len(self._text) - len(text) + len(tag))
        return self._go(self._plain)

    # ---- what they share ----

    def _go(self, step: Callable[[bool], bool]) -> bool:
        self._step = step
        return True

    def _rewind(self) -> None:
        self._at = self._depth = 0
        self._in_string = self._escaped = False

    def _say(self, text: str) -> None:
        known = min(self._known, len(text))
        self._known -= known
        if text[known:]:
            self._out.append(text[known:])

    def _drop(self, count: int) -> None:
        self._text, self._known = self._text[count:], max(0, self._known - count)

    def _pass(self, count: int) -> None:
        self._passed, self._text = self._passed + self._text[:count], self._text[count:]

    def _tell(self, name: str, arguments: str, end: int) -> bool:
        self._out += [CallDelta(self.num_calls, name), CallDelta(self.num_calls, arguments=arguments)]
        self.num_calls += 1
        self._passed, self._text, self._known = "", self._text[end:], 0
        return self._go(self._shut)

    def _broken(self) -> bool:
        """What has begun like a call is text."""
        self._num_broken += 1
        tag = self.form.begin
        self._skip = self._passed.index(tag) + len(tag) if tag and self._passed.lstrip().startswith(tag) else 0
        self._text, self._passed = self._passed + self._text, ""
        return self._go(self._plain)

    def _scan(self) -> int:
        """Where the object at the beginning of the text ends; 0 while it does not."""
        text, at = self._text, self._at
        while at < len(text):
            if self._escaped:
                self._escaped, at = False, at + 1
                continue
            found = (_IN_STRING if self._in_string else _OUTSIDE).search(text, at)
            if found is None:
                break
            at, mark = found.end(), found[0]
            if self._in_string:
                self._escaped, self._in_string = mark == "\\", mark == "\\"
            elif mark == '"':
                self._in_string = True
            else:
                self._depth += 1 if mark in "{[" else -1
                if self._depth == 0:
                    self._at = 0
                    return at
        self._at = len(text)
        return 0


def parse_calls(text: str, form: ToolForm, tools: Mapping[str, Mapping[str, Any]]) -> tuple[str, list[tuple[str, str]]]:
    """Text of a whole answer, and the calls in it as names and the JSON of their arguments."""
    said, calls = "", list[tuple[str, str]]()
    for piece in ToolCallParser(form, tools).add(text, last=True):
        if isinstance(piece, str):
            said += piece
        elif piece.name:
            calls.append((piece.name, ""))
        else:
            calls[-1] = (calls[-1][0], calls[-1][1] + piece.arguments)
    return said, calls


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _loads(text: str) -> Any:
    return json.loads(text, parse_constant=_refuse_constant)


def _read_call(text: str, name: str, arguments_at: int) -> tuple[str, str] | None:
    """Name and arguments of a call, which are all of the text where there is a name already; None if it is no call."""
    try:
        value = _loads(text)
        if not name:
            name = value.get("name")
            arguments = value.get("arguments", value.get("parameters", {}))
            if isinstance(arguments, str):
                arguments = _loads(arguments)
            text = text[arguments_at : json.JSONDecoder().raw_decode(text, arguments_at)[1]] if arguments_at else json.dumps(arguments)
            value = arguments
    except (ValueError, RecursionError):
        return None
    return (name, text) if isinstance(name, str) and isinstance(value, dict) else None


def _read_tags(text: str, form: ToolForm, tools: Mapping[str, Mapping[str, Any]]) -> tuple[str, str, int] | None:
    """Name, arguments and end of a call in tags; the end is 0 while it is not there, and None says that it is no call."""
    opened = form.head_pattern.match(text)
    if opened is None or opened[1] not in tools:
        return None
    field, field_begun, end = form.field_patterns
    schema, at, arguments = tools[opened[1]], opened.end(), dict[str, Any]()
    while (found := field.match(text, at)) is not None:
        if found[1] in arguments:
            return None
        try:
            arguments[found[1]] = value_of(found[2], property_schema(schema, found[1]))
        except (ValueError, RecursionError):
            return None
        at = found.end()
    closed = end.match(text, at)
    if closed is None:  # the tag that was seen is a part of a value, or there is something else
        return (opened[1], "", 0) if field_begun.match(text, at) else None
    return opened[1], json.dumps(arguments, ensure_ascii=False), closed.end()


def property_schema(schema: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Schema of an argument; {} where it may be anything."""
    found = (schema.get("properties") or {}).get(name)
    for _ in range(8):
        where = found.get("$ref") if isinstance(found, dict) else None
        if not isinstance(where, str) or not where.startswith("#/"):
            break
        found = schema
        for part in where[2:].split("/"):
            found = found.get(part) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}


def takes_text(schema: Mapping[str, Any]) -> bool:
    """Whether an argument may be a text, which tags hold as it is."""
    kinds = schema.get("type")
    if kinds is not None:
        return "string" in (kinds if isinstance(kinds, list) else [kinds])
    if "const" in schema or "enum" in schema:
        return any(isinstance(value, str) for value in schema.get("enum", [schema.get("const")]))
    branches = [branch for name in ("anyOf", "oneOf", "allOf") for branch in schema.get(name) or ()]
    return any(isinstance(branch, dict) and takes_text(branch) for branch in branches) if branches else True


def value_of(text: str, schema: Mapping[str, Any]) -> Any:
    """Value of an argument in tags: JSON, but for texts, which are not quoted.

    Raises:
        ValueError: it is neither.
    """
    if not takes_text(schema):
        return _loads({"True": "true", "False": "false", "None": "null"}.get(text.strip(), text))
    if schema.get("type") == "string":
        return text
    try:
        value = _loads(text)
    except ValueError:
        return text
    return text if isinstance(value, str) else value


def _read_python(text: str) -> list[tuple[str, str]] | None:
    """Calls in a list of Python with literal arguments; None if a text is something else."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body if len(text) <= MAX_PYTHON_CHARS else None
        calls = tree.elts if isinstance(tree, ast.List) else []
        return [_python_call(call) for call in calls]
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None


def _python_call(call: ast.expr) -> tuple[str, str]:
    if not isinstance(call, ast.Call) or call.args:
        raise ValueError("no call by keywords")
    name = ast.unparse(call.func)
    arguments = {keyword.arg: _literal(keyword.value) for keyword in call.keywords}
    if None in arguments:
        raise ValueError("no names of arguments")
    # two halves of a surrogate pair, as JSON writes them, are one character
    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False).encode("utf-16", "surrogatepass").decode("utf-16")
    return name, text


def _literal(node: ast.expr) -> Any:
    """Value of a literal: what JSON has, by the names of Python or of JSON."""
    match node:
        case ast.Constant(value=str() | int() | float() | None as value):
            return value
        case ast.Name(id="true" | "false" | "null" as name):
            return {"true": True, "false": False, "null": None}[name]
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_literal(item) for item in items]
        case ast.Dict(keys=keys, values=values):
            names = [_literal(key) if key is not None else None for key in keys]
            if all(isinstance(name, str) for name in names):
                return dict(zip(names, map(_literal, values), strict=True))
    raise ValueError("no literal")
