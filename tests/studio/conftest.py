"""Databases of both kinds: SQLite in a folder, and a real PostgreSQL process of Debian's package."""

import asyncio
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from aiohttp import web

from gristmill.core.io import write_json
from gristmill.data.chat import Message
from gristmill.data.rows import Pair, Prompt, Response, make_id, write_rows
from gristmill.studio.app import Studio
from gristmill.studio.database import Database
from gristmill.studio.security import key_of, new_token, origins_of
from gristmill.studio.sources import Sources
from gristmill.studio.store import NewItem, Person, Store
from tests.studio.browser import Browser

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
        connection.execute(f"create schema {name}")  # cheaper than a database
    return f"{url}/postgres?options=-csearch_path%3D{name}"


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
        items = [NewItem((f"row{n}",) if kind == "rate" else (f"row{n}a", f"row{n}b"), (("f", n, ""),), f"p{n}", "t") for n in range(num)]
        project = store.create_project(kind, "a project", items, source="f", need=need, guideline="be kind", by=store.owner())
        return project, [store.add_person(f"person {n}", "annotator") for n in range(people)]

    return make


NUM_PROMPTS = 6


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run with prompts, three answers to each (two of them different), and pairs; one prompt has two turns."""
    folder = tmp_path / "run"
    stage = folder / "01-answers"
    turns = [(Message("user", f"What is {n} and {n}?"),) for n in range(NUM_PROMPTS - 1)]
    turns.append((Message("system", "Be brief."), Message("user", "Hi"), Message("assistant", "Hello."), Message("user", "Now sing.")))
    prompts = [Prompt(make_id("p", n), "sums", t, "human") for n, t in enumerate(turns)]
    texts = ("It is {}.", "Perhaps {}?", "It is {}.")
    responses = [
        Response(f"{p.id}#{k}", p.id, p.task, p.messages, text.format(2 * n), "a model", 1.0, k, 5, -1.0, True, None, n + k / 10, k == 0)
        for n, p in enumerate(prompts)
        for k, text in enumerate(texts)
    ]
    pairs = [Pair(make_id("pair", p.id), p.id, p.task, p.messages, "yes", "no", 2.0, 1.0, "verifier", (f"{p.id}#0",)) for p in prompts]
    folder.mkdir()
    (folder / "recipe.yaml").write_text("kind: dataset\nname: small\n")
    for name, rows in (("prompts", prompts), ("responses", responses), ("pairs", pairs)):
        write_rows(stage / f"{name}.parquet", rows)
    write_json(
        stage / "done.json",
        {"name": "answers", "fingerprint": "f", "artifacts": [f"{n}.parquet" for n in ("prompts", "responses", "pairs")]},
    )
    return folder


@pytest.fixture
def sources(run_folder: Path, tmp_path: Path) -> Sources:
    return Sources(run_folder, tmp_path / "cache")


class Served:
    """A studio that answers in a thread of its own, and a client for each person."""

    def __init__(self, store: Store, sources: Sources, **options: Any):
        self.store, self.token = store, new_token()
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.origin = f"http://127.0.0.1:{self.listening.getsockname()[1]}"
        origins, _ = origins_of("127.0.0.1", self.listening.getsockname()[1], "")
        self.studio = Studio(store, sources, origins, owner_key=key_of(self.token), **options)
        self._loop, self._ready = asyncio.new_event_loop(), threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()
        self._ready.wait(30)

    def _serve(self) -> None:
        async def begin() -> web.AppRunner:
            runner = web.AppRunner(self.studio.app(), access_log=None, shutdown_timeout=1)
            await runner.setup()
            await web.SockSite(runner, self.listening).start()
            return runner

        runner = self._loop.run_until_complete(begin())
        self._ready.set()
        self._loop.run_forever()
        self._loop.run_until_complete(runner.cleanup())
        self._loop.close()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def client(self, role: str = "", name: str = "") -> "Client":
        """Somebody of a role, logged in; nobody for ""."""
        client = Client(self.origin)
        if role == "owner":
            person = self.store.owner()
        elif role:
            person = self.store.add_person(name or f"{role} {uuid4().hex[:6]}", role)
        if role:
            session = new_token()
            self.store.open_session(key_of(session), person, 3600)
            client.headers["Cookie"] = f"gristmill-studio={session}"
            client.person = person
        return client


class Client:
    """HTTP client as a browser is one: with the origin of the page, and a cookie."""

    person: Person

    def __init__(self, origin: str):
        self.origin = origin
        self.headers = {"Origin": origin, "Content-Type": "application/json"}

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """Status and JSON of an answer; its headers are kept in `reply`."""
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.origin + path, data, self.headers | given, method=method)
        try:
            reply = urllib.request.urlopen(request, timeout=30)
        except urllib.error.HTTPError as e:
            reply = e
        with reply:
            raw, self.reply, status = reply.read(), reply.headers, reply.status
        return status, json.loads(raw) if reply.headers.get_content_type() == "application/json" else raw

    def api(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        return self.ask(method, f"/studio/api{path}", body, **headers)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """One browser for all tests of a process."""
    made = Browser()
    yield made
    made.close()


@pytest.fixture
def served(local_store: Store, sources: Sources) -> Iterator[Served]:
    made = Served(local_store, sources)
    yield made
    made.stop()
