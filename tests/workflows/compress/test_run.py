"""Compression as a run: what it writes, further targets, exact resume after kills, bad input told before work."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from gristmill.cli.main import app
from gristmill.compress.costs import Meter
from gristmill.core.config import check, dump, load
from gristmill.core.errors import InputError
from gristmill.core.progress import Progress
from gristmill.data.chat import conversation
from gristmill.data.chat_format import FORMATS
from gristmill.data.tokenizer import Tokenizer
from gristmill.engine.engine import Engine
from gristmill.generation.api import Request, SamplingParams
from gristmill.model.config import ModelConfig, uniform_blocks
from gristmill.model.hf import load_model
from gristmill.model.hf_save import save_model
from gristmill.model.transformer import Transformer
from gristmill.report.compression import write_page
from gristmill.report.summary import stage_line
from gristmill.runs.reader import read_run
from gristmill.workflows import train
from gristmill.workflows.compress.recipe import CompressionRecipe
from gristmill.workflows.compress.run import run as run_compression

QUIET = Progress(quiet=True)
# One that no answer meets, and one that every answer does.
NEVER = {"kind": "exact", "value": "zzzz"}
ALWAYS = {"kind": "instructions", "checks": [{"id": "length_constraints:number_words", "relation": "less than", "num_words": 1000}]}
# Costs that add up, so that nothing depends on the machine: of a fixed part, key-value heads and channels.
SECONDS = "lambda meter, engine, seed, clock: 20 + sum(3 * b.num_kv_heads + b.ffn_size / 16 for b in engine.model.config.blocks)"
KILLED = f"""
import json, os, signal, sys
from pathlib import Path
from gristmill.compress.costs import Meter
from gristmill.core import io
from gristmill.core.config import load
from gristmill.core.progress import Progress
from gristmill.runs.journal import Journal
from gristmill.train import checkpoint
from gristmill.workflows.compress import run
from gristmill.workflows.compress.recipe import CompressionRecipe

run.CHECKPOINT_SECONDS = 1e-9
Meter._seconds = {SECONDS}
folder, moments = Path(sys.argv[1]), json.loads(sys.argv[2])
append, save, replace = Journal.append, checkpoint.CheckpointStore.save, os.replace

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def start(name, count):
    def dying_append(journal, record):
        nonlocal count
        count -= name == journal.path.name
        if name == journal.path.name and count == 0:
            journal._file.write(json.dumps(record).encode()[:9])
            die()
        append(journal, record)

    def dying_save(store, state):
        nonlocal count
        count -= name == "save"
        if name == "save" and count == 0:
            os.rename = die
        save(store, state)

    def dying_replace(source, target):
        nonlocal count
        count -= name == "replace"
        die() if name == "replace" and count == 0 else replace(source, target)

    Journal.append, checkpoint.CheckpointStore.save, os.replace = dying_append, dying_save, dying_replace
    run.run(load(folder / "compress.yaml", CompressionRecipe), folder / "run", Progress(quiet=True))

for name, count in [*moments, ("", 0)]:
    pid = os.fork()
    if pid == 0:
        start(name, count)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""

COSTS = {"batch": 2, "prompt_tokens": 4, "output_tokens": 4, "repeats": 2, "precision": "fp32"}
POINT = "-batch2-prompt4-output4-fp32"  # in the folders' names


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    tokenizer = Tokenizer.train(["a b c"], 300, FORMATS["chatml"].special_tokens)
    config = ModelConfig("llama", tokenizer.vocab_size, 16, uniform_blocks(3, 2, 2, 8, 64), max_positions=128, init_std=0.3)
    folder = tmp_path_factory.mktemp("parent") / "base"
    save_model(Transformer(config), tokenizer, folder)
    return folder


@pytest.fixture(autouse=True)
def additive_costs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(Meter, "_seconds", eval(SECONDS))
    yield


