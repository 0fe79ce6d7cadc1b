"""Is choosing what to ask worth it? Simulated annotators rate chosen and random answers; the reward model is trained on each.

For every seed a reward model is trained from Base on a few rated answers. Prompts of a large pool are then chosen by each strategy (one in
five at random, as in the studio), and their two answers rated. The curve is that of a ridge head on the first model's states, trained on
all that is rated by then; at its end a whole reward model is trained from Base on the same rows. Figures are accuracies on held-out
pairs, and paired differences to random with 95 % t intervals over seeds. They are printed after every seed.

python bench/asking.py [--seeds 5] [--out asking.json] [--run RUN]

With --run, a finished run of the miniature, they sit in its studio instead: each project asks about answers that the run's models wrote,
chosen by the run's own reward model, three people rate over HTTP, and what is exported is trained on beside the run's own ratings, from
Base (`PYTHONPATH=src:.`). The first row is the reward model of those ratings alone.
"""

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gristmill.core.io import write_json
from gristmill.data.chat import Message
from gristmill.data.find_format import find_format
from gristmill.data.rows import Rated, read_rows
from gristmill.data.tokenizer import Tokenizer
from gristmill.judge.reward import RewardScorer
from gristmill.miniature.annotators import SimulatedAnnotator
from gristmill.miniature.base import BASE
from gristmill.miniature.human import RATED_TASKS, WrittenAnswer, annotate, write
from gristmill.miniature.problem import Problem
from gristmill.miniature.world import World
from gristmill.model.hf import load_reward
from gristmill.studio import asking
from gristmill.studio.asking import Floats
from gristmill.studio.serve import open_store
from gristmill.studio.tasks import RATE
from gristmill.train.settings import Training
from gristmill.workflows.train import MODEL, train_model

NUM_FIRST, NUM_POOL, NUM_HELD_OUT = 60, 800, 300  # prompts, two answers each
NUM_ASKED, NUM_PEOPLE = 150, 3  # in a run's studio: of two answers in three these annotators can tell
BUDGETS = (25, 50, 100)  # prompts that are asked about: 50, 100 and 200 answers
WEIGHTS = (0.65, 0.8, 0.45, 0.0, 0.0)
T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 8: 2.365, 10: 2.262}
STRATEGIES = (asking.RANDOM, asking.DISAGREEMENT, asking.D_OPTIMAL)
Asked = tuple[Problem, list[WrittenAnswer]]


def draw(world: World, num: int, seed: str) -> list[Asked]:
    """Prompts with two different answers each, as `miniature.human.ratings` draws them, unrated."""
    rng, out = random.Random(seed), list[Asked]()
    while len(out) < num:
        problem = world.draw(rng, RATED_TASKS[len(out) % len(RATED_TASKS)])
        good = (True, False) if rng.random() < 0.7 else (rng.random() < 0.5,) * 2
        answers = [write(rng, problem, one) for one in rng.sample(good, 2)]
        if answers[0].text != answers[1].text:
            out.append((problem, answers))
    return out


def rate(asked: Sequence[Asked], seed: str) -> list[Rated]:
    """Consensus ratings of both answers; prompts on which people disagree are dropped."""
    rows = []
    for place, (problem, answers) in enumerate(asked):
        rng = random.Random(f"{seed} {problem.question}")  # the same people say the same, whoever chose
        marks = [annotate(rng, problem, one) for one in answers]
        if None not in marks:
            for k, (one, mark) in enumerate(zip(answers, marks, strict=True)):
                talk = (*problem.messages, Message("assistant", one.text))
                rows.append(Rated(f"{seed}-{place}-{k}", problem.task, talk, tuple(map(float, mark or ())), f"{seed}-{place}"))
    return rows


