"""Remote calls in plain data: values as JSON between the process of a program and that of its check.

Exactly the built-in types cross by value (never pickled). Lists, dicts, sets, byte arrays, deques and counters are nodes of a table,
so that aliases, cycles and identity survive, and the receiver of a call sends back what it changed in its arguments. Objects of other
types stay where they are: the other side gets a reference.
"""

import builtins
import importlib
import json
import os
import struct
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any

MAX_MESSAGE_BYTES = 64 << 20
MAX_JSON_INT = 1 << 63
# Names from these modules mean the module's own object on both sides.
SHARED_MODULES = frozenset(
    [
        "abc",
        "bisect",
        "cmath",
        "collections",
        "copy",
        "dataclasses",
        "decimal",
        "enum",
        "fractions",
        "functools",
        "heapq",
        "itertools",
        "json",
        "math",
        "operator",
        "re",
        "statistics",
        "string",
        "typing",
    ]
)
VALUE_MODULES = {"decimal": ("Decimal",), "fractions": ("Fraction",), "datetime": ("date", "time", "datetime", "timedelta")}


class Gone(BaseException):
    """The other side ended or does not keep to the protocol; no handler of a check or a program may take it for an error."""


class Unsplit(BaseException):
    """An argument of the check that cannot cross to the program."""


def read_exactly(fd: int, size: int) -> bytes:
    """Read `size` bytes; fewer only at the end of the stream."""
    parts = []
    while size and (part := os.read(fd, min(size, 1 << 20))):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def send(fd: int, message: Any) -> None:
    """Write one message: a 4-byte big-endian length and JSON."""
    data = json.dumps(message).encode()
    data = struct.pack(">I", len(data)) + data
    while data:
        data = data[os.write(fd, data) :]


def receive(fd: int, max_bytes: int = (1 << 32) - 1) -> Any:
    """Read one message; None when the other side has gone.

    Raises:
        ValueError: it is longer than `max_bytes`, or not JSON.
    """
    head = read_exactly(fd, 4)
    if len(head) < 4:
        return None
    size = struct.unpack(">I", head)[0]
    if size > max_bytes:
        raise ValueError("too long a message")
    body = read_exactly(fd, size)
    return json.loads(body) if len(body) == size else None


def _name_of(kind: type | None) -> str | None:
    return kind.__name__ if kind and kind in (int, float, str, list, dict, set) else None