def make(folder: Path, base: Path, **changes: Any) -> CompressionRecipe:
    folder.mkdir(exist_ok=True)
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"Say {word}."}) + "\n" for word in "abcdefgh"))
    held_out = [{"prompt": f"Sing {word}.", "truth": truth} for word, truth in (("a", NEVER), ("b", ALWAYS), ("c", NEVER))]
    (folder / "evaluation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out))
    values: dict[str, Any] = {
        "model": str(base),
        "data": {"prompts": str(folder / "prompts.jsonl"), "evaluation": str(folder / "evaluation.jsonl")},
        "threads": 1,
        "calibration": {"tokens": 2400, "block_tokens": 1200, "validation_tokens": 600, "max_tokens": 24},
        "space": {"widths": [0.5], "width_multiple": 16},
        "bld": {"steps": 3, "lr": 3e-3},
        "costs": COSTS,
        "target": {"speed": 1.3},
        "search": {"curve": [1.15, 1.3], "candidates": 2, "diversity": 0.7},
        "distillation": {"steps": 6, "batch_size": 8, "lr": 3e-3, "precision": "fp32"},
        **changes,
    }
    recipe = check(CompressionRecipe, values)
    (folder / "compress.yaml").write_text(dump(recipe))
    return recipe


def make_again(recipe: CompressionRecipe, **changes: Any) -> CompressionRecipe:
    return check(CompressionRecipe, {**recipe.model_dump(mode="json"), **changes})


def run(recipe: CompressionRecipe, folder: Path) -> dict[str, Any]:
    return run_compression(recipe, folder / "run", QUIET)


@pytest.fixture(scope="module")
def calm(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Meter, "_seconds", eval(SECONDS))
        folder = tmp_path_factory.mktemp("calm")
        run(make(folder, base), folder)
    return folder


def test_a_run_says_what_the_child_comes_to(calm: Path) -> None:
    data = read_run(calm / "run")
    assert data.results is not None
    found = data.results["compress"]
    assert found["speed"]["predicted"] == pytest.approx(found["speed"]["measured"]) and found["speed"]["measured"] >= 1.3
    assert 0 < found["kl"] < found["kl_before"], "distillation brings the child nearer"
    assert found["accuracy"]["parent"] == found["accuracy"]["child"] == 0.3333 and found["seconds"] > 0
    assert (found["accuracy"]["paired"]["mean"], found["accuracy"]["paired"]["n"]) == (0, 3)
    assert [s["name"] for s in data.stages] == [
        "text",
        f"costs{POINT}",
        "library",
        "scores",
        "parent",
        f"search-1.3x{POINT}",
        f"child-1.3x{POINT}",
        f"measured-1.3x{POINT}",
    ]
    for one in data.results["children"]:
        assert one["predicted"]["speed"] == pytest.approx(one["measured"]["median"])
        assert one["measured"]["median"] >= one["target"] - 1e-9
    assert 0 < data.stages[6]["kl_trained_on"] < found["kl_before"]
    assert "KL from the parent" in stage_line(data.stages[6]) and "parent's speed" in stage_line(data.stages[7])


def test_the_child_is_a_model_of_the_chosen_layers(calm: Path) -> None:
    data = read_run(calm / "run")
    assert data.results is not None
    child = load_model(calm / "run" / data.results["model"])[0]
    kept = [one for one in data.results["layers"] if one["kv_heads"] or one["ffn_size"]]
    blocks = [{"kv_heads": block.num_kv_heads, "ffn_size": block.ffn_size} for block in child.config.blocks]
    assert blocks == kept and sum(p.numel() for p in child.parameters()) == data.results["compress"]["parameters"]["child"]


def test_the_chosen_candidate_has_the_lowest_kl_and_the_search_the_lowest_score(calm: Path) -> None:
    data = read_run(calm / "run")
    search = data.stages[5]
    kinds = {kind: [one for one in search["children"] if one["search"] == kind] for kind in ("mip", "greedy", "random", "curve")}
    assert len(kinds["mip"]) == 2 and kinds["random"] and [one["target"] for one in kinds["curve"]] == [1.15]
    chosen = next(one for one in search["children"] if one["number"] == search["chosen"])
    assert chosen["kl"] == min(one["kl"] for one in kinds["mip"])
    assert all(kinds["mip"][0]["score"] <= one["score"] for one in [*kinds["greedy"], *kinds["random"]])


def test_the_page_holds_curve_layers_and_tables(calm: Path) -> None:
    page = write_page(read_run(calm / "run")).read_text()
    for words in (
        "measured speed, in the parent",
        "Layers of the child",
        "sum of scores",
        "normalised MSE",
        "Replace-1-block",
        "<polyline",
    ):
        assert words in page


def test_another_target_reuses_all_that_is_measured(calm: Path, base: Path, tmp_path: Path, snapshot: Any) -> None:
    before = {name: data for name, data in snapshot(calm / "run").items() if name[:2] <= "04"}
    shown = CliRunner().invoke(
        app, ["compress", str(calm / "compress.yaml"), "--out", str(calm / "run"), "--speed", "1.6", "--quiet", "--json"]
    )
    assert shown.exit_code == 0, shown.output
    out = json.loads(shown.stdout)
    assert (
        out["compress"]["target"]["speed"] == 1.6
        and out["compress"]["speed"]["measured"] >= 1.6
        and out["model"] == f"06-child-1.6x{POINT}/model"
    )
    after = {name: data for name, data in snapshot(calm / "run").items() if name[:2] <= "04"}
    assert after == before and (calm / f"run/06-child-1.3x{POINT}/model").is_dir()
    variant = next((calm / "run/02-library").glob("*.safetensors"))
    good = variant.read_bytes()
    variant.write_bytes(good[:-8])
    assert CliRunner().invoke(app, ["compress", str(calm / "compress.yaml"), "--out", str(calm / "run"), "--quiet"]).exit_code == 0
    assert variant.read_bytes() == good, "a damaged variant is made again"
    assert "finished" in CliRunner().invoke(app, ["status", str(calm / "run")]).stdout
    assert CliRunner().invoke(app, ["report", str(calm / "run")]).exit_code == 0


def test_another_operating_point_measures_anew_and_reuses_the_library(calm: Path, base: Path, tmp_path: Path, snapshot: Any) -> None:
    shutil.copytree(calm, tmp_path, dirs_exist_ok=True)
    before = snapshot(tmp_path / "run")
    run(make(tmp_path, base, costs=COSTS | {"batch": 3}, data=load(calm / "compress.yaml", CompressionRecipe).data), tmp_path)
    after, other = snapshot(tmp_path / "run"), POINT.replace("2", "3", 1)
    made = {name.split("/")[0] for name in after.keys() - before.keys()}
    assert made == {f"{name}{other}" for name in ("01-costs", "05-search-1.3x", "06-child-1.3x", "07-measured-1.3x")}
    assert all(after[name] == data for name, data in before.items() if "/" in name)
    page = write_page(read_run(tmp_path / "run")).read_text()
    assert all(f"{batch} in flight, prompts of 4 and answers of 4 tokens, fp32)" in page for batch in (2, 3))


def test_kills_change_no_weight_and_nothing_is_made_twice(calm: Path, base: Path, tmp_path: Path) -> None:
    """In every journal, between the files of variants and of the model, and while a checkpoint is saved."""
    moments = [("answers.jsonl", 5), ("costs.jsonl", 1), ("library.jsonl", 1), ("library.jsonl", 3), ("scores.jsonl", 7)]
    moments += [("evaluation.jsonl", 2), ("children.jsonl", 3), ("measured.jsonl", 2), ("save", 3), ("replace", 1), ("save", 2)]
    make(tmp_path, base)
    command = [sys.executable, "-c", KILLED, str(tmp_path), json.dumps(moments)]
    out = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)
    assert out.stdout.split() == ["-9"] * len(moments) + ["0"], out.stderr[-2000:]
    one, other = (load_file(folder / f"run/06-child-1.3x{POINT}/model/model.safetensors") for folder in (calm, tmp_path))
    assert all(torch.equal(one[name], other[name]) for name in one)
    for journal in (tmp_path / "run").glob("*/*.jsonl"):
        ids = [json.loads(line)["id"] for line in journal.read_text().splitlines()]
        assert len(ids) == len(set(ids)), journal


