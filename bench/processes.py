"""Throughput of two processes of one training beside the workers of one process, and one thread, in turns.

    PYTHONPATH=src OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 bench/processes.py --turns 5

The same steps of SFT from equal weights, on the miniature's Base and on the 8M model of train.py: by one thread, by one process with two
workers, and by two processes with a thread each (data parallel). A step has 32 Ki tokens in micro-batches of 8 Ki, of conversations of 20
to 120 tokens (miniature) and 60 to 600. Prints a line of JSON for each model: tokens a second, by the clock on the wall and of the
processor (of both processes together), medians over turns, and each turn's ratios. An idle process waits without computing.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from gristmill.miniature.base import BASE
from gristmill.model.config import ModelConfig, uniform_blocks
from gristmill.model.hf import load_model
from gristmill.model.transformer import Transformer
from gristmill.parallel.mesh import Mesh, process_mesh
from gristmill.train.batches import Sample
from gristmill.train.objectives.next_token import next_token_objective
from gristmill.train.trainer import Trainer, TrainSettings

STEP_TOKENS, MICRO_BATCH = 32_768, 8_192
MODES = ("one thread", "two workers", "two processes")


def eight_million() -> Transformer:
    blocks = uniform_blocks(num_layers=8, num_heads=4, num_kv_heads=2, head_dim=64, ffn_size=1024)
    model = Transformer(ModelConfig("nemotron", 4096, 256, blocks, max_positions=4096, tie_embeddings=False))
    model.init_weights(0)
    return model


MODELS: dict[str, tuple[Callable[[], Transformer], tuple[int, int]]] = {
    "miniature": (lambda: load_model(BASE)[0], (20, 120)),
    "8m": (eight_million, (60, 600)),
}


def make_step(vocab: int, lengths: tuple[int, int], seed: int) -> list[Sample]:
    """Samples of one step."""
    rng, samples, left = np.random.default_rng(seed), [], STEP_TOKENS
    while left > 0:
        size = min(int(rng.integers(*lengths)), left)
        samples.append(Sample(rng.integers(0, vocab, size), np.arange(size) > size // 3))
        left -= size
    return samples


def measure(mesh: Mesh, name: str, *, steps: int, turns: int) -> dict[str, Any]:
    make, lengths = MODELS[name]
    settings = TrainSettings(steps=10**6, batch_size=1, micro_batch_tokens=MICRO_BATCH, lr=1e-4, precision="bf16", schedule="constant")
    vocab = make().config.vocab_size
    work = [make_step(vocab, lengths, seed) for seed in range(steps)]
    trainers = {}
    for mode in MODES:
        torch.set_num_threads(2 if mode == "two workers" else 1)
        trainers[mode] = Trainer(make(), next_token_objective, settings, mesh=mesh if mode == "two processes" else Mesh())
    seconds: dict[str, list[list[float]]] = {mode: [] for mode in MODES}
    for turn in range(turns + 1):  # the first warms up
        for mode, trainer in trainers.items():
            torch.set_num_threads(2 if mode == "two workers" else 1)
            mesh.gather(None)  # together
            wall, cpu = time.monotonic(), time.process_time()
            if mesh.is_writer or mode == "two processes":
                for samples in work:
                    trainer.step(samples)
            wall, cpu = time.monotonic() - wall, time.process_time() - cpu
            both = mesh.gather([wall, cpu])
            if turn:
                seconds[mode].append([both[0][0], both[0][1] + (both[1][1] if mode == "two processes" else 0)])
    tokens = steps * STEP_TOKENS
    speeds = {mode: [[tokens / x for x in both] for both in of] for mode, of in seconds.items()}
    found: dict[str, Any] = {"model": name, "turns": turns, "steps": steps}
    for place, clock in enumerate(("wall", "cpu")):
        found[clock] = {mode: round(statistics.median(one[place] for one in of)) for mode, of in speeds.items()}
        for mode in MODES[:2]:
            ratios = [mine[place] / other[place] for mine, other in zip(speeds["two processes"], speeds[mode], strict=True)]
            found[f"{clock}, two processes to {mode}"] = [round(ratio, 3) for ratio in ratios]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args()
    with process_mesh(torch.device("cpu")) as mesh:
        for name in args.models:
            found = measure(mesh, name, steps=args.steps, turns=args.turns)
            if mesh.is_writer:
                print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
