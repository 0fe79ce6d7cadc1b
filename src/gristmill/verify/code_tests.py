"""Unit tests of programs: what a `code` truth runs, and whether it can fail.

| field | means |
|---|---|
| tests | assertions, or what holds them (HumanEval's `check(candidate)`, pytest, unittest); text, or a list of texts (MBPP) |
| entry_point | the function under test: what `check` is called with |
| setup | code before the tests (imports, data) |
| cases | instead of tests, `{"input", "output"}` each: arguments of the entry point (`also`: another output that is right), or else \
standard input and output of a script |
| prefix | code that the prompt gave and an answer may leave out: an answer continues it |
"""

import ast
import builtins
import functools
import json
import re
import sys
from typing import Any

from gristmill.core.errors import InputError

# What tests import and programs are checked without: only the standard library is there.
MISSING_MODULES = frozenset(
    [
        "numpy",
        "pandas",
        "scipy",
        "sklearn",
        "torch",
        "tensorflow",
        "jax",
        "sympy",
        "networkx",
        "matplotlib",
        "requests",
        "hypothesis",
        "nose",
        "parameterized",
        "django",
        "flask",
    ]
)
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
CANDIDATES = frozenset(("candidate", "func", "function", "fn", "f", "solution", "solve"))
HOOKS = frozenset(
    ("capsys", "tmp_path", "tmpdir", "monkeypatch", "caplog", "capfd", "request", "mocker", "benchmark", "recwarn", "tmp_path_factory")
)
STUB = "def {name}(*args, **kwargs):\n    return None\n"
STUB_CLASS = (
    "class {name}:\n    def __init__(self, *args, **kwargs): pass\n    def __getattr__(self, name): return lambda *args, **kwargs: None\n"
)
SCRIPT_CASE = (
    "assert [line.rstrip() for line in __run_script__({stdin!r}).rstrip().split('\\n')]"
    " == [line.rstrip() for line in {stdout!r}.rstrip().split('\\n')]"
)
FIND_METHOD = "try:\n    __entry__ = Solution().{name}\nexcept NameError:\n    __entry__ = {name}\n"


def check_text(truth: dict[str, Any]) -> str:
    """The check of a `code` truth, as the text that runs after a program.

    Raises:
        InputError: the tests are not Python, check nothing, or are never called.
    """
    if truth.get("cases") is not None:
        return _cases(json.dumps(truth["cases"]), str(truth.get("entry_point") or ""))
    if "tests" not in truth:
        raise InputError(f"The truth {_short(truth)} lacks the field 'tests' (or 'cases').")
    return _tests(_joined(truth.get("setup")), _joined(truth["tests"]), str(truth.get("entry_point") or ""))


def complete(truth: dict[str, Any], program: str) -> str:
    """The program with the code that its prompt gave before it: imports and helpers, or the head of the function that it continues."""
    prefix = truth.get("prefix")
    return f"{prefix}{program}" if prefix and program[:1].isspace() and program.strip() else f"{prefix}\n{program}" if prefix else program


def wrong_programs(truth: dict[str, Any]) -> dict[str, str]:
    """Programs that no check may pass: an empty one, and one whose functions return None."""
    entry_point = str(truth.get("entry_point") or "").partition("().")[0]
    used: set[str] = set() if truth.get("cases") is not None else _free_names(ast.parse(check_text(truth)))
    names = used | {entry_point} - {""}
    stubs = [(STUB_CLASS if name[0].isupper() else STUB).format(name=name) for name in sorted(names)]
    return {"an empty program": "", "a program whose functions return None": "".join(stubs) or "pass\n"}


def _short(truth: Any) -> str:
    text = repr(truth)
    return text if len(text) <= 200 else text[:200] + "..."


def _joined(texts: Any) -> str:
    if texts is None:
        return ""
    if isinstance(texts, str):
        return texts
    if isinstance(texts, list) and all(isinstance(text, str) for text in texts):
        return "\n".join(texts)
    raise InputError(f"The tests {_short(texts)} are neither text nor a list of texts: give Python code.")


# ---- cases -------------------------------------------------------------------------------------------------


