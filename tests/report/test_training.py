"""Loss curves: one for every stage that trained, also from a log that is torn."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gristmill.report.figures import loss_plot
from gristmill.report.training import MAX_POINTS, read_metrics, training_section
from gristmill.runs.reader import read_run

TRAINED = ["01-reward", "02-demonstrations", "07-r1-code-sft", "08-r1-general-sft", "10-r1-dpo", "12-r1-rpo1"]


def test_every_stage_that_trains_has_a_curve_with_its_speed_and_memory(finished: Path) -> None:
    data = read_run(finished)
    page = "".join(map(str, training_section(data)))
    for name in TRAINED:
        done = next(s for s in data.stages if s["folder"] == name)
        steps = read_metrics(data, name)
        assert [s["step"] for s in steps] == list(range(1, done["steps"] + 1))
        assert f">{name}<" in page and f"{done['tokens_per_second']:,} tokens/s, {done['peak_mib']:,} MiB" in page
    assert page.count("<polyline") == len(TRAINED)


def test_a_torn_or_foreign_log_gives_what_it_holds(make_run: Callable[..., Path]) -> None:
    folder = make_run()
    train = folder / "10-r1-dpo" / "train"
    train.mkdir()
    lines: list[Any] = [{"step": 1, "loss": 2.0}, [], {"step": 2, "loss": float("nan")}, {"step": 3, "loss": 1.0, "x": "<b>"}]
    (train / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 4, "lo')
    data = read_run(folder)
    assert [s["step"] for s in read_metrics(data, "10-r1-dpo")] == [1, 3]
    assert "<b>" not in str(training_section(data)[0])
    (train / "metrics.jsonl").unlink()
    assert training_section(data) == []


def test_a_long_log_is_thinned_and_keeps_both_ends(make_run: Callable[..., Path]) -> None:
    folder = make_run()
    (folder / "10-r1-dpo" / "train").mkdir()
    text = "".join(json.dumps({"step": i, "loss": 1 / i}) + "\n" for i in range(1, 5001))
    (folder / "10-r1-dpo" / "train" / "metrics.jsonl").write_text(text)
    page = str(training_section(read_run(folder))[0])
    points = page.split('points="')[1].split('"')[0].split()
    assert len(points) <= MAX_POINTS + 1 and ">5,000<" in page and "5,000 steps" in page


def test_a_single_step_is_a_dot() -> None:
    assert "<circle" in str(loss_plot([(1, 0.5)])) and "<circle" not in str(loss_plot([(1, 0.5), (2, 0.4)]))
