"""The run folder: stages are done once, nothing is half-written, and a folder belongs to one recipe and one process."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gristmill.core.config import check, load
from gristmill.core.errors import InputError
from gristmill.core.progress import Progress
from gristmill.curate.recipe import Curation
from gristmill.runs.reader import read_run
from gristmill.runs.run_dir import RunDir
from gristmill.workflows.alignment.recipe import AlignmentRecipe

Snapshot = Callable[[Path], dict[str, bytes]]


def recipe(**values: Any) -> AlignmentRecipe:
    return check(AlignmentRecipe, {"world": "miniature", **values})


def open_run(path: Path, given: AlignmentRecipe | None = None) -> RunDir:
    return RunDir(path, given or recipe(), Progress(quiet=True))


def no_space(*args: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def too_long(folder: Path) -> dict[str, Any]:
    raise InputError("A row is too long.")


def test_a_stage_is_done_once(tmp_path: Path) -> None:
    calls = []

    def work(folder: Path) -> dict[str, Any]:
        calls.append(folder)
        (folder / "rows").write_text("made")
        return {"rows": 3}

    run = open_run(tmp_path / "run")
    first = run.stage("data", {"a": 1}, work)
    assert first.summary["rows"] == 3 and first.summary["name"] == "data" and calls == [tmp_path / "run" / "00-data"]
    del run
    assert open_run(tmp_path / "run").stage("data", {"a": 1}, work) == first
    assert len(calls) == 1


def test_stages_are_numbered_in_their_order(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run")
    for name in ("data", "reward", "data"):
        run.stage(name, None, lambda folder: {})
    assert run.stages == ["00-data", "01-reward", "02-data"]
    assert all((run.path / stage / "done.json").is_file() for stage in run.stages)


def test_a_stage_that_was_cut_off_is_continued_in_its_folder(tmp_path: Path) -> None:
    def cut(folder: Path) -> dict[str, Any]:
        (folder / "half").write_text("1")
        raise KeyboardInterrupt

    run = open_run(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        run.stage("data", 1, cut)
    del run
    done = open_run(tmp_path / "run").stage("data", 1, lambda folder: {"found": (folder / "half").read_text()})
    assert done.summary["found"] == "1"


def test_other_inputs_are_refused_and_what_is_made_stays(tmp_path: Path, snapshot: Snapshot) -> None:
    run = open_run(tmp_path / "run")
    run.stage("data", {"seed": 0}, lambda folder: {})
    before = snapshot(run.path)
    del run
    with pytest.raises(InputError, match="00-data was made from other inputs"):
        open_run(tmp_path / "run").stage("data", {"seed": 1}, lambda folder: {"must": "not run"})
    assert snapshot(tmp_path / "run") == before


def test_a_changed_stage_is_redone_with_all_after_it(tmp_path: Path) -> None:
    def done(*inputs: object) -> list[str]:
        run, made = open_run(tmp_path / "run"), []
        for name, of_stage in zip("abc", inputs, strict=False):

            def work(folder: Path, name: str = name) -> dict[str, Any]:
                assert not (folder / "file").exists(), "from nothing"
                (folder / "file").touch()
                made.append(name)
                return {}

            run.stage(name, of_stage, work, on_change="redo")
        run.close()
        return made

    assert done(1, 2, 3) == ["a", "b", "c"] and done(1, 2, 3) == []
    assert done(1, 4, 3) == ["b", "c"] and done(1) == [] and done(1, 4, 3) == []
    (tmp_path / "run" / "00-a" / "done.json").unlink()
    (tmp_path / "run" / "00-a" / "file").unlink()
    assert done(1, 4, 3) == ["a"], "cut off and unchanged, it is continued"
    (tmp_path / "run" / "00-a").rename(tmp_path / "run" / "00-other")
    assert done(1, 4, 3) == ["a", "b", "c"] and not (tmp_path / "run" / "00-other").exists()


def test_a_finished_stage_that_lacks_something_is_continued_and_one_of_other_inputs_refused(tmp_path: Path) -> None:
    def done(inputs: int, wanted: set[str]) -> dict[str, Any]:
        def work(folder: Path) -> dict[str, Any]:
            had = {path.name for path in folder.iterdir()} - {"done.json"}
            for name in wanted:
                (folder / name).touch()
            return {"had": sorted(had), "has": sorted(had | wanted)}

        with open_run(tmp_path / "run") as run:
            return run.stage("a", inputs, work, again=lambda done: not wanted <= set(done["has"])).summary

    assert done(1, {"kl"})["had"] == [] and done(1, {"accuracy"})["had"] == ["kl"]
    assert done(1, {"kl"})["has"] == ["accuracy", "kl"] and done(1, {"kl"})["had"] == ["kl"], "nothing is missing: not done again"
    with pytest.raises(InputError, match="made from other inputs"):
        done(2, {"speed"})


def test_half_a_removed_stage_is_not_taken_for_a_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the middle of removing: the stage is out of the way at once."""
    run = open_run(tmp_path / "run")
    run.stage("a", 1, lambda folder: {}, on_change="redo")
    (run.path / "00-a" / "marker").touch()
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda path, ignore_errors=False: None if ignore_errors else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run.drop_stages()
    assert not (run.path / "00-a").exists()
    run.close()
    open_run(tmp_path / "run").stage("a", 2, lambda folder: {"old": (folder / "marker").exists()}, on_change="redo")
    assert not json.loads((run.path / "00-a" / "done.json").read_text())["old"] and not (run.path / ".gone").exists()


