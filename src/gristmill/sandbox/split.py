"""Program and check in two processes: the program serves calls, the check runs where no code of the program ever is.

A name that the check uses and does not define becomes a remote object (remote.py): calls, attributes and operators go to the program's
process (program_side.py, over wire.py), and plain data come back to the check (check_side.py), which compares them by the real `==`. So
neither objects that lie about being equal nor frames, globals or replaced modules of the program reach an assertion.

What the program alone can decide stays open to its lies: whether two of its own objects are equal, or one that the check built
equals plain data. A verdict that rests on this is weak. An object that a call returned equals no plain data and does no arithmetic
with it, unless its class extends a built-in type: then its plain value counts.

This file reads a check before it runs: whether it can run apart, and whether another may follow it in its process.
"""

import ast
import dis
import functools
import types

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


def mentioned(code: types.CodeType) -> tuple[set[str], bool]:
    """The names that code uses (attributes too), and whether it leaves no trace, so that another check may run in its process."""
    names, sets = _names(code)
    return names, not sets and _TRACES.isdisjoint(names)


def _names(code: types.CodeType) -> tuple[set[str], bool]:
    """The names that code uses, and whether it sets attributes."""
    names, sets = set(code.co_names), _SETTERS.isdisjoint(code.co_code[::2]) is False
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            inner, inner_sets = _names(constant)
            names, sets = names | inner, sets or inner_sets
    return names, sets
