"""Foreign text never controls the terminal."""

import ast
import json
import logging
import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import gristmill
from gristmill.cli.main import app
from gristmill.core.echo import echo, guarded_stderr, sentence, silenced, terminal, visible

PACKAGE = Path(gristmill.__file__).parent
CLIPBOARD = "\x1b]52;c;cm0gLXJmIH4K\x07"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (CLIPBOARD, "\\u001b]52;c;cm0gLXJmIH4K\\u0007"),
        ("a\rb", "a\\u000db"),  # would write over the line
        ("\x9b2J", "\\u009b2J"),  # the one-byte CSI
        ("gold\u202egpj.exe", "gold\\u202egpj.exe"),
        ("\U000e0041", "\\U000e0041"),
        ("\ud800", "\\ud800"),
        ("tab\tand\nlines, \u65e5\u672c, \u0915\u094d\u200d\u0937", "tab\tand\nlines, \u65e5\u672c, \u0915\u094d\u200d\u0937"),
    ],
)
def test_control_characters_are_shown(text: str, shown: str) -> None:
    assert visible(text) == shown


@given(st.text(st.characters(exclude_categories=())))
def test_nothing_that_is_shown_is_a_control_character(text: str) -> None:
    assert not {c for c in visible(text) if ord(c) < 32 or 127 <= ord(c) < 160 or 0xD800 <= ord(c) < 0xE000} - {"\n", "\t"}


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_json_stays_json_of_the_same_value(text: str) -> None:
    assert json.loads(visible(json.dumps({"text": text}))) == {"text": text}


def test_what_the_terminal_cannot_encode_is_escaped() -> None:
    code = "from gristmill.core.echo import echo; echo('\\u65e5 \\ud800 \\x1b')"
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONIOENCODING": "ascii"}, capture_output=True, check=True)
    assert done.stdout == b"\\u65e5 \\ud800 \\u001b\n"


def test_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    echo(CLIPBOARD, err=True, nl=False)
    assert capsys.readouterr() == ("", "\\u001b]52;c;cm0gLXJmIH4K\\u0007")


def test_a_sentence_is_one_line() -> None:
    assert sentence(f"no folder a\ngristmill: all is well{CLIPBOARD}\r") == (
        "no folder a\\ngristmill: all is well\\u001b]52;c;cm0gLXJmIH4K\\u0007\\u000d"
    )


def test_nothing_else_that_writes_to_standard_error_moves_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with guarded_stderr():
        logging.lastResort.handle(logging.makeLogRecord({"msg": CLIPBOARD}))  # type: ignore[union-attr]
        traceback.print_exception(ValueError(CLIPBOARD))
        assert terminal() is not sys.stderr and sys.stderr.isatty() is False
    assert terminal() is sys.stderr
    err = capsys.readouterr().err
    assert err.count("]52;") == 2 and visible(err) == err


@pytest.mark.parametrize(
    "arguments", [["run", "--x\u202e\x1b[2J"], ["status", "a", "b\u202e"], ["\x1b[2Jx"], ["status", "no\ngristmill: well"]]
)
def test_what_the_shell_gives_is_echoed_visibly(arguments: list[str]) -> None:
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 2 and visible(shown.output) == shown.output and "\ngristmill: well" not in shown.output


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_echo_alone_prints(path: Path) -> None:
    if path == PACKAGE / "core" / "echo.py":
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            printed = name in ("print", "typer.echo", "typer.secho", "sys.stdout.write", "sys.stderr.write")
            assert not printed or "sandbox" in path.parts, f"{path}:{node.lineno}: {name} prints foreign text raw; use core.echo.echo"


def test_what_c_keeps_for_a_pipe_is_dropped_too() -> None:
    program = (
        "import ctypes; from gristmill.core.echo import silenced; c = ctypes.CDLL(None)\n"
        "c.printf(b'before ')\nwith silenced(1): c.printf(b'meanwhile ')\nc.printf(b'after')"
    )
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=buffered)
    assert out.stdout == "before after"


def test_what_libraries_print_past_python_is_dropped(capfd: pytest.CaptureFixture[str]) -> None:
    with silenced(1):
        os.write(1, b"from a library\n")
        os.write(2, b"an error\n")
    print("after")
    assert capfd.readouterr() == ("after\n", "an error\n")