class Peer:
    """One side of the two pipes.

    Args:
        reader: where the other side's messages arrive.
        writer: where messages to it go.
    """

    def __init__(self, reader: int, writer: int):
        self._reader, self._writer = reader, writer

    # ---- values ----

    def pack(self, value: Any, nodes: list[Any], places: dict[int, int]) -> Any:
        """A value as JSON; nodes are added to the table. Everything but a JSON scalar is a list that begins with its tag."""
        kind = type(value)
        if value is None or kind is bool or kind is str or kind is float:
            return value
        if kind is int:
            return value if -MAX_JSON_INT < value < MAX_JSON_INT else ["i", hex(value)]
        if kind is tuple:
            return ["t", *[self.pack(v, nodes, places) for v in value]]
        if kind in _CONTAINERS:
            place = places.get(id(value))
            if place is None:
                place = places[id(value)] = len(nodes)
                nodes.append(value)
            return ["n", place]
        if kind is bytes:
            return ["b", value.decode("latin-1")]
        if kind is frozenset:
            return ["f", *[self.pack(v, nodes, places) for v in value]]
        if kind is complex:
            return ["c", value.real, value.imag]
        if kind is range:
            return ["r", *[self.pack(v, nodes, places) for v in (value.start, value.stop, value.step)]]
        if value is Ellipsis or value is NotImplemented:
            return ["e", value is Ellipsis]
        if _is_value(kind) and getattr(value, "tzinfo", None) is None:
            return ["v", kind.__module__, kind.__name__, *[self.pack(v, nodes, places) for v in _parts(value)]]
        if issubclass(kind, type) and vars(builtins).get(name := str(getattr(value, "__name__", ""))) is value:
            return ["T", name]
        return self.pack_other(value, nodes, places)

    def unpack(self, packed: Any, table: list[Any]) -> Any:
        """The value of `pack`'s JSON. Raises ValueError, TypeError, LookupError or the like for anything else."""
        if not isinstance(packed, list):
            if isinstance(packed, dict):
                raise ValueError("an object where a value belongs")
            return packed
        tag, rest = packed[0], packed[1:]
        if tag == "n":
            if type(rest[0]) is not int or rest[0] < 0:
                raise ValueError("no such node")
            return table[rest[0]]
        if tag == "t":
            return tuple([self.unpack(v, table) for v in rest])
        if tag == "i":
            return int(str(rest[0]), 16)
        if tag == "b":
            return str(rest[0]).encode("latin-1")
        if tag == "f":
            return frozenset([self.unpack(v, table) for v in rest])
        if tag == "c":
            return complex(float(rest[0]), float(rest[1]))
        if tag == "r":
            return range(*[self.unpack(v, table) for v in rest])
        if tag == "e":
            return Ellipsis if rest[0] else NotImplemented
        if tag == "v":
            module, name, *parts = rest
            if name not in VALUE_MODULES[module]:
                raise ValueError("not a value")
            return getattr(importlib.import_module(module), name)(*[self.unpack(v, table) for v in parts])
        if tag == "T":
            found = vars(builtins)[rest[0]]
            if not isinstance(found, type):
                raise ValueError("not a type")
            return found
        return self.unpack_other(tag, rest, table)

    def pack_other(self, value: Any, nodes: list[Any], places: dict[int, int]) -> Any:
        """A value that is no plain data."""
        raise NotImplementedError

    def unpack_other(self, tag: str, rest: list[Any], table: list[Any]) -> Any:
        """The value of `pack_other`'s JSON."""
        raise NotImplementedError

    def pack_nodes(self, nodes: list[Any], places: dict[int, int]) -> list[Any]:
        """The table's contents; it grows while they are packed."""
        out: list[Any] = []
        while len(out) < len(nodes):
            node = nodes[len(out)]
            tag, extra, is_map = _CONTAINERS[type(node)]
            items = (
                [[self.pack(k, nodes, places), self.pack(v, nodes, places)] for k, v in list(node.items())]
                if is_map
                else (node.decode("latin-1") if tag == "a" else [self.pack(v, nodes, places) for v in list(node)])
            )
            out.append([tag, extra(node), items])
        return out

    def unpack_nodes(self, contents: list[Any], known: list[Any]) -> list[Any]:
        """The objects of a table. `known` ones, where the other side says something about them, are changed in place."""
        table = list(known)
        for tag, extra, _ in contents[len(known) :]:
            table.append(_NEW[tag](extra))
        for node, content in zip(table, contents, strict=True):
            if content is None:
                continue
            tag, _, items = content
            if _CONTAINERS[type(node)][0] != tag:
                raise ValueError("a container changed its type")
            if _CONTAINERS[type(node)][2]:
                pairs = [(self.unpack(k, table), self.unpack(v, table)) for k, v in items]
                node.clear()
                for key, value in pairs:
                    node[key] = value
            elif tag == "a":
                node[:] = str(items).encode("latin-1")
            else:
                values = [self.unpack(v, table) for v in items]
                node.clear()
                (node.update if tag == "s" else node.extend)(values)
        return table

    # ---- calls ----

    def ask(self, op: str, *operands: Any, **more: Any) -> Any:
        """Let the other side do something, and serve what it asks meanwhile. Raises what it raised."""
        nodes: list[Any] = []
        places: dict[int, int] = {}
        packed = [self.pack(v, nodes, places) for v in operands]
        self.send({"do": op, "of": packed, "nodes": self.pack_nodes(nodes, places), **more})
        while True:
            answer = self.receive()
            try:
                if "do" in answer:
                    self.serve(answer)
                    continue
                table = self.unpack_nodes(answer["nodes"], nodes)
                value, raised = self.unpack(answer["value"], table), answer["raised"] is True
            except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
                raise Gone("protocol") from error
            self.heard(answer)
            if raised and issubclass(type(value), BaseException):
                raise value
            return value

    def serve(self, request: dict[str, Any]) -> None:
        """Do what the other side asks, and answer with the value (or the error) and the changed arguments."""
        table = self.unpack_nodes(request["nodes"], [])
        operands = [self.unpack(v, table) for v in request["of"]]
        answer: dict[str, Any] = {"raised": False}
        value: Any
        try:
            value = self.perform(request, operands, answer)
        except (Gone, Unsplit):
            raise
        except BaseException as error:
            value, answer["raised"] = error, True
        places = {id(node): place for place, node in enumerate(table)}
        num_known = len(table)
        answer["value"] = self.pack(value, table, places)
        contents = self.pack_nodes(table, places)
        answer["nodes"] = [None if i < num_known and c == request["nodes"][i] else c for i, c in enumerate(contents)]
        self.send(answer)

    def perform(self, request: dict[str, Any], operands: list[Any], answer: dict[str, Any]) -> Any:
        """Do one thing for the other side."""
        raise NotImplementedError

    def heard(self, answer: dict[str, Any]) -> None:
        """Take what an answer tells beside its value."""

    def send(self, message: dict[str, Any]) -> None:
        """Send one message."""
        try:
            send(self._writer, message)
        except OSError as error:
            raise Gone("ended") from error

    def receive(self) -> dict[str, Any]:
        """Receive one message."""
        try:
            message = receive(self._reader, MAX_MESSAGE_BYTES)
        except (OSError, ValueError, RecursionError) as error:
            raise Gone("protocol") from error
        if message is None:
            raise Gone("ended")
        if not isinstance(message, dict):
            raise Gone("protocol")
        return message


