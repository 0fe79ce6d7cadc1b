"""A run on a user's own files: it turns without a world, and what cannot work is refused in one sentence before any work is done."""

import inspect
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from gristmill.cli.main import app
from gristmill.core.config import Section, load
from gristmill.data.rows import Demonstration, Pair, Prompt, Response, read_rows
from gristmill.generation.settings import Calls
from gristmill.runs.reader import read_run
from gristmill.synth.templates import TemplatePack
from gristmill.train.objectives.preference import PreferenceObjective
from gristmill.train.settings import PreferenceTraining, Training
from gristmill.train.trainer import TrainSettings
from gristmill.workflows.alignment.recipe import AlignmentRecipe
from gristmill.workflows.alignment.source import FileSource

Snapshot = Callable[[Path], dict[str, bytes]]
DONE = (0, 4)  # with alarms: a random model may make no pair in a stage
RATED = {"helpfulness": 3, "correctness": 4, "coherence": 4, "complexity": 1, "verbosity": 2}
STEPS = {"lr": 1e-4, "steps": 2, "batch_size": 4}
RECIPE: dict[str, Any] = {
    "name": "own",
    "rounds": 1,
    "rpo_iterations": 1,
    "threads": 1,
    "pipelines": {"by_task": {"prompts": 6, "max_tokens": 24}},
    "answers": {"samples": 3, "max_tokens": 12},
    "judging": {"keep": "correctness >= -99", "min_gap": 0},
    "collapse": {"tokens": 300, "stop": 9},
    "demonstration_sft": STEPS,
    "reward": STEPS,
    "code_sft": STEPS,
    "general_sft": STEPS,
    "dpo": STEPS | {"num_prompts": 6, "keep_chosen": "correctness >= -99"},
    "rpo": STEPS | {"num_prompts": 6, "keep_chosen": "correctness >= -99", "loss": "rpo"},
}
FILES: dict[str, list[dict[str, Any]]] = {
    "demonstrations": [{"prompt": f"Say {i}.", "response": f"It is {i}."} for i in range(10)],
    "ratings": [{"prompt": f"Tell {i // 2}.", "response": f"Word {i}.", **RATED, "helpfulness": 4 * (i % 2)} for i in range(24)],
    "prompts": [{"prompt": f"Add {i} and 1.", "answer": i + 1} for i in range(4)] + [{"prompt": f"Why {i}?"} for i in range(6)],
    "evaluation": [{"prompt": f"Ask {i}?", "answer": i, "task": "ask"} for i in range(4)],
}


