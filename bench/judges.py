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
import sys
from pathlib import Path
from typing import Any

from gristmill.data.rows import read_records
from gristmill.evaluate import arena_hard, judge_agreement, mt_bench, reward_bench
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
    prompts = sum(len(mt_bench.grading_prompt(q, ["", ""], turn)[1].content) for q in questions for turn in (0, 1))
    right = (len(questions), set(by_category.values()), sum(bool(q.references) for q in questions)) == (80, {10}, 30)
    return {"questions": len(questions), "categories": by_category, "references": said, "prompt_characters": prompts, "as_published": right}


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
    args = parser.parse_args()
    parts = {"arena_hard": arena, "mt_bench": mt, "pandalm": pandalm, "llmbar": llmbar}
    report = {name: part(args.data / name) for name, part in parts.items() if (args.data / name).is_dir()}
    report["rewardbench"] = rewards()
    if args.replies:
        report["replies"] = replies(args.replies)
    print(json.dumps(report))
    sys.exit(not all(part.get("as_published", True) for part in report.values()))


if __name__ == "__main__":
    main()
