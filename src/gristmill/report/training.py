"""Training of a run's stages: loss curves, read from each stage's log of metrics."""

import json
import math
from collections.abc import Sequence
from typing import TypeVar

from gristmill.core.io import DamagedFile, read_bytes
from gristmill.report.figures import loss_plot
from gristmill.report.markup import Markup, el
from gristmill.runs.reader import RunData

MAX_METRICS_BYTES = 64 << 20
MAX_POINTS = 300  # of a curve
StepT = TypeVar("StepT")


def read_metrics(data: RunData, stage: str, needed: Sequence[str] = ("step", "loss")) -> list[dict[str, float]]:
    """Metrics of every step of a stage, given by its folder's name; none where it does not train. Lines that are torn or lack what is
    needed are left out.
    """
    path = data.folder / stage / "train" / "metrics.jsonl"
    if not path.is_file():
        return []
    try:
        lines = read_bytes(path, MAX_METRICS_BYTES).decode("utf-8", "replace").splitlines()
    except DamagedFile:
        return []
    return [found for line in lines if (found := _finite(line)).keys() >= set(needed)]


def _finite(line: str) -> dict[str, float]:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(values, dict):
        return {}
    return {k: float(v) for k, v in values.items() if isinstance(v, int | float) and math.isfinite(v)}


def training_section(data: RunData) -> list[Markup]:
    """A loss curve for every stage that trains, with its speed and the most memory that the run had held by then."""
    out = []
    for stage in data.stages:
        steps = read_metrics(data, stage["folder"])
        if not steps:
            continue
        points = thinned(steps)
        facts = [f"{len(steps):,} steps", f"loss {steps[0]['loss']:.3g} to {steps[-1]['loss']:.3g}"]
        facts += [f"{stage['tokens_per_second']:,} tokens/s"] if "tokens_per_second" in stage else []
        facts += [f"{stage['peak_mib']:,} MiB at the peak"] if "peak_mib" in stage else []
        figure = loss_plot([(p["step"], p["loss"]) for p in points])
        out.append(el("div", el("p", stage["folder"], class_="title"), figure, el("p", ", ".join(facts), class_="note"), class_="figure"))
    return [el("div", out, class_="grid")] if out else []


def thinned(steps: Sequence[StepT]) -> list[StepT]:
    """So many steps as a curve shows, the last among them."""
    every = max(1, math.ceil(len(steps) / MAX_POINTS))
    return [*steps[:-1:every], *steps[-1:]]
