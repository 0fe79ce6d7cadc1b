"""Gain of preference training against its number of pairs: DPO, RPO and plain SFT on the chosen answers, at equal compute.

    PYTHONPATH=src python bench/preference.py RUN/08-r1-general-sft/model --reward RUN/01-reward/model --pairs 100,400,1600 --seeds 0,1

Prompts are drawn from the miniature world, never those that its evaluation asks. The model answers each several times; answers that are
right and wrong by the world's truth make pairs. Every variant starts from the same model and sees as many tokens: SFT takes twice the
passes, since a pair is two answers. Gains are in greedy accuracy on other drawn prompts, paired, with 95 % intervals. Each line of output
is JSON; the last is the table.

With a model, pairs and held-out prompts of one's own, as of `gristmill run real`; the share of looping answers is told too:

    PYTHONPATH=src python bench/preference.py runs/real/03-r1-general-sft/model --rows runs/real/04-r1-dpo-pairs/pairs.parquet \\
        --evaluation src/gristmill/recipes/real-held-out.jsonl --max-tokens 300 --lr 4e-5 --batch-size 8 --pairs 25,50,100
"""

import argparse
import json
import random
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from gristmill import LLM, RewardModel, SamplingParams, train
from gristmill.core.progress import Progress
from gristmill.data.chat import Message, to_dicts
from gristmill.data.readers import read_pairs, read_prompts
from gristmill.data.rows import Demonstration, Pair, make_id
from gristmill.engine.load import EngineArgs, load_engine
from gristmill.evaluate.instructions import looping
from gristmill.evaluate.stats import paired
from gristmill.judge.programs import Verifier
from gristmill.miniature.problem import Problem
from gristmill.miniature.world import TASKS, World
from gristmill.sandbox.sandbox import Sandbox
from gristmill.workflows.evaluate import evaluate

Score = Callable[[Path], dict[str, list[bool]]]  # greedy answers of a model folder to the held-out prompts: which are right, and more
VERIFIED_GAP = 2.0  # reward gap of a pair where no reward model tells another


def draw(world: World, num: int, seed: str, taken: set[str]) -> list[Problem]:
    """Different problems, the tasks in equal parts, none of which was drawn before."""
    rng, out = random.Random(seed), list[Problem]()
    while len(out) < num:
        problem = world.draw(rng, TASKS[len(out) % len(TASKS)])
        key = "\n".join(m.content for m in problem.messages)
        if key not in taken:
            taken.add(key)
            out.append(problem)
    return out


def answers(llm: LLM, problems: Sequence[Problem], params: SamplingParams, seed: int = 0) -> list[list[str]]:
    """Finished answers to each problem."""
    outputs = llm.chat([to_dicts(p.messages) for p in problems], params, seed=seed)
    return [[c.text for c in output.outputs if c.finish == "stop"] for output in outputs]


def right(verifier: Verifier, problems: Sequence[Problem], texts: Sequence[Sequence[str]]) -> list[list[bool]]:
    """Which of the answers to each problem are right."""
    cases = [(p.truth, text) for p, group in zip(problems, texts, strict=True) for text in group]
    verdicts = iter(verifier.verify(cases))
    return [[next(verdicts) for _ in group] for group in texts]


def make_pairs(
    problems: Sequence[Problem],
    texts: Sequence[Sequence[str]],
    verdicts: Sequence[Sequence[bool]],
    reward: RewardModel | None,
    max_per_prompt: int,
) -> list[Pair]:
    """Pairs of a right and a wrong answer to a prompt, in random order."""
    rng, out = random.Random("pairs"), []
    for problem, group, oks in zip(problems, texts, verdicts, strict=True):
        good = list(dict.fromkeys(t for t, ok in zip(group, oks, strict=True) if ok))
        bad = list(dict.fromkeys(t for t, ok in zip(group, oks, strict=True) if not ok))
        for chosen, rejected in zip(*(rng.sample(side, min(len(good), len(bad), max_per_prompt)) for side in (good, bad)), strict=True):
            name = make_id(problem.question, chosen, rejected)
            out.append(Pair(name, name, problem.task, problem.messages, chosen, rejected, VERIFIED_GAP, 0.0, "verifier", ()))
    if reward is not None:
        talks = [[*to_dicts(p.messages), {"role": "assistant", "content": text}] for p in out for text in (p.chosen, p.rejected)]
        scores = reward.score(talks)
        for i, p in enumerate(out):
            out[i] = Pair(p.id, p.prompt, p.task, p.messages, p.chosen, p.rejected, scores[2 * i], scores[2 * i + 1], "reward", ())
    rng.shuffle(out)
    return out


