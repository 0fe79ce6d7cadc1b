"""Export of people's answers: training rows with their lineage, and every single answer, in files that depend on the database alone."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from gristmill.core.errors import InputError
from gristmill.core.io import write_text
from gristmill.data.chat import conversation
from gristmill.data.formats import MARK
from gristmill.data.rows import ATTRIBUTES, Demonstration, Pair, Rated, json_line, make_id, write_rows
from gristmill.studio import made
from gristmill.studio.consensus import NEITHER, SPLIT, nearest
from gristmill.studio.sources import Sources
from gristmill.studio.store import EXPERT, Store, by_item
from gristmill.studio.tasks import KINDS, PAIR, RATE

RATED_FILE, RATINGS_FILE, PAIRS_FILE, PREFERENCE_FILE = "rated.parquet", "ratings.jsonl", "pairs.parquet", "preference.jsonl"
DEMONSTRATIONS_FILE, ATTACKS_FILE, REGRESSIONS_FILE = "demonstrations.parquet", "attacks.jsonl", "regressions.jsonl"
INVALID = -100  # a strength of HelpSteer2-Preference that stands for "neither is acceptable"
LEVELS = ("about the same as", "slightly better than", "better than", "much better than")


def export(store: Store, sources: Sources, folder: Path) -> dict[str, int]:
    """Write all files into a folder; the same database and rows give the same bytes.

    Returns:
        The number of rows of each file, and of items that were left out: `gone` (their rows are no longer there) and `split` (in dispute).

    Raises:
        InputError: a file cannot be written.
    """
    counts = {name: write(store, sources, name, folder / name) for name in FILES}
    items = [
        (item, project["kind"])
        for project in store.projects()
        if project["kind"] in KINDS
        for item in store.items(project["id"])
        if item["closed"]
    ]
    gone = sum(rows_of(sources, item) is None for item, _ in items)
    return counts | {"gone": gone, "split": sum(item["state"] == SPLIT for item, _ in items)}


def write(store: Store, sources: Sources, name: str, path: Path) -> int:
    """Write one of FILES; returns its number of rows."""
    rows = list(FILES[name](store, sources))
    if name.endswith(".parquet"):
        return write_rows(path, rows)
    write_text(path, "".join(json_line(row, f"Row {number} for {path}") for number, row in enumerate(rows, 1)))
    return len(rows)


def rows_of(sources: Sources, item: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The rows of an item, one or two; None where one is gone."""
    found = [sources.find(place, row_id) for place, row_id in zip(item["places"], item["row_ids"], strict=False)]
    whole = [row for row in found if row is not None]
    return whole if whole and len(whole) == len(item["places"]) else None


