"""GRPO beside rejection-sampling fine-tuning (RFT) at equal CPU seconds, from one model of the miniature, in one figure.

    PYTHONPATH=src python bench/rft.py runs/miniature/02-demonstrations/model --seconds 60 --out rft.svg

GRPO is `miniature-rl` (32 prompts x 8 answers a step, one update). RFT samples 8 answers to each of 400 prompts, keeps up to 3 different
right ones of a prompt, trains two epochs on them, and begins again. CPU seconds are those of sampling and training in this process, on one
thread; programs run in the sandbox for both, and evaluation is not counted. Accuracy is on held-out prompts, greedy and at temperature 1.
Each point is one line of JSON.
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from gristmill.core.config import check
from gristmill.core.io import write_text
from gristmill.data.chat import Message
from gristmill.data.rows import Demonstration, Prompt
from gristmill.evaluate.runner import evaluate_model
from gristmill.generation.api import Completion, Request, SamplingParams
from gristmill.judge.programs import Verifier
from gristmill.report.figures import svg
from gristmill.report.markup import el
from gristmill.runs.journal import Journal
from gristmill.train.objectives.policy_gradient import normalized
from gristmill.train.objectives.sft import demonstration_samples, sft_objective
from gristmill.train.trainer import Trainer, TrainSettings
from gristmill.workflows.dataset.steps import open_verifier
from gristmill.workflows.rl.policy import Policy
from gristmill.workflows.rl.prompts import find_prompts
from gristmill.workflows.rl.recipe import RlRecipe
from gristmill.workflows.rl.rewards import Rewarder
from gristmill.workflows.rl.rollouts import RolloutSource

TASKS = ["sums", "code", "lists"]
RFT_PROMPTS, RFT_KEPT, RFT_EPOCHS, RFT_BATCH = 400, 3, 2.0, 32
COLORS = {"grpo": "#3465a4", "rft": "#c4642a"}


class Side:
    """One of the two: its policy, and the CPU seconds that it has taken. `work` yields after each step or round."""

    name = ""

    def __init__(self, recipe: RlRecipe, start: Path, prompts: list[Prompt], verifier: Verifier, folder: Path):
        self.recipe, self.verifier, self.folder = recipe, verifier, folder
        self.prompts = random.Random(recipe.seed).sample(prompts, len(prompts))
        self.policy, self.seconds = Policy(recipe, start, torch.device("cpu")), 0.0
        self.settings = {"lr": recipe.lr(1), "schedule": "constant", "weight_decay": 0.0, "precision": recipe.training.precision}

    def work(self) -> Iterator[None]:
        raise NotImplementedError


class Grpo(Side):
    name = "grpo"

    def work(self) -> Iterator[None]:
        settings = TrainSettings(steps=10**6, batch_size=1, warmup_steps=5, **self.settings)  # type: ignore[arg-type]
        trainer, step = Trainer(self.policy.model, self.recipe.objective(), settings), 0
        rewarder = Rewarder(self.recipe.rewards, self.verifier, self.recipe.max_tokens)
        with Journal(self.folder / "rollouts.jsonl") as journal:
            source = RolloutSource(self.recipe, self.prompts, self.policy, rewarder, journal)
            while True:
                samples = [s for group in source.step(step) if group.has_spread for s in source.samples(group)]
                if samples:
                    trainer.step(normalized(samples, "token", self.recipe.max_tokens))
                    self.policy.refresh()
                step += 1
                yield


class Rft(Side):
    name = "rft"

    def work(self) -> Iterator[None]:
        sampling, number = SamplingParams(temperature=1.0, max_tokens=self.recipe.max_tokens, n=self.recipe.samples), 0
        while True:
            first = number * RFT_PROMPTS
            chosen = {f"{number}-{p.id}": p for p in (self.prompts * (2 + first // len(self.prompts)))[first : first + RFT_PROMPTS]}
            asked = [Request(name, p.messages, sampling, self.recipe.seed) for name, p in chosen.items()]
            rows: list[Demonstration] = []
            for request, answers in self.policy.engine.generate(asked):
                prompt = chosen[request.id]
                texts = list(dict.fromkeys(a.text for a in answers if a.finish == "stop"))
                verdicts = self.verifier.verify([(prompt.truth or {}, text) for text in texts])
                right = [text for text, ok in zip(texts, verdicts, strict=True) if ok][:RFT_KEPT]
                talks = [(*prompt.messages, Message("assistant", text)) for text in right]
                rows += [Demonstration(f"{request.id}-{i}", prompt.task, talk, "rft") for i, talk in enumerate(talks)]
            samples = demonstration_samples(rows, self.policy.chat_format, self.policy.tokenizer)
            settings = TrainSettings(epochs=RFT_EPOCHS, batch_size=RFT_BATCH, seed=number, **self.settings)  # type: ignore[arg-type]
            Trainer(self.policy.model, sft_objective, settings).fit(samples)
            self.policy.refresh()
            number += 1
            yield


def curve(side: Side, evaluation: list[Prompt], *, seconds: float, every: float) -> Iterator[dict[str, Any]]:
    """Accuracy before any work, then whenever `every` CPU seconds have been spent, and at the end."""

    def measured() -> dict[str, Any]:
        def generate(requests: list[Request]) -> dict[str, list[Completion]]:
            return {request.id: answers for request, answers in side.policy.engine.generate(requests)}

        found = evaluate_model(evaluation, generate, side.verifier.verify, max_tokens=side.recipe.max_tokens, seed=side.recipe.seed)
        scores = {mode: found[mode]["overall"] for mode in ("greedy", "sampled")}
        return {"method": side.name, "cpu_seconds": round(side.seconds, 1), "steps": steps, **scores}

    steps, last, work = 0, 0.0, side.work()
    yield measured()
    while side.seconds < seconds:
        began = time.process_time()
        next(work)
        side.seconds += time.process_time() - began
        steps += 1
        if side.seconds - last >= every or side.seconds >= seconds:
            last = side.seconds
            yield measured()


def figure(points: list[dict[str, Any]]) -> str:
    """Greedy accuracy (whole lines) and at temperature 1 (dashed) over CPU seconds."""
    width, height, left, bottom, top = 640.0, 360.0, 44.0, 40.0, 12.0
    longest = max(point["cpu_seconds"] for point in points) or 1.0

    def place(seconds: float, score: float) -> str:
        return f"{left + (width - left - 90) * seconds / longest:.1f},{top + (1 - score) * (height - top - bottom):.1f}"

    parts: list[Any] = [el("rect", width="100%", height="100%", fill="#fff")]
    labels: list[tuple[float, float, str, str]] = []
    for tick in (0, 0.25, 0.5, 0.75, 1):
        x, y = place(0, tick).split(",")
        parts.append(el("line", x1=x, x2=str(width - 90), y1=y, y2=y, stroke="#ccc"))
        parts.append(el("text", f"{tick:g}", x=str(left - 8), y=y, text_anchor="end", font_size="12"))
    for seconds in (0.0, longest):
        x = place(seconds, 0).split(",")[0]
        parts.append(el("text", f"{seconds:.0f} CPU s", x=x, y=str(height - 16), text_anchor="middle", font_size="12"))
    for method, color in COLORS.items():
        mine = [point for point in points if point["method"] == method]
        for mode, dash in (("greedy", ""), ("sampled", "5 4")):
            line = " ".join(place(point["cpu_seconds"], point[mode]["mean"]) for point in mine)
            parts.append(el("polyline", points=line, fill="none", stroke=color, stroke_width="2", stroke_dasharray=dash or None))
            x, y = map(float, line.split()[-1].split(","))
            labels.append((y, x, f"{method}, {mode}", color))
    lowest = 0.0
    for y, x, text, color in sorted(labels):  # none over another
        lowest = max(y, lowest + 14)
        parts.append(el("text", text, x=f"{x + 6:.1f}", y=f"{lowest:.1f}", fill=color, font_size="12"))
    return str(svg(width, height, "Accuracy over CPU seconds", parts)).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of an Instruct model of the miniature")
    parser.add_argument("--seconds", type=float, default=60.0, help="CPU seconds of each")
    parser.add_argument("--every", type=float, default=10.0, help="CPU seconds between evaluations")
    parser.add_argument("--evaluation", type=int, default=150, help="held-out prompts a task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("rft.svg"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = {"num_evaluation": options.evaluation, "tasks": TASKS}
    values = {"world": "miniature", "data": data, "method": "dapo", "max_tokens": 64, "seed": options.seed}
    recipe = check(RlRecipe, values | {"training": {"precision": "bf16"}, "engine": {"precision": "bf16"}})
    prompts, evaluation = find_prompts(recipe, None)
    points: list[dict[str, Any]] = []
    with ExitStack() as stack:
        verifier = open_verifier(stack, needs_code=True, unsafe_code=False)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for kind in (Grpo, Rft):
            side = kind(recipe, options.model, prompts, verifier, folder)
            for point in curve(side, evaluation, seconds=options.seconds, every=options.every):
                points.append(point)
                print(json.dumps(point), flush=True)
    write_text(options.out, figure(points))


if __name__ == "__main__":
    main()