def of_world(args: argparse.Namespace, sandbox: Sandbox) -> tuple[list[Pair], Score]:
    """Pairs of the model's answers to drawn prompts of the miniature world, and the scorer of a folder on others."""
    world, taken, verifier = World.make(0), set[str](), Verifier(sandbox)
    held_out = draw(world, args.num_evaluation, "evaluation", taken)
    problems = draw(world, args.num_prompts, "prompts", taken)
    greedy = SamplingParams(temperature=0.0, max_tokens=args.max_tokens)

    def score(folder: Path) -> dict[str, list[bool]]:
        verdicts = right(verifier, held_out, answers(LLM(folder), held_out, greedy))
        return {"right": [bool(group and group[0]) for group in verdicts]}

    sampled = answers(LLM(args.model), problems, SamplingParams(temperature=1.0, max_tokens=args.max_tokens, n=args.samples))
    reward = RewardModel(args.reward) if args.reward else None
    return make_pairs(problems, sampled, right(verifier, problems, sampled), reward=reward, max_per_prompt=args.max_per_prompt), score


def of_files(args: argparse.Namespace, temporary: Path) -> tuple[list[Pair], Score]:
    """The given pairs in random order, and the scorer of a folder on the given prompts."""
    pairs, prompts, out = read_pairs(args.rows), read_prompts(args.evaluation, "human", truth=True), temporary / "answers.jsonl"
    random.Random("pairs").shuffle(pairs)

    def score(folder: Path) -> dict[str, list[bool]]:
        engine = load_engine(folder, EngineArgs())
        evaluate(
            engine, args.evaluation, Progress(quiet=True), max_tokens=args.max_tokens, seed=0, greedy=True, out=out, identity=str(folder)
        )
        rows = {row["id"]: row for row in map(json.loads, out.read_text().splitlines())}
        asked = [rows[p.id] for p in prompts]
        return {"right": [row["right"] for row in asked], "looping": looping([row["text"] for row in asked])}

    return pairs, score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--reward", type=Path, help="reward model whose scores are RPO's gaps; default a gap of 2 for each pair")
    parser.add_argument("--pairs", default="100,400,1600")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--variants", default="sft,dpo:0,dpo:0.01,dpo:1,rpo:0.01,rpo:1", help="loss:sft_weight, by commas")
    parser.add_argument("--epochs", type=float, default=1.0, help="of pairs")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--batch-size", type=int, default=32, help="pairs a step")
    parser.add_argument("--max-tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--rows", type=Path, help="pairs of one's own, in place of the miniature world's")
    parser.add_argument("--evaluation", type=Path, help="held-out prompts with truths, for --rows")
    parser.add_argument("--num-prompts", type=int, default=2500)
    parser.add_argument("--samples", type=int, default=6)
    parser.add_argument("--max-per-prompt", type=int, default=2)
    parser.add_argument("--num-evaluation", type=int, default=1000)
    args = parser.parse_args()

    if (args.rows is None) != (args.evaluation is None):
        parser.error("--rows and --evaluation go together")
    table: list[dict[str, Any]] = []
    with ExitStack() as stack:
        temporary = stack.enter_context(tempfile.TemporaryDirectory())
        pairs, score = of_files(args, Path(temporary)) if args.rows else of_world(args, stack.enter_context(Sandbox()))
        before = score(args.model)
        shares = {name: sum(values) / len(values) for name, values in before.items()}
        print(json.dumps({"model": str(args.model), "pairs": len(pairs)} | shares), flush=True)
        for seed in map(int, args.seeds.split(",")):
            for num in map(int, args.pairs.split(",")):
                drawn = random.Random(f"{seed}-{num}").sample(pairs, min(num, len(pairs)))
                for variant in args.variants.split(","):
                    loss, _, weight = variant.partition(":")
                    out = Path(temporary) / f"{seed}-{num}-{loss}-{weight}"
                    common = {"lr": args.lr, "batch_size": args.batch_size, "weight_decay": 0.0, "warmup_ratio": 0.1}
                    if loss == "sft":
                        rows = [Demonstration(p.id, p.task, (*p.messages, Message("assistant", p.chosen)), "model", ()) for p in drawn]
                        result = train("sft", args.model, rows, out=out, seed=seed, epochs=2 * args.epochs, **common)
                    else:
                        options = {**common, "beta": args.beta, "sft_weight": float(weight), "epochs": args.epochs}
                        result = train(loss, args.model, drawn, out=out, seed=seed, **options)
                    after = score(out / "model")
                    gains = {name: paired(values, after[name]) for name, values in before.items()}
                    row = {"seed": seed, "pairs": len(drawn), "variant": variant, "steps": result.steps, "gains": gains}
                    table.append(row | {"seconds": round(result.seconds, 1)})
                    print(json.dumps(table[-1]), flush=True)
    print(json.dumps({"settings": {k: str(v) for k, v in vars(args).items()}, "table": table}))


if __name__ == "__main__":
    main()
