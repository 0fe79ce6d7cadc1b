"""Row filters: `task = sums and (score < 1.5 or text ~ "seven")`, parsed into Arrow computations over the columns of a table.

`or` binds least, then `and`, then `not`, then the comparisons: a column, a sign, and a number, a word or a quoted text. `~` is "contains",
whatever the case. Nothing is evaluated as code.
"""

import difflib
import re
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from gristmill.core.errors import InputError
from gristmill.core.untrusted import quoted

MAX_LENGTH, MAX_DEPTH = 2000, 20
TEXT = "text"  # all texts of a row
TEXT_COLUMNS = ("text", "chosen", "rejected", "reason", "messages")
FREE_FORM = ("rating", "truth", "meta")  # JSON as text: of no use in a comparison
TOKEN = re.compile(
    r"""\s*(?:(?P<string>"[^"]*"|'[^']*')|(?P<sign><=|>=|!=|[=<>~()])|(?P<word>[^\s"'()=<>~!]+)|(?P<wrong>\S))""",
)
SIGNS = {
    "=": pc.equal,
    "!=": pc.not_equal,
    "<": pc.less,
    "<=": pc.less_equal,
    ">": pc.greater,
    ">=": pc.greater_equal,
}


def fields_of(table: pa.Table) -> list[str]:
    """Names that a filter may have, of a table's columns."""
    plain = [f.name for f in table.schema if is_plain(f.type) and f.name not in FREE_FORM]
    return sorted({*plain, TEXT})


def is_plain(kind: pa.DataType) -> bool:
    """Whether a column of this type has one text, number or truth value a row."""
    return bool(pa.types.is_string(kind) or pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind))


def mask(table: pa.Table, text: str) -> pa.ChunkedArray | pa.Array | None:
    """Which rows a filter lets through, as booleans; None for an empty filter, which lets all through.

    Raises:
        InputError: the text is no filter; the message says where, and for an unknown column which one is nearest.
    """
    if len(text) > MAX_LENGTH:
        raise InputError(f"A filter may have {MAX_LENGTH:,} characters: shorten it.")
    tokens: list[tuple[str, str]] = []
    for match in TOKEN.finditer(text):
        kind = str(match.lastgroup)
        if kind == "wrong":
            raise InputError(
                f"The filter cannot be read at {quoted(match[kind])}: write it as score < 1.5 and text ~ {chr(34)}word{chr(34)}."
            )
        tokens.append((kind, match[kind]))
    if not tokens:
        return None
    parser = _Parser(table, tokens)
    found = parser.alternatives(0)
    if parser.at < len(tokens):
        raise InputError(f"The filter has {quoted(tokens[parser.at][1])} where `and` or `or` was due.")
    return pc.fill_null(found, False)


class _Parser:
    """Recursive descent over tokens, each node computed at once."""

    def __init__(self, table: pa.Table, tokens: Sequence[tuple[str, str]]):
        self.table, self.tokens, self.at = table, tokens, 0

    def alternatives(self, depth: int) -> Any:
        found = self.conjunction(depth)
        while self.take("or"):
            found = pc.or_kleene(found, self.conjunction(depth))
        return found

    def conjunction(self, depth: int) -> Any:
        found = self.negation(depth)
        while self.take("and"):
            found = pc.and_kleene(found, self.negation(depth))
        return found

    def negation(self, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise InputError("The filter has too many brackets within each other.")
        if self.take("not"):
            return pc.invert(pc.fill_null(self.negation(depth + 1), False))
        if self.take("("):
            found = self.alternatives(depth + 1)
            if not self.take(")"):
                raise InputError("The filter lacks a closing bracket.")
            return found
        return self.comparison()

    def take(self, text: str) -> bool:
        if self.at < len(self.tokens) and self.tokens[self.at] in (("word", text), ("sign", text)):
            self.at += 1
            return True
        return False

    def next(self, *kinds: str) -> str:
        kind, text = self.tokens[self.at] if self.at < len(self.tokens) else ("end", "its end")
        if kind not in kinds:
            what = "a sign such as = or ~" if "sign" in kinds else "a value" if "string" in kinds else "the name of a column"
            raise InputError(f"The filter has {quoted(text)} where {what} was due.")
        self.at += 1
        return text[1:-1] if kind == "string" else text

    def comparison(self) -> Any:
        name, sign, value = self.next("word"), self.next("sign"), self.next("word", "string")
        known = fields_of(self.table)
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}."
            raise InputError(f"These rows have no column {quoted(name)}: {hint}")
        if name == TEXT:
            if sign != "~":
                raise InputError('Texts are searched with ~, as text ~ "word".')
            return contains(self.table, value)
        column = self.table.column(name)
        if sign == "~":
            if not pa.types.is_string(column.type):
                raise InputError(f"{name} is no text: compare it with = or <.")
            return pc.match_substring(column, value, ignore_case=True)
        if sign not in SIGNS:
            raise InputError(f"The filter has {quoted(sign)} where a sign such as = or ~ was due.")
        return SIGNS[sign](column, _value(name, column.type, value))


def _value(name: str, kind: pa.DataType, text: str) -> Any:
    if pa.types.is_string(kind):
        return pa.scalar(text, pa.string())
    if pa.types.is_boolean(kind):
        if text not in ("true", "false"):
            raise InputError(f"{name} is true or false, and not {quoted(text)}.")
        return pa.scalar(text == "true")
    try:
        return pa.scalar(float(text), pa.float64())
    except ValueError:
        raise InputError(f"{name} is a number, and {quoted(text)} is none.") from None


def contains(table: pa.Table, text: str) -> Any:
    """Which rows have a text in any of their turns, answers or reasons, whatever the case."""
    found: Any = pa.chunked_array([pa.array([False] * table.num_rows, pa.bool_())])
    for name in TEXT_COLUMNS:
        if name not in table.schema.names:
            continue
        column = table.column(name)
        if pa.types.is_string(column.type):
            found = pc.or_kleene(found, pc.fill_null(pc.match_substring(column, text, ignore_case=True), False))
        elif pa.types.is_list(column.type) and pa.types.is_struct(column.type.value_type):
            hits = pc.match_substring(pc.struct_field(pc.list_flatten(column), "content"), text, ignore_case=True)
            rows = pc.list_parent_indices(column).filter(pc.fill_null(hits, False))
            found = pc.or_kleene(found, pc.is_in(pa.array(range(table.num_rows), pa.int64()), value_set=rows.unique().cast(pa.int64())))
    return found
