"""Filter expressions over reward-model ratings: `correctness >= 3 and not (verbosity > 2 or score < 2.5)`.

`or` binds least, then `and`, then `not`, then the comparisons, which have a name or a number on either side. The tokens are checked one
by one, so that errors name the place; Python's own parser then makes the tree. Nothing is evaluated as code.
"""

import ast
import difflib
import math
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from gristmill.core.errors import InputError
from gristmill.data.rows import ATTRIBUTES

NAMES = (*ATTRIBUTES, "score")
SIGNS = ("<", "<=", ">", ">=", "==")
OPERATORS = {ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Eq: operator.eq}
MAX_DEPTH = 50  # brackets and `not` within each other
MAX_LENGTH = 1_000_000  # characters
MAX_SHOWN = 80  # characters of a text in an error
TOKEN = re.compile(
    r"(?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)|(?P<word>[a-z_]\w*)|(?P<mark><=|>=|==|[<>()])|(?P<wrong>\S)",
    re.ASCII | re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class FilterExpr:
    """Condition on the attributes of a rating and their weighted sum, `score`.

    Its `str` is the normal form, which reads as the same condition; equal conditions have the same.
    """

    text: str
    tree: ast.expr = field(repr=False, compare=False)

    @staticmethod
    def parse(text: str) -> "FilterExpr":
        """Parse a condition.

        Raises:
            InputError: the text is no condition; the message says where, and for an unknown name which one is nearest.
        """
        tree = ast.parse(" ".join(_checked_tokens(text)), mode="eval").body
        return FilterExpr(_normal_form(tree), tree)

    def holds(self, values: Mapping[str, float]) -> bool:
        """Whether the values of one answer fulfil it; NaN fulfils no comparison.

        Raises:
            InputError: a value that decides is missing.
        """
        return _holds(self.tree, values)

    def __str__(self) -> str:
        return self.text


def _checked_tokens(text: str) -> list[str]:
    """The tokens of a condition, names known and numbers in normal form, in an order that Python's parser takes."""
    shown = text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "..."
    if len(text) > MAX_LENGTH:
        raise InputError(f"The condition {shown!r} has {len(text):,} characters, and at most {MAX_LENGTH:,} are read: simplify it.")
    opened: list[str] = []  # "(" and "not" that wait for their end
    out: list[str] = []
    state = "left"  # what is due: the left side of a comparison, its sign, its right side, or what comes after it
    for match in [*TOKEN.finditer(text), None]:
        token, kind = (match[0], match.lastgroup) if match else ("", None)
        where = f"The condition {shown!r}, at character {match.start() + 1 if match else len(text) + 1},"
        due = ""
        if state == "left" and token in ("not", "("):
            opened.append(token)
            if len(opened) > MAX_DEPTH:
                raise InputError(f"{where} opens more than {MAX_DEPTH} brackets: simplify it.")
        elif state in ("left", "right"):
            if kind == "number":
                number = float(token) + 0.0  # so that -0 is 0
                if math.isinf(number):
                    raise InputError(f"{where} has a number that is too large.")
                token = repr(number).removesuffix(".0")
            elif kind != "word" or token in ("and", "or", "not"):
                due = "a name or a number"
            elif token not in NAMES:
                near = difflib.get_close_matches(token[:MAX_SHOWN].lower(), NAMES, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(NAMES)}."
                raise InputError(f"{where} has the unknown name {token[:MAX_SHOWN]!r}: {hint}")
            state = "sign" if state == "left" else "after"
        elif state == "sign":
            state, due = "right", "" if token in SIGNS else f"one of {' '.join(SIGNS)}"
        elif token in ("and", "or"):
            state = "left"
        elif token == ")" and "(" in opened:
            opened.pop()
        elif token or "(" in opened:
            due = "')', 'and' or 'or'" if "(" in opened else "'and', 'or' or the end"
        if due:
            raise InputError(f"{where} has {repr(token[:MAX_SHOWN]) if token else 'its end'} where {due} is due.")
        while state == "after" and opened and opened[-1] == "not":
            opened.pop()
        out.append(token)
    return out


def _normal_form(node: ast.expr) -> str:
    match node:
        case ast.BoolOp(op, values):
            word = "and" if isinstance(op, ast.And) else "or"
            # `and` binds more than `or`, so only an `or` within an `and` needs brackets
            wrap = [word == "and" and isinstance(value, ast.BoolOp) and isinstance(value.op, ast.Or) for value in values]
            return f" {word} ".join(f"({_normal_form(v)})" if w else _normal_form(v) for v, w in zip(values, wrap, strict=True))
        case ast.UnaryOp(ast.Not(), operand):
            return f"not ({_normal_form(operand)})" if isinstance(operand, ast.BoolOp) else f"not {_normal_form(operand)}"
    return ast.unparse(node)


def _holds(node: ast.expr, values: Mapping[str, float]) -> bool:
    match node:
        case ast.BoolOp(op, parts):
            return (all if isinstance(op, ast.And) else any)(_holds(part, values) for part in parts)
        case ast.UnaryOp(ast.Not(), operand):
            return not _holds(operand, values)
        case ast.Compare(left, [sign], [right]):
            try:
                a, b = (values[side.id] if isinstance(side, ast.Name) else ast.literal_eval(side) for side in (left, right))
            except KeyError as e:
                missing = f"needs {e.args[0]!r}, and the answer has only {', '.join(values) or 'nothing'}."
                raise InputError(f"The condition {_normal_form(node)} {missing}") from e
            return bool(OPERATORS[type(sign)](a, b))
    raise AssertionError(f"a condition has no {type(node).__name__}")
