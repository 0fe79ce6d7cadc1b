"""Checks run apart from their programs: what crosses, what a lying program cannot reach, and which verdicts are weak."""

import platform
import shutil
import sys
from collections.abc import Iterator

import pytest

from gristmill.sandbox import jail, seccomp
from gristmill.sandbox.sandbox import Sandbox

JAIL = sys.platform == "linux" and platform.machine() in seccomp.ARCHITECTURES and bool(jail.landlock_abi() or shutil.which("bwrap"))
pytestmark = pytest.mark.skipif(not JAIL, reason="no jail here")


@pytest.fixture(scope="module")
def box(make_sandbox: type[Sandbox]) -> Iterator[Sandbox]:
    with make_sandbox() as made:
        yield made


CROSSES = {
    "values": (
        "from decimal import Decimal\nfrom fractions import Fraction\nimport datetime, collections\n"
        "def f(): return [None, True, 2**70, -0.0, 'a\\ud800', b'\\xff', 1j, (1,), {1}, frozenset({2}), range(3), ...,\n"
        "    Decimal('1.10'), Fraction(1, 3), datetime.date(2020, 1, 2), collections.Counter('aab'), collections.deque([1], 2)]",
        "from decimal import Decimal\nfrom fractions import Fraction\nimport datetime, collections\n"
        "got = f()\n"
        "assert got == [None, True, 2**70, 0.0, 'a\\ud800', b'\\xff', 1j, (1,), {1}, frozenset({2}), range(3), ...,\n"
        "    Decimal('1.10'), Fraction(1, 3), datetime.date(2020, 1, 2), {'a': 2, 'b': 1}, collections.deque([1])]\n"
        "assert got[0] is None and got[1] is True and str(got[3]) == '-0.0' and type(got[7]) is tuple and got[16].maxlen == 2",
    ),
    "arguments changed in place": (
        "def f(l, d, s):\n    l.sort()\n    d['x'] = l\n    s.clear()\n    return l",
        "l, d, s = [3, 1], {}, {1}\nassert f(l, d, s) is l and l == [1, 3] and d['x'] is l and s == set()",
    ),
    "cycles": ("def f(l):\n    l.append(l)\n    return l", "l = []\nassert f(l) is l and l[0] is l"),
    "functions as arguments": ("def f(g, l): return sorted(map(g, l), key=lambda x: -x)", "assert f(lambda x: x * 2, [1, 3]) == [6, 2]"),
    "errors of a callback": ("def f(g): return g(0)", "try: f(lambda x: 1 / x)\nexcept ZeroDivisionError: pass\nelse: assert 0"),
    "own exceptions": (
        "class Base(Exception): pass\nclass Mine(Base, ValueError):\n    def __init__(self, code):\n"
        "        super().__init__('no', code)\n        self.code = code\n"
        "def f(): raise Mine(7)",
        "try: f()\nexcept Base as e: assert isinstance(e, Mine) and e.code == 7 and e.args == ('no', 7)\nelse: assert 0",
    ),
    "objects": (
        "class Stack:\n    'A stack.'\n    limit = 2\n    def __init__(self): self.items = []\n    def push(self, x): self.items.append(x)\n"  # noqa: E501
        "    def __len__(self): return len(self.items)\n    def __getitem__(self, i): return self.items[i]\n"
        "    def __enter__(self): return self\n    def __exit__(self, *e): return True",
        "s = Stack()\ns.push(4)\nassert len(s) == 1 and s[0] == 4 and list(s) == [4] and s.items == [4] and Stack.limit == 2\n"
        "assert isinstance(s, Stack) and type(s).__name__ == 'Stack' and Stack.__doc__ == 'A stack.' and s\n"
        "s.items = [1, 2]\nassert len(s) == 2\nwith s: raise ValueError",
    ),
    "named tuples": (
        "from collections import namedtuple\nP = namedtuple('P', 'x y')\ndef f(): return P(1, 2)",
        "assert f() == (1, 2) and f().x == 1 and isinstance(f(), tuple) and f() == P(1, 2) and len({f(), (1, 2)}) == 1",
    ),
    "generators": ("def f():\n    n = 0\n    while True:\n        yield n\n        n += 1", "g = f()\nassert [next(g), next(g)] == [0, 1]"),
    "linked lists": (
        "class Node:\n    def __init__(self, v, next=None): self.v, self.next = v, next\ndef f(l): return Node(l[0], Node(l[1]))",
        "n, seen = f([1, 2]), []\nwhile n:\n    seen.append(n.v)\n    n = n.next\nassert seen == [1, 2]",
    ),
    "what is printed": (
        "def f(x): print('hi', x)",
        "import io, contextlib\nout = io.StringIO()\nwith contextlib.redirect_stdout(out): f(3)\nassert out.getvalue() == 'hi 3\\n'",
    ),
    "a built-in name under test": ("def sum(a, b): return a - b", "assert sum(5, 3) == 2"),
    "imports of the program": ("def f(): return 1", "from my_solution import f as g\nimport answer\nassert g() == 1 and answer.f() == 1"),
    "a set of objects": (
        "class K:\n    def __init__(self, n): self.n = n\n    def __repr__(self): return 'K'\nk = K(1)\ndef f(): return [k, k]",
        "assert len(set(f())) == 1 and repr(f()[0]) == 'K'",
    ),
    "keys": ("def f(d): return d.keys()", "assert f({1: 2}) == {1} and sorted(f({2: 1, 1: 1})) == [1, 2]"),
    "a tracer of its own": ("import sys\ndef f(x):\n    sys.settrace(None)\n    return x", "assert f(1) == 1"),
    "names that the program imports": ("import math\nfrom collections import Counter", "assert Counter('aa') == {'a': 2} and math.pi > 3"),
    "test functions": (
        "def f(x): return x / 10",
        "import pytest\n@pytest.fixture\ndef ten(): return 10\n"
        "@pytest.mark.parametrize('x, y', [(1, 0.1), (3, 0.3)])\ndef test_f(x, y): assert f(x) == pytest.approx(y)\n"
        "class TestF:\n    def test_g(self, ten): assert f(ten) == 1\n    def test_h(self):\n        with pytest.raises(TypeError, match='str'): f('a')\n"  # noqa: E501
        "__run_tests__()",
    ),
    "unittest": (
        "def f(x): return x + 1",
        "import unittest\nclass T(unittest.TestCase):\n    def setUp(self): self.x = 1\n"
        "    def test(self): self.assertEqual(f(self.x), 2)\n__run_tests__()",
    ),
    "a script": ("n = int(input())\nprint(n * 2)\nexit()", "assert __run_script__('4\\n') == '8\\n' and __run_script__('5') == '10\\n'"),
}  # fmt: skip


