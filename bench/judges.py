"""Judged benchmarks against published numbers and files that cannot be shipped.

    PYTHONPATH=src python bench/judges.py --data DIR

DIR holds mt_bench, arena_hard, llmbar and pandalm as their repositories publish them (a folder that is missing is left out). Prints one
line of JSON: style features of gpt-4-0314's Arena-Hard answers, the arithmetic of Arena-Hard's leaderboard, what MT-Bench's files hold,
agreement of PandaLM's three people, LLMBar's subsets, and RewardBench's published means from their categories. Exits 1 where one differs.

`--replies FILE` (JSONL with judgment and score, as FastChat's model_judgment): in how many real replies our parser and FastChat's find
another rating than is stored.
"""

import argparse
import csv
import json
import random
import sys
from pathlib import Path
from typing import Any

from gristmill.data.rows import read_records
from gristmill.evaluate import alpaca_eval, arena_hard, judge_agreement, mt_bench, reward_bench
from gristmill.evaluate.model_answers import read_answers

# Categories and overall scores that were printed for RewardBench (HelpSteer2, table 3), prior sets last.
PUBLISHED = {
    "Nemotron-4-340B-Reward": (92.0, 95.8, 87.1, 91.5, 93.7),
    "Cohere May 2024": (89.5, 96.4, 71.3, 92.7, 97.7),
    "Llama-3-70B RM (HelpSteer2)": (88.8, 91.3, 80.3, 92.8, 90.7),
    "Gemini 1.5 Pro-0514": (88.1, 92.3, 80.6, 87.5, 92.0),
    "GPT-4-0125-preview": (85.9, 95.3, 74.3, 87.2, 86.9),
    "GPT-4o-0513": (84.7, 96.6, 70.4, 86.7, 84.9),
    "Claude-3-Opus-0229": (80.7, 94.7, 60.3, 89.1, 78.7),
    "Llama-3-70B-Instruct": (76.0, 97.6, 58.9, 69.2, 78.5),
}


def arena(data: Path) -> dict[str, Any]:
    found = read_answers(data / "v0.1" / "answers_gpt-4-0314.jsonl")
    styles = [arena_hard.style_of(texts[0]) for texts in found.by_question.values()]
    sums = [sum(style[i] for style in styles) for i in range(4)]
    with (data / "v0.1" / "leaderboard_20240731.csv").open() as file:
        rows = list(csv.DictReader(file))
    told = [tuple(float(part) for part in row["CI"].strip("()").split(",")) for row in rows]
    own = [(float(row["rating_q025"]) - float(row["score"]), float(row["rating_q975"]) - float(row["score"])) for row in rows]
    same = sum(all(abs(a - b) < 0.011 for a, b in zip(x, y, strict=True)) for x, y in zip(told, own, strict=True))
    baseline = next(row for row in rows if row["model"] == "gpt-4-0314")
    games = arena_hard.battle_scores("B>A", "A>>B")
    equal = arena_hard.win_rate(
        [arena_hard.Battle(str(i), "m", "b", arena_hard.battle_scores(v, v)) for i, v in enumerate(arena_hard.SCORES)]
    )
    questions = {version: len(arena_hard.read_questions(data / version)) for version in ("v0.1", "v2.0")}
    return {
        "questions": questions,
        "style": dict(zip(("answers", "headers", "lists", "bold"), (len(styles), *sums[1:]), strict=True)),
        "mean_words_and_marks": round(sums[0] / len(styles), 1),
        "leaderboard": {"rows": len(rows), "intervals_equal": same, "baseline": float(baseline["score"])},
        "worked_case": list(games),
        "equal_models": equal["mean"],
        "as_published": sums[1:] == [9, 2572, 45] and same == len(rows) and games == (1, 1, 1, 1) and equal["mean"] == 50.0,
    }


