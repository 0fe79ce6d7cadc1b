"""The estimate of a run: its stages are those of the run, its counts are the run's, and it makes nothing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gristmill.cli.main import app
from gristmill.core.config import dump
from gristmill.core.progress import Progress
from gristmill.report.summary import duration
from gristmill.runs.reader import read_run
from gristmill.workflows.alignment import estimate
from gristmill.workflows.alignment.recipe import AlignmentRecipe

Make = Callable[..., AlignmentRecipe]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "PROBE_SECONDS", 0.05)


def test_the_estimate_has_the_stages_of_the_run_and_their_sizes(finished: Path, make_recipe: Make) -> None:
    found = estimate.dry_run(make_recipe(), Progress(quiet=True))
    stages = {row["stage"]: row for row in found["stages"]}
    done = {s["name"]: s for s in read_run(finished).stages}
    assert stages.keys() == done.keys() - {"data"}
    for name in ("reward", "demonstrations"):  # their rows are known
        assert stages[name]["tokens_trained"] == pytest.approx(done[name]["tokens"], rel=0.3), name
    assert stages["base"]["calls"] == 2 * 10 and stages["r1-answers"]["calls"] >= 4 * done["r1-answers"]["funnel"]["facts"]["prompts"]
    assert found["total"]["calls"] == sum(row["calls"] for row in found["stages"])
    assert found["total"]["hours"] > 0 and found["peak_memory_mib"] > 500
    model = (finished / "02-demonstrations" / "model" / "model.safetensors").stat().st_size / 2**20
    assert stages["demonstrations"]["disk_mib"] == pytest.approx(2 * model, rel=0.5)


def test_more_rounds_take_longer_and_people_alone_write_nothing(make_recipe: Make) -> None:
    one, two = (estimate.dry_run(make_recipe(rounds=n), Progress(quiet=True)) for n in (1, 2))
    assert two["total"]["tokens_trained"] > one["total"]["tokens_trained"] and two["total"]["calls"] > one["total"]["calls"]
    human = {row["stage"] for row in estimate.dry_run(make_recipe(control="human-only"), Progress(quiet=True))["stages"]}
    assert "r1-general-sft" in human and not human & {"r1-prompts", "r1-answers"}


def test_calls_of_an_endpoint_are_counted_apart(make_recipe: Make) -> None:
    endpoint = {"base_url": "http://127.0.0.1:9/v1", "model": "teacher"}
    found = estimate.dry_run(make_recipe(generators=[endpoint]), Progress(quiet=True))
    rows = {row["stage"]: row for row in found["stages"]}
    assert rows["r1-answers"]["endpoint_calls"] > 0 == rows["r1-answers"]["calls"] and rows["r1-dpo-pairs"]["calls"] > 0
    assert any("an endpoint's" in line for line in estimate.estimate_lines(found, duration))


def test_the_command_makes_nothing(make_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(dump(make_recipe()))
    shown = CliRunner().invoke(app, ["run", "tiny.yaml", "--dry-run", "--quiet"])
    assert shown.exit_code == 0, shown.output
    assert "in all" in shown.stdout and "of disk" in shown.stdout and [p.name for p in tmp_path.iterdir()] == ["tiny.yaml"]
    values: dict[str, Any] = json.loads(CliRunner().invoke(app, ["run", "tiny.yaml", "--dry-run", "--json", "--quiet"]).stdout)
    assert values.keys() == {"stages", "total", "probe", "parameters", "device", "peak_memory_mib", "usable_memory_mib", "fits"}
    assert values["fits"] and "does not fit" not in shown.stdout
    lines = estimate.estimate_lines(values | {"fits": False, "usable_memory_mib": 12_345}, str)
    assert "It does not fit: 12,345 MiB of memory are usable." in lines[-1]