def test_a_child_whose_attention_is_gone_is_fused(base: Path, tmp_path: Path) -> None:
    """Of five layers four must lose their attention to be so fast; the MLPs of three of them become one."""
    model, tokenizer = load_model(base)
    config = replace(model.config, blocks=model.config.blocks[:1] * 5)
    save_model(Transformer(config), tokenizer, tmp_path / "deep")
    space = {"kv_heads": [], "widths": [], "no_mlp": False, "fixed_layers": [0]}
    distillation = {"steps": 2, "batch_size": 8, "lr": 1e-3, "precision": "fp32"}
    changes = {"space": space, "target": {"speed": 1.52}, "search": {"curve": [], "candidates": 1}, "distillation": distillation}
    out = run(make(tmp_path / "fused", tmp_path / "deep", fusion=True, fusion_limit=2, **changes), tmp_path / "fused")
    child = load_model(tmp_path / "fused/run" / out["model"])[0].config
    assert [(block.num_kv_heads, block.ffn_size) for block in child.blocks] == [(2, 64), (0, 192), (0, 64)]
    assert out["compress"]["kl"] < out["compress"]["kl_before"]
    (run_of,) = out["fusion"]["runs"]
    assert [run_of["layers"]] == out["fusion"]["fused"] and 0 < np.max(run_of["dependencies"]) < 2
    assert "Dependency matrix" in write_page(read_run(tmp_path / "fused/run")).read_text()