def answer_texts(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The answers that an item asks about: the last turn of each row, or both sides of a pair."""
    return [answer["text"] for row in rows for answer in row["answers"]]


def _lineage(project: dict[str, Any], item: dict[str, Any], answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    used = [answer for answer in answers if answer["id"] in item["used"]]
    return {
        "project": project["name"],
        "item": item["id"],
        "rows": item["row_ids"],
        "source": project["source"],
        "chosen_by": item["why"],
        "annotators": [answer["pseudonym"] for answer in used],
        "answers": [answer["id"] for answer in used],
        "at": max(answer["at"] for answer in used),
        "rule": item["rule"],
        "spread": item["spread"],
        "mean": item["content"],
    }


def _labeled(
    store: Store, sources: Sources, kind: str
) -> Iterator[tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]]:
    """Project, item, rows and answers of all items with a label; none of a prompt that has an item in dispute, as in HelpSteer2."""
    for project in store.projects():
        if project["kind"] != kind:
            continue
        items, answers = store.items(project["id"]), by_item(store.answers(project["id"]))
        disputed = {item["prompt"] for item in items if item["state"] == SPLIT}
        for item in items:
            if item["closed"] and item["rule"] and item["content"] and item["prompt"] not in disputed:
                rows = rows_of(sources, item)
                if rows is not None:
                    yield project, item, rows, answers[item["id"]]


def rated(store: Store, sources: Sources) -> Iterator[Rated]:
    """Labels of all rated answers."""
    for project, item, rows, answers in _labeled(store, sources, RATE):
        turns = [*rows[0]["messages"], {"role": "assistant", "content": answer_texts(rows)[0]}]
        labels = tuple(item["rounded"][name] for name in ATTRIBUTES)
        yield Rated(item["id"], item["task"] or "general", conversation(turns), labels, item["prompt"], _lineage(project, item, answers))


def pairs(store: Store, sources: Sources) -> Iterator[Pair]:
    """Labels of all comparisons, but for ties."""
    for project, item, rows, answers in _labeled(store, sources, PAIR):
        strength, mean = item["rounded"]["preference"], item["content"]["preference"]
        if not strength:
            continue  # about the same: nothing to prefer
        first, second = answer_texts(rows)
        chosen, rejected = (first, second) if strength < 0 else (second, first)
        prompt, parents = conversation(rows[0]["messages"]), tuple(item["row_ids"])
        meta = _lineage(project, item, answers)
        yield Pair(item["id"], item["prompt"], item["task"], prompt, chosen, rejected, abs(mean), 0.0, "people", parents, meta)


def _ratings(store: Store, sources: Sources) -> Iterator[dict[str, Any]]:
    for project, item, rows, answer in _single(store, sources, RATE):
        values = {name: answer["content"][name] for name in ATTRIBUTES}
        extra = {name: answer["content"][name] for name in ("unsafe", "confidence", "reason") if answer["content"].get(name)}
        yield {
            "prompt": _prompt(rows[0]["messages"]),
            "response": answer_texts(rows)[0],
            **values,
            **_facts(project, item, answer),
            **extra,
        }


def _preferences(store: Store, sources: Sources) -> Iterator[dict[str, Any]]:
    for _, item, rows, answers in _labeled(store, sources, PAIR):
        first, second = answer_texts(rows)
        strength = int(nearest(item["rounded"]["preference"]))
        used = [_preference(answer["content"]) for answer in answers if answer["id"] in item["used"]]
        best = next((one for one in used if (one["strength"] > 0) - (one["strength"] < 0) == (strength > 0) - (strength < 0)), None)
        yield {
            "split": "train",
            "prompt": _prompt(rows[0]["messages"]),
            "response_1": first,
            "response_2": second,
            "preference_strength": strength,
            "preference_statement": _statement(strength),
            "preference_elaboration": best["elaboration"] if best else "",
            "three_most_similar_preferences": used,
            "all_preferences_unprocessed": [_preference(answer["content"]) for answer in answers],
            "item": item["id"],
        }


def _single(
    store: Store, sources: Sources, kind: str
) -> Iterator[tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]], dict[str, Any]]]:
    """Project, item, rows and answer, for every answer."""
    for project in store.projects():
        if project["kind"] != kind:
            continue
        answers = by_item(store.answers(project["id"]))
        for item in store.items(project["id"]):
            if item["id"] in answers and (rows := rows_of(sources, item)) is not None:
                yield from ((project, item, rows, answer) for answer in answers[item["id"]])


def _facts(project: dict[str, Any], item: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
    return {
        "task": item["task"] or "general",
        "item": item["id"],
        "annotator": answer["pseudonym"],
        "role": "expert" if answer["role"] == EXPERT else "annotator",
        "at": answer["at"],
        "seconds": answer["seconds"],
        "guideline": answer["guideline"],
        "counted": not answer["late"],
        "project": project["name"],
    }


def demonstrations(store: Store, sources: Sources) -> Iterator[Demonstration]:
    """Conversations that people have made rows of, in the chat."""
    for row in made.demonstrations(store):
        meta = row["meta"] | {"person": row["pseudonym"], "at": row["at"]}
        yield Demonstration(make_id("chat", row["id"]), row["task"], conversation(row["messages"]), "human", (), meta)


def _attacks(store: Store, sources: Sources) -> Iterator[dict[str, Any]]:
    for row in made.attacks(store):
        names = ("id", "parent", "category", "transforms", "conversation", "model", "seed", "outcome", "codes", "at")
        yield {name: row[name] for name in names} | {"by": row["pseudonym"]}


def _regressions(store: Store, sources: Sources) -> Iterator[dict[str, Any]]:
    yield from made.regression_rows(made.attacks(store))


def _prompt(turns: list[dict[str, str]]) -> str | list[dict[str, str]]:
    """A prompt as HelpSteer2 has it, a text; turns where it has several, or spells the marks that HelpSteer2 puts between them."""
    return turns[0]["content"] if len(turns) == 1 and turns[0]["role"] == "user" and not MARK.search(turns[0]["content"]) else turns


def _preference(content: dict[str, Any]) -> dict[str, Any]:
    if content[NEITHER]:
        return {"statement": "Neither response is acceptable", "elaboration": content["reason"], "strength": INVALID}
    return {"statement": _statement(content["preference"]), "elaboration": content["reason"], "strength": content["preference"]}


def _statement(strength: int) -> str:
    first, second = (1, 2) if strength <= 0 else (2, 1)
    return f"Response {first} is {LEVELS[abs(strength)]} Response {second}"


FILES: dict[str, Callable[[Store, Sources], Iterator[Any]]] = {
    RATED_FILE: rated,
    RATINGS_FILE: _ratings,
    PAIRS_FILE: pairs,
    PREFERENCE_FILE: _preferences,
    DEMONSTRATIONS_FILE: demonstrations,
    ATTACKS_FILE: _attacks,
    REGRESSIONS_FILE: _regressions,
}


def check_file(name: str) -> str:
    """A name of FILES.

    Raises:
        InputError: it is none.
    """
    if name not in FILES:
        raise InputError(f"There is no such export: choose one of {', '.join(FILES)}.")
    return name
