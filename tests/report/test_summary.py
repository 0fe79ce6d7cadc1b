"""One line a stage, and the three that matter."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gristmill.report.summary import doubts, duration, headline, stage_line
from gristmill.runs.reader import read_run

MakeRun = Callable[..., Path]


def test_every_finished_stage_says_what_it_did(make_run: MakeRun) -> None:
    data = read_run(make_run())
    done = {s["name"]: s for s in data.stages}
    lines = {name: stage_line(s) for name, s in done.items()}
    assert all(line and "\n" not in line for line in lines.values())
    assert "greedy" in lines["demonstrations"] and "facts" in lines["demonstrations"] and "tokens/s" in lines["demonstrations"]
    funnel = done["r1-prompts"]["funnel"]
    assert lines["r1-prompts"].startswith(f"kept {funnel['kept']} of {funnel['written']} written and 6 from file; ")
    assert f"{funnel['not understood']} not understood" in lines["r1-prompts"]
    assert re.fullmatch(rf"kept {done['r1-answers']['kept']} of \d+ answers \(\d+ good\)", lines["r1-answers"])
    assert lines["r1-dpo-pairs"].startswith(f"{done['r1-dpo-pairs']['pairs']} pairs")
    assert lines["r1-monitors"] == "no alarm" and stage_line({**done["r1-monitors"], "alarms": ["human_nll"]}) == "alarms: human_nll"
    assert stage_line({**done["demonstrations"], "weak": 2}).endswith("; 2 verdicts are weak")
    assert lines["reward-check"].startswith("pair accuracy easy ")
    assert lines["data"] == "64 demonstrations, 68 ratings, 10 evaluation prompts"


def test_a_stage_of_another_kind_is_told_by_its_counts() -> None:
    done = {"name": "filter", "fingerprint": "f", "seconds": 1.5, "peak_mib": 90, "artifacts": [], "num_documents": 12000, "pairs": 3}
    assert stage_line(done) == "12,000 documents, 3 pairs"


def test_doubts_are_told() -> None:
    found = dict(doubts({"weak": 3, "left_out": {"seed": 12}}))
    assert found["Weak verdicts. "].startswith("3 programs ") and "without: seed (12 calls)." in found["Fields left out. "]
    assert doubts({}) == []


def test_an_unfinished_stage_says_nothing() -> None:
    assert stage_line({"folder": "07-r1-code-sft"}) == ""


def test_the_headline_has_three_lines(make_run: MakeRun) -> None:
    data = read_run(make_run())
    assert data.results is not None
    results = {**data.results, "seconds": 312.4}
    results["collapse"] = [*results["collapse"][:-1], {**results["collapse"][-1], "alarms": ["human_nll"]}]
    models, judge, mix = headline(results, data.folder)
    first, last = results["stages"][0], results["stages"][-1]
    for mode in ("greedy", "sampled"):
        assert f"{first[mode]['overall']['mean']:.3f}" in models and f"{last[mode]['overall']['mean']:.3f}" in models
    assert models.count("paired difference") == 2 and "unpaired" not in models
    easy, other = (part["easy"]["overall"]["mean"] for part in (results["reward"], results["reward"]["llm_judge"]))
    assert f"easy {easy:.3f}" in judge and f"LLM judge {other:.3f}" in judge
    assert f"{results['synthetic_share']:.1%}" in mix and "5 min 12 s" in mix and "round 1 human_nll" in mix


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
    code = "import sys, gristmill.report.summary; print([m for m in ('torch', 'pyarrow', 'matplotlib', 'tokenizers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
