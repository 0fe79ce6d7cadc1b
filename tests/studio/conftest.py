"""Databases of both kinds: SQLite in a folder, and a real PostgreSQL process of Debian's package."""

import importlib.util
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from gristmill.studio.database import Database
from gristmill.studio.store import NewItem, Person, Store

BINARIES = Path("/usr/lib/postgresql/15/bin")


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """URL of a running PostgreSQL server, without a database's name."""
    if not (BINARIES / "initdb").is_file() or importlib.util.find_spec("psycopg") is None:
        pytest.skip("no PostgreSQL 15 of Debian, or no psycopg: the store is tested on SQLite alone")
    folder = Path(tempfile.mkdtemp(prefix="studio-postgres-"))
    who: dict[str, Any] = {}
    if os.geteuid() == 0:  # it refuses to run as root
        shutil.chown(folder, "nobody", "nogroup")
        who = {"user": "nobody", "group": "nogroup", "extra_groups": []}
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    data, options = str(folder / "data"), f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"

    def run(*command: str) -> None:
        subprocess.run([str(BINARIES / command[0]), *command[1:]], check=True, capture_output=True, cwd=folder, timeout=60, **who)

    try:
        run("initdb", "--auth=trust", "--no-sync", "--username=studio", "-D", data)
        run("pg_ctl", "-D", data, "-w", "-l", str(folder / "log"), "-o", options, "start")
        yield f"postgresql://studio@127.0.0.1:{port}"
    finally:
        with open(os.devnull, "w") as null:
            subprocess.run([str(BINARIES / "pg_ctl"), "-D", data, "-m", "immediate", "stop"], stdout=null, stderr=null, cwd="/", **who)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgres"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> Path | str:
    """Where a new, empty database may be opened."""
    if request.param == "sqlite":
        return tmp_path / "studio"
    import psycopg

    url, name = request.getfixturevalue("postgres"), f"s{uuid4().hex}"
    with psycopg.connect(f"{url}/postgres", autocommit=True) as connection:
        connection.execute(f"create database {name}")
    return f"{url}/{name}"


@pytest.fixture
def store(where: Path | str) -> Iterator[Store]:
    database = Database(where)
    yield Store(database)
    database.close()


@pytest.fixture
def local_store(tmp_path: Path) -> Iterator[Store]:
    """A store on SQLite, for what does not depend on the database."""
    database = Database(tmp_path / "studio")
    yield Store(database)
    database.close()


RATING = {"helpfulness": 3, "correctness": 3, "coherence": 4, "complexity": 1, "verbosity": 1}


def answer(item: str, version: int = 1, **content: Any) -> dict[str, Any]:
    """An answer as a page sends it."""
    content = content or dict(RATING)
    return {"id": str(uuid4()), "item": item, "version": version, "content": content, "seconds": 4.0, "keys": 5, "guideline": 1}


@pytest.fixture
def make_project() -> Callable[..., tuple[str, list[Person]]]:
    """make_project(store, items, need=..) -> the project's id, and people who work in it."""

    def make(store: Store, num: int, *, kind: str = "rate", need: int = 3, people: int = 3) -> tuple[str, list[Person]]:
        items = [NewItem((f"row{n}",) if kind == "rate" else (f"row{n}a", f"row{n}b"), (("f", n),), f"p{n}", "t") for n in range(num)]
        project = store.create_project(kind, "a project", items, source="f", need=need, guideline="be kind", by=store.owner())
        return project, [store.add_person(f"person {n}", "annotator") for n in range(people)]

    return make
