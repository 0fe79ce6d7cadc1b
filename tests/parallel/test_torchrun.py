"""`torchrun -m gristmill train`: the processes train one model, and one of them writes and talks."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

PAIRS = [{"prompt": f"Say {i}.", "chosen": f"It is {i}.", "rejected": "No, never again."} for i in range(9)]


def gristmill(*arguments: object, processes: int = 1) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    command = [sys.executable, *launcher, "-m", "gristmill", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)


@pytest.fixture
def command(tmp_path: Path, random_base: Path) -> list[object]:
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    options = ["--lr", 1e-3, "--batch-size", 3, "--epochs", 1, "--sft-weight", 0.1, "--precision", "fp32", "--json"]
    return ["train", "dpo", "--model", random_base, "--data", data, *options]


@pytest.mark.parametrize("options", [["--lora-rank", 2], []])
def test_two_processes_train_what_one_trains(command: list[object], tmp_path: Path, options: list[object]) -> None:
    """With parts of matrices: of those under an adapter, and of those that are trained."""
    one = gristmill(*command, "--out", tmp_path / "one", *options)
    two = gristmill(*command, "--out", tmp_path / "two", *options, "--tp", 2, processes=2)
    assert one.returncode == two.returncode == 0, two.stderr
    facts = [json.loads(run.stdout) for run in (one, two)]  # one line: the other process is silent
    assert facts[1]["steps"] == 3 and facts[1]["tokens"] == facts[0]["tokens"]
    logs = [
        [json.loads(line) for line in (tmp_path / name / "train" / "metrics.jsonl").read_text().splitlines()] for name in ("one", "two")
    ]
    assert logs[1][0]["preference_loss"] == pytest.approx(math.log(2), abs=1e-6)  # the references are those of the pairs
    for step, other in zip(*logs, strict=True):
        assert other["loss"] == pytest.approx(step["loss"], rel=1e-5)
    file = "adapter/adapter_model.safetensors" if options else "model/model.safetensors"
    weights = [load_file(tmp_path / name / file) for name in ("one", "two")]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-3, atol=1e-4)


def test_processes_that_are_no_multiple_of_tp_are_refused(command: list[object], tmp_path: Path) -> None:
    run = gristmill(*command, "--out", tmp_path / "out", "--tp", 2)
    assert run.returncode == 2 and "there are 1, and --tp is 2" in run.stderr
    assert not (tmp_path / "out").exists()