def _is_value(kind: type) -> bool:
    names = VALUE_MODULES.get(kind.__module__, ())
    return kind.__name__ in names and getattr(sys.modules[kind.__module__], kind.__name__) is kind


def _parts(value: Any) -> tuple[Any, ...]:
    """The arguments that make an equal decimal, fraction or time."""
    name = type(value).__name__
    if name == "Decimal":
        return (str(value),)
    if name == "Fraction":
        return (value.numerator, value.denominator)
    if name == "timedelta":
        return (value.days, value.seconds, value.microseconds)
    day = (value.year, value.month, value.day) if name != "time" else ()
    return (*day, value.hour, value.minute, value.second, value.microsecond) if name != "date" else day


# type -> tag, what else the tag's constructor needs, whether it maps
_CONTAINERS: dict[type, tuple[str, Callable[[Any], Any], bool]] = {
    list: ("l", lambda v: None, False),
    dict: ("m", lambda v: None, True),
    set: ("s", lambda v: None, False),
    bytearray: ("a", lambda v: None, False),
    deque: ("q", lambda v: v.maxlen, False),
    Counter: ("C", lambda v: None, True),
    OrderedDict: ("O", lambda v: None, True),
    defaultdict: ("D", lambda v: _name_of(v.default_factory), True),
}
_NEW: dict[str, Callable[[Any], Any]] = {
    "l": lambda e: [],
    "m": lambda e: {},
    "s": lambda e: set(),
    "a": lambda e: bytearray(),
    "q": lambda e: deque((), e),
    "C": lambda e: Counter(),
    "O": lambda e: OrderedDict(),
    "D": lambda e: defaultdict({"int": int, "float": float, "str": str, "list": list, "dict": dict, "set": set}.get(e)),
}
