"""Database: refused places and versions, whole transactions, and a lost connection."""

import sqlite3
from pathlib import Path

import pytest

from gristmill.core.errors import InputError
from gristmill.studio import database as databases
from gristmill.studio.database import Database, Transaction, Unreachable, file_system


def test_a_database_of_another_version_is_refused(where: Path | str) -> None:
    database = Database(where)
    database.write(lambda t: t.run("update meta set value = '0' where key = 'version'"))
    database.close()
    with pytest.raises(InputError, match="is version 0 of gristmill's studio"):
        Database(where)


def test_somebody_elses_database_is_refused_and_left_alone(where: Path | str, tmp_path: Path) -> None:
    if isinstance(where, str):
        import psycopg

        with psycopg.connect(where, autocommit=True) as connection:
            connection.execute("create table theirs (a text)")
    else:
        where.mkdir()
        with sqlite3.connect(where / "studio.db") as connection:
            connection.execute("create table theirs (a text)")
    with pytest.raises(InputError, match="is no gristmill's studio"):
        Database(where)


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "studio.db").write_text("a text that is no database, and longer than a header" * 20)
    with pytest.raises(Unreachable, match="not a database"):
        Database(tmp_path)


def test_one_server_a_folder(tmp_path: Path) -> None:
    database = Database(tmp_path)
    with pytest.raises(InputError, match="in use"):
        Database(tmp_path)
    database.close()
    Database(tmp_path).close()


def test_a_transaction_happens_whole_or_not_at_all(where: Path | str) -> None:
    database = Database(where)

    def fail(t: Transaction) -> None:
        t.run("insert into meta values ('a', 'b')")
        raise InputError("no.")

    with pytest.raises(InputError, match="no"):
        database.write(fail)
    assert len(database.read(lambda t: t.all("select * from meta"))) == 1
    database.close()


def test_a_broken_statement_or_connection_does_not_break_the_next(where: Path | str) -> None:
    database = Database(where)
    with pytest.raises(Unreachable, match="nothing that was saved is lost"):
        database.write(lambda t: t.run("select * from nowhere"))
    if database.postgres:  # as when the server was started again
        with pytest.raises(Unreachable):
            database.read(lambda t: t.all("select pg_terminate_backend(pg_backend_pid())"))
    assert database.read(lambda t: t.all("select * from meta"))
    database.close()


@pytest.mark.parametrize("kind", ["nfs4", "cifs", "fuse.sshfs", "9p"])
def test_network_file_systems_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(f"1 0 8:1 / / rw - ext4 /dev/a rw\n2 1 0:5 / {tmp_path}/my\\040runs rw shared:1 - {kind} host:/x rw\n")
    monkeypatch.setattr(databases, "MOUNTS", mounts)
    assert file_system(tmp_path / "other") == "ext4"
    with pytest.raises(InputError, match=f"network file system \\({kind}\\)"):
        Database(tmp_path / "my runs" / "studio")
    assert not (tmp_path / "my runs").exists()
    Database(tmp_path / "local").close()


def test_a_url_is_named_without_its_password() -> None:
    with pytest.raises(InputError) as refused:
        Database("postgresql://me:secret@127.0.0.1:1/x?connect_timeout=2")
    assert "secret" not in str(refused.value)


def test_a_database_of_an_older_version_is_brought_up_to_date(where: Path | str) -> None:
    database = Database(where)

    def as_it_was(t: Transaction) -> None:
        t.run("drop table attack")
        t.run("drop table demonstration")
        t.run("insert into person values ('p', 'Ada', 'a1', 'owner', '', '', 0)")
        t.run("update meta set value = '1' where key = 'version'")

    database.write(as_it_was)
    database.close()
    with pytest.raises(InputError, match="open it with `gristmill studio` once"):
        Database(where, read_only=True)
    database = Database(where)
    assert database.read(lambda t: t.all("select name from person")) == [{"name": "Ada"}]
    assert database.read(lambda t: t.all("select * from attack")) == []
    database.close()


def test_a_migration_that_fails_leaves_the_old_version(where: Path | str) -> None:
    database = Database(where)  # with the tables of version 2: they cannot be made
    database.write(lambda t: t.run("update meta set value = '1' where key = 'version'"))
    database.close()
    for _ in range(2):
        with pytest.raises(Unreachable, match="already exists"):
            Database(where)


def test_a_reader_looks_beside_the_server(where: Path | str, tmp_path: Path) -> None:
    missing = Database(tmp_path / "nothing", read_only=True)
    assert not missing.found and not (tmp_path / "nothing").exists()
    missing.close()
    database = Database(where)
    reader = Database(where, read_only=True)
    database.write(lambda t: t.run("insert into meta values ('a', 'b')"))
    assert reader.found and len(reader.read(lambda t: t.all("select * from meta"))) == 2
    with pytest.raises(Unreachable):
        reader.read(lambda t: t.run("insert into meta values ('c', 'd')"))
    reader.close()
    database.close()
