"""Tests of programs are run as their form wants, or refused where they could not fail."""

import pytest

from gristmill.core.errors import InputError
from gristmill.verify.code_tests import check_text, complete, wrong_programs
from gristmill.verify.verify import verify

UNITTEST = "import unittest\nclass T(unittest.TestCase):\n    def test(self): self.assertEqual(f(1), 2)\n"
CHECK = "def check(candidate):\n    assert candidate(1) == 2\n"


@pytest.mark.parametrize(
    "tests",
    [
        "",
        "x = 1",
        "f(1)",
        "print(f(1) == 2)",
        "assert True",
        "assert 1 == 1",
        "assert (f(1) == 2, 'message')",
        "assert f(1) == 2 or True",
        "assert 'f(1) == 2'",
        "assert lambda: f(1) == 2",
        CHECK,
        "def helper():\n    assert f(1) == 2\n",
        "def test_f():\n    f(1)\n",
        "class TestF:\n    def check(self):\n        assert f(1) == 2\n",
        "import unittest\nclass T(unittest.TestCase):\n    def test(self): self.assertTrue(True)\n",
        "async def test_f():\n    assert await f(1) == 2\n",
        "def test_f(capsys):\n    assert f(1) == 2\n",
        "import numpy as np\nassert np.all(f(1) == 2)",
        ">>> f(1)\n2",
        UNITTEST.replace("    def", "    @unittest.skip('later')\n    def"),
        UNITTEST.replace("    def", "    @unittest.expectedFailure\n    def"),
        "import pytest\n@pytest.mark.skip\ndef test_f():\n    assert f(1) == 2",
        "import pytest\n@pytest.mark.xfail(reason='?')\ndef test_f():\n    assert f(1) == 2",
        "import pytest\n@pytest.mark.skipif(True, reason='?')\nclass TestF:\n    def test_f(self):\n        assert f(1) == 2",
        "import sys\nsys.exit(0)\nassert f(1) == 2",
        ["assert f(1) == 2", 3],
        {"a": 1},
    ],
)
def test_tests_that_check_nothing_are_refused(tests: object) -> None:
    with pytest.raises(InputError):
        verify({"kind": "code", "tests": tests}, "def f(x): return 7", lambda program, check: True)


@pytest.mark.parametrize(
    ("truth", "ending"),
    [
        ({"tests": "assert f(1) == 2"}, "assert f(1) == 2"),
        ({"tests": CHECK, "entry_point": "f"}, "check(f)"),
        ({"tests": CHECK + "check(f)\n"}, "check(f)\n"),
        ({"tests": CHECK + "if __name__ == '__main__':\n    check(f)\n"}, "check(f)"),
        ({"tests": "def test_f():\n    assert f(1) == 2"}, "__run_tests__()"),
        ({"tests": "def test_f():\n    assert f(1) == 2\ntest_f()"}, "test_f()"),
        ({"tests": "class TestF:\n    def test_f(self):\n        assert f(1) == 2"}, "__run_tests__()"),
        ({"tests": UNITTEST + "unittest.main()"}, "__run_tests__()"),
        ({"tests": ["assert f(1) == 2", "assert f(2) == y"], "setup": "y = 3"}, "assert f(2) == y"),
    ],
)  # fmt: skip
def test_tests_are_called(truth: dict[str, object], ending: str) -> None:
    text = check_text({"kind": "code", **truth})
    assert text.endswith(ending) and "unittest.main" not in text


def test_cases() -> None:
    script = check_text({"cases": [{"input": "1 2\n", "output": "3\n"}]})
    seen: list[str] = []
    exec(script, {"__run_script__": lambda stdin: seen.append(stdin) or "3  \n\n"})
    assert seen == ["1 2\n"]
    functional = check_text({"cases": [{"input": [[1, 2]], "output": [3]}], "entry_point": "add"})
    exec(functional, {"add": lambda numbers: (sum(numbers),)})
    with pytest.raises(AssertionError):
        exec(functional, {"add": lambda numbers: None})
    for cases in ([], [{"input": "1", "output": " "}], [{"input": "1"}], [{"input": [1], "output": 2}]):
        with pytest.raises(InputError):
            check_text({"cases": cases})


def test_prefix_is_continued_or_repeated() -> None:
    truth = {"prefix": "import math\ndef f(x):\n    '''Doc.'''\n"}
    for program in ("    return math.floor(x)\n", "def f(x):\n    return math.floor(x)\n"):
        names: dict[str, object] = {}
        exec(complete(truth, program), names)
        assert names["f"](1.5) == 1  # type: ignore[operator]


def test_wrong_programs_define_what_the_tests_use() -> None:
    programs = wrong_programs({"kind": "code", "tests": "from solution import f\ns = Stack()\nassert f(len(s.items)) == 2"})
    names: dict[str, object] = {}
    exec(programs["a program whose functions return None"], names)
    assert names["f"](1) is None and names["Stack"]().pop() is None  # type: ignore[operator]
    assert "len" not in names