@functools.lru_cache(4096)
def _cases(cases_json: str, entry_point: str) -> str:
    cases = json.loads(cases_json)
    if not isinstance(cases, list) or not all(isinstance(c, dict) and {"input", "output"} <= c.keys() for c in cases):
        raise InputError(f"The cases {_short(cases)} are no list of objects with 'input' and 'output': give one a test.")
    if entry_point:
        _check_name(entry_point)
        lines = [FIND_METHOD.format(name=entry_point)]
        for case in cases:
            args = case["input"]
            if not isinstance(args, list):
                raise InputError(f"The case {_short(case)} has no list of arguments as 'input': give one, or no entry_point for a script.")
            lines.append(f"__got__ = __entry__(*{args!r})")
            got = "(list(__got__) if type(__got__) is tuple else __got__)"
            lines.append(f"assert {got} == {case['output']!r}" + (f" or {got} == {case['also']!r}" if "also" in case else ""))
        useful = any(case["output"] is not None for case in cases)
    else:
        if not all(isinstance(case[key], str) for case in cases for key in ("input", "output")):
            raise InputError("A case without entry_point is the text of standard input and output: give texts, or the entry_point.")
        lines = [SCRIPT_CASE.format(stdin=case["input"], stdout=case["output"]) for case in cases]
        useful = any(case["output"].strip() for case in cases)
    if not useful:
        raise InputError("The cases expect nothing, so that an empty program passes: give at least one with an output.")
    return "\n".join(lines)


def _check_name(name: str) -> None:
    if not name.removeprefix("Solution().").isidentifier():  # LeetCode's form
        raise InputError(f"The entry_point {name!r} is not the name of a function: give the name alone.")


# ---- tests -------------------------------------------------------------------------------------------------


@functools.lru_cache(4096)
def _tests(setup: str, tests: str, entry_point: str) -> str:
    text = f"{setup}\n{tests}" if setup.strip() else tests
    if entry_point:
        _check_name(entry_point)
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
        raise InputError(f"The tests {_short(tests)} are not Python ({e}): give code with assertions.") from e
    _check_imports(tree)
    body, changed = _main_block(tree.body)
    if changed:
        tree.body = body
        text = ast.unparse(tree)
    calls = _calls(tree, entry_point)
    text = "\n".join([text, *calls]) if calls else text
    if not _checks_something(ast.parse(text)):
        raise InputError(
            f"The tests {_short(tests)} assert nothing when they run, so that any program passes: give assertions, or functions with "
            "assertions and a call of them."
        )
    return text


