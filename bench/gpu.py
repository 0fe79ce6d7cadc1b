"""What runs on a GPU, end to end: training, scoring, generation and evaluation, timed, and checked against the CPU.

    PYTHONPATH=src python bench/gpu.py                  # the sizes of a GPU, on the one that torch finds
    PYTHONPATH=src python bench/gpu.py --smoke          # the same at toy size, on whatever device there is
    PYTHONPATH=src python bench/gpu.py --device cuda:1

Trains a random model by SFT, reward regression and DPO, each in fp32 and bf16; scores conversations; generates greedily with the shipped
Base (fp32, bf16, and bf16 with an int8 cache); evaluates it on the miniature's prompts without code. Prints one JSON object. It fails when
a loss, gradient norm or score is not finite, when the first losses are not the CPU's, or (with --smoke: over long answers two
devices may round a tie in two ways) when greedy text in fp32 is not.
"""

import argparse
import json
import math
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

import gristmill.miniature
from gristmill.core.device import pick_device
from gristmill.core.progress import Progress
from gristmill.data.chat import FORMATS, Message
from gristmill.data.human import HumanData
from gristmill.data.rows import Prompt
from gristmill.engine.load import EngineArgs, answer_rows, load_engine
from gristmill.generation.api import SamplingParams
from gristmill.judge.reward import RewardScorer
from gristmill.miniature.source import MiniatureSource
from gristmill.model.config import ModelConfig, uniform_blocks
from gristmill.model.hf import load_model
from gristmill.model.reward import RewardModel
from gristmill.model.transformer import Transformer
from gristmill.train.batches import AnySample, PairSample, RatedSample, Sample
from gristmill.train.objectives.next_token import next_token_objective
from gristmill.train.objectives.preference import PreferenceObjective, compute_reference_logprobs
from gristmill.train.objectives.reward import reward_objective
from gristmill.train.trainer import Objective, Trainer, TrainSettings

BASE = Path(gristmill.miniature.__file__).parent / "checkpoint"
OBJECTIVES: dict[str, Objective] = {"sft": next_token_objective, "reward": reward_objective, "dpo": PreferenceObjective("dpo")}
ENGINES = {
    "fp32": EngineArgs(dtype="fp32"),
    "bf16": EngineArgs(dtype="bf16"),
    "bf16, int8 cache": EngineArgs(dtype="bf16", cache="int8"),
}
# The first loss beside the CPU's: sums in another order, and the 8 bits of bf16.
TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2}


class Size:
    """How much is done."""

    def __init__(self, smoke: bool) -> None:
        self.smoke = smoke
        heads = (2, 1, 16) if smoke else (16, 4, 64)
        hidden, self.layers = (32, 2) if smoke else (1024, 12)
        vocab, context = (512, 128) if smoke else (32_768, 2048)
        self.config = ModelConfig("nemotron", vocab, hidden, uniform_blocks(self.layers, *heads, 4 * hidden), max_positions=context)
        self.steps, self.batch_size = (2, 8) if smoke else (10, 64)
        self.tokens = (16, 60) if smoke else (256, 1024)  # of a document, from and to
        self.prompts, self.new_tokens = (4, 12) if smoke else (256, 200)
        self.evaluated = 6 if smoke else 400
        self.checked = 4 if smoke else 32  # greedy answers compared with the CPU's


