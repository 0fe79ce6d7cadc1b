"""Benchmark results as lines and as a page: scores with intervals, by subject, worst items, lengths, unparsed answers, pairs of models."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gristmill.core.echo import visible
from gristmill.core.io import write_text
from gristmill.data.rows import read_records
from gristmill.report.markup import Markup, document, el, table
from gristmill.report.sample_files import studio_link

NUM_SHOWN = 8  # items of a task on the page
MAX_CHARACTERS = 1500  # of a text on the page
QUANTILES = (10, 50, 90, 100)  # of answers' lengths


def benchmark_rows(report: Mapping[str, Any]) -> Iterator[tuple[str, str, dict[str, Any], Mapping[str, Any]]]:
    """Name, column, figures and whole entry of each line: a task of several subsets is one line a column, in place of its subsets."""
    told: set[str] = set()
    for name, entry in report["tasks"].items():
        whole = report["groups"].get(entry["task"])
        if whole is not None:
            if entry["task"] in told:
                continue
            told.add(entry["task"])
            name, metrics = entry["task"], whole["metrics"]
            entry = _joined(report, name, whole)
        else:
            metrics = entry["metrics"]
        for column, one in metrics.items():
            yield name, column, one, entry


def _joined(report: Mapping[str, Any], task: str, whole: Mapping[str, Any]) -> dict[str, Any]:
    """What the subsets of a task say together."""
    parts = [entry for entry in report["tasks"].values() if entry["task"] == task]
    unparsed: dict[str, int] = {}
    for part in parts:
        for column, count in part.get("unparsed", {}).items():
            unparsed[column] = unparsed.get(column, 0) + count
    out: dict[str, Any] = {"task": task, "n": whole["n"], "num_fewshot": parts[0]["num_fewshot"], "unparsed": unparsed}
    out["notes"] = list(dict.fromkeys(note for part in parts for note in part["notes"]))
    if "contaminated" in parts[0]:
        out["contaminated"] = sum(part["contaminated"] for part in parts)
    for key in ("empty", "cut_answers"):
        if key in parts[0]:
            out[key] = sum(part[key] for part in parts)
    return out | ({"against": whole["against"]} if "against" in whole else {})


def interval(score: Mapping[str, Any], form: str = ".4f") -> str:
    """A figure with its 95 % interval, as far as there are any."""
    if score["value"] is None:
        return "-"
    bounds = score.get("ci95")
    if not bounds or any(bound is None for bound in bounds):
        return f"{score['value']:{form}}"
    return f"{score['value']:{form}} [{bounds[0]:.3f}, {bounds[1]:.3f}]"


def benchmark_text(report: Mapping[str, Any]) -> str:
    """The results as lines for a terminal."""
    rows = [["task", "shots", "metric", "score", "n", ""]]
    notes: list[str] = []
    for name, column, one, entry in benchmark_rows(report):
        extra = [f"macro {one['macro']:.4f}"] if "macro" in one else []
        if unparsed := entry.get("unparsed", {}).get(column):
            extra.append(f"{unparsed} unparsed")
        rows.append([name, str(entry["num_fewshot"]), column, interval(one), f"{one['n']:,}", ", ".join(extra)])
        if rows[-2][0] != name:
            notes += _told(report, name, entry)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return visible("\n".join([*lines, *notes]))


def _told(report: Mapping[str, Any], name: str, entry: Mapping[str, Any]) -> Iterator[str]:
    """What a reader of a task's scores should know."""
    yield from (f"{name}: {note}" for note in entry["notes"])
    if "contaminated" in entry:
        clean = entry.get("clean_metrics", {})
        without = f"; without them {next(iter(clean))} is {interval(next(iter(clean.values())))}" if clean and entry["contaminated"] else ""
        yield f"{name}: {entry['contaminated']:,} of {entry['n']:,} documents have 13 words in a row in the training rows{without}"
    if obeyed := entry.get("obedience"):
        mode = report["settings"]["thinking"]
        yield f"{name}: {obeyed['mean']:.3f} of the answers keep the form of thinking {mode}; {entry['mean_tokens']} tokens in the mean"
    if entry.get("empty"):
        yield f"{name}: {entry['empty']:,} empty answers"
    if pair := entry.get("against"):
        yield f"{name}: against {report['against']} {_difference(pair)}"


def _difference(pair: Mapping[str, Any]) -> str:
    bounds = pair.get("ci95")
    return f"{pair['mean']:+.4f}" + (f" [{bounds[0]:+.3f}, {bounds[1]:+.3f}]" if bounds else "") + f", n {pair['n']:,}"


def write_benchmark_page(folder: Path, report: Mapping[str, Any]) -> Path:
    """Write `report.html` into an evaluation's folder, from its results and samples. Returns its path."""
    against = report.get("against")
    head = ["task", "shots", "metric", "score", "95 % interval", "n", "macro", "unparsed", *(["against"] if against else [])]
    rows = []
    for name, column, one, entry in benchmark_rows(report):
        bounds = one.get("ci95")
        cells: list[Any] = [name, entry["num_fewshot"], column, "-" if one["value"] is None else f"{one['value']:.4f}"]
        cells += [f"{bounds[0]} to {bounds[1]}" if bounds else "-", f"{one['n']:,}", f"{one['macro']:.4f}" if "macro" in one else ""]
        cells.append(entry.get("unparsed", {}).get(column, ""))
        if against:
            cells.append(_difference(entry["against"]) if entry.get("against") else "")
        rows.append(cells)
    top = el("header", el("p", "gristmill evaluation", class_="eyebrow"), el("h1", _title(report)), _settings(report), class_="top")
    parts: list[Markup] = [el("h2", "Scores"), table(head, rows)]
    parts.append(el("p", "Shares have Wilson's interval, other means and perplexities that of a bootstrap over documents.", class_="soft"))
    notes = list(dict.fromkeys(note for name, _, _, entry in benchmark_rows(report) for note in _told(report, name, entry)))
    if notes:
        parts += [el("h2", "What to know"), el("ul", [el("li", note) for note in notes], class_="lines")]
    for task in report["groups"]:
        parts += _subjects(task, [entry for entry in report["tasks"].values() if entry["task"] == task])
    for name, entry in report["tasks"].items():
        path = folder / "samples" / f"{name}.jsonl"
        if path.is_file():
            parts.append(_items(name, entry, read_records(path)))
    path = folder / "report.html"
    write_text(path, document("gristmill: evaluation", top, el("main", parts)))
    return path


