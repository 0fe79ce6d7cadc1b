"""Transactional database of the studio: SQLite in WAL mode, or PostgreSQL by URL, with one writer thread and one schema.

SQLite lets one write at a time, and is unfair to those who wait: so all writes of a server go through one thread. With PostgreSQL several
servers may share a database; there a lock makes their write transactions follow each other too.
"""

import importlib
import os
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from gristmill.core.errors import InputError
from gristmill.core.io import lock, make_folder, reason
from gristmill.data.tokenizer import SURROGATE

VERSION = "2"  # of the schema
FILE = "studio.db"
FOLDER = "studio"  # in the run's
SCHEMES = ("postgresql://", "postgres://")
BUSY_SECONDS = 10.0
WRITE_LOCK = 0x6772_6973  # of PostgreSQL's advisory locks
# No shared memory between hosts there, which WAL needs: the database would be damaged.
NETWORK_FILE_SYSTEMS = re.compile(
    r"nfs\d?|cifs|smb\w*|9p|afs|ceph|glusterfs|lustre|gpfs|beegfs|ocfs2|gfs2|drvfs|fuse\.(sshfs|s3fs|rclone|glusterfs|ceph\S*|gcsfuse|goofys)"
)
MOUNTS = Path("/proc/self/mountinfo")
T = TypeVar("T")

# What version 2 has more than version 1: rows that people make in the chat, and attacks.
ADDED_2 = """
create table demonstration (
  number {serial}, id text not null unique, person text not null references person, task text not null, messages text not null,
  meta text not null, at text not null);
create table attack (
  number {serial}, id text not null unique, parent text not null, person text not null references person, category text not null,
  transforms text not null, conversation text not null, model text not null, seed integer not null, outcome text not null,
  codes text not null, at text not null);
"""
MIGRATIONS = {"1": ADDED_2}  # statements from a version to the next
SCHEMA = (
    """
create table meta (key text primary key, value text not null);
create table person (
  id text primary key, name text not null, pseudonym text not null unique, role text not null, secret text not null,
  created text not null, gone integer not null);
create unique index person_name on person (name) where gone = 0;
create table session (id text primary key, person text not null references person, until {real} not null);
create table invitation (id text primary key, role text not null, until {real} not null, used integer not null);
create table project (
  id text primary key, name text not null, kind text not null, source text not null, guideline integer not null, need integer not null,
  settings text not null, created text not null, number integer not null);
create table guideline (
  project text not null references project, version integer not null, content text not null, at text not null,
  primary key (project, version));
create table item (
  id text primary key, project text not null references project, number integer not null, row_ids text not null, places text not null,
  prompt text not null, task text not null, excerpt text not null, priority {real} not null, why text not null, need integer not null,
  have integer not null, state text not null, closed integer not null);
create index item_queue on item (project, priority desc, number) where closed = 0;
create index item_project on item (project, number);
create table lease (item text not null references item, person text not null references person, until {real} not null,
  primary key (item, person));
create table answer (
  number {serial}, id text not null unique, item text not null references item, person text not null references person,
  role text not null, version integer not null, content text not null, seconds {real} not null, keys integer not null,
  guideline integer not null, at text not null, late integer not null, unique (item, person, role, version));
create table flag (
  item text not null references item, person text not null references person, kind text not null, note text not null, at text not null,
  primary key (item, person));
create table consensus (
  item text primary key references item, rule text not null, content text not null, rounded text not null, spread {real} not null,
  used text not null, state text not null);
create table event (number {serial}, at text not null, person text not null, what text not null, place text not null);
"""
    + ADDED_2
)


class Unreachable(InputError):
    """The database does not answer: what was asked is to be asked again."""


