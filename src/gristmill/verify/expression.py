r"""Symbolic equality of expressions by their values: two are the same when they agree wherever they are looked at.

An expression (LaTeX or plain) is parsed by descent and evaluated as it is read, exactly as far as it is rational, else to 80 digits. Its
variables are set to a few fixed numbers. Agreement at random points decides identity (Schwartz 1980, "Fast probabilistic algorithms for
verification of polynomial identities"). Digits, steps and sizes are limited, so no text takes long; nothing is passed to a computer algebra
system, whose simplification has no bound.
"""

import math
import random
import re
from collections.abc import Callable, Hashable
from fractions import Fraction
from typing import Any

DIGITS = 80  # of what is not rational; values agree when 30 of them do
MAX_BITS = 24_000  # of an exact number; the factorial of 2000 has 19,000
MAX_STEPS = 600  # factors of an expression
MAX_NESTING = 40
MAX_SIZE = 10**5  # of the logarithm of a power, and of arguments
SCALES = (0.8, 3.0, 12.0, -2.0)  # sizes of the variables at the points

TOKEN = re.compile(r"\s*(\d+\.?\d*|\.\d+|\\[a-zA-Z]+|[^\W\d_]+|\S)")
INVERSES = {"arcsin": "asin", "arccos": "acos", "arctan": "atan"}
NO_FACTOR = frozenset((r"\cdot", r"\pm", r"\mp", r"\rfloor", r"\rceil"))
OF_SEVERAL: dict[str, Any] = {"gcd": math.gcd, "lcm": math.lcm, "max": max, "min": min}
RATIOS = ("tan", "cot", "sec", "csc")
FUNCTIONS = frozenset(("sin", "cos", *RATIOS, *INVERSES, "sinh", "cosh", "tanh", "ln", "log", "exp", "sqrt", "abs"))
GREEK = re.compile(
    r"(?:var)?(?:epsilon|theta|phi)|alpha|beta|gamma|delta|zeta|eta|kappa|lambda|mu|nu|xi|rho|sigma|tau|chi|psi|omega|ell"
    r"|Gamma|Delta|Theta|Lambda|Sigma|Phi|Psi|Omega"
)
WORD = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{3,}")
OPEN = {"(": ")", "{": "}", "[": "]"}


class _Unreadable(Exception):
    """The text is no expression that can be evaluated."""


class _Undefined(Exception):
    """The expression has no real value at a point."""


def expression_value(text: str) -> Hashable | None:
    """The value of an expression: a fraction, or what equals for equal expressions; None where it cannot be read."""
    words = set(WORD.findall(re.sub(r"\\[a-zA-Z]+", " ", text))) - FUNCTIONS - OF_SEVERAL.keys()
    if words or re.fullmatch(r"[^\W\d_]*", text):
        return None  # words are no products of letters
    import mpmath

    with mpmath.workdps(DIGITS):
        seen: set[str] = set()
        keys: list[Hashable] = []
        for scale in SCALES:
            try:
                keys.append(_key(_Parser(text, scale, seen).value(), exact=not seen))
            except _Undefined:
                keys.append(None)
            except (_Unreadable, ArithmeticError, ValueError):
                return None
            if not seen:
                return keys[0]
    if sum(key is not None for key in keys) < 2:
        return None
    return tuple(keys) if len(set(keys)) > 1 else keys[0]


def equation_value(left: str, right: str) -> Hashable | None:
    """What equals for equations whose sides differ by the same expression, but for a factor; None where that cannot be told."""
    text = f"({left})-({right})"
    if set(WORD.findall(re.sub(r"\\[a-zA-Z]+", " ", text))) - FUNCTIONS - OF_SEVERAL.keys():
        return None
    import mpmath

    with mpmath.workdps(DIGITS):
        seen: set[str] = set()
        try:
            values = [_Parser(text, scale, seen).value() for scale in SCALES]
            first = next((value for value in values if value), None)
            if first is None or not seen:
                return None
            return tuple(_key(_multiply(value, _inverse(first)), exact=False) for value in values)
        except (_Undefined, _Unreadable, ArithmeticError, ValueError):
            return None