def mt(data: Path) -> dict[str, Any]:
    questions, said = mt_bench.read_questions(data)
    by_category = {c: sum(q.category == c for q in questions) for c in dict.fromkeys(q.category for q in questions)}
    prompts = sum(len(mt_bench.grading_prompt(q, ["", ""], turn)[-1].content) for q in questions for turn in (0, 1))
    right = (len(questions), set(by_category.values()), sum(bool(q.references) for q in questions)) == (80, {10}, 30)
    graded = [(q, turn) for q in questions if q.references for turn in (0, 1)]
    shown = [all(q.references[t] in mt_bench.grading_prompt(q, ["", ""], turn)[-1].content for t in range(turn + 1)) for q, turn in graded]
    others = {q.id: q.references for q in mt_bench.read_questions(data, data / "reference_gpt-4_uncorrected.jsonl")[0]}
    rewritten = sum(q.references != others[q.id] for q in questions if q.references)
    told = {"questions": len(questions), "categories": by_category, "references": said, "unlike_uncorrected": rewritten}
    told |= {"gradings_that_show_them": sum(shown), "prompt_characters": prompts}
    return {**told, "as_published": right and said.startswith("corrected") and (rewritten, sum(shown)) == (30, 60)}


def length_control(num: int) -> dict[str, Any]:
    """The largest difference, in points of 100, from the estimator of alpaca_eval."""
    worst, rates = 0.0, []
    for seed in range(num):
        draw = random.Random(seed)
        hard = [draw.gauss(0, 1) for _ in range(805)]
        strength, effect, own, longer = draw.uniform(-2, 1), draw.uniform(-0.5, 2), draw.uniform(-1, 1), draw.uniform(-500, 1500)
        lengths = [(round(draw.lognormvariate(7.4, 0.5)), max(1, round(draw.lognormvariate(7.4, 0.5) + longer))) for _ in hard]
        spread = (longer**2 + 1e6) ** 0.5
        logits = [strength + own * h + effect * (b - a) / spread + draw.gauss(0, 2) for h, (a, b) in zip(hard, lengths, strict=True)]
        points = [float(alpaca_eval._sigmoid(z)) for z in logits]
        gamed = [(float(draw.random() < 0.1 + 0.1 * i), draw.gauss(-0.7 * i, 0.5), hard[k]) for i in (0, 1) for k in range(805)]
        ours, _ = alpaca_eval.length_controlled(points, lengths, alpaca_eval.Difficulty(hard, gamed))
        assert ours is not None
        theirs = by_scikit_learn(points, lengths, hard, gamed)
        worst = max(worst, abs(ours - theirs))
        rates.append([round(100 * sum(points) / len(points), 2), ours, round(theirs, 2)])
    return {"draws": num, "win_rate_ours_theirs": rates, "largest_difference": round(worst, 3), "as_published": worst < 0.1}


def by_scikit_learn(points: list[float], lengths: list[tuple[int, int]], hard: list[float], gamed: list[Any]) -> float:
    """The length-controlled win rate as alpaca_eval computes it: each row once as a win and once as a loss, weighted by its preference."""
    import numpy as np
    import sklearn
    from sklearn.linear_model import LogisticRegressionCV
    from sklearn.metrics import make_scorer
    from sklearn.model_selection import GroupKFold

    sklearn.set_config(enable_metadata_routing=True)
    delta = np.array([a - b for a, b in lengths], float)
    own = np.stack([np.tanh(delta / delta.std(ddof=1)), np.array(hard), np.ones(len(hard))], 1)
    other = np.array(gamed)
    x = np.concatenate([np.stack([np.tanh(other[:, 1]), other[:, 2], np.zeros(len(other))], 1), own])
    share = np.concatenate([other[:, 0], points])
    weight = np.concatenate([np.full(len(other), 0.1), np.ones(len(points))])
    twice, weights = np.concatenate([share, 1 - share]), np.concatenate([weight, weight])

    def loss(y: Any, p: Any, true_prob: Any, true_sample_weight: Any) -> float:
        y, p = np.where(y == 1, true_prob, 1 - true_prob), np.clip(p, 1e-15, 1 - 1e-15)
        return float(-np.mean((y * np.log(p) + (1 - y) * np.log(1 - p)) * true_sample_weight))

    scorer = make_scorer(loss, response_method="predict_proba", greater_is_better=False)
    scorer = scorer.set_score_request(true_sample_weight=True, true_prob=True)
    settings: dict[str, Any] = {"random_state": 123, "solver": "liblinear", "fit_intercept": False}
    model = LogisticRegressionCV(cv=GroupKFold(n_splits=5), scoring=scorer, l1_ratios=(1.0,), use_legacy_attributes=False, **settings)
    model.set_fit_request(sample_weight=True)
    groups, y = np.tile(np.arange(len(x)), 2), np.repeat([1, 0], len(x))
    told = {"sample_weight": twice * weights, "groups": groups, "true_sample_weight": weights, "true_prob": twice}
    model.fit(np.concatenate([x, x]), y, **told)
    own[:, 0] = 0
    return 100 * float(model.predict_proba(own)[:, 1].mean())


