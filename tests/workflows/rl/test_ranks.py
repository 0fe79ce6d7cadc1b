"""Reinforcement learning on two processes: one journal, the answers and weights of one process, and what a kill of either leaves."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from gristmill.cli.main import app
from gristmill.core.config import check, dump
from gristmill.data.rows import read_records
from gristmill.workflows.rl.recipe import RlRecipe

WORKER = Path(__file__).parents[2] / "parallel" / "worker.py"
TRUTH = {"kind": "instructions", "checks": [{"id": "length_constraints:number_words", "relation": "less than", "num_words": 8}]}
# Old log-probabilities and those of a reference are computed by shares, too.
WHOLE: dict[str, Any] = {"method": "gspo", "updates": 2, "beta": 0.1}
LORA: dict[str, Any] = {"method": "dapo", "training": {"lr": 3e-2, "precision": "fp32", "lora": {"rank": 4}}}


def make(folder: Path, base: Path, **changes: Any) -> Path:
    rows = [{"prompt": f"Say {word}.", "truth": TRUTH} for word in ("bee", "moss", "rain", "salt", "wind", "tree")]
    for name, part in (("prompts", rows[:4]), ("evaluation", rows[4:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    values = {
        "model": str(base),
        "data": {name: str(folder / f"{name}.jsonl") for name in ("prompts", "evaluation")},
        "threads": 1,
        "steps": 3,
        "prompts": 4,
        "samples": 4,
        "max_tokens": 20,
        "training": {"lr": 3e-3, "precision": "fp32"},
        "engine": {"precision": "fp32"},
        **changes,
    }
    (folder / "rl.yaml").write_text(dump(check(RlRecipe, values)))
    return folder / "rl.yaml"


def start(recipe: Path, *runs: tuple[int, Path, dict[str, Any]]) -> list[dict[str, Any]]:
    """What became of runs of so many processes, one after another; weights are those that FSDP2 would cut otherwise."""
    options = {"recipe": str(recipe), "dims": {"replicate": True}}
    jobs = [(size, "rl", str(out), options | {"fault": fault}) for size, out, fault in runs]
    command = [sys.executable, str(WORKER), json.dumps(jobs)]
    ran = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr
    found: list[dict[str, Any]] = json.loads(ran.stdout)
    return found


def rollouts(out: Path) -> list[dict[str, Any]]:
    return read_records(out / "01-rl/rollouts.jsonl")


def metrics(out: Path) -> list[dict[str, float]]:
    timed = ("generation_seconds", "update_seconds", "tokens_per_second")
    return [{k: v for k, v in line.items() if k not in timed} for line in read_records(out / "01-rl/train/metrics.jsonl")]


@pytest.mark.parametrize(("changes", "file"), [(WHOLE, "model/model.safetensors"), (LORA, "adapter/adapter_model.safetensors")])
def test_two_processes_sample_and_train_what_one_does(
    tiny_base: Path, reward_folder: Path, tmp_path: Path, changes: dict[str, Any], file: str
) -> None:
    if changes is WHOLE:  # which both rate by, too
        changes = WHOLE | {"rewards": {"reward_model": {"folder": str(reward_folder), "weight": 0.1}}}
    recipe, one, two = make(tmp_path, tiny_base, **changes), tmp_path / "one", tmp_path / "two"
    alone, together = start(recipe, (1, one, {}), (2, two, {}))
    assert alone["codes"] == [0] and together["codes"] == [0, 0], "\n".join(together["said"])
    first, second = ({r["id"]: r for r in rollouts(out)} for out in (one, two))
    assert first.keys() == second.keys() and len(first) == (4 + 1) * 3
    for name, record in first.items():
        for answer, other in zip(record.get("out", ()), second[name].get("out", ()), strict=True):
            assert answer["tokens"] == other["tokens"]
            torch.testing.assert_close(answer["logprobs"], other["logprobs"], rtol=0, atol=1e-3)
        for answers, others in zip(record.get("rewards", {}).values(), second[name].get("rewards", {}).values(), strict=True):
            assert [one["right"] for one in answers] == [other["right"] for other in others]
            assert [one["total"] for one in answers] == pytest.approx([other["total"] for other in others], abs=1e-3)
    updated = [line for line in metrics(one) if "loss" in line]
    assert updated
    for line, other in zip(metrics(one), metrics(two), strict=True):
        assert line.keys() == other.keys() and line["generated_tokens"] == other["generated_tokens"]
        assert other.get("grad_norm", 0) == pytest.approx(line.get("grad_norm", 0), rel=1e-3)
    weights = [load_file(out / "01-rl" / file) for out in (one, two)]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-3, atol=1e-4)
    results = [json.loads((out / "results.json").read_text()) for out in (one, two)]
    assert results[0]["stages"][1]["greedy"] == results[1]["stages"][1]["greedy"]


def test_a_kill_of_either_process_changes_no_weight_and_no_metric(tiny_base: Path, tmp_path: Path) -> None:
    """In generation, in an update, while an answer or a checkpoint is written; steps are counted from the start."""
    recipe, calm, killed = make(tmp_path, tiny_base, **WHOLE), tmp_path / "calm", tmp_path / "killed"
    faults = [
        {"rank": 1, "moment": "gristmill.engine.engine:Engine.generate", "step": 2},
        {"rank": 1, "moment": "step", "step": 1},
        {"rank": 0, "moment": "gristmill.runs.journal:Journal.append", "step": 2},
        {"rank": 0, "moment": "step", "step": 2},
        {"rank": 0, "moment": "written", "step": 2},
    ]
    whole, *ends = start(recipe, (2, calm, {}), *((2, killed, fault) for fault in [*faults, {}]))
    assert whole["codes"] == [0, 0], "\n".join(whole["said"])
    for fault, end in zip(faults, ends[:-1], strict=True):
        rank: int = fault["rank"]  # type: ignore[assignment]
        assert end["codes"][rank] == -9 and end["codes"][1 - rank] == 3, (fault, end)
        assert "process" in end["said"][1 - rank]
    assert ends[-1]["codes"] == [0, 0], "\n".join(ends[-1]["said"])
    one, other = (load_file(out / "01-rl/model/model.safetensors") for out in (calm, killed))
    assert all((one[name] == other[name]).all() for name in one)
    assert metrics(calm) == metrics(killed)
    ids = [json.loads(line)["id"] for line in (killed / "01-rl/rollouts.jsonl").read_text().splitlines()]
    assert len(ids) == len(set(ids)) == (4 + 1) * 3, "nothing is sampled or judged twice"


def test_a_process_that_cannot_read_the_trained_model_ends_all(tiny_base: Path, tmp_path: Path) -> None:
    """It would answer as the model did before."""
    recipe, out = make(tmp_path, tiny_base, **LORA | {"steps": 1}), tmp_path / "run"
    (ended,) = start(recipe, (2, out, {"rank": 1, "moment": "elsewhere", "step": 0}))
    assert ended["codes"][0] == 3 and "model" in ended["said"][0] and ended["codes"][1] != 0
    assert not (out / "results.json").exists()


def test_the_first_process_alone_talks(tiny_base: Path, tmp_path: Path) -> None:
    recipe, launcher = make(tmp_path, tiny_base, steps=1), ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launcher, "-m", "gristmill", "rl", str(recipe), "--out", str(tmp_path / "run"), "--json", "--quiet"]
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
    assert ran.returncode in (0, 4), ran.stderr  # 4: with an alarm
    (line,) = ran.stdout.splitlines()
    assert json.loads(line)["steps"] == 1 and (tmp_path / "run/report.html").exists()


def test_bad_input_is_told_by_the_first_process_and_ends_both(tiny_base: Path, tmp_path: Path) -> None:
    recipe = make(tmp_path, tiny_base)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Say nothing."}\n')
    (ended,) = start(recipe, (2, tmp_path / "run", {}))
    assert ended["codes"][0] == 3 and "nothing can judge it" in ended["said"][0] and "judge" not in ended["said"][1]
    assert not (tmp_path / "run").exists()


def test_a_reasoning_run_is_refused_on_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    shown = CliRunner().invoke(app, ["run", "miniature-reasoning"])
    assert shown.exit_code == 2 and "has one process: start it without torchrun" in shown.stderr
