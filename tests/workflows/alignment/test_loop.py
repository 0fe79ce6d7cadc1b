"""The whole loop, turned for real on a tiny Base: every stage, every control, taken up again, grown, and refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gristmill.core.errors import InputError
from gristmill.data.rows import Demonstration, Pair, Prompt, Response, read_rows
from gristmill.model.adapters import merge_folder
from gristmill.workflows.alignment import loop, monitors
from gristmill.workflows.alignment.recipe import AlignmentRecipe
from gristmill.workflows.alignment.source import contaminated, normalize_prompt

Make = Callable[..., AlignmentRecipe]
Run = Callable[[AlignmentRecipe, Path], dict[str, Any]]
Snapshot = Callable[[Path], dict[str, bytes]]

FIRST = ["data", "reward", "demonstrations", "reward-check", "monitors"]
ROUND = ["prompts", "answers", "code-sft", "general-sft", "dpo-pairs", "dpo", "rpo1-pairs", "rpo1", "monitors"]
STAGES = FIRST + [f"r1-{name}" for name in ROUND]
BESIDE = ["base", "validation"]  # numbered 0
MODELS = ["base", "demonstrations", "r1-code-sft", "r1-general-sft", "r1-dpo", "r1-rpo1"]
TASKS = {"overall", "facts", "sums", "code", "lists", "followups"}
WRITTEN_AT_EACH_START = {"results.json", "recipe.yaml", ".lock"}


def done(folder: Path, name: str) -> dict[str, Any]:
    (marker,) = folder.glob(f"[0-9][0-9]-{name}/done.json")
    found: dict[str, Any] = json.loads(marker.read_text())
    return found


def made(folder: Path, name: str, row: type[Any]) -> list[Any]:
    """Rows of every file of a name in the run."""
    return [r for path in sorted(folder.glob(f"*/{name}.parquet")) for r in read_rows(path, row)]


def stages_of(folder: Path) -> list[str]:
    return [name for p in sorted(folder.glob("*/done.json")) if (name := p.parent.name[3:]) not in BESIDE]


# ---- one whole run ----


def test_every_stage_is_done_in_order(finished: Path) -> None:
    assert stages_of(finished) == STAGES
    names = [f"{i:02d}-{name}" for i, name in enumerate(STAGES)] + [f"00-{name}" for name in BESIDE]
    assert sorted(p.name for p in finished.iterdir() if p.is_dir()) == sorted(names)


def test_both_judges_made_pairs_for_both_losses(finished: Path) -> None:
    for name in ("dpo", "rpo1"):
        pairs = done(finished, f"r1-{name}-pairs")
        assert pairs["pairs"] >= 1 and done(finished, f"r1-{name}")["rows"] == pairs["pairs"]
    assert {p.judge for p in made(finished, "pairs", Pair)} == {"verifier", "reward"}


def test_results_have_their_shape(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    assert {"seconds", "synthetic_share", "stages", "reward", "collapse"} <= results.keys()
    assert 0 < results["synthetic_share"] < 1 and results["seconds"] > 0 and results["stopped"] is None
    assert [s["name"] for s in results["stages"]] == MODELS
    for stage in results["stages"]:
        assert stage["round"] == (0 if stage["name"] in MODELS[:2] else 1)
        assert (finished / stage["model"] / "model.safetensors").is_file()
        for mode in ("greedy", "sampled"):
            assert stage[mode].keys() == TASKS
            for score in stage[mode].values():
                low, high = score["ci95"]
                assert 0 <= low <= score["mean"] <= high <= 1
            assert stage[mode]["overall"]["n"] == sum(s["n"] for t, s in stage[mode].items() if t != "overall") == 10
    reward = results["reward"]
    assert reward.keys() == {"easy", "hard", "llm_judge", "correlation"}
    assert reward["easy"]["overall"]["n"] == reward["llm_judge"]["easy"]["overall"]["n"] > 0
    assert len(reward["correlation"]) == 5
    assert [(c["round"], c["model"]) for c in results["collapse"]] == [(0, "demonstrations"), (1, "r1-rpo1")]
    for monitor in results["collapse"]:
        assert {"self_bleu", "distinct_4", "compression", "rare_types", "human_nll", "base_nll"} <= monitor["values"].keys()


def test_the_synthetic_share_counts_rows(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    human = done(finished, "data")["demonstrations"]
    synthetic = len(made(finished, "kept", Demonstration)) + len(made(finished, "pairs", Pair))
    assert results["alignment_samples"]["human"] == human and results["alignment_samples"]["synthetic"] == synthetic
    assert results["synthetic_share"] == pytest.approx(synthetic / (human + synthetic), abs=1e-4)


def test_human_rows_are_accumulated(finished: Path) -> None:
    human = made(finished, "demonstrations", Demonstration)
    assert done(finished, "r1-general-sft")["human_rows"] == len(human)
    assert done(finished, "r1-code-sft")["human_rows"] == sum(d.task == "code" for d in human) > 0
    assert done(finished, "r1-general-sft")["rows"] > len(human)


def test_nothing_that_is_trained_on_asks_what_the_evaluation_asks(finished: Path) -> None:
    held_out = frozenset(normalize_prompt(p.messages) for p in made(finished, "evaluation", Prompt))
    asked = [d.messages[:-1] for d in made(finished, "demonstrations", Demonstration) + made(finished, "kept", Demonstration)]
    asked += [p.messages for p in made(finished, "prompts", Prompt) + made(finished, "pairs", Pair)]
    assert held_out and len(asked) > 80
    assert not any(contaminated(messages, held_out) for messages in asked)


def test_every_row_can_be_traced_to_what_it_grew_from(finished: Path) -> None:
    prompts = {p.id: p for p in made(finished, "prompts", Prompt)}
    answers = {r.id: r for r in made(finished, "responses", Response)}
    assert len(prompts) == len({normalize_prompt(p.messages) for p in prompts.values()}), "a prompt is written once"
    kept = made(finished, "kept", Demonstration)
    for row in kept:
        if row.task == "prompt-writing":
            prompt = prompts[row.parents[0]]
            assert [m.content for m in row.messages] == [prompt.request, prompt.messages[-1].content]
        else:
            answer, prompt = answers[row.parents[0]], prompts[row.parents[1]]
            assert row.messages[:-1] == answer.messages == prompt.messages and row.messages[-1].content == answer.text
            assert answer.good and answer.finished and answer.prompt == prompt.id
    for row in made(finished, "pairs", Pair):
        chosen, rejected = (answers[i] for i in row.parents)
        assert (chosen.text, rejected.text) == (row.chosen, row.rejected) and row.chosen_reward >= row.rejected_reward
        assert chosen.prompt == rejected.prompt == row.prompt and row.messages == prompts[row.prompt].messages
        if row.judge == "verifier":
            assert chosen.good and not rejected.good
    assert {row.task for row in kept} >= {"prompt-writing", "code"}


def test_the_model_as_given_is_the_first_row(finished: Path, tiny_base: Path) -> None:
    row = json.loads((finished / "results.json").read_text())["stages"][0]
    assert row["name"] == "base" and row["model"] == str(tiny_base) and row["folder"] == "00-base"
    assert "chat format nemotron" in row["asked"]
    assert json.loads((finished / "00-base" / "outcomes.json").read_text()).keys() == {"greedy", "sampled"}


def test_the_best_model_is_chosen_on_prompts_that_are_not_reported(finished: Path) -> None:
    best = json.loads((finished / "results.json").read_text())["best"]
    outcomes = json.loads((finished / "00-validation" / "outcomes.json").read_text())
    assert list(outcomes) == MODELS and list(best["scores"]) == MODELS
    means = {name: sum(found.values()) / len(found) for name, found in outcomes.items()}
    assert best["name"] == max(MODELS, key=lambda name: means[name]) and best["score"] == best["scores"][best["name"]]
    assert best["score"]["mean"] == pytest.approx(max(means.values()), abs=1e-4)
    assert f"{len(outcomes['base'])} validation prompts" in best["rule"] and (finished / best["model"] / "config.json").is_file()
    evaluated = {p.id for p in made(finished, "evaluation", Prompt)}
    assert not evaluated & outcomes["base"].keys() and 0 < len(outcomes["base"]) <= 100


# ---- taken up again ----


def of_file(content: bytes) -> dict[str, Any]:
    """Results as they stand in their file, without what the file says of itself."""
    return {k: v for k, v in json.loads(content).items() if k not in ("check", "recipe", "stamps")}


def test_a_second_start_does_nothing(copy: Path, run: Run, make_recipe: Make, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    before = snapshot(copy)
    for name in ("train_stage", "answer", "answer_pairs", "write_prompts"):
        monkeypatch.setattr(loop, name, lambda *args, name=name: pytest.fail(f"{name} ran again"))
    results = run(make_recipe(), copy)
    after = snapshot(copy)
    assert after.keys() == before.keys()
    assert [name for name in before if before[name] != after[name] and name not in WRITTEN_AT_EACH_START] == []
    assert results == of_file(before["results.json"])


def test_threads_may_change_between_starts(copy: Path, run: Run, make_recipe: Make) -> None:
    assert run(make_recipe(threads=None), copy) == of_file((copy / "results.json").read_bytes())


def test_rounds_can_grow(copy: Path, run: Run, make_recipe: Make, snapshot: Snapshot) -> None:
    before = snapshot(copy)
    results = run(make_recipe(rounds=2), copy)
    after = snapshot(copy)
    changed = [name for name in before if before[name] != after[name] and name not in WRITTEN_AT_EACH_START]
    assert changed == [f"00-validation/{name}" for name in ("done.json", "evaluation.jsonl", "outcomes.json")]
    asked = "00-validation/evaluation.jsonl"
    assert after[asked].startswith(before[asked]), "models of earlier rounds are not asked again"
    assert stages_of(copy)[: len(STAGES)] == STAGES and stages_of(copy)[len(STAGES)] == "r2-prompts"
    assert {s["round"] for s in results["stages"]} == {0, 1, 2} and [c["round"] for c in results["collapse"]] == [0, 1, 2]
    first, second = (read_rows(next(copy.glob(f"*-r{n}-prompts")) / "prompts.parquet", Prompt) for n in (1, 2))
    assert {p.origin for p in first} == {"file", "demonstrations"} and {p.origin for p in second} == {"file", "r1-rpo1"}
    new = [{normalize_prompt(p.messages) for p in prompts if p.origin != "file"} for prompts in (first, second)]
    assert new[0] and new[1] and new[0].isdisjoint(new[1])
    kept = [len(read_rows(path, Demonstration)) for path in sorted(copy.glob("*/kept.parquet"))]
    assert done(copy, "r2-code-sft")["rows"] + done(copy, "r2-general-sft")["rows"] >= done(copy, "data")["demonstrations"] + sum(kept)
    with pytest.raises(InputError, match="may grow, not shrink"):
        run(make_recipe(rounds=1), copy)


def test_the_folder_of_another_recipe_is_left_alone(copy: Path, run: Run, make_recipe: Make, snapshot: Snapshot) -> None:
    before = snapshot(copy)
    with pytest.raises(InputError, match="05-r1-prompts was made by another recipe .*templates"):
        run(make_recipe(templates="default"), copy)
    assert snapshot(copy) == before


def test_another_base_is_refused(copy: Path, run: Run, make_recipe: Make, snapshot: Snapshot, random_base: Path) -> None:
    before = snapshot(copy)
    with pytest.raises(InputError, match="00-data was made by another recipe .*model.*--redo"):
        run(make_recipe(model=str(random_base)), copy)
    assert snapshot(copy) == before


def test_alarms_stop_the_run(copy: Path, run: Run, make_recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitors.diversity, "alarms", lambda now, first: ["self_bleu"] * 9)
    (next(copy.glob("*-r1-monitors")) / "done.json").unlink()
    results = run(make_recipe(rounds=3), copy)
    assert [a["stage"] for a in results["alarms"]] == ["r1-monitors"]
    assert results["stopped"].startswith("round 1: self_bleu") and stages_of(copy) == STAGES


def test_a_model_that_repeats_itself_alarms(copy: Path, run: Run, make_recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(texts: list[str], *args: Any, **more: Any) -> dict[str, float]:
        return measured(["the same words again and again"] * len(texts), *args, **more)

    measured = monitors.diversity.measure
    monkeypatch.setattr(monitors.diversity, "measure", silent)
    (next(copy.glob("*-r1-monitors")) / "done.json").unlink()
    results = run(make_recipe(), copy)
    assert {"distinct_4", "self_bleu", "compression"} <= set(results["collapse"][1]["alarms"])


# ---- controls ----


def test_unfiltered_keeps_what_the_judge_rejects(run: Run, make_recipe: Make, tmp_path: Path) -> None:
    run(make_recipe(control="unfiltered"), tmp_path / "run")
    assert stages_of(tmp_path / "run") == STAGES
    answers = {r.id: r for r in made(tmp_path / "run", "responses", Response)}
    kept = [answers[d.parents[0]] for d in made(tmp_path / "run", "kept", Demonstration) if d.task != "prompt-writing"]
    assert any(not r.good for r in kept) and all(r.finished for r in kept)


def test_random_filter_keeps_as_many_but_not_the_same(run: Run, make_recipe: Make, tmp_path: Path, finished: Path) -> None:
    run(make_recipe(control="random-filter"), tmp_path / "run")
    assert stages_of(tmp_path / "run") == STAGES
    for name in ("prompts", "good", "kept"):
        real, blind = (done(f, "r1-answers")["funnel"] for f in (finished, tmp_path / "run"))
        assert {t: f[name] for t, f in real.items()} == {t: f[name] for t, f in blind.items()}
    pairs = made(tmp_path / "run", "pairs", Pair)
    answers = {r.id: r for r in made(tmp_path / "run", "responses", Response)}
    assert len(pairs) >= 2 and all(p.chosen != p.rejected for p in pairs)
    assert [p.parents for p in pairs] != [p.parents for p in made(finished, "pairs", Pair)]
    assert all({answers[i].prompt for i in p.parents} == {p.prompt} for p in pairs)


def test_reward_only_asks_no_verifier(run: Run, make_recipe: Make, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(make_recipe(control="reward-only"), folder)
    assert all(p.truth is None for p in made(folder, "prompts", Prompt))
    for stage in ("r1-answers", "r1-dpo-pairs"):
        (path,) = folder.glob(f"*-{stage}/responses.parquet")
        assert {r.judge for r in read_rows(path, Response)} == {"reward"}
    assert {p.judge for p in made(folder, "pairs", Pair)} == {"reward"}


def test_human_only_writes_nothing(run: Run, make_recipe: Make, tmp_path: Path) -> None:
    results = run(make_recipe(control="human-only"), tmp_path / "run")
    assert stages_of(tmp_path / "run") == [s for s in STAGES if s not in ("r1-prompts", "r1-answers") and not s.endswith("-pairs")]
    assert results["synthetic_share"] == 0 and results["alignment_samples"]["synthetic"] == 0
    assert done(tmp_path / "run", "r1-dpo")["rows"] > 10
    assert done(tmp_path / "run", "r1-general-sft")["rows"] == done(tmp_path / "run", "data")["demonstrations"]


def test_replace_forgets_what_people_wrote(run: Run, make_recipe: Make, tmp_path: Path) -> None:
    run(make_recipe(control="replace", rounds=2, data={"num_prompts": 20}), tmp_path / "run")
    assert done(tmp_path / "run", "demonstrations")["human_rows"] > 0
    for number in (1, 2):
        sft = done(tmp_path / "run", f"r{number}-general-sft")
        (path,) = (tmp_path / "run").glob(f"*-r{number}-answers/kept.parquet")
        kept = [d for d in read_rows(path, Demonstration) if d.task != "code"]
        repeated = sft["rows"] - len(kept)  # a little code; all else is of this round
        assert sft["human_rows"] == 0 and 0 <= repeated <= 1 + 0.03 * len(kept)


def test_every_stage_trains_an_adapter_and_the_stored_model_goes_on(run: Run, make_recipe: Make, tmp_path: Path) -> None:
    lora = {name: {"lora": {"rank": 4}} for name in ("demonstration_sft", "reward", "code_sft", "general_sft", "dpo", "rpo")}
    recipe = make_recipe(**lora)
    results = run(recipe, tmp_path / "run")
    assert [stage["name"] for stage in results["stages"]] == MODELS
    before = tmp_path / "run"
    for stage in results["stages"][1:]:  # after the model as given
        folder = tmp_path / "run" / stage["model"]
        adapter = json.loads((folder.parent / "adapter" / "adapter_config.json").read_text())
        expected = merge_folder(folder.parent / "adapter", tmp_path / "again")
        assert (tmp_path / "again" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
        assert done(tmp_path / "run", stage["name"])["lora"] == {
            "rank": 4,
            "update": {name: found["update"] for name, found in expected["update"].items()},
        }
        if stage["name"] in ("r1-dpo", "r1-rpo1"):  # each is trained on the model before it, as it is stored
            assert adapter["base_model_name_or_path"] == str(before)
        before = folder
    assert (tmp_path / "run" / "01-reward" / "adapter").is_dir()
    written = (tmp_path / "run" / "recipe.yaml").read_text()
    run(recipe, tmp_path / "run")
    assert (tmp_path / "run" / "recipe.yaml").read_text() == written


def test_a_rank_that_does_not_fit_is_told_before_work(run: Run, make_recipe: Make, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="LoRA rank of at most 16, not 64"):
        run(make_recipe(rpo={"lora": {"rank": 64}}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
