"""The program's side of a check: serves calls, attributes and operators of the program's objects."""

import builtins
import contextlib
import importlib
import io
import sys
import types
from typing import Any

from gristmill.sandbox.operations import BASES, FROZEN, OPERATORS, make_exception
from gristmill.sandbox.wire import SHARED_MODULES, Gone, Peer


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
            return next(plain(operands[0]) for base, plain in BASES.items() if isinstance(operands[0], base))
        if op == "script":
            with contextlib.suppress(SystemExit):
                exec(compile(self._source, "<program>", "exec", dont_inherit=True), {"__name__": "__main__", "__builtins__": builtins})
            return None
        return OPERATORS[op](*operands)

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
        for base, plain in BASES.items():
            if isinstance(value, base):
                return [
                    "o",
                    self._place(value),
                    "p" if base in FROZEN else "m",
                    self.pack(plain(value), nodes, places) if base in FROZEN else None,
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
            return make_exception(self.unpack(rest[0], table), self.unpack(rest[1], table))
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