def _key(value: Any, *, exact: bool) -> Hashable:
    """A value as it is compared. One that is rational as far as it can be seen is a fraction."""
    import mpmath

    if isinstance(value, Fraction):
        if exact or value.denominator < 1000:
            return value
        value = _real(value)
    if isinstance(value, mpmath.mpc):
        size = abs(value)
        parts = [part if abs(part) > size * mpmath.mpf(10) ** -40 else mpmath.mpf(0) for part in (value.real, value.imag)]
        if parts[1]:
            return "complex", _key(parts[0], exact=exact), _key(parts[1], exact=exact)
        value = parts[0]
    if not mpmath.isfinite(value):
        raise _Unreadable
    if 1e-12 < abs(value) < 1e40 or not value:
        whole = int(mpmath.nint(value))
        if abs(value - whole) < mpmath.mpf(10) ** -35:
            return Fraction(whole)
        if abs(value) < 1e12:
            sign, mantissa, exponent, _ = value._mpf_
            near = (Fraction(int(mantissa)) * Fraction(2) ** exponent * (-1) ** sign).limit_denominator(999)
            if abs(value - _real(near)) < abs(value) * mpmath.mpf(10) ** -60:
                return near
    return mpmath.nstr(value, 30)


def _real(value: Any) -> Any:
    import mpmath

    return mpmath.mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else value


def _bounded(value: Fraction) -> Fraction:
    if value.numerator.bit_length() + value.denominator.bit_length() > MAX_BITS:
        raise _Unreadable
    return value