def train(rows: Sequence[Rated], folder: Path, seed: int, *, epochs: int = 6) -> RewardScorer:
    """Reward model trained from Base."""
    recipe = Training(lr=1e-3, epochs=epochs, batch_size=32, warmup_steps=5, precision="fp32", micro_batch_tokens=8192)
    tokenizer_format = find_format("auto", Tokenizer.load(BASE))
    train_model(
        "reward",
        BASE,
        rows,
        out=folder,
        recipe=recipe,
        chat_format=tokenizer_format,
        device=torch.device("cpu"),
        seed=seed,
        weights=WEIGHTS,
    )
    model, tokenizer = load_reward(folder / MODEL, torch.float32)
    return RewardScorer(model, tokenizer, tokenizer_format, weights=WEIGHTS)


def pair_accuracy(totals: Sequence[float], rows: Sequence[Rated]) -> float:
    """Share of held-out pairs in which the more helpful answer gets the higher score."""
    pairs = [(rows[i].labels[0] or 0, rows[i + 1].labels[0] or 0, totals[i], totals[i + 1]) for i in range(0, len(rows), 2)]
    right = [(a > b) == (x > y) for a, b, x, y in pairs if a != b]
    return sum(right) / len(right)


def order_of(strategy: str, states: Floats, first: Floats, labels: Floats, tasks: Sequence[str], *, seed: int) -> list[int]:
    """Numbers of the pool's prompts in the order in which they are asked about.

    Args:
        states: of both answers to each prompt (P, 2, D).
        first: of the answers that are rated already.
    """
    num = BUDGETS[-1]
    if strategy == asking.RANDOM:
        return [int(i) for i in np.random.default_rng(seed).permutation(len(states))[:num]]
    if strategy == asking.DISAGREEMENT:
        heads = asking.bootstrap_heads(first, labels, num=asking.NUM_HEADS, seed=seed)
        order = asking.ranked(asking.disagreement(states.reshape(-1, states.shape[2]), heads).reshape(-1, 2).max(1).tolist())
    else:
        order = asking.d_optimal(list(states), num=num)
    return [place for place, _ in asking.mixed(order, tasks, num=num, seed=seed)]


def of_seed(world: World, seed: int) -> dict[str, dict[str, Any]]:
    """Curve and final accuracy of each strategy."""
    first, held = (
        rate(draw(world, num, f"{what}-{seed}"), f"{what}-{seed}") for what, num in (("first", NUM_FIRST), ("held", NUM_HELD_OUT))
    )
    pool = draw(world, NUM_POOL, f"pool-{seed}")
    talks = [(*problem.messages, Message("assistant", one.text)) for problem, answers in pool for one in answers]
    out: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        scorer = train(first, Path(folder) / "first", seed)
        states = asking.scaled(np.asarray(scorer.states([*talks, *(r.messages for r in [*first, *held])])))
        pool_NAD, first_ND, held_ND = states[: len(talks)].reshape(len(pool), 2, -1), *np.split(states[len(talks) :], [len(first)])
        for strategy in STRATEGIES:
            order = order_of(strategy, pool_NAD, first_ND, asking.label_of(first), [p.task for p, _ in pool], seed=seed)
            curve = []
            for budget in (0, *BUDGETS):
                rated = rate([pool[i] for i in order[:budget]], f"asked-{seed}")
                kept = [place for place in order[:budget] if rate([pool[place]], f"asked-{seed}")]
                x_ND = np.concatenate([first_ND, pool_NAD[kept].reshape(-1, first_ND.shape[1])])
                y_N = asking.label_of([*first, *rated])
                curve.append(pair_accuracy((held_ND @ asking.ridge(x_ND, y_N - y_N.mean())).tolist(), held))
            model = train([*first, *rated], Path(folder) / strategy, seed)
            totals = [model.total(rating) for rating in model.score([r.messages for r in held])]
            out[strategy] = {"curve": curve, "retrained": pair_accuracy(totals, held)}
            print(f"seed {seed} {strategy}: {json.dumps(out[strategy])}", file=sys.stderr, flush=True)
    return out


