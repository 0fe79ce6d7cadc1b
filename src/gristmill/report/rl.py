"""Page of a run of reinforcement learning: accuracy before and after, the metrics of every step, right answers beside wrong ones."""

from collections import deque
from pathlib import Path
from statistics import fmean
from typing import Any

from gristmill.core.io import write_text
from gristmill.report.comparisons import MODES, format_difference, format_score_ci
from gristmill.report.figures import loss_plot
from gristmill.report.markup import Markup, alarm_banners, document, el, table
from gristmill.report.sample_files import studio_link
from gristmill.report.summary import rl_lines
from gristmill.report.training import read_metrics, thinned
from gristmill.runs.journal import read_once
from gristmill.runs.reader import RunData

CURVES = {
    "reward_total": "reward",
    "reward_right": "share right",
    "reward_form": "share that keeps the form",
    "spread": "share of groups with a spread",
    "all_right": "share of groups all right",
    "all_wrong": "share of groups all wrong",
    "length_right": "tokens of right answers",
    "length_wrong": "tokens of wrong answers",
    "cut_off": "share cut off",
    "entropy": "entropy, nats a token",
    "kl": "KL from the start, nats a token",
    "ratio": "ratio to the old policy",
    "clipped": "share of tokens clipped",
    "mismatch": "sampler against trainer, nats a token",
    "grad_norm": "gradient norm",
}
MEAN_OF = 10  # steps, of a curve's means: each step asks other prompts, so that single ones are noise
NUM_GROUPS, MAX_CHARS = 6, 1200  # groups that are shown, and of an answer
MAX_GROUPS = 1000  # latest ones that are looked at: a journal may be larger than memory


def write_page(data: RunData) -> Path:
    """Write the page of a finished or unfinished run into its folder; it needs nothing from anywhere."""
    title = str(data.recipe["name"])
    head = el("header", el("p", "Reinforcement learning", class_="eyebrow"), el("h1", title), alarm_banners(data.results), class_="top")
    body: list[Any] = []
    if data.results is not None:
        body += [el("pre", "\n".join(rl_lines(data.results, data.folder))), _accuracies(data.results)]
    for stage in data.stages:
        if drawn := curves(data, stage["folder"]):
            note = f"Bold, from {2 * MEAN_OF} steps on: the mean of the last {MEAN_OF}."
            body += [el("h2", "Every step"), el("p", note, class_="note"), el("div", drawn, class_="grid")]
            body += [el("h2", "Groups of the last steps"), *_groups(data.folder, stage["folder"])]
    path = data.folder / "report.html"
    write_text(path, document(title, head, el("main", body)))
    return path


def _accuracies(results: dict[str, Any]) -> Markup:
    before, after = results["stages"]
    rows = []
    for mode in MODES:
        for task in before[mode] if len(before[mode]) > 2 else ["overall"]:  # of one task the same is said once
            difference = format_difference(results["paired"][mode]) if task == "overall" else ""
            rows.append([f"{mode}, {task}", format_score_ci(before[mode][task]), format_score_ci(after[mode][task]), difference])
    return table(["", "before", "after", "paired difference"], rows)


def curves(data: RunData, stage: str) -> list[Markup]:
    """A figure for each metric of a stage's steps that tells anything; the stage is given by its folder within the run's."""
    steps = read_metrics(data, stage, needed=("step", "reward_total"))
    out: list[Markup] = []
    drawn: list[list[tuple[float, float]]] = []
    parts = {name for step in steps for name in step if name.startswith("reward_")} - CURVES.keys() if steps else ()
    for name, words in [*CURVES.items(), *((name, f"reward by {name.removeprefix('reward_')}") for name in sorted(parts))]:
        points = [(step["step"], step[name]) for step in steps if name in step]
        if points in drawn or len({value for _, value in points}) == 1:
            continue  # it tells nothing more
        drawn.append(points)
        if points:
            whole = range(MEAN_OF, len(points) + 1) if len(points) >= 2 * MEAN_OF else ()
            means = [(points[i - 1][0], fmean(value for _, value in points[i - MEAN_OF : i])) for i in whole]
            figure = loss_plot(thinned(points), words.capitalize(), thinned(means))
            out.append(el("div", el("p", words, class_="title"), figure, class_="figure"))
    return out


def _groups(run: Path, stage: str) -> list[Markup]:
    """Of the latest groups that hold right and wrong answers one of each; else the answers that earned most and least."""
    path, place = run / stage / "rollouts.jsonl", 0
    asked: dict[str, dict[str, Any]] = {}
    judged: deque[tuple[str, list[dict[str, Any]]]] = deque(maxlen=MAX_GROUPS)
    for record in read_once(path) if path.is_file() else ():
        if "out" in record:
            asked[record["id"]] = record | {"place": place}
            place += len(record["out"])
            if len(asked) > MAX_GROUPS:
                asked.pop(next(iter(asked)))
        elif "rewards" in record:
            judged.extend(record["rewards"].items())
    known = any(reward["right"] > 0 for _, rewards in judged for reward in rewards)
    key, words = ("right", ("right", "wrong")) if known else ("total", ("earned most", "earned least"))
    shown: list[Markup] = []
    for name, rewards in reversed(judged):
        values = [reward[key] for reward in rewards]
        best, worst = ([i for i, value in enumerate(values) if value == end] for end in (max(values), min(values)))
        if max(values) > min(values) and name in asked:
            texts = [_answer(asked[name], word, places) for word, places in zip(words, (best, worst), strict=True)]
            link = el("p", studio_link(f"{stage}/{path.name}", asked[name]["place"]), class_="note")
            shown.append(el("div", el("p", asked[name]["question"][:MAX_CHARS]), el("div", texts, class_="grid"), link, class_="plain"))
        if len(shown) == NUM_GROUPS:
            break
    return shown


def _answer(record: dict[str, Any], words: str, places: list[int]) -> Markup:
    text = record["out"][places[0]]["text"][:MAX_CHARS]
    return el("div", el("p", f"{words}, {len(places)} of {len(record['out'])}", class_="note"), el("pre", text))
