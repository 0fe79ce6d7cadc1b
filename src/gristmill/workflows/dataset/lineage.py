"""Where a row of a dataset came from: the chain of calls and rows behind it, and the calls that failed."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from gristmill.core.errors import InputError
from gristmill.data.rows import read_records
from gristmill.runs.journal import Journal
from gristmill.synth.parsing import parse_list, unique

ROWS = ("pairs", "demonstrations", "responses", "prompts")
SHOWN = 80  # characters of a text


def lineage(folder: Path, name: str) -> list[dict[str, Any]]:
    """A row and everything that it grew from, each with its depth, parents first met first.

    Raises:
        InputError: the folder is no dataset run, or nothing in it has this id.
    """
    known = _rows(folder)
    with _journal(folder) as journal:
        if name not in known and name not in journal:
            raise InputError(f"Nothing in {folder} has the id {name!r}: ids stand in the column `id` of its .parquet files.")
        out: list[dict[str, Any]] = []
        seen: set[str] = set()

        def walk(one: str, depth: int) -> None:
            if one in seen:
                return
            seen.add(one)
            entry = known.get(one) or _origin(one, journal)
            out.append({"id": one, "depth": depth, **entry})
            for parent in entry["parents"]:
                walk(parent, depth + 1)

        walk(name, 0)
    return out


def errors(folder: Path) -> list[dict[str, Any]]:
    """The calls that failed for good, ratings among them: id, reason, attempts, last status, and what was asked.

    Raises:
        InputError: the folder is no dataset run.
    """
    with ExitStack() as stack:
        journals = [stack.enter_context(_journal(folder))]
        if (folder / "ratings.jsonl").is_file():
            journals.append(stack.enter_context(Journal(folder / "ratings.jsonl", read_only=True)))
        return [record for journal in journals for record in journal.values() if "error" in record]


def _journal(folder: Path) -> Journal:
    path = folder / "journal.jsonl"
    if not path.is_file():
        raise InputError(f"{folder} holds no dataset run: give the folder that `gristmill synth` wrote.")
    return Journal(path, read_only=True)


def _rows(folder: Path) -> dict[str, dict[str, Any]]:
    return {entry["id"]: entry for kind in ROWS for entry in _of(folder / f"{kind}.parquet", kind)}


def _of(path: Path, kind: str) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    for r in read_records(path):
        facts = {
            k: r[k] for k in ("task", "generator", "origin", "temperature", "judge", "rating", "score", "verified") if r.get(k) is not None
        }
        facts |= {k: r[k] for k in ("chosen_reward", "rejected_reward") if k in r}
        text = r.get("text") or r.get("chosen") or (r["messages"][-1]["content"] if r.get("messages") else "")
        parents = list(r.get("parents") or ())
        if kind == "responses":  # an answer is one of those of its call
            parents = [r["prompt"], r["id"].split("#")[0]]
        yield {"id": r["id"], "kind": kind.removesuffix("s"), "text": _short(text), "parents": parents, **facts}


def _origin(name: str, journal: Journal) -> dict[str, Any]:
    """A call, an item of its list, or else what a user gave."""
    if name in journal:
        return _call(journal[name])
    call, _, place = name.partition("#")
    if call in journal and "out" in (record := journal[call]):
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