def replies(path: Path) -> dict[str, Any]:
    rows = read_records(path)
    scores = [None if row["score"] == -1 else float(row["score"]) for row in rows]
    ours = [mt_bench.parse_rating(row["judgment"]) for row in rows]
    theirs = [mt_bench.parse_rating_as_fastchat(row["judgment"]) for row in rows]
    return {
        "replies": len(rows),
        "fastchat_unlike_stored": sum(a != b for a, b in zip(theirs, scores, strict=True)),
        "ours_unlike_stored": sum(a != b for a, b in zip(ours, scores, strict=True)),
        "unreadable": {"ours": ours.count(None), "fastchat": theirs.count(None)},
    }


def pandalm(data: Path) -> dict[str, Any]:
    pairs = judge_agreement.read_labelled_pairs(data)
    found = judge_agreement.people_agreement(pairs)
    right = found["alpha"] == 0.864221 and sorted(found["kappas"]) == [0.852023, 0.861661, 0.878944]
    labels = {label: sum(p.label == label for p in pairs) for label in ("first", "tie", "second")}
    return {"pairs": len(pairs), **found, "labels": labels, "as_published": right}


def llmbar(data: Path) -> dict[str, Any]:
    items = reward_bench.read_benchmarks(data)
    counts = {s: sum(i.subset == s for i in items) for s in dict.fromkeys(i.subset for i in items)}
    longer = sum(len(i.chosen[0]) > len(i.rejected[0]) for i in items)
    return {
        "items": len(items),
        "subsets": counts,
        "longer_is_better": round(longer / len(items), 4),
        "as_published": counts == reward_bench.LLMBAR,
    }


def rewards() -> dict[str, Any]:
    means = {name: reward_bench.overall_score([c / 100 for c in categories]) for name, (_, *categories) in PUBLISHED.items()}
    same = {name: abs(100 * mean - PUBLISHED[name][0]) < 0.0501 for name, mean in means.items() if mean is not None}
    prior = reward_bench.overall_score([c / 100 for c in PUBLISHED["Nemotron-4-340B-Reward"][1:]], 0.674)
    return {
        "models": len(same),
        "mean_340b": means["Nemotron-4-340B-Reward"],
        "with_priors_340b": prior,
        "equal": sum(same.values()),
        "as_published": all(same.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--replies", type=Path)
    parser.add_argument("--length-control", type=int, default=0, metavar="N")
    args = parser.parse_args()
    parts = {"arena_hard": arena, "mt_bench": mt, "pandalm": pandalm, "llmbar": llmbar}
    report = {name: part(args.data / name) for name, part in parts.items() if (args.data / name).is_dir()}
    report["rewardbench"] = rewards()
    if args.length_control:
        report["length_control"] = length_control(args.length_control)
    if args.replies:
        report["replies"] = replies(args.replies)
    print(json.dumps(report))
    sys.exit(not all(part.get("as_published", True) for part in report.values()))


if __name__ == "__main__":
    main()