def test_results_count_while_they_are_of_the_same_inputs(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run")
    run.stage("a", 1, lambda folder: {})
    (run.path / "data").mkdir()
    results = run.finish({"fingerprint": "x", "stages": [{"folder": "00-a", "name": "a", "seconds": 1.0, "fingerprint": "y"}]})
    run.drop_stages()
    assert run.finished("x", ["data"]) == results and read_run(run.path).stages == results["stages"]
    assert run.finished("x", ["data", "index"]) is None and run.finished("x", ["data"]) is None, "they were taken back"


def test_a_folder_of_another_kind_is_refused(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run")
    run.finish({})
    run.close()
    for _ in range(2):
        with pytest.raises(InputError, match="holds a run of `gristmill run`"):
            RunDir(tmp_path / "run", Curation(), Progress(quiet=True))
        (tmp_path / "run" / "results.json").unlink(missing_ok=True)


def test_a_folder_of_another_recipe_is_refused(tmp_path: Path, snapshot: Snapshot) -> None:
    open_run(tmp_path / "run", recipe(seed=1)).stage("data", 1, lambda folder: {})
    before = snapshot(tmp_path / "run")
    with pytest.raises(InputError, match=r"another recipe \(they differ in seed, templates\)"):
        open_run(tmp_path / "run", recipe(seed=2, templates="default"))
    assert snapshot(tmp_path / "run") == before


def test_until_something_is_made_the_recipe_may_change(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="too long"):
        open_run(tmp_path / "run", recipe(seed=1)).stage("data", 1, too_long)
    open_run(tmp_path / "run", recipe(seed=2)).stage("data", 2, lambda folder: {})
    assert load(tmp_path / "run" / "recipe.yaml", AlignmentRecipe).seed == 2


def test_rounds_may_grow_and_threads_may_change(tmp_path: Path) -> None:
    open_run(tmp_path / "run", recipe(rounds=1)).stage("data", 1, lambda folder: {})
    open_run(tmp_path / "run", recipe(rounds=3, threads=2))
    assert load(tmp_path / "run" / "recipe.yaml", AlignmentRecipe).rounds == 3
    with pytest.raises(InputError, match="may grow, not shrink"):
        open_run(tmp_path / "run", recipe(rounds=2))


def test_a_folder_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_text("precious")
    with pytest.raises(InputError, match="holds no run"):
        open_run(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["photo.jpg"]


def test_a_file_in_the_folders_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("precious")
    with pytest.raises(InputError, match="run"):
        open_run(tmp_path / "run")
    assert (tmp_path / "run").read_text() == "precious"


def test_what_a_start_that_was_cut_off_at_once_leaves_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / "recipe.yaml.tmp").write_text("name: tin")
    open_run(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "recipe.yaml"]


def test_an_empty_folder_is_fine(tmp_path: Path) -> None:
    open_run(tmp_path)
    assert (tmp_path / "recipe.yaml").is_file()


def test_two_processes_never_share_a_folder(tmp_path: Path) -> None:
    first = open_run(tmp_path / "run")
    with pytest.raises(InputError, match="in use"):
        open_run(tmp_path / "run")
    first.close()
    open_run(tmp_path / "run")


def test_a_full_disk_when_the_run_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for function in ("fsync", "replace", "mkdir", "open"):
        with monkeypatch.context() as patch:
            patch.setattr(os, function, no_space)
            with pytest.raises(InputError, match="No space left on device"):
                open_run(tmp_path / "run" / function)
        open_run(tmp_path / "run" / function).stage("data", 1, lambda folder: {})


def test_a_full_disk_at_the_second_start_spoils_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, snapshot: Snapshot) -> None:
    open_run(tmp_path / "run").stage("data", 1, lambda folder: {})
    before = snapshot(tmp_path / "run")
    for function in ("fsync", "replace", "open"):
        with monkeypatch.context() as patch, pytest.raises(InputError, match="No space left on device"):
            patch.setattr(os, function, no_space)
            open_run(tmp_path / "run")
        assert snapshot(tmp_path / "run") == before
    open_run(tmp_path / "run").close()


def test_a_lost_recipe_is_written_again_for_the_same_one_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def made(text: str | None, given: AlignmentRecipe) -> None:
        saved = tmp_path / "run" / "recipe.yaml"
        saved.unlink(missing_ok=True)
        if text is not None:
            saved.write_text(text)
        with open_run(tmp_path / "run", given) as run:
            run.stage("data", 1, lambda folder: {})

    made(None, recipe(seed=1))
    for text in ("", "\0", "[", "1: 2\nkind: alignment\nrounds: many", None):
        with pytest.raises(InputError, match="recipe.yaml is damaged"):
            made(text, recipe(seed=2))
        with pytest.raises(InputError, match=r"recipe.yaml is damaged|holds a run of"), RunDir(tmp_path / "run", Curation(), Progress()):
            pass
        made(text, recipe(seed=1))
        assert load(tmp_path / "run" / "recipe.yaml", AlignmentRecipe).seed == 1


def test_a_recipe_of_ones_own_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("kind: alignment  # mine\nworld: miniature\n")
    with pytest.raises(InputError, match="holds no run"):
        open_run(tmp_path)
    assert "mine" in (tmp_path / "recipe.yaml").read_text()


def test_a_full_disk_in_a_stage_leaves_it_to_be_continued(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run")
    run.stage("data", 1, lambda folder: {})
    with pytest.raises(InputError, match="full"):
        run.stage("prompts", 1, no_space)
    del run
    again = open_run(tmp_path / "run")
    assert again.stage("data", 1, no_space).summary["name"] == "data"
    assert again.stage("prompts", 1, lambda folder: {"rows": 2}).summary["rows"] == 2


def test_errors_of_other_kinds_are_not_hidden(tmp_path: Path) -> None:
    def bug(folder: Path) -> dict[str, Any]:
        raise FileNotFoundError(errno.ENOENT, "gone")

    with pytest.raises(FileNotFoundError):
        open_run(tmp_path / "run").stage("data", 1, bug)
