"""`gristmill plan`: what it prints, what it refuses, and that it needs no torch."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gristmill.cli.main import app
from gristmill.model.config import PRESETS
from gristmill.model.hf_config import to_hf
from gristmill.parallel.hardware import HARDWARE, read_hardware, write_hardware
from tests.cli.test_cli import complaint, python

REPORT = ["plan", "nemotron4-340b", "--gpus", "6144", "--tp", "8", "--pp", "12", "--vp", "8", "--batch-size", "2304"]


def printed(*args: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(args))
    assert result.exit_code == code, (result.output, result.exception)
    return result.stdout


def test_a_plan_as_json() -> None:
    facts = json.loads(printed(*REPORT, "--json"))
    assert facts["step_seconds"] == pytest.approx(8.0, rel=0.06) and facts["mfu"] == pytest.approx(0.409, rel=0.06)
    parts = facts["memory_gib"]
    assert parts["total"] == pytest.approx(sum(v for name, v in parts.items() if name != "total"))
    assert set(facts["memory_gib_by_rank"]) == {"first", "middle", "last"} and facts["fits"] is True
    assert sum(facts["seconds"].values()) == pytest.approx(facts["step_seconds"])


def test_a_plan_as_lines_with_the_days_of_a_training() -> None:
    text = printed(*REPORT, "--tokens", "8e12")
    assert "341B parameters on 6,144 H100, TP 8, PP 12, VP 8, DP 64" in text and "training 8T tokens take 78" in text


def test_a_search_prints_the_fastest_first() -> None:
    args = ["plan", "nemotron4-340b", "--gpus", "6144", "--batch-size", "2304", "--search", "--top", "3"]
    lines = printed(*args).splitlines()
    assert lines[2].split()[:3] == ["8", "8", "12"] and "nearer to each other than the planner's error" in lines[5]
    facts = json.loads(printed(*args, "--json"))
    assert len(facts["search"]["plans"]) == 3 and facts["step_seconds"] == facts["search"]["plans"][0]["step_seconds"]
    assert '"pp": 12' in printed(*args, "--pp", "12", "--json")


def test_the_published_rows() -> None:
    rows = json.loads(printed("plan", "--published", "--json"))
    assert len(rows) == 18 and printed("plan", "--published").count("%") >= 18


def test_a_layout_that_does_not_fit_ends_with_an_alarm() -> None:
    result = CliRunner().invoke(app, ["plan", "llama3-70b", "--json"])
    assert result.exit_code == 4 and json.loads(result.stdout)["fits"] is False
    assert "alarm: llama3-70b does not fit" in result.stderr


def test_models_are_names_folders_and_recipes(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(to_hf(PRESETS["minitron-4b"])))
    (tmp_path / "mine.yaml").write_text("kind: alignment\nmodel: model\n")
    asked = ("minitron-4b", str(folder), str(folder / "config.json"), str(tmp_path / "mine.yaml"))
    found = [json.loads(printed("plan", name, "--tp", "8", "--json"))["parameters"] for name in asked]
    assert len(set(found)) == 1
    assert json.loads(printed("plan", "miniature-base", "--json"))["parameters"] < 2e6


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["plan"], "Name a model"),
        (["plan", "gpt5"], "Choose a model"),
        (["plan", "real"], "names no model folder"),
        (["plan", "some/where"], "does not exist"),
        ([*REPORT, "--gpu", "v100"], "Choose --gpu"),
        ([*REPORT, "--dp", "3"], "Leave --dp or --gpus out"),
        ([*REPORT[:-1], "640"], "at least as many micro-batches"),
        ([*REPORT, "--tokens", "nan"], "--tokens a number"),
        ([*REPORT, "--precision", "int3"], "--precision"),
        (["plan", "llama3-8b", "--search"], "--gpus and the --batch-size"),
        (["plan", "llama3-8b", "--search", "--gpus", "-3", "--batch-size", "8"], "--gpus a whole number"),
        (["plan", "llama3-8b", "--batch-size", "99999999999"], "--batch-size a whole number"),
    ],
)
def test_bad_input_is_one_sentence(args: list[str], words: str) -> None:
    assert words in complaint(*args)


def test_an_adapter_in_a_plan() -> None:
    layout = ["plan", "llama3-70b", "--gpus", "8", "--tp", "8", "--batch-size", "8"]
    assert json.loads(printed(*layout, "--json", code=4))["fits"] is False
    facts = json.loads(printed(*layout, "--lora-rank", "16", "--lora-base", "int8", "--dora", "--lora-targets", "q_proj,v_proj", "--json"))
    assert facts["fits"] and facts["trained_parameters"] == 80 * (16 * (2 * 8192 + 8192 + 1024) + 8192 + 1024)
    assert facts["layout"]["lora"]["base"] == "int8" and "more that are trained" in printed(*layout, "--lora-rank", "16")
    assert "Give --lora-rank" in complaint(*layout, "--dora")


def test_the_page_needs_nothing_and_names_every_part(tmp_path: Path) -> None:
    page = tmp_path / "plan.html"
    printed(*REPORT, "--out", str(page))
    text = page.read_text()
    assert text.count("<svg") >= 3 and "Pipeline timeline" in text and "pipeline bubble" in text
    assert not any(word in text for word in ("<script", "http://", "https://"))
    printed(*REPORT, "--vp", "2", "--pp-schedule", "zbv", "--out", str(page))
    assert "gradients of matrices" in page.read_text() and "zbv" in page.read_text()
    printed("plan", "miniature", "--out", str(page))
    assert "Pipeline timeline" not in page.read_text()


def test_a_hardware_row_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    write_hardware(path, HARDWARE["h200"])
    assert read_hardware(path) == HARDWARE["h200"]
    assert json.loads(printed(*REPORT, "--gpu", str(path), "--json"))["hardware"] == "H200"
    row = json.loads(path.read_text())
    for key, value, words in (
        ("memory_bytes", -1, "a number above zero"),
        ("memory_bandwidth", "3e12", "a number above zero"),
        ("flops", {"int8": 1.0}, "Give flops"),
        ("devices_per_node", 1.5, "a whole number"),
        ("colour", "green", "Take 'colour' out"),
        ("name", 3, "Correct name"),
    ):
        path.write_text(json.dumps(row | {key: value}))
        assert words in complaint(*REPORT, "--gpu", str(path))
    path.write_text(json.dumps({k: v for k, v in row.items() if k != "flops"}))
    assert "the key 'flops'" in complaint(*REPORT, "--gpu", str(path))


def test_an_uncalibrated_machine_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert "gristmill plan --calibrate --gpu cpu" in complaint("plan", "miniature", "--gpu", "cpu")


def test_planning_needs_no_torch() -> None:
    code = f"""
import sys
from typer.testing import CliRunner
from gristmill.cli.main import app
assert CliRunner().invoke(app, {[*REPORT, "--json"]!r}).exit_code == 0
assert CliRunner().invoke(app, {["plan", "--published"]!r}).exit_code == 0
assert CliRunner().invoke(app, {["plan", "llama3-8b", "--gpus", "8", "--batch-size", "8", "--search", "--out", "x.html"]!r}).exit_code == 0
print("torch" in sys.modules)
"""
    assert python(f"import os, tempfile; os.chdir(tempfile.mkdtemp())\n{code}").strip() == "False"
