"""Program and check in two processes: the program serves calls, the check runs where no code of the program ever is.

A name that the check uses and does not define becomes a remote object: calls, attributes and operators go to the program's process
(see wire.py), and plain data come back, which the check compares by the real `==`. So neither objects that lie about being equal nor
frames, globals or replaced modules of the program reach an assertion.

What the program alone can decide stays open to its lies: whether two of its own objects are equal, or one that the check built
equals plain data. A verdict that rests on this is weak. An object that a call returned equals no plain data and does no arithmetic
with it, unless its class extends a built-in type: then its plain value counts.
"""

import ast
import builtins
import contextlib
import dis
import functools
import importlib
import io
import operator
import sys
import types
from collections import deque
from collections.abc import Callable
from typing import Any

from gristmill.sandbox import test_runner
from gristmill.sandbox.wire import SHARED_MODULES, Gone, Peer, Unsplit

MAX_DRAINED = 100_000  # items of an iterator that is an argument
MAX_NAMES = 10_000
# A check that uses these looks into the program's process, or changes it: it runs there, and its verdict is weak.
_INSIDE = frozenset(
    [
        "inspect",
        "mock",
        "patch",
        "MagicMock",
        "Mock",
        "monkeypatch",
        "gc",
        "weakref",
        "asyncio",
        "builtins",
        "seed",
        "settrace",
        "ctypes",
        "__import__",
        "__globals__",
        "__code__",
        "__closure__",
        "await",
    ]
)
# Names by which a check may change its own process, so that the next check gets another one.
_TRACES = frozenset(
    [
        "setattr",
        "delattr",
        "vars",
        "globals",
        "locals",
        "exec",
        "eval",
        "open",
        "sys",
        "os",
        "io",
        "threading",
        "_thread",
        "random",
        "decimal",
        "warnings",
        "signal",
        "time",
        "pathlib",
        "importlib",
        "unittest",
        "tempfile",
        "shutil",
        "concurrent",
        "queue",
        "functools",
        "__dict__",
        "__setattr__",
        "__setitem__",
        "__builtins__",
        "getcontext",
        "localcontext",
    ]
)
_SETTERS = frozenset((dis.opmap["STORE_ATTR"], dis.opmap["DELETE_ATTR"]))
_BASES: dict[type, Callable[[Any], Any]] = {
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
_FROZEN = (int, float, complex, str, bytes, tuple, frozenset)
_COMPARED = ["eq", "ne", "lt", "le", "gt", "ge"]
_BINARY = ["add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow", "lshift", "rshift", "and_", "or_", "xor"]
_UNARY = ["neg", "pos", "abs", "invert"]
_OTHER: dict[str, Callable[..., Any]] = {
    "len": len,
    "iter": iter,
    "next": next,
    "bool": bool,
    "str": str,
    "repr": repr,
    "int": int,
    "float": float,
    "complex": complex,
}
_OTHER |= {"index": operator.index, "getitem": operator.getitem, "setitem": operator.setitem, "delitem": operator.delitem}
_OTHER |= {
    "contains": operator.contains,
    "round": round,
    "divmod": divmod,
    "reversed": reversed,
    "format": format,
    "dir": dir,
    "type": type,
}
_OTHER |= {"isinstance": isinstance, "issubclass": issubclass, "hash": hash, "bytes": bytes}
_OPERATORS: dict[str, Callable[..., Any]] = _OTHER | {name: getattr(operator, name) for name in (*_COMPARED, *_BINARY, *_UNARY)}


@functools.lru_cache(4096)
def splits(check: str) -> bool:
    """Whether a check can run apart from its program, as far as its text tells."""
    try:
        tree = ast.parse(check)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return True  # its error is the same wherever it runs
    for node in ast.walk(tree):
        names = {ast.Name: "id", ast.Attribute: "attr", ast.alias: "name"}.get(type(node))
        if names and not _INSIDE.isdisjoint(getattr(node, names).split(".")):
            return False
        if isinstance(node, ast.ClassDef) and not _is_test_class(node):
            return False
        if isinstance(node, (ast.AsyncFunctionDef, ast.Await)):
            return False
    return True


def _is_test_class(node: ast.ClassDef) -> bool:
    bases = {base.attr if isinstance(base, ast.Attribute) else getattr(base, "id", "") for base in node.bases}
    return bases <= {"object", "TestCase"} and ("TestCase" in bases or node.name.startswith("Test"))


def describe(error: BaseException | None) -> str:
    """An exception as the reason of a verdict."""
    if isinstance(error, AssertionError):
        return "failed"
    try:
        text = " ".join(str(error).split())
    except Exception:
        text = ""
    return f"error: {type(error).__name__}" + (f": {text}" if text else "")


# ---- the program's side --------------------------------------------------------------------------------------


class ProgramSide(Peer):
    """Serves the check. Whatever runs here may be changed by the program: nothing here is believed.

    Args:
        namespace: the program's globals.
        source: its text, for checks that run it as a script.
    """

    def __init__(self, reader: int, writer: int, namespace: dict[str, Any], source: str):
        super().__init__(reader, writer)
        self._namespace, self._source = namespace, source
        self._asked = ""  # the global name that is being looked up
        self._objects: list[Any] = []
        self._places: dict[int, int] = {}
        self._stubs: dict[int, Any] = {}

    def run(self) -> None:
        """Serve until the check ends."""
        with contextlib.suppress(Gone):
            while True:
                self.serve(self.receive())

    def perform(self, request: dict[str, Any], operands: list[Any], answer: dict[str, Any]) -> Any:
        captured = io.StringIO() if request.get("capture") else None
        stdin = io.StringIO(request["stdin"]) if "stdin" in request else None
        usual = sys.stdout, sys.stdin
        try:
            sys.stdout, sys.stdin = captured or sys.stdout, stdin or sys.stdin
            return self._do(request["do"], operands)
        finally:
            sys.stdout, sys.stdin = usual
            if captured is not None:
                answer["out"] = captured.getvalue()
            if stdin is not None:
                answer["rest"] = stdin.read()

    def _do(self, op: str, operands: list[Any]) -> Any:
        self._asked = operands[0] if op == "global" else ""
        if op == "global":
            return self._namespace[operands[0]]
        if op == "call":
            function, args, kwargs = operands
            return function(*args, **dict(kwargs))
        if op == "getattr":
            return getattr(*operands)
        if op == "setattr":
            return setattr(*operands)
        if op == "delattr":
            return delattr(*operands)
        if op == "enter":
            return type(operands[0]).__enter__(operands[0])
        if op == "exit":
            context, error = operands
            return bool(type(context).__exit__(context, type(error) if error else None, error, None))
        if op == "plain":
            return next(plain(operands[0]) for base, plain in _BASES.items() if isinstance(operands[0], base))
        if op == "script":
            with contextlib.suppress(SystemExit):
                exec(compile(self._source, "<program>", "exec", dont_inherit=True), {"__name__": "__main__", "__builtins__": builtins})
            return None
        return _OPERATORS[op](*operands)

    def _place(self, value: Any) -> int:
        place = self._places.get(id(value))
        if place is None:
            place = self._places[id(value)] = len(self._objects)
            self._objects.append(value)
        return place

    def _class(self, kind: type) -> list[Any]:
        """An exception's class, by name where both sides have it."""
        if vars(builtins).get(kind.__name__) is kind:
            return ["B", kind.__name__]
        bases = [self._class(base) for base in kind.__bases__ if issubclass(base, BaseException)]
        if getattr(sys.modules.get(kind.__module__), kind.__name__, None) is kind and kind.__module__ in sys.stdlib_module_names:
            return ["E", kind.__module__, kind.__name__, bases]
        return ["X", self._place(kind), kind.__name__, bases]

    def pack_other(self, value: Any, nodes: list[Any], places: dict[int, int]) -> Any:
        kind = type(value)
        if issubclass(kind, BaseException):
            spec = self._class(kind)
            attributes = [(k, v) for k, v in vars(value).items() if isinstance(k, str) and k[:1] != "_"] if spec[0] != "B" else []
            try:
                text = str(value) if spec[0] == "X" else None
            except Exception:
                text = None
            return ["x", spec, self.pack(tuple(value.args), nodes, places), text, self.pack(tuple(attributes), nodes, places)]
        if isinstance(value, type) and issubclass(value, BaseException):
            return self._class(value)
        if kind is types.ModuleType:
            return ["M", self._place(value), value.__name__]
        if kind in (types.FunctionType, types.BuiltinFunctionType) or isinstance(value, type):
            if id(value) in self._stubs:
                return ["k", self._stubs[id(value)][0]]
            module, name = getattr(value, "__module__", None), getattr(value, "__name__", "")
            if name == self._asked and module in SHARED_MODULES and getattr(sys.modules.get(module), name, None) is value:
                return ["S", module, name]
        for base, plain in _BASES.items():
            if isinstance(value, base):
                return [
                    "o",
                    self._place(value),
                    "p" if base in _FROZEN else "m",
                    self.pack(plain(value), nodes, places) if base in _FROZEN else None,
                ]
        flag = (
            "c"
            if isinstance(value, type)
            else "f"
            if callable(value)
            else "g"
            if hasattr(kind, "__next__") or hasattr(kind, "__await__")
            else ""
        )
        return ["o", self._place(value), flag, None]

    def unpack_other(self, tag: str, rest: list[Any], table: list[Any]) -> Any:
        if tag in ("o", "X"):
            return self._objects[rest[0]]
        if tag == "B":
            return vars(builtins)[rest[0]]
        if tag in ("S", "E"):
            return getattr(importlib.import_module(rest[0]), rest[1])
        if tag == "it":
            return iter([self.unpack(v, table) for v in rest[0]])
        if tag == "x":
            return _exception(self.unpack(rest[0], table), self.unpack(rest[1], table))
        if tag == "k":
            for number, stub in self._stubs.values():
                if number == rest[0]:
                    return stub

            def call_back(*args: Any, **kwargs: Any) -> Any:
                return self.ask("back", rest[0], args, tuple(kwargs.items()))

            call_back.__name__ = call_back.__qualname__ = str(rest[1])
            self._stubs[id(call_back)] = (rest[0], call_back)
            return call_back
        raise ValueError(f"no such tag: {tag}")


def _exception(kind: Any, args: tuple[Any, ...]) -> BaseException:
    if not (isinstance(kind, type) and issubclass(kind, BaseException)):
        raise TypeError("not an exception")
    try:
        return kind(*args)
    except Exception:
        error = kind.__new__(kind, *args)
        error.args = args
        return error


# ---- the check's side ----------------------------------------------------------------------------------------


class Remote:
    """An object of the program, seen from the check."""

    __slots__ = ("_flag", "_link", "_made", "_place", "_value")

    def __init__(self, link: "CheckSide", place: int, flag: str, value: Any):
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
        return format(_plain(self), spec) if self._flag == "p" else str(self._link.ask("format", self, spec))

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
        return any(item is other or item == other for other in _plain(self))

    def __dir__(self) -> Any:
        return self._link.ask("dir", self)

    def __round__(self, *digits: int) -> Any:
        return round(self._value, *digits) if self._flag == "p" else self._link.ask("round", self, *digits)


def _plain(value: Any) -> Any:
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
            a, b = _plain(self), _plain(other)
            if a is not self:
                return _OPERATORS[name](a, b)
        if not _decides(self, other):
            return NotImplemented
        self._link.weak = True
        return self._link.ask(name, self, other)

    return compare


def _binary(name: str, *, swapped: bool) -> Callable[[Any, Any], Any]:
    def compute(self: Any, other: Any) -> Any:
        a, b = (_plain(self), _plain(other)) if self._flag == "p" else (self, other)
        if swapped:
            a, b = b, a
        if type(a) is not Remote and type(b) is not Remote:
            return _OPERATORS[name](a, b)
        if not _decides(a, b):
            return NotImplemented
        self._link.weak = True
        return _made(self._link.ask(name, a, b))

    return compute


def _forward(name: str) -> Callable[..., Any]:
    def forward(self: Any, *operands: Any) -> Any:
        if self._flag == "p":
            return _OPERATORS[name](self._value, *operands)
        return _made(self._link.ask(name, self, *operands)) if self._made and name in _UNARY else self._link.ask(name, self, *operands)

    return forward


def _made(value: Any) -> Any:
    if type(value) is Remote:
        object.__setattr__(value, "_made", True)
    return value


for _name in _COMPARED:
    setattr(Remote, f"__{_name}__", _compare(_name))
for _name in _BINARY:
    setattr(Remote, f"__{_name.rstrip('_')}__", _binary(_name, swapped=False))
    setattr(Remote, f"__r{_name.rstrip('_')}__", _binary(_name, swapped=True))
for _name in (*_UNARY, "len", "iter", "next", "int", "float", "complex", "index", "getitem", "setitem", "delitem", "reversed", "bytes"):
    setattr(Remote, f"__{_name}__", _forward(_name))


class _Names(dict[str, Any]):
    """The check's globals: what it defines, and behind that the program's."""

    def __init__(self, link: "CheckSide", *values: Any):
        super().__init__(*values)
        self._link = link

    def __missing__(self, name: str) -> Any:
        value = self._link.find(name)
        if type(value) is Remote and value._flag in ("c", "f"):
            self[name] = value
        return value


class CheckSide(Peer):
    """Runs a check that calls the program.

    Attributes:
        weak: something was decided in the program's process.
    """

    def __init__(self, reader: int, writer: int):
        super().__init__(reader, writer)
        self.weak = False
        self._remotes: dict[int, Remote] = {}
        self._classes: dict[int | str, type[BaseException]] = {}
        self._functions: list[Any] = []
        self._numbers: dict[int, int] = {}
        self._stdout, self._stdin = sys.stdout, sys.stdin
        self._hidden: frozenset[str] = frozenset()
        self._finding = ""
        self._stops = False

    def begin(self, names: list[str], loaded: set[str]) -> None:
        """The program defines `names`, the check mentions `loaded`."""
        self._stops = "StopIteration" in loaded
        used = loaded.intersection(names)
        # `len` is the built-in one, unless there is nothing else that the check could be about.
        if any(not hasattr(builtins, name) for name in used):
            used = set()
        self._hidden = frozenset(vars(builtins).keys() - used)

    def find(self, name: str, *, imported: bool = False) -> Any:
        """An object of the program's, by its global name; an import may name what hides a built-in."""
        if (name in self._hidden and not imported) or name[:2] == "__":
            raise KeyError(name)
        self._finding = name  # only what has this name may be the check's own object of that name
        try:
            value = self.ask("global", name)
        finally:
            self._finding = ""
        return _made(value) if type(value) is Remote and value._flag == "c" and name[0].isupper() else value

    def ask(self, op: str, *operands: Any, **more: Any) -> Any:
        if sys.stdout is not self._stdout:
            more["capture"] = True
        if sys.stdin is not self._stdin and op in ("call", "script"):
            more["stdin"] = sys.stdin.read()
        try:
            value = super().ask(op, *operands, **more)
        except StopIteration as error:
            if op == "call" and not self._stops:  # `all(map(f, ..))` would take it for its own end
                raise RuntimeError("the program raised StopIteration") from error
            raise
        if op == "call" and operands[0]._value == "method" and type(value) is bool:
            self.weak = True
        return _made(value) if op == "call" and operands[0]._flag == "c" and operands[0]._made else value

    def heard(self, answer: dict[str, Any]) -> None:
        if "out" in answer:
            sys.stdout.write(str(answer["out"]))
        if "rest" in answer:
            sys.stdin = io.StringIO(str(answer["rest"]))

    def perform(self, request: dict[str, Any], operands: list[Any], answer: dict[str, Any]) -> Any:
        if request["do"] != "back":
            raise Gone("protocol")
        number, args, kwargs = operands
        return self._functions[number](*args, **dict(kwargs))

    def pack_other(self, value: Any, nodes: list[Any], places: dict[int, int]) -> Any:
        kind = type(value)
        if kind is Remote:
            return ["o", value._place]
        if isinstance(value, BaseException):
            return ["x", self._class(kind), self.pack(tuple(value.args), nodes, places)]
        if isinstance(value, type) and issubclass(value, BaseException):
            return self._class(value)
        if isinstance(value, (type, types.BuiltinFunctionType)):
            module, name = getattr(value, "__module__", None), value.__name__
            if module in sys.stdlib_module_names and getattr(sys.modules.get(module), name, None) is value or module == "builtins":
                return ["S", module, name]
        if hasattr(kind, "__next__") and kind.__module__ in ("builtins", "itertools"):
            items: list[Any] = []
            for item in value:
                if len(items) >= MAX_DRAINED:
                    raise Unsplit
                items.append(self.pack(item, nodes, places))
            return ["it", items]
        if callable(value) and kind.__module__ in ("builtins", "functools", "operator"):
            number = self._numbers.get(id(value))
            if number is None:
                number = self._numbers[id(value)] = len(self._functions)
                self._functions.append(value)
            return ["k", number, getattr(value, "__name__", "function")]
        raise Unsplit

    def _class(self, kind: type) -> list[Any]:
        for place, known in self._classes.items():
            if known is kind:
                return ["X", place]
        shared = vars(builtins).get(kind.__name__) is kind
        return (
            ["B", kind.__name__]
            if shared
            else ["E", kind.__module__, kind.__name__]
            if kind.__module__ in sys.stdlib_module_names
            else ["B", "Exception"]
        )

    def unpack_other(self, tag: str, rest: list[Any], table: list[Any]) -> Any:
        if tag == "o":
            place, flag, value = rest
            if type(place) is not int or flag not in ("p", "m", "c", "f", "g", ""):
                raise ValueError("not a reference")
            value = self.unpack(value, table)
            if flag == "p" and type(value) not in _FROZEN:
                raise ValueError("not a plain value")
            found = self._remotes.get(place)
            if found is None or found._flag != flag:
                found = self._remotes[place] = Remote(self, place, flag, value)
            return found
        if tag == "S" and rest[0] in SHARED_MODULES and rest[1] == self._finding:
            return getattr(importlib.import_module(rest[0]), rest[1])
        if tag == "M" and rest[1] in SHARED_MODULES | {"time", "datetime", "random", "os", "sys", "io"}:
            return importlib.import_module(rest[1])
        if tag == "M":  # of another module the check uses what the program has
            self.weak = True
            return self.unpack_other("o", [rest[0], "", None], table)
        if tag == "k":
            return self._functions[rest[0]]
        if tag in ("B", "E", "X"):
            return self._known(tag, rest)
        if tag == "x":
            (kind_tag, *kind), args, text, attributes = rest
            made = _exception(self._known(kind_tag, kind), self.unpack(args, table))
            for name, value in self.unpack(attributes, table):
                if str(name).isidentifier() and str(name)[0] != "_":
                    setattr(made, name, value)
            if kind_tag == "X" and isinstance(text, str):
                vars(made)["_text"] = text
            return made
        raise ValueError(f"no such tag: {str(tag)[:20]}")

    def _known(self, tag: str, rest: list[Any]) -> type[BaseException]:
        """The class of an exception; a stand-in for one of the program's own."""
        if tag == "B":
            found = vars(builtins)[rest[0]]
        elif tag == "E" and rest[0] in sys.stdlib_module_names and rest[0] in sys.modules:
            found = vars(sys.modules[rest[0]])[rest[1]]
        else:
            place = rest[0] if tag == "X" else str(rest[:2])
            name, bases = rest[-2:]
            if place not in self._classes:
                kinds = tuple(self._known(base[0], base[1:]) for base in bases)
                own = {"__str__": lambda error: vars(error).get("_text") or " ".join(map(str, error.args)), "__module__": "program"}
                self._classes[place] = type(str(name), kinds, own)
            found = self._classes[place]
        if not (isinstance(found, type) and issubclass(found, BaseException)):
            raise ValueError("not an exception")
        return found


class _Rewrite(ast.NodeTransformer):
    """What a check says about remote objects that no special method can answer: `type(x)`, and imports of the program."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and node.func.id == "type" and len(node.args) == 1 and not node.keywords:
            node.func.id = "__type__"
        return node

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        self.generic_visit(node)
        if len(node.ops) == 1 and isinstance(node.ops[0], (ast.Is, ast.IsNot)):
            call = ast.Call(ast.Name("__is__", ast.Load()), [node.left, node.comparators[0]], [])
            made = call if isinstance(node.ops[0], ast.Is) else ast.UnaryOp(ast.Not(), call)
            return ast.copy_location(made, node)
        return node


def run_check(check: str, reader: int, writer: int) -> tuple[str, bool, bool]:
    """Run a check against the program that serves the other ends.

    Returns:
        the reason ("passed", "failed", "error: ...", "early exit" or "unsplit"), whether the verdict is weak, and whether another
        check may run in this process.
    """
    link = CheckSide(reader, writer)
    usual = sys.stdout, sys.stdin
    finder = _ProgramFinder(link)
    clean = False
    try:
        code = _compile(check)
        used, attributes = _mentioned(code)
        clean = not attributes and _TRACES.isdisjoint(used)
        first = link.receive()
        if reason := first.get("reason"):
            return (str(reason) if str(reason).startswith(("error: ", "failed")) else "early exit"), False, clean
        names = first.get("names")
        if not isinstance(names, list) or len(names) > MAX_NAMES or not all(isinstance(name, str) for name in names):
            raise Gone("protocol")
        link.begin(names, used)
        finder.names = names
        sys.meta_path.append(finder)
        sys.set_int_max_str_digits(0)
        _execute(code, link)
        return "passed", link.weak, clean
    except Gone as error:
        return ("early exit" if str(error) == "ended" else "error: the program broke the protocol of the check"), False, False
    except Unsplit:
        return "unsplit", False, False
    except SystemExit:
        return "early exit", False, False
    except BaseException as error:
        if type(error) is not AssertionError:
            print(f"{type(error).__name__}: {error}"[:1000], file=sys.stderr)
        return describe(error), False, clean
    finally:
        sys.stdout, sys.stdin = usual
        if finder in sys.meta_path:
            sys.meta_path.remove(finder)
        for name in finder.made:
            sys.modules.pop(name, None)
        sys.stdout.flush()


def _compile(check: str) -> types.CodeType:
    if "type(" in check or " is " in check:
        tree = ast.fix_missing_locations(_Rewrite().visit(ast.parse(check, "<check>")))
        return compile(tree, "<check>", "exec", dont_inherit=True, optimize=0)
    return compile(check, "<check>", "exec", dont_inherit=True, optimize=0)


def _mentioned(code: types.CodeType) -> tuple[set[str], bool]:
    """The names that code uses (attributes too), and whether it sets attributes."""
    names, sets = set(code.co_names), _SETTERS.isdisjoint(code.co_code[::2]) is False
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            inner, inner_sets = _mentioned(constant)
            names, sets = names | inner, sets or inner_sets
    return names, sets


def _execute(code: types.CodeType, link: CheckSide) -> None:
    def type_of(value: Any) -> Any:
        return link.ask("type", value) if type(value) is Remote else type(value)

    def same(a: Any, b: Any) -> bool:
        if type(a) is Remote and type(b) is Remote:
            link.weak = True
        return a is b

    def run_script(stdin: str) -> str:
        usual = sys.stdin, sys.stdout
        sys.stdin, sys.stdout = io.StringIO(stdin), io.StringIO()
        try:
            link.ask("script")
            return sys.stdout.getvalue()
        finally:
            sys.stdin, sys.stdout = usual

    namespace = _Names(link, {"__name__": "check", "__builtins__": builtins, "__type__": type_of, "__is__": same})
    namespace |= {"__run_script__": run_script, "__run_tests__": lambda: test_runner.run_tests(dict(namespace))}
    exec(code, namespace)


class _ProgramFinder:
    """Imports of the program: `from solution import f` finds what the program defines, whatever the module is called."""

    def __init__(self, link: CheckSide):
        self._link = link
        self.names: list[str] = []
        self.made: list[str] = []

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        from importlib.machinery import ModuleSpec

        if name == "pytest":
            return ModuleSpec(name, self)  # type: ignore[arg-type]
        known = name.split(".")[0] in sys.stdlib_module_names
        return None if known or "." in name else ModuleSpec(name, self)  # type: ignore[arg-type]

    def create_module(self, spec: Any) -> types.ModuleType:
        if spec.name == "pytest":
            return test_runner.pytest_module()
        self.made.append(spec.name)
        module = types.ModuleType(spec.name)
        module.__getattr__ = lambda name: self._find(name)  # type: ignore[method-assign]
        module.__all__ = [name for name in self.names if name[:1] != "_"]  # type: ignore[attr-defined]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing is left to do."""

    def _find(self, name: str) -> Any:
        if name not in self.names:
            raise AttributeError(name)
        return self._link.find(name, imported=True)
