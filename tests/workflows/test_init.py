"""`gristmill init`: files are checked before anything is written, and the recipe explains itself."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from gristmill.cli.main import app
from gristmill.core.config import Section, check, load
from gristmill.core.errors import InputError
from gristmill.data.chat_format import FORMATS
from gristmill.data.rows import Response, read_rows
from gristmill.data.tokenizer import Tokenizer
from gristmill.miniature.base import BASE
from gristmill.model.config import ModelConfig, uniform_blocks
from gristmill.model.flops import num_parameters
from gristmill.model.hf_config import read_config
from gristmill.model.hf_save import save_model
from gristmill.model.transformer import Transformer
from gristmill.train.by_size import fill
from gristmill.workflows.alignment.context import STAGE_KINDS
from gristmill.workflows.alignment.recipe import AlignmentRecipe
from gristmill.workflows.init import render, write_recipe

RATED = {"helpfulness": 3, "correctness": 3, "coherence": 4, "complexity": 1, "verbosity": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random decoder with a tokenizer that splits text into bytes."""
    tokenizer = Tokenizer.train(["a b c"], 300, FORMATS["chatml"].special_tokens)
    blocks = uniform_blocks(num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, ffn_size=32)
    decoder = Transformer(ModelConfig("nemotron", tokenizer.vocab_size, 16, blocks, max_positions=256))
    decoder.init_weights(0)
    folder = tmp_path_factory.mktemp("base") / "llama"
    save_model(decoder, tokenizer, folder)
    return folder


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    rows: dict[str, list[dict[str, object]]] = {
        "demonstrations": [{"prompt": f"What is {i}?", "response": "x" * i} for i in range(1, 41)],
        "ratings": [{"prompt": f"Rate {i}", "response": "yes", **RATED} for i in range(4)],
        "prompts": [{"prompt": f"Ask {i}"} for i in range(4)],
        "evaluation": [{"prompt": f"Test {i}", "answer": i} for i in range(4)],
    }
    out = {}
    for kind, records in rows.items():
        out[kind] = tmp_path / f"{kind}.jsonl"
        out[kind].write_text("".join(json.dumps(r) + "\n" for r in records))
    return out


def test_without_files_it_is_the_miniature_world_with_every_default(tmp_path: Path) -> None:
    out = tmp_path / "new" / "recipe.yaml"
    assert write_recipe(out, "mine", "miniature", {}) == out
    assert load(out, AlignmentRecipe) == check(AlignmentRecipe, {"name": "mine", "world": "miniature"})


def test_every_key_is_there_and_taking_all_the_hashes_away_changes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "recipe.yaml"
    write_recipe(out, "mine", "miniature", {})
    bare = re.sub(r"^( *)#(?! )( *\w+:)", r"\1\2", out.read_text(), flags=re.M)
    bare = re.sub(r"^#(  \w+:)", r"\1", bare, flags=re.M)
    values = yaml.safe_load(bare)
    assert set(values) == set(AlignmentRecipe.model_fields)
    for name, field in AlignmentRecipe.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section) and name != "pipelines":  # those named only
            assert set(values[name]) == set(field.annotation.model_fields), name
    written = load(out, AlignmentRecipe)
    for name in [name for name in values["pipelines"] if getattr(written.pipelines, name) is None]:
        del values["pipelines"][name]  # a pipeline behind a hash is off
    size = num_parameters(read_config(BASE)[1])
    cpu = torch.device("cpu")
    filled = {name: fill(getattr(written, name), kind, size, device=cpu, precision="auto") for name, kind in STAGE_KINDS.items()}
    assert check(AlignmentRecipe, values) == written.model_copy(update=filled)


def test_training_stands_there_as_the_size_of_the_model_has_it(tmp_path: Path, files: dict[str, Path], model: Path) -> None:
    out = tmp_path / "recipe.yaml"
    write_recipe(out, "mine", str(model), files)
    text = out.read_text()
    section = text[text.index("#demonstration_sft:") : text.index("#reward:")]
    assert "#  lr: 0.001 " in section and "#  epochs: 15.0 " in section and "#  batch_size: 8 " in section  # of 48 rows
    assert load(out, AlignmentRecipe).demonstration_sft.lr is None


def test_defaults_stand_behind_a_hash_with_their_meaning(tmp_path: Path) -> None:
    out = tmp_path / "recipe.yaml"
    write_recipe(out, "mine", "miniature", {})
    lines = out.read_text().splitlines()
    assert "#  num_evaluation: null  # held-out prompts a task; default all of the file" in lines
    assert "#control: null  # one of unfiltered, random-filter, reward-only, human-only, replace" in lines
    assert "#  code_share: 0.02  # share of code-SFT answers repeated in general SFT; at most 1" in lines
    assert "  loss: rpo  # one of dpo, cdpo, ipo, rpo, rpo_bwd_kl, rpo_fwd_kl, rpo_sq" in lines


