"""Report sections on data and judges: funnel, reward scores, reward model, collapse monitors."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gristmill.evaluate.diversity import LEVELS, POINTS
from gristmill.report.comparisons import format_ci, format_score, short_label
from gristmill.report.figures import accuracy_bars, funnel, histogram, monitor_plot
from gristmill.report.markup import Markup, el, table
from gristmill.report.samples import JudgedStage
from gristmill.runs import artifacts
from gristmill.runs.artifacts import AnyArtifact
from gristmill.runs.reader import RunData
from gristmill.runs.stage_names import round_of

# What each monitor tells, for a person.
MONITORS = {
    "distinct_4": ("distinct-4", "different 4-grams over all; falls when phrases repeat"),
    "self_bleu": ("self-BLEU", "how much answers copy each other, 0 to 100; rises"),
    "compression": ("compression", "bytes over gzip bytes; rises with repetition"),
    "rare_types": ("rare types", "share of people's rare words still used; falls"),
    "human_nll": ("human text", "nats a token of people's answers under the model; rises when it forgets them"),
    "base_nll": ("samples under Base", "nats a token of its answers under Base; falls when only the likeliest is written"),
}


def _of_round(data: RunData, number: int, artifact: AnyArtifact) -> list[dict[str, Any]]:
    return [s for s in data.stages_with(artifact) if round_of(s["name"]) == number]


def rounds_of(data: RunData) -> list[int]:
    """Rounds that have begun, from 1."""
    return sorted({round_of(s.get("name", "")) for s in data.stages} - {0})


# ---- the funnel ----


def funnel_section(data: RunData) -> list[Markup]:
    """Data funnel: from written prompts to training rows, a round at a time."""
    pictures, tables = [], []
    for number in rounds_of(data):
        rows = _funnel_rows(data, number)
        if rows:
            pictures.append(el("div", el("p", f"Round {number}", class_="title"), funnel(rows), class_="figure"))
        tables += _funnel_tables(data, number)
    if not pictures:
        return [el("p", "No prompts have been written in this run.", class_="soft")]
    return [el("div", pictures, class_="grid funnels"), el("details", el("summary", "By task and stage"), tables)]


def _funnel_rows(data: RunData, number: int) -> list[tuple[str, int, str]]:
    rows: list[tuple[str, int, str]] = []
    for done in _of_round(data, number, artifacts.PROMPTS):
        counts = done["funnel"]
        rows.append(("Prompts", 0, ""))
        rows += [(k, counts[k], "fill") for k in ("from file", "written") if counts.get(k)]
        rows += [(k, n, "fill2") for k, n in counts.items() if k not in ("from file", "written", "kept") and n]
        rows.append(("kept", counts["kept"], "fill"))
    for done in _of_round(data, number, artifacts.KEPT):
        counts = list(done["funnel"].values())
        rows += [("Answers for SFT", 0, ""), ("prompts", sum(c["prompts"] for c in counts), "fill")]
        rows += [(k, sum(c[k] for c in counts), "fill") for k in ("answers", "good", "repaired", "kept") if counts and k in counts[0]]
    pairs = _of_round(data, number, artifacts.PAIRS)
    if pairs:
        total: dict[str, int] = {}
        for done in pairs:
            for why, n in done["funnel"].items():
                total[why] = total.get(why, 0) + n
        rows += [("Preference pairs", 0, ""), ("prompts asked", sum(total.values()), "fill")]
        rows += [(why, n, "fill2") for why, n in total.items() if why != "pairs"]
        rows.append(("pairs", total.get("pairs", 0), "fill"))
    return rows


def _funnel_tables(data: RunData, number: int) -> list[Markup]:
    out = []
    for done in _of_round(data, number, artifacts.KEPT):
        rows = []
        for task, c in done["funnel"].items():
            judges = ", ".join(f"{k} {n:,}" for k, n in c["judge"].items())
            scores = " \u2192 ".join("\u2013" if c[k] is None else f"{c[k]:.2f}" for k in ("score_before", "score_after"))
            rows.append(
                [
                    task,
                    f"{c['prompts']:,}",
                    f"{c['answers']:,}",
                    f"{c['good']:,} ({_share(c['good'], c['answers'])})",
                    *([f"{c['repaired']:,}"] if "repaired" in c else []),
                    f"{c['kept']:,}",
                    judges,
                    scores,
                ]
            )
        repaired = [c["repaired_kept"] for c in done["funnel"].values() if "repaired_kept" in c]
        out.append(el("h3", f"Round {number}: answers for SFT"))
        names = ["task", "prompts", "answers", "good", *(["repaired"] if repaired else []), "kept", "judged by"]
        out.append(table([*names, "mean score, all \u2192 kept"], rows))
        counts: Counter[str] = sum(map(Counter, repaired), Counter())
        if counts:
            out.append(table(["repaired for", "kept"], [[name, f"{n:,}"] for name, n in counts.most_common()]))
    pairs = _of_round(data, number, artifacts.PAIRS)
    if pairs:
        reasons = list(dict.fromkeys(why for s in pairs for why in s["funnel"] if why != "pairs"))
        rows = []
        for s in pairs:
            lists = [", ".join(f"{k} {n:,}" for k, n in s[key].items()) for key in ("tasks", "judges")]
            rows.append([short_label(s["name"]), f"{s['pairs']:,}", *(f"{s['funnel'].get(why, 0):,}" for why in reasons), *lists])
        out.append(el("h3", f"Round {number}: preference pairs"))
        out.append(table(["stage", "pairs", *reasons, "tasks", "decided by"], rows))
    return out


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else "\u2013"


# ---- reward scores ----


def scores_section(judged: Sequence[JudgedStage]) -> list[Markup]:
    """Histograms of the reward model's score over all answers, and over those that were kept."""
    sft = [s for s in judged if not s.makes_pairs]
    every = [stage.score_N[np.isfinite(stage.score_N)] for stage in sft]
    every = [scores for scores in every if scores.size]
    if not every:
        return [el("p", "No answers have been scored in this run.", class_="soft")]
    low, high = float(min(scores.min() for scores in every)), float(max(scores.max() for scores in every))
    legend = el(
        "p",
        el("span", el("i", style="background:var(--soft);opacity:.5"), "all answers"),
        el("span", el("i", style="background:var(--greedy)"), "kept for SFT"),
        el("span", "dashed: means"),
        class_="legend",
    )
    out = [legend]
    for stage in sft:
        scored_N = np.isfinite(stage.score_N)
        figures = []
        for task in (None, *dict.fromkeys(stage.task_N[scored_N].tolist())):
            mine_N = scored_N if task is None else scored_N & (stage.task_N == task)
            before, after = stage.score_N[mine_N], stage.score_N[mine_N & stage.kept_N]
            kept = f"{len(after):,} kept, mean {_mean(after)}" if after.size else "none kept"
            sub = f"{len(before):,} answers, mean {_mean(before)}; {kept}"
            title = [el("p", "all tasks" if task is None else stage.tasks[task], class_="title"), el("p", sub, class_="sub")]
            figures.append(el("div", title, histogram(before, after, low=low, high=high), class_="figure"))
        out += [el("h3", f"Round {round_of(stage.name)}"), el("div", figures, class_="grid")]
    return out


