"""Lineage of rows: where a row of a run came from: the chain of calls and rows behind it, and the calls that failed."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from gristmill.core.errors import InputError
from gristmill.data.rows import read_records, rows_of
from gristmill.runs import artifacts
from gristmill.runs.journal import Journal, read_once
from gristmill.runs.run_dir import RECIPE
from gristmill.synth.parsing import parse_list, unique

# Of rows that are in several stages the later word counts: a judged answer, not the answer as it came.
KINDS: dict[artifacts.Artifact[Any], str] = {
    artifacts.TOPICS: "topic",
    artifacts.PROMPTS: "prompt",
    artifacts.RESPONSES: "response",
    artifacts.HUMAN_DEMONSTRATIONS: "demonstration",
    artifacts.SAID_RATINGS: "rating",
    artifacts.SAID_PAIRS: "pair",
    artifacts.SAID_DEMONSTRATIONS: "demonstration",
    artifacts.CONVERSATIONS: "demonstration",
    artifacts.KEPT: "demonstration",
    artifacts.PAIRS: "pair",
}
SHOWN_FIELDS = (
    *("task", "generator", "origin", "temperature", "judge", "rating", "score", "verified"),
    *("chosen_reward", "rejected_reward", "edits"),
)
SHOWN = 80  # characters of a text


def lineage(folder: Path, name: str) -> list[dict[str, Any]]:
    """A row of a run and everything that it grew from, each with its depth, parents first met first.

    Raises:
        InputError: the folder holds no run, or nothing in it has this id.
    """
    with ExitStack() as stack:
        journals = [stack.enter_context(Journal(path, read_only=True)) for path in _journals(folder, artifacts.CALLS)]
        known = _known(folder, name, journals)
        if name not in known and _found(name, journals) is None:
            raise InputError(f"Nothing in {folder} has the id {name!r}: ids stand in the column `id` of its .parquet files.")
        out: list[dict[str, Any]] = []
        seen: set[str] = set()

        def walk(one: str, depth: int) -> None:
            if one in seen:
                return
            seen.add(one)
            entry = known.get(one) or _origin(one, journals)
            out.append({"id": one, "depth": depth, **entry})
            for parent in entry["parents"]:
                walk(parent, depth + 1)

        walk(name, 0)
    return out


def errors(folder: Path) -> list[dict[str, Any]]:
    """The calls of a run that failed for good, ratings among them: id, reason, attempts, last status, and what was asked.

    Raises:
        InputError: the folder holds no run.
    """
    out: list[dict[str, Any]] = []
    for path in [*_journals(folder, artifacts.CALLS), *_journals(folder, artifacts.RATING_CALLS)]:
        failed: dict[str, dict[str, Any]] = {}
        for record in read_once(path):  # one that was asked again may have an answer by now
            if "error" in record:
                failed[record["id"]] = record
            else:
                failed.pop(record["id"], None)
        out += failed.values()
    return out


def _journals(folder: Path, artifact: artifacts.JournalArtifact) -> list[Path]:
    if not (folder / RECIPE).is_file() or not any(folder.glob("[0-9][0-9]-*")):
        raise InputError(f"{folder} holds no run: give the folder that `gristmill synth` or `gristmill run` wrote.")
    return sorted(folder.glob(f"*/{artifact.file}"))


def _known(folder: Path, name: str, journals: Sequence[Journal]) -> dict[str, dict[str, Any]]:
    """Rows of a run by id: a row and those that it grew from. Of all others only the ids are read."""
    import pyarrow as pa

    files = [(path, artifact, kind) for artifact, kind in KINDS.items() for path in sorted(folder.glob(f"*/{artifact.file}"))]
    ids = [artifact.columns(path.parent, ["id"])["id"] for path, artifact, _ in files]
    known: dict[str, dict[str, Any]] = {}
    news, asked = {name}, {name}
    while news:
        wanted = pa.array(sorted(news), pa.string())
        for (path, _, kind), column in zip(files, ids, strict=True):
            rows = rows_of(column, wanted)
            known |= {r["id"]: _entry(kind, r) for r in read_records(path, sorted(rows[rows >= 0].tolist()))}
        news = {parent for one in news for parent in (known.get(one) or _origin(one, journals))["parents"]} - asked
        asked |= news
    return known


def _entry(kind: str, r: Mapping[str, Any]) -> dict[str, Any]:
    facts = {name: r[name] for name in SHOWN_FIELDS if r.get(name) not in (None, [])}
    text = r.get("text") or r.get("chosen") or (r["messages"][-1]["content"] if r.get("messages") else "")
    # an answer is one of those of its call, and an item of a list too
    made_of = r.get("repaired_from") or [r["id"].split("#")[0]]
    parents = [r["prompt"], *made_of] if kind == "response" else list(r.get("parents") or ())
    if kind == "rating":  # of an answer: what people rated stands in its meta
        parents = list((r.get("meta") or {}).get("rows") or ())
    if kind == "topic" and "#" in r["id"]:
        parents = [r["id"].split("#")[0]]
    return {"id": r["id"], "kind": kind, "text": _short(text), "parents": parents, **facts}


def _found(name: str, journals: Sequence[Journal]) -> dict[str, Any] | None:
    return next((journal[name] for journal in journals if name in journal), None)


def _origin(name: str, journals: Sequence[Journal]) -> dict[str, Any]:
    """A call, an item of its list, or else what a user gave."""
    if record := _found(name, journals):
        return _call(record)
    call, _, place = name.partition("#")
    if (record := _found(call, journals)) and "out" in record:
        items = unique(parse_list(record["out"][0][0])) or [record["out"][0][0]]
        return {"kind": "item", "text": _short(items[int(place)]) if int(place) < len(items) else "", "parents": [call]}
    return {"kind": "input", "text": "", "parents": []}


def _call(record: dict[str, Any]) -> dict[str, Any]:
    facts = {"template": record.get("for", ""), "generator": record["model"], "sampling": record.get("sampling", {})}
    text = record["out"][0][0] if "out" in record else record.get("error", "")
    return {"kind": "call", "text": _short(text), "parents": record.get("parents") or [], **facts}


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "\u2026"
