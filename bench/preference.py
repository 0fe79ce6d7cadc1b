"""Gain of preference training against its number of pairs: DPO, RPO and plain SFT on the chosen answers, at equal compute.

    PYTHONPATH=src python bench/preference.py RUN/08-r1-general-sft/model --reward RUN/01-reward/model --pairs 100,400,1600 --seeds 0,1

Prompts are drawn from the miniature world, never those that its evaluation asks. The model answers each several times; answers that are
right and wrong by the world's truth make pairs. Every variant starts from the same model and sees as many tokens: SFT takes twice the
passes, since a pair is two answers. Gains are in greedy accuracy on other drawn prompts, paired, with 95 % intervals. Each line of output
is JSON; the last is the table.
"""

import argparse
import json
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gristmill import LLM, RewardModel, SamplingParams, train
from gristmill.data.chat import Message, to_dicts
from gristmill.data.rows import Demonstration, Pair, make_id
from gristmill.evaluate.stats import paired
from gristmill.judge.programs import Verifier
from gristmill.miniature.problem import Problem
from gristmill.miniature.world import TASKS, World
from gristmill.sandbox.sandbox import Sandbox

MAX_TOKENS = 64
VERIFIED_GAP = 2.0  # reward gap of a pair where no reward model tells another


def draw(world: World, num: int, seed: str, taken: set[str]) -> list[Problem]:
    """Different problems, the tasks in equal parts, none of which was drawn before."""
    rng, out = random.Random(seed), []
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
    parser.add_argument("--num-prompts", type=int, default=2500)
    parser.add_argument("--samples", type=int, default=6)
    parser.add_argument("--max-per-prompt", type=int, default=2)
    parser.add_argument("--num-evaluation", type=int, default=1000)
    args = parser.parse_args()

    world, taken = World.make(0), set[str]()
    held_out = draw(world, args.num_evaluation, "evaluation", taken)
    problems = draw(world, args.num_prompts, "prompts", taken)
    greedy = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)
    table: list[dict[str, Any]] = []
    with Sandbox() as sandbox, tempfile.TemporaryDirectory() as temporary:
        verifier = Verifier(sandbox)

        def score(folder: Path) -> list[bool]:
            return [bool(group and group[0]) for group in right(verifier, held_out, answers(LLM(folder), held_out, greedy))]

        before = score(args.model)
        sampled = answers(LLM(args.model), problems, SamplingParams(temperature=1.0, max_tokens=MAX_TOKENS, n=args.samples))
        reward = RewardModel(args.reward) if args.reward else None
        pairs = make_pairs(problems, sampled, right(verifier, problems, sampled), reward=reward, max_per_prompt=args.max_per_prompt)
        print(json.dumps({"model": str(args.model), "accuracy": sum(before) / len(before), "pairs": len(pairs)}), flush=True)
        for seed in map(int, args.seeds.split(",")):
            for num in map(int, args.pairs.split(",")):
                drawn = random.Random(f"{seed}-{num}").sample(pairs, min(num, len(pairs)))
                for variant in args.variants.split(","):
                    loss, _, weight = variant.partition(":")
                    out = Path(temporary) / f"{seed}-{num}-{loss}-{weight}"
                    common = {"lr": args.lr, "batch_size": 32, "weight_decay": 0.0, "warmup_ratio": 0.1}
                    if loss == "sft":
                        rows = [Demonstration(p.id, p.task, (*p.messages, Message("assistant", p.chosen)), "model", ()) for p in drawn]
                        result = train("sft", args.model, rows, out=out, seed=seed, epochs=2 * args.epochs, **common)
                    else:
                        options = {**common, "beta": args.beta, "sft_weight": float(weight), "epochs": args.epochs}
                        result = train(loss, args.model, drawn, out=out, seed=seed, **options)
                    gain = paired(before, score(out / "model"))
                    row = {
                        "seed": seed,
                        "pairs": len(drawn),
                        "variant": variant,
                        "steps": result.steps,
                        "gain": gain["mean"],
                        "ci95": gain["ci95"],
                    }
                    table.append(row | {"seconds": round(result.seconds, 1)})
                    print(json.dumps(table[-1]), flush=True)
    print(json.dumps({"settings": {k: str(v) for k, v in vars(args).items()}, "table": table}))


if __name__ == "__main__":
    main()