def _title(report: Mapping[str, Any]) -> str:
    return str(report["model"].get("name", "a model"))


def _settings(report: Mapping[str, Any]) -> Markup:
    settings = report["settings"]
    told = [f"seed of the shots {settings['seed']}"]
    if settings["limit"] is not None:
        told.append(f"the first {settings['limit']} documents of each task alone: no published figure")
    if settings["chat"]:
        told.append("generated answers in the chat format")
    if settings.get("thinking"):
        budget = settings["max_thinking_tokens"]
        told.append(f"thinking {settings['thinking']}" + (f", {budget} tokens of it at most" if budget is not None else ""))
    return el("p", "; ".join(told), class_="soft")


def _subjects(task: str, entries: Sequence[Mapping[str, Any]]) -> list[Markup]:
    columns = list(entries[0]["metrics"])
    rows = [[entry["subset"], f"{entry['n']:,}", *(interval(entry["metrics"][c], ".3f") for c in columns)] for entry in entries]
    first = columns[0]
    order = sorted(range(len(rows)), key=lambda i: entries[i]["metrics"][first]["value"] or 0.0)
    return [el("h2", f"{task} by subset"), table(["subset", "n", *columns], [rows[i] for i in order])]


def _items(name: str, entry: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> Markup:
    """Worst items of a task, and how long its answers are."""
    body: list[Markup | None] = []
    lengths = [row["num_tokens"] for row in samples if isinstance(row.get("num_tokens"), int)]
    if lengths:
        ordered = sorted(lengths)
        tokens = [ordered[min(len(ordered) - 1, len(ordered) * share // 100)] for share in QUANTILES]
        told = ", ".join(f"{share} % at most {num}" for share, num in zip(QUANTILES, tokens, strict=True))
        body.append(el("p", f"Tokens of an answer: {told}; {entry.get('cut_answers')} were cut at the longest.", class_="soft"))
    if entry.get("ties"):
        body.append(el("p", f"Items whose two best choices are within 1e-5: {', '.join(map(str, entry['ties'][:20]))}.", class_="soft"))
    body += [_sample(row, studio_link(f"samples/{name}.jsonl", place)) for place, row in _worst(samples)]
    return el("details", el("summary", f"{name}: worst items"), body, class_="task")


def _worst(samples: Sequence[Mapping[str, Any]]) -> list[tuple[int, Mapping[str, Any]]]:
    """Wrong items with their places, first those where the model was surest of another choice; or the least likely texts."""

    def badness(found: tuple[int, Mapping[str, Any]]) -> tuple[float, float]:
        row = found[1]
        right = next(iter(row.get("scores", {}).values()), 0.0)
        logprobs, gold = row.get("logprobs"), row.get("gold")
        gap = max(logprobs) - logprobs[gold] if logprobs and isinstance(gold, int) and 0 <= gold < len(logprobs) else 0.0
        return -right, gap

    wrong = [(place, row) for place, row in enumerate(samples) if next(iter(row.get("scores", {}).values()), 0.0) < 1]
    return sorted(wrong, key=badness, reverse=True)[:NUM_SHOWN]


def _cut(text: object, *, end: bool = False) -> str:
    whole = str(text)
    if len(whole) <= MAX_CHARACTERS:
        return whole
    return f"[..] {whole[-MAX_CHARACTERS:]}" if end else f"{whole[:MAX_CHARACTERS]} [..]"


def _sample(row: Mapping[str, Any], link: Markup) -> Markup:
    context = row.get("context") or (row.get("contexts") or [""])[0]
    turns = [("asked", _cut(context, end=True))]
    if "continuations" in row:
        logprobs = row.get("logprobs", [])
        for number, (continuation, logprob) in enumerate(zip(row["continuations"], logprobs, strict=False)):
            turns.append((f"{logprob:.3f}", f"{'* ' if number == row.get('gold') else ''}{_cut(continuation)}"))
    elif "answer" in row:
        turns += [("answer", _cut(row["answer"])), ("right", _cut(row.get("gold", "")))]
        turns += [(f"read by {name}", _cut(found)) for name, found in row.get("extracted", {}).items()]
        turns += [(name, one.get("reason", "")) for name, one in row.get("programs", {}).items()]
    facts = [f"document {row.get('doc_id')}", *(f"{k} {v:.3g}" for k, v in row.get("scores", {}).items())]
    shown = [el("div", el("span", who, class_="who"), el("div", said, class_="said"), class_="turn") for who, said in turns]
    return el("div", el("p", [el("span", fact, class_="chip") for fact in facts], link, class_="lineage"), shown, class_="sample")