def write(folder: Path, base: Path, files: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A recipe and its files. A file that is None is left out; one that is text is written as it is."""
    data = {}
    for kind, rows in {**FILES, **(files or {})}.items():
        if rows is not None:
            data[kind] = f"{kind}.jsonl"
            (folder / data[kind]).write_text(rows if isinstance(rows, str) else "".join(json.dumps(r) + "\n" for r in rows))
    recipe = folder / "own.yaml"
    recipe.write_text(yaml.safe_dump({**RECIPE, "model": str(base), "data": data, **changes}))
    return recipe


def start(recipe: Path, out: Path) -> Any:
    return CliRunner().invoke(app, ["run", str(recipe), "--out", str(out), "--quiet"])


def refusal(recipe: Path, out: Path) -> str:
    """The one sentence that a run is refused with; the folder holds no work."""
    result = start(recipe, out)
    assert result.exit_code == 2, result.output + repr(result.exception)
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("gristmill: ") and result.stdout == ""
    assert not list(out.glob("*/done.json")) and not list(out.glob("0[1-9]-*"))
    return lines[0]


# ---- what works ----


def test_every_stage_runs_on_files(tmp_path: Path, random_base: Path) -> None:
    out = tmp_path / "run"
    result = start(write(tmp_path, random_base), out)
    assert result.exit_code in DONE, result.output + repr(result.exception)
    stages = [s["name"] for s in json.loads((out / "results.json").read_text())["stages"]]
    assert stages[:2] == ["base", "demonstrations"] and "r1-general-sft" in stages and stages[-1] in ("r1-dpo", "r1-rpo1")
    (path,) = out.glob("*-r1-prompts/prompts.parquet")
    prompts = {p.id: p for p in read_rows(path, Prompt)}
    assert [p.origin for p in prompts.values()].count("file") == len(FILES["prompts"])
    (path,) = out.glob("*-r1-answers/responses.parquet")
    for r in read_rows(path, Response):
        assert r.judge == ("verifier" if prompts[r.prompt].truth else "reward")
    pairs = [p for path in out.glob("*/pairs.parquet") if (read := read_rows(path, Pair)) for p in read]
    assert pairs and all(p.judge == "reward" or prompts[p.prompt].truth for p in pairs)
    human = [d for path in out.glob("00-data/demonstrations.parquet") for d in read_rows(path, Demonstration)]
    assert sum(d.task == "prompt-writing" for d in human) == 2 and len(human) == 12
    assert "not finished" not in CliRunner().invoke(app, ["status", str(out)]).stdout
    assert (out / "report.html").stat().st_size > 1000


def test_known_answers_are_enough_to_judge(tmp_path: Path, random_base: Path) -> None:
    result = start(write(tmp_path, random_base, {"ratings": None}), tmp_path / "run")
    assert result.exit_code in DONE, result.output + repr(result.exception)
    assert not list((tmp_path / "run").glob("*-reward*"))
    (path,) = (tmp_path / "run").glob("*-r1-answers/responses.parquet")
    assert {r.judge for r in read_rows(path, Response)} == {"verifier", "none"}


def test_an_instruct_model_needs_no_human_data(tmp_path: Path, tiny_base: Path) -> None:
    """Programs judge, failing answers are repaired, and the model as it was given is the first that is evaluated."""
    rows = [
        {"prompt": f"Add {n} and 1.", "truth": {"kind": "instructions", "checks": [{"id": name}]}}
        for n, name in enumerate(["detectable_format:title", "startend:quotation"] * 4)
    ]
    files = {"demonstrations": None, "ratings": None, "prompts": rows}
    pipelines = {"instructions": {"prompts": 4, "forms": 1, "whole_talk": 0, "revision": 0}}
    topics = {"macro": 0, "subtopics": 0, "own": ["bees", "moss"]}
    judging = {"repair": {"min_words": 1, "pairs": True}}
    recipe = write(tmp_path, tiny_base, files, pipelines=pipelines, topics=topics, judging=judging)
    out = tmp_path / "run"
    result = start(recipe, out)
    assert result.exit_code in DONE, result.output + repr(result.exception)
    results = json.loads((out / "results.json").read_text())
    assert [s["name"] for s in results["stages"]][:2] == ["base", "r1-general-sft"] and results["collapse"] == []
    samples = results["alignment_samples"]
    assert 0 < samples["repaired"] <= samples["synthetic"] and samples["human"] == 0 and results["synthetic_share"] == 1.0
    (path,) = out.glob("*-r1-answers/responses.parquet")
    responses = {r.id: r for r in read_rows(path, Response)}
    assert any(r.edits for r in responses.values())
    for r in responses.values():
        if r.edits:
            assert r.good and not responses[r.repaired_from[0]].verified
    assert "repaired for" in (out / "report.html").read_text()
    shown = CliRunner().invoke(app, ["run", str(recipe), "--dry-run", "--json", "--quiet"])
    assert shown.exit_code == 0, shown.output
    expected = {row["stage"]: row for row in json.loads(shown.stdout)["stages"]}
    assert expected.keys() == {done["name"] for done in read_run(out).stages} - {"data"}
    assert expected["r1-general-sft"]["tokens_trained"] > 0 and not any(row["tokens_rated"] for row in expected.values())
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/done.json")}
    assert start(recipe, out).exit_code in DONE
    assert {path: path.stat().st_mtime_ns for path in out.glob("*/done.json")} == before, "nothing is done twice"


def test_a_file_that_changed_since_is_noticed(tmp_path: Path, random_base: Path, snapshot: Snapshot) -> None:
    recipe = write(tmp_path, random_base, {"ratings": None, "prompts": FILES["prompts"][:4]}, rpo_iterations=0)
    assert start(recipe, tmp_path / "run").exit_code in DONE
    before = snapshot(tmp_path / "run")
    with (tmp_path / "prompts.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "Add 8 and 8.", "answer": 16}) + "\n")
    result = start(recipe, tmp_path / "run")
    assert result.exit_code == 2 and "was made from other inputs" in result.stderr
    assert snapshot(tmp_path / "run") == before


def test_answers_that_outgrow_the_context_do_not_end_the_run(tmp_path: Path, random_base: Path) -> None:
    # 150 of 256 tokens: room for an answer, but not for one whose broken bytes take three tokens each when read again,
    # nor for both answers of a comparison at once
    filler = "x" * 120
    files = {
        "prompts": [{"prompt": f"{filler} {i}?"} for i in range(4)],
        "evaluation": [{"prompt": f"{filler} {i}!", "answer": i} for i in range(4)],
        "ratings": [{"prompt": f"T{i // 2}", "response": filler + str(i), **RATED, "helpfulness": 4 * (i % 2)} for i in range(24)],
    }
    result = start(write(tmp_path, random_base, files, answers={"samples": 4, "max_tokens": 60}), tmp_path / "run")
    assert result.exit_code in DONE, result.output + repr(result.exception)
    reward = json.loads((tmp_path / "run" / "results.json").read_text())["reward"]
    assert reward["llm_judge"]["easy"]["verdicts"]["unparsed"] == reward["easy"]["overall"]["n"] > 0


# ---- what does not ----


LONG = "word " * 100
QUESTION = {"messages": [{"role": "user", "content": "Hi?"}]}
BACKWARDS = {"messages": [{"role": "assistant", "content": "I begin."}, {"role": "user", "content": "Oh?"}]}
BAD: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    # what: files, recipe changes, words of the sentence
    "an unknown key": ({}, {"pipelines": {"by_task": {"promts": 3}}}, "did you mean 'prompts'"),
    "an unknown stage": ({}, {"genral_sft": STEPS}, "did you mean 'general_sft'"),
    "an unknown key of a stage": ({}, {"dpo": STEPS | {"betta": 1}}, "did you mean 'beta'"),
    "a missing model": ({}, {"model": "nowhere"}, "nowhere"),
    "a missing file": ({}, {"data": {"demonstrations": "nowhere.jsonl", "evaluation": "evaluation.jsonl"}}, "nowhere.jsonl does not exist"),
    "a file of another kind": ({"ratings": "helpfulness,3\n"}, {}, "Line 1 of .*ratings.jsonl is not JSON"),
    "no demonstrations": ({"demonstrations": []}, {}, "demonstrations.jsonl holds no rows"),
    "no ratings": ({"ratings": []}, {}, "ratings.jsonl holds no rows"),
    "no prompts": ({"prompts": []}, {}, "prompts.jsonl holds no rows"),
    "no evaluation": ({"evaluation": []}, {}, "evaluation.jsonl holds no rows"),
    "demonstrations without an answer": ({"demonstrations": [QUESTION]}, {}, "end with the assistant"),
    "ratings without a mark": ({"ratings": [{"prompt": "Hi", "response": "Ho", **dict.fromkeys(RATED)}]}, {}, "none of the columns"),
    "a demonstration that the assistant starts": ({"demonstrations": [BACKWARDS]}, {}, "starting with the user"),
    "a prompt that the assistant starts": ({"prompts": [BACKWARDS]}, {}, "starting with the user"),
    "a demonstration that is too long": (
        {"demonstrations": [*FILES["demonstrations"], {"prompt": LONG, "response": "No."}]}, {}, "1 human rows .* the 256 tokens"
    ),
    "a rated answer that is too long": ({"ratings": [*FILES["ratings"], {"prompt": "Hi", "response": LONG, **RATED}]}, {}, "256 tokens"),
    "a prompt that is too long": ({"prompts": [{"prompt": LONG}]}, {}, "leaves no room for an answer"),
    "an evaluation that is too long": ({"evaluation": [{"prompt": LONG, "answer": 1}]}, {}, "leaves no room for an answer"),
    "a demonstration that the evaluation asks": (
        {"demonstrations": [{"prompt": " ask 2? ", "response": "2."}]}, {}, "asks what the evaluation asks"
    ),
    "nothing that can judge": ({"ratings": None, "prompts": [{"prompt": "Why?"}]}, {}, "Nothing can judge answers"),
    "an evaluation without truths": ({"evaluation": [{"prompt": "Hi?"}]}, {}, "neither `truth` nor `answer`"),
    "another chat format": ({}, {"chat_format": "llama3"}, "eot_id"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_refused_before_work(what: str, tmp_path: Path, random_base: Path) -> None:
    files, changes, words = BAD[what]
    out = tmp_path / "run"
    sentence = refusal(write(tmp_path, random_base, files, **changes), out)
    assert re.search(words, sentence), sentence


def damaged(base: Path, folder: Path) -> Path:
    return Path(shutil.copytree(base, folder / "damaged"))


def test_a_checkpoint_with_another_vocabulary(tmp_path: Path, random_base: Path, tiny_base: Path) -> None:
    model = damaged(random_base, tmp_path)
    shutil.copy(tiny_base / "tokenizer.json", model / "tokenizer.json")
    assert "tokenizer" in refusal(write(tmp_path, model), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_checkpoint(tmp_path: Path, random_base: Path, share: float) -> None:
    model = damaged(random_base, tmp_path)
    data = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(data[: int(share * len(data))])
    assert "model.safetensors" in refusal(write(tmp_path, model), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_refused_run_goes_on_when_the_file_is_mended(tmp_path: Path, random_base: Path) -> None:
    long = {"demonstrations": [{"prompt": LONG, "response": "No."}]}
    refusal(write(tmp_path, random_base, long), tmp_path / "run")
    assert start(write(tmp_path, random_base, rounds=1), tmp_path / "run").exit_code in DONE


def test_a_folder_of_another_recipe_is_left_alone(
    tmp_path: Path, random_base: Path, finished: Path, copy: Path, snapshot: Snapshot
) -> None:
    before = snapshot(copy)
    result = start(write(tmp_path, random_base), copy)
    assert result.exit_code == 2 and "another recipe" in result.stderr and len(result.stderr.splitlines()) == 1
    assert snapshot(copy) == before


# ---- a full disk ----

# A file system of its own, in memory: of each size in turn, then with more room. Prints how each pair of starts ended.
FULL_DISK = """
import json, subprocess, sys
from pathlib import Path
from typer.testing import CliRunner
from gristmill.cli.main import app

recipe, disk, *sizes = sys.argv[1:]
for size in sizes:
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], check=True)
    out, ends = Path(disk) / "run", []
    for room in (size, "100m"):
        subprocess.run(["mount", "-o", f"remount,size={room}", disk], check=True)
        finished = {str(p): p.stat().st_mtime_ns for p in out.glob("*/done.json")}
        result = CliRunner().invoke(app, ["run", recipe, "--out", str(out), "--quiet"])
        ends.append([result.exit_code, result.stderr])
    kept = all(Path(p).stat().st_mtime_ns == t for p, t in finished.items())
    print(json.dumps([size, *ends, len(finished), kept]))
    subprocess.run(["umount", "--lazy", disk], check=True)