def _check_imports(tree: ast.Module) -> None:
    for node in ast.walk(tree):
        names = (
            [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
        for name in names:
            if name.split(".")[0] in MISSING_MODULES:
                raise InputError(
                    f"The tests import {name}, and programs are checked with the standard library alone: write them without it."
                )


def _main_block(body: list[ast.stmt]) -> tuple[list[ast.stmt], bool]:
    """Statements under `if __name__ == "__main__":` run; calls of a test runner, which would end the process, do not."""
    out: list[ast.stmt] = []
    changed = False
    for node in body:
        if isinstance(node, ast.If) and re.fullmatch(r"__name__ == '__main__'", ast.unparse(node.test)):
            out += _main_block(node.body)[0]
            changed = True
        elif isinstance(node, ast.Expr) and re.match(r"(sys\.exit\()?(unittest|pytest)\.main\(", ast.unparse(node)):
            changed = True
        elif isinstance(node, ast.Expr) and re.match(r"(sys\.|os\._?)?(exit|quit)\(", ast.unparse(node)):
            raise InputError(f"The tests end the process by {ast.unparse(node)[:60]}, so that nothing after it is checked: take it out.")
        elif re.match(r"(pytest\.(skip|importorskip)\(|raise unittest\.SkipTest)", ast.unparse(node)):
            raise InputError(f"The tests are skipped by {ast.unparse(node)[:60]}, so that no program passes: take it out.")
        else:
            out.append(node)
    return out, changed


def _calls(tree: ast.Module, entry_point: str) -> list[str]:
    """The calls that tests need to run: of `check` with the entry point, and of the test runner."""
    functions = {n.name: n for n in tree.body if isinstance(n, FUNCTION)}
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    calls: list[str] = []
    collected = False
    for name, node in functions.items():
        if name in used:
            continue
        fixture = any("fixture" in ast.unparse(d) for d in node.decorator_list)
        if fixture:
            continue
        arguments = [a.arg for a in node.args.args[: len(node.args.args) - len(node.args.defaults)]]
        takes_candidate = len(arguments) == 1 and not node.decorator_list and (name == "check" or arguments[0] in CANDIDATES)
        if isinstance(node, ast.AsyncFunctionDef) and name.startswith("test"):
            raise InputError(f"The test {name} is asynchronous, and no event loop runs where programs are checked: call what it awaits.")
        if takes_candidate and arguments[0] not in functions:
            if not entry_point:
                raise InputError(
                    f"The tests define {name}({arguments[0]}) and nothing calls it, so that any program passes: give the row an "
                    f"`entry_point`, or add the call."
                )
            calls.append(f"{name}({entry_point})")
        elif name.startswith("test"):
            if missing := HOOKS.intersection(arguments) - functions.keys():
                raise InputError(f"The test {name} needs pytest's fixture {min(missing)}, and there is no pytest: write it without.")
            collected = True
    collected |= any(isinstance(n, ast.ClassDef) and _holds_tests(n) and n.name not in used for n in tree.body)
    return calls + ["__run_tests__()"] * collected


def _holds_tests(node: ast.ClassDef) -> bool:
    case = any(ast.unparse(base).endswith("TestCase") for base in node.bases)
    return (case or node.name.startswith("Test")) and any(isinstance(n, FUNCTION) and n.name.startswith("test") for n in node.body)


def _checks_something(tree: ast.Module) -> bool:
    """Whether code that runs can fail by its own doing: the module's statements, and the definitions that they reach."""
    tree = _Unskipped().visit(tree)
    defined = {n.name: n for n in tree.body if isinstance(n, (*FUNCTION, ast.ClassDef))}
    waiting: list[ast.AST] = [n for n in tree.body if not isinstance(n, (*FUNCTION, ast.ClassDef))]
    seen: set[str] = set()
    while waiting:
        for node in ast.walk(waiting.pop()):
            if _can_fail(node):
                return True
            if not isinstance(node, ast.Name) or node.id in seen:
                continue
            seen.add(node.id)
            if node.id == "__run_tests__":
                waiting += [n for name, n in defined.items() if name.startswith("test") or isinstance(n, ast.ClassDef)]
            elif node.id in defined:
                waiting.append(defined[node.id])
    return False


class _Unskipped(ast.NodeTransformer):
    """Tests without those that never run, or are meant to fail."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST | None:
        return None if any(map(_skips, node.decorator_list)) else node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST | None:
        if any(map(_skips, node.decorator_list)):
            return None
        node.body = [kept for one in node.body if (kept := self.visit(one))] or [ast.Pass()]
        return node


def _skips(decorator: ast.expr) -> bool:
    name = ast.unparse(decorator.func if isinstance(decorator, ast.Call) else decorator).rpartition(".")[2]
    if name.lower() == "skipif" and isinstance(decorator, ast.Call) and decorator.args:
        return _always_true(decorator.args[0])
    return name in ("skip", "xfail", "expectedFailure")


def _can_fail(node: ast.AST) -> bool:
    if isinstance(node, ast.Assert):
        return not _always_true(node.test)
    if isinstance(node, ast.Raise):
        return True
    if isinstance(node, ast.Call):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id if isinstance(node.func, ast.Name) else ""
        if name in ("assertTrue", "assertEqual", "assertEquals") and node.args:
            return not _always_true(node.args[0]) if name == "assertTrue" else ast.dump(node.args[0]) != ast.dump(node.args[-1])
        return name.lower().startswith("assert") or name in ("raises", "fail")
    return False


def _always_true(test: ast.expr) -> bool:
    """Whether an asserted expression is true whatever the program does."""
    if isinstance(test, ast.Constant):
        return bool(test.value)
    if isinstance(test, (ast.Tuple, ast.List, ast.Set)):
        return bool(test.elts)
    if isinstance(test, ast.Dict):
        return bool(test.keys)
    if isinstance(test, (ast.Lambda, ast.GeneratorExp)):
        return True
    if isinstance(test, ast.JoinedStr):
        return any(isinstance(v, ast.Constant) and v.value for v in test.values)
    if isinstance(test, ast.BoolOp):
        return (any if isinstance(test.op, ast.Or) else all)(_always_true(v) for v in test.values)
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return isinstance(test.operand, ast.Constant) and not test.operand.value
    if isinstance(test, ast.Compare) and not any(isinstance(n, (ast.Call, ast.Attribute, ast.Subscript)) for n in ast.walk(test)):
        sides = [test.left, *test.comparators]
        if all(isinstance(s, ast.Constant) for s in sides):
            return True  # nothing in it is the program's
        return len(sides) == 2 and isinstance(test.ops[0], (ast.Eq, ast.Is, ast.LtE, ast.GtE)) and ast.dump(sides[0]) == ast.dump(sides[1])
    return False


def _free_names(tree: ast.AST) -> set[str]:
    """Names that a check takes from the program."""
    loaded: set[str] = set()
    bound = set(dir(builtins)) | {"__run_tests__", "__run_script__"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            (loaded if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, (*FUNCTION, ast.ClassDef)):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            bound.add(node.name)
        elif isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and _is_known(node.module)):
            bound.update((alias.asname or alias.name).split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            loaded.update(alias.name for alias in node.names if alias.name != "*")
            bound.update(alias.asname for alias in node.names if alias.asname)
    return loaded - bound


def _is_known(module: str | None) -> bool:
    return (module or "").split(".")[0] in sys.stdlib_module_names | {"pytest"}