class Transaction:
    """Statements of one transaction. SQL is written with `?`; rows come as dictionaries."""

    def __init__(self, connection: Any, postgres: bool, clock: Callable[[], float]):
        self._connection, self._postgres, self._clock = connection, postgres, clock

    def all(self, sql: str, *values: Any) -> list[dict[str, Any]]:
        """The rows of a query."""
        cursor = self.run(sql, *values)
        names = [column[0] for column in cursor.description]
        return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]

    def one(self, sql: str, *values: Any) -> dict[str, Any] | None:
        """The first row of a query."""
        return next(iter(self.all(sql, *values)), None)

    def run(self, sql: str, *values: Any) -> Any:
        """The cursor of a statement."""
        return self._connection.execute(sql.replace("?", "%s") if self._postgres else sql, _storable(values))

    def many(self, sql: str, rows: Sequence[Sequence[Any]]) -> None:
        """Run a statement once for each row of values."""
        values = [_storable(row) for row in rows]
        if self._postgres:
            self._connection.cursor().executemany(sql.replace("?", "%s"), values)
        else:
            self._connection.executemany(sql, values)

    def now(self) -> float:
        """Seconds of the clock that leases keep to. It never jumps while the server runs; servers that share a database share it."""
        if self._postgres:
            return float(self.all("select extract(epoch from clock_timestamp()) as now")[0]["now"])
        return self._clock()


