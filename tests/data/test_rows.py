import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gristmill.core.errors import InputError
from gristmill.data import rows as rows_module
from gristmill.data.chat import Message
from gristmill.data.rows import (
    Demonstration,
    Pair,
    Prompt,
    Rated,
    Rating,
    Response,
    TopicRow,
    make_id,
    read_columns,
    read_records,
    read_rows,
    write_rows,
)

# Text with every kind of line break there is: a row must stay one line of JSONL.
BREAKS = "\n\r\t\v\f\x1c\x1d\x1e\x85\u2028\u2029"
TEXT = st.text(max_size=15) | st.text(alphabet="ab" + BREAKS, max_size=6)
NUMBER = st.floats(allow_nan=False, allow_infinity=False)
COUNT = st.integers(0, 2**40)
LABEL = st.none() | st.floats(0, 4)
MESSAGES = st.lists(st.builds(Message, st.sampled_from(["system", "user", "assistant"]), TEXT), max_size=4).map(tuple)
JSON = st.recursive(st.none() | st.booleans() | COUNT | NUMBER | TEXT, lambda v: st.lists(v, max_size=3), max_leaves=5)
TRUTH = st.none() | st.dictionaries(TEXT, JSON, max_size=3)
PARENTS = st.lists(TEXT, max_size=3).map(tuple)
RATING = st.builds(Rating, *[NUMBER] * 5)
ROWS: dict[type, st.SearchStrategy[Any]] = {
    Prompt: st.builds(Prompt, TEXT, TEXT, MESSAGES, TEXT, PARENTS, TRUTH),
    Response: st.builds(
        Response,
        TEXT,
        TEXT,
        TEXT,
        MESSAGES,
        TEXT,
        TEXT,
        NUMBER,
        COUNT,
        COUNT,
        NUMBER,
        st.booleans(),
        st.none() | RATING,
        st.none() | NUMBER,
        st.none() | st.booleans(),
        st.none() | TEXT,
        st.none() | st.booleans(),
    ),  # fmt: skip
    Pair: st.builds(Pair, TEXT, TEXT, TEXT, MESSAGES, TEXT, TEXT, NUMBER, NUMBER, TEXT, PARENTS),
    Demonstration: st.builds(Demonstration, TEXT, TEXT, MESSAGES, TEXT, PARENTS),
    Rated: st.builds(Rated, TEXT, TEXT, MESSAGES, st.lists(LABEL, max_size=5).map(tuple), TEXT),
}


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
@pytest.mark.parametrize("row", ROWS)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_rows_round_trip(row: type, ending: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("rows") / "new" / f"rows.{ending}"
    rows = data.draw(st.lists(ROWS[row], max_size=4))
    assert write_rows(path, rows) == len(rows)
    assert read_rows(path, row) == rows
    assert [p.name for p in path.parent.iterdir()] == [path.name], "no temporary file is left"


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_a_line_break_of_any_kind_stays_within_its_row(ending: str, tmp_path: Path) -> None:
    rows = [Demonstration(str(i), "t", (Message("user", f"a{c}b"),), "human") for i, c in enumerate(BREAKS)]
    write_rows(tmp_path / f"r.{ending}", rows)
    assert read_rows(tmp_path / f"r.{ending}", Demonstration) == rows


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_a_rewrite_replaces_the_file_and_a_failed_one_does_not(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"r.{ending}"
    old = [Demonstration("1", "t", (Message("user", "x"),), "human")]
    write_rows(path, [*old, *old])
    write_rows(path, old)
    bad = Prompt("2", "t", (Message("user", "x"),), "human", (), {"a set is no JSON": {1}})
    with pytest.raises(TypeError):
        write_rows(path, [bad])
    assert read_rows(path, Demonstration) == old


def test_both_endings_hold_the_same(tmp_path: Path) -> None:
    rows = [
        Response(
            "i",
            "p",
            "t",
            (Message("user", "x"),),
            "y",
            "g",
            0.7,
            1,
            3,
            -1.5,
            True,
            Rating(4, 3, 2, 1, 0),
            2.5,
        ),
        Response("j", "p", "t", (Message("user", "x"),), "z", "g", 1.0, 0, 9, -3.0, False),
    ]
    for ending in ("parquet", "jsonl"):
        write_rows(tmp_path / f"r.{ending}", rows)
    assert read_records(tmp_path / "r.parquet") == read_records(tmp_path / "r.jsonl")


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_columns_of_others_are_ignored(ending: str, tmp_path: Path) -> None:
    @dataclasses.dataclass
    class Wider:
        id: str
        task: str
        messages: tuple[Message, ...]
        origin: str
        note: str

    write_rows(tmp_path / f"r.{ending}", [Wider("1", "t", (Message("user", "x"),), "human", "mine")])
    expected = [Demonstration("1", "t", (Message("user", "x"),), "human")]
    assert read_rows(tmp_path / f"r.{ending}", Demonstration) == expected


def test_text_is_utf8_whatever_the_locale(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    program = (
        "import sys; from pathlib import Path; from gristmill.data.chat import Message\n"
        "from gristmill.data.rows import Demonstration, read_rows, write_rows\n"
        "row = Demonstration('1', 't', (Message('user', '\\u00e9\\u4e2d'),), 'human')\n"
        "write_rows(Path(sys.argv[1]), [row])\n"
        "assert read_rows(Path(sys.argv[1]), Demonstration) == [row]\n"
    )
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    run = subprocess.run([sys.executable, "-c", program, str(path)], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "\u00e9\u4e2d" in path.read_text(encoding="utf-8")


def test_blank_lines_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_bytes(b'{"id": 1}\r\n\r\n  \n{"id": 2}')
    assert read_records(tmp_path / "r.jsonl") == [{"id": 1}, {"id": 2}]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("none.jsonl", None, "does not exist"),
        ("r.csv", b"id\n1\n", "neither .parquet nor .jsonl"),
        ("r.jsonl", b'{"id": 1}\n{"id": \n', "Line 2 of"),
        ("r.jsonl", b'{"id": 1}\n\n[1]\n', "Line 3 of .* is not a JSON object"),
        ("r.jsonl", b"\xff\xfe\n", "UTF-8"),
        ("r.parquet", b"not parquet", "cannot be read as Parquet"),
        ("r.jsonl", b'{"id": "1", "task": "t"}\n', "messages"),
        (
            "r.jsonl",
            b'{"id": "1", "task": "t", "origin": "h", "messages": [{"role": "user"}]}\n',
            "'role' and 'content'",
        ),
    ],
)
def test_bad_files_are_named(name: str, data: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(InputError, match=message):
        read_rows(path, Prompt)


def test_ids_come_from_the_inputs() -> None:
    assert make_id("a", 1) == make_id("a", 1)
    assert len({make_id("a", 1), make_id("a", 2), make_id("a1"), make_id(["a", 1]), make_id("a", "1")}) == 5
    assert make_id({"x": 1, "y": 2}) == make_id({"y": 2, "x": 1})
    assert all(c in "0123456789abcdef" for c in make_id()) and len(make_id()) == 16


def test_the_score_is_the_weighted_sum() -> None:
    rating = Rating(4, 3, 2, 1, 0.5)
    assert math.isclose(rating.score((0.3, 0.74, 0.46, 0.47, -0.33)), 1.2 + 2.22 + 0.92 + 0.47 - 0.165)
    with pytest.raises(ValueError, match="zip"):
        rating.score((1.0, 1.0))


def test_parquet_keeps_free_form_json_as_text(tmp_path: Path) -> None:
    """So that rows whose truths have different fields fit in one table."""
    import pyarrow.parquet as pq

    truths: list[dict[str, Any] | None] = [
        {"kind": "number", "value": 3},
        {"kind": "list", "words": ["a"]},
        None,
    ]
    rows = [Prompt(str(i), "t", (Message("user", "x"),), "human", (), t) for i, t in enumerate(truths)]
    write_rows(tmp_path / "r.parquet", rows)
    column = pq.read_table(tmp_path / "r.parquet").column("truth").to_pylist()
    assert [c and json.loads(c) for c in column] == truths
    assert [p.truth for p in read_rows(tmp_path / "r.parquet", Prompt)] == truths


def big_rows(num: int) -> list[Response]:
    return [
        Response(f"r{i}", f"p{i % 7}", "facts", (Message("user", f"ask {i}"),), f"say {i % 3}", "m", 0.0, i, 1, None, True)
        if i % 5
        else Response(f"r{i}", f"p{i % 7}", "code", (), "", "m", 1.0, i, 1, -0.5, False, score=i / 4, edits=("a", f"e{i}"))
        for i in range(num)
    ]


@pytest.mark.parametrize("group", [10**6, 300])
def test_some_rows_and_columns_are_those_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: int) -> None:
    monkeypatch.setattr(rows_module, "COLUMN_ROWS", 256)  # parts with dictionaries of their own
    path, rows = tmp_path / "r.parquet", big_rows(2500)
    write_rows(path, rows)
    pq.write_table(pq.read_table(path), path, row_group_size=group)
    at = [0, 1, 299, 300, 1023, 1024, 2499]
    assert read_rows(path, Response, at) == [rows[i] for i in at] and read_rows(path, Response, []) == []
    columns = read_columns(path, Response, ["id", "prompt", "score", "edits"])
    assert columns["id"].to_pylist() == [r.id for r in rows] and columns["prompt"].to_pylist() == [r.prompt for r in rows]
    assert columns["score"].to_pylist() == [r.score for r in rows]
    assert [tuple(edits) for edits in columns["edits"].to_pylist()] == [r.edits for r in rows]


def test_columns_that_no_row_fills_are_nulls_and_a_needed_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "r.parquet"
    write_rows(path, [])
    assert {name: len(column) for name, column in read_columns(path, Response, ["id", "score"]).items()} == {"id": 0, "score": 0}
    write_rows(path, [dataclasses.replace(big_rows(2)[1], score=None)])
    columns = read_columns(path, Response, ["score", "repaired_from"])
    assert columns["score"].to_pylist() == [None] and columns["repaired_from"].to_pylist() == [None]
    pq.write_table(pq.read_table(path).drop_columns(["prompt"]), path)
    with pytest.raises(InputError, match="lacks prompt"):
        read_columns(path, Response, ["id", "prompt"])
    pq.write_table(pa.table({"id": [1, 2], "score": ["high", "low"], "parents": ["a", "b"]}), path)
    for row, name in ((Response, "id"), (Response, "score"), (Prompt, "parents")):
        with pytest.raises(InputError, match=f"another type in {name}"):
            read_columns(path, row, [name])
    pq.write_table(pa.table({"id": ["a", None]}), path)
    with pytest.raises(InputError, match="lacks id"):
        read_columns(path, Response, ["id"])


def test_a_few_bytes_that_stand_for_many_texts_are_refused_in_every_way_of_reading(tmp_path: Path) -> None:
    path, num = tmp_path / "r.parquet", 20_000
    text = pa.array(["x" * 10_000]).dictionary_encode().dictionary
    table = pa.table(
        {"id": pa.DictionaryArray.from_arrays(pa.array([0] * num, pa.int32()), text), "text": ["t"] * num, "origin": ["o"] * num}
    )
    pq.write_table(table, path)
    assert path.stat().st_size < 10_000
    with pytest.raises(InputError, match="bytes of text to a byte"):
        read_rows(path, TopicRow)
    with pytest.raises(InputError, match="bytes of text to a byte"):
        read_rows(path, TopicRow, range(num))
    assert len(read_columns(path, TopicRow, ["id"])["id"].dictionary) == 1  # as numbers they take no room


def test_a_folder_is_no_file_of_rows(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is no file: give a \.parquet, \.jsonl or \.json file\.$"):
        read_records(tmp_path)
    with pytest.raises(InputError, match=r"does not exist: check the path\.$"):
        read_records(tmp_path / "none.jsonl")