def test_layers_are_scored_by_the_accuracy_of_known_answers(calm: Path, base: Path, tmp_path: Path) -> None:
    """In a folder that was scored by KL. Truths are what the parent says; in bf16 it says some of it otherwise."""
    model, tokenizer = load_model(base)
    engine = Engine(model, tokenizer, FORMATS["chatml"], name="parent")
    texts = [f"Say {word}{number}." for number in range(5) for word in "abcdefgh"]
    sampling = SamplingParams(temperature=0.0, max_tokens=24)
    requests = [Request(text, conversation([{"role": "user", "content": text}]), sampling, 0) for text in texts]
    answers = {request.id: outs for request, outs in engine.generate(requests)}
    said = {text: answers[text][0].text for text in texts}
    known = [{"prompt": text, "truth": {"kind": "exact", "value": one}} for text, one in said.items() if len(one.splitlines()) == 1]
    recipe = make(tmp_path, base)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in known[:24]))
    by_kl = run(recipe, tmp_path)
    lines = (tmp_path / "run/03-scores/scores.jsonl").read_bytes()

    search = {**recipe.search.model_dump(), "metric": "accuracy"}
    out = run(make_again(recipe, search=search, target={"speed": 1.2}), tmp_path)
    scores = read_run(tmp_path / "run").stages[3]
    assert scores["task"]["num_prompts"] == 24 and scores["task"]["parent"] > 0.3
    assert (tmp_path / "run/03-scores/scores.jsonl").read_bytes().startswith(lines), "KL is not computed again"
    falls = [one["accuracy"] for one in scores["blocks"].values()]
    assert min(falls) <= 0 and max(falls) > 0.2 and all(0 <= one["stderr"] < 0.15 for one in scores["blocks"].values())
    children = out["children"]
    chosen = max((one for one in children if one["search"] == "mip"), key=lambda one: (one["accuracy"], -one["kl"]))
    assert out["layers"] == chosen["layers"] and all(0 <= one["accuracy"] <= 1 for one in children)
    page = write_page(read_run(tmp_path / "run")).read_text()
    assert "Change of greedy accuracy on 24 prompts, of which the parent has" in page
    again = run(recipe, tmp_path)
    assert all(again[key] == by_kl[key] for key in ("layers", "children", "model")), "what was found by KL stays"