class Database:
    """Database of people's work, opened or made.

    Args:
        where: a folder, in which SQLite's file lies; or a URL that begins with `postgresql:`.
        read_only: look at it beside the server that has it open; `found` says whether there is one.

    Raises:
        InputError: the folder is in use or on a network file system, the database is of another version or cannot be opened.
    """

    def __init__(self, where: Path | str, *, read_only: bool = False):
        self.read_only = read_only
        self.postgres = isinstance(where, str)
        self.url = where if isinstance(where, str) else ""
        self.path = where / FILE if isinstance(where, Path) else Path()
        self.name = str(self.path) if not self.postgres else re.sub(r"//[^@/]*@", "//", self.url)
        started, monotonic = time.time(), time.monotonic()
        self._clock = lambda: started + time.monotonic() - monotonic
        self._writer = ThreadPoolExecutor(1, "studio-writer")
        self._local, self._open, self._guard = threading.local(), list[Any](), threading.Lock()
        self._lock = None
        if isinstance(where, Path) and not read_only:
            system = file_system(where)
            if NETWORK_FILE_SYSTEMS.fullmatch(system):
                raise InputError(
                    f"{where} is on a network file system ({system}), where SQLite would lose answers: "
                    "give --database a folder of a local disk, or the URL of a PostgreSQL database."
                )
            make_folder(where)
            self._lock = lock(where)
        try:
            if read_only:
                self.found = (self.postgres or self.path.is_file()) and self.read(self._is_there)
            else:
                self.write(self._prepare)
        except BaseException:
            self.close()
            raise

    def write(self, work: Callable[[Transaction], T]) -> T:
        """Run a write transaction in the writer thread: it happens whole and is on the disk when this returns, or not at all."""
        return self._writer.submit(self._run, work, True).result()

    def read(self, work: Callable[[Transaction], T]) -> T:
        """Run a read transaction in this thread: all its queries see the same state."""
        return self._run(work, False)

    def close(self) -> None:
        """End the writer and close all connections."""
        self._writer.shutdown()
        with self._guard:
            for connection in self._open:
                with suppress(Exception):
                    connection.close()
            self._open.clear()
        if self._lock is not None:
            self._lock.close()

    def _run(self, work: Callable[[Transaction], T], writes: bool) -> T:
        errors = self._errors()
        try:
            connection = self._connection()
            transaction = Transaction(connection, self.postgres, self._clock)
            if self.postgres:
                connection.execute("begin" if writes else "begin isolation level repeatable read read only")
                if writes:
                    connection.execute("select pg_advisory_xact_lock(%s)", (WRITE_LOCK,))
            else:
                connection.execute("begin immediate" if writes else "begin")
            try:
                result = work(transaction)
                connection.execute("commit")
                return result
            except BaseException:
                with suppress(*errors):
                    connection.execute("rollback")
                raise
        except errors as e:
            self._drop()
            raise Unreachable(f"{self.name} cannot be read or written ({reason(e)}): see to it, nothing that was saved is lost.") from e

    def _errors(self) -> tuple[type[Exception], ...]:
        return (_psycopg().Error,) if self.postgres else (sqlite3.Error,)

    def _connection(self) -> Any:
        connection = getattr(self._local, "connection", None)
        if connection is None:
            if self.postgres:
                connection = _psycopg().connect(self.url, autocommit=True, connect_timeout=10)
            else:
                address = f"{Path(os.path.realpath(self.path)).as_uri()}?mode={'ro' if self.read_only else 'rwc'}"
                connection = sqlite3.connect(address, uri=True, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
                connection.execute("pragma synchronous = full")
                connection.execute("pragma foreign_keys = on")
            self._local.connection = connection
            with self._guard:
                self._open.append(connection)
        return connection

    def _drop(self) -> None:
        """Forget this thread's connection, which may be broken: the next transaction opens another."""
        connection = getattr(self._local, "connection", None)
        self._local.connection = None
        if connection is not None:
            with self._guard, suppress(ValueError):
                self._open.remove(connection)
            with suppress(Exception):
                connection.close()

    def _tables(self, transaction: Transaction) -> set[str]:
        if self.postgres:
            tables = "select table_name as name from information_schema.tables where table_schema = current_schema()"
        else:
            tables = "select name from sqlite_master where type = 'table'"
        return {row["name"] for row in transaction.all(tables)}

    def _is_there(self, transaction: Transaction) -> bool:
        """Whether there is a database to read."""
        found = self._tables(transaction)
        if found:
            self._check_version(transaction, found)
        return bool(found)

    def _prepare(self, transaction: Transaction) -> None:
        found = self._tables(transaction)
        if not found:
            if not self.postgres:  # outside a transaction alone can the journal be changed
                transaction.run("commit")
                (mode,) = transaction.run("pragma journal_mode = wal").fetchone()
                if mode != "wal":
                    raise InputError(f"{self.path}: the file system does not allow SQLite's write-ahead log: choose a local disk.")
                transaction.run("begin immediate")
            self._make(transaction, SCHEMA)
            transaction.run("insert into meta values ('version', ?)", VERSION)
            return
        self._check_version(transaction, found)

    def _check_version(self, transaction: Transaction, found: set[str]) -> None:
        version = (transaction.one("select value from meta where key = 'version'") or {}).get("value") if "meta" in found else None
        while not self.read_only and version in MIGRATIONS:  # whole, or not at all: in one transaction
            self._make(transaction, MIGRATIONS[version])
            version = str(int(version) + 1)
            transaction.run("update meta set value = ? where key = 'version'", version)
        if self.read_only and version in MIGRATIONS:
            raise InputError(f"{self.name} is version {version} of a studio: open it with `gristmill studio` once, which renews it.")
        if version != VERSION:
            what = f"version {version} of" if version else "no"
            raise InputError(
                f"{self.name} is {what} gristmill's studio, and this program reads version {VERSION}: open it with the program that made "
                "it, or give --database another place."
            )

    def _make(self, transaction: Transaction, statements: str) -> None:
        serial = "bigint generated always as identity primary key" if self.postgres else "integer primary key autoincrement"
        for statement in statements.format(serial=serial, real="double precision").split(";"):
            if statement.strip():
                transaction.run(statement)


def place_of(folder: Path, database: str) -> tuple[Path | str, Path]:
    """Where a folder's answers are kept (a folder, or a URL), and where its rows are expanded to."""
    postgres = database.startswith(SCHEMES)
    place = Path(database) if database and not postgres else folder / FOLDER
    return (database if postgres else place), place / "cache"


def clean(text: str) -> str:
    """Text that any database and any file can hold: without NUL and halves of surrogate pairs."""
    return SURROGATE.sub("\ufffd", text).replace("\0", "\ufffd")


def _storable(values: Sequence[Any]) -> list[Any]:
    """Values of a statement: a stranger's text may hold what a database refuses."""
    return [clean(value) if isinstance(value, str) else value for value in values]


def _psycopg() -> Any:
    try:
        return importlib.import_module("psycopg")  # optional: the extra `postgres`
    except ImportError as e:
        raise InputError("PostgreSQL needs psycopg: pip install 'gristmill[postgres]'.") from e


def file_system(path: Path) -> str:
    """Type of the file system that a path is on, or would be; "" where the kernel does not say."""
    place = path.resolve()
    try:
        lines = MOUNTS.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return ""
    best, kind = -1, ""
    for line in lines:
        left, _, right = line.partition(" - ")
        mount = Path(re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), left.split()[4]))
        if (mount == place or mount in place.parents) and len(mount.parts) >= best:  # a later line lies over an earlier one
            best, kind = len(mount.parts), right.split()[0]
    return kind
