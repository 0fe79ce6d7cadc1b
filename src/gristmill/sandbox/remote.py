"""Remote objects: what a check sees of the program's objects. Operators are decided here, where both values are plain."""

from collections.abc import Callable
from typing import Any

from gristmill.sandbox.operations import BINARY, COMPARED, OPERATORS, UNARY
from gristmill.sandbox.wire import Peer


class Remote:
    """An object of the program, seen from the check."""

    __slots__ = ("_flag", "_link", "_made", "_place", "_value")

    def __init__(self, link: Peer, place: int, flag: str, value: Any):
        for name, content in (("_link", link), ("_place", place), ("_flag", flag), ("_value", value), ("_made", False)):
            object.__setattr__(self, name, content)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._link.ask("call", self, args, tuple(kwargs.items()))

    def __getattr__(self, name: str) -> Any:
        value = self._link.ask("getattr", self, name)
        if type(value) is Remote and value._flag == "f" and not self._made and self._flag in ("", "g", "m"):
            object.__setattr__(value, "_value", "method")  # of an object that the check did not build: what it says of itself is weak
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        self._link.ask("setattr", self, name, value)

    def __delattr__(self, name: str) -> None:
        self._link.ask("delattr", self, name)

    @property
    def __doc__(self) -> Any:  # type: ignore[override]
        return self._link.ask("getattr", self, "__doc__")

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self._value) if self._flag == "p" else self._link.ask("type", self)

    def __bool__(self) -> bool:
        if self._flag == "p":
            return bool(self._value)
        if self._flag == "g":
            raise TypeError("an iterator has no truth value in a check: compare what it yields")
        return bool(self._flag in ("c", "f") or self._link.ask("bool", self) is True)

    def __hash__(self) -> int:
        if self._made and self._flag == "":
            self._link.weak = True
            return hash(self._link.ask("hash", self))
        return hash(self._value) if self._flag == "p" else hash(self._place)

    def __str__(self) -> str:
        return str(self._link.ask("str", self))

    def __repr__(self) -> str:
        return str(self._link.ask("repr", self))

    def __format__(self, spec: str) -> str:
        return format(plain_value(self), spec) if self._flag == "p" else str(self._link.ask("format", self, spec))

    def __enter__(self) -> Any:
        return self._link.ask("enter", self)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> Any:
        return self._link.ask("exit", self, error)

    def __instancecheck__(self, value: Any) -> bool:
        return isinstance(value, (Remote, BaseException)) and self._link.ask("isinstance", value, self) is True

    def __subclasscheck__(self, value: Any) -> bool:
        return isinstance(value, (Remote, type)) and self._link.ask("issubclass", value, self) is True

    def __contains__(self, item: Any) -> bool:
        if self._made and self._flag == "":
            self._link.weak = True
            return self._link.ask("contains", self, item) is True
        return any(item is other or item == other for other in plain_value(self))

    def __dir__(self) -> Any:
        return self._link.ask("dir", self)

    def __round__(self, *digits: int) -> Any:
        return round(self._value, *digits) if self._flag == "p" else self._link.ask("round", self, *digits)


def plain_value(value: Any) -> Any:
    """The plain value of an object whose class extends a built-in type; any other as it is."""
    if type(value) is not Remote or value._flag not in ("p", "m"):
        return value
    return value._value if value._flag == "p" else value._link.ask("plain", value)


def _decides(a: Any, b: Any) -> bool:
    """Whether the program may decide an operation: on two objects of its own, or one that the check built and anything."""
    remote = [v for v in (a, b) if type(v) is Remote]
    return len(remote) == 2 or remote[0]._made


def _compare(name: str) -> Callable[[Any, Any], Any]:
    def compare(self: Any, other: Any) -> Any:
        if type(other) is not Remote or other._flag in ("p", "m"):
            a, b = plain_value(self), plain_value(other)
            if a is not self:
                return OPERATORS[name](a, b)
        if not _decides(self, other):
            return NotImplemented
        self._link.weak = True
        return self._link.ask(name, self, other)

    return compare


def _binary(name: str, *, swapped: bool) -> Callable[[Any, Any], Any]:
    def compute(self: Any, other: Any) -> Any:
        a, b = (plain_value(self), plain_value(other)) if self._flag == "p" else (self, other)
        if swapped:
            a, b = b, a
        if type(a) is not Remote and type(b) is not Remote:
            return OPERATORS[name](a, b)
        if not _decides(a, b):
            return NotImplemented
        self._link.weak = True
        return mark_made(self._link.ask(name, a, b))

    return compute


def _forward(name: str) -> Callable[..., Any]:
    def forward(self: Any, *operands: Any) -> Any:
        if self._flag == "p":
            return OPERATORS[name](self._value, *operands)
        return mark_made(self._link.ask(name, self, *operands)) if self._made and name in UNARY else self._link.ask(name, self, *operands)

    return forward


def mark_made(value: Any) -> Any:
    if type(value) is Remote:
        object.__setattr__(value, "_made", True)
    return value


for _name in COMPARED:
    setattr(Remote, f"__{_name}__", _compare(_name))
for _name in BINARY:
    setattr(Remote, f"__{_name.rstrip('_')}__", _binary(_name, swapped=False))
    setattr(Remote, f"__r{_name.rstrip('_')}__", _binary(_name, swapped=True))
for _name in (*UNARY, "len", "iter", "next", "int", "float", "complex", "index", "getitem", "setitem", "delitem", "reversed", "bytes"):
    setattr(Remote, f"__{_name}__", _forward(_name))
