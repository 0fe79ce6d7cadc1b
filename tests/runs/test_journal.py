import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gristmill.runs.journal import PIECE, SYNC_SECONDS, Journal, read_once

RECORDS: list[dict[str, Any]] = [
    {"id": "a", "out": [["text", 3, -0.5, "stop"]]},
    {"id": "b", "text": "line one\nline two \u2028 \u00e9 \U0001f33e \x85"},
    {"id": "c", "nested": {"id": "no", "deep": [None, True]}},
]


def write(path: Path, records: list[dict[str, Any]]) -> None:
    with Journal(path) as journal:
        for record in records:
            journal.append(record)


def test_records_are_there_after_reopening(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "j.jsonl"
    write(path, RECORDS[:2])
    with Journal(path) as journal:
        assert list(journal.values()) == RECORDS[:2]
        journal.append(RECORDS[2])
        assert journal["c"] == RECORDS[2]
    with Journal(path) as journal:
        assert dict(journal) == {r["id"]: r for r in RECORDS}
    assert path.read_bytes().count(b"\n") == 3


def test_a_torn_last_line_is_cut_off_at_every_byte(tmp_path: Path) -> None:
    whole, path = tmp_path / "whole.jsonl", tmp_path / "j.jsonl"
    write(whole, RECORDS)
    data = whole.read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == 10]
    assert len(ends) == 3
    for size in range(len(data) + 1):
        path.write_bytes(data[:size])
        kept = sum(end <= size for end in ends)
        with Journal(path) as journal:
            assert list(journal.values()) == RECORDS[:kept], size
            assert path.read_bytes() == data[: ends[kept - 1] if kept else 0], size
            for record in RECORDS[kept:]:
                journal.append(record)
        assert path.read_bytes() == data, size


@pytest.mark.parametrize("rubbish", [b"\x00" * 40, b'{"id": "x"', b"[1, 2]\n", b'{"no": 1}\n', b"\xff\xfe\n", b"\n"])
def test_what_a_power_cut_leaves_behind_is_cut_off(tmp_path: Path, rubbish: bytes) -> None:
    path = tmp_path / "j.jsonl"
    write(path, RECORDS)
    good = path.read_bytes()
    path.write_bytes(good + rubbish)
    with Journal(path) as journal:
        assert list(journal.values()) == RECORDS
    assert path.read_bytes() == good


def test_records_behind_a_broken_line_stand(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    write(path, RECORDS)
    first, *others = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + b"\x00" * 9 + b"\n" + b"".join(others) + b'{"id": "torn')
    with Journal(path) as journal:
        assert list(journal.values()) == RECORDS
        journal.append({"id": "d"})
    with Journal(path) as journal:
        assert list(journal) == ["a", "b", "c", "d"]


