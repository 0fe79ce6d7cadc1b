"""Page of a reasoning run: both modes by level, obedience, budgets, rewards of every stage, one question with thinking on and off."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gristmill.core.io import write_text
from gristmill.data.rows import Prompt
from gristmill.data.thinking import LINES, split_answer
from gristmill.report.comparisons import format_difference, format_score_ci
from gristmill.report.figures import monitor_plot
from gristmill.report.markup import Markup, alarm_banners, document, el, table
from gristmill.report.rl import curves
from gristmill.report.sample_files import studio_link
from gristmill.report.summary import reasoning_lines
from gristmill.runs.artifacts import EVALUATION
from gristmill.runs.journal import read_once
from gristmill.runs.reader import RunData

WHEN = ("before", "after")
NUM_SHOWN, MAX_CHARS = 6, 1200  # questions, and of an answer


def write_page(data: RunData) -> Path:
    """Write the page of a finished or unfinished run into its folder; it needs nothing from anywhere."""
    title = str(data.recipe["name"])
    head = el("header", el("p", "Reasoning", class_="eyebrow"), el("h1", title), alarm_banners(data.results), class_="top")
    stages = {stage["name"]: stage for stage in data.stages if "name" in stage}
    body: list[Any] = []
    if data.results is not None:
        found = data.results["reasoning"]
        body += [el("pre", "\n".join(reasoning_lines(data.results, data.folder))), _modes(found), *_levels(found), _tasks(found)]
        body += _budgets(found["budget"])
    for name, stage in stages.items():
        if "updates" in stage and (drawn := curves(data, f"{stage['folder']}/run/{Path(stage['model']).parent}")):
            body += [el("h2", f"Reinforcement learning: {name}"), el("div", drawn, class_="grid")]
    if "after" in stages and "data" in stages:
        body += [el("h2", "The same question, thinking on and off"), *_questions(data, stages)]
    path = data.folder / "report.html"
    write_text(path, document(title, head, el("main", body)))
    return path


def _modes(found: Mapping[str, Any]) -> Markup:
    """Accuracy, obedience and lengths of both modes, before and after reinforcement learning."""
    rows = []
    for mode in LINES:
        scores = [format_score_ci(found[when][mode]) for when in WHEN]
        rows.append([f"thinking {mode}, accuracy", *scores, format_difference(found["paired"][mode])])
        rows.append([f"thinking {mode}, obeyed", *(format_score_ci(found[when]["obedience"][mode]) for when in WHEN), ""])
        tokens = [", ".join(f"{value} {told}" for told, value in found[when]["tokens"][mode].items()) for when in WHEN]
        rows.append([f"thinking {mode}, mean tokens", *tokens, ""])
    rows.append(["steps right", *(format_score_ci(found[when]["steps"]) for when in WHEN), ""])
    return table(["", "before RL", "after RL", "paired difference"], rows)


def _levels(found: Mapping[str, Any]) -> list[Markup]:
    levels = list(found["after"]["levels"]["on"])
    if len(levels) < 2:
        return []
    figures = []
    for when in WHEN:
        values = [found[when]["levels"]["on"][level]["mean"] for level in levels]
        plot = monitor_plot(levels, values, level=None, falls=True, what=f"Accuracy by level, {when}")
        figures.append(el("div", el("p", f"thinking on, {when}", class_="title"), plot, class_="figure"))
    columns = [(mode, when) for mode in LINES for when in WHEN]
    rows = [[level, *(format_score_ci(found[when]["levels"][mode][level]) for mode, when in columns)] for level in levels]
    head = ["level", *(f"{mode}, {when}" for mode, when in columns)]
    return [el("h2", "By level"), el("div", figures, class_="grid"), table(head, rows)]


def _tasks(found: Mapping[str, Any]) -> Markup | None:
    columns = [(mode, when) for mode in LINES for when in WHEN]
    names = list(found["after"]["tasks"]["on"])
    if len(names) < 2:
        return None
    rows = [[name, *(format_score_ci(found[when]["tasks"][mode][name]) for mode, when in columns)] for name in names]
    return el("section", el("h2", "By task"), table(["task", *(f"{mode}, {when}" for mode, when in columns)], rows))


def _budgets(points: list[Mapping[str, Any]]) -> list[Markup]:
    if not points:
        return []
    labels = ["none" if point["budget"] is None else str(point["budget"]) for point in points]
    plot = monitor_plot(labels, [point["mean"] for point in points], level=None, falls=True, what="Accuracy by thinking budget")
    rows = [[label, format_score_ci(point), point["tokens"]] for label, point in zip(labels, points, strict=True)]
    figure = el("div", el("p", "accuracy by tokens of thinking", class_="title"), plot, class_="figure medium")
    return [el("h2", "Thinking budget"), figure, table(["budget", "accuracy", "mean tokens of an answer"], rows, medium=True)]


def _questions(data: RunData, stages: Mapping[str, Mapping[str, Any]]) -> list[Markup]:
    """Of each level one question, or the first few, with the last model's answers in both modes."""
    path = data.folder / stages["after"]["folder"] / "answers.jsonl"
    answers = {record["id"]: record["out"][0][0] for record in read_once(path)} if path.is_file() else {}
    task = data.recipe["data"]["task"]
    evaluation = data.read(stages["data"]["folder"], EVALUATION)
    places = {p.id: place for place, p in enumerate(evaluation)}
    prompts = [p for p in evaluation if (not task or p.task == task) and p.id in answers]
    asked: dict[str, dict[str, Prompt]] = {}
    for prompt in prompts:
        asked.setdefault(prompt.messages[-1].content, {})[prompt.meta["reasoning"]] = prompt
    both = [found for found in asked.values() if found.keys() == LINES.keys()]
    first: dict[Any, dict[str, Prompt]] = {}
    for found in both:
        first.setdefault(found["on"].meta.get("level"), found)
    shown = list(first.values()) if len(first) > 1 else both[:NUM_SHOWN]
    right = stages["after"]["reasoning"]["outcomes"]
    out = []
    for found in shown:
        texts = [_answer(mode, answers[found[mode].id], right[mode][found[mode].id]) for mode in LINES]
        question = found["on"].messages[-1].content[:MAX_CHARS]
        link = el("p", studio_link(f"{stages['data']['folder']}/{EVALUATION.file}", places[found["on"].id]), class_="note")
        out.append(el("div", el("p", question), el("div", texts, class_="grid"), link, class_="plain fine"))
    return out


def _answer(mode: str, text: str, is_right: bool) -> Markup:
    trace, reply = split_answer(text)
    verdict = el("span", "right" if is_right else "wrong", class_=f"chip {'good' if is_right else 'bad'}")
    thought = el("pre", trace[:MAX_CHARS], class_="soft") if trace else None
    return el("div", el("p", f"thinking {mode} ", verdict, class_="note"), thought, el("pre", reply[:MAX_CHARS]))
