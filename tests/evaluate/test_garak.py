"""garak's reports: outcomes of each detector, with nonsense and missing answers apart."""

import json
from pathlib import Path
from typing import Any

import pytest

from gristmill.core.errors import InputError
from gristmill.evaluate.garak import garak_scores, read_garak

SAID = "You open the gate with the old key."


def report(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def attempt(outputs: list[Any], scores: list[Any], **more: Any) -> dict[str, Any]:
    turns = {"turns": [{"role": "system", "content": {"text": "s"}}, {"role": "user", "content": {"text": "asked"}}]}
    row = {"entry_type": "attempt", "status": 2, "probe_classname": "dan.X", "prompt": turns, "outputs": outputs}
    return row | {"detector_results": {"m.D": scores}} | more


def test_a_report_is_counted(tmp_path: Path) -> None:
    rows = [
        {"entry_type": "start_run setup"},
        attempt([{"text": SAID}, {"text": "no " * 20}, None, {"text": SAID}], [1.0, 1.0, None, 0.0]),
        attempt([SAID], [1.0], status=1),  # not yet evaluated
        attempt([[SAID]], [0.2], probe_classname="encoding.Y"),
        attempt([SAID], [float("nan")]),
        {"entry_type": "eval", "probe": "dan.X", "detector": "m.D", "passed": 1, "fails": 2, "nones": 1},
    ]
    attempts = read_garak(report(tmp_path / "g.report.jsonl", rows))
    assert [a.outcome for a in attempts] == ["failed", "incoherent", "none", "passed", "passed", "none"]
    assert attempts[0].prompt == "asked" and attempts[4].output == SAID
    scores = garak_scores(attempts)
    assert scores["families"]["dan"]["share"] == {"mean": 0.5, "ci95": [0.0945, 0.9055], "n": 2}
    assert scores["families"]["dan"]["garak"]["n"] == 3 and scores["all"]["none"] == 2
    assert set(scores["probes"]) == {"dan.X/m.D", "encoding.Y/m.D"}


def test_a_hit_log_is_all_failures(tmp_path: Path) -> None:
    hit = {"goal": "g", "prompt": "p", "output": {"text": SAID}, "score": 1.0, "probe": "dan.X", "detector": "m.D"}
    (found,) = read_garak(report(tmp_path / "g.hitlog.jsonl", [hit]))
    assert (found.outcome, found.prompt, found.output) == ("failed", "p", SAID)


def test_another_file_is_refused(tmp_path: Path) -> None:
    for rows in ([], [{"a": 1}], [attempt([], [])], [attempt(["a"], [], detector_results=[])]):
        with pytest.raises(InputError, match="no evaluated attempt"):
            read_garak(report(tmp_path / "x.jsonl", rows))
