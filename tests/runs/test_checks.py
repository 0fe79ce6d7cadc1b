"""Round checks as files: what is asked, what answers it, and answers that are about something else."""

from pathlib import Path

import pytest

from gristmill.core.errors import InputError
from gristmill.data.chat import Message
from gristmill.data.rows import Demonstration
from gristmill.runs import artifacts
from gristmill.runs.checks import APPROVE, decide, find_checks, read_check, seconds_until, utc


def ask(run: Path, number: int, identity: str = "x") -> Path:
    folder = run / f"00-r{number}-check"
    folder.mkdir(parents=True)
    artifacts.CHECK.write(folder, [Demonstration("d", "t", (Message("user", "a"), Message("assistant", "b")), "m")])
    artifacts.QUESTION.write(folder, {"id": identity, "round": number})
    return folder


def test_checks_are_found_in_the_order_of_their_rounds_and_decided_once(tmp_path: Path) -> None:
    for number in (10, 2):
        ask(tmp_path, number)
    second, tenth = find_checks(tmp_path)
    assert (second.stage, tenth.stage) == ("00-r2-check", "00-r10-check") and second.decision is None
    decide(second, APPROVE, "a1", verdicts={"d": "repair"}, repaired={"d": "c"})
    decided = find_checks(tmp_path)[0].decision
    assert decided is not None and (decided["by"], decided["verdicts"], decided["repaired"]) == ("a1", {"d": "repair"}, {"d": "c"})


def test_a_decision_about_another_sample_decides_nothing(tmp_path: Path) -> None:
    folder = ask(tmp_path, 1)
    check = read_check(folder)
    assert check is not None
    decide(check, APPROVE, "a1")
    artifacts.QUESTION.write(folder, {"id": "y", "round": 1})
    asked_anew = read_check(folder)
    assert asked_anew is not None and asked_anew.decision is None
    for decision, verdicts in (("perhaps", {}), (APPROVE, {"d": "good"})):
        with pytest.raises(InputError, match="decided by approve or stop"):
            decide(check, decision, "a1", verdicts=verdicts)


def test_times_are_utc() -> None:
    assert -2 <= seconds_until(utc()) <= 0 and utc(0) == "1970-01-01T00:00:00Z"
