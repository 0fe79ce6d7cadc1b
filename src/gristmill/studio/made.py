"""Rows that people make: conversations to imitate, from the chat, and attacks on a model, each with who made it and when."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from gristmill.core.errors import InputError
from gristmill.studio.database import Transaction, clean
from gristmill.studio.store import Person, Refused, Store, utc
from gristmill.studio.tasks import check_note

MAX_TURNS, MAX_CHARS = 64, 200_000
ROLES = ("system", "user", "assistant")
OUTCOMES = ("refused", "partial", "complied", "off topic", "broken")
REGRESSION = ("partial", "complied")  # a hole: asked again after every round


def check_turns(value: Any, *, answered: bool) -> list[dict[str, str]]:
    """Turns of a conversation as a page sends them.

    Raises:
        InputError: they are none, do not alternate, or are too long.
    """
    if not isinstance(value, list) or not 0 < len(value) <= MAX_TURNS:
        raise InputError(f"A conversation has from 1 to {MAX_TURNS} turns.")
    turns = []
    for turn in value:
        if not isinstance(turn, Mapping) or turn.get("role") not in ROLES or not isinstance(turn.get("content"), str):
            raise InputError("A turn needs a role (system, user or assistant) and its content.")
        turns.append({"role": turn["role"], "content": clean(turn["content"])})
    spoken = turns[1:] if turns[0]["role"] == "system" else turns
    if any(turn["role"] != ("user", "assistant")[place % 2] for place, turn in enumerate(spoken)) or not spoken:
        raise InputError("After the system's turn, user and assistant speak in turns, the user first.")
    if (spoken[-1]["role"] == "assistant") != answered:
        raise InputError(f"The last turn must be the {'assistant' if answered else 'user'}'s.")
    if sum(len(turn["content"]) for turn in turns) > MAX_CHARS:
        raise InputError(f"A conversation may have {MAX_CHARS:,} characters.")
    return turns


def add_demonstration(store: Store, person: Person, name: str, *, task: str, turns: list[dict[str, str]], meta: dict[str, Any]) -> None:
    """Keep a conversation as a row to imitate. Its id comes from the page: sent again it changes nothing."""
    task = " ".join(check_note(task).split())[:80] or "chat"
    turns = check_turns(turns, answered=True)
    row = (check_id(name), person.id, task, json.dumps(turns), json.dumps(meta, sort_keys=True), utc())
    sql = "insert into demonstration (id, person, task, messages, meta, at) values (?, ?, ?, ?, ?, ?) on conflict (id) do nothing"
    store.database.write(lambda t: t.run(sql, *row) and None)


def demonstrations(store: Store) -> list[dict[str, Any]]:
    """All rows to imitate, in the order in which they were made."""
    sql = "select d.*, p.pseudonym from demonstration d join person p on p.id = d.person order by d.number"
    return [row | {n: json.loads(row[n]) for n in ("messages", "meta")} for row in store.database.read(lambda t: t.all(sql))]


def add_attack(store: Store, person: Person, attack: Mapping[str, Any]) -> dict[str, Any]:
    """Keep an attack with every turn of it, and how it went by the person. An id that is sent again changes nothing."""
    name, outcome, codes = check_id(attack.get("id")), attack.get("outcome"), attack.get("codes", [])
    if outcome not in OUTCOMES:
        raise InputError(f"An attack ends in one of {', '.join(OUTCOMES)}.")
    if not isinstance(codes, list) or not all(isinstance(code, str) and len(code) <= 8 for code in codes):
        raise InputError("codes must be a list of a taxonomy's codes.")
    turns = check_turns(attack.get("conversation"), answered=True)
    texts = {field: check_note(attack.get(field, "")) for field in ("category", "transforms", "model", "parent")}
    seed = attack.get("seed", 0)
    seed = seed if isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed < 1 << 31 else 0

    def add(t: Transaction) -> dict[str, Any]:
        known = t.one("select person from attack where id = ?", name)
        if known is not None and known["person"] != person.id:
            raise Refused(409, "This id belongs to another attack: make another.")
        if known is None:
            columns = "id, parent, person, category, transforms, conversation, model, seed, outcome, codes, at"
            t.run(
                f"insert into attack ({columns}) values ({', '.join('?' * 11)})",
                *(name, texts["parent"], person.id, texts["category"], texts["transforms"], json.dumps(turns), texts["model"], seed),
                *(outcome, json.dumps(codes), utc()),
            )
        return {"id": name}

    return store.database.write(add)


def attacks(store: Store) -> list[dict[str, Any]]:
    """All attacks, in the order in which they were made."""
    sql = "select a.*, p.pseudonym from attack a join person p on p.id = a.person order by a.number"
    return [row | {n: json.loads(row[n]) for n in ("conversation", "codes")} for row in store.database.read(lambda t: t.all(sql))]


def regression_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Holes as rows that `safety: {rows: ..}` of a recipe asks again: what was asked, up to the turn that got through."""
    return [
        {
            "messages": row["conversation"][:-1],
            "label": "unsafe",
            "type": row["category"] or "red team",
            "attack": row["transforms"],
            "probe": row["id"],
            "by": row["pseudonym"],
            "at": row["at"],
            "model": row["model"],
            "outcome": row["outcome"],
            "codes": row["codes"],
        }
        for row in rows
        if row["outcome"] in REGRESSION
    ]


def check_id(name: Any) -> str:
    """An id that a page has made."""
    if not isinstance(name, str) or not 8 <= len(name) <= 64 or not (name.isascii() and name.isprintable()):
        raise InputError("A row needs an id of 8 to 64 characters, made by the page.")
    return name
