"""A run while it goes on: stages, curves that are read from where they were, and files that are half written."""

import json
from pathlib import Path

import pytest

from gristmill.studio.live import curves, overview
from gristmill.studio.store import Refused


def test_a_finished_run_is_told_by_its_stages(finished: Path) -> None:
    found = overview(finished)
    assert found["finished"] and found["running"] == "" and all(stage["done"] for stage in found["stages"])
    lines = {stage["folder"]: stage["line"] for stage in found["stages"]}
    assert "greedy" in lines["02-demonstrations"] and [m["stage"] for m in found["monitors"]] == ["monitors", "r1-monitors"]
    assert found["monitors"][0]["values"]["distinct_4"] > 0


def test_a_stage_under_way_is_the_one_that_is_written(copy: Path) -> None:
    (copy / "results.json").unlink()
    stage = next(copy.glob("*-r1-dpo"))
    (stage / "done.json").unlink()
    (stage / "inputs.json").touch()
    found = overview(copy)
    assert found["running"] == stage.name and not found["finished"]


def test_curves_go_on_where_the_page_was_and_wait_for_whole_lines(copy: Path) -> None:
    path = copy / "01-reward" / "train" / "metrics.jsonl"
    first = curves(copy, "01-reward", after=0)
    assert [step["step"] for step in first["steps"]] == [1, 2, 3] and first["names"][0] == "loss" and not first["more"]
    with path.open("a") as file:
        file.write(json.dumps({"step": 4, "loss": 1.0, "bad": float("nan")}) + '\n{"step": 5, "lo')
    second = curves(copy, "01-reward", after=first["next"])
    assert second["steps"] == [{"step": 4, "loss": 1.0}] and second["begin"] == first["next"]
    path.write_text('{"step": 1, "loss": 9}\n')  # begun anew
    again = curves(copy, "01-reward", after=second["next"])
    assert again["begin"] == 0 and again["steps"] == [{"step": 1, "loss": 9.0}]


@pytest.mark.parametrize("stage", ["../../etc", "00-data", "nothing", "01-reward/.."])
def test_what_has_no_curves_is_refused(finished: Path, stage: str) -> None:
    with pytest.raises(Refused, match="no curves"):
        curves(finished, stage, after=0)
