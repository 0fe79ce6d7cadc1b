"""Reading a run folder back, whole or in any half-made state, of any kind."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from gristmill.core.config import Recipe
from gristmill.core.errors import InputError
from gristmill.core.progress import Progress
from gristmill.curate.recipe import Curation
from gristmill.data.rows import TopicRow
from gristmill.runs import artifacts
from gristmill.runs.reader import RunData, generated_tokens, read_run
from gristmill.runs.run_dir import RunDir


def folder_of(data: RunData, name: str) -> str:
    return str(next(s["folder"] for s in data.stages if s.get("name") == name))


def test_stages_come_in_order_with_their_folders(finished: Path) -> None:
    data = read_run(finished)
    assert [s["folder"] for s in data.stages][:5] == ["00-base", "00-data", "00-validation", "01-reward", "02-demonstrations"]
    assert all(s["folder"].split("-", 1)[1] == s["name"] for s in data.stages)
    assert data.results is not None and data.recipe["name"] == "tiny" and data.kind == "alignment"


def test_an_unfinished_stage_has_only_its_folder(copy: Path) -> None:
    last = read_run(copy).stages[-1]["folder"]
    (copy / last / "done.json").unlink()
    data = read_run(copy)
    assert data.stages[-1] == {"folder": last}
    assert data.results is None


def test_stages_past_the_hundredth_sort_by_number(copy: Path) -> None:
    (copy / "100-late").mkdir()
    (copy / "99-earlier").mkdir()
    assert [s["folder"] for s in read_run(copy).stages][-2:] == ["99-earlier", "100-late"]


def test_results_of_a_shorter_run_are_not_those_of_a_longer_one(copy: Path) -> None:
    results = json.loads((copy / "results.json").read_text())
    results["stages"] = results["stages"][:-1]  # a second round was added, and its model is not in the results yet
    (copy / "results.json").write_text(json.dumps(results))
    assert read_run(copy).results is None


def test_artifacts_are_read_by_their_declaration(finished: Path) -> None:
    data = read_run(finished)
    evaluation = data.read(folder_of(data, "data"), artifacts.EVALUATION)
    assert set(data.read(folder_of(data, "r1-dpo"), artifacts.OUTCOMES)["greedy"]) == {p.id for p in evaluation}
    assert data.read(folder_of(data, "r1-answers"), artifacts.RESPONSES)[0].rating is not None
    assert data.read(folder_of(data, "r1-prompts"), artifacts.CONVERSATIONS) == []
    assert [s["name"] for s in data.stages_with(artifacts.KEPT)] == ["r1-answers"]
    with pytest.raises(InputError, match="not an artifact of a finished stage"):
        data.read(folder_of(data, "data"), artifacts.RESPONSES)


def test_every_declared_file_is_a_known_artifact(finished: Path) -> None:
    data = read_run(finished)
    declared = [(s["folder"], file) for s in data.stages for file in s["artifacts"]]
    assert declared
    for stage, file in declared:
        data.read(stage, artifacts.ALL[file])


def test_a_damaged_or_lost_artifact_is_named(copy: Path) -> None:
    data = read_run(copy)
    stage = folder_of(data, "r1-dpo")
    path = copy / stage / artifacts.OUTCOMES.file
    path.write_text("{")
    with pytest.raises(InputError, match="outcomes.json cannot be read"):
        data.read(stage, artifacts.OUTCOMES)
    path.unlink()
    with pytest.raises(InputError, match="outcomes.json is gone"):
        data.read(stage, artifacts.OUTCOMES)


def tokens_of(calls: dict[str, Any]) -> int:
    return sum(out[1] for record in calls.values() for out in record.get("out", []))


def test_a_torn_journal_keeps_its_whole_lines(copy: Path) -> None:
    data = read_run(copy)
    stage = folder_of(data, "r1-prompts")
    whole = len(data.read(stage, artifacts.CALLS))
    with (copy / stage / artifacts.CALLS.file).open("a") as file:
        file.write('{"id": "x", "ou')
    assert whole == len(data.read(stage, artifacts.CALLS))
    assert generated_tokens(copy / stage) == tokens_of(data.read(stage, artifacts.CALLS))


def test_the_calls_of_an_unfinished_stage_count(copy: Path) -> None:
    data = read_run(copy)
    stage = folder_of(data, "r1-prompts")
    (copy / stage / "done.json").unlink()
    assert read_run(copy).tokens_written(stage) == tokens_of(data.read(stage, artifacts.CALLS)) > 0


def test_a_marker_says_how_many_tokens_its_stage_has_and_journals_do_where_it_does_not(copy: Path) -> None:
    data = read_run(copy)
    written = {s["folder"]: data.tokens_written(s["folder"]) for s in data.stages}
    assert written == {folder: generated_tokens(copy / folder) for folder in written} and sum(n > 0 for n in written.values()) > 5
    for s in data.stages:  # what a version before this has made
        marker = copy / s["folder"] / "done.json"
        done = json.loads(marker.read_text())
        assert ("generated_tokens" in done) == any((copy / s["folder"]).glob("*.jsonl"))
        done.pop("generated_tokens", None)
        marker.write_text(json.dumps(done))
    assert written == {folder: read_run(copy).tokens_written(folder) for folder in written}
    for path in copy.glob("*/*.jsonl"):
        path.unlink()
    assert written == {folder: data.tokens_written(folder) for folder in written}, "journals are not read where markers say it"


class Dataset(Recipe):
    kind: str = "dataset"
    name: str = "rows"


@pytest.mark.parametrize("recipe", [Curation(name="documents"), Dataset()], ids=lambda recipe: recipe.kind)
def test_runs_of_every_kind_are_read(tmp_path: Path, recipe: Recipe) -> None:
    def work(folder: Path) -> dict[str, int]:
        return {"topics": artifacts.TOPICS.write(folder, [TopicRow("1", "mills"), TopicRow("2", "rivers", "a-model")])}

    with Progress(quiet=True) as progress, RunDir(tmp_path / "run", recipe, progress) as run:
        run.stage("topics", [], work, artifacts=[artifacts.TOPICS])
        assert read_run(tmp_path / "run").results is None
        run.finish({"name": "all", "stages": 1})
    data = read_run(tmp_path / "run")
    assert data.kind == recipe.model_dump()["kind"] and data.results == {"name": "all", "stages": 1}
    assert [t.text for t in data.read("00-topics", artifacts.TOPICS)] == ["mills", "rivers"]


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no run"):
        read_run(tmp_path)


def test_a_run_of_an_earlier_version_is_named(tmp_path: Path, finished: Path) -> None:
    shutil.copytree(finished / "00-data", tmp_path / "00-data")
    (tmp_path / "recipe.yaml").write_text("name: old\n")
    with pytest.raises(InputError, match="an earlier version"):
        read_run(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_marker_is_named(copy: Path, text: str) -> None:
    (copy / "02-demonstrations" / "done.json").write_text(text)
    with pytest.raises(InputError, match="done.json"):
        read_run(copy)