def test_a_value_of_several_lines_stays_one_value() -> None:
    values = {"name": "mine", "data": {"demonstrations": "da\nta # .jsonl", "ratings": "x: y.jsonl"}}
    assert yaml.safe_load("\n".join(render(values, {})))["data"]["demonstrations"] == "da\nta # .jsonl"


def test_own_files_and_model(tmp_path: Path, files: dict[str, Path], model: Path) -> None:
    out = tmp_path / "recipe.yaml"
    write_recipe(out, "mine", str(model), files)
    loaded = load(out, AlignmentRecipe)
    assert loaded.world is None and loaded.model == str(model.resolve())
    assert {k: getattr(loaded.data, k) for k in files} == {k: p.resolve() for k, p in files.items()}
    assert yaml.safe_load(out.read_text())["data"]["ratings"] == "ratings.jsonl"  # the folder can be moved as a whole


def test_token_limits_hold_the_demonstrations(tmp_path: Path, files: dict[str, Path], model: Path) -> None:
    out = tmp_path / "recipe.yaml"
    write_recipe(out, "mine", str(model), files)
    loaded = load(out, AlignmentRecipe)
    assert loaded.answers.max_tokens == 48  # 40 bytes and the end of turn, in steps of 16
    assert loaded.pipelines.by_task and loaded.pipelines.by_task.max_tokens == 16
    long = [{"prompt": "p", "response": "y" * n} for n in (10, 230)]
    files["demonstrations"].write_text("".join(json.dumps(r) + "\n" for r in long))
    write_recipe(out, "mine", str(model), files, force=True)
    assert load(out, AlignmentRecipe).answers.max_tokens == 128  # never more than half of what the model can hold


def test_a_folder_that_is_called_miniature_is_not_the_shipped_model(tmp_path: Path, model: Path) -> None:
    (tmp_path / "miniature").symlink_to(model)
    save = tmp_path / "recipe.yaml"
    write_recipe(save, "mine", str(tmp_path / "miniature"), {})
    assert load(save, AlignmentRecipe).model != "miniature"


def test_an_existing_recipe_is_kept_unless_forced(tmp_path: Path) -> None:
    out = tmp_path / "recipe.yaml"
    out.write_text("precious")
    with pytest.raises(InputError, match="--force"):
        write_recipe(out, "mine", "miniature", {})
    assert out.read_text() == "precious"
    write_recipe(out, "mine", "miniature", {}, force=True)
    assert load(out, AlignmentRecipe).name == "mine"


@pytest.mark.parametrize("kind", ["demonstrations", "ratings", "evaluation"])
def test_files_that_a_run_needs(tmp_path: Path, files: dict[str, Path], model: Path, kind: str) -> None:
    del files[kind]
    if kind == "ratings":  # known answers to prompts would do instead
        files.pop("prompts", None)
    with pytest.raises(InputError, match=f"--{kind}"):
        write_recipe(tmp_path / "recipe.yaml", "mine", str(model), files)


