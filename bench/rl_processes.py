"""Reinforcement learning on one and on two processes, in turns: tokens generated a CPU second of all processes, and a second.

    PYTHONPATH=src OMP_NUM_THREADS=1 python bench/rl_processes.py runs/miniature/02-demonstrations/model --steps 15 --turns 3

The recipe is `miniature-rl` with one thread a process. CPU seconds are those of each process (user and system, all threads), from where its
trainer is made to the end of the last update: sampling, rewards, the journal, updates, and what processes exchange. Start-up, evaluation
and the sandbox's own processes are left out. One line of JSON a run.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from gristmill.core.config import find_recipe, load
from gristmill.core.progress import Progress
from gristmill.data.rows import read_records
from gristmill.parallel.mesh import ParallelDims, process_mesh
from gristmill.workflows.rl.loop import run
from gristmill.workflows.rl.ranks import RlRanks
from gristmill.workflows.rl.recipe import RlRecipe


def one_of(model: str, steps: int, folder: Path) -> None:
    """Run the recipe as one of torchrun's processes; its times go to a file beside the run."""
    times: list[tuple[float, float]] = []

    def timed(name: str) -> None:
        real = getattr(RlRanks, name)

        def call(*arguments: Any) -> Any:
            found = real(*arguments)
            times.append((time.process_time(), time.monotonic()))
            return found

        setattr(RlRanks, name, call)

    timed("_begin")
    timed("_update")
    recipe = load(find_recipe("miniature-rl", "rl"), RlRecipe, {"model": model, "steps": steps, "threads": 1})
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"num_evaluation": 1})})
    with process_mesh(torch.device("cpu"), ParallelDims(replicate=True)) as mesh:
        run(recipe, folder / "run", Progress(quiet=True), mesh=mesh)
    cpu, wall = (last - first for first, last in zip(times[0], times[-1], strict=True))
    (folder / f"times-{os.environ.get('RANK', '0')}.json").write_text(json.dumps([cpu, wall]))


def measured(model: str, steps: int, size: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)] if size > 1 else []
        command = [sys.executable, *launcher, sys.argv[0], model, "--steps", str(steps), "--inside", name]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        times = [json.loads((Path(name) / f"times-{rank}.json").read_text()) for rank in range(size)]
        lines = read_records(Path(name) / "run/01-rl/train/metrics.jsonl")
    tokens, cpu, wall = sum(line["generated_tokens"] for line in lines), sum(cpu for cpu, _ in times), times[0][1]
    return {
        "processes": size,
        "tokens_a_cpu_second": round(tokens / cpu),
        "tokens_a_second": round(tokens / wall),
        "cpu_seconds": [round(cpu, 1) for cpu, _ in times],
        "tokens": round(tokens),
        "reward": round(lines[-1]["reward_total"], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of an Instruct model of the miniature")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        one_of(options.model, options.steps, options.inside)
        return
    for _ in range(options.turns):
        for size in (1, 2):
            print(json.dumps(measured(options.model, options.steps, size)), flush=True)


if __name__ == "__main__":
    main()