def in_studio(run: Path, database: Path, strategy: str, seed: int) -> list[Rated]:
    """What three simulated annotators say in the run's studio of what a strategy asks: its export."""
    from tests.studio.conftest import Served
    from tests.studio.test_said import annotate

    store, sources = open_store(run, str(database))
    served = Served(store, sources)
    try:
        source = next(s.name for s in sources.all() if s.name.endswith("r2-answers/responses.parquet"))
        items = asking.choose_items(sources, source, RATE, num=NUM_ASKED, seed=seed, strategy=strategy)
        project = store.create_project(RATE, strategy, items, source=source, need=NUM_PEOPLE, guideline="", by=store.owner())
        for number in range(NUM_PEOPLE):
            annotate(served.client("annotator"), project, RATE, SimulatedAnnotator(World.make(), 100 * seed + number))
        path = database / "rated.parquet"
        path.write_bytes(served.client("owner").api("GET", "/export/rated.parquet")[1])
        return read_rows(path, Rated)
    finally:
        served.stop()
        store.database.close()


def of_run(run: Path, seed: int) -> dict[str, dict[str, Any]]:
    """Accuracy on the run's held-out pairs of reward models trained on what each strategy asked."""
    ratings = read_rows(run / "00-data" / "ratings.parquet", Rated)
    pairs = list(dict.fromkeys(row.pair for row in ratings))
    held_out = set(pairs[-NUM_HELD_OUT:])
    given, held = ([row for row in ratings if (row.pair in held_out) == is_held] for is_held in (False, True))
    out: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for strategy in ("nothing", *STRATEGIES):
            place = Path(folder) / strategy
            place.mkdir()
            said = [] if strategy == "nothing" else in_studio(run, place, strategy, seed)
            model = train([*given, *said], place / "model", seed, epochs=2)
            totals = [model.total(rating) for rating in model.score([r.messages for r in held])]
            out[strategy] = {"answers": len(said), "retrained": pair_accuracy(totals, held)}
            print(f"seed {seed} {strategy}: {json.dumps(out[strategy])}", file=sys.stderr, flush=True)
    return out


def summary_of_runs(found: Sequence[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Means over seeds, and the differences of retrained models to random."""
    out: dict[str, Any] = {}
    for name in found[0]:
        accuracy, base = (np.array([one[of]["retrained"] for one in found]) for of in (name, asking.RANDOM))
        out[name] = {"answers": float(np.mean([one[name]["answers"] for one in found])), "retrained": round(float(accuracy.mean()), 4)}
        if name != asking.RANDOM:
            out[name]["retrained_to_random"] = interval((accuracy - base).tolist())
    return out


def interval(differences: Sequence[float]) -> list[float]:
    """Mean and 95 % t interval."""
    n, mean = len(differences), float(np.mean(differences))
    half = T_975.get(n, 1.96) * float(np.std(differences, ddof=1)) / n**0.5 if n > 1 else float("inf")
    return [round(mean, 4), round(mean - half, 4), round(mean + half, 4)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--run", type=Path)
    args = parser.parse_args()
    world, found = World.make(), list[dict[str, dict[str, Any]]]()
    for seed in range(args.seeds):
        if args.run:
            found.append(of_run(args.run, seed))
            told = {"seeds": len(found), "strategies": summary_of_runs(found)}
        else:
            found.append(of_seed(world, seed))
            told = {"seeds": len(found), "answers": [0, *(2 * b for b in BUDGETS)], "strategies": summary(found)}
        if args.out:
            write_json(args.out, told)
    print(json.dumps(told, indent=1))


def summary(found: Sequence[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Means over seeds, and differences to random."""
    out: dict[str, Any] = {}
    for strategy in STRATEGIES:
        curves, base = (np.array([one[name]["curve"] for one in found]) for name in (strategy, asking.RANDOM))
        last, last_base = (np.array([one[name]["retrained"] for one in found]) for name in (strategy, asking.RANDOM))
        out[strategy] = {"curve": curves.mean(0).round(4).tolist(), "retrained": round(float(last.mean()), 4)}
        if strategy != asking.RANDOM:
            out[strategy]["area_to_random"] = interval((curves.mean(1) - base.mean(1)).tolist())
            out[strategy]["retrained_to_random"] = interval((last - last_base).tolist())
    return out


if __name__ == "__main__":
    main()
