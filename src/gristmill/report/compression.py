"""Page of a compression: the Pareto curve of KL against measured speed, the chosen layers as a picture, predicted against measured."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from gristmill.core.io import write_text
from gristmill.report.comparisons import format_difference, format_score_ci
from gristmill.report.figures import Points, dependency_picture, layers_picture, scatter_plot
from gristmill.report.markup import Markup, alarm_banners, document, el, table
from gristmill.report.summary import compression_lines
from gristmill.report.training import training_section
from gristmill.runs.reader import RunData

SEARCHES = {"mip": "search", "curve": "search, other speeds", "greedy": "greedy", "random": "random"}


def write_page(data: RunData) -> Path:
    """Write the page of a finished or unfinished compression into its folder; it needs nothing from anywhere."""
    title = str(data.recipe["name"])
    head = el("header", el("p", "Compression", class_="eyebrow"), el("h1", title), alarm_banners(data.results), class_="top")
    body: list[Any] = []
    stages = {stage["name"]: stage for stage in data.stages if "name" in stage}
    if data.results is not None:
        body += _results(data.results, data.folder)
    for name, stage in stages.items():  # one an operating point
        body += [el("h2", "Costs of variants"), *_costs(stage)] if name.startswith("costs") else []
    if "scores" in stages:
        body += [el("h2", "Replace-1-block scores"), *_scores(stages["scores"])]
    if "library" in stages and (trained := stages["library"]["variants"]):
        body += [el("h2", "Blockwise distillation"), _library(trained)]
    if curves := training_section(data):
        body += [el("h2", "Global distillation"), *curves]
    path = data.folder / "report.html"
    write_text(path, document(title, head, el("main", body)))
    return path


def _results(results: Mapping[str, Any], folder: Path) -> list[Markup]:
    found, children = results["compress"], results["children"]
    out = [el("pre", "\n".join(compression_lines(results, folder)))]
    if accuracy := found["accuracy"]:
        before, after = accuracy["scores"]["parent"], accuracy["scores"]["child"]
        rows = [
            [task, format_score_ci(before[task]), format_score_ci(after[task]), format_difference(accuracy["paired"]) * (task == "overall")]
            for task in before
        ]
        out += [el("h2", "Accuracy"), table(["greedy", "parent", "child", "paired difference"], rows)]
    out += [el("h2", "The child's layers"), layers_picture(results["parent_layers"], results["layers"])]
    out += [el("p", "Upper bars: key-value heads of attention; lower bars: channels of the MLP. Grey: the parent's.", class_="note")]
    if fusion := results.get("fusion"):
        out += [el("h2", "FFN Fusion"), *_fusion(fusion)]
    out += [el("h2", "KL against speed"), _pareto(children, found)]
    words = "Each dot is a child, measured beside the parent in turns; KL is before the global distillation, but for the last dot."
    out += [el("p", words, class_="note"), el("h2", "Predicted and measured"), _children(children)]
    return [*out, el("p", f"{_in_words(results['point'])}: costs add up at this operating point alone.", class_="note")]


def _in_words(point: Mapping[str, Any]) -> str:
    tokens = f"prompts of {point['prompt_tokens']} and answers of {point['output_tokens']} tokens"
    return f"{point['batch']} in flight, {tokens}, {point['precision']}"


def _fusion(fusion: Mapping[str, Any]) -> list[Markup]:
    """Dependency matrices of runs of layers without attention, and which of their layers became one."""
    told = ", ".join(f"{run[0]} to {run[-1]}" for run in fusion["fused"])
    words = (
        "Cosine distance between what a column's layer adds to the states with a row's layer and without it, by the parent's numbers of "
        f"layers. Fused into one each (dashed): {f'layers {told}' if told else 'none'}."
    )
    pictures = [dependency_picture(run["layers"], run["dependencies"], fusion["fused"]) for run in fusion["runs"]]
    return [el("p", words if pictures else "No layers without attention lie side by side.", class_="note"), *pictures]


def _pareto(children: Sequence[Mapping[str, Any]], found: Mapping[str, Any]) -> Markup:
    def points(*searches: str) -> list[tuple[float, float, str]]:
        return sorted(
            (one["measured"]["median"], one["kl"], f"{SEARCHES[one['search']]}: {one['measured']['median']:.2f}x, KL {one['kl']:.3f}")
            for one in children
            if one["search"] in searches
        )

    speed = found["speed"]["measured"]
    after = [(speed, found["kl"], f"distilled child: {speed:.2f}x, KL {found['kl']:.3f}")]
    return scatter_plot(
        [
            Points("greedy", "search", points("curve", "mip"), joined=True),
            Points("before", "greedy", points("greedy")),
            Points("fill3", "random", points("random")),
            Points("sampled", "distilled", after),
        ],
        x_label="measured speed, in the parent's",
        y_label="KL, nats a token",
    )


def _children(children: Sequence[Mapping[str, Any]]) -> Markup:
    rows = []
    for one in children:
        predicted, measured = one["predicted"], one["measured"]
        error = measured["median"] / predicted["speed"] - 1
        rows.append(
            [
                SEARCHES[one["search"]],
                f"{one['target']:g}x",
                f"{predicted['speed']:.2f}x",
                f"{measured['median']:.2f}x ({measured['low']:.2f} to {measured['high']:.2f})",
                f"{error:+.1%}",
                f"{one['score']:.3f}",
                f"{one['kl']:.3f}",
                *([f"{one['accuracy']:.3f}"] if "accuracy" in one else []),
                f"{predicted['parameters']:.0%}",
            ]
        )
    measures = ["KL", *(["accuracy"] if any("accuracy" in one for one in children) else [])]
    return table(["found by", "target", "predicted", "measured", "error", "sum of scores", *measures, "parameters"], rows)


def _costs(costs: Mapping[str, Any]) -> list[Markup]:
    rows = [
        [name.replace("-", " ", 1), f"{share['median']:+.2%}", f"{share['low']:+.2%} to {share['high']:+.2%}"]
        for name, share in costs["shares"].items()
    ]
    time = f"{costs['parent_seconds'] * 1e6:,.0f} us"
    words = f"Share of the parent's time a token ({time}; {_in_words(costs['point'])}) that a layer takes more with this half than its own."
    return [el("p", words, class_="note"), table(["variant", "median", "rounds"], rows, medium=True)]


def _scores(stage: Mapping[str, Any]) -> list[Markup]:
    """Scores of every layer with one half exchanged, and the other its own: KL, and a task's accuracy where layers were scored by it."""
    words = "KL from the parent, nats a token, where one half of one layer is exchanged; the search adds up those of whole layers."
    out: list[Markup] = [el("p", words, class_="note"), _halves(stage["blocks"], "kl", "{:.3f}")]
    if task := stage.get("task"):
        most = max(one["stderr"] for one in stage["blocks"].values())
        words = (
            f"Change of greedy accuracy on {task['num_prompts']} prompts, of which the parent has {task['parent']:.3f} right. The standard "
            f"error of a change is at most {most:.3f}; the search takes a rise for none, and orders what is equal by KL."
        )
        out += [el("p", words, class_="note"), _halves(stage["blocks"], "accuracy", "{:+.3f}", sign=-1)]
    return out


