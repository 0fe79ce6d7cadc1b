"""The command line: a frozen surface, help that answers at once, and bad input that ends in one sentence and exit code 2."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

import gristmill
from gristmill.cli.app import GROUPS
from gristmill.cli.main import app
from gristmill.miniature.base import BASE

# Every command with its arguments and options. A change here is a change of what users type: think twice, then edit.
SURFACE = {
    "run": (
        "RECIPE --out -o --model --control --seed --rounds --threads --device --tp --cp --pp --vp --pp-schedule --redo "
        "--dry-run --unsafe-code --quiet -q --json"
    ),
    "status": "FOLDER --json",
    "report": "FOLDER --json",
    "check": "FOLDER --approve --stop --reject --again --json",
    "answers": "FOLDER --prompt --sampled --json",
    "compare": "FOLDERS --out -o --json",
    "pretrain": "RECIPE --out -o --model --tokens --tp --cp --pp --vp --pp-schedule --device --quiet -q --json",
    "plan": "MODEL --gpus --tp --pp --vp --pp-schedule --cp --dp --batch-size --micro-batch --seq-len --precision --recompute --zero "
    "--lora-rank --lora-base --lora-targets --dora --gpu --search "
    "--top --tokens --documents --nodes --cores --document-bytes --out -o --published --calibrate --json",
    "train": (
        "KIND --model --data --out -o --lr --epochs --batch-size --beta --eta --sft-weight --taxonomy --max-fpr --teacher "
        "--distill-loss --teacher-top-k --precision --micro-batch-tokens --checkpoint-activations --compile --tp --cp --pp --vp "
        "--pp-schedule --lora-rank --lora-alpha --lora-targets "
        "--lora-base --lora-b-lr-ratio --rslora --dora --device --format --seed --quiet -q --json"
    ),
    "merge": "ADAPTER --out -o --base --dtype --rows --json",
    "generate": "MODEL PROMPT --prompts --out -o --n --temperature --top-p --top-k --max-tokens --dtype --quantize --head "
    "--step-tokens --speculative-config --device --format --seed --json",
    "score": "MODEL --data --dtype --device --format --json",
    "eval": (
        "MODEL --tasks --data --endpoint --endpoint-model --endpoint-key-env --num-fewshot --limit --subsets --chat --contamination "
        "--prompts --max-tokens --thinking --max-thinking-tokens --dtype --quantize --head --cache --device --format --seed --greedy "
        "--out -o --against --unsafe-code "
        "--quiet -q --json"
    ),
    "safety": (
        "MODEL --endpoint --endpoint-model --endpoint-key-env --data --sets --attacks --guard --guard-model --guard-key-env "
        "--guard-logprobs --taxonomy --caution --system --limit --max-tokens --temperature --concurrency --retry-failed --canaries "
        "--n --import-garak --out -o --dtype --device --format --seed --quiet -q --json"
    ),
    "judge": (
        "KIND --data MODEL --judge --judge-model --judge-key-env --endpoint --endpoint-model --endpoint-key-env --baseline "
        "--references --reward --llm --weights --explain --greedy --max-tokens --judge-tokens --limit --concurrency --retry-failed "
        "--out -o --dtype --device --format --seed --quiet -q --json"
    ),
    "quantize": "MODEL --out -o --to --group --dtype --text --json",
    "export": "MODEL --out -o --to --json",
    "add-chat-tokens": "MODEL --out -o --to --json",
    "chat": "MODEL --system --history --temperature --top-p --max-tokens --thinking --max-thinking-tokens --dtype --quantize --head "
    "--device --format --seed",
    "claims": "RECIPE --out -o --seeds --only --jobs --redo --list --unsafe-code --quiet -q --json",
    "init": "--out -o --model --demonstrations --ratings --prompts --evaluation --format --add-chat-tokens --validation --teacher "
    "--teacher-model --teacher-key-env --name --force --no-force",
    "serve": "MODEL --reward --host --port --name --api-key-env --api-key-file --max-open-samples --timeout --reasoning-parser "
    "--tool-call-parser --enable-auto-tool-choice "
    "--max-batch --cache-tokens --step-tokens --speculative-config --enable-lora --lora-modules --max-loras --max-lora-rank "
    "--lora-folder --dtype --quantize --head --cache --device --format",
    "rl": "RECIPE --out -o --model --prompts --reward-model --seed --steps --threads --device --unsafe-code --quiet -q --json",
    "compress": "RECIPE --out -o --model --speed --seed --threads --device --unsafe-code --quiet -q --json",
    "studio": "FOLDER --port --host --url --database --guard --guard-model --guard-key-env --export",
    "synth": "RECIPE --out -o --dry-run --limit --retry-failed --device --unsafe-code --quiet -q --json",
    "curate": "RECIPE --input -i --out -o --workers --executor --explain --quiet -q --json",
    "blend": "RECIPE --out -o --workers --quiet -q --json",
    "quality": "KIND --positive --out -o --negative --json",
    "rows": "ACTION NAME --folder --json",
}
PRINTS_NO_RESULT = {"chat", "init", "serve", "studio"}  # a conversation, a file, and servers
HEAVY = ("torch", "numpy", "pyarrow", "matplotlib", "tensorboard", "transformers", "tokenizers", "safetensors", "rich.progress", "yaml")
IMPORT_SECONDS = 0.8  # of the processor; torch alone takes more

# Typer's command objects; their classes are click's or Typer's own copy of them, by version.
COMMANDS: dict[str, Any] = vars(typer.main.get_command(app))["commands"]


def names_of(command: Any) -> list[str]:
    names: list[str] = []
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            names.append(str(parameter.name).upper())
        else:
            names += [*parameter.opts, *parameter.secondary_opts]
    return names


def example_of(command: Any) -> str:
    return str(command.epilog).removeprefix("Example: ")


def complaint(*args: str) -> str:
    """The one sentence that bad input ends with."""
    result = CliRunner().invoke(app, list(args))
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("gristmill: ") and lines[0].endswith((".", "?")), lines
    return lines[0]


def python(code: str, **environment: str) -> str:
    """What a fresh interpreter prints."""
    source = str(Path(gristmill.__file__).parent.parent)
    env = {**os.environ, "PYTHONPATH": source, **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True, timeout=60).stdout


def test_surface_is_frozen() -> None:
    assert {name: names_of(command) for name, command in COMMANDS.items()} == {name: text.split() for name, text in SURFACE.items()}


def test_every_command_that_prints_results_can_print_json() -> None:
    assert {name for name, command in COMMANDS.items() if "--json" not in names_of(command)} == PRINTS_NO_RESULT


@pytest.mark.parametrize("name", SURFACE)
def test_help_ends_with_an_example(name: str) -> None:
    result = CliRunner().invoke(app, [name, "--help"])
    assert result.exit_code == 0
    assert " ".join(result.stdout.split()).endswith(f"Example: {' '.join(example_of(COMMANDS[name]).split())}")


@pytest.mark.parametrize("name", SURFACE)
def test_the_example_is_a_command_line_of_that_command(name: str) -> None:
    program, command, *rest = shlex.split(example_of(COMMANDS[name]))
    assert (program, command) == ("gristmill", name)
    COMMANDS[name].make_context(name, rest)


@pytest.mark.parametrize("name", SURFACE)
def test_every_parameter_is_explained(name: str) -> None:
    for parameter in COMMANDS[name].params:
        assert getattr(parameter, "help", None), f"{name} {parameter.name}"


def test_help_lists_every_command() -> None:
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    words = [line.split()[0] for line in result.stdout.splitlines() if line.startswith("  ") and line[2] != " "]
    assert [word for word in words if word in SURFACE] == [name for names in GROUPS.values() for name in names]
    assert {name for names in GROUPS.values() for name in names} == set(SURFACE)


def test_help_cuts_no_line() -> None:
    shown = "".join(CliRunner().invoke(app, ["--help"]).stdout.split())
    for name, command in COMMANDS.items():
        assert name + "".join(command.get_short_help_str(limit=400).split()) in shown


def test_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout.strip()) == (0, gristmill.__version__)


def test_help_needs_no_heavy_import() -> None:
    code = f"""