def test_nul_bytes_and_deep_lines_take_no_record_with_them(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    deep = b'{"id": ' + b"[" * 100_000 + b"\n"
    path.write_bytes(b'{"id": "a"}\n' + deep + b"\0" * 5000 + b'{"id": "b", "n": 1}\n' + b"\0" * 5000)
    for _ in range(2):
        with Journal(path) as journal:
            assert list(journal.values()) == [{"id": "a"}, {"id": "b", "n": 1}]


def test_long_records_are_read_back_whole(tmp_path: Path) -> None:
    records = [{"id": str(n), "text": "x" * (PIECE * n // 2)} for n in range(5)]
    path = tmp_path / "j.jsonl"
    with Journal(path) as journal:
        for record in records:
            journal.append(record)
            assert journal[record["id"]] == record
        assert list(journal.values()) == records


@pytest.mark.parametrize("ids", [{"a"}, {'q"uote', "back\\slash"}, {"\u00e9", "b"}, set(), {"nobody"}])
def test_reading_once_gives_what_the_journal_holds(tmp_path: Path, ids: set[str]) -> None:
    path = tmp_path / "j.jsonl"
    records = [{"id": one, "n": n} for n, one in enumerate(["a", 'q"uote', "\u00e9", "back\\slash", "a", "b", 'q"uote'])]
    write(path, records)
    with path.open("ab") as file:
        file.write(b'{"n": 1, "id": "b"}\n[1]\n{"id": "a", "n": }\n\0\0{"id": "a", "n": "\\ud800"}\n{"id": "a", "n"')
    with Journal(path, read_only=True) as journal:
        assert {r["id"]: r for r in read_once(path)} == dict(journal) and journal["a"]["n"] == "\ud800"
        assert {r["id"]: r for r in read_once(path, ids)} == {one: journal[one] for one in ids if one in journal}
    assert [r["n"] for r in read_once(path)] == [*range(7), 1, "\ud800"]


def test_the_last_record_of_an_id_counts(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    write(path, [{"id": "a", "v": 1}, {"id": "a", "v": 2}])
    with Journal(path) as journal:
        assert dict(journal) == {"a": {"id": "a", "v": 2}}


WRITER = """
import sys
from pathlib import Path
from gristmill.runs.journal import Journal

journal = Journal(Path(sys.argv[1]))
i = len(journal)
while True:
    journal.append({"id": str(i), "text": "x" * (i % 300)})
    print(i, flush=True)
    i += 1
"""


def test_a_killed_process_loses_nothing_it_had_appended(tmp_path: Path) -> None:
    path, reported = tmp_path / "j.jsonl", -1
    for wait in (0.0, 0.003, 0.02):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() != ""
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        reported = int(process.stdout.read().rstrip("\n").split("\n")[-1] or reported + 1)
        process.wait()
        with Journal(path) as journal:
            assert len(journal) > reported
            assert [int(i) for i in journal] == list(range(len(journal)))
            assert all(r["text"] == "x" * (int(i) % 300) for i, r in journal.items())
        reported = len(journal) - 1


FULL_DISK = """
import resource, sys
from pathlib import Path
from gristmill.core.errors import InputError
from gristmill.runs.journal import Journal

def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

limit(1000)
try:
    with Journal(Path(sys.argv[1])) as journal:
        for i in range(100):
            try:
                journal.append({"id": str(i), "text": "x" * 80})
            except InputError:
                if sys.argv[2] == "freed":
                    limit(resource.RLIM_INFINITY)
                    journal.append({"id": "later"})
                raise
except InputError as e:
    print(e, len(journal))
"""


@pytest.mark.skipif(os.name != "posix", reason="file size limits are POSIX")
@pytest.mark.parametrize("after", ["full", "freed"])
def test_a_full_disk_is_one_clear_sentence_and_keeps_the_earlier_records(after: str, tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    command = [sys.executable, "-c", FULL_DISK, str(path), after]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "free some space" in run.stdout, run.stderr
    assert "Traceback" not in run.stderr
    appended = int(run.stdout.split()[-1])
    assert 5 < appended < 15
    with Journal(path) as journal:
        assert len(journal) == appended
        numbers = [str(i) for i in range(appended)]
        expected = numbers if after == "full" else [*numbers[:-1], "later"]
        assert list(journal) == expected


def test_records_reach_the_disk_every_few_seconds_and_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk_log: list[tuple[str, Path, int]]
) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    path = tmp_path / "j.jsonl"
    with Journal(path) as journal:
        sizes = []
        for number, seconds in enumerate([0.0, SYNC_SECONDS / 2, SYNC_SECONDS, 0.0, SYNC_SECONDS + 1, 1.0]):
            now[0] += seconds
            journal.append({"id": str(number)})
            sizes.append(path.stat().st_size)
        assert disk_log.pop(0)[:2] == ("fsync", tmp_path), "that it is there"
        assert SYNC_SECONDS <= 5 and disk_log == [("fsync", path, sizes[2]), ("fsync", path, sizes[4])]
    assert disk_log[2:] == [("fsync", path, sizes[5])]


def test_closing_twice_is_harmless(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j.jsonl")
    journal.append(RECORDS[0])
    journal.close()
    journal.close()
    with Journal(tmp_path / "j.jsonl") as reopened:
        assert list(reopened) == ["a"]


@given(
    st.lists(
        st.dictionaries(
            st.text(max_size=5),
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
            max_size=3,
        ),
        max_size=5,
    )
)
def test_any_json_record_round_trips(tmp_path_factory: pytest.TempPathFactory, values: list[dict[str, Any]]) -> None:
    path = tmp_path_factory.mktemp("journal") / "j.jsonl"
    records = [{**v, "id": f"r{i}"} for i, v in enumerate(values)]
    write(path, records)
    with Journal(path) as journal:
        assert list(journal.values()) == records
    assert [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]] == records
