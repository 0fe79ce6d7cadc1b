"""The check's side: runs a check that calls the program, and says how it ended."""

import ast
import builtins
import importlib
import io
import sys
import types
from typing import Any

from gristmill.sandbox import test_runner
from gristmill.sandbox.operations import FROZEN, make_exception
from gristmill.sandbox.remote import Remote, mark_made
from gristmill.sandbox.split import mentioned
from gristmill.sandbox.wire import SHARED_MODULES, Gone, Peer, Unsplit

MAX_DRAINED = 100_000  # items of an iterator that is an argument
MAX_NAMES = 10_000


def describe(error: BaseException | None) -> str:
    """An exception as the reason of a verdict."""
    if isinstance(error, AssertionError):
        return "failed"
    try:
        text = " ".join(str(error).split())
    except Exception:
        text = ""
    return f"error: {type(error).__name__}" + (f": {text}" if text else "")


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
        return mark_made(value) if type(value) is Remote and value._flag == "c" and name[0].isupper() else value

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
        if op == "call" and operands[0]._value == "method" and (type(value) is bool or (value is not None and any(operands[1:]))):
            self.weak = True  # it was told what is wanted, and anything but None may be taken for true
        return mark_made(value) if op == "call" and operands[0]._flag == "c" and operands[0]._made else value

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
            if flag == "p" and type(value) not in FROZEN:
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
            made = make_exception(self._known(kind_tag, kind), self.unpack(args, table))
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
        used, clean = mentioned(code)
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
