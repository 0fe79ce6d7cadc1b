"""Curation report: every step's documents, time and memory, the distribution of every metric with its limits, and sample documents."""

import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gristmill.core.errors import InputError
from gristmill.core.io import DamagedFile, read_json, write_text
from gristmill.report.distributions import distribution, short
from gristmill.report.figures import funnel
from gristmill.report.markup import Markup, document, el, table
from gristmill.report.sample_files import studio_link, walk

MAX_SKIPPED = 200  # skips that the page names
MAX_REASONS = 12  # of a step, shown at once
Facts = Mapping[str, Any]
Tell = Callable[[Facts], Markup]  # of a sample: the command that explains it, and where it opens


def _size(num: int) -> str:
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if num >= factor:
            return f"{num / factor:,.1f} {unit}"
    return f"{num} B"


def funnel_lines(results: Facts) -> list[str]:
    """What happened, a line a step."""
    first = results["read"]
    lines = [f"{'read':<14} {first['documents']:>9,} documents {_size(first['bytes']):>10}  of {first['files']:,} files"]
    if first["num_skipped"]:
        lines[0] += f", {first['num_skipped']:,} things skipped"
    for step in results["steps"]:
        why = ", ".join(f"{reason} {count:,}" for reason, count in list(step["reasons"].items())[:4])
        changed = ", ".join(f"{count:,} {kind}" for kind, count in step["changed"].items())
        notes = "; ".join(text for text in (why, f"changed: {changed}" if changed else "") if text)
        lines.append(f"{step['step']:<14} {step['documents_out']:>9,} documents {_size(step['bytes_out']):>10}  {notes}".rstrip())
    return lines


def write_page(folder: Path, results: Facts) -> Path:
    """Write `report.html` into the folder of a finished curation; returns its path.

    Raises:
        InputError: its samples cannot be read, or the page cannot be written.
    """
    try:
        samples = read_json(folder / "samples.json")["steps"]
    except (DamagedFile, KeyError) as e:
        raise InputError(f"{folder / 'samples.json'} cannot be read ({e}): run the same curation with another --out.") from e
    explain = f"gristmill curate {shlex.quote(str(folder / 'recipe.yaml'))} --out {shlex.quote(str(folder))} --explain"
    places = {id(sample): place for place, (_, sample) in enumerate(walk({"steps": samples}))}

    def tell(sample: Facts) -> Markup:
        command = el("code", f"{explain} {shlex.quote(sample['id'] or '')}")
        return el("p", command, studio_link("samples.json", places[id(sample)]), class_="lineage")

    first, steps = results["read"], results["steps"]
    titles = [f"{number}. {step['step']}" for number, step in enumerate(steps, 1)]
    links = [el("a", title, href=f"#step-{number}") for number, title in enumerate(titles, 1)]
    kept = (
        f"{results['documents']:,} of {first['documents']:,} documents kept; files read: {first['files']:,}; {results['seconds']:,.1f} s."
    )
    body: list[Any] = [
        el("h2", "Overview"),
        el("p", "What became of a document, and why:", class_="soft"),
        el("pre", f"{explain} ID"),
        el("div", el("div", funnel(_bars(results)), class_="figure"), class_="grid funnels"),
        _table(results),
        el(
            "p",
            "Seconds are those that all workers together spent on a step; reading and writing shards counts where a stage has one step. "
            "Memory is the most that one process has held up to the end of the stage.",
            class_="note",
        ),
    ]
    if first["skipped"]:
        shown = first["skipped"][:MAX_SKIPPED]
        body += [el("h2", "Skipped while reading"), el("p", f"{len(shown)} of {first['num_skipped']:,}.", class_="soft")]
        body.append(table(("where", "why"), shown, numeric_from=2))
    for number, (title, step, of_step) in enumerate(zip(titles, steps, samples, strict=True), 1):
        body.append(el("section", _step(title, step, of_step, tell), id=f"step-{number}"))
    head = el("header", el("p", "Curation", class_="eyebrow"), el("h1", results["name"]), el("p", kept, class_="soft"), class_="top")
    page = document(f"{results['name']}: curation", head, el("nav", el("div", links)) if links else None, el("main", body))
    path = folder / "report.html"
    write_text(path, page)
    return path


# ---- all steps ----


def _bars(results: Facts) -> list[tuple[str, int, str]]:
    bars = [("documents", 0, ""), ("read", results["read"]["documents"], "fill")]
    return bars + [(step["step"], step["documents_out"], "fill") for step in results["steps"]]


