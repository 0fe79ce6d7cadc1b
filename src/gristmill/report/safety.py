"""Page of a safety evaluation: outcomes by set, label, type and attack, refusals, guards, canaries, and prompts that failed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gristmill.core.io import read_json, write_text
from gristmill.data.rows import read_records
from gristmill.report.comparisons import format_ci, format_score
from gristmill.report.markup import Markup, document, el, table
from gristmill.report.sample_files import studio_link

NUM_SHOWN = 12  # failed prompts on the page
MAX_CHARACTERS = 1500  # of a text on the page
COUNTS = ("passed", "failed", "incoherent", "none")
HEAD = ["", *COUNTS, "passed of the clear ones"]


def write_safety_page(folder: Path) -> Path:
    """Write `report.html` into a safety evaluation's folder, from its results and samples. Returns its path."""
    results, canaries, garak = (_read(folder / name) for name in ("results.json", "canaries.results.json", "garak.results.json"))
    settings = results.get("settings", {})
    facts = "; ".join(f"{key} {value}" for key, value in settings.items() if value not in ("", None, []))
    name = str(results.get("model") or canaries.get("model") or "a model")
    top = el("header", el("p", "gristmill safety", class_="eyebrow"), el("h1", name), el("p", facts, class_="soft"), class_="top")
    parts: list[Markup] = []
    for set_name, found in results.get("sets", {}).items():
        parts += [el("h2", set_name), _outcomes(found["labels"])]
        if len(found["types"]) > 1:
            parts += [el("h3", "By type"), _outcomes(found["types"])]
        words = {"over_refusal": "safe prompts refused", "compliance": "unsafe prompts answered"}
        rows = [[words[key], _share(found["refusals"][key]), found["refusals"][key]["n"]] for key in words if key in found["refusals"]]
        parts += [table(["by how replies begin", "share", "n"], rows, medium=True)] if rows else []
    for title, rows_of in (("Attacks", results.get("attacks")), ("garak", garak.get("families"))):
        parts += [el("h2", title), _outcomes(rows_of)] if rows_of else []
    if guards := results.get("guards"):
        rows = [[guard, _share(g["unsafe"]), g["unsafe"]["n"], g["unreadable"], _codes(g)] for guard, g in guards.items()]
        parts += [el("h2", "Guards"), table(["guard", "unsafe", "n", "unreadable", "codes"], rows)]
    if canaries:
        rows = [[group, _share(canaries[group]["repeated"]), canaries[group]["repeated"]["n"], _bits(canaries[group])] for group in _GROUPS]
        parts += [el("h2", "Canaries"), table(["", "repeated", "n", "exposure, bits"], rows, medium=True)]
    path = folder / "samples.jsonl"
    samples = read_records(path) if path.is_file() else []
    failed = [(place, row) for place, row in enumerate(samples) if row.get("outcome") == "failed"]
    if failed:
        shown = f"{min(len(failed), NUM_SHOWN)} of {len(failed):,} prompts that failed"
        told = [_sample(row, studio_link(path.name, place)) for place, row in failed[:NUM_SHOWN]]
        parts += [el("h2", "What failed"), el("details", el("summary", shown), told)]
    out = folder / "report.html"
    write_text(out, document("gristmill: safety", top, el("main", parts)))
    return out


_GROUPS = ("planted", "control")


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _outcomes(rows: Mapping[str, Mapping[str, Any]]) -> Markup:
    return table(HEAD, [[name, *(f"{c[key]:,}" for key in COUNTS), _share(c["share"])] for name, c in rows.items()])


def _share(score: Mapping[str, Any]) -> str:
    return f"{format_score(score['mean'])} {format_ci(score)}" if score["n"] else "\u2013"


def _codes(guard: Mapping[str, Any]) -> str:
    return ", ".join(f"{code} {share['mean']:.3f}" for code, share in guard["codes"].items()) or "none"


def _bits(group: Mapping[str, Any]) -> str:
    found = group.get("exposure")
    return f"{found['mean']:.2f} [{found['ci95'][0]:.2f}, {found['ci95'][1]:.2f}]" if found else "\u2013"


def _sample(row: Mapping[str, Any], link: Markup) -> Markup:
    turns: Sequence[Mapping[str, Any]] = [*row["messages"], {"role": "answer", "content": row["answer"]}]
    facts = [str(row[key]) for key in ("set", "type", "label", "attack") if row.get(key)]
    shown = [_turn(turn["role"], str(turn["content"])) for turn in turns]
    return el("div", el("p", [el("span", fact, class_="chip") for fact in facts], link, class_="lineage"), shown, class_="sample")


def _turn(who: str, said: str) -> Markup:
    cut = said if len(said) <= MAX_CHARACTERS else f"{said[:MAX_CHARACTERS]} [..]"
    return el("div", el("span", who, class_="who"), el("div", cut, class_="said"), class_="turn")
