"""HTML report of an alignment run: one file that opens from disk, loads nothing, runs no script, and says plainly what did not improve."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from gristmill.core.io import write_text
from gristmill.report.answers import answers_section
from gristmill.report.comparisons import (
    MODES,
    Comparison,
    baseline_comparisons,
    differences_by_task,
    format_ci,
    format_difference,
    format_score,
    model_stages,
    paired_difference,
    prompt_tasks,
    reward_report,
    short_label,
    shortfalls,
    significance,
    stage_label,
)
from gristmill.report.figures import Series, stage_plot
from gristmill.report.markup import Markup, alarm_banners, banner, document, el, table
from gristmill.report.measurements import HEADING_OF, LEAD, SECTION_OF, measurements_section, write_measurement_pages
from gristmill.report.people import LEAD as LEAD_OF_PEOPLE
from gristmill.report.people import has_people, people_section
from gristmill.report.samples import read_judged, samples_section
from gristmill.report.sections import collapse_section, funnel_section, reward_section, scores_section
from gristmill.report.summary import best_lines, doubts, duration, headline, lora_update
from gristmill.report.training import training_section
from gristmill.runs.reader import RunData, read_run
from gristmill.runs.stage_names import baselines, is_single_task, round_of

CONTROLS = {
    "unfiltered": "Answers are kept as they come, no judge decides.",
    "random-filter": "As many answers are kept as the judge would keep, drawn blindly.",
    "reward-only": "The reward model is the only judge, no verifier helps it.",
    "human-only": "No synthetic data, only what people wrote.",
    "replace": "Synthetic data replaces the human data and that of earlier rounds instead of joining it.",
}
HEADING = {
    "stages": "Stages",
    "data": "Data funnel",
    "scores": "Reward scores",
    "judge": "Reward model",
    "collapse": "Collapse",
    "answers": "Answers side by side",
    "samples": "Samples",
    "training": "Training",
    "time": "Time",
    "recipe": "Recipe",
}


def write_report(folder: Path) -> Path:
    """Write `report.html` into a run's folder, finished or not. Returns its path.

    Raises:
        InputError: the folder holds no run or one of another kind, or the page cannot be written.
    """
    data = read_run(folder, kind="alignment")
    judged = read_judged(data)
    samples = samples_section(data, judged) or [el("p", "No rows have been made in this run.", class_="soft")]
    bodies: dict[str, tuple[str, Sequence[Markup | None]]] = {
        "stages": ("Accuracy on held-out prompts: greedy, and at temperature 1, with 95 % intervals.", _stages(data)),
        **{kind: (LEAD[kind], measurements_section(data, kind)) for kind, key in SECTION_OF.items() if data.recipe.get(key)},
        **({"people": (LEAD_OF_PEOPLE, people_section(data))} if has_people(data) else {}),
        "data": ("What each round wrote, what was refused, and what became training data.", funnel_section(data)),
        "scores": ("The reward model's weighted score of every answer, and of those that were kept.", scores_section(judged)),
        "judge": (
            "Which of two answers is better? Easy pairs are people's ratings far apart, hard ones a model's own right and wrong.",
            _judge(data),
        ),
        "collapse": (
            "Is the text losing its variety? The shaded side of each dashed line is where the monitor alarms.",
            collapse_section(data),
        ),
        "answers": (
            "Evaluation questions with the greedy answers of all models; `gristmill answers` shows any other.",
            answers_section(data),
        ),
        "samples": (
            "Rows as they are, drawn by the run's seed, with the way they came. The links work while `gristmill studio` has this run open.",
            samples,
        ),
        "training": ("The loss of every stage that trains, over its steps.", _training(data)),
        "time": ("Seconds a stage, training speed, and the most memory that the process had held by then.", _times(data)),
        "recipe": ("Every setting of this run.", [el("pre", yaml.safe_dump(data.recipe, sort_keys=False, allow_unicode=True))]),
    }
    heading = HEADING | HEADING_OF | {"people": "People"}
    links = el("nav", el("div", [el("a", heading[k], href=f"#{k}") for k in bodies]), aria_label="Sections")
    sections = [el("section", el("h2", heading[k]), el("p", lead, class_="soft"), body, id=k) for k, (lead, body) in bodies.items()]
    name = str(data.recipe.get("name", folder.name))
    write_measurement_pages(data)
    main = el("main", _cards(data), _headline(data), _shortfalls(data), sections)
    return save_page(folder / "report.html", document(f"gristmill: {name}", _top(data, name), links, main, footer()))


def save_page(path: Path, page: str) -> Path:
    """Write a page so that the file is the old one or the whole new one.

    Raises:
        InputError: the file cannot be written.
    """
    write_text(path, page)
    return path


def footer(differences: str = "the paired normal one (same prompts)") -> Markup:
    """What every page ends with; `differences` names their interval."""
    words = (
        f"Intervals of accuracies are Wilson's, of differences {differences}, all at 95 %. Where many models are compared, "
        "about one comparison in twenty excludes 0 by chance alone. Written by gristmill from the files of the run folder."
    )
    return el("footer", words)


def _top(data: RunData, name: str) -> Markup:
    recipe, results = data.recipe, data.results
    done = sum("fingerprint" in s for s in data.stages)
    state = f"finished in {duration(results['seconds'])}" if results else f"not finished: {done} stages are done"
    facts = [
        f"seed {recipe.get('seed')}",
        f"{recipe.get('rounds')} rounds",
        f"Base: {recipe.get('model')}",
        f"chat format: {(results or recipe).get('chat_format') or 'auto'}",
        f"data: {recipe.get('world') or 'own files'}",
        state,
    ]
    control = recipe.get("control")
    banners = []
    if control:
        banners.append(banner(f"This is a control: {control}. ", CONTROLS.get(control, "")))
    if not results:
        banners.append(banner("This run is not finished. ", "The page shows what there is; run the same command again to continue."))
    elif results.get("stopped"):
        banners.append(banner("Stopped before its end. ", results["stopped"]))
    banners += alarm_banners(results)
    banners += [banner(head, words) for head, words in doubts(results or {})]
    eyebrow = f"gristmill {'control run' if control else 'run'}"
    return el(
        "header", el("p", eyebrow, class_="eyebrow"), el("h1", name), el("p", " \u00b7 ".join(facts), class_="soft"), banners, class_="top"
    )


# ---- the headline ----


def _cards(data: RunData) -> Markup | None:
    models = model_stages(data)
    cards = []
    if models:
        first, last = models[0], models[-1]
        figures = []
        for mode in MODES:
            old, new = (format_score(m[mode]["overall"]["mean"]) for m in (first, last))
            d = paired_difference(data, first["folder"], last["folder"], mode=mode) if len(models) > 1 else None
            big = el("p", el("small", f"{old} \u2192 ") if d else None, new, class_="big")
            figures.append(el("div", el("p", mode, class_="label"), big, el("p", _change(d)) if d else None))
        label = (
            f"{_first(first['name'])} \u2192 {stage_label(last['name'])}" if len(models) > 1 else f"Accuracy: {stage_label(first['name'])}"
        )
        cards.append(el("div", el("p", label, class_="title"), el("div", figures, class_="row"), class_="card"))
    report = reward_report(data)
    if report:
        figures = []
        for kind in ("easy", "hard"):
            score, other = report[kind]["overall"], report["llm_judge"][kind]["overall"]
            words = [f"LLM judge {format_score(other['mean'])}", el("br"), f"n {score['n']}"] if score["n"] else "no pairs"
            figures.append(
                el(
                    "div",
                    el("p", kind, class_="label"),
                    el("p", format_score(score["mean"]) if score["n"] else "\u2013", class_="big"),
                    el("p", words),
                )
            )
        cards.append(el("div", el("p", "Reward model: pair accuracy", class_="title"), el("div", figures, class_="row"), class_="card"))
    if data.results:
        results = data.results
        samples = results["alignment_samples"]
        words = f"{samples['synthetic']:,} synthetic and {samples['human']:,} human samples"
        alarms = sum(len(c["alarms"]) for c in results["collapse"])
        alarm = el(
            "p",
            f"{alarms} collapse alarm{'' if alarms == 1 else 's'}" if alarms else "no collapse alarm",
            class_="down" if alarms else "soft",
        )
        share = el("p", f"{results['synthetic_share']:.1%}", class_="big")
        cards.append(el("div", el("p", "Synthetic share of alignment data", class_="title"), share, el("p", words), alarm, class_="card"))
    return el("div", cards, class_="cards") if cards else None


def _first(name: str) -> str:
    return "As given" if name == "base" else f"{stage_label(name).capitalize()} only"


def _headline(data: RunData) -> Markup | None:
    if not data.results:
        return None
    lines = [*headline(data.results, data.folder), *best_lines(data.results, data.folder)]
    return el("ul", [el("li", unbroken(line)) for line in lines], class_="lines")


def _shortfalls(data: RunData) -> Markup | None:
    """What did not improve, above every chart."""
    if len(model_stages(data)) < 2:
        return None
    found = shortfalls(data)
    if not found:
        return el(
            "div", el("p", "Every model improved on the one before it, beyond its interval, greedy and sampled."), class_="plain fine"
        )
    return el("div", el("h3", "What did not improve"), el("ul", [el("li", unbroken(s)) for s in found]), class_="plain")


def unbroken(text: str) -> str:
    """Text whose intervals stay on one line."""
    return re.sub(r"\[[^\]]*\]", lambda m: m[0].replace(" ", "\u00a0"), text)


def _change(d: Mapping[str, Any]) -> Markup:
    """A difference, coloured only when its interval excludes 0."""
    css = {1: "up", -1: "down", 0: "flat"}[significance(d)]
    return el("span", format_difference(d), class_=css)


# ---- stages ----


def _stages(data: RunData) -> list[Markup]:
    models = model_stages(data)
    if not models:
        return [el("p", "No model has been trained and evaluated yet.", class_="soft")]
    rounds = [round_of(m["name"]) for m in models]
    names = ["SFT" if m["name"] == "demonstrations" else short_label(m["name"]) for m in models]
    hollow = frozenset(i for i, m in enumerate(models) if is_single_task(m["name"]))
    tasks = [t for t in models[0]["greedy"] if t != "overall"]

    def curves(task: str) -> list[Series]:
        return [Series(mode, [m[mode][task] for m in models], hollow) for mode in MODES]

    legend = el(
        "p",
        el("span", el("i", style="background:var(--greedy)"), "greedy"),
        el("span", el("i", style="background:var(--sampled)"), "sampled at temperature 1"),
        el("span", "hollow: code SFT, which trains on code alone") if hollow else None,
        class_="legend",
    )
    whole = el("div", el("p", "All tasks", class_="title"), legend, stage_plot(names, rounds, curves("overall")), class_="figure wideplot")
    small = [el("div", el("p", t, class_="title"), stage_plot(names, rounds, curves(t), small=True), class_="figure") for t in tasks]
    found = {s.name: s for s in baseline_comparisons(data)}
    return [
        whole,
        el("div", small, class_="grid"),
        el("h3", "Every model against the one it is meant to improve on"),
        _stage_table(models, found),
        el("p", "Differences are paired by prompt; coloured ones have an interval that excludes 0.", class_="note"),
        *[part for mode in MODES for part in (el("h3", f"By task, {mode}"), _task_table(models, tasks, mode))],
        *_task_differences(data, models, tasks),
    ]


def _stage_table(models: Sequence[Mapping[str, Any]], found: Mapping[str, Comparison]) -> Markup:
    rows = []
    for m in models:
        comparison = found.get(m["name"])
        cells: list[Any] = [
            el("td", el("b", stage_label(m["name"])), el("br"), el("small", _trained_on(m))),
            el("td", stage_label(comparison.baseline) if comparison else "\u2013", class_="soft"),
        ]
        for mode in MODES:
            d = comparison.differences.get(mode) if comparison else None
            cells += [score_cell(m[mode]["overall"]), difference_cell(d)]
        rows.append(cells)
    return table(["stage", "compared with", "greedy", "difference", "sampled", "difference"], rows, numeric_from=2)


def _trained_on(m: Mapping[str, Any]) -> str:
    if "rows" not in m:
        return f"the model as given, asked {m['asked']}"
    human = f", {m['human_rows']:,} by people" if "human_rows" in m else ""
    dropped = f", {m['dropped']:,} dropped as too long" if m.get("dropped") else ""
    kind = "rows" if "human_rows" in m else "pairs"
    return f"{m['rows']:,} {kind}{human}{dropped}, {m['steps']:,} steps{lora_update(m)}"


def score_cell(score: Mapping[str, Any], heat: str | None = None) -> Markup:
    """A table cell with an accuracy over its interval; `heat` (a mode) tints it by the accuracy."""
    style = f"--v:{score['mean']:.2f};--hue:var(--{heat})" if heat else None
    return el("td", format_score(score["mean"]), el("br"), el("small", format_ci(score)), class_="num heat" if heat else "num", style=style)


def difference_cell(d: Mapping[str, Any] | None) -> Markup:
    """A table cell with a difference over its interval, marked when that excludes 0."""
    if not d:
        return el("td", "\u2013", class_="num")
    css, mark = {1: ("up", "\u25b2 "), -1: ("down", "\u25bc "), 0: ("flat", "\u00b7 ")}[significance(d)]
    return el("td", el("span", f"{mark}{d['mean']:+.3f}", class_=css), el("br"), el("small", format_ci(d, "+")), class_="num")


def _task_table(models: Sequence[Mapping[str, Any]], tasks: Sequence[str], mode: str) -> Markup:
    head = ["stage", *(f"{t} (n {models[0][mode][t]['n']})" for t in tasks)]
    return table(head, [[stage_label(m["name"]), *(score_cell(m[mode][t], mode) for t in tasks)] for m in models])


def _task_differences(data: RunData, models: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> list[Markup]:
    """Paired differences by task, folded away, and the last model against the first."""
    of_prompt = prompt_tasks(data)
    folders = {m["name"]: m["folder"] for m in models}
    against = baselines(list(folders))
    if not against or not of_prompt:
        return []
    compared = [(stage_label(name), before, name) for name, before in against.items()]
    first, last = models[0]["name"], models[-1]["name"]
    rows: list[list[Any]] = []
    for label, before, after in [*compared, ("last model, whole run", first, last)]:
        for mode in MODES:
            found = differences_by_task(data, folders[before], folders[after], mode=mode, tasks=of_prompt)
            shown = [label, stage_label(before)] if mode == MODES[0] else ["", ""]
            rows.append([*shown, mode, *(difference_cell(found.get(t)) for t in tasks)])
    return [el("details", el("summary", "Paired differences by task"), table(["stage", "compared with", "", *tasks], rows, numeric_from=3))]


# ---- the rest ----


def _judge(data: RunData) -> Sequence[Markup | None]:
    return reward_section(reward_report(data))


def _training(data: RunData) -> list[Markup]:
    return training_section(data) or [el("p", "No stage has trained yet, or the logs are not there.", class_="soft")]


def _times(data: RunData) -> list[Markup]:
    finished = [s for s in data.stages if "seconds" in s]
    if not finished:
        return [el("p", "No stage is done yet.", class_="soft")]
    most, total = max(s["seconds"] for s in finished) or 1.0, sum(s["seconds"] for s in finished)
    rows: list[list[Any]] = []
    for s in data.stages:
        if "seconds" not in s:
            rows.append([s["folder"], "unfinished", *[""] * 7])
            continue
        bar = el("td", el("span", class_="bar", style=f"width:{round(160 * s['seconds'] / most)}px"))
        trained = [f"{s[k]:,}" if k in s else "" for k in ("steps", "tokens", "tokens_per_second")]
        written = data.tokens_written(s["folder"])
        rest = s["seconds"] - s.get("train_seconds", 0.0)
        generated = [f"{written:,}", f"{written / rest:,.0f}" if rest > 0 else "\u2013"] if written else ["", ""]
        rows.append([s["folder"], f"{s['seconds']:.1f}", bar, *trained, *generated, f"{s['peak_mib']:,}" if "peak_mib" in s else ""])
    training = sum(s.get("train_seconds", 0.0) for s in finished)
    head = ["stage", "seconds", "", "training steps", "tokens", "tokens/s", "generated tokens", "tokens/s", "peak MiB"]
    return [
        el("p", f"{duration(total)} in all, {duration(training)} of it training; the rest is generating, judging and evaluating."),
        table(head, rows),
        el("p", "Generated tokens are divided by all the seconds that a stage did not train, its judging included.", class_="note"),
    ]