"""


def can_mount() -> bool:
    command = ["unshare", "-Urm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return bool(shutil.which("unshare")) and subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not can_mount(), reason="needs a private mount namespace")
def test_a_full_disk_is_one_sentence_and_the_next_start_goes_on(tmp_path: Path, random_base: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    sizes = ["4k", "20k", "100k", "300k"]
    command = ["unshare", "-Urm", sys.executable, "-c", FULL_DISK, str(write(tmp_path, random_base)), str(disk), *sizes]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    num_finished = []
    for size, (code, said), (next_code, next_said), finished, kept in map(json.loads, lines):
        assert code == 2 and said.count("gristmill: ") == 1, (size, said)
        assert said.splitlines()[-1].startswith("gristmill: ") and "space" in said.splitlines()[-1], (size, said)
        assert next_code in DONE, (size, next_said)
        assert kept, f"{size}: what was done is not done again"
        num_finished.append(finished)
    assert num_finished == sorted(num_finished) and num_finished[0] == 0 < num_finished[1] < num_finished[-1]


# ---- every key is read ----


def keys_read(monkeypatch: pytest.MonkeyPatch, start: Callable[[], Any]) -> set[str]:
    """`Section.key` of every recipe value that a start looks at."""
    read: set[str] = set()
    plain = Section.__getattribute__

    def recorded(self: Section, name: str) -> Any:
        if name in type(self).__dict__.get("__pydantic_fields__", ()):
            read.add(f"{type(self).__name__}.{name}")
        return plain(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(Section, "__getattribute__", recorded)
        start()
    return read


SECTIONS = [
    field.annotation
    for field in AlignmentRecipe.model_fields.values()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
]
TRAINED = {  # these go to the trainer and the loss as one dictionary
    f"{section.__name__}.{key}"
    for section in (Training, PreferenceTraining)
    for key in section.model_fields
    if key in TrainSettings.__dataclass_fields__ or key in inspect.signature(PreferenceObjective).parameters
}
FOR_ENDPOINTS = {f"Calls.{key}" for key in Calls.model_fields}
FILE_KEYS = {f"HumanData.{name}" for name in ("demonstrations", "ratings", "prompts", "evaluation", "validation")}
# of own files: what these files have no use for, and a world's run shows that it is read
WITHOUT_USE = {"AlignmentRecipe.code_sft", "AlignmentJudging.max_pairs_per_prompt", "Topics.combine", "Topics.subtopics"}


@pytest.mark.parametrize("source", ["own files", "world"])
def test_every_key_is_read(
    source: str, tmp_path: Path, random_base: Path, run: Any, make_recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe() if source == "world" else load(write(tmp_path, random_base), AlignmentRecipe)
    everything = {f"{s.__name__}.{key}" for s in [AlignmentRecipe, *SECTIONS] for key in s.model_fields}
    unread = everything - keys_read(monkeypatch, lambda: run(recipe, tmp_path / "run")) - TRAINED - FOR_ENDPOINTS
    assert unread <= {"AlignmentRecipe.kind", *(FILE_KEYS if source == "world" else WITHOUT_USE)}  # a world refuses files


@pytest.mark.parametrize("name", ["demonstrations", "ratings", "prompts", "evaluation", "validation"])
def test_a_world_refuses_files_that_it_would_not_read(name: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    recipe = tmp_path / "world.yaml"
    recipe.write_text(yaml.safe_dump({"world": "miniature", "data": {name: "rows.jsonl"}}))
    assert f"data.{name} would not be read" in refusal(recipe, tmp_path / "run")


@pytest.mark.parametrize(("number", "name"), [("num_rated_prompts", "ratings"), ("num_prompts", "prompts")])
def test_a_number_of_rows_needs_their_file(number: str, name: str, tmp_path: Path, random_base: Path) -> None:
    recipe = write(tmp_path, random_base, {name: None})
    values = yaml.safe_load(recipe.read_text())
    values["data"][number] = 4
    recipe.write_text(yaml.safe_dump(values))
    assert f"data.{number} counts rows of data.{name}" in refusal(recipe, tmp_path / "run")


def test_num_prompts_limits_own_prompts(tmp_path: Path, random_base: Path) -> None:
    recipe = load(write(tmp_path, random_base), AlignmentRecipe)
    for number, want in ((None, 10), (3, 3), (0, 0)):
        data = recipe.data.model_copy(update={"num_prompts": number})
        assert len(FileSource(data, TemplatePack.load()["task_prompt"]).prompts()) == want


# ---- what went wrong is said at the end ----


def test_a_mill_that_keeps_nothing_ends_with_alarms(tmp_path: Path, random_base: Path) -> None:
    few = {"lr": 1e-4, "epochs": 1, "batch_size": 4}
    judging = {"keep": "correctness >= 99", "keep_chosen": "correctness >= 99"}
    changes = {"judging": judging, "demonstration_sft": few, "general_sft": few, "dpo": {**few, "num_prompts": 4}}
    out = tmp_path / "run"
    result = start(write(tmp_path, random_base, {"prompts": [{"prompt": f"Why {i}?"} for i in range(6)]}, **changes), out)
    assert result.exit_code == 4, result.output + repr(result.exception)
    alarms = {a["stage"]: a["text"] for a in json.loads((out / "results.json").read_text())["alarms"]}
    assert "keeps no answer: none of" in alarms["r1-answers"] and "lower judging.keep" in alarms["r1-answers"]
    assert "makes no pair" in alarms["r1-dpo-pairs"] and "lower judging.min_gap" in alarms["r1-dpo-pairs"]
    assert "takes 3 steps only: 12 rows, 1 epochs, batches of 4" in alarms["demonstrations"]
    assert "reward" not in alarms  # its steps were given as a number
    assert [line for line in result.stderr.splitlines() if line.startswith("gristmill: alarm: ")] == [
        f"gristmill: alarm: {text}" for text in alarms.values()
    ]
    again = CliRunner().invoke(app, ["run", str(tmp_path / "own.yaml"), "--out", str(out), "--quiet"])
    assert again.exit_code == 4 and json.loads((out / "results.json").read_text())["alarms"] == [
        {"stage": stage, "text": text} for stage, text in alarms.items()
    ]
    status = CliRunner().invoke(app, ["status", str(out)])
    assert all(f"alarm: {text}" in status.stdout for text in alarms.values())
