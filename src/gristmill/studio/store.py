"""Store of the studio: people, projects, items, leases, append-only answers and their consensus.

An item wants `need` answers of different people. Who may take it is decided by `have + leases < need`, so no item gets more than it wants.
An answer's id comes from the page, which sends it again until it is acknowledged: repeating changes nothing.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from gristmill.core.config import CONTROL
from gristmill.core.errors import InputError
from gristmill.data.rows import make_id
from gristmill.studio.consensus import NUM_EXTRA, SPLIT, wants_more
from gristmill.studio.database import Database, Transaction, clean
from gristmill.studio.tasks import FLAGS, RATE, check_content, check_need, check_note, consensus_of

OWNER, EXPERT, ANNOTATOR, READER = "owner", "expert", "annotator", "reader"
ROLES = (OWNER, EXPERT, ANNOTATOR, READER)
LEASE_SECONDS = 600.0
MAX_DEAL = 20  # items that a person holds at once
MAX_NAME_CHARS = 80
RULE, SETTLED_RULE = "helpsteer2", "expert"
OPEN, EXTRA, DONE, SETTLED = "open", "extra", "done", "settled"  # of an item, beside consensus.SPLIT


class Refused(InputError):
    """A request that is understood and refused, with its HTTP status."""

    def __init__(self, status: int, message: str, **more: Any):
        super().__init__(message)
        self.status, self.more = status, more


@dataclass(frozen=True)
class Person:
    """Somebody who works here.

    Attributes:
        pseudonym: what exports call them: a1, a2, ..
    """

    id: str
    name: str
    pseudonym: str
    role: str


@dataclass(frozen=True)
class NewItem:
    """What a project asks about.

    Attributes:
        row_ids: of the row that is rated, or of both that are compared.
        places: where they were found: file, row number and a hash of what they say.
        prompt: what items of one prompt share.
        why: why it was chosen.
    """

    row_ids: tuple[str, ...]
    places: tuple[tuple[str, int, str], ...]
    prompt: str
    task: str
    excerpt: str = ""
    priority: float = 0.0
    why: str = "random"


class Store:
    """Operations of the studio, each one transaction."""

    def __init__(self, database: Database):
        self.database = database

    # ---- people ----

    def add_person(self, name: str, role: str, secret: str = "") -> Person:
        """Add a person.

        Raises:
            InputError: the name is empty, too long or taken.
        """
        return self.database.write(lambda t: self._add_person(t, name, role, secret))

    def _add_person(self, t: Transaction, name: str, role: str, secret: str) -> Person:
        assert role in ROLES
        name = clean(name).strip()
        if not name or len(name) > MAX_NAME_CHARS or CONTROL.search(name):
            raise InputError(f"A name must have from 1 to {MAX_NAME_CHARS} characters, on one line.")
        if t.one("select id from person where name = ? and gone = 0", name):
            raise Refused(409, f"There is somebody called {name!r} already: choose another name.")
        number = t.all("select count(*) as n from person")[0]["n"] + 1
        person = Person(make_id("person", number, name), name, f"a{number}", role)
        t.run("insert into person values (?, ?, ?, ?, ?, ?, 0)", person.id, name, person.pseudonym, role, secret, utc())
        return person

    def owner(self) -> Person:
        """The owner, who is there from the start."""

        def find(t: Transaction) -> Person:
            found = t.one("select * from person where role = ? and gone = 0 order by created", OWNER)
            return _person(found) if found else self._add_person(t, "owner", OWNER, "")

        return self.database.write(find)

    def people(self) -> list[dict[str, Any]]:
        """Everybody who is here, with how many items each has answered."""
        sql = (
            "select p.id, p.name, p.pseudonym, p.role, p.created, "
            "(select count(distinct a.item) from answer a where a.person = p.id) as answers "
            "from person p where p.gone = 0 order by p.created, p.pseudonym"
        )
        return self.database.read(lambda t: t.all(sql))

    def secret_of(self, name: str) -> tuple[Person, str] | None:
        """A person and the hash of their password, by name."""
        found = self.database.read(lambda t: t.one("select * from person where name = ? and gone = 0", name))
        return (_person(found), found["secret"]) if found else None

    def remove_person(self, name: str, by: Person) -> None:
        """Remove a person's name and ways in. Their answers stay, under the pseudonym."""

        def remove(t: Transaction) -> None:
            found = t.one("select * from person where id = ? and gone = 0", name)
            if found is None:
                raise Refused(404, "This person is gone already.")
            if found["role"] == OWNER:
                raise Refused(409, "The owner cannot be removed.")
            t.run("update person set name = '', secret = '', gone = 1 where id = ?", name)
            t.run("delete from session where person = ?", name)
            t.run("delete from lease where person = ?", name)
            self._log(t, by, "delete", found["pseudonym"])

        self.database.write(remove)

    # ---- sessions and invitations; both are known by the hash of their token alone ----

    def open_session(self, key: str, person: Person, seconds: float) -> None:
        """Begin a session."""

        def begin(t: Transaction) -> None:
            t.run("delete from session where until <= ?", t.now())
            t.run("insert into session values (?, ?, ?)", key, person.id, t.now() + seconds)
            self._log(t, person, "log in", "")

        self.database.write(begin)

    def session(self, key: str) -> Person | None:
        """Whose session this is; None where it has ended."""

        def find(t: Transaction) -> Person | None:
            sql = "select p.*, s.until from session s join person p on p.id = s.person where s.id = ? and p.gone = 0"
            found = t.one(sql, key)
            return _person(found) if found and found["until"] > t.now() else None

        return self.database.read(find)

    def close_sessions(self, key: str, person: Person, everywhere: bool) -> None:
        """End a session, or all of its person."""
        sql, value = ("delete from session where person = ?", person.id) if everywhere else ("delete from session where id = ?", key)
        self.database.write(lambda t: t.run(sql, value) and None)

    def invite(self, key: str, role: str, seconds: float) -> None:
        """Make an invitation, which works once."""
        self.database.write(lambda t: t.run("insert into invitation values (?, ?, ?, 0)", key, role, t.now() + seconds) and None)

    def accept(self, key: str, name: str, secret: str) -> Person:
        """Use an invitation.

        Raises:
            Refused: it is unknown, used or expired.
        """

        def use(t: Transaction) -> Person:
            found = t.one("select * from invitation where id = ?", key)
            if found is None or found["used"] or found["until"] <= t.now():
                raise Refused(403, "This invitation was used or has expired: ask for another.")
            t.run("update invitation set used = 1 where id = ?", key)
            return self._add_person(t, name, found["role"], secret)

        return self.database.write(use)

    # ---- projects ----

    def create_project(
        self,
        kind: str,
        name: str,
        items: Sequence[NewItem],
        *,
        source: str,
        need: int,
        guideline: str,
        by: Person,
        settings: Any = None,
        once: bool = False,
    ) -> str:
        """Make a project of items; returns its id.

        Args:
            once: where there is one of this kind with these settings, it is that one.

        Raises:
            InputError: there are no items, or `need` is out of its range.
        """
        check_need(need)
        if not items:
            raise InputError("There is nothing to ask about in this source: choose another.")
        name = " ".join(CONTROL.sub(" ", check_note(name)).split())[:MAX_NAME_CHARS] or kind
        guideline = clean(guideline)

        saved = json.dumps(settings or {}, sort_keys=True)

        def create(t: Transaction) -> str:
            if once and (made := t.one("select id from project where kind = ? and settings = ?", kind, saved)):
                return str(made["id"])
            number = t.all("select count(*) as n from project")[0]["n"] + 1
            project = make_id("project", number, kind, name)
            sql = "insert into project values (?, ?, ?, ?, 1, ?, ?, ?, ?)"
            t.run(sql, project, name, kind, source, need, saved, utc(), number)
            t.run("insert into guideline values (?, 1, ?, ?)", project, guideline, utc())
            rows = [
                (
                    *(make_id(project, i.row_ids), project, n, json.dumps(i.row_ids), json.dumps(i.places), clean(i.prompt), clean(i.task)),
                    *(clean(i.excerpt), i.priority, i.why, need, 0, OPEN, 0),
                )
                for n, i in enumerate({i.row_ids: i for i in items}.values())
            ]
            t.many(f"insert into item values ({', '.join('?' * 14)})", rows)
            self._log(t, by, "project", project)
            return project

        return self.database.write(create)

    def projects(self) -> list[dict[str, Any]]:
        """All projects, with counts of their items and answers."""

        def read(t: Transaction) -> list[dict[str, Any]]:
            sql = (
                "select p.*, g.content as guideline_text from project p join guideline g on g.project = p.id and g.version = p.guideline "
                "order by p.number"
            )
            counts = {
                row["project"]: row
                for row in t.all(
                    "select project, count(*) as items, sum(closed) as closed, sum(have) as answers, "
                    f"sum(case when state = '{SPLIT}' then 1 else 0 end) as split from item group by project"
                )
            }
            found = t.all(sql)
            return [
                p | {"settings": json.loads(p["settings"])} | {k: int(v) for k, v in counts[p["id"]].items() if k != "project"}
                for p in found
            ]

        return self.database.read(read)

    def project(self, project: str) -> dict[str, Any]:
        """A project.

        Raises:
            Refused: there is none.
        """
        found = self.database.read(lambda t: t.one("select * from project where id = ?", project))
        if found is None:
            raise Refused(404, "There is no such project.")
        return found | {"settings": json.loads(found["settings"])}

    def set_guideline(self, project: str, content: str, by: Person) -> int:
        """Make a new version of a project's guideline; returns its number. Answers name the version that they were given by."""

        def change(t: Transaction) -> int:
            found = t.one("select guideline from project where id = ?", project)
            if found is None:
                raise Refused(404, "There is no such project.")
            version = int(found["guideline"]) + 1
            t.run("insert into guideline values (?, ?, ?, ?)", project, version, clean(content), utc())
            t.run("update project set guideline = ? where id = ?", version, project)
            self._log(t, by, "guideline", project)
            return version

        return self.database.write(change)

    # ---- work ----

    def deal(self, project: str, person: Person, num: int) -> list[dict[str, Any]]:
        """Lease items to a person: those that they hold already, and so many more that they hold `num`."""
        num = max(1, min(num, MAX_DEAL))

        def deal(t: Transaction) -> list[dict[str, Any]]:
            now = t.now()
            t.run("delete from lease where until <= ? or until > ?", now, now + 2 * LEASE_SECONDS)
            order = "order by i.priority desc, i.number"
            mine = f"select i.* from item i join lease l on l.item = i.id where i.project = ? and l.person = ? {order}"
            held = t.all(mine, project, person.id)
            free = (
                "select i.* from item i where i.project = ? and i.closed = 0 "
                "and i.have + (select count(*) from lease l where l.item = i.id) < i.need "
                "and not exists (select 1 from lease l where l.item = i.id and l.person = ?) "
                "and not exists (select 1 from answer a where a.item = i.id and a.person = ?) "
                "and not exists (select 1 from flag f where f.item = i.id and f.person = ?) "
                f"{order} limit ?"
            )
            new = t.all(free, project, person.id, person.id, person.id, num - len(held)) if len(held) < num else []
            for item in new:
                t.run("insert into lease values (?, ?, ?)", item["id"], person.id, now + LEASE_SECONDS)
            return (held + new)[:num]

        return self.database.write(deal)

    def renew(self, person: Person, items: Sequence[str]) -> list[str]:
        """Prolong leases; returns the items of those that the person still holds."""

        def renew(t: Transaction) -> list[str]:
            now, kept = t.now(), []
            for item in items[:MAX_DEAL]:
                sql = "update lease set until = ? where item = ? and person = ? and until > ?"
                if t.run(sql, now + LEASE_SECONDS, item, person.id, now).rowcount:
                    kept.append(item)
            return kept

        return self.database.write(renew)

    def submit(self, person: Person, answer: Mapping[str, Any], role: str = ANNOTATOR) -> dict[str, Any]:
        """Append an answer, whose id comes from the page. Sent again it changes nothing.

        Returns:
            `id`, `item`, `version`, and `late`: whether enough others had answered meanwhile, so that it is kept and not counted.

        Raises:
            Refused: the item is gone (404), or the person has said something newer (409, with that answer).
            InputError: a value is wrong.
        """
        return self.database.write(lambda t: self._submit(t, person, answer, role))

    def _submit(self, t: Transaction, person: Person, answer: Mapping[str, Any], role: str) -> dict[str, Any]:
        name, place, version = (answer.get(field) for field in ("id", "item", "version"))
        if (
            not isinstance(name, str)
            or not 8 <= len(name) <= 64
            or not (name.isascii() and name.isprintable())
            or not isinstance(place, str)
        ):
            raise InputError("An answer needs an id of 8 to 64 characters, made by the page, and the id of its item.")
        known = t.one("select * from answer where id = ?", name)
        if known is not None:
            if (known["person"], known["item"]) != (person.id, place):
                raise Refused(409, "This id belongs to another answer: make another.")
            return _accepted(known)
        item = t.one("select i.*, p.kind, p.guideline from item i join project p on p.id = i.project where i.id = ?", clean(place))
        if item is None:
            raise Refused(404, "This item is gone.")
        content = check_content(item["kind"], answer.get("content"))
        newest = t.one("select * from answer where item = ? and person = ? and role = ? order by version desc", place, person.id, role)
        if version != (newest["version"] + 1 if newest else 1):
            said = json.loads(newest["content"]) if newest else None
            raise Refused(409, "You have answered this item elsewhere.", newest=newest and {"version": newest["version"], "content": said})
        now = t.now()
        late = int(newest["late"]) if newest else 0
        if newest is None and role == ANNOTATOR:
            leases = t.all("select person from lease where item = ? and until > ?", place, now)
            holds = any(lease["person"] == person.id for lease in leases)
            late = int(not holds and item["have"] + len(leases) >= item["need"])
        guideline = answer.get("guideline")
        known_guideline = isinstance(guideline, int) and not isinstance(guideline, bool) and 1 <= guideline <= item["guideline"]
        columns = "id, item, person, role, version, content, seconds, keys, guideline, at, late"
        t.run(
            f"insert into answer ({columns}) values ({', '.join('?' * 11)})",
            *(name, place, person.id, role, version, json.dumps(content, sort_keys=True)),
            *(_number(answer.get("seconds"), 86400.0), int(_number(answer.get("keys"), 1e6))),
            *(guideline if known_guideline else item["guideline"], utc(), late),
        )
        t.run("delete from lease where item = ? and person = ?", place, person.id)
        if newest is None and role == ANNOTATOR and not late:
            t.run("update item set have = have + 1 where id = ?", place)
        self._settle(t, place)
        return {"id": name, "item": place, "version": version, "late": bool(late)}

    def flag(self, person: Person, item: str, kind: str, note: str = "") -> None:
        """Flag an item instead of answering it: it is not dealt to this person again.

        Raises:
            Refused: the item is gone.
            InputError: the kind is unknown.
        """
        if kind not in FLAGS:
            raise InputError(f"A flag is one of {', '.join(FLAGS)}.")
        note = check_note(note)

        def flag(t: Transaction) -> None:
            if t.one("select id from item where id = ?", clean(item)) is None:
                raise Refused(404, "This item is gone.")
            t.run("delete from lease where item = ? and person = ?", item, person.id)
            t.run("delete from flag where item = ? and person = ?", item, person.id)
            t.run("insert into flag values (?, ?, ?, ?, ?)", item, person.id, kind, note, utc())

        self.database.write(flag)

    def unflag(self, person: Person, item: str) -> None:
        """Take a flag back."""
        self.database.write(lambda t: t.run("delete from flag where item = ? and person = ?", item, person.id) and None)

    def _settle(self, t: Transaction, place: str) -> None:
        """Compute an item's consensus again, and whether it wants more people."""
        item = t.one("select i.*, p.kind, p.need as wanted from item i join project p on p.id = i.project where i.id = ?", place)
        assert item is not None
        answers = _newest(t.all("select * from answer where item = ? and late = 0 order by number", place))
        of_people = [answer for answer in answers if answer["role"] == ANNOTATOR]
        decided = [answer for answer in answers if answer["role"] == EXPERT]
        base, have = item["wanted"], item["have"]
        if not decided and have < base:
            return
        disputed = item["kind"] == RATE and base > 1 and wants_more([answer["content"] for answer in of_people])
        need = base if have <= base and not disputed else base + NUM_EXTRA
        used = decided[-1:] or of_people
        found = consensus_of(item["kind"], [answer["content"] for answer in used])
        state = found.state if found.state == SPLIT else DONE
        if decided:
            state, closed = SETTLED, 1
        elif disputed and have < need:
            state, closed = EXTRA, 0
        else:
            closed = 1
        t.run("update item set need = ?, state = ?, closed = ? where id = ?", need, state, closed, place)
        t.run("delete from consensus where item = ?", place)
        t.run(
            "insert into consensus values (?, ?, ?, ?, ?, ?, ?)",
            *(
                place,
                SETTLED_RULE if decided else RULE,
                json.dumps(found.values, sort_keys=True),
                json.dumps(found.rounded, sort_keys=True),
            ),
            *(found.spread, json.dumps([used[i]["id"] for i in found.used]), state),
        )

    # ---- looking ----

    def item(self, name: str) -> dict[str, Any]:
        """An item with the kind of its project.

        Raises:
            Refused: there is none.
        """
        sql = "select i.*, p.kind from item i join project p on p.id = i.project where i.id = ?"
        found = self.database.read(lambda t: t.one(sql, clean(name)))
        if found is None:
            raise Refused(404, "This item is gone.")
        return found

    def may_see(self, person: Person, item: str) -> bool:
        """Whether a person holds an item or has answered it; who settles disputes may see all."""
        sql = "select 1 as yes from lease where item = ? and person = ? union select 1 from answer where item = ? and person = ?"
        return person.role in (OWNER, EXPERT) or bool(self.database.read(lambda t: t.all(sql, item, person.id, item, person.id)))

    def progress(self, project: str, person: Person) -> dict[str, int]:
        """How far a person is: items answered, skipped, and those that they hold."""

        def read(t: Transaction) -> dict[str, int]:
            answered = (
                "select count(distinct a.item) as n from answer a join item i on i.id = a.item where i.project = ? and a.person = ? "
                f"and a.role = '{ANNOTATOR}'"
            )
            skipped = "select count(*) as n from flag f join item i on i.id = f.item where i.project = ? and f.person = ?"
            return {
                "answered": int(t.all(answered, project, person.id)[0]["n"]),
                "skipped": int(t.all(skipped, project, person.id)[0]["n"]),
            }

        return self.database.read(read)

    def answered(self, person: Person) -> dict[str, int]:
        """How many items of each project a person has answered."""
        sql = (
            "select i.project, count(distinct a.item) as n from answer a join item i on i.id = a.item "
            f"where a.person = ? and a.role = '{ANNOTATOR}' group by i.project"
        )
        return {row["project"]: int(row["n"]) for row in self.database.read(lambda t: t.all(sql, person.id))}

    def answers(self, project: str) -> list[dict[str, Any]]:
        """The newest answer of every person to every item, in the order in which they came, with pseudonym and parsed content."""
        sql = (
            "select a.*, p.pseudonym, i.number as place from answer a join item i on i.id = a.item join person p on p.id = a.person "
            "where i.project = ? order by a.number"
        )
        return _newest(self.database.read(lambda t: t.all(sql, project)))

    def items(self, project: str) -> list[dict[str, Any]]:
        """A project's items with their consensus, where there is one."""
        sql = (
            "select i.*, c.rule, c.content, c.rounded, c.spread, c.used, c.state as outcome from item i "
            "left join consensus c on c.item = i.id where i.project = ? order by i.number"
        )

        def parsed(row: dict[str, Any]) -> dict[str, Any]:
            names = ("row_ids", "places", *(("content", "rounded", "used") if row["rule"] else ()))
            return row | {name: json.loads(row[name]) for name in names}

        return [parsed(row) for row in self.database.read(lambda t: t.all(sql, project))]

    def history(self, item: str) -> list[dict[str, Any]]:
        """Every version of every answer to an item."""
        sql = "select a.*, p.pseudonym from answer a join person p on p.id = a.person where a.item = ? order by a.number"
        return [row | {"content": json.loads(row["content"])} for row in self.database.read(lambda t: t.all(sql, item))]

    def answers_to_row(self, row_id: str) -> list[dict[str, Any]]:
        """Newest answers about a row, in all projects."""
        sql = (
            "select a.*, p.pseudonym, i.row_ids from answer a join item i on i.id = a.item join person p on p.id = a.person "
            "where i.row_ids like ? order by a.number"
        )
        quoted = json.dumps(clean(row_id))
        found = self.database.read(lambda t: t.all(sql, f"%{quoted}%"))
        return _newest([row for row in found if clean(row_id) in json.loads(row["row_ids"])])

    def flags(self, project: str) -> dict[str, int]:
        """How many items were flagged, by kind."""
        sql = "select f.kind, count(*) as n from flag f join item i on i.id = f.item where i.project = ? group by f.kind order by f.kind"
        return {row["kind"]: int(row["n"]) for row in self.database.read(lambda t: t.all(sql, project))}

    def log(self, person: Person, what: str, place: str = "") -> None:
        """Record an event: who did what."""
        self.database.write(lambda t: self._log(t, person, what, place))

    def _log(self, t: Transaction, person: Person, what: str, place: str) -> None:
        t.run("insert into event (at, person, what, place) values (?, ?, ?, ?)", utc(), person.pseudonym, what, place)


def utc() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _person(row: Mapping[str, Any]) -> Person:
    return Person(row["id"], row["name"], row["pseudonym"], row["role"])


def _accepted(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"id": row["id"], "item": row["item"], "version": row["version"], "late": bool(row["late"])}


def _number(value: Any, most: float) -> float:
    good = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= most
    return float(value) if good else 0.0


def _newest(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The newest of each person's answers to each item, in the order of those."""
    newest: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in rows:
        key = (row["item"], row["person"], row["role"])
        newest.pop(key, None)
        newest[key] = row | {"content": json.loads(row["content"])}
    return list(newest.values())


def by_item(answers: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Answers of each item."""
    out: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for answer in answers:
        out[answer["item"]].append(answer)
    return dict(out)