def test_a_missing_file_is_named_before_anything_else(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing.jsonl"):
        write_recipe(tmp_path / "recipe.yaml", "mine", "none", {"demonstrations": tmp_path / "nothing.jsonl"})


@pytest.mark.parametrize("kind", ["demonstrations", "ratings", "prompts"])
def test_a_row_that_asks_what_the_evaluation_asks_is_named(tmp_path: Path, files: dict[str, Path], model: Path, kind: str) -> None:
    row = {"prompt": "  TEST   2", **({} if kind == "prompts" else {"response": "two", **RATED})}
    with files[kind].open("a") as file:
        file.write(json.dumps(row) + "\n")
    number = len(files[kind].read_text().splitlines())
    with pytest.raises(InputError, match=f"Row {number} of .*{kind}.jsonl"):
        write_recipe(tmp_path / "recipe.yaml", "mine", str(model), files)
    assert not (tmp_path / "recipe.yaml").exists()


@pytest.mark.parametrize(
    ("kind", "row", "words"),
    [
        ("demonstrations", {"messages": [{"role": "assistant", "content": "hi"}]}, "Row 41"),
        ("ratings", {"prompt": "p", "response": "r"}, "Row 5"),
        ("evaluation", {"prompt": "p"}, "Row 5"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, files: dict[str, Path], model: Path, kind: str, row: dict[str, object], words: str) -> None:
    with files[kind].open("a") as file:
        file.write(json.dumps(row) + "\n")
    with pytest.raises(InputError, match=words):
        write_recipe(tmp_path / "recipe.yaml", "mine", str(model), files)


def test_a_model_that_does_not_load(tmp_path: Path, files: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="nowhere"):
        write_recipe(tmp_path / "recipe.yaml", "mine", str(tmp_path / "nowhere"), files)
    with pytest.raises(InputError, match="nowhere"):
        write_recipe(tmp_path / "recipe.yaml", "mine", str(tmp_path / "nowhere"), {})


def test_demonstrations_that_are_all_too_long(tmp_path: Path, files: dict[str, Path], model: Path) -> None:
    files["demonstrations"].write_text(json.dumps({"prompt": "p", "response": "y" * 300}) + "\n")
    with pytest.raises(InputError, match="256 tokens"):
        write_recipe(tmp_path / "recipe.yaml", "mine", str(model), files)


def test_a_name_that_is_no_folder_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="name"):
        write_recipe(tmp_path / "recipe.yaml", "a/b", "miniature", {})
    assert not list(tmp_path.iterdir())


def test_a_base_without_chat_tokens_gets_them_or_the_plain_format(
    tmp_path: Path, files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = Tokenizer.train(["a b c"], 300, [])
    blocks = uniform_blocks(num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, ffn_size=32)
    save_model(Transformer(ModelConfig("nemotron", tokenizer.vocab_size, 16, blocks, max_positions=256)), tokenizer, tmp_path / "base")
    out = tmp_path / "recipe.yaml"
    with pytest.raises(InputError, match=r"`plain`.*--add-chat-tokens"):
        write_recipe(out, "mine", str(tmp_path / "base"), files)
    assert not out.exists()
    write_recipe(out, "mine", str(tmp_path / "base"), files, chat_format="plain")
    assert yaml.safe_load(out.read_text())["chat_format"] == "plain" and "chat format: plain" in capsys.readouterr().err
    with pytest.raises(InputError, match="does not exist"):
        write_recipe(out, "mine", str(tmp_path / "base"), files | {"prompts": tmp_path / "none"}, True, add_chat_tokens="chatml")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["base"], "nothing is written before files are checked"
    write_recipe(out, "mine", str(tmp_path / "base"), files, True, add_chat_tokens="chatml")
    assert yaml.safe_load(out.read_text())["model"] == "recipe-chatml-base" and "chat format: chatml" in capsys.readouterr().err
    assert Tokenizer.load(tmp_path / "recipe-chatml-base").has("<|im_end|>")
    load(out, AlignmentRecipe)


# ---- a teacher ----


@pytest.fixture(scope="module")
def served(tiny_base: Path) -> Iterator[str]:
    """Base URL of the server process with the tiny model."""
    command = [sys.executable, "-m", "gristmill.cli", "serve", str(tiny_base), "--port", "0", "--name", "tiny"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    yield process.stdout.readline().split()[-1]
    process.terminate()
    process.wait(20)


def test_an_endpoint_writes_for_a_model(served: str, tmp_path: Path, files: dict[str, Path], model: Path) -> None:
    out = tmp_path / "recipe.yaml"
    shown = CliRunner().invoke(
        app,
        ["init", "--model", str(model), "--teacher", served, "--out", str(out)]
        + [word for kind, path in files.items() for word in (f"--{kind}", str(path))],
    )
    assert shown.exit_code == 0, shown.output
    (generator,) = load(out, AlignmentRecipe).generators
    assert (generator.base_url, generator.model, generator.rounds) == (served, "tiny", ())
    steps = {"lr": 1e-5, "steps": 1, "batch_size": 2}
    small: dict[str, Any] = {
        "rounds": 1,
        "rpo_iterations": 0,
        "threads": 1,
        "answers": {"samples": 1, "max_tokens": 8},
        "collapse": {"tokens": 300, "stop": 9},
    }
    small |= {name: steps for name in ("demonstration_sft", "reward", "code_sft", "general_sft", "dpo")}
    small |= {"pipelines": {"by_task": {"prompts": 2, "max_tokens": 8}}, "judging": {"keep": "correctness >= -99"}}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump({**yaml.safe_load(out.read_text()), **small}))
    done = CliRunner().invoke(app, ["run", str(tmp_path / "small.yaml"), "--out", str(tmp_path / "run"), "--quiet"])
    assert done.exit_code in (0, 4), done.output
    (answers,) = (tmp_path / "run").glob("*-r1-answers/responses.parquet")
    assert {r.generator for r in read_rows(answers, Response)} == {"tiny"}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"base_url": "SERVED", "model": "other"}, "does not serve 'other': it serves tiny"),
        ({"base_url": "http://127.0.0.1:9/v1"}, "does not say which models it serves"),
        ({"base_url": "SERVED/nowhere"}, "does not say which models it serves"),
        ({"base_url": "file:///etc/passwd"}, "is not the base URL"),
    ],
)
def test_a_teacher_that_cannot_be_asked(given: dict[str, str], words: str, served: str, tmp_path: Path) -> None:
    teacher = given | {"base_url": given["base_url"].replace("SERVED", served)}
    with pytest.raises(InputError, match=words):
        write_recipe(tmp_path / "recipe.yaml", "mine", "miniature", {}, teacher=teacher)
    assert not (tmp_path / "recipe.yaml").exists()
