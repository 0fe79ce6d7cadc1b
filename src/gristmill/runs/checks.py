"""Round checks: the files by which a run asks people about a sample of rows, waits, and is answered.

    NN-r1-check/check.parquet   the sample
    NN-r1-check/question.json   what is asked: of how many rows, by which seed, until when, and what happens then
    NN-r1-check/decision.json   the answer: of the studio, of `gristmill check`, or of the time limit

A decision names the sample that it is about: one of an earlier sample decides nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gristmill.core.errors import InputError
from gristmill.core.io import read_json, write_json
from gristmill.runs.artifacts import CHECK, DECISION, QUESTION

APPROVE, STOP = "approve", "stop"
DECISIONS = (APPROVE, STOP)
ACCEPT, REJECT, REPAIR = "accept", "reject", "repair"
VERDICTS = (ACCEPT, REPAIR, REJECT)  # of a row, the worse later
TIMEOUT = "time limit"  # who decided, where nobody did


@dataclass(frozen=True)
class Check:
    """A check of a run.

    Attributes:
        stage: name of its folder.
        question: `id` of the sample, `round`, `rows`, `of`, `seed`, `asked` and `until` (UTC), `default`.
        decision: `decision`, `by`, `at`, `verdicts` and `repaired` by row; None while it waits.
    """

    folder: Path
    question: dict[str, Any]
    decision: dict[str, Any] | None

    @property
    def stage(self) -> str:
        return self.folder.name


def read_check(folder: Path) -> Check | None:
    """The check of a stage's folder; None where nothing is asked there."""
    question = QUESTION.read(folder)
    if not question or not (folder / CHECK.file).is_file():
        return None
    path = folder / DECISION.file
    found = read_json(path) if path.is_file() else {}
    valid = found.get("id") == question.get("id") and found.get("decision") in DECISIONS
    return Check(folder, question, found if valid else None)


def find_checks(run: Path) -> list[Check]:
    """All checks of a run, in the order of its rounds."""
    found = [check for path in run.glob(f"*-check/{QUESTION.file}") if (check := read_check(path.parent))]
    return sorted(found, key=lambda check: int(check.question.get("round", 0)))


def decide(
    check: Check, decision: str, by: str, *, verdicts: Mapping[str, str] | None = None, repaired: Mapping[str, str] | None = None
) -> None:
    """Answer a check: the run goes on without the rows that are rejected, and with repaired ones as they are now, or ends.

    Args:
        verdicts: of rows, by id; rows without one are taken as they are.
        repaired: the last turn of each repaired row.

    Raises:
        InputError: a verdict is none.
    """
    verdicts, repaired = dict(verdicts or {}), dict(repaired or {})
    if decision not in DECISIONS or set(verdicts.values()) - set(VERDICTS):
        raise InputError(f"A check is decided by {' or '.join(DECISIONS)}, a row by {', '.join(VERDICTS)}.")
    told = {"id": check.question["id"], "decision": decision, "by": by, "at": utc(), "verdicts": verdicts, "repaired": repaired}
    write_json(check.folder / DECISION.file, told)


def utc(seconds: float | None = None) -> str:
    """A time in UTC, to the second; by default now."""
    when = datetime.now(UTC) if seconds is None else datetime.fromtimestamp(seconds, UTC)
    return when.strftime("%Y-%m-%dT%H:%M:%SZ")


def seconds_until(time: str) -> float:
    """Seconds from now to a time of `utc`."""
    return (datetime.strptime(time, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC) - datetime.now(UTC)).total_seconds()
