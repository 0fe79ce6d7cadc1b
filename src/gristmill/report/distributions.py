"""Histogram of one metric with the limits of its rule, as inline SVG.

The bins are those of `gristmill.curate.stats`. Metrics between 0 and 1 get a linear axis; others a symmetric logarithmic one, on which 0 to
1 takes as much room as each doubling beyond.
"""

import math
from collections.abc import Mapping

from gristmill.curate.stats import BINS_PER_OCTAVE, BINS_TO_ONE
from gristmill.report.figures import r1, svg
from gristmill.report.markup import Markup, el

WIDTH, HEIGHT, TOP, BOTTOM, SIDE = 330.0, 138.0, 18.0, 20.0, 14.0
MAX_BEYOND = 0.02  # share of documents beyond 1 that a linear axis puts into its last bar
MIN_SPAN = 10  # bars


def distribution(bins: Mapping[str, int], low: float | None, high: float | None) -> Markup:
    """How many documents have which value; the shaded sides are those that the limits `low` and `high` drop.

    Args:
        bins: documents by the number of their bin.
    """
    counts = {int(number): count for number, count in bins.items()}
    total = sum(counts.values())
    limits = [limit for limit in (low, high) if limit is not None]
    beyond = sum(count for number, count in counts.items() if number > BINS_TO_ONE)
    is_linear = min(counts, default=0) >= 0 and beyond <= MAX_BEYOND * total and all(0 <= limit <= 1 for limit in limits)
    bars: dict[int, int] = {}
    for number, count in counts.items():
        slot = min(number, BINS_TO_ONE + 1) if is_linear else _slot(number)
        bars[slot] = bars.get(slot, 0) + count
    drawn = {side: _place(limit, is_linear) for side, limit in (("low", low), ("high", high)) if limit is not None}
    if not is_linear and drawn.get("low", 0.5) % 1 == 0:
        drawn["low"] -= 1  # what is counted and meets the limit stands in the bar before it
    at = [*bars, *(math.ceil(place) + (1 if side == "high" else -1) for side, place in drawn.items())]
    first, last = min(at, default=0) - 1, max(at, default=1)
    more = max(0, MIN_SPAN - (last - first))
    first, last = (max(-1, first - more), last) if is_linear and last >= BINS_TO_ONE else (first, last + more)
    step = (WIDTH - 2 * SIDE) / (last - first)

    def x(place: float) -> float:
        return SIDE + (place - first) * step

    ground, most = HEIGHT - BOTTOM, max(bars.values(), default=1)
    parts: list[Markup] = []
    for side, limit_at in drawn.items():
        begin, end = (x(first), x(limit_at)) if side == "low" else (x(limit_at), x(last))
        parts.append(el("rect", x=r1(begin), y=TOP, width=r1(max(0.0, end - begin)), height=r1(ground - TOP), class_="alarm"))
    for slot, count in sorted(bars.items()):
        tall = max(1.5, count / most * (ground - TOP - 4))
        a, b = (_value(place, is_linear) for place in (slot - 1, slot))
        where = "0" if slot == 0 else f"over {short(a)}" if is_linear and slot > BINS_TO_ONE else f"{short(a)} to {short(b)}"
        value = 0.0 if not slot else (a + b) / 2 if is_linear else max(a, b)
        is_out = (low is not None and value < low) or (high is not None and value > high)
        about = el("title", f"{where}: {count:,} documents ({count / total:.1%})")
        place = {"x": r1(x(slot - 1) + 0.5), "y": r1(ground - tall), "width": r1(max(0.5, step - 1)), "height": r1(tall)}
        parts.append(el("rect", about, **place, class_="fill2" if is_out else "fill"))
    parts.append(el("line", x1=SIDE, y1=ground, x2=WIDTH - SIDE, y2=ground, class_="base"))
    for side, limit_at in drawn.items():
        parts.append(el("line", x1=r1(x(limit_at)), y1=TOP - 4, x2=r1(x(limit_at)), y2=ground, class_="level"))
        limit = low if side == "low" else high
        parts.append(el("text", short(limit or 0.0), x=r1(x(limit_at)), y=TOP - 7, text_anchor=_anchor(x(limit_at)), class_="strong"))
    for tick in _ticks(_value(first, is_linear), _value(min(last, BINS_TO_ONE) if is_linear else last, is_linear), is_linear):
        here = x(_place(tick, is_linear))
        parts.append(el("text", short(tick), x=r1(here), y=HEIGHT - 5, text_anchor=_anchor(here)))
    return svg(WIDTH, HEIGHT, "Distribution of a metric", parts)


def _anchor(x: float) -> str:
    return "start" if x < 30 else "end" if x > WIDTH - 30 else "middle"


def _slot(number: int) -> int:
    """The bar of a bin on the logarithmic axis: a quarter of a doubling."""
    size = abs(number)
    bar = math.ceil(size * BINS_PER_OCTAVE / BINS_TO_ONE) if size <= BINS_TO_ONE else BINS_PER_OCTAVE + size - BINS_TO_ONE
    return bar if number >= 0 else 1 - bar


def _place(value: float, is_linear: bool) -> float:
    """Where a value stands on the axis, in bars."""
    if is_linear:
        return value * BINS_TO_ONE
    size = abs(value)
    return math.copysign(BINS_PER_OCTAVE * (size if size <= 1 else 1 + math.log2(size)), value)


def _value(place: float, is_linear: bool) -> float:
    if is_linear:
        return place / BINS_TO_ONE
    size = abs(place) / BINS_PER_OCTAVE
    return math.copysign(size if size <= 1 else 2.0 ** (size - 1), place)


def _ticks(first: float, last: float, is_linear: bool) -> list[float]:
    if is_linear:
        step = 0.2 if last - first > 0.5 else 0.1 if last - first > 0.25 else 0.05
        return [round(k * step, 2) for k in range(math.ceil(first / step - 1e-9), math.floor(last / step + 1e-9) + 1)]
    sizes = [0.0, 1.0]
    while sizes[-1] < max(abs(first), abs(last)):
        sizes.append(10 * sizes[-1])
    ticks = sorted({tick for size in sizes for tick in (-size, size) if first <= tick <= last})
    return ticks[:: -(-len(ticks) // 6) or 1]


def short(value: float) -> str:
    """A value in few characters."""
    value, size = value + 0.0, abs(value)  # no -0
    if size >= 1e15:
        return f"{value:.0e}"
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= factor:
            return f"{value / (1e3 if unit == 'k' else factor):.3g}{unit}"
    return f"{value:,.0f}" if size >= 100 or value == int(value) else f"{value:.3g}"
