"""Page of a plan: memory by part, time by part, and the pipeline's timeline as SVG; it needs nothing from anywhere."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gristmill.core.io import write_text
from gristmill.parallel.layout import Layout
from gristmill.parallel.memory import USABLE_SHARE
from gristmill.parallel.planner import Found, Plan, published_rows
from gristmill.parallel.schedule import BACKWARD, FORWARD, INPUT, WEIGHT, Slot, timeline
from gristmill.report.figures import r1, svg
from gristmill.report.markup import Markup, document, el
from gristmill.report.plan import TIME_WORDS, devices_of, plan_lines, published_lines, search_lines

MAX_RANKS, MAX_SHOWN = 32, 10_000  # pipeline ranks, and passes, that a timeline draws
# Colours of the page's style, which the parts of a bar take in turn.
COLOURS = ("greedy", "sampled", "wheat", "soft", "bad", "good", "hint")


def write_page(plan: Plan, path: Path, found: Found | None = None, tokens: float | None = None) -> None:
    """Write the plan's page, which needs nothing from anywhere."""
    layout = plan.layout
    usable = USABLE_SHARE * plan.device_bytes / 2**30
    memory = [(f"{name} rank", {k: v / 2**30 for k, v in asdict(rank).items()}) for name, rank in plan.memory.items()]
    time = {TIME_WORDS[name]: value for name, value in asdict(plan.time).items()}
    body: list[Any] = [
        el("pre", "\n".join(plan_lines(plan, tokens))),
        *([el("div", el("h3", "It does not fit"), el("p", plan.refusal), class_="plain")] if plan.refusal else []),
        _bars("Memory by part, GiB", memory, usable),
        _bars("Time of a step by part, seconds", [("step", time)], None),
    ]
    if layout.pp > 1:
        body.append(_pipeline(layout, plan.time.bubble / plan.time.total))
    if found is not None:
        body.append(el("h2", "Search"))
        body.append(el("pre", "\n".join(search_lines(found, len(found.plans)))))
    errors = published_rows()
    body += [
        el("h2", "How far to trust it"),
        el("pre", "\n".join(published_lines(errors))),
        el("p", "Each row is a published measurement on H100. What is not published is assumed; see docs/scale.md.", class_="note"),
    ]
    head = el(
        "header",
        el("p", "Plan", class_="eyebrow"),
        el("h1", plan.name),
        el("p", f"{devices_of(plan)}, {layout}", class_="soft"),
        class_="top",
    )
    write_text(path, document(f"{plan.name}: plan", head, el("main", body)))


def _bars(title: str, rows: Sequence[tuple[str, Mapping[str, float]]], limit: float | None) -> Markup:
    """Stacked bars, a row each, with a legend and, where there is a limit, a line at it."""
    width, left, right, high = 1040.0, 90.0, 70.0, 34.0
    names = [name for name in rows[0][1] if any(values[name] > 0 for _, values in rows)]
    totals = [sum(values.values()) for _, values in rows]
    scale = (width - left - right) / max(*totals, limit or 0.0, 1e-12)
    parts: list[Markup] = []
    for i, ((label, values), total) in enumerate(zip(rows, totals, strict=True)):
        x, y = left, i * high + 6
        parts.append(el("text", label, x=r1(left - 10), y=r1(y + 17), text_anchor="end"))
        for number, name in enumerate(names):
            length = values[name] * scale
            title_of = el("title", f"{label}, {name}: {values[name]:,.4g} of {total:,.4g} ({values[name] / max(total, 1e-12):.1%})")
            parts.append(el("rect", title_of, x=r1(x), y=r1(y), width=r1(length), height=24, style=_colour(number)))
            x += length
        parts.append(el("text", f"{total:,.3g}", x=r1(x + 7), y=r1(y + 17), class_="strong"))
    bottom = len(rows) * high + 4
    if limit is not None:
        parts.append(el("line", x1=r1(left + limit * scale), x2=r1(left + limit * scale), y1=0, y2=bottom, class_="level"))
        parts.append(el("text", f"usable {limit:,.1f}", x=r1(left + limit * scale), y=r1(bottom + 14), text_anchor="end"))
    figure = svg(width, bottom + 20, title, parts)
    return el("div", el("p", title, class_="title"), _legend(names), figure, class_="figure wideplot")


def _legend(names: Sequence[str]) -> Markup:
    keys = [el("span", el("i", style=_colour(number, "background")), name) for number, name in enumerate(names)]
    return el("div", keys, class_="legend")


def _colour(number: int, kind: str = "fill") -> str:
    """Colours of the style in turn, paler in the second round."""
    return f"{kind}: var(--{COLOURS[number % len(COLOURS)]}); opacity: {0.5 if number >= len(COLOURS) else 0.9}"


def _pipeline(layout: Layout, share: float) -> Markup:
    """Timeline of the schedule: a row a rank, its passes by kind; of many micro-batches the first ones alone."""
    pp, vp, num_micro_batches = layout.pp, layout.vp, layout.num_micro_batches
    shown = min(num_micro_batches, MAX_SHOWN // (2 * pp * vp))
    shown -= shown % pp if vp > 1 and layout.schedule != "zbv" else 0  # as the schedule needs it
    if pp > MAX_RANKS or shown < pp:
        return el("p", f"The timeline of PP {pp}, VP {vp} has too many passes to be drawn.", class_="note")
    slots = timeline(layout.schedule, pp, vp, shown)
    end = max(row[-1].end for row in slots)
    parted = {INPUT: "gradients of states", WEIGHT: "gradients of matrices"}
    names = {FORWARD: "forward"} | ({BACKWARD: "backward"} if layout.schedule == "1f1b" else parted)
    width, left, high = 1040.0, 60.0, 14.0 if pp > 8 else 20.0
    scale = (width - left - 8) / end
    parts: list[Markup] = []
    for rank, row in enumerate(slots):
        y = rank * high
        parts.append(el("text", f"rank {rank}", x=r1(left - 8), y=r1(y + high - 4), text_anchor="end"))
        for number, kind in enumerate(names):
            # one path a rank and kind; chunks of odd numbers are drawn lower, so that neighbours can be told apart
            d = "".join(_box(slot, left, y, high=high, scale=scale, pp=pp) for slot in row if slot.kind == kind)
            parts.append(el("path", d=d, style=_colour(number)))
    text = "Drawn with a backward pass of twice the time of its forward pass. "
    text += f"Bubble of all {num_micro_batches:,} micro-batches, as planned: {share:.1%} of a step."
    text += f" Drawn: {shown:,}." if shown < num_micro_batches else ""
    figure, key = svg(width, pp * high + 4, "Pipeline timeline", parts), _legend(list(names.values()))
    return el("div", el("p", "Pipeline timeline", class_="title"), el("p", text, class_="sub"), key, figure, class_="figure wideplot")


def _box(slot: Slot, left: float, y: float, *, high: float, scale: float, pp: int) -> str:
    lower = 2.0 if slot.stage // pp % 2 else 0.0
    length = max(0.4, (slot.end - slot.start) * scale - 0.4)
    return f"M{r1(left + slot.start * scale)} {r1(y + 1 + lower)}h{length:.1f}v{high - 4:.0f}h-{length:.1f}z"