import sys
from typer.testing import CliRunner
from gristmill.cli.main import app
assert CliRunner().invoke(app, ["--help"]).exit_code == 0
assert CliRunner().invoke(app, ["run", "--help"]).exit_code == 0
print([name for name in {HEAVY} if name in sys.modules])
"""
    assert python(code).strip() == "[]"


def test_help_answers_at_once() -> None:
    code = "import time; started = time.process_time(); import gristmill.cli.main; print(time.process_time() - started)"
    assert min(float(python(code)) for _ in range(3)) < IMPORT_SECONDS


def test_a_real_process() -> None:
    source = str(Path(gristmill.__file__).parent.parent)
    env = {**os.environ, "PYTHONPATH": source, "COLUMNS": "200"}
    command = [sys.executable, "-m", "gristmill.cli"]
    shown = subprocess.run([*command, "--help"], env=env, capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0 and "miniature" not in shown.stderr and "Whole runs:" in shown.stdout
    refused = subprocess.run([*command, "run", "miniatur"], env=env, capture_output=True, text=True, timeout=60)
    assert refused.returncode == 2 and refused.stdout == ""
    assert refused.stderr.startswith("gristmill: ") and refused.stderr.count("\n") == 1


def test_an_unknown_recipe_lists_the_shipped_ones() -> None:
    assert "miniature" in complaint("run", "miniatur")


def test_a_recipe_with_an_unknown_key(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("world: miniature\nround: 3\n")
    assert "'rounds'" in complaint("run", str(path))
    assert not (tmp_path / "runs").exists()


def test_an_unknown_control() -> None:
    assert "human-only" in complaint("run", "miniature", "--control", "unfilterd")


def test_a_recipe_whose_files_are_missing(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("data: {demonstrations: none.jsonl, evaluation: none.jsonl}\n")
    out = tmp_path / "run"
    assert "none.jsonl" in complaint("run", str(path), "--out", str(out), "--quiet")
    assert not out.exists()


def test_a_folder_that_is_no_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    assert str(tmp_path) in complaint("run", "miniature", "--out", str(tmp_path), "--quiet", "--unsafe-code")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("thesis.txt", "precious")]


@pytest.mark.parametrize("name", ["status", "report", "compare"])
def test_a_run_folder_that_is_not_there(name: str, tmp_path: Path) -> None:
    assert "none" in complaint(name, str(tmp_path / "none"))


@pytest.mark.parametrize(
    "args",
    [
        ["generate", "none", "a prompt"],
        ["score", "none", "--data", "none.jsonl"],
        ["eval", "none"],
        ["chat", "none"],
        ["train", "sft", "--model", "none", "--data", "none.jsonl", "--out", "out"],
    ],
)
def test_a_model_folder_that_is_not_there(args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "none" in complaint(*args)
    assert not list(tmp_path.iterdir())


def test_benchmarks_are_listed() -> None:
    found = CliRunner().invoke(app, ["eval", "tasks", "--json"])
    rows = {row["task"]: row for row in json.loads(found.stdout)}
    assert rows["mmlu"]["n"] == 14042 and rows["mmlu"]["files"] == ["mmlu/test.parquet", "mmlu/dev.parquet"]
    assert rows["mbpp"]["licence"] == "CC-BY-4.0" and rows["truthfulqa"]["tasks"] == ["truthfulqa_mc1", "truthfulqa_mc2"]
    assert "wants gsm8k/test.parquet" in CliRunner().invoke(app, ["eval", "tasks"]).stdout


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["eval"], "Give a model folder"),
        (["eval", "m", "--tasks", "mmlu"], "--data"),
        (["eval", "--tasks", "mmlu", "--data", "."], "either a model folder, or --endpoint"),
        (["eval", "--endpoint", "http://127.0.0.1:1/v1", "--tasks", "mmlu", "--data", "."], "--endpoint-model"),
        (["eval", "none", "--tasks", "mmlu", "--data", "."], "none/config.json does not exist"),
        (["eval", str(BASE), "--tasks", "mmlx", "--data", "."], "no task 'mmlx'"),
    ],
)
def test_benchmarks_that_cannot_be_run(args: list[str], said: str) -> None:
    assert said in complaint(*args)


@pytest.mark.parametrize("args", [["generate", "m"], ["generate", "m", "a prompt", "--prompts", "p.jsonl"]])
def test_generate_takes_a_prompt_or_a_file(args: list[str]) -> None:
    assert "prompt" in complaint(*args)


def test_generate_says_how_many_drafted_tokens_were_accepted() -> None:
    asked = ["generate", str(BASE), "one two one two one two", "--max-tokens", "40"]
    plain = CliRunner().invoke(app, asked)
    found = CliRunner().invoke(app, [*asked, "--speculative-config", "ngram", "--step-tokens", "20", "--dtype", "fp32"])
    assert found.exit_code == plain.exit_code == 0 and found.stdout == plain.stdout
    assert re.fullmatch(r"drafts: [\d,]+ of [\d,]+ tokens accepted( \(\d+%\))?\n", found.stderr)
    assert "drafts" not in plain.stderr


@pytest.mark.parametrize(("option", "value", "words"), [("--step-tokens", "0", "at least 1 token"), ("--speculative-config", "x", "JSON")])
def test_step_tokens_and_drafts_are_refused_before_a_model_is_read(option: str, value: str, words: str) -> None:
    for command in (["generate", "m", "a prompt"], ["serve", "m"]):
        assert words in complaint(*command, option, value)


def test_pretraining_refuses_an_unknown_key(tmp_path: Path) -> None:
    path = tmp_path / "base.yaml"
    path.write_text("world: miniature\ntoken: 5\n")
    assert "'tokens'" in complaint("pretrain", str(path), "--out", str(tmp_path / "out"), "--quiet")


def test_training_refuses_a_wrong_value(tmp_path: Path) -> None:
    args = ["train", "dpo", "--model", "m", "--data", "d.jsonl", "--out", str(tmp_path / "out"), "--beta", "-1"]
    assert "beta" in complaint(*args)


def test_init_refuses_a_missing_file(tmp_path: Path) -> None:
    out = tmp_path / "mine.yaml"
    files = [word for kind in ("demonstrations", "ratings", "evaluation") for word in (f"--{kind}", str(tmp_path / "none.jsonl"))]
    assert "none.jsonl" in complaint("init", *files, "--out", str(out))
    assert not out.exists()


def test_status_of_a_run_that_has_just_begun(tmp_path: Path) -> None:
    from gristmill.core.config import check, dump
    from gristmill.workflows.alignment.recipe import AlignmentRecipe

    (tmp_path / "recipe.yaml").write_text(dump(check(AlignmentRecipe, {"world": "miniature"})))
    result = CliRunner().invoke(app, ["status", str(tmp_path), "--json"])
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer["finished"] is False and answer["stages"] == []
