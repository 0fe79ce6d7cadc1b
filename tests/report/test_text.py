"""One line a stage, and the three that matter."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gristmill.report.text import duration, headline, stage_line
from gristmill.runs.reader import read_run

MakeRun = Callable[..., Path]


def test_every_finished_stage_says_what_it_did(make_run: MakeRun) -> None:
    lines = {s["name"]: stage_line(s) for s in read_run(make_run()).stages}
    assert all(line and "\n" not in line for line in lines.values())
    assert "greedy" in lines["demonstrations"] and "facts" in lines["demonstrations"] and "tokens/s" in lines["demonstrations"]
    assert lines["r1-prompts"].startswith("kept 24 of 27 written; 2 repeated, 1 held out")
    assert lines["r1-answers"].startswith("kept 11 of 48 answers")
    assert lines["r1-dpo-pairs"] == "12 pairs; no pair: 1 all right"
    assert lines["r1-monitors"] == "no alarm" and lines["r2-monitors"] == "alarms: human_nll"
    assert "easy 0.900 (LLM judge 0.500)" in lines["reward-check"]
    assert lines["data"] == "24 demonstrations, 60 ratings, 120 evaluation prompts"


def test_an_unfinished_stage_says_nothing() -> None:
    assert stage_line({"folder": "07-r1-code-sft"}) == ""


def test_the_headline_has_three_lines(make_run: MakeRun) -> None:
    data = read_run(make_run())
    assert data.results is not None
    models, judge, mill = headline(data.results, data.folder)
    first, last = data.results["stages"][0], data.results["stages"][-1]
    for mode in ("greedy", "sampled"):
        assert f"{first[mode]['overall']['mean']:.3f}" in models and f"{last[mode]['overall']['mean']:.3f}" in models
    assert models.count("paired difference") == 2 and "unpaired" not in models
    assert "easy 0.900" in judge and "hard 0.500" in judge and judge.count("LLM judge 0.500") == 2
    assert "98.3%" in mill and "5 min 12 s" in mill and "round 2 human_nll" in mill


def test_without_the_folder_the_difference_is_unpaired(make_run: MakeRun) -> None:
    results = read_run(make_run()).results
    assert results is not None
    assert headline(results)[0].count("unpaired difference") == 2


def test_a_control_says_so_and_a_run_without_ratings_has_no_judge(make_run: MakeRun) -> None:
    results = read_run(make_run(control="human-only")).results
    assert results is not None
    lines = headline({**results, "reward": {}, "stages": results["stages"][:1]})
    assert len(lines) == 3
    assert "control human-only" in lines[2] and "none in this run" in lines[1] and "only one" in lines[0]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.44, "0.4 s"), (99.9, "99.9 s"), (119.6, "2 min 00 s"), (312.4, "5 min 12 s"), (7260, "2 h 01 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_terminal_lines_need_no_heavy_package() -> None:
    code = "import sys, gristmill.report.text; print([m for m in ('torch', 'pyarrow', 'matplotlib', 'tokenizers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