def _halves(scores: Mapping[str, Mapping[str, Any]], key: str, form: str, sign: int = 1) -> Markup:
    layers: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for one in scores.values():
        layers[one["layer"]].append(one)
    columns: dict[str, None] = {}
    rows: list[tuple[int, dict[str, float]]] = []
    for layer, choices in layers.items():
        own, cells = choices[0], {}
        for one in choices[1:]:
            if one["ffn_size"] == own["ffn_size"]:
                cells[f"attention {one['kv_heads']}"] = one[key]
            elif one["kv_heads"] == own["kv_heads"]:
                cells[f"mlp {one['ffn_size']}"] = one[key]
        columns |= dict.fromkeys(cells)
        rows.append((layer, cells))
    return table(
        ["layer", *columns],
        [[str(layer), *(form.format(sign * cells[name]) if name in cells else "" for name in columns)] for layer, cells in rows],
    )


def _library(trained: Mapping[str, Mapping[str, Any]]) -> Markup:
    kinds: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for one in trained.values():
        kinds[f"{one['half']} {one['size']}"].append(one)
    rows = [
        [name, str(len(ones)), *(f"{fmean(one[when] for one in ones):.2e}" for when in ("before", "after")), _lowered(ones)]
        for name, ones in kinds.items()
    ]
    return table(["variant", "layers", "normalised MSE as made", "trained", "lowered in"], rows)


def _lowered(ones: Sequence[Mapping[str, Any]]) -> str:
    return f"{sum(one['after'] < one['before'] for one in ones)} of {len(ones)}"
