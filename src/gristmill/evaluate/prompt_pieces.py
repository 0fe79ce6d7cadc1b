"""Prompt pieces: values and texts that a task's Jinja templates make of a document, in a sandbox that can only read.

Templates have no loops without an end, no macros and no files; a template that is a single expression gives its value, not its text.
"""

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from jinja2 import StrictUndefined, TemplateError, Undefined, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gristmill.core.errors import InputError
from gristmill.core.untrusted import quoted

MAX_TEMPLATE_CHARS = 1 << 16
MAX_TEXT = 1 << 22  # characters of a value on the way to a prompt
MAX_LOOP_DEPTH = 2
ONE_EXPRESSION = re.compile(r"\s*\{\{((?:(?!\{\{|\}\}|\{%).)*)\}\}\s*", re.S)
FILTERS = ("capitalize", "default", "first", "int", "join", "last", "length", "list", "lower", "map", "replace", "string", "trim", "upper")
REFUSED = (nodes.Macro, nodes.CallBlock, nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends, nodes.Block)
TEXT_METHODS = "strip lstrip rstrip lower upper capitalize title split startswith endswith index find replace"
SAFE_METHODS = {str: set(TEXT_METHODS.split()), list: {"index", "count"}, dict: {"get", "items", "keys", "values"}}


def hellaswag_clean(text: str) -> str:
    """HellaSwag's text without its source's marks; double spaces are looked for once."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with few filters, few methods, and results of bounded size."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
        self.filters = {name: self.filters[name] for name in FILTERS} | {"hellaswag_clean": hellaswag_clean}
        self.globals = {}

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        allowed = next((names for kind, names in SAFE_METHODS.items() if isinstance(obj, kind)), None)
        return not attr.startswith("_") and (not callable(value) or (allowed is not None and attr in allowed))

    def wrap_str_format(self, value: Any) -> Any:
        return None  # then str.format is an attribute like others, and not allowed

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sizes = [len(side) if isinstance(side, str | list | tuple) else side for side in (left, right)]
        if operator == "*" and isinstance(left, str | list | tuple) + isinstance(right, str | list | tuple) == 1:
            if sizes[0] * sizes[1] > MAX_TEXT:
                raise TemplateError("a product is too long")
        elif operator != "+" and not all(isinstance(side, int | float) and abs(side) < 100 for side in (left, right)):
            raise TemplateError(f"{operator} is for small numbers")
        return _bounded(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 (as in Jinja: a value may be named self)
        return _bounded(super().call(__context, __obj, *args, **kwargs))


def _bounded(value: Any) -> Any:
    if isinstance(value, str | list | tuple) and len(value) > MAX_TEXT:
        raise TemplateError("a value is too long")
    return value


ENVIRONMENT = _Environment()
Piece = Callable[[Mapping[str, Any]], Any]


@lru_cache(1024)
def compile_piece(template: str) -> Piece:
    """A function from a document to what a template makes of it.

    Raises:
        InputError: the template is no Jinja, or has what templates of tasks may not have.
    """
    if len(template) > MAX_TEMPLATE_CHARS:
        raise InputError(f"A template has {len(template):,} characters: at most {MAX_TEMPLATE_CHARS:,} are read.")
    try:
        tree = ENVIRONMENT.parse(template)
        _check(tree, 0)
        if one := ONE_EXPRESSION.fullmatch(template):
            # the undefined stays, so that a column that is missing is told
            run: Callable[..., Any] = ENVIRONMENT.compile_expression(one[1].strip(), undefined_to_none=False)
        else:
            run = ENVIRONMENT.from_string(template).render
    except TemplateError as e:
        raise InputError(f"The template {quoted(template)} cannot be used: {quoted(str(e))[1:-1]}.") from None

    def make(doc: Mapping[str, Any]) -> Any:
        try:
            value = run({**doc, "row": doc})
            if isinstance(value, Undefined):
                str(value)  # which says what is missing
            return _bounded(value)
        except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError, RecursionError) as e:
            raise InputError(f"The template {quoted(template)} fails on a document ({quoted(str(e))[1:-1]}).") from None

    return make


def _check(node: nodes.Node, depth: int) -> None:
    if isinstance(node, REFUSED) or (isinstance(node, nodes.For) and (node.recursive or depth >= MAX_LOOP_DEPTH)):
        raise TemplateError(f"{type(node).__name__} has no place in a task, or is nested too deeply")
    for child in node.iter_child_nodes():
        _check(child, depth + isinstance(node, nodes.For))


def piece(template: str | int, doc: Mapping[str, Any]) -> Any:
    """The value of a template for a document. A template that is a column's name gives the column."""
    if isinstance(template, int):
        return template
    return doc[template] if template in doc else compile_piece(template)(doc)


def text_piece(template: str, doc: Mapping[str, Any]) -> str:
    """The same as a text."""
    value = piece(template, doc)
    return value if isinstance(value, str) else str(value)
