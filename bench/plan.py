"""Steps of real shapes on this machine beside what `gristmill plan --gpu cpu` says of them, after `gristmill plan --calibrate --gpu cpu`.

    OMP_NUM_THREADS=1 PYTHONPATH=src python bench/plan.py [--smol FOLDER] [--hardware FILE]

Prints a line of JSON a shape: seconds of a Trainer's step, of the plan, and the relative error; of two processes, each with its own half
of the batch, the slower one and the all-reduce of their gradients. None of the shapes is one that calibration measures.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

TWO = """
import sys, time, torch, torch.distributed as dist
from bench.plan import shapes, step
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=int(sys.argv[2]), world_size=2)
config, layout = shapes(sys.argv[4])[sys.argv[3]]
seconds = step(config, layout)
gradients = torch.ones(int(sys.argv[5]))
best = float("inf")
for _ in range(5):
    dist.barrier()
    started = time.perf_counter()
    dist.all_reduce(gradients)
    best = min(best, time.perf_counter() - started)
print(seconds + best)
"""


def shapes(smol: str) -> dict:  # type: ignore[type-arg]
    from gristmill.model.config import PRESETS
    from gristmill.model.hf_config import read_config
    from gristmill.parallel.layout import Layout

    found = {}
    for tokens, micro in ((128, 32), (256, 8)):
        layout = Layout(batch_size=2 * micro, micro_batch=micro, seq_len=tokens, precision="fp32", zero=0)
        found[f"miniature {micro}x{tokens}"] = (PRESETS["miniature"], layout)
    if smol:
        config = read_config(Path(smol))[1]
        for tokens in (512, 1024):
            found[f"smol {tokens}"] = (config, Layout(batch_size=2, seq_len=tokens, precision="fp32", zero=0))
    return found


def step(config, layout) -> float:  # type: ignore[no-untyped-def]
    import torch

    from gristmill.workflows.calibrate import step_seconds

    return step_seconds(config, layout, torch.device("cpu"))


def _say(name: str, processes: int, measured: float, planned: float) -> None:
    facts = {"shape": name, "processes": processes, "measured": measured, "plan": planned, "error": planned / measured - 1}
    print(json.dumps(facts), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smol", default="", help="model folder, of whose shape steps are measured too")
    parser.add_argument("--hardware", type=Path, help="hardware row; default the calibrated one")
    options = parser.parse_args()
    from gristmill.model.flops import num_parameters
    from gristmill.parallel.hardware import calibration_path, read_hardware
    from gristmill.parallel.step_time import step_time

    hardware = read_hardware(options.hardware or calibration_path("cpu"))
    for name, (config, layout) in shapes(options.smol).items():
        _say(name, 1, step(config, layout), step_time(config, layout, hardware).total)
        both = replace(layout, dp=2, batch_size=2 * layout.batch_size)
        store = str(Path(tempfile.mkdtemp()) / "store")
        commands = [[sys.executable, "-c", TWO, store, str(rank), name, options.smol, str(num_parameters(config))] for rank in range(2)]
        started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
        measured = max(float(one.communicate()[0]) for one in started)
        shutil.rmtree(Path(store).parent)
        _say(name, 2, measured, step_time(config, both, hardware).total)


if __name__ == "__main__":
    main()
