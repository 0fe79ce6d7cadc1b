"""Runs test functions, test classes and unittest cases, and stands in for pytest where it is not installed.

Only the standard library is there when programs are checked. Of pytest there is what tests of programs use: `raises`, `approx`,
`fixture`, `mark.parametrize`, `skip`, `fail` and `param`.
"""

import functools
import inspect
import itertools
import math
import re
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any


class Skipped(Exception):
    """A test that says it should not run."""


def run_tests(namespace: Mapping[str, Any]) -> None:
    """Run every test that a namespace holds.

    Raises:
        AssertionError: a test failed, or none ran.
        BaseException: what a test raised.
    """
    num_run = 0
    fixtures = {name: value for name, value in namespace.items() if hasattr(value, "__dict__") and "_fixture" in vars(value)}
    for name, value in list(namespace.items()):
        unittest = sys.modules.get("unittest")
        if isinstance(value, type) and unittest is not None and issubclass(value, unittest.TestCase):
            num_run += _run_cases(unittest, value)
        elif isinstance(value, type) and name.startswith("Test"):
            own = fixtures | {n: v for n, v in vars(value).items() if hasattr(v, "__dict__") and "_fixture" in vars(v)}
            for method in [m for m in dir(value) if m.startswith("test")]:
                num_run += _run_test(getattr(value, method), own, value)
        elif isinstance(value, types.FunctionType) and name.startswith("test"):
            num_run += _run_test(value, fixtures, None)
    if not num_run:
        raise AssertionError("no test ran")


def _run_cases(unittest: Any, kind: type) -> int:
    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(kind).run(result)
    for failed in (result.failures, result.errors):
        if failed:
            print(failed[0][1], file=sys.stderr)
            raise (AssertionError if failed is result.failures else RuntimeError)(failed[0][1].strip().rsplit("\n", 1)[-1])
    if result.unexpectedSuccesses:
        raise AssertionError("a test passed that was expected to fail")
    return int(result.testsRun - len(result.skipped))


def _run_test(function: Callable[..., Any], fixtures: dict[str, Any], kind: type | None) -> int:
    num_run = 0
    for row in _rows(function):
        cleanups: list[Iterator[Any]] = []
        made: dict[str, Any] = {}
        instance = kind() if kind else None
        try:
            for name in ("setup_class", "setup_method", "setup"):
                _hook(instance, name, function)
            args = {n: row[n] if n in row else _fixture(n, fixtures, made, cleanups, instance) for n in _parameters(function, instance)}
            for name, fixture in fixtures.items():
                if vars(fixture)["_fixture"]:
                    _fixture(name, fixtures, made, cleanups, instance)
            function(instance, **args) if instance is not None and not isinstance(function, types.MethodType) else function(**args)
            num_run += 1
        except Skipped:
            continue
        finally:
            for cleanup in reversed(cleanups):
                next(cleanup, None)
            _hook(instance, "teardown_method", function)
    return num_run


def _hook(instance: Any, name: str, function: Any) -> None:
    hook = getattr(instance, name, None)
    if hook is not None:
        hook(*[function] * (1 if name.endswith("_method") and len(inspect.signature(hook).parameters) else 0))


