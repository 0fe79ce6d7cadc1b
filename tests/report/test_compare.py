"""Runs side by side."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gristmill.core.errors import InputError
from gristmill.report.compare import compare_runs, comparison_text, write_comparison
from gristmill.report.comparisons import significance

MakeRun = Callable[..., Path]
ReadPage = Callable[[str], Any]


def test_a_run_and_a_worse_control(make_run: MakeRun, set_outcomes: Any) -> None:
    folders = [make_run("real"), make_run("control", control="unfiltered")]
    for folder, right in zip(folders, (9, 1), strict=True):
        set_outcomes(folder, "base", lambda i, task: False)
        set_outcomes(folder, "r1-rpo1", lambda i, task, right=right: i < right)
    table = compare_runs(folders)
    assert json.loads(json.dumps(table)) == table
    real, control = table["runs"]
    assert (real["control"], control["control"]) == (None, "unfiltered")
    assert real["first"]["stage"] == "base" and real["last"]["stage"] == "r1-rpo1"
    assert real["difference"]["greedy"]["mean"] == 0 and significance(real["gain"]["greedy"]) == 1
    assert significance(control["difference"]["greedy"]) == -1
    for mode in ("greedy", "sampled"):
        assert control["difference"][mode]["mean"] == pytest.approx(-0.8)
        assert set(real["last"][mode]) == {"overall", "facts", "sums", "code", "lists", "followups"}
    results = json.loads((folders[0] / "results.json").read_text())
    assert (real["synthetic_share"], real["seconds"], real["alarms"]) == (results["synthetic_share"], results["seconds"], 0)


def test_the_text_is_aligned_and_names_every_run(make_run: MakeRun) -> None:
    text = comparison_text(compare_runs([make_run("real"), make_run("a-much-longer-name", seed=7, control="replace")]))
    head, *rows = text.splitlines()[1:4]
    for column in ("greedy", "synthetic", "alarms"):
        place = head.index(column)
        assert all(row[place - 1] == " " and row[place] != " " for row in rows)
    assert "a-much-longer-name" in rows[1] and "replace" in rows[1] and "7" in rows[1]
    assert text.count("facts") == 1


def test_the_page_is_safe_and_complete(make_run: MakeRun, tmp_path: Path, read_page: ReadPage) -> None:
    out = tmp_path / "new" / "compare.html"
    other = make_run("other").rename(tmp_path / "<b>other")
    assert write_comparison(compare_runs([make_run("real"), other]), out) == out
    page = out.read_text(encoding="utf-8")
    read = read_page(page)
    assert "<b>other" in read.text and "http:" not in page and "https:" not in page
    assert "Last models by task, sampled" in read.text


def test_an_unfinished_run_is_refused(make_run: MakeRun) -> None:
    with pytest.raises(InputError, match="half is not finished"):
        compare_runs([make_run("real"), make_run("half", done=False)])


def test_a_run_of_another_kind_is_refused(make_run: MakeRun) -> None:
    folder = make_run()
    saved = folder / "recipe.yaml"
    saved.write_text(saved.read_text().replace("kind: alignment", "kind: curation"))
    with pytest.raises(InputError, match="of `gristmill curate`: give one of `gristmill run`"):
        compare_runs([folder])


def test_no_runs_are_refused() -> None:
    with pytest.raises(InputError, match="at least one"):
        compare_runs([])