def _mean(values: np.ndarray) -> str:
    return f"{math.fsum(values) / len(values):.2f}" if len(values) else "\u2013"


# ---- the reward model ----


def reward_section(report: Mapping[str, Any]) -> list[Markup]:
    """Reward model evaluation: pair accuracy by category beside the LLM judge, and agreement with annotators by attribute."""
    if not report:
        return [el("p", "The reward model has not been measured in this run.", class_="soft")]
    bars, rows = [], []
    for kind in ("easy", "hard"):
        judge = report["llm_judge"][kind]
        for category, score in report[kind].items():
            other = judge.get(category)
            if category == "overall" and score["n"]:
                bars += [(f"{kind}: reward model", score, "fill"), (f"{kind}: LLM judge", other, "fill3")]
            rows.append([f"{kind}: {category}", score["n"], _accuracy(score), _accuracy(other)])
    verdicts = "; ".join(
        f"{k}: " + ", ".join(f"{v} {n}" for v, n in report["llm_judge"][k].get("verdicts", {}).items()) for k in ("easy", "hard")
    )
    correlations = [
        [name, "\u2013" if r is None else el("td", f"{r:+.3f} ", _bar(abs(r)), class_="num")] for name, r in report["correlation"].items()
    ]
    return [
        *([el("div", accuracy_bars(bars), class_="figure medium")] if bars else []),
        table(["pairs", "n", "reward model", "LLM judge"], rows),
        el(
            "p",
            f"LLM judge's verdicts when the better answer is called first: {verdicts}. A tie or an unreadable reply counts half.",
            class_="note",
        ),
        el("h3", "Correlation with held-out annotators"),
        table(["attribute", "Pearson r"], correlations, medium=True),
    ]


def _accuracy(score: Mapping[str, Any] | None) -> Markup | str:
    if not score or not score["n"]:
        return "\u2013"
    if "ci95" not in score:
        return format_score(score["mean"])
    return el("td", el("b", format_score(score["mean"]), " "), el("small", format_ci(score)), class_="num")


def _bar(share: float) -> Markup:
    return el("span", class_="bar", style=f"width:{100 * min(1.0, share):.0f}px")


# ---- collapse ----


def collapse_section(data: RunData) -> list[Markup]:
    """Collapse monitors over the rounds, with the level at which it alarms."""
    found = [s for s in data.stages if "alarms" in s]
    if not found:
        return [el("p", "No monitor has been read yet in this run.", class_="soft")]
    labels = [f"round {round_of(s['name'])}" if round_of(s["name"]) else "start" for s in found]
    alarms = [
        f"{label}: {', '.join(MONITORS.get(a, (a,))[0] for a in s['alarms'])}"
        for label, s in zip(labels, found, strict=True)
        if s["alarms"]
    ]
    stop = data.recipe.get("collapse", {}).get("stop")
    rule = f" The run stops when {stop} alarm at once." if stop else ""
    words = f"Alarms: {'; '.join(alarms)}." if alarms else "No monitor has alarmed."
    figures = []
    for name in [n for n in MONITORS if n in found[0]["values"]]:
        pairs = [
            (label, s["values"][name]) for label, s in zip(labels, found, strict=True) if math.isfinite(s["values"].get(name, math.nan))
        ]
        title, sub = MONITORS[name]
        lost = el("span", " not a number", class_="chip bad") if len(pairs) < len(found) else None
        level, falls = alarm_level(name, found[0]["values"][name])
        picture = monitor_plot([p for p, _ in pairs], [v for _, v in pairs], level=level, falls=falls) if pairs else None
        figures.append(el("div", el("p", title, lost, class_="title"), el("p", sub, class_="sub"), picture, class_="figure"))
    budget = found[0]["values"].get("tokens")
    equal = f" Every text set was cut to {budget:,.0f} tokens." if budget else ""
    return [el("p", words + rule + equal, class_="soft"), el("div", figures, class_="grid")]


def alarm_level(name: str, first: float) -> tuple[float | None, bool]:
    """Where a monitor alarms, given its first value, and whether that is below."""
    level = LEVELS.get(name)
    if level is None or not math.isfinite(first):
        return None, False
    return (first + level, False) if name in POINTS else (first * level, level < 1)