def _parameters(function: Any, instance: Any) -> list[str]:
    found = inspect.signature(function).parameters.values()
    names = [p.name for p in found if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return names[1:] if instance is not None and names[:1] == ["self"] else names


def _fixture(name: str, fixtures: dict[str, Any], made: dict[str, Any], cleanups: list[Iterator[Any]], instance: Any) -> Any:
    if name in made:
        return made[name]
    if name not in fixtures:
        raise RuntimeError(f"there is no fixture {name!r}: make it in the test")
    function = fixtures[name]
    args = {n: _fixture(n, fixtures, made, cleanups, instance) for n in _parameters(function, instance)}
    own = instance is not None and next(iter(inspect.signature(function).parameters), "") == "self"
    value = function(instance, **args) if own else function(**args)
    if inspect.isgenerator(value):
        cleanups.append(value)
        value = next(value)
    made[name] = value
    return value


def _rows(function: Any) -> list[dict[str, Any]]:
    """The arguments of every run: the product of all `parametrize` marks."""
    tables = getattr(function, "_tables", [])
    return [functools.reduce(lambda a, b: a | b, rows, {}) for rows in itertools.product(*tables)]


# ---- pytest ------------------------------------------------------------------------------------------------


class approx:  # noqa: N801
    """A number, or a collection of numbers, to be met within a tolerance (relative 1e-6, absolute 1e-12)."""

    def __init__(self, expected: Any, rel: float | None = None, abs: float | None = None, nan_ok: bool = False):
        self._expected, self._rel, self._abs, self._nan_ok = expected, rel, abs, nan_ok

    def __eq__(self, actual: object) -> bool:
        return self._near(actual, self._expected)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"approx({self._expected!r})"

    def _near(self, a: Any, b: Any) -> bool:
        if isinstance(b, dict):
            return isinstance(a, dict) and a.keys() == b.keys() and all(self._near(a[k], b[k]) for k in b)
        if isinstance(b, (list, tuple)):
            return isinstance(a, (list, tuple)) and len(a) == len(b) and all(map(self._near, a, b))
        if isinstance(b, bool) or not isinstance(b, (int, float, complex)) or not isinstance(a, (int, float, complex)):
            try:
                return bool(a == b or abs(a - b) <= self._tolerance(b))
            except TypeError:
                return False
        if b != b:
            return self._nan_ok and a != a
        return bool(a == b or (not math.isinf(abs(b)) and abs(a - b) <= self._tolerance(b)))

    def _tolerance(self, b: Any) -> Any:
        if self._rel is None and self._abs is not None:
            return self._abs
        return max((1e-6 if self._rel is None else self._rel) * abs(b), 1e-12 if self._abs is None else self._abs)


class _Raises:
    def __init__(self, kinds: Any, match: str | None):
        self._kinds, self._match, self.value = kinds, match, None

    def __enter__(self) -> "_Raises":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        if error is None:
            raise AssertionError(f"nothing was raised where {self._kinds} was expected")
        if not isinstance(error, self._kinds):
            return False
        self.value, self.type = error, kind
        if self._match is not None and not re.search(self._match, str(error)):
            raise AssertionError(f"the message {str(error)!r} does not match {self._match!r}")
        return True


def raises(kinds: Any, *call: Any, match: str | None = None, **kwargs: Any) -> Any:
    """A block, or a call, that must raise."""
    block = _Raises(kinds, match)
    if not call:
        return block
    with block:
        call[0](*call[1:], **kwargs)
    return block


def fixture(function: Any = None, *, autouse: bool = False, **unused: Any) -> Any:
    """Mark a function that makes an argument of tests."""
    if function is None:
        return functools.partial(fixture, autouse=autouse)
    function._fixture = autouse
    return function


def param(*values: Any, **unused: Any) -> Any:
    """One row of `parametrize`."""
    return values if len(values) != 1 else values[0]


class _Marks:
    def __getattr__(self, name: str) -> Any:
        return self._parametrize if name == "parametrize" else self._skip if name.startswith(("skip", "xfail")) else self._other

    @staticmethod
    def _parametrize(names: Any, values: Any, **unused: Any) -> Any:
        split = [n.strip() for n in names.split(",") if n.strip()] if isinstance(names, str) else list(names)
        rows = [dict(zip(split, v if len(split) > 1 else (v,), strict=True)) for v in values]

        def mark(function: Any) -> Any:
            function._tables = [rows, *getattr(function, "_tables", [])]
            return function

        return mark

    @staticmethod
    def _skip(*args: Any, **unused: Any) -> Any:
        def mark(function: Any) -> Any:
            function._tables = [[]]
            return function

        if args and isinstance(args[0], types.FunctionType):
            return mark(args[0])
        return mark if not args or isinstance(args[0], str) or args[0] else lambda function: function

    @staticmethod
    def _other(*args: Any, **unused: Any) -> Any:
        return args[0] if args and isinstance(args[0], (type, types.FunctionType)) else lambda function: function


def skip(reason: str = "") -> None:
    """Leave a test."""
    raise Skipped(reason)


def fail(reason: str = "") -> None:
    """Fail a test."""
    raise AssertionError(reason)


def pytest_module() -> types.ModuleType:
    """The stand-in as a module."""
    module = types.ModuleType("pytest")
    vars(module).update(approx=approx, raises=raises, fixture=fixture, param=param, mark=_Marks(), skip=skip, fail=fail)
    return module