def _table(results: Facts) -> Markup:
    head = ("step", "documents in", "out", "dropped", "text in", "out", "seconds", "peak memory")
    first, stage = results["read"], results["stages"][0]
    rows: list[Sequence[Any]] = [
        ("read", "", f"{first['documents']:,}", "", "", _size(first["bytes"]), f"{stage['seconds']:,.1f}", f"{stage['peak_mib']:,} MiB")
    ]
    for step in results["steps"]:
        lost = sum(step["reasons"].values())  # a step may make documents too
        share = f"{lost:,} ({lost / (lost + step['documents_out']):.1%})" if lost else "0"
        documents = (f"{step['documents_in']:,}", f"{step['documents_out']:,}", share)
        sizes = (_size(step["bytes_in"]), _size(step["bytes_out"]))
        rows.append((step["step"], *documents, *sizes, f"{step['seconds']:,.1f}", f"{step['peak_mib']:,} MiB"))
    return table(head, rows)


# ---- one step ----


def _step(title: str, step: Facts, samples: Facts, tell: Tell) -> list[Markup]:
    """What a step does and did, its metrics, and the reasons that are no metric."""
    flow = f"{step['documents_in']:,} documents came in, {step['documents_out']:,} went on."
    words = [el("code", text) if place % 2 else text for place, text in enumerate(step["description"].split("`"))]
    out = [el("h2", title), el("p", words), el("p", flow, class_="soft")]
    if step["changed"]:
        out.append(table(("what was changed", "number"), [(kind, f"{count:,}") for kind, count in step["changed"].items()], medium=True))
    metrics = step["metrics"]
    if metrics:
        cards = [
            _metric(name, metric, step["reasons"].get(name, 0), _of_rule(samples, name), tell)
            for name, metric in metrics.items()
            if metric["documents"]
        ]
        out.append(el("div", cards, class_="grid"))
    others = [
        _samples(f"{reason}: {count:,} dropped, for example", samples["dropped"].get(reason, []), tell)
        for reason, count in step["reasons"].items()
        if reason not in metrics
    ]
    out += others[:MAX_REASONS]
    if rest := others[MAX_REASONS:]:
        out.append(el("details", el("summary", f"{len(rest)} other reasons"), rest))
    if not any(name in samples["kept"] for name in metrics):
        what = "changed, for example" if step["changed"] else "kept, for example"
        out.append(_samples(what, samples["kept"].get("", []), tell))
    return out


def _of_rule(samples: Facts, name: str) -> dict[str, list[Facts]]:
    return {kind: samples[kind].get(name, []) for kind in ("dropped", "kept")}


def _metric(name: str, metric: Facts, dropped: int, samples: Mapping[str, list[Facts]], tell: Tell) -> Markup:
    limits = {"at least": metric["min"], "at most": metric["max"]}
    rule = " and ".join(f"{word} {short(limit)}" for word, limit in limits.items() if limit is not None)
    about = f"{metric['description']}; {rule} is kept" if rule else metric["description"]
    counts = f"{metric['documents']:,} measured"
    if rule:
        counts += f", {metric['outside']:,} outside ({metric['outside'] / metric['documents']:.1%})"
    if dropped:
        counts += f", {dropped:,} dropped for it first"
    return el(
        "div",
        el("p", name, class_="title"),
        el("p", f"{about[:1].upper()}{about[1:]}.", class_="sub"),
        distribution(metric["bins"], metric["min"], metric["max"]),
        el("p", f"{counts}.", class_="sub"),
        _samples("dropped", samples["dropped"], tell),
        _samples("kept, nearest to the limit", samples["kept"], tell),
        class_="figure",
    )


def _samples(what: str, samples: Sequence[Facts], tell: Tell) -> Markup:
    """Documents, folded away; each with what more can be told of it. Without any only what they would be, if that is a count."""
    if not samples:
        return el("p", what.removesuffix(", for example"), class_="soft") if ":" in what else Markup("")
    inside = []
    for sample in samples:
        facts = [sample.get("reason")]
        if sample.get("figure") is not None:
            facts.append(f"measured {short(sample['figure'])}")
        if sample.get("limit") is not None:
            facts.append(f"limit {short(sample['limit'])}")
        line = ", ".join(text for text in facts if text)
        inside.append(
            el(
                "div",
                el("p", el("b", sample["id"] or ""), f"  {line}" if line else "", class_="lineage"),
                el("div", sample["text"] or "", class_="said"),
                tell(sample),
                class_="sample",
            )
        )
    return el("details", el("summary", f"{what} ({len(samples)})"), inside)