class _Parser:
    """Recursive-descent parser of an expression that evaluates as it reads, at the point of a scale."""

    def __init__(self, text: str, scale: float, seen: set[str]):
        self.tokens = TOKEN.findall(text)
        self.at, self.scale, self.seen, self.steps, self.depth = 0, scale, seen, 0, 0
        self.is_complex = False

    def value(self) -> Any:
        found = self.sum()
        if self.at < len(self.tokens):
            raise _Unreadable
        return found

    def peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self, token: str = "") -> str:
        found = self.peek()
        if not found or (token and found != token):
            raise _Unreadable
        self.at += 1
        return found

    def sum(self) -> Any:
        self.depth += 1
        if self.depth > MAX_NESTING:
            raise _Unreadable
        sign = self.take() if self.peek() in ("+", "-") else "+"
        total = self.product()
        total = -total if sign == "-" else total
        while self.peek() in ("+", "-"):
            sign = self.take()
            term = self.product()
            total = _add(total, -term if sign == "-" else term)
        self.depth -= 1
        return total

    def product(self) -> Any:
        total, divided = self.power(), False
        while True:
            before, token = self.tokens[self.at - 1], self.peek()
            if token in ("*", "/"):
                self.take()
                factor = self.power()
                total, divided = _multiply(total, factor if token == "*" else _inverse(factor)), token == "/"
            elif token and (token[0].isalpha() or token[0] in "\\({[") and token not in NO_FACTOR:
                # `1/2x` is read in two ways; `2 1/2` and `x1` are no products
                if divided or (token == r"\frac" and before[-1].isdigit() and self._is_number_fraction()):
                    raise _Unreadable
                total = _multiply(total, self.power())
            elif token and (token[0].isdigit() or token[0] == ".") and before in (")", "}", "]"):
                total = _multiply(total, self.power())
            else:
                return total

    def _is_number_fraction(self) -> bool:
        return bool(re.match(r"\\frac\{\d+\}\{\d+\}", "".join(self.tokens[self.at : self.at + 7])))

    def power(self) -> Any:
        base = self.factor()
        while self.peek() == "!":
            self.take()
            base = _factorial(base)
        if self.peek() == "^":
            self.take()
            base = _power(base, self.exponent(), is_complex=self.is_complex)
            if self.peek() == "^":
                raise _Unreadable
        while self.peek() == "!":
            self.take()
            base = _factorial(base)
        self.count(base)
        return base

    def count(self, value: Any) -> None:
        """Count a step; a number of many digits is many."""
        self.steps += 1 + (value.numerator.bit_length() // 100 if isinstance(value, Fraction) else 0)
        if self.steps > MAX_STEPS:
            raise _Unreadable

    def exponent(self) -> Any:
        if self.peek() in ("-", "+"):
            sign = self.take()
            value = self.factor()
            return -value if sign == "-" else value
        value = self.factor()
        if self.peek() == "^":  # of a tower, from the top
            self.take()
            value = _power(value, self.exponent(), is_complex=self.is_complex)
        return value

    def group(self, opening: str = "{") -> Any:
        self.take(opening)
        found = self.sum()
        self.take(OPEN[opening])
        return found

    def argument(self) -> Any:
        return self.group() if self.peek() == "{" else self.factor()

    def factor(self) -> Any:
        self.count(None)
        token = self.peek()
        if not token:
            raise _Unreadable
        if token in OPEN:
            return self.group(token)
        self.take()
        if token == "|":
            found = self.sum()
            self.take("|")
            return abs(found)
        if token[0].isdigit() or token[0] == ".":
            return self.number(token)
        if token[0] == "\\":
            return self.command(token[1:])
        if token in FUNCTIONS:
            return self.function(token)
        if token in OF_SEVERAL:
            return self.command(token)
        if token[0].isalpha():
            if len(token) > 1:  # a product of letters
                self.at -= 1
                self.tokens[self.at : self.at + 1] = list(token)
                return self.factor()
            return self.letter(token)
        raise _Unreadable

    def number(self, token: str) -> Any:
        value = _bounded(Fraction(token))
        if self.peek() in (r"\overline", r"\bar", r"\dot") and "." in token:
            self.take()
            digits = "".join(self.tokens[self.at + 1 : self.at + 2]) if self.peek() == "{" else self.peek()
            places = len(token.partition(".")[2])
            self.argument()
            if not digits.isdigit() or len(digits) > 30:
                raise _Unreadable
            value += Fraction(int(digits), (10 ** len(digits) - 1) * 10**places)
        if self.peek() == "_":  # of a base
            raise _Unreadable
        return value

    def letter(self, name: str) -> Any:
        import mpmath

        if self.peek() == "_":
            self.take()
            parts = [self.take()]
            while parts[0] == "{" and parts[-1] != "}":
                parts.append(self.take())
            name += "_" + "".join(part for part in parts if part not in "{}")
        elif name == "e":
            return mpmath.e()
        elif name == "i":
            self.is_complex = True
            return mpmath.mpc(0, 1)
        self.seen.add(name)
        return Fraction(random.Random(name + str(self.scale)).randint(300, 999), 1009) * Fraction(self.scale).limit_denominator(10)

    def command(self, name: str) -> Any:
        import mpmath

        if name in ("frac", "binom"):
            top, bottom = self.argument(), self.argument()
            if name == "frac":
                return _multiply(top, _inverse(bottom))
            parts = [_factorial(part) for part in (top, bottom, _add(top, -bottom))]
            for part in parts:
                self.count(part)
            return _multiply(parts[0], _inverse(_multiply(parts[1], parts[2])))
        if name == "sqrt" and self.peek() == "[":
            index = self.group("[")
            return _power(self.argument(), _inverse(index), is_complex=self.is_complex)
        if name == "pi":
            return mpmath.pi()
        if name in ("lfloor", "lceil"):
            value = self.sum()
            self.take(name.replace("l", "\\r", 1))
            return self.whole(value, "floor" if name == "lfloor" else "ceil")
        if name in OF_SEVERAL:
            return self.of_several(OF_SEVERAL[name])
        if GREEK.fullmatch(name):
            return self.letter("\\" + name)
        if name in FUNCTIONS:
            return self.function(name)
        raise _Unreadable

    def whole(self, value: Any, rounding: str) -> Fraction:
        import mpmath

        if isinstance(value, mpmath.mpc):
            raise _Unreadable
        if not isinstance(value, Fraction) and abs(value) > 1e40:
            raise _Unreadable
        return _bounded(Fraction(int(getattr(math if isinstance(value, Fraction) else mpmath, rounding)(value))))

    def of_several(self, of: Callable[..., Any]) -> Fraction:
        self.take("(")
        values = [self.sum()]
        while self.peek() == ",":
            self.take()
            values.append(self.sum())
        self.take(")")
        if not all(isinstance(value, Fraction) and value.denominator == 1 for value in values):
            raise _Unreadable
        return Fraction(of(*map(int, values)) if len(values) > 1 else values[0])

    def function(self, name: str) -> Any:
        import mpmath

        base: Any = None
        if name == "log" and self.peek() == "_":
            self.take()
            base = self.argument()
        power: Any = Fraction(1)
        if self.peek() == "^" and name not in ("sqrt", "abs"):  # `sin^2 x`
            self.take()
            power = self.exponent()
            if power == -1:
                name, power = "arc" + name, Fraction(1)
                if name not in INVERSES:
                    raise _Unreadable
        if self.peek() in OPEN:
            value = self.argument() if self.peek() == "{" else self.group(self.peek())
        else:  # `sin 2x`
            value = self.power()
            while (token := self.peek()) and (token[0].isalpha() or token in (r"\pi", r"\theta", r"\alpha")) and token not in FUNCTIONS:
                value = _multiply(value, self.power())
        if name == "abs":
            return abs(value)
        if name == "sqrt":
            return _power(value, Fraction(1, 2), is_complex=self.is_complex)
        value = _real(value)
        if abs(value) > MAX_SIZE:
            raise _Unreadable
        if name in ("ln", "log"):
            if value == 0 or (not isinstance(value, mpmath.mpc) and value < 0):
                raise _Undefined
            found = mpmath.log(value)
            if name == "log":  # to base ten where none is named
                found = _multiply(found, _inverse(mpmath.log(_real(base)) if base is not None else mpmath.log(10)))
        else:
            found = _ratio(name, value) if name in RATIOS else _settled(getattr(mpmath, INVERSES.get(name, name))(value))
            if isinstance(found, mpmath.mpc) and not self.is_complex:
                raise _Undefined
        return _power(found, power, is_complex=self.is_complex)


def _settled(value: Any) -> Any:
    """A value of a function without the dust that stands for zero."""
    import mpmath

    return value if abs(value) > mpmath.mpf(10) ** -60 else mpmath.mpf(0)


def _ratio(name: str, value: Any) -> Any:
    import mpmath

    sine, cosine = _settled(mpmath.sin(value)), _settled(mpmath.cos(value))
    one = mpmath.mpf(1)
    top, bottom = {"tan": (sine, cosine), "cot": (cosine, sine), "sec": (one, cosine), "csc": (one, sine)}[name]
    return _multiply(top, _inverse(bottom))


def _add(a: Any, b: Any) -> Any:
    import mpmath

    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return _bounded(a + b)
    a, b = _real(a), _real(b)
    total = a + b
    return total if abs(total) > max(abs(a), abs(b)) * mpmath.mpf(10) ** (20 - DIGITS) else Fraction(0)


def _multiply(a: Any, b: Any) -> Any:
    return _bounded(a * b) if isinstance(a, Fraction) and isinstance(b, Fraction) else _real(a) * _real(b)


def _inverse(value: Any) -> Any:
    if value == 0:
        raise _Undefined
    return 1 / value


def _factorial(value: Any) -> Any:
    import mpmath

    if isinstance(value, Fraction) and value.denominator == 1:
        if not 0 <= value <= 2100:
            raise _Unreadable
        return _bounded(Fraction(math.factorial(int(value))))
    if isinstance(value, mpmath.mpc) or abs(value) > 1000:
        raise _Unreadable
    return mpmath.gamma(_real(value) + 1)


def _root(value: int, index: int) -> int | None:
    """The whole root of a whole number, None where it has none."""
    import mpmath

    if value.bit_length() > 200 or index > 20:
        return None
    found = int(mpmath.nint(mpmath.root(value, index))) if value else 0
    return found if found**index == value else None


def _power(base: Any, exponent: Any, *, is_complex: bool) -> Any:
    import mpmath

    if isinstance(exponent, Fraction):
        if exponent.denominator == 1:
            n = int(exponent)
            if base == 0 and n <= 0:
                raise _Undefined
            if abs(n) > MAX_BITS:
                raise _Unreadable
            if isinstance(base, Fraction):
                if abs(n) * max(base.numerator.bit_length() + base.denominator.bit_length() - 2, 0) > MAX_BITS:
                    raise _Unreadable
                return base**n
            return base**n if abs(mpmath.log(abs(base))) * abs(n) < MAX_SIZE else _fail()
        if not isinstance(base, mpmath.mpc) and base < 0 and exponent.denominator % 2 and not is_complex:  # the real root
            found = _power(-base, exponent, is_complex=False)
            return -found if exponent.numerator % 2 else found
        if isinstance(base, Fraction) and base > 0:
            roots = [_root(part, exponent.denominator) for part in (base.numerator, base.denominator)]
            if roots[0] is not None and roots[1] is not None:
                return _power(Fraction(roots[0], roots[1]), Fraction(exponent.numerator), is_complex=is_complex)
    if not isinstance(base, mpmath.mpc) and base < 0 and not is_complex:
        raise _Undefined
    if base == 0:
        return Fraction(0) if not isinstance(exponent, mpmath.mpc) and exponent > 0 else _fail()
    base, exponent = _real(base), _real(exponent)
    if abs(mpmath.log(abs(base)) * exponent) > MAX_SIZE:
        raise _Unreadable
    return mpmath.power(base, exponent)


def _fail() -> Any:
    raise _Unreadable
