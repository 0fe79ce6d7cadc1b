"""Report sections on benchmarks and safety rows in the loop: every model's figures, and its paired differences to earlier ones."""

from collections.abc import Mapping
from typing import Any

from gristmill.core.io import read_json
from gristmill.report.benchmarks import write_benchmark_page
from gristmill.report.comparisons import format_ci, model_stages, significance, stage_label
from gristmill.report.markup import Markup, el, table
from gristmill.report.safety import write_safety_page
from gristmill.report.summary import MEASURED, format_measured
from gristmill.runs.reader import RunData

SECTION_OF = {"benchmarks": "evaluate", "safety": "safety"}  # of the recipe
RISING = {"refusal_rate"}  # rates of which more is better; of all others less
HEADING_OF = {"benchmarks": "Benchmarks", "safety": "Safety"}
LEAD = {
    "benchmarks": "Benchmarks that the recipe names: scores with 95 % intervals, and differences paired by document.",
    "safety": "Safety rows and canaries, asked again: rates with 95 % intervals, and differences paired by row.",
}


def measured_stages(data: RunData, kind: str) -> list[dict[str, Any]]:
    """The finished measurements of a kind that the recipe asks for, in the order of the models."""
    order = [s["name"] for s in model_stages(data)]
    found = [s for s in data.stages if kind in s and s.get("model") in order and data.recipe.get(SECTION_OF[kind])]
    if data.results is not None:
        told = {row["folder"] for row in data.results.get(kind, ())}
        found = [s for s in found if s["folder"] in told]
    return sorted(found, key=lambda s: order.index(s["model"]))


def measurements_section(data: RunData, kind: str) -> list[Markup]:
    """A table for each benchmark or rate: a row a model."""
    stages = measured_stages(data, kind)
    if not stages:
        return [el("p", "Nothing has been measured yet.", class_="soft")]
    parts: list[Markup] = []
    for what in dict.fromkeys(what for s in stages for what in s[kind]):
        rows: list[list[Any]] = []
        for s in (s for s in stages if what in s[kind]):
            entry, sign = s[kind][what], 1 if kind == "benchmarks" or what in RISING else -1
            link = el("a", stage_label(s["model"]), href=f"{s['folder']}/report.html")
            before = stage_label(s["before"]) if s["before"] else "\u2013"
            cells = [_difference(entry.get("base"), sign), el("td", before, class_="soft"), _difference(entry.get("before"), sign)]
            rows.append([el("td", link), el("td", format_measured(entry), class_="num"), f"{entry['n']:,}", *cells])
        first = next(s[kind][what] for s in stages if what in s[kind])
        shots = f", {first['column']}, {first['num_fewshot']} shots" if "column" in first else ""
        parts.append(el("h3", what.replace("_", " ") if kind == "safety" else what, el("small", shots)))
        parts.append(table(["model", "score", "n", "to the model as given", "compared with", "difference"], rows))
        notes = dict.fromkeys(note for s in stages for note in s[kind].get(what, {}).get("notes", ()))
        parts += [el("p", note, class_="note") for note in notes]
    words = (
        "Coloured differences have an interval that excludes 0. A model's name leads to its own page, as long as that is beside this one."
    )
    return [*parts, el("p", words, class_="note")]


def _difference(d: Mapping[str, Any] | None, sign: int) -> Markup:
    """A cell with a paired difference: green where it is better, red where it is worse."""
    if not d:
        return el("td", "\u2013", class_="num")
    css = {1: "up", -1: "down", 0: "flat"}[significance(d) * sign]
    return el("td", el("span", f"{d['mean']:+.3f}", class_=css), el("br"), el("small", format_ci(d, "+")), class_="num")


def write_measurement_pages(data: RunData) -> None:
    """Write the page of each measurement into its stage's folder, from what stands there."""
    for kind in MEASURED:
        for stage in measured_stages(data, kind):
            folder = data.folder / stage["folder"]
            if kind == "safety":
                write_safety_page(folder)
            elif (folder / "results.json").is_file():
                write_benchmark_page(folder, read_json(folder / "results.json"))
