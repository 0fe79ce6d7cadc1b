"""Reinforcement learning beside TRL: tokens a CPU second and peak memory of GRPO on one thread.

    PYTHONPATH=src python bench/grpo.py --trl-python TRL_VENV/bin/python --steps 6 --repeats 2

Both sample from the model of bench/train.py (7.87M parameters, the same weights) and train it: a step is 4 prompts of about 60 tokens, 8
answers of 64 tokens at temperature 1, and one on-policy update with AdamW; the reward is the share of even token ids. Generated tokens are
counted as they come. Imports and the first step, in which both make their optimizer states, are left out of the seconds and not of the
memory. Every measurement is a process of its own and prints one line of JSON; the last line is the summary.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import train

SHAPE = train.SHAPES["8m"]
NUM_PROMPTS, NUM_ANSWERS, ANSWER_TOKENS, PROMPT_TOKENS = 4, 8, 64, 60
WARM_UP = 1  # steps


def even(completions_ids: Sequence[Sequence[int]]) -> list[float]:
    """The reward: the share of even token ids."""
    return [sum(token % 2 == 0 for token in ids) / max(1, len(ids)) for ids in completions_ids]


def measure_gristmill(folder: Path, steps: int, precision: str) -> dict[str, Any]:
    """The rollouts, journal, objective and Trainer of `gristmill rl`, without its evaluation."""
    import random

    import torch

    from gristmill.core.config import check
    from gristmill.data.chat import Message
    from gristmill.data.chat_format import FORMATS
    from gristmill.data.rows import Prompt
    from gristmill.data.tokenizer import Tokenizer
    from gristmill.engine.engine import Engine
    from gristmill.generation.api import Completion
    from gristmill.runs.journal import Journal
    from gristmill.train.objectives.policy_gradient import normalized
    from gristmill.train.trainer import Trainer, TrainSettings
    from gristmill.workflows.rl.recipe import RlRecipe
    from gristmill.workflows.rl.rewards import Reward
    from gristmill.workflows.rl.rollouts import RolloutSource

    class Policy:
        adapter = ""
        chat_format = FORMATS["chatml"]
        tokenizer = Tokenizer.train([" ".join(f"w{i}" for i in range(100))], 512, FORMATS["chatml"].special_tokens)

        def __init__(self, model: Any):
            dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
            self.engine = Engine(model, self.tokenizer, self.chat_format, name="policy", dtype=dtype)

    class Rewarder:
        def rewards(self, prompts: Sequence[Prompt], answers: Sequence[Completion]) -> list[Reward]:
            return [Reward(value, 0.0, 1.0) for value in even([answer.tokens for answer in answers])]

    imports = train.peak_rss_mib()
    sizes = {"prompts": NUM_PROMPTS, "samples": NUM_ANSWERS, "max_tokens": ANSWER_TOKENS, "steps": steps + WARM_UP}
    recipe = check(RlRecipe, {"world": "miniature", "method": "dapo", **sizes})
    rng = random.Random(0)
    model = train._our_model(SHAPE)
    policy = Policy(model)

    def prompt(number: int) -> Prompt:
        text = "w"
        while True:
            found = Prompt(str(number), "", (Message("user", text),), "file")
            if len(policy.chat_format.render_prompt(found.messages, policy.tokenizer)) >= PROMPT_TOKENS:
                return found
            text += f" w{rng.randrange(10)}"

    prompts = [prompt(i) for i in range(NUM_PROMPTS * recipe.steps)]
    settings = TrainSettings(
        lr=train.LEARNING_RATE,
        schedule="constant",
        steps=recipe.steps,
        batch_size=NUM_PROMPTS * NUM_ANSWERS,
        weight_decay=0.0,
        clip=train.CLIP,
        precision=precision,
    )
    trainer, tokens, timer = Trainer(model, recipe.objective(), settings), 0, train.Timer()
    with Journal(folder / "rollouts.jsonl") as journal:
        source = RolloutSource(recipe, prompts, policy, Rewarder(), journal, order=list(range(len(prompts))))  # type: ignore[arg-type]
        for step in range(recipe.steps):
            if step == WARM_UP:
                tokens, timer = 0, train.Timer()
            groups = source.step(step)
            tokens += sum(len(answer.tokens) for group in groups for answer in group.answers)
            trainer.step(normalized([sample for group in groups for sample in source.samples(group)], "token", ANSWER_TOKENS))
            policy.engine.refresh()
    size = len(policy.chat_format.render_prompt(prompts[0].messages, policy.tokenizer))
    return {"imports_rss_mib": imports, "prompt_tokens": size, "tokens": tokens} | timer.read()


def measure_trl(folder: Path, steps: int, precision: str) -> dict[str, Any]:
    """GRPOTrainer as a careful user sets it on a CPU: bf16 where it pays, no gradient checkpointing, fused AdamW, sdpa."""
    import datasets
    import numpy as np
    import torch
    import transformers
    from trl import GRPOConfig, GRPOTrainer

    datasets.disable_progress_bars()
    imports, counted = train.peak_rss_mib(), [0]
    rng = np.random.default_rng(0)
    rows = rng.integers(train.FIRST_WORD, SHAPE.vocab_size, (NUM_PROMPTS * (steps + WARM_UP), PROMPT_TOKENS)).tolist()
    model = getattr(transformers, SHAPE.causal).from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        counted[0] += sum(map(len, completion_ids))
        return even(completion_ids)

    args = GRPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=NUM_PROMPTS * NUM_ANSWERS,
        num_generations=NUM_ANSWERS,
        max_completion_length=ANSWER_TOKENS,
        num_train_epochs=1,
        beta=0.0,
        temperature=1.0,
        learning_rate=train.LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=train.CLIP,
        optim="adamw_torch_fused",
        bf16=precision == "bf16",
        gradient_checkpointing=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    data = datasets.Dataset.from_list([{"prompt": train._text_of(row)} for row in rows])
    trainer = GRPOTrainer(model, reward_funcs=reward, args=args, train_dataset=data, processing_class=train._tokenizer(SHAPE))
    timer = train.Timer()

    class WarmUp(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == WARM_UP:
                counted[0] = 0
                timer.restart()

    trainer.add_callback(WarmUp())
    trainer.train()
    return {"imports_rss_mib": imports, "prompt_tokens": PROMPT_TOKENS, "tokens": counted[0]} | timer.read()


def measure(side: str, folder: Path, steps: int, precision: str) -> dict[str, Any]:
    import torch
    import torch._dynamo

    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = (measure_gristmill if side == "gristmill" else measure_trl)(folder, steps, precision)
    speed = round(found["tokens"] / found["cpu_seconds"], 1)
    return {"trainer": side, "steps": steps, "tokens_per_cpu_second": speed, **found, "peak_rss_mib": train.peak_rss_mib()}


def summary(results: Sequence[dict[str, Any]], chosen: dict[str, Any]) -> dict[str, Any]:
    of = {side: [r for r in results if r["trainer"] == side] for side in ("gristmill", "trl")}
    speed = {side: [r["tokens_per_cpu_second"] for r in rows] for side, rows in of.items()}
    memory = {side: max(r["peak_rss_mib"] for r in rows) for side, rows in of.items()}
    return {
        **chosen,
        "tokens_per_cpu_second": speed,
        "ratio": round(statistics.median(speed["gristmill"]) / statistics.median(speed["trl"]), 2),
        "ratio_of_each_repeat": [round(ours / theirs, 2) for ours, theirs in zip(speed["gristmill"], speed["trl"], strict=True)],
        "peak_rss_mib": memory,
        "memory_ratio": round(memory["gristmill"] / memory["trl"], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", default=sys.executable, help="an interpreter that has TRL (default: this one)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="of both sides (default: the faster one on this CPU)")
    parser.add_argument("--steps", type=int, default=4, help="counted steps of a repeat")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--job", choices=("prepare", "gristmill", "trl"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job == "prepare":
        train.prepare(SHAPE, options.folder, 1, seed=0)
        return print(json.dumps({"precision": options.precision or train._fastest_precision()}))
    if options.job:
        return print(json.dumps(measure(options.job, options.folder, options.steps, options.precision)))
    environment = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "HF_HUB_OFFLINE", "TQDM_DISABLE"), "1")
    environment |= {"CUDA_VISIBLE_DEVICES": "", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}

    def child(python: str, job: str, folder: Path, *more: str) -> dict[str, Any]:
        command = [python, __file__, "--job", job, "--folder", str(folder), "--steps", str(options.steps), *more]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found

    results = []
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            given = ["--precision", options.precision] if options.precision else []
            precision = child(sys.executable, "prepare", folder, *given)["precision"]
            for side, python in (("trl", options.trl_python), ("gristmill", sys.executable)):
                results.append(child(python, side, folder, "--precision", precision))
                print(json.dumps(results[-1]), flush=True)
    print(json.dumps({"summary": summary(results, {"precision": precision, "steps": options.steps, "repeats": options.repeats})}))


if __name__ == "__main__":
    main()
