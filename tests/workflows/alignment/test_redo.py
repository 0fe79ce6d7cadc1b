"""A changed recipe: every key of it touches the stages that read it, and no others; what is redone is moved aside first."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gristmill.core.config import Section
from gristmill.core.errors import InputError
from gristmill.core.progress import Progress
from gristmill.runs.reader import read_run
from gristmill.workflows.alignment import context, loop
from gristmill.workflows.alignment.recipe import AlignmentRecipe

Make = Callable[..., AlignmentRecipe]
Run = Callable[..., dict[str, Any]]
Snapshot = Callable[[Path], dict[str, bytes]]

WEIGHTS = {"weights": "nemotron4-340b"}
GIVEN: dict[str, Any] = {  # another value of every key, by the first stage that reads it; "" for none
    "": {
        "name": "other",
        "threads": 2,
        "calls": {"timeout": 9},
        "alarms": {"min_steps": 1},
        "engine": {"max_batch": 7},
        "collapse": {"stop": 8},
    },
    "00-data": {
        "seed": 1,
        "data": {"num_demonstrations": 63, "num_rated_prompts": 23, "num_evaluation": 3, "num_held_out_ratings": 9},
    },
    "00-base": {"answers": {"max_tokens": 31}, "engine": {"precision": "bf16"}},
    "01-reward": {"judging": {"reward": WEIGHTS}, "reward": {"lr": 1e-3}},
    "02-demonstrations": {"demonstration_sft": {"lr": 1e-3}},
    "03-reward-check": {"answers": {"samples": 2, "temperatures": [0.5]}},
    "04-monitors": {"collapse": {"tokens": 300}},
    "05-r1-prompts": {
        "control": "unfiltered",
        "templates": "default",
        "data": {"num_prompts": 5},
        "topics": {"macro": 7},
        "probe": {"num_prompts": 7, "min_usable": 0.5, "fallback": {"open_qa": {}}},
        "pipelines": {"two_turn": {"prompts": 11}},
        "generators": [{"checkpoint": "demonstrations"}],
    },
    "06-r1-answers": {
        "judging": {
            "keep": "correctness >= -98",
            "min_votes": 2,
            "max_per_prompt": 3,
            "max_judged_per_prompt": 2,
            "max_per_task": 9,
            "max_code_per_task": 9,
            "max_prompts_per_task": 9,
            "max_per_topic": 9,
            "max_repetition": 0.9,
            "repair": {"max_per_prompt": 2},
        },
    },
    "07-r1-code-sft": {"code_sft": {"lr": 2e-5}},
    "08-r1-general-sft": {"general_sft": {"lr": 2e-5}, "judging": {"code_share": 0.9}},
    "09-r1-dpo-pairs": {
        "dpo": {"num_prompts": 1, "num_pairs": 9, "temperatures": [0.3], "keep_chosen": "correctness >= -98"},
        "judging": {
            "llm": True,
            "keep_chosen": "correctness >= -98",
            "max_pairs_per_prompt": 1,
            "max_pairs_per_task": 9,
            "min_gap": 0.1,
            "verified_gap": 1.0,
            "near_duplicates": 0.8,
            "max_length_difference": 0.9,
        },
    },
    "10-r1-dpo": {"dpo": {"loss": "ipo"}},
    "11-r1-rpo1-pairs": {"rpo": {"num_prompts": 1}},
    "12-r1-rpo1": {"rpo": {"beta": 0.2}},
    "13-r1-monitors": {"rpo_iterations": 2},
}
OF_TRAINING = {"demonstration_sft", "reward", "code_sft", "general_sft", "dpo", "rpo"}  # all their keys are one stage's, but for pairs'
OF_FILES = {"demonstrations", "ratings", "prompts", "evaluation", "validation"}  # a world has none
# other tests: another base, own files, more rounds, measurements, people
WITHOUT = {"kind", "world", "model", "chat_format", "device", "rounds", "evaluate", "safety", "people", "check"}


CASES = [
    (stage, name, {name: {key: inner}} if isinstance(value, dict) else {name: value})
    for stage, of_stage in GIVEN.items()
    for name, value in of_stage.items()
    for key, inner in (value.items() if isinstance(value, dict) else [("", None)])
]


def test_every_key_is_looked_at() -> None:
    given = {
        (name, key)
        for of_stage in GIVEN.values()
        for name, value in of_stage.items()
        for key in (value if isinstance(value, dict) else [""])
    }
    for name, field in AlignmentRecipe.model_fields.items():
        if name in WITHOUT:
            continue
        section = field.annotation
        if name in ("judging", "answers", "engine", "collapse", "alarms", "data", "probe"):
            assert isinstance(section, type) and issubclass(section, Section)
            assert {key for n, key in given if n == name} == set(section.model_fields) - (OF_FILES if name == "data" else set()), name
        else:
            assert any(n == name for n, _ in given), name


def quiet() -> Progress:
    return Progress(quiet=True)


def first_stage_redone(run: Run, recipe: AlignmentRecipe, folder: Path) -> str:
    """The folder of the stage at which a start is refused, or nothing."""
    try:
        run(recipe, folder)
    except InputError as e:
        assert "give --redo" in str(e) and "(they differ in " in str(e)
        return Path(str(e).split(" was made by another recipe")[0]).name
    return ""


def test_each_key_touches_the_first_stage_that_reads_it(
    copy: Path, run: Run, make_recipe: Make, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("train_stage", "answer", "answer_pairs", "write_prompts", "evaluate_model"):
        monkeypatch.setattr(loop, name, lambda *args, name=name, **more: pytest.fail(f"{name} ran"))
    monkeypatch.setattr(context, "open_verifier", lambda *args, **more: None)  # nobody needs the sandbox
    before = snapshot(copy)
    for stage, _, change in CASES:
        assert first_stage_redone(run, make_recipe(**change), copy) == stage, change
        if stage:
            after = snapshot(copy)
            assert after.keys() == before.keys() and [n for n in before if before[n] != after[n]] in ([], [".lock"]), change
        else:
            run(make_recipe(), copy)
            before = snapshot(copy)


def test_what_is_redone_is_moved_aside_and_the_rest_is_kept(copy: Path, run: Run, make_recipe: Make, snapshot: Snapshot) -> None:
    before = snapshot(copy)
    results = loop.run(make_recipe(rpo={"beta": 0.2}), copy, quiet(), redo=True)
    after = snapshot(copy)
    redone = {"12-r1-rpo1", "13-r1-monitors"}
    kept = {name for name in before if "/" in name and name.split("/")[0] not in redone | {"00-validation"}}
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    for name in (name for name in before if name.split("/")[0] in redone or name in ("results.json", "recipe.yaml")):
        assert after[f"replaced/1/{name}"] == before[name], name
    assert after["12-r1-rpo1/model/model.safetensors"] != before["12-r1-rpo1/model/model.safetensors"]
    assert results["stages"][-1]["name"] == "r1-rpo1" and read_run(copy).results is not None
    assert read_run(copy).recipe["rpo"]["beta"] == 0.2
    assert run(make_recipe(rpo={"beta": 0.2}), copy)["best"] == results["best"]


def test_the_reward_model_is_redone_without_the_first_instruct(copy: Path, make_recipe: Make, snapshot: Snapshot) -> None:
    before = snapshot(copy)
    loop.run(make_recipe(reward={"lr": 1e-3}), copy, quiet(), redo=True)
    after = snapshot(copy)
    moved = {name.split("/")[2] for name in after if name.startswith("replaced/1/") and name.count("/") > 2}
    assert moved >= {"01-reward", "03-reward-check", "06-r1-answers"} and not moved & {"02-demonstrations", "04-monitors", "05-r1-prompts"}
    assert after["02-demonstrations/done.json"] == before["02-demonstrations/done.json"]


def test_fewer_stages_leave_none_behind(copy: Path, make_recipe: Make) -> None:
    results = loop.run(make_recipe(rpo_iterations=0), copy, quiet(), redo=True)
    assert results["stages"][-1]["name"] == "r1-dpo" and read_run(copy).results is not None
    assert sorted(p.name for p in copy.glob("1[0-9]-*")) == ["10-r1-dpo", "11-r1-monitors"]
    assert (copy / "replaced" / "1" / "12-r1-rpo1" / "model").is_dir()


def test_a_stage_that_was_cut_off_is_not_gone_on_with_by_another_recipe(copy: Path, run: Run, make_recipe: Make) -> None:
    (copy / "06-r1-answers" / "done.json").unlink()
    assert first_stage_redone(run, make_recipe(judging={"max_per_task": 9}), copy) == "06-r1-answers"
    loop.run(make_recipe(judging={"max_per_task": 9}), copy, quiet(), redo=True)
    assert (copy / "replaced" / "1" / "06-r1-answers" / "calls.jsonl").is_file()


def test_a_redo_that_is_cut_off_goes_on(copy: Path, run: Run, make_recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = make_recipe(dpo={"loss": "ipo"})
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_stage", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            loop.run(changed, copy, quiet(), redo=True)
    assert read_run(copy).results is None and json.loads((copy / "replaced" / "1" / "results.json").read_text())
    with pytest.raises(InputError, match="give --redo"):
        run(changed, copy)
    assert loop.run(changed, copy, quiet(), redo=True)["stages"][-1]["name"] == "r1-rpo1"
