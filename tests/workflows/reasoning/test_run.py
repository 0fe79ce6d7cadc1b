"""A reasoning run on a user's files: it goes on after a kill, measures both modes and budgets, and says what it cannot use."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from gristmill.cli.main import app
from gristmill.core.config import check, dump
from gristmill.core.errors import InputError
from gristmill.core.progress import Progress
from gristmill.data.rows import read_records
from gristmill.model.hf import load_model
from gristmill.report.reasoning import write_page
from gristmill.report.summary import stage_line
from gristmill.runs.reader import read_run
from gristmill.studio.sources import Sources
from gristmill.train.checkpoint import CheckpointStore
from gristmill.workflows.reasoning.recipe import ReasoningRecipe
from gristmill.workflows.reasoning.run import run

# Short answers pass now and then, so that groups have a spread.
TRUTH = {"kind": "instructions", "checks": [{"id": "length_constraints:number_words", "relation": "less than", "num_words": 8}]}
PENALTY = {"form": "thinking", "form_penalty": 1.0}
EASY, HARD = ("bee", "moss", "rain", "salt"), ("wind", "tree", "sand", "hail")


def rows_of(folder: Path) -> dict[str, str]:
    """Files of a user: answers in both modes, some of them wrong; prompts of two levels; held-out prompts."""
    answers = []
    for word in EASY:
        for mode, text in (("on", f"<think>It is {word}.</think>{word}"), ("off", word)):
            answers.append({"input": [{"role": "user", "content": f"Say {word}."}], "output": text, "reasoning": mode})
    wrong = {"input": [{"role": "user", "content": "Say ash."}], "reasoning": "on", "truth": {"kind": "exact", "value": "ash"}}
    answers += [wrong | {"output": text} for text in ("ash", "<think>No.</think>oak", "<think>2 + 2 = 5.</think>ash")]
    prompts = [{"prompt": f"Say {w}.", "truth": TRUTH, "level": 1 + (w in HARD)} for w in (*EASY, *HARD)]
    held = [{"prompt": f"Say {w}!", "truth": TRUTH, "level": level, "task": "words"} for w, level in (("fog", 1), ("dew", 2))]
    held.append({"prompt": "Say <script>alert(1)</script>!", "truth": TRUTH, "task": "other"})
    files = {"demonstrations": answers, "prompts": prompts, "evaluation": held}
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {name: str(folder / f"{name}.jsonl") for name in files}


def make(folder: Path, base: Path, **changes: Any) -> ReasoningRecipe:
    values = {
        "model": str(base),
        "threads": 1,
        "data": {**rows_of(folder), "task": "words"},
        "sft": {"lr": 3e-3, "steps": 12, "batch_size": 4, "precision": "fp32"},
        "rl": {"prompts": 2, "samples": 4, "max_tokens": 16, "training": {"precision": "fp32"}, "engine": {"precision": "fp32"}},
        "stages": [
            {"name": "easy", "levels": [1], "steps": 2},
            {"name": "hard", "levels": [2], "steps": 1, "max_thinking_tokens": 4, "rewards": PENALTY},
        ],
        "budgets": [0, 4],
        **changes,
    }
    recipe = check(ReasoningRecipe, values)
    (folder / "mine.yaml").write_text(dump(recipe))
    return recipe


def quietly(recipe: ReasoningRecipe, folder: Path) -> dict[str, Any]:
    return run(recipe, folder, Progress(quiet=True))


@pytest.fixture(scope="module")
def calm(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calm")
    quietly(make(folder, tiny_base), folder / "run")
    return folder


def test_a_run_trains_in_stages_and_measures_both_modes(calm: Path) -> None:
    data = read_run(calm / "run")
    assert [s["folder"] for s in data.stages] == ["00-data", "01-base", "02-sft", "03-before", "04-easy", "05-hard", "06-after"]
    assert data.results is not None and data.results["rejected"] == {"form": 1, "wrong reply": 1, "false step": 1}
    found = data.results["reasoning"]
    assert set(found) == {"before", "after", "paired", "budget"} and [p["budget"] for p in found["budget"]] == [0, 4, None]
    for when in ("before", "after"):
        assert found[when]["on"]["n"] == found[when]["off"]["n"] == 2 and found[when]["obedience"]["on"]["n"] == 3
        assert found[when]["tasks"]["on"].keys() == {"words", "other"} and found[when]["levels"]["on"].keys() == {"1", "2"}
    records = read_records(calm / "run/00-data/llama-nemotron.jsonl")
    assert len(records) == 8 and {r["reasoning"] for r in records} == {"on", "off"}
    model, tokenizer = load_model(calm / "run" / data.results["model"])
    assert tokenizer.has("<think>") and model.config.vocab_size == tokenizer.max_id + 1
    asked = [r["question"] for r in read_records(calm / "run/05-hard/run/01-rl/rollouts.jsonl") if "question" in r]
    assert asked and all(question.split()[1].strip(".") in HARD for question in asked)
    lines = [stage_line(s) for s in data.stages]
    assert "thinking on" in lines[3] and "2 steps" in lines[4] and "12 steps" not in lines[0]


def test_a_killed_run_goes_on_and_ends_with_the_same_weights(calm: Path, tiny_base: Path, tmp_path: Path) -> None:
    """In a folder that is moved meanwhile, as one is that is given by another path."""
    recipe, saves = make(tmp_path, tiny_base), 0
    save = CheckpointStore.save

    def dying(store: CheckpointStore, state: Any) -> None:
        nonlocal saves
        saves += 1
        save(store, state)
        if saves == 2:  # the first is of SFT
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointStore, "save", dying)
        with pytest.raises(KeyboardInterrupt):
            quietly(recipe, tmp_path / "first")
    (tmp_path / "first").rename(tmp_path / "run")
    before = (tmp_path / "run/03-before/done.json").stat().st_mtime_ns
    results = quietly(recipe, tmp_path / "run")
    assert (tmp_path / "run/03-before/done.json").stat().st_mtime_ns == before
    one, other = (load_file(folder / "run" / results["model"] / "model.safetensors") for folder in (calm, tmp_path))
    assert all((one[name] == other[name]).all() for name in one)
    ids = [r["id"] for r in read_records(tmp_path / "run/04-easy/run/01-rl/rollouts.jsonl")]
    assert len(ids) == len(set(ids))


def test_a_model_is_pretrained_further_on_documents_first(tiny_base: Path, tmp_path: Path) -> None:
    documents = tmp_path / "documents.jsonl"
    documents.write_text("".join(json.dumps({"text": f"Say {word}. It is {word}."}) + "\n" for word in (*EASY, *HARD)))
    further = {"documents": str(documents), "tokens": 64, "batch_tokens": 32, "lr": 1e-2, "precision": "fp32"}
    recipe = make(tmp_path, tiny_base, pretraining=further, stages=[], sft={"lr": 1e-3, "steps": 1, "batch_size": 4, "precision": "fp32"})
    results = quietly(recipe, tmp_path / "run")
    assert [s["folder"] for s in read_run(tmp_path / "run").stages[:4]] == ["00-data", "01-pretraining", "02-base", "03-sft"]
    given, further_trained, base = (
        load_file(f / "model.safetensors") for f in (tiny_base, tmp_path / "run/01-pretraining/model", tmp_path / "run/02-base/model")
    )
    name = next(name for name in given if "layers.0" in name and "norm" not in name)
    assert not (given[name] == further_trained[name]).all() and (further_trained[name] == base[name]).all()
    assert quietly(recipe, tmp_path / "run") == results, "it is done"
    documents.unlink()
    with pytest.raises(InputError, match="which pretraining.documents names"):
        quietly(recipe, tmp_path / "other")


def test_the_page_shows_modes_budgets_and_one_question_twice_and_runs_nothing(calm: Path, tmp_path: Path) -> None:
    page = write_page(read_run(calm / "run")).read_text()
    assert "Thinking budget" in page and "By level" in page and "Reinforcement learning: easy" in page and page.count("thinking off ") > 1
    assert "<script" not in page
    found = Sources(calm / "run", tmp_path)
    links = re.findall(r"/#/rows\?source=([\w-]+)%2Fevaluation\.parquet&amp;place=(\d+)", page)
    assert links and all(found.row(f"{stage}/evaluation.parquet", int(place))["messages"][-1]["content"] in page for stage, place in links)
    assert found.page("04-easy/run/01-rl/rollouts.jsonl")["total"] > 0


def test_the_command_prints_both_modes_and_refuses_options_of_the_loop(calm: Path) -> None:
    shown = CliRunner().invoke(app, ["run", str(calm / "mine.yaml"), "--out", str(calm / "run"), "--quiet"])
    assert shown.exit_code == 4 and re.search(r"alarm: \w+ makes 0 of \d updates", shown.stderr), shown.output
    assert "thinking on " in shown.stdout and "thinking budget: 0 " in shown.stdout and "--reasoning-parser think" in shown.stdout
    again = CliRunner().invoke(app, ["run", str(calm / "mine.yaml"), "--out", str(calm / "run"), "--quiet", "--json"])
    assert json.loads(again.stdout)["reasoning"]["after"]["on"]["n"] == 2
    refused = CliRunner().invoke(app, ["run", str(calm / "mine.yaml"), "--rounds", "2"])
    assert refused.exit_code == 2 and "--rounds is for the alignment loop" in refused.stderr
    assert CliRunner().invoke(app, ["report", str(calm / "run")]).exit_code == 0


def test_a_model_is_evaluated_in_a_mode_and_under_a_budget(calm: Path) -> None:
    model = calm / "run/06-after"
    folder = calm / "run" / json.loads((calm / "run/results.json").read_text())["model"]
    command = ["eval", str(folder), "--prompts", str(calm / "evaluation.jsonl"), "--greedy", "--max-tokens", "16", "--json", "--quiet"]
    found = {mode: json.loads(CliRunner().invoke(app, [*command, "--thinking", mode]).stdout) for mode in ("on", "off")}
    run_scores = json.loads((model / "done.json").read_text())["reasoning"]
    for mode, scores in found.items():
        assert scores["obedience"]["mean"] == run_scores["obedience"][mode]["mean"]
    bound = CliRunner().invoke(app, [*command, "--thinking", "on", "--max-thinking-tokens", "0"])
    assert bound.exit_code == 0 and json.loads(bound.stdout)["greedy"]["overall"]["n"] == 3


@pytest.mark.parametrize(
    ("name", "row", "words"),
    [
        ("demonstrations", {"prompt": "Say x.", "response": "x"}, "does not say whether thinking is on"),
        ("prompts", {"prompt": "Say fog!", "truth": TRUTH}, "is asked by the evaluation too"),
        ("prompts", {"prompt": "Say sun!"}, "neither `truth` nor `answer`"),
        ("evaluation", {"prompt": "Say sun. " * 200, "truth": TRUTH}, "leaves no room for an answer of 16 tokens"),
        ("evaluation", {"prompt": "Say sun!", "truth": TRUTH, "level": "hard"}, "Row 4 of .* has the level 'hard'"),
        ("demonstrations", {"prompt": "x", "response": "<think>x</think>x", "truth": "x"}, "Row 12 of .*lacks the field 'kind'"),
    ],
)
def test_rows_that_cannot_be_used_are_refused_before_any_work(tiny_base: Path, tmp_path: Path, name: str, row: Any, words: str) -> None:
    recipe = make(tmp_path, tiny_base)
    with (tmp_path / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    with pytest.raises(InputError, match=words):
        quietly(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": {}}, "give demonstrations and prompts and evaluation, or name a world"),
        ({"world": "miniature"}, "leave the files out, or the world"),
        ({"rl": {"rewards": {"form": "any"}}}, "must be thinking"),
        ({"stages": [{"name": "a", "rewards": {"form": "any"}}]}, "must be thinking"),
        ({"stages": [{"name": "a"}, {"name": "a"}]}, "each another name"),
        ({"stages": [{"name": "pretraining"}]}, "each another name"),
        ({"pretraining": {"tokens": 100}}, "without one give `documents`"),
        ({"rl": {"on": 0.5}}, "share_on"),
        ({"budgets": [8, -1]}, "budgets"),
    ],
)
def test_recipes_that_cannot_work_are_refused(tmp_path: Path, tiny_base: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        make(tmp_path, tiny_base, **changes)


def test_steps_are_not_rewarded_where_no_prompt_has_any(tmp_path: Path, tiny_base: Path) -> None:
    recipe = make(tmp_path, tiny_base, rl={"rewards": {"form": "thinking", "supervision": "process"}})
    with pytest.raises(InputError, match="no prompt has a truth with `steps`"):
        quietly(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_level_that_no_prompt_has_is_named(tmp_path: Path, tiny_base: Path) -> None:
    with pytest.raises(InputError, match=r"`level` of the stage 'far': \[7\]"):
        quietly(make(tmp_path, tiny_base, stages=[{"name": "far", "levels": [7]}]), tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stages": [{"name": "far", "levels": [0, 2]}]}, "'far' asks for level 0: the miniature world has"),
        ({"data": {"task": "sum"}}, "data.task is 'sum': the miniature world has sums, facts"),
    ],
)
def test_what_the_world_does_not_have_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        quietly(check(ReasoningRecipe, {"world": "miniature", **changes}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
