"""Operations on objects of another process: the operators by name, plain values of built-in types, exceptions by class and arguments."""

import operator
from collections import deque
from collections.abc import Callable
from typing import Any

# Built-in types, and what makes of an object whose class extends one its plain value, whatever the class says.
BASES: dict[type, Callable[[Any], Any]] = {
    int: int.__index__,
    float: float.__float__,
    complex: lambda v: complex(v.real, v.imag),
    str: str.__str__,
    bytes: lambda v: bytes.__getitem__(v, slice(None)),
    tuple: lambda v: tuple.__getitem__(v, slice(None)),
    frozenset: lambda v: frozenset().union(v),
    list: lambda v: list.__getitem__(v, slice(None)),
    dict: lambda v: dict(dict.items(v)),
    set: lambda v: set().union(v),
    bytearray: bytearray,
    deque: lambda v: deque(v, v.maxlen),
    type({}.keys()): set,
    type({}.items()): set,
}
FROZEN = (int, float, complex, str, bytes, tuple, frozenset)
COMPARED = ["eq", "ne", "lt", "le", "gt", "ge"]
BINARY = ["add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow", "lshift", "rshift", "and_", "or_", "xor"]
UNARY = ["neg", "pos", "abs", "invert"]
_OTHER: dict[str, Callable[..., Any]] = {
    **{f.__name__: f for f in (len, iter, next, bool, str, repr, int, float, complex, bytes, round, divmod, reversed, format, dir, type)},
    **{f.__name__: f for f in (isinstance, issubclass, hash)},
    **{name: getattr(operator, name) for name in ("index", "getitem", "setitem", "delitem", "contains")},
}
OPERATORS = _OTHER | {name: getattr(operator, name) for name in (*COMPARED, *BINARY, *UNARY)}


def make_exception(kind: Any, args: tuple[Any, ...]) -> BaseException:
    """An exception of a class, made without its constructor where that takes other arguments."""
    if not (isinstance(kind, type) and issubclass(kind, BaseException)):
        raise TypeError("not an exception")
    try:
        return kind(*args)
    except Exception:
        error = kind.__new__(kind, *args)
        error.args = args
        return error
