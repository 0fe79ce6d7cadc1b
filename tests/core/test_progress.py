"""The display: quiet when asked, one line a finished stage, and never still for ten seconds."""

import io
import sys

import pytest

from gristmill.core import progress as module
from gristmill.core.echo import guarded_stderr
from gristmill.core.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands until it is moved."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def work(progress: Progress) -> None:
    with progress, progress.stage("03-r1-prompts"):
        assert list(progress.track("abc", 3)) == ["a", "b", "c"]
        progress.finished("03-r1-prompts", {"seconds": 1.5, "rows": 7})


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    work(Progress(quiet=True))
    assert capsys.readouterr() == ("", "")


def test_a_finished_stage_leaves_one_line_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    work(Progress(describe=lambda done: f"{done['rows']} rows"))
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1
    assert "03-r1-prompts" in err and "1.5 s" in err and "7 rows" in err


def test_a_line_every_few_seconds_and_no_more(capsys: pytest.CaptureFixture[str], clock: list[float]) -> None:
    progress = Progress()
    with progress.stage("02-sft"):
        for step in range(1, 31):
            clock[0] += 1.0
            progress.tick(step, 30, "steps")
    lines = capsys.readouterr().err.splitlines()
    assert module.LINE_SECONDS < 10
    assert 30 / 10 <= len(lines) <= 30 / module.LINE_SECONDS
    assert all("02-sft" in line and "/30 steps" in line for line in lines)


def test_without_a_total_it_counts(capsys: pytest.CaptureFixture[str], clock: list[float]) -> None:
    progress = Progress()
    with progress.stage("generate"):
        clock[0] += 60.0
        progress.tick(12, None)
    line = capsys.readouterr().err
    assert " 12 " in line and "/" not in line and "60.0 s" in line and "1:00" in line


def test_a_terminal_gets_a_bar_and_the_finished_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    work(Progress(describe=lambda done: "[bold]7[/bold] rows"))
    text = terminal.getvalue()
    assert "03-r1-prompts" in text and "1.5 s" in text
    assert "[bold]7[/bold] rows" in text, "a stage's line is text, not markup"


def test_a_stage_within_another_gives_the_display_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress() as progress, progress.stage("outer"):
        outer = progress._task
        with progress.stage("inner"):
            progress.tick(1, 2, "rows")
            assert progress._task != outer
        progress.tick(2, 2, "rows")
        assert progress._task == outer and progress._stage == "outer"


def test_no_name_of_a_stage_or_note_moves_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with guarded_stderr(), Progress() as progress, progress.stage("a\x1b]52;c;aGk=\x07 :smile:"):
        progress.tick(1, 2, "b\x1b[2J\n")
        progress.say("c\ngristmill: well :smile:")
    shown = terminal.getvalue()
    assert "\x1b]52" not in shown and "\x1b[2Jb" not in shown and "\ngristmill: well" not in shown and shown.count(":smile:") >= 2