@pytest.mark.parametrize("name", CROSSES)
def test_a_right_program_passes(box: Sandbox, name: str) -> None:
    result = box.run(*CROSSES[name])
    assert (result.reason, result.weak) == ("passed", False), result


FAIL = "assert f(1) == 42"
LIE = "class L{base}:\n    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __contains__ = lambda s, o: True\n"
LIE += "    __hash__ = lambda s: hash(42)\n"
CHEATS = {
    "equal to all": (LIE.format(base="") + "def f(x): return L()", FAIL),
    "equal to all, in a list": (LIE.format(base="") + "def f(x): return [L()]", "assert f(1) == [42]"),
    "equal to all, as a key": (LIE.format(base="") + "def f(x): return {L(): 1}", "assert f(1) == {42: 1}"),
    "a number that lies": (LIE.format(base="(int)") + "def f(x): return L(1)", FAIL),
    "a list that lies": (LIE.format(base="(list)") + "def f(x): return L()", "assert f(1) == [42]"),
    "holds all": (LIE.format(base="") + "def f(x): return L()", "assert 42 in f(1)"),
    "no difference to all": (
        "class L:\n    __sub__ = __rsub__ = lambda s, o: 0\n    __abs__ = lambda s: 0\ndef f(x): return L()",
        "assert abs(f(1) - 42) < 1e-6",
    ),
    "larger than all": (LIE.format(base="") + "def f(x): return L()", "assert 42 <= f(1) <= 42"),
    "the function is a class": (LIE.format(base="").replace("class L", "class f") + "    def __init__(self, x): pass\n", FAIL),
    "mock.ANY": ("from unittest.mock import ANY\ndef f(x): return ANY", FAIL),
    "frames": ("import sys\ndef f(x):\n    sys._getframe(1).f_globals['want'] = 41\n    return 41", "want = 42\nassert f(1) == want"),
    "globals()": ("def f(x):\n    globals()['want'] = 41\n    return 41", "want = 42\nassert f(1) == want"),
    "a replaced module": ("import math\nmath.isclose = lambda *a: True\ndef f(x): return 1", "import math\nassert math.isclose(f(1), 42)"),
    "a shadowed built-in": ("def abs(x): return 0\ndef f(x): return 41", "assert abs(f(1) - 42) < 1"),
    "a replaced runner": ("def __run_tests__(): pass\ndef f(x): return 41", "def test_f(): assert f(1) == 42\n__run_tests__()"),
    "unittest replaced": (
        "import unittest\nunittest.TestCase.assertEqual = lambda *a: None\ndef f(x): return 41",
        "import unittest\nclass T(unittest.TestCase):\n    def test(self): self.assertEqual(f(1), 42)\n__run_tests__()",
    ),
    "globals of a callback": ("def f(g):\n    g.__globals__['want'] = 41\n    return 41", "want = 42\nassert f(lambda: 0) == want"),
    "answers that nobody asked for": (
        "import json, os, struct\ndef f(x):\n    m = json.dumps({'value': 42, 'raised': False, 'nodes': []}).encode()\n"
        "    for fd in range(3, 64):\n"
        "        try: os.write(fd, struct.pack('>I', len(m)) + m)\n        except OSError: pass\n    return 41",
        "assert f(1) == 42 and f(2) == 43",
    ),
    "the verdict": (
        "import json, os, struct\ndef f(x):\n    m = json.dumps({'reason': 'passed', 'weak': False, 'clean': True}).encode()\n"
        "    for fd in range(3, 64):\n"
        "        try: os.write(fd, struct.pack('>I', len(m)) + m)\n        except OSError: pass\n    os._exit(0)",
        FAIL,
    ),
    "an end that is not the check's": ("def f(x): raise StopIteration", "assert all(map(lambda c: f(c[0]) == c[1], [(1, 42), (2, 43)]))"),
    "an iterator for True": ("def f(x):\n    yield 0", "assert f(1)"),
    "too much": ("def f(x): return 'x' * (70 << 20)", FAIL),
    "too deep": ("def f(x):\n    t = ()\n    for _ in range(100000): t = (t,)\n    return t", FAIL),
    "what cannot cross, by another's name": (
        LIE.format(base="") + "import re\ng = re.compile\ndef f(x): return L()",
        "assert f(g('a')) == 42",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHEATS)
def test_a_lying_program_fails(box: Sandbox, name: str) -> None:
    result = box.run(*CHEATS[name])
    assert not result.passed, result
    assert box.run("def f(x): return x + 41", "assert f(1) == 42").passed, "the next check is none the worse"


@pytest.mark.parametrize(
    ("program", "check"),
    [
        ("class P:\n    def __init__(s, x): s.x = x\n    def __eq__(s, o): return s.x == o.x", "assert P(1) == P(1) and P(1) != P(2)"),
        ("class M:\n    def __init__(s, x): s.x = x\n    def __mul__(s, k): return M(s.x * k)", "assert (M(2) * 3).x == 6"),
        (
            "class K:\n    def __init__(s, n): s.n = n\n    def __eq__(s, o): return s.n == o.n\n    def __hash__(s): return s.n",
            "assert len({K(1), K(1)}) == 1",
        ),
        ("import pickle\nclass A: pass", "assert isinstance(pickle.loads(pickle.dumps(A())), A)"),
        ("class A:\n    def f(self): return 1", "class B(A): pass\nassert B().f() == 1"),
        ("def f(x): return x", "import inspect\nassert len(inspect.signature(f).parameters) == 1"),
        ("class A:\n    def __getattr__(self, name): return lambda *a: 1\ndef f(x): return A()", "assert f('a').startswith('b')"),
        ("def f(o): return o.read()", "import io\nassert f(io.StringIO('a')) == 'a'"),
    ],
)
def test_what_the_program_decides_is_weak(box: Sandbox, program: str, check: str) -> None:
    result = box.run(program, check)
    assert result.passed and result.weak, result


def test_a_check_leaves_no_trace_for_the_next(box: Sandbox) -> None:
    assert box.run("", "import math\nmath.floor = lambda x: 7\nassert math.floor(1.5) == 7").passed
    assert box.run("", "import math\nassert math.floor(1.5) == 1").passed
    assert box.run("def f(): return 1", "import answer\nassert answer.f() == 1").passed
    assert not box.run("x = 2", "import answer\nassert answer.f() == 1").passed


@pytest.mark.parametrize("name", ["_testcapi", "_testinternalcapi", "_ctypes", "_xxsubinterpreters", "_posixsubprocess", "_testbuffer"])
def test_modules_that_reach_into_the_interpreter_are_not_importable(box: Sandbox, name: str) -> None:
    again = f"import importlib, sys\nsys.modules.pop('{name}', None)\nimportlib.import_module('{name}')"
    for program in (f"import {name}", f"import sys\nsys.modules.pop('{name}', None)\nimport {name}", again):
        assert box.run(program, "").reason.startswith(("error: ImportError", "error: ModuleNotFoundError"))
    assert box.run("import ctypes, subprocess, unittest.mock", "").passed
