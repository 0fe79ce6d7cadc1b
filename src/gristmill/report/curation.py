"""The funnel of a curation, as lines and as a page: documents and bytes after each step, reasons, and samples of what was dropped."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from gristmill.core.errors import InputError
from gristmill.report.figures import funnel
from gristmill.report.markup import Markup, document, el, table

SAMPLES = 2  # of each reason
SAMPLE_CHARACTERS = 600
MOST_REASONS = 40  # with samples


def _size(num: int) -> str:
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if num >= factor:
            return f"{num / factor:,.1f} {unit}"
    return f"{num} B"


def _less(num: int) -> str:
    return _size(num) if num >= 0 else f"{_size(-num)} more"


def funnel_lines(facts: dict[str, Any]) -> list[str]:
    """What happened, a line a step."""
    first = facts["read"]
    lines = [f"{'read':<14} {first['documents']:>9,} documents {_size(first['bytes']):>10}  of {first['files']:,} files"]
    if first["num_skipped"]:
        lines[0] += f", {first['num_skipped']:,} things skipped"
    for step in facts["steps"]:
        why = ", ".join(f"{reason} {count:,}" for reason, count in list(step["reasons"].items())[:4])
        changed = ", ".join(f"{count:,} {kind}" for kind, count in step["changed"].items())
        notes = "; ".join(text for text in (why, f"changed: {changed}" if changed else "") if text)
        lines.append(f"{step['step']:<14} {step['documents_out']:>9,} documents {_size(step['bytes_out']):>10}  {notes}".rstrip())
    return lines


def write_page(folder: Path, facts: dict[str, Any]) -> Path:
    """Write `report.html` into the run's folder; returns its path."""
    first, steps = facts["read"], facts["steps"]
    bars = [("documents", 0, ""), ("read", first["documents"], "fill")]
    bars += [(step["step"], step["documents_out"], "fill") for step in steps]
    rows = [("read", f"{first['documents']:,}", "", _size(first["bytes"]), "")]
    for step in steps:
        lost = sum(step["reasons"].values())  # a step may make documents too
        share = f"{lost:,} ({lost / (lost + step['documents_out']):.1%})" if lost else "0"
        rows.append(
            (step["step"], f"{step['documents_out']:,}", share, _size(step["bytes_out"]), _less(step["bytes_in"] - step["bytes_out"]))
        )
    reasons = [(step["step"], reason, f"{count:,}") for step in steps for reason, count in step["reasons"].items()]
    changes = [(step["step"], kind, f"{count:,}") for step in steps for kind, count in step["changed"].items()]
    body: list[Any] = [
        el("h1", facts["name"]),
        el(
            "p",
            f"{first['files']:,} files, {first['documents']:,} documents read, {facts['documents']:,} kept, {facts['seconds']:,} s.",
            class_="soft",
        ),
        el("div", el("div", funnel(bars), class_="figure"), class_="grid funnels"),
        table(("after", "documents", "dropped", "text", "less"), rows),
    ]
    if reasons:
        body += [el("h2", "Reasons"), table(("step", "reason", "documents"), reasons, numeric_from=2)]
    if changes:
        body += [el("h2", "Changed"), table(("step", "what", "number"), changes, numeric_from=2)]
    if first["skipped"]:
        shown = first["skipped"][:200]
        body += [el("h2", "Skipped while reading"), el("p", f"{len(shown)} of {first['num_skipped']:,}.", class_="soft")]
        body.append(table(("where", "why"), shown, numeric_from=2))
    samples = list(_samples(folder))
    if samples:
        body += [el("h2", "Dropped, for example"), *samples]
    path = folder / "report.html"
    try:
        path.write_text(document(f"{facts['name']}: curation", el("main", body)), encoding="utf-8")
    except OSError as e:
        raise InputError(f"{path} cannot be written ({e.strerror}): free some space and run the same command again.") from e
    return path


def _samples(folder: Path) -> Iterator[Markup]:
    seen: dict[tuple[str, str], int] = {}
    for path in sorted((folder / "dropped").glob("*.parquet")):
        chosen = []
        for number, row in enumerate(pq.read_table(path, columns=["step", "reason"]).to_pylist()):
            kind = row["step"], row["reason"] if row["step"] not in ("exact", "fuzzy", "semantic", "seen") else ""
            if seen.get(kind, 0) >= SAMPLES or (kind not in seen and len(seen) >= MOST_REASONS):
                continue
            seen[kind] = seen.get(kind, 0) + 1
            chosen.append(number)
        for row in pq.read_table(path).take(chosen).to_pylist() if chosen else []:  # most files have nothing new
            measured = "" if row["figure"] is None else f" ({row['figure']:.3g}, limit {row['limit']:.3g})"
            about = f"{row['step']}: {row['reason']}{measured}  {row['id']}"
            yield el("details", el("summary", about), el("pre", row["text"][:SAMPLE_CHARACTERS]))