def samples_of(kind: str, size: Size) -> list[AnySample]:
    rng = np.random.default_rng(0)

    def ids(low: int, high: int) -> np.ndarray:
        return rng.integers(0, size.config.vocab_size, int(rng.integers(low, high + 1)))

    low, high = size.tokens
    out: list[AnySample] = []
    for number in range(size.batch_size * size.steps):
        prompt = ids(low // 2, high // 2)
        answers = [np.concatenate([prompt, ids(low // 2, high // 2)]) for _ in range(2)]
        first, second = (Sample(answer, np.arange(len(answer)) >= len(prompt), str(number)) for answer in answers)
        if kind == "sft":
            out.append(first)
        elif kind == "dpo":
            out.append(PairSample(first, second, id=str(number)))
        else:
            out.append(RatedSample(first.ids, first.num_tokens - 1, rng.integers(0, 5, 5), id=str(number)))
    return out


def timed(work: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    started = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - started


def train(kind: str, precision: str, size: Size, device: torch.device) -> dict[str, Any]:
    """A few steps; the first loss beside that of the same step on the CPU."""
    samples = samples_of(kind, size)
    settings = TrainSettings(lr=1e-3, steps=size.steps, batch_size=size.batch_size, precision=precision, shuffle=False)

    def trainer(where: torch.device, num: int) -> tuple[Trainer, list[AnySample]]:
        model: torch.nn.Module = Transformer(size.config)
        data = samples[:num]
        if kind == "dpo":
            pairs = [sample for sample in data if isinstance(sample, PairSample)]
            data = list(compute_reference_logprobs(model.to(where), pairs, precision=precision))
        elif kind == "reward":
            model = RewardModel(model)
        return Trainer(model, OBJECTIVES[kind], settings, device=where, on_step=lambda step, total, m: seen.append(m)), data

    seen: list[dict[str, float]] = []
    ours, data = trainer(device, len(samples))
    result, seconds = timed(lambda: ours.fit(data), device)
    few = min(size.batch_size, 8)  # a small step is enough to compare
    steps = [one.step(given) for one, given in (trainer(torch.device("cpu"), few), trainer(device, few))]
    here, there = (step["loss"] for step in steps)
    assert all(math.isfinite(m["loss"]) and math.isfinite(m["grad_norm"]) for m in seen), (kind, precision, seen)
    assert math.isclose(here, there, rel_tol=TOLERANCE[precision]), (kind, precision, here, there)
    rate = seen[-1]["tokens_per_second"]
    return {"first_loss": seen[0]["loss"], "last_loss": seen[-1]["loss"], "seconds": seconds, "tokens": result.tokens, "last_rate": rate}


def score(size: Size, prompts: Sequence[Prompt], device: torch.device) -> dict[str, Any]:
    """Ratings by a random head on the shipped Base, and how far from the CPU's."""
    ratings = []
    talks = [[*prompt.messages, Message("assistant", f"It is {number}.")] for number, prompt in enumerate(prompts)]
    for where in (torch.device("cpu"), device):
        model, tokenizer = load_model(BASE)
        scorer = RewardScorer(RewardModel(model).to(where), tokenizer, FORMATS["nemotron"])
        rated, seconds = timed(lambda scorer=scorer: scorer.score(talks), where)
        ratings.append(np.array([astuple(rating) for rating in rated]))
    assert np.isfinite(ratings[1]).all()
    difference = float(np.abs(ratings[0] - ratings[1]).max())
    assert difference < 1e-3, difference
    return {"conversations": len(talks), "seconds": seconds, "largest_difference": difference}


def generate(how: EngineArgs, size: Size, prompts: Sequence[Prompt], device: torch.device) -> dict[str, Any]:
    """Greedy answers, and the share of some that the CPU gives too."""
    greedy = SamplingParams(temperature=0.0, max_tokens=size.new_tokens)

    def answers(where: torch.device, asked: Sequence[Prompt]) -> dict[int, dict[str, Any]]:
        engine = load_engine(BASE, EngineArgs(dtype=how.dtype, cache=how.cache, device=str(where)))
        rows = answer_rows(engine, [prompt.messages for prompt in asked], greedy, seed=0)
        return {row["index"]: row["responses"][0] for row in rows}

    out, seconds = timed(lambda: answers(device, prompts), device)
    here = answers(torch.device("cpu"), prompts[: size.checked])
    same = float(np.mean([out[index]["text"] == row["text"] for index, row in here.items()]))
    assert all(math.isfinite(row["logprob"]) for row in out.values())
    assert same == 1 or how.dtype != "fp32" or not size.smoke, f"{1 - same:.0%} of the greedy answers in fp32 are not the CPU's"
    tokens = sum(row["num_tokens"] for row in out.values())
    return {"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds, "same_as_cpu": same, "compared": len(here)}


def evaluation(size: Size, prompts: Sequence[Prompt], device: torch.device) -> dict[str, Any]:
    """Accuracy of the shipped Base."""
    from gristmill.workflows.evaluate import evaluate

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prompts.jsonl"
        rows = [{"messages": [asdict(m) for m in p.messages], "truth": p.truth, "task": p.task} for p in prompts[: size.evaluated]]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        engine = load_engine(BASE, EngineArgs(device=str(device)))
        work = lambda: evaluate(engine, path, Progress(quiet=True), max_tokens=size.new_tokens, seed=0)  # noqa: E731
        scores, seconds = timed(work, device)
    return {"greedy": scores["greedy"]["overall"], "sampled": scores["sampled"]["overall"], "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--smoke", action="store_true", help="toy size")
    args = parser.parse_args()
    device, size = pick_device(args.device), Size(args.smoke)
    prompts = [p for p in MiniatureSource(HumanData(), 0).evaluation() if p.truth and p.truth["kind"] != "code"]
    asked = prompts[: size.prompts]
    report: dict[str, Any] = {
        "device": str(device),
        "name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
        | {name: metadata.version(name) for name in ("gristmill", "numpy")},
        "train": {f"{kind} {p}": train(kind, p, size, device) for kind in OBJECTIVES for p in TOLERANCE},
        "score": score(size, asked, device),
        "generate": {name: generate(how, size, asked, device) for name, how in ENGINES.items()},
        "evaluate": evaluation(size, prompts, device),
    }
    if device.type == "cuda":
        report["peak_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    json.dump(report, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
