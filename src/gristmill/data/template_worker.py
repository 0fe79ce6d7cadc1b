"""Chat template worker: a process that renders Jinja chat templates of strangers, within limits of time, memory and size.

The language is that of Hugging Face: blocks are trimmed, there are `break` and `continue`, `raise_exception`, `strftime_now`, a `tojson`
that escapes no markup, and the tag `generation` around what the assistant says. Jinja's sandbox keeps the template from everything else.
The process can be ended in the middle of a loop, and has no more memory than it may have.
"""

import json
import resource
import signal
import sys
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from typing import Any, cast

from jinja2 import Environment, Template, TemplateError, TemplateSyntaxError, meta, nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_OUTPUT = 1 << 24  # characters


class Refusal(TemplateError):
    """Refusal by the template itself, by `raise_exception`."""


class _Generation(Extension):
    """Tag `generation`: writes the marks of the environment around what the assistant says."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Macro) -> str:
        begin, end = cast(tuple[str, str], self.environment.globals["_marks"])
        return f"{begin}{caller()}{end}"


class _Values(Namespace):
    """Namespace of a template, without names that the interpreter might take for its own."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # noqa: B902 (a value may be named self)
        values = dict(*args[1:], **kwargs)
        if any(str(name).startswith("_") for name in values):
            raise TemplateError("a namespace has no names that begin with _")
        Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise TemplateError("a namespace has no names that begin with _")
        Namespace.__setitem__(self, name, value)


def _refuse(message: object) -> None:
    raise Refusal(str(message))


def _tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> Environment:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, LoopControlExtension])
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _refuse,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "namespace": _Values,
        "_marks": ("", ""),
    }
    return environment


@lru_cache(maxsize=16)
def _compiled(source: str) -> tuple[Template, list[str]]:
    """A template, and the names of the variables that it reads."""
    environment = _environment()
    names = meta.find_undeclared_variables(environment.parse(source)) - environment.globals.keys()
    return environment.from_string(source), sorted(names)


def render(source: str, values: dict[str, Any], marks: list[str]) -> dict[str, Any]:
    """Render one text: `text` and `variables`, or the `error` and whether it is the template's own `refusal`."""
    try:
        template, names = _compiled(source)
        template.environment.globals["_marks"] = tuple(marks)
        parts: list[str] = []
        size = 0
        for part in template.generate(values):
            parts.append(part)
            size += len(part)
            if size > MAX_OUTPUT:
                return {"error": f"it writes more than {MAX_OUTPUT:,} characters"}
        return {"text": "".join(parts), "variables": names}
    except Refusal as e:
        return {"error": str(e)[:1000], "refusal": True}
    except TemplateSyntaxError as e:
        return {"error": f"line {e.lineno}: {e.message}"[:1000]}
    except MemoryError:
        return {"error": "it needs too much memory"}
    except RecursionError:
        return {"error": "it calls itself without end"}
    except Exception as e:  # whatever a template makes the interpreter raise
        return {"error": f"{type(e).__name__}: {e}"[:1000]}


def main(max_seconds: float, max_memory: int) -> None:
    """Answer requests, a line of JSON each, until there are no more.

    Args:
        max_seconds: of a processor, for one text.
        max_memory: bytes of the whole process.
    """
    for kind, limit in ((resource.RLIMIT_AS, max_memory), (resource.RLIMIT_FSIZE, 0)):
        with suppress(ValueError, OSError):  # some systems have no such limit
            resource.setrlimit(kind, (limit, limit))
    for line in sys.stdin.buffer:
        replies = []
        for source, values, marks in json.loads(line):
            signal.setitimer(signal.ITIMER_PROF, max_seconds)  # whose signal ends the process
            replies.append(render(source, values, marks))
            signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(json.dumps(replies).encode() + b"\n")
        sys.stdout.buffer.flush()
