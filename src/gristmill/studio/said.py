"""What people have said in a studio, as human data of an alignment run: read beside the server that may have the database open."""

from collections import defaultdict
from pathlib import Path

from gristmill.studio import export as exports
from gristmill.studio.database import Database, place_of
from gristmill.studio.sources import Sources
from gristmill.studio.store import Store
from gristmill.studio.tasks import PAIR, RATE
from gristmill.workflows.alignment.state import Said

COUNTED = {RATE: "ratings", PAIR: "comparisons"}


def read_said(folder: Path, database: str = "") -> Said:
    """Labels of all projects of a run's studio, rows that people have made, and who gave how many answers; nothing where there is none.

    Args:
        database: as `gristmill studio --database`.

    Raises:
        InputError: the database cannot be read.
    """
    place, cache = place_of(folder, database)
    opened = Database(place, read_only=True)
    try:
        if not opened.found:
            return Said()
        store, sources = Store(opened), Sources(folder, cache)
        people: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        for project in store.projects():
            for answer in store.answers(project["id"]) if project["kind"] in COUNTED else ():
                people[answer["pseudonym"]][COUNTED[project["kind"]]] += 1
        demonstrations = list(exports.demonstrations(store, sources))
        for row in demonstrations:
            people[row.meta["person"]]["rows"] += 1
        counted = {name: dict(counts) for name, counts in sorted(people.items())}
        return Said(list(exports.rated(store, sources)), list(exports.pairs(store, sources)), demonstrations, counted)
    finally:
        opened.close()
