"""Lineage of rows: where a row of a run came from: the chain of calls and rows behind it, and the calls that failed."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from gristmill.core.errors import InputError
from gristmill.data.rows import read_records
from gristmill.runs import artifacts
from gristmill.runs.journal import Journal
from gristmill.runs.run_dir import RECIPE
from gristmill.synth.parsing import parse_list, unique

# Of rows that are in several stages the later word counts: a judged answer, not the answer as it came.
KINDS: dict[artifacts.Artifact[Any], str] = {
    artifacts.TOPICS: "topic",
    artifacts.PROMPTS: "prompt",
    artifacts.RESPONSES: "response",
    artifacts.HUMAN_DEMONSTRATIONS: "demonstration",
    artifacts.CONVERSATIONS: "demonstration",
    artifacts.KEPT: "demonstration",
    artifacts.PAIRS: "pair",
}
SHOWN_FIELDS = (
    *("task", "generator", "origin", "temperature", "judge", "rating", "score", "verified"),
    *("chosen_reward", "rejected_reward"),
)
SHOWN = 80  # characters of a text


def lineage(folder: Path, name: str) -> list[dict[str, Any]]:
    """A row of a run and everything that it grew from, each with its depth, parents first met first.

    Raises:
        InputError: the folder holds no run, or nothing in it has this id.
    """
    with ExitStack() as stack:
        journals = _journals(folder, artifacts.CALLS, stack)
        known = {entry["id"]: entry for artifact, kind in KINDS.items() for entry in _of(folder, artifact, kind)}
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
    with ExitStack() as stack:
        journals = [*_journals(folder, artifacts.CALLS, stack), *_journals(folder, artifacts.RATING_CALLS, stack)]
        return [record for journal in journals for record in journal.values() if "error" in record]


def _journals(folder: Path, artifact: artifacts.JournalArtifact, stack: ExitStack) -> list[Journal]:
    if not (folder / RECIPE).is_file() or not any(folder.glob("[0-9][0-9]-*")):
        raise InputError(f"{folder} holds no run: give the folder that `gristmill synth` or `gristmill run` wrote.")
    return [stack.enter_context(Journal(path, read_only=True)) for path in sorted(folder.glob(f"*/{artifact.file}"))]


def _of(folder: Path, artifact: artifacts.Artifact[Any], kind: str) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob(f"*/{artifact.file}")):
        for r in read_records(path):
            names = (
                "task",
                "generator",
                "origin",
                "temperature",
                "judge",
                "rating",
                "score",
                "verified",
                "chosen_reward",
                "rejected_reward",
                "edits",
            )
            facts = {name: r[name] for name in names if r.get(name) not in (None, [])}
            text = r.get("text") or r.get("chosen") or (r["messages"][-1]["content"] if r.get("messages") else "")
            # an answer is one of those of its call, and an item of a list too
            made_of = r.get("repaired_from") or [r["id"].split("#")[0]]
            parents = [r["prompt"], *made_of] if kind == "response" else list(r.get("parents") or ())
            if kind == "topic" and "#" in r["id"]:
                parents = [r["id"].split("#")[0]]
            yield {"id": r["id"], "kind": kind, "text": _short(text), "parents": parents, **facts}


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
