"""Reading a run folder back, whole or in any half-made state."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from gristmill.core.errors import InputError
from gristmill.data.rows import Prompt, Response
from gristmill.runs.reader import read_run

MakeRun = Callable[..., Path]


def test_stages_come_in_order_with_their_folders(make_run: MakeRun) -> None:
    data = read_run(make_run())
    assert [s["folder"] for s in data.stages][:4] == ["00-data", "01-reward", "02-demonstrations", "03-reward-check"]
    assert all(s["folder"].split("-", 1)[1] == s["name"] for s in data.stages)
    assert data.results is not None and data.recipe["name"] == "run"


def test_an_unfinished_stage_has_only_its_folder(make_run: MakeRun) -> None:
    data = read_run(make_run(finished=False))
    assert data.stages[-1] == {"folder": "07-r1-code-sft"}
    assert data.results is None


def test_stages_past_the_hundredth_sort_by_number(make_run: MakeRun) -> None:
    folder = make_run()
    (folder / "100-late").mkdir()
    (folder / "99-earlier").mkdir()
    assert [s["folder"] for s in read_run(folder).stages][-2:] == ["99-earlier", "100-late"]


def test_results_of_a_shorter_run_are_not_those_of_a_longer_one(make_run: MakeRun) -> None:
    folder = make_run()
    results = json.loads((folder / "results.json").read_text())
    results["stages"] = results["stages"][:-1]  # a third round was added, and its model is not in the results yet
    (folder / "results.json").write_text(json.dumps(results))
    assert read_run(folder).results is None


def test_rows_and_outcomes(make_run: MakeRun) -> None:
    data = read_run(make_run())
    evaluation = data.rows("00-data", "evaluation.parquet", Prompt)
    assert set(data.outcomes("02-demonstrations")["greedy"]) == {p.id for p in evaluation}
    assert data.rows("00-data", "nothing.parquet", Prompt) == []
    assert data.rows("06-r1-answers", "responses.parquet", Response)[0].rating is not None


def test_an_empty_parquet_file_has_no_rows(make_run: MakeRun) -> None:
    from gristmill.data.rows import write_rows

    folder = make_run()
    write_rows(folder / "00-data" / "empty.parquet", [])
    assert read_run(folder).rows("00-data", "empty.parquet", Prompt) == []


def test_a_torn_journal_keeps_its_whole_lines(make_run: MakeRun) -> None:
    folder = make_run()
    path = folder / "05-r1-prompts" / "topics.jsonl"
    whole = len(path.read_text().splitlines())
    with path.open("a") as file:
        file.write('{"id": "x", "ou')
    assert len(read_run(folder).journal("05-r1-prompts", "topics.jsonl")) == whole


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no run"):
        read_run(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_marker_is_named(make_run: MakeRun, text: str) -> None:
    folder = make_run()
    (folder / "02-demonstrations" / "done.json").write_text(text)
    with pytest.raises(InputError, match="done.json"):
        read_run(folder)