def test_two_targets_learn_from_one_teacher_on_disk(calm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load(calm / "compress.yaml", CompressionRecipe)
    shutil.copytree(calm / "run", tmp_path / "run")
    for path in (tmp_path / "run").glob("0[5-7]-*"):
        shutil.rmtree(path)
    recipe = make_again(recipe, distillation={**recipe.distillation.model_dump(), "teacher_top_k": 8})
    found = run(recipe, tmp_path)["compress"]
    assert 0 < found["kl"] < found["kl_before"]
    (file,) = (tmp_path / "run/02-library/teacher").iterdir()
    assert file.stat().st_size % 64 == 0 and "cosine" not in (tmp_path / f"run/06-child-1.3x{POINT}/train/metrics.jsonl").read_text()
    monkeypatch.setattr(train, "_load_frozen", None)  # no teacher is loaded again
    assert run(recipe.with_speed(1.5), tmp_path)["compress"]["kl"] > 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"space": {"widths": [], "kv_heads": [], "no_attention": False, "no_mlp": False}}, "No layer of this model can change"),
        ({"costs": {"prompt_tokens": 100, "output_tokens": 100}}, "more than the model's context of 128"),
        ({"target": {"speed": 1.3, "parameters": 0.01}}, "target.parameters 0.01 is out of reach"),
        ({"distillation": {"teacher_top_k": 10_000}}, "teacher_top_k 10000 is more than the"),
        ({"search": {"metric": "accuracy"}}, "needs prompts .* whose answers are known.* at least 20, and there are 0"),
    ],
)
def test_bad_input_is_told_before_work(base: Path, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        run(make(tmp_path, base, **changes), tmp_path)
    assert not (tmp_path / "run").exists()


def test_corrected_truths_are_not_compared_with_verdicts_by_the_old_ones(calm: Path, base: Path, tmp_path: Path) -> None:
    recipe = make(tmp_path, base)
    shutil.copytree(calm / "run", tmp_path / "run")
    (tmp_path / "run/recipe.yaml").write_text(dump(recipe))
    for path in (tmp_path / "run").glob("07-*"):
        shutil.rmtree(path)
    rows = (tmp_path / "evaluation.jsonl").read_text()
    (tmp_path / "evaluation.jsonl").write_text(rows.replace("zzzz", "yyyy"))
    with pytest.raises(InputError, match="04-parent was made from other inputs"):
        run(recipe, tmp_path)


def test_a_prompt_of_the_evaluation_is_refused(base: Path, tmp_path: Path) -> None:
    recipe = make(tmp_path, base)
    with (tmp_path / "prompts.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "Sing b."}) + "\n")
    with pytest.raises(InputError, match="Sing b.* is asked by the evaluation too"):
        run(recipe, tmp_path)


def test_a_text_that_is_too_short_is_refused(base: Path, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text/one.txt").write_text("a b c " * 20)
    with pytest.raises(
        InputError, match="calibration text is too short: 81 tokens of 1 prompts or documents. .* at least 2,000 tokens of 4"
    ):
        run(make(tmp_path, base, data={"documents": str(tmp_path / "text")}), tmp_path)
    assert not (tmp_path / "run").exists()


def test_documents_are_a_text_too_and_a_target_out_of_reach_is_said(base: Path, tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"{i} a b c " * 9}) + "\n" for i in range(60)))
    recipe = make(tmp_path, base, data={"documents": str(tmp_path / "text.jsonl")}, target={"speed": 9.0}, bld={"steps": 0})
    with pytest.raises(InputError, match="A speed of 9.00x is out of reach: the search space ends at"):
        run(recipe, tmp_path)
    assert not list((tmp_path / "run").glob("*-library")), "before anything is trained"
    out = run(recipe.with_speed(1.2), tmp_path)["compress"]
    assert out["accuracy"] is None and out["speed"]["measured"] >= 1.2


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model": "x"}, "give prompts or documents"),
        ({"model": "x", "world": "miniature", "data": {"documents": "d"}}, "a world supplies"),
        ({"model": "x", "world": "miniature", "target": {"speed": 0.5}}, "target.speed"),
        ({"model": "x", "world": "miniature", "search": {"curve": [0]}}, "search.curve"),
        ({"model": "x", "world": "miniature", "distillation": {"lora": {}}}, "leave lora out"),
        ({"model": "x", "world": "miniature", "distillation": {"loss": "cosine+kl", "teacher_top_k": 8}}, "not its states"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        check(CompressionRecipe, values)
