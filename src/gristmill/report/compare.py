"""Run comparison: finished runs side by side, a run and its controls, or a run at several seeds."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gristmill.core.errors import InputError
from gristmill.report.alignment import difference_cell, footer, save_page, score_cell
from gristmill.report.comparisons import MODES, format_difference, format_score, format_score_ci, stage_label, unpaired_difference
from gristmill.report.markup import Markup, document, el, table
from gristmill.report.summary import duration
from gristmill.runs.reader import RunData, read_run


def compare_runs(folders: Sequence[Path]) -> dict[str, Any]:
    """What the runs reached, and how far the last model of each lies from that of the first run.

    Returns:
        {"runs": [{"folder", "name", "control", "seed", "first", "last", "difference", "gain", "synthetic_share", "seconds", "alarms"}]}.
        "first" and "last" are {"stage", "greedy", "sampled"}, each mode {"overall": {"mean", "ci95", "n"}, task: ..}. By mode,
        "difference" is last model minus the first run's last model, and "gain" last minus first model of the same run: {"mean",
        "ci95"}, unpaired. "alarms" counts collapse alarms.

    Raises:
        InputError: a folder holds no run or one of another kind, or its run is not finished.
    """
    if not folders:
        raise InputError("Give at least one run folder to compare.")
    runs = [_facts(read_run(folder, kind="alignment")) for folder in folders]
    for run in runs:
        run["difference"] = {m: unpaired_difference(runs[0]["last"][m]["overall"], run["last"][m]["overall"]) for m in MODES}
        run["gain"] = {m: unpaired_difference(run["first"][m]["overall"], run["last"][m]["overall"]) for m in MODES}
    return {"runs": runs}


def _facts(data: RunData) -> dict[str, Any]:
    results = data.results
    if results is None:
        raise InputError(f"{data.folder} is not finished: run its recipe again to continue it, then compare.")
    ends = [{"stage": s["name"], **{m: s[m] for m in MODES}} for s in (results["stages"][0], results["stages"][-1])]
    return {
        "folder": str(data.folder),
        "name": results["name"],
        "control": results["control"],
        "seed": results["seed"],
        "first": ends[0],
        "last": ends[1],
        "synthetic_share": results["synthetic_share"],
        "seconds": results["seconds"],
        "alarms": sum(len(c["alarms"]) for c in results["collapse"]),
    }


def _label(run: Mapping[str, Any]) -> str:
    return Path(run["folder"]).name or run["folder"]


def _tasks(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(t for run in runs for t in run["last"]["greedy"] if t != "overall"))


def comparison_text(table: Mapping[str, Any]) -> str:
    """The comparison as aligned lines: runs, then the tasks of each run's last model."""
    runs = table["runs"]
    base = _label(runs[0])
    lines = [f"Last models, against that of {base} (unpaired 95 % intervals)"]
    head = ["run", "control", "seed", "greedy", "difference", "sampled", "difference", "synthetic", "time", "alarms"]
    rows = []
    for i, run in enumerate(runs):
        cells = [_label(run), run["control"] or "-", str(run["seed"])]
        for mode in MODES:
            cells += [format_score_ci(run["last"][mode]["overall"]), format_difference(run["difference"][mode]) if i else "-"]
        rows.append([*cells, f"{run['synthetic_share']:.1%}", duration(run["seconds"]), str(run["alarms"])])
    lines += _aligned([head, *rows])
    lines += ["", "From the first model to the last, within each run"]
    lines += _aligned([["run", *MODES], *([_label(r), *(_gain(r, m) for m in MODES)] for r in runs)])
    tasks = _tasks(runs)
    lines += ["", "Last models by task, greedy/sampled"]
    lines += _aligned([["run", *tasks], *([_label(r), *(_task(r, t) for t in tasks)] for r in runs)])
    return "\n".join(lines)


def _gain(run: Mapping[str, Any], mode: str) -> str:
    before, after = (format_score(run[end][mode]["overall"]["mean"]) for end in ("first", "last"))
    return f"{before} -> {after}, {format_difference(run['gain'][mode])}"


def _task(run: Mapping[str, Any], task: str) -> str:
    return "/".join(f"{run['last'][m][task]['mean']:.2f}" if task in run["last"][m] else "-" for m in MODES)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def write_comparison(comparison: Mapping[str, Any], out_path: Path) -> Path:
    """The comparison as a page in the style of a run's report. Returns its path.

    Raises:
        InputError: the page cannot be written.
    """
    runs = comparison["runs"]
    base = _label(runs[0])
    tasks = _tasks(runs)
    top = el(
        "header",
        el("p", "gristmill comparison", class_="eyebrow"),
        el("h1", f"{len(runs)} runs"),
        el("p", f"Differences are to {base}.", class_="soft"),
        class_="top",
    )
    parts = [
        el("h2", "Last models"),
        el(
            "p",
            "Accuracy on held-out prompts. Differences between runs are unpaired, and marked where their interval excludes 0.",
            class_="soft",
        ),
        _runs_table(runs),
        el("h2", "First model to last"),
        table(["run", *(c for m in MODES for c in (f"{m}, first", f"{m}, last", "gain"))], [_ends(r) for r in runs]),
        *[
            part
            for m in MODES
            for part in (
                el("h2", f"Last models by task, {m}"),
                table(["run", *tasks], [[_label(r), *(_cell(r, t, m) for t in tasks)] for r in runs]),
            )
        ],
    ]
    return save_page(out_path, document("gristmill: comparison", top, el("main", parts), footer("Newcombe's for independent proportions")))


def _runs_table(runs: Sequence[Mapping[str, Any]]) -> Markup:
    rows = []
    for i, run in enumerate(runs):
        what = f"control: {run['control']}" if run["control"] else "real run"
        cells: list[Any] = [
            el("td", el("b", _label(run)), el("br"), el("small", f"{what}, seed {run['seed']}, {stage_label(run['last']['stage'])}"))
        ]
        for mode in MODES:
            cells += [score_cell(run["last"][mode]["overall"]), difference_cell(run["difference"][mode] if i else None)]
        alarms = el("td", run["alarms"], class_="num down" if run["alarms"] else "num")
        rows.append([*cells, f"{run['synthetic_share']:.1%}", duration(run["seconds"]), alarms])
    return table(["run", "greedy", "difference", "sampled", "difference", "synthetic", "time", "alarms"], rows)


def _ends(run: Mapping[str, Any]) -> list[Any]:
    scores = [
        c
        for m in MODES
        for c in (score_cell(run["first"][m]["overall"]), score_cell(run["last"][m]["overall"]), difference_cell(run["gain"][m]))
    ]
    return [_label(run), *scores]


def _cell(run: Mapping[str, Any], task: str, mode: str) -> Markup | str:
    score = run["last"][mode].get(task)
    return score_cell(score, mode) if score else "\u2013"
