"""Charts as inline SVG: accuracies over stages, funnels, histograms, monitors.

Every function returns one `svg` element; hovering a mark shows its exact figures. Colours come from the page's style, so that a chart
fits a light and a dark background.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gristmill.report.comparisons import format_score, format_score_ci
from gristmill.report.markup import Markup, el

BINS = 28


@dataclass(frozen=True)
class Series:
    """One curve.

    Attributes:
        css: its colour's class, "greedy" or "sampled".
        scores: {"mean", "ci95", "n"} at each place on the axis.
        apart: places drawn hollow and left out of the curve.
    """

    css: str
    scores: Sequence[Mapping[str, Any]]
    hollow: frozenset[int] = frozenset()


def svg(width: float, height: float, label: str, *children: Any) -> Markup:
    """The `svg` element of a chart, scaled to its place on the page."""
    return el("svg", *children, viewBox=f"0 0 {width:g} {height:g}", role="img", aria_label=label)


def stage_plot(names: Sequence[str], rounds: Sequence[int], series: Sequence[Series], *, small: bool = False) -> Markup:
    """Accuracy (0 to 1) over stages with 95 % intervals, rounds as bands.

    Args:
        names: short names of the stages; left out when `small`.
        rounds: the round of each stage.
        series: curves, one score a stage.
        small: one of many small figures.
    """
    width, height = (330.0, 170.0) if small else (1040.0, 370.0)
    left, right, top, bottom = (30.0, 40.0, 8.0, 22.0) if small else (36.0, 56.0, 10.0, 54.0)
    step = (width - left - right) / max(1, len(names))

    def x(i: float) -> float:
        return left + step * (i + 0.5)

    def y(value: float) -> float:
        return top + (1 - value) * (height - top - bottom)

    parts: list[Markup] = []
    for number in sorted(set(rounds)):
        places = [i for i, r in enumerate(rounds) if r == number]
        start, end = x(places[0]) - step / 2, x(places[-1]) + step / 2
        if number % 2:
            parts.append(el("rect", x=r1(start), y=r1(top), width=r1(end - start), height=r1(height - top - bottom), class_="band"))
        label = (f"R{number}" if small else f"Round {number}") if number else ("" if small else "Human data")
        parts.append(el("text", label, x=r1((start + end) / 2), y=r1(height - 5), text_anchor="middle", class_=None if small else "strong"))
    for tick in (0, 0.5, 1) if small else (0, 0.2, 0.4, 0.6, 0.8, 1):
        parts.append(_line(left, y(tick), width - right, y(tick), "axis"))
        parts.append(el("text", f"{tick:g}", x=r1(left - 7), y=r1(y(tick) + 4), text_anchor="end"))
    if not small:
        parts += [el("text", n, x=r1(x(i)), y=r1(height - bottom + 20), text_anchor="middle") for i, n in enumerate(names)]
    shift = 0.0 if small else min(5.0, step / 8)
    for number, s in enumerate(series):
        parts += _curve(s, names, lambda i, d=(number - 0.5) * 2 * shift: x(i) + d, y, small)
    parts += _end_labels(series, width - right + 6, y)
    return svg(width, height, "Accuracy over stages", parts)


def _curve(s: Series, names: Sequence[str], x: Any, y: Any, small: bool) -> list[Markup]:
    joined = [i for i in range(len(s.scores)) if i not in s.hollow]
    points = " ".join(f"{x(i):.1f},{y(s.scores[i]['mean']):.1f}" for i in joined)
    out = [el("polyline", points=points, class_=f"{s.css} curve")]
    for i, score in enumerate(s.scores):
        low, high = score["ci95"]
        dot = el(
            "circle", cx=r1(x(i)), cy=r1(y(score["mean"])), r=2.4 if small else 4, class_=f"{s.css} hollow" if i in s.hollow else s.css
        )
        text = f"{names[i]}, {s.css}: {format_score_ci(score)}, n {score['n']}"
        out.append(el("g", el("title", text), _line(x(i), y(low), x(i), y(high), f"{s.css} whisker"), dot))
    return out


def _end_labels(series: Sequence[Series], x: float, y: Any) -> list[Markup]:
    """The last value of each curve, moved apart where two would overlap."""
    ends = sorted(((y(s.scores[-1]["mean"]) + 4, s) for s in series if s.scores), key=lambda e: e[0])
    places = [p for p, _ in ends]
    if len(places) == 2 and places[1] - places[0] < 13:
        middle = sum(places) / 2
        places = [middle - 6.5, middle + 6.5]
    return [el("text", f"{s.scores[-1]['mean']:.2f}", x=r1(x), y=r1(p), class_=s.css) for p, (_, s) in zip(places, ends, strict=True)]


def funnel(rows: Sequence[tuple[str, int, str]]) -> Markup:
    """Counts as bars, from many to few. Rows of (label, count, class of the bar); an empty class leaves a gap with a heading."""
    width, left, right, high = 500.0, 150.0, 62.0, 27.0
    most = max([n for _, n, css in rows if css] or [1])
    parts: list[Markup] = []
    for i, (label, count, css) in enumerate(rows):
        y = i * high
        if not css:
            parts.append(el("text", label, x=0, y=r1(y + 19), class_="strong"))
            continue
        length = (width - left - right) * count / max(1, most)
        parts.append(el("text", label, x=r1(left - 10), y=r1(y + 17), text_anchor="end"))
        parts.append(el("rect", x=left, y=r1(y + 4), width=r1(width - left - right), height=18, rx=3, class_="track"))
        parts.append(el("rect", x=left, y=r1(y + 4), width=r1(max(length, 1)), height=18, rx=3, class_=css))
        parts.append(el("text", f"{count:,}", x=r1(left + length + 7), y=r1(y + 17), class_="strong"))
    return svg(width, max(1, len(rows)) * high, "Data funnel", parts)


def histogram(before: Sequence[float] | np.ndarray, after: Sequence[float] | np.ndarray, *, low: float, high: float) -> Markup:
    """Two distributions over one another, each with its area 1: all answers, and the kept ones. Dashed lines are their means."""
    width, height, bottom = 330.0, 150.0, 20.0
    span = (high - low) or 1.0

    def x(value: float) -> float:
        return (value - low) / span * width

    def shares(values: np.ndarray) -> list[float]:
        bins = np.clip(((values - low) / span * BINS).astype(int), 0, BINS - 1)
        return [c / len(values) for c in np.bincount(bins, minlength=BINS).tolist()]

    named = [(name, css, np.asarray(values, float)) for name, css, values in (("all", "before", before), ("kept", "after", after))]
    sides = [(name, css, values, shares(values)) for name, css, values in named if values.size]
    most = max([max(s) for *_, s in sides] or [1.0])
    parts: list[Markup] = []
    for name, css, values, heights in sides:
        for i, share in enumerate(heights):
            tall = share / most * (height - bottom - 6)
            text = f"{name}: {share:.1%} between {low + i * span / BINS:.2f} and {low + (i + 1) * span / BINS:.2f}"
            bar = el(
                "rect",
                el("title", text),
                x=r1(i * width / BINS),
                y=r1(height - bottom - tall),
                width=r1(width / BINS - 1),
                height=r1(tall),
                class_=css,
            )
            parts += [bar] if share else []
        mean = math.fsum(values) / len(values)
        parts.append(_line(x(mean), 2, x(mean), height - bottom, "mark" if name == "kept" else "mark light"))
    parts.append(_line(0, height - bottom, width, height - bottom, "base"))
    for place, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end")):
        parts.append(el("text", f"{low + place * span:.1f}", x=r1(place * width), y=r1(height - 4), text_anchor=anchor))
    return svg(width, height, "Reward scores before and after the filter", parts)


def monitor_plot(
    labels: Sequence[str], values: Sequence[float], *, level: float | None, falls: bool, what: str = "Collapse monitor"
) -> Markup:
    """A monitor over the rounds, or another figure at a few places, with its alarm level: the shaded side is where it alarms.

    Args:
        labels: one a measurement.
        values: finite ones.
        level: where the alarm begins; None when there is none.
        falls: the alarm is below the level.
    """
    width, height, top, bottom, side = 330.0, 140.0, 12.0, 24.0, 30.0
    shown = [*values, *([level] if level is not None else [])]
    low, high = min(shown), max(shown)
    margin = (high - low) * 0.22 or abs(high) * 0.1 or 1.0
    low, high = (max(0.0, low - margin) if low >= 0 else low - margin), high + margin

    def x(i: int) -> float:
        return side + (width - 2 * side) * (i / (len(values) - 1) if len(values) > 1 else 0.5)

    def y(value: float) -> float:
        return top + (high - value) / (high - low) * (height - top - bottom)

    parts: list[Markup] = []
    if level is not None:
        start, end = (y(level), height - bottom) if falls else (top, y(level))
        parts.append(el("rect", x=0, y=r1(start), width=width, height=r1(max(0.0, end - start)), class_="alarm"))
        parts.append(_line(0, y(level), width, y(level), "level"))
        parts.append(el("text", f"alarm {'below' if falls else 'above'} {level:.3g}", x=4, y=r1(y(level) + (14 if falls else -5))))
    parts.append(_line(0, height - bottom, width, height - bottom, "base"))
    parts.append(el("polyline", points=" ".join(f"{x(i):.1f},{y(v):.1f}" for i, v in enumerate(values)), class_="greedy curve"))
    for i, v in enumerate(values):
        parts.append(el("circle", el("title", f"{labels[i]}: {v:.4g}"), cx=r1(x(i)), cy=r1(y(v)), r=4, class_="greedy"))
        parts.append(el("text", f"{v:.3g}", x=r1(x(i)), y=r1(y(v) - 9), text_anchor="middle", class_="strong"))
        parts.append(el("text", labels[i], x=r1(x(i)), y=r1(height - 7), text_anchor="middle"))
    return svg(width, height, what, parts)


def loss_plot(points: Sequence[tuple[float, float]], what: str = "Loss", means: Sequence[tuple[float, float]] = ()) -> Markup:
    """A loss, or what else is measured, over the steps of a training: (step, value), in order; where it is noise, behind its `means`."""
    width, height, top, bottom, side = 330.0, 140.0, 10.0, 22.0, 52.0
    low, high = (f(v for _, v in points) for f in (min, max))
    span, last = (high - low) or 1.0, max(points[-1][0] - points[0][0], 1)

    def x(step: float) -> float:
        return side + (width - side - 8) * (step - points[0][0]) / last

    def y(value: float) -> float:
        return top + (high - value) / span * (height - top - bottom)

    parts = [_line(side, height - bottom, width - 8, height - bottom, "base")]
    for value in dict.fromkeys((low, high)):
        parts.append(el("text", f"{value:.3g}", x=r1(side - 6), y=r1(y(value) + 4), text_anchor="end"))
    for step, anchor in ((points[0][0], "start"), (points[-1][0], "end")):
        parts.append(el("text", f"{step:,.0f}", x=r1(x(step)), y=r1(height - 6), text_anchor=anchor))
    lines = [(points, "greedy curve faint"), (means, "greedy curve")] if means else [(points, "greedy curve")]
    for line, css in lines:
        parts.append(el("polyline", points=" ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in line), class_=css))
    if len(points) == 1:
        parts.append(el("circle", cx=r1(x(points[0][0])), cy=r1(y(points[0][1])), r=3, class_="greedy"))
    return svg(width, height, f"{what} from {points[0][1]:.3g} to {points[-1][1]:.3g}", parts)


@dataclass(frozen=True)
class Points:
    """One kind of dots.

    Attributes:
        css: its colour's class.
        dots: (x, y, what hovering shows), in the order in which they are joined.
    """

    css: str
    label: str
    dots: Sequence[tuple[float, float, str]]
    joined: bool = False


def scatter_plot(kinds: Sequence[Points], *, x_label: str, y_label: str) -> Markup:
    """Dots of several kinds, each named above the plot; y begins at 0."""
    width, height, left, right, top, bottom = 640.0, 300.0, 52.0, 16.0, 30.0, 40.0
    dots = [dot for kind in kinds for dot in kind.dots]
    low, high = (f([1.0, *(dot[0] for dot in dots)]) for f in (min, max))
    most = max([dot[1] for dot in dots], default=0.0) or 1.0
    span = (high - low) or 1.0

    def x(value: float) -> float:
        return left + (value - low) / span * (width - left - right)

    def y(value: float) -> float:
        return height - bottom - value / most * (height - top - bottom)

    parts: list[Markup] = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(_line(left, y(most * share), width - right, y(most * share), "axis"))
        parts.append(el("text", f"{most * share:.2g}", x=r1(left - 7), y=r1(y(most * share) + 4), text_anchor="end"))
        parts.append(el("text", f"{low + span * share:.2f}", x=r1(x(low + span * share)), y=r1(height - bottom + 16), text_anchor="middle"))
    parts.append(el("text", x_label, x=r1((left + width) / 2), y=r1(height - 6), text_anchor="middle"))
    parts.append(el("text", y_label, x=4, y=14))
    place = left + 150
    for kind in kinds:
        if kind.joined:
            parts.append(el("polyline", points=" ".join(f"{x(a):.1f},{y(b):.1f}" for a, b, _ in kind.dots), class_=f"{kind.css} curve"))
        parts += [el("circle", el("title", words), cx=r1(x(a)), cy=r1(y(b)), r=4.5, class_=kind.css) for a, b, words in kind.dots]
        if kind.dots:
            parts.append(el("circle", cx=r1(place), cy=10, r=4.5, class_=kind.css))
            parts.append(el("text", kind.label, x=r1(place + 9), y=14))
            place += 30 + 7 * len(kind.label)
    return svg(width, height, f"{y_label} against {x_label}", parts)


def layers_picture(parent: Sequence[Mapping[str, int]], child: Sequence[Mapping[str, int]]) -> Markup:
    """Layers from left to right: of each the key-value heads (above) and the channels of its MLP (below), in shares of the widest."""
    step, tall, gap, left = 44.0, 60.0, 26.0, 70.0
    width = max(640.0, left + step * len(parent) + 10)
    parts: list[Markup] = []
    for row, (key, label) in enumerate((("kv_heads", "attention"), ("ffn_size", "MLP"))):
        most = max([one[key] for one in parent] or [1]) or 1
        floor = (row + 1) * (tall + gap) - 8
        parts.append(el("text", label, x=0, y=r1(floor - tall / 2)))
        for number, (own, new) in enumerate(zip(parent, child, strict=True)):
            at = left + number * step
            for size, css in ((own[key], "track"), (new[key], "greedy")):
                high = tall * size / most
                text = f"layer {number}: {new[key]} of {own[key]}"
                if size:
                    parts.append(
                        el("rect", el("title", text), x=r1(at), y=r1(floor - high), width=step - 12, height=r1(high), rx=3, class_=css)
                    )
            parts.append(el("text", str(new[key]) if new[key] else "none", x=r1(at + 16), y=r1(floor + 14), text_anchor="middle"))
    return svg(width, 2 * (tall + gap) + 10, "Layers of the child", parts)


def dependency_picture(layers: Sequence[int], values: Sequence[Sequence[float]], fused: Sequence[Sequence[int]]) -> Markup:
    """Dependency matrix of a run of layers: a cell is the darker the more its column's layer needs its row's; what is fused is framed."""
    step, left, top = 46.0, 70.0, 22.0
    labels = [f"layer {layer}" for layer in layers]
    parts: list[Markup] = []
    for i, label in enumerate(labels):
        parts.append(el("text", label, x=r1(left + (i + 0.5) * step), y=14, text_anchor="middle"))
        parts.append(el("text", label, x=r1(left - 8), y=r1(top + (i + 0.6) * step), text_anchor="end"))
        for j in range(i + 1, len(labels)):
            x, y = left + j * step, top + i * step
            size = {"x": r1(x + 1), "y": r1(y + 1), "width": step - 2, "height": step - 2}
            framed = any({layers[i], layers[j]} <= set(run) for run in fused)
            hover = el("title", f"{labels[j]} on {label}: {values[i][j]:.4f}")
            shade = round(min(1.0, 0.05 + values[i][j]), 2)
            parts.append(el("rect", hover, **size, fill_opacity=shade, class_="after mark" if framed else "after"))
            parts.append(el("text", f"{values[i][j]:.3f}", x=r1(x + step / 2), y=r1(y + step * 0.6), text_anchor="middle"))
    return svg(max(640.0, left + step * len(labels)), top + step * len(labels), "Dependency matrix", parts)


def accuracy_bars(rows: Sequence[tuple[str, Mapping[str, Any], str]]) -> Markup:
    """Accuracies from 0 to 1 as bars with 95 % whiskers where they are known; the dashed line is guessing, 0.5."""
    width, left, right, high = 500.0, 190.0, 52.0, 26.0
    scale = width - left - right
    parts: list[Markup] = []
    for i, (label, score, css) in enumerate(rows):
        y = i * high
        text = f"{label}: {format_score_ci(score) if 'ci95' in score else format_score(score['mean'])}, n {score['n']}"
        parts.append(el("text", label, x=left - 10, y=r1(y + 17), text_anchor="end"))
        parts.append(el("rect", x=left, y=r1(y + 5), width=scale, height=15, rx=3, class_="track"))
        parts.append(el("rect", el("title", text), x=left, y=r1(y + 5), width=r1(scale * score["mean"]), height=15, rx=3, class_=css))
        if "ci95" in score:
            a, b = score["ci95"]
            parts.append(_line(left + a * scale, y + 12.5, left + b * scale, y + 12.5, "base"))
        parts.append(el("text", f"{score['mean']:.2f}", x=r1(width - right + 8), y=r1(y + 17), class_="strong"))
    parts.append(_line(left + scale / 2, 0, left + scale / 2, len(rows) * high, "mark"))
    return svg(width, max(1, len(rows)) * high, "Pair accuracy", parts)


def _line(x1: float, y1: float, x2: float, y2: float, css: str) -> Markup:
    return el("line", x1=r1(x1), y1=r1(y1), x2=r1(x2), y2=r1(y2), class_=css)


def r1(value: float) -> float:
    """A coordinate, short."""
    return round(value, 1)
