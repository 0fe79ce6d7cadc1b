"""What an answer's rating must fulfil, in a recipe's words: `correctness >= 3 and not (verbosity > 2 or score < 2.5)`.

`or` binds least, then `and`, then `not`, then the signs; a comparison has a name or a number on either side.
"""

import difflib
import math
import operator
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import NoReturn

from gristmill.core.errors import InputError
from gristmill.data.rows import Rating

NAMES = (*(f.name for f in fields(Rating)), "score")
SIGNS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq}
WORDS = ("and", "or", "not")
DEEPEST = 50  # brackets and `not` within each other
SHOWN = 80  # characters of a text in an error
TOKEN = re.compile(
    r"(?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)|(?P<word>[a-z_]\w*)|(?P<mark><=|>=|==|[<>()])|(?P<wrong>\S)",
    re.ASCII | re.IGNORECASE,
)


class FilterExpr(ABC):
    """A condition on the attributes of a rating and their weighted sum, `score`.

    Its `str` is the normal form, which reads as the same condition; equal conditions have the same.
    """

    __slots__ = ()

    @staticmethod
    def parse(text: str) -> "FilterExpr":
        """Read a condition.

        Raises:
            InputError: the text is no condition; the message says where, and for an unknown name which one is nearest.
        """
        return _Parser(text).parse()

    @abstractmethod
    def holds(self, values: Mapping[str, float]) -> bool:
        """Whether the values of one answer fulfil it; NaN fulfils no comparison.

        Raises:
            InputError: a value that decides is missing.
        """


@dataclass(frozen=True, slots=True)
class _Compare(FilterExpr):
    left: str | float
    sign: str
    right: str | float

    def holds(self, values: Mapping[str, float]) -> bool:
        try:
            left, right = (values[side] if isinstance(side, str) else side for side in (self.left, self.right))
        except KeyError as e:
            raise InputError(f"The condition {self} needs {e.args[0]!r}, and the answer has only {', '.join(values) or 'nothing'}.") from e
        return bool(SIGNS[self.sign](left, right))

    def __str__(self) -> str:
        return f"{_operand(self.left)} {self.sign} {_operand(self.right)}"


@dataclass(frozen=True, slots=True)
class _Not(FilterExpr):
    part: FilterExpr

    def holds(self, values: Mapping[str, float]) -> bool:
        return not self.part.holds(values)

    def __str__(self) -> str:
        return f"not ({self.part})" if isinstance(self.part, _Join) else f"not {self.part}"


@dataclass(frozen=True, slots=True)
class _Join(FilterExpr):
    """Two or more parts, none of which is joined by the same word."""

    word: str
    parts: tuple[FilterExpr, ...]

    def holds(self, values: Mapping[str, float]) -> bool:
        held = (part.holds(values) for part in self.parts)
        return all(held) if self.word == "and" else any(held)

    def __str__(self) -> str:
        # `and` binds more than `or`, so only an `or` within an `and` needs brackets
        return f" {self.word} ".join(f"({p})" if self.word == "and" and isinstance(p, _Join) else str(p) for p in self.parts)


def _operand(side: str | float) -> str:
    return side if isinstance(side, str) else repr(side).removesuffix(".0")


class _Parser:
    """Recursive descent, one method a level."""

    def __init__(self, text: str):
        self.text = text
        self.tokens = list(TOKEN.finditer(text))
        self.at = self.depth = 0

    def parse(self) -> FilterExpr:
        condition = self.join("or")
        if self.peek():
            self.fail("'and', 'or' or the end")
        return condition

    def join(self, word: str) -> FilterExpr:
        parts: list[FilterExpr] = []
        while not parts or self.take(word):
            part = self.join("and") if word == "or" else self.single()
            parts += part.parts if isinstance(part, _Join) and part.word == word else [part]
        return parts[0] if len(parts) == 1 else _Join(word, tuple(parts))

    def single(self) -> FilterExpr:
        if self.take("not"):
            self.deeper()
            condition: FilterExpr = _Not(self.single())
        elif self.take("("):
            self.deeper()
            condition = self.join("or")
            if not self.take(")"):
                self.fail("')', 'and' or 'or'")
        else:
            return self.compare()
        self.depth -= 1
        return condition

    def compare(self) -> FilterExpr:
        left, sign = self.operand(), self.peek()
        if sign not in SIGNS:
            self.fail(f"one of {' '.join(SIGNS)}")
        self.at += 1
        return _Compare(left, sign, self.operand())

    def operand(self) -> str | float:
        word = self.peek()
        kind = self.tokens[self.at].lastgroup if word else None
        if kind not in ("number", "word") or word in WORDS:
            self.fail("a name or a number")
        if kind == "word" and word not in NAMES:
            near = difflib.get_close_matches(word[:SHOWN].lower(), NAMES, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(NAMES)}."
            raise InputError(f"{self.where()} has the unknown name {word[:SHOWN]!r}: {hint}")
        self.at += 1
        if kind == "word":
            return word
        number = float(word) + 0.0  # so that -0 is 0
        if math.isinf(number):
            raise InputError(f"{self.where(-1)} has a number that is too large.")
        return number

    def peek(self) -> str:
        return self.tokens[self.at][0] if self.at < len(self.tokens) else ""

    def take(self, word: str) -> bool:
        found = self.peek() == word
        self.at += found
        return found

    def deeper(self) -> None:
        self.depth += 1
        if self.depth > DEEPEST:
            raise InputError(f"{self.where(-1)} opens more than {DEEPEST} brackets: simplify it.")

    def fail(self, due: str) -> NoReturn:
        raise InputError(f"{self.where()} has {repr(self.peek()[:SHOWN]) if self.peek() else 'its end'} where {due} is due.")

    def where(self, ahead: int = 0) -> str:
        at = self.at + ahead
        character = self.tokens[at].start() + 1 if at < len(self.tokens) else len(self.text) + 1
        shown = self.text if len(self.text) <= SHOWN else self.text[:SHOWN] + "..."
        return f"The condition {shown!r}, at character {character},"
