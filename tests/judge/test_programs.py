"""Tests of prompts are run against wrong programs and their references before an answer is asked for."""

import platform
import shutil
import sys
from collections.abc import Iterator

import pytest

from gristmill.core.errors import InputError
from gristmill.data.chat import Message
from gristmill.data.rows import Prompt
from gristmill.judge import programs
from gristmill.judge.programs import Verifier, check_tests
from gristmill.sandbox import jail, seccomp
from gristmill.sandbox.sandbox import Sandbox

JAIL = sys.platform == "linux" and platform.machine() in seccomp.ARCHITECTURES and bool(jail.landlock_abi() or shutil.which("bwrap"))
pytestmark = pytest.mark.skipif(not JAIL, reason="no jail here")


@pytest.fixture(scope="module")
def box() -> Iterator[Sandbox]:
    with Sandbox() as made:
        yield made


def prompts(*truths: dict[str, object]) -> list[Prompt]:
    return [Prompt(str(i), "code", (Message("user", f"Task {i}"),), "human", truth={"kind": "code", **t}) for i, t in enumerate(truths)]


def test_good_tests_are_counted(box: Sandbox, capsys: pytest.CaptureFixture[str]) -> None:
    good = {"tests": "assert f(1) == 2", "reference": "def f(x): return x + 1"}
    check_tests(prompts(good, good, {"tests": "assert g() == 2"}), box)
    line = capsys.readouterr().err
    assert line.startswith("tests of 2 prompts: no wrong program passes, 1 references do, ") and "weak" not in line
    check_tests(prompts({"tests": "import inspect\nassert f(1) == 2", "reference": "def f(x): return x + 1"}), box)
    assert capsys.readouterr().err.rstrip().endswith("1 verdicts are weak")


def test_a_slow_reference_is_told(box: Sandbox, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "REFERENCE_SECONDS", 0.2)
    check_tests(prompts({"tests": "assert f(1) == 2", "reference": "while True: pass"}), box)
    assert "0 references do" in (line := capsys.readouterr().err) and line.rstrip().endswith("1 references did not end in 0.2 s")


@pytest.mark.parametrize(
    ("truth", "words"),
    [
        ({"tests": "assert f(1) == 2", "reference": "def f(x): return x"}, "fail their own reference solution .failed"),
        ({"tests": "try:\n    assert f(1) == 2\nexcept Exception:\n    pass"}, "pass an empty program"),
        ({"tests": "assert f(1) is None or f(1) == 2"}, "pass a program whose functions return None"),
        ({"tests": "assert callable(f)"}, "pass a program whose functions return None"),
        ({"cases": [{"input": [1], "output": None}, {"input": [1], "output": None}], "entry_point": "f"}, "expect nothing"),
    ],
)
def test_tests_that_wrong_programs_pass_are_refused(box: Sandbox, truth: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        check_tests(prompts({"tests": "assert f(1) == 2"}, truth), box, quiet=True)


def test_the_verifier_knows_weak_verdicts(box: Sandbox) -> None:
    verifier = Verifier(box)
    plain = {"kind": "code", "tests": "assert f(1) == 2"}
    inside = {"kind": "code", "tests": "import inspect\nassert f(1) == 2"}
    answer = "def f(x): return x + 1"
    assert verifier.verify([(plain, answer), (inside, answer)]) == [True, True]
    assert not verifier.is_weak(plain, answer) and verifier.is_weak(inside, answer)
    assert not verifier.is_weak({"kind": "number", "value": 1}, "1")
    assert verifier.num_weak([(plain, answer), (inside, answer), (inside, answer)], [True, True, False]) == 1
