"""The GPU check runs at toy size on whatever device there is."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import gristmill

ROOT = Path(__file__).parents[2]


def test_the_gpu_check_at_toy_size() -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(gristmill.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "bench" / "gpu.py"), "--smoke"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    trained = {f"{kind} {precision}" for kind in ("sft", "reward", "dpo") for precision in ("fp32", "bf16")}
    assert report["train"].keys() == trained | {"sft bf16, compiled"}
    assert report["generate"]["fp32"]["same_as_cpu"] == 1 and report["generate"].keys() == {"fp32", "bf16", "bf16, int8 cache"}
    assert report["adapters"]["same_as_cpu"] == 1
    assert report["evaluate"]["greedy"]["n"] == 6 and report["score"]["conversations"] == 4
    assert report["name"] and report["versions"]["torch"]
    parts = report["engine"]
    assert parts["sampling"]["same_tokens"] == 1
    if find_spec("triton") is None:
        assert "not installed" in parts["triton"]
    else:
        assert len(parts["attention"]) == 5 and parts["add and norm"].keys() == {"torch", "fused"}
