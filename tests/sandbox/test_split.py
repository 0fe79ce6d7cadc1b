"""What the text of a check tells before it runs."""

from gristmill.sandbox.split import mentioned, splits


def test_which_checks_split() -> None:
    assert splits("assert f(1) == 2") and splits("def f(: syntax")
    assert not splits("import inspect\n") and not splits("from unittest import mock") and not splits("class A(B): pass")


def test_which_checks_leave_no_trace() -> None:
    names, leaves_none = mentioned(compile("def g(x): return x.y\nassert f(g) == 1", "check", "exec"))
    assert names == {"f", "g", "y"} and leaves_none
    for check in ("import sys", "f.x = 1", "def g():\n    del f.x", "assert open('a')"):
        assert not mentioned(compile(check, "check", "exec"))[1], check
