"""Claims table: what the Nemotron-4 report says, the figure that runs over several seeds give for it, and whether it holds here.

A figure is measured once a seed. Its interval is Student's over the seeds, so it needs two at least, and few seeds make it wide.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gristmill.report.alignment import save_page, unbroken
from gristmill.report.comparisons import MODES, format_ci, format_score
from gristmill.report.markup import Markup, document, el, table
from gristmill.runs.reader import RunData

Runs = Mapping[str, RunData]  # of one seed, by variant
Measure = Callable[[Runs, str], float | None]  # of a mode, "greedy" or "sampled"; None where a run has no such stage
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101)
HOLDS, FAILS, OPEN = "holds", "does not hold", "cannot be told"
MODE_LABEL = {"greedy": "greedy", "sampled": "temperature 1", "": ""}


@dataclass(frozen=True)
class Claim:
    """A claim of the report.

    Attributes:
        name: what it is called on the command line.
        text: what the report says.
        figure: what is measured.
        variants: the runs that it needs.
        above: what the figure has to lie above.
        modes: in which it is measured; "" where answers are not scored.
    """

    name: str
    text: str
    figure: str
    variants: tuple[str, ...]
    measure: Measure
    above: float = 0.0
    modes: tuple[str, ...] = tuple(MODES)


# ---- what is measured ----


def _accuracy(run: RunData, stage: str, mode: str) -> float | None:
    for row in (run.results or {}).get("stages", ()):
        if row["name"] == stage:
            return float(row[mode]["overall"]["mean"])
    return None


def _last(run: RunData, mode: str) -> float:
    return float((run.results or {})["stages"][-1][mode]["overall"]["mean"])


def _between(run: RunData, after: str, before: str, mode: str) -> float | None:
    """Mean over the rounds of a stage's accuracy less another's. Stages that were left out do not count."""
    found = []
    for number in range(1, int(run.recipe.get("rounds", 0)) + 1):
        high, low = (_accuracy(run, f"r{number}-{stage}", mode) for stage in (after, before))
        if high is not None and low is not None:
            found.append(high - low)
    return sum(found) / len(found) if found else None


def _stages(after: str, before: str, variant: str = "full") -> Measure:
    return lambda runs, mode: _between(runs[variant], after, before, mode)


def _against(variant: str) -> Measure:
    return lambda runs, mode: _last(runs["full"], mode) - _last(runs[variant], mode)


def _whole(runs: Runs, mode: str) -> float | None:
    first = _accuracy(runs["full"], "demonstrations", mode)
    return None if first is None else _last(runs["full"], mode) - first


def _above_teacher(runs: Runs, mode: str) -> float | None:
    """Mean gain of each round's last model on the model that wrote its data."""
    run = runs["full"]
    ends = [_accuracy(run, "demonstrations", mode)]
    for number in range(1, int(run.recipe.get("rounds", 0)) + 1):
        names = [s["name"] for s in (run.results or {}).get("stages", ()) if s["name"].startswith(f"r{number}-")]
        ends.append(_accuracy(run, names[-1], mode) if names else None)
    steps = [b - a for a, b in zip(ends, ends[1:], strict=False) if a is not None and b is not None]
    return sum(steps) / len(steps) if steps else None


def _judges(kind: str) -> Measure:
    def measure(runs: Runs, mode: str) -> float | None:
        reward = (runs["full"].results or {}).get("reward") or {}
        if kind not in reward or kind not in reward.get("llm_judge", {}):
            return None
        return float(reward[kind]["overall"]["mean"]) - float(reward["llm_judge"][kind]["overall"]["mean"])

    return measure


def _share(runs: Runs, mode: str) -> float | None:
    return (runs["full"].results or {}).get("synthetic_share")


def _monitor(name: str) -> Measure:
    def measure(runs: Runs, mode: str) -> float | None:
        ends = [(runs[v].results or {})["collapse"][-1]["values"].get(name) for v in ("full", "replace")]
        return None if None in ends else float(ends[0]) - float(ends[1])

    return measure


def _within(name: str, text: str, figure: str, measure: Measure) -> Claim:
    return Claim(name, text, figure, ("full",), measure)


def _control(name: str, text: str, variant: str) -> Claim:
    return Claim(name, text, f"full run less {variant}", ("full", variant), _against(variant))


def _other(name: str, text: str, figure: str, variants: tuple[str, ...], measure: Measure, above: float = 0.0) -> Claim:
    return Claim(name, text, figure, variants, measure, above, ("",))


def _of_pairs(num: int) -> list[Claim]:
    name = f"pairs-{num}"
    dpo, rpo = _stages("dpo", "general-sft", name), _stages("rpo1", "dpo", name)
    return [
        Claim(f"dpo-{num}", f"DPO gains with {num} pairs", "DPO less general SFT, one round", (name,), dpo),
        Claim(f"rpo-{num}", f"RPO gains with {num} pairs", "RPO less DPO, one round", (name,), rpo),
    ]


BETTER_JUDGE = "accuracy of the reward model less the LLM judge's"
BOTH = ("full", "replace")
CLAIMS = (
    _within("loop", "The loop beats the demonstrations alone", "last model less the demonstrations' model", _whole),
    _within(
        "weak-to-strong", "A student ends above its teacher", "last model of a round less the one before it, mean of rounds", _above_teacher
    ),
    _within("dpo", "DPO improves on general SFT", "DPO less general SFT, mean of rounds", _stages("dpo", "general-sft")),
    _within("rpo", "RPO improves on DPO", "first RPO less DPO, mean of rounds", _stages("rpo1", "dpo")),
    _within("three-rpo", "Three RPO improve on one", "third RPO less the first, mean of rounds", _stages("rpo3", "rpo1")),
    _control("human-only", "Synthetic data is worth more than the human data alone", "human-only"),
    _other("synthetic-share", "Over 98 % of the alignment data is synthetic", "share of the samples", ("full",), _share, 0.98),
    _control("filter", "Judged answers teach more than unjudged ones", "unfiltered"),
    _control("filter-blind", "It is the judging, not the smaller number", "random-filter"),
    _control("verifier", "Programs judge first, the reward model where there are none", "reward-only"),
    _control("code-first", "Code SFT before general SFT beats both mixed", "mixed-sft"),
    _other("judge-easy", "A reward model judges better than an LLM: easy pairs", BETTER_JUDGE, ("full",), _judges("easy")),
    _other("judge-hard", "A reward model judges better than an LLM: hard pairs", BETTER_JUDGE, ("full",), _judges("hard")),
    _control("accumulate", "Data of all rounds beats the last round's alone", "replace"),
    _other(
        "collapse-rare", "Without human and earlier rows rare words are lost", "rare types, full less replace", BOTH, _monitor("rare_types")
    ),
    _other(
        "collapse-alike",
        "Without human and earlier rows texts grow alike",
        "distinct 4-grams, full less replace",
        BOTH,
        _monitor("distinct_4"),
    ),
    *(claim for num in (50, 100, 200, 400) for claim in _of_pairs(num)),
)


# ---- the table ----


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """Mean of a figure over seeds with Student's 95 % interval; none of fewer than two."""
    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return {"mean": round(mean, 4), "ci95": None, "n": n}
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    half = (STUDENT[n - 2] if n - 2 < len(STUDENT) else 2.1) * deviation / math.sqrt(n)
    return {"mean": round(mean, 4), "ci95": [round(mean - half, 4), round(mean + half, 4)], "n": n}


def verdict(figure: Mapping[str, Any], above: float) -> str:
    """Whether an interval lies above a value, below it, or holds it."""
    if figure["ci95"] is None:
        return OPEN
    low, high = figure["ci95"]
    return HOLDS if low > above else FAILS if high < above else OPEN


def measure_claims(claims: Sequence[Claim], seeds: Mapping[int, Runs]) -> list[dict[str, Any]]:
    """A row a claim and mode: {"claim", "text", "figure", "mode", "above", "seeds": {seed: value}, "mean", "ci95", "n", "verdict"}.

    Args:
        seeds: the finished runs of each seed, by variant. A claim takes the seeds that have all its runs.
    """
    rows = []
    for claim in claims:
        for mode in claim.modes:
            found = {seed: claim.measure(runs, mode) for seed, runs in seeds.items() if all(v in runs for v in claim.variants)}
            values = {seed: round(value, 4) for seed, value in found.items() if value is not None}
            figure = over_seeds(list(values.values())) if values else {"mean": None, "ci95": None, "n": 0}
            told = {"claim": claim.name, "text": claim.text, "figure": claim.figure, "mode": MODE_LABEL[mode], "above": claim.above}
            rows.append({**told, "seeds": values, **figure, "verdict": verdict(figure, claim.above)})
    return rows


HEAD = ("claim of the report", "here", "figure", "answers", "mean [95 % over seeds]", "each seed")


def _cells(row: Mapping[str, Any]) -> list[str]:
    """A row's cells under `HEAD`."""
    if row["mean"] is None:
        return [row["text"], row["verdict"], row["figure"], row["mode"], "no figure", ""]
    sign = "+" if row["above"] == 0 else ""
    mean, *seeds = [format(value, f"{sign}.3f") for value in (row["mean"], *row["seeds"].values())]
    interval = "" if row["ci95"] is None else f" {format_ci(row, sign)}"
    above = "" if row["above"] == 0 else f" (above {format_score(row['above'])})"
    return [row["text"], row["verdict"], row["figure"] + above, row["mode"], mean + interval, ", ".join(seeds)]


def claims_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table as Markdown."""
    lines = [HEAD, tuple("---" for _ in HEAD), *(tuple(_cells(row)) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def claims_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table for a terminal: verdict, figure and claim."""
    return [f"{told:<15} {mean:<28} {mode:<13} {text}" for text, told, _, mode, mean, _ in map(_cells, rows)]


def write_claims(folder: Path, rows: Sequence[Mapping[str, Any]], what: str) -> Path:
    """The table as a page, and as Markdown beside it. Returns the page's path; `what` says which runs it is of."""
    save_page(folder / "claims.md", claims_markdown(rows))
    head = el("p", "gristmill claims", class_="eyebrow"), el("h1", "What holds here"), el("p", what, class_="soft")
    holds, fails, unknown = (sum(row["verdict"] == word for row in rows) for word in (HOLDS, FAILS, OPEN))
    counts = f"Of {len(rows)} figures {holds} hold, {fails} do not, and {unknown} cannot be told."
    words = (
        "A figure is measured once a seed; its interval is Student's over the seeds. It holds where the interval lies above 0 (or the "
        "value named), does not where it lies below, and cannot be told where it does neither. Written from the files of the runs."
    )
    body = el("main", el("p", counts, class_="soft"), table(HEAD, [_row(row) for row in rows], numeric_from=len(HEAD)))
    page = document("gristmill: claims", el("header", head, class_="top"), body, el("footer", words))
    return save_page(folder / "report.html", page)


def _row(row: Mapping[str, Any]) -> list[Markup | str]:
    text, told, figure, *numbers = _cells(row)
    css = "up" if told == HOLDS else "down" if told == FAILS else None
    return [
        text,
        el("td", told.replace(" ", "\u00a0"), class_=css),
        figure,
        *(unbroken(n).replace("temperature ", "temperature\u00a0") for n in numbers),
    ]
