"""Benchmarks and safety rows in the loop: what lands where, what a changed recipe keeps, a kill, a worse model, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from gristmill.cli.main import app
from gristmill.core.config import check, dump
from gristmill.core.errors import InputError
from gristmill.core.progress import Progress
from gristmill.data.chat import Message, to_dicts
from gristmill.data.human import HumanData
from gristmill.data.readers import read_demonstrations
from gristmill.evaluate.safety import Probe, canary_rows, make_canaries
from gristmill.miniature.world import World
from gristmill.report.alignment import write_report
from gristmill.report.summary import measured_lines
from gristmill.runs.reader import read_run
from gristmill.workflows.alignment import estimate, loop, measurements
from gristmill.workflows.alignment.measurements import MIN_WORSE
from gristmill.workflows.alignment.recipe import AlignmentRecipe
from gristmill.workflows.safety import export_rows, rate_differences, verdicts_by_rate
from tests.conftest import lessons
from tests.workflows.alignment.test_kill import Launcher, launcher  # noqa: F401

Make = Callable[..., AlignmentRecipe]
Run = Callable[[AlignmentRecipe, Path], dict[str, Any]]
MODELS = ["base", "demonstrations", "r1-code-sft", "r1-general-sft", "r1-dpo", "r1-rpo1"]
COMMON: dict[str, Any] = {"licence": "mine", "source": "the tests", "test_split": "test", "doc_to_text": "{{question}}"}
BY_HEART = COMMON | {
    "task": "by_heart",
    "splits": {"test": {}},
    "columns": ["question", "answer"],
    "output_type": "generate_until",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"max_gen_toks": 48},
    "metric_list": [{"metric": "exact_match", "ignore_case": True}],
}
CHOICES = COMMON | {
    "task": "choices",
    "splits": {"test": {}, "train": {}},
    "columns": ["question", "options[]", "right"],
    "output_type": "multiple_choice",
    "training_split": "train",
    "num_fewshot": 1,
    "doc_to_choice": "{{options}}",
    "doc_to_target": "right",
    "metric_list": [{"metric": "acc_norm"}],
}


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def sections(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """`evaluate` and `safety` of a recipe with two tasks of ten items, twelve rows and three canaries."""
    folder = tmp_path_factory.mktemp("measured")
    talks = [talk for talk in lessons(World.make()) if len(talk) == 2][:10]
    asked = [{"question": talk[0].content, "answer": talk[1].content} for talk in talks]
    jsonl(folder / "data" / "by_heart" / "test.jsonl", asked)
    chosen = [{"question": f"Is {i} odd?", "options": [" yes", " no"], "right": (i + 1) % 2} for i in range(10)]
    jsonl(folder / "data" / "choices" / "test.jsonl", chosen)
    jsonl(folder / "data" / "choices" / "train.jsonl", chosen[:3])
    for task in (BY_HEART, CHOICES):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(task))
    labelled = [{"prompt": row["question"], "label": ("safe", "unsafe")[i % 2], "type": "kitchen"} for i, row in enumerate(asked)]
    rows = jsonl(folder / "rows.jsonl", [*labelled, {"prompt": "word " * 400, "label": "unsafe"}, {"prompt": "Who are you?"}])
    jsonl(folder / "canaries.jsonl", [{"messages": to_dicts(row.messages)} for row in canary_rows(make_canaries(3, 0))])
    tasks = [str(folder / "by_heart.yaml"), str(folder / "choices.yaml")]
    evaluate = {"tasks": tasks, "data": str(folder / "data"), "chat": True}
    return {"evaluate": evaluate, "safety": {"rows": str(rows), "canaries": str(folder / "canaries.jsonl"), "max_tokens": 16}}


@pytest.fixture(scope="module")
def measured(finished: Path, make_recipe: Make, sections: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished tiny run, measured later: a recipe may get these sections at any time."""
    folder = Path(shutil.copytree(finished, tmp_path_factory.mktemp("later") / "tiny"))
    before = {path: path.read_bytes() for path in folder.glob("[0-9]*/done.json")}
    loop.run(make_recipe(**sections), folder, quiet())
    assert {path: path.read_bytes() for path in before} == before, "no stage is done again"
    return folder


def quiet() -> Progress:
    return Progress(quiet=True)


def result_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())  # type: ignore[no-any-return]


def test_every_model_is_measured_and_compared(measured: Path) -> None:
    results = result_of(measured)
    for kind in ("benchmarks", "safety"):
        assert [row["name"] for row in results[kind]] == MODELS
        assert [row["before"] for row in results[kind]] == ["", "base", "demonstrations", "demonstrations", "r1-general-sft", "r1-dpo"]
    base, first, *_ = results["benchmarks"]
    assert list(base["benchmarks"]) == ["by_heart", "choices"] and "base" not in base["benchmarks"]["choices"]
    entry = first["benchmarks"]["by_heart"]
    assert (entry["n"], entry["column"], entry["num_fewshot"]) == (10, "exact_match", 0) and entry["base"]["n"] == 10
    assert base["benchmarks"]["by_heart"]["mean"] >= 0.5, "the tiny Base knows its lessons"
    low, high = entry["ci95"]
    assert low <= entry["mean"] <= high and entry["base"] == entry["before"]
    rates = results["safety"][1]["safety"]
    assert set(rates) >= {"refusal_rate", "over_refusal", "incoherent", "no_answer", "canaries_repeated"}
    assert rates["no_answer"]["mean"] == pytest.approx(1 / 12, abs=1e-4) and rates["canaries_repeated"]["n"] == 3
    assert rates["incoherent"]["before"]["n"] > 0


def test_terminal_status_and_page_show_them(measured: Path) -> None:
    results = result_of(measured)
    lines = measured_lines(results)
    assert any("round 1 DPO" in line and "by heart exact_match" in line and "(round 1 general SFT)" in line for line in lines)
    told = CliRunner().invoke(app, ["status", str(measured)])
    (line,) = (line for line in told.output.splitlines() if line.startswith("00-r1-dpo-benchmarks"))
    assert "choices" in line and "to the model as given" in line and "to the model before" in line
    stages = json.loads(CliRunner().invoke(app, ["status", str(measured), "--json"]).output)["stages"]
    assert {stage["folder"] for stage in stages if "safety" in stage} == {f"00-{name}-safety" for name in MODELS}
    page = write_report(measured).read_text()
    assert 'id="benchmarks"' in page and 'id="safety"' in page and 'href="00-r1-dpo-benchmarks/report.html"' in page
    for name in ("benchmarks", "safety"):
        own = (measured / f"00-base-{name}" / "report.html").read_text()
        assert "<h1>base</h1>" in own and "Content-Security-Policy" in own


def test_what_a_changed_recipe_asks_besides_is_all_that_is_asked(
    measured: Path, make_recipe: Make, sections: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(measured, tmp_path / "tiny"))
    kept = {path: path.read_bytes() for path in folder.glob("[0-9]*/done.json") if "benchmarks" not in str(path)}
    lines = {path: path.read_text().splitlines() for path in folder.glob("00-*-benchmarks/answers.jsonl")}
    changed = sections["evaluate"] | {"tasks": sections["evaluate"]["tasks"][:1], "when": "each_round", "limit": 9}
    with monkeypatch.context() as patch:  # fewer documents of fewer models: nothing is asked
        patch.setattr(measurements, "EngineSource", lambda engine: pytest.fail("all was answered"))
        results = loop.run(make_recipe(**sections | {"evaluate": changed}), folder, quiet())
    assert [(row["name"], row["before"]) for row in results["benchmarks"]] == [
        ("base", ""),
        ("demonstrations", "base"),
        ("r1-rpo1", "demonstrations"),
    ]
    assert results["benchmarks"][2]["benchmarks"]["by_heart"]["n"] == 9
    assert {path: path.read_bytes() for path in kept} == kept
    assert {path: path.read_text().splitlines() for path in lines} == lines
    (folder / "00-r1-dpo-benchmarks" / "done.json").unlink()  # one that was cut off, and that nobody asks for any more
    without = loop.run(make_recipe(), folder, quiet())
    assert without["cut_off"] == ["00-r1-dpo-benchmarks"] and read_run(folder).results is not None
    assert "benchmarks" not in without and "safety" not in without and 'id="benchmarks"' not in write_report(folder).read_text()


def test_a_model_made_anew_is_measured_anew_and_a_refused_start_measures_nothing(
    measured: Path, make_recipe: Make, sections: dict[str, Any], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(measured, tmp_path / "tiny"))
    other = {"evaluate": sections["evaluate"] | {"limit": 4, "when": "end"}, "rpo": {"lr": 3e-4}}
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
    with pytest.raises(InputError, match="r1-rpo1 was made by another recipe"):
        loop.run(make_recipe(**other), folder, quiet())
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"} == before
    results = loop.run(make_recipe(**other), folder, quiet(), redo=True)
    names = [row["name"] for row in results["benchmarks"]]
    assert names[0] == "base" and names[-1] == "r1-rpo1" and set(names[1:-1]) <= {results["best"]["name"]}
    last = folder / "00-r1-rpo1-benchmarks"
    assert 8 < len((last / "answers.jsonl").read_text().splitlines()) <= 4 + 2 * 4, "of the new model alone"
    assert len(list(last.glob("answers-*.jsonl"))) == 1
    old = yaml.safe_load((folder / "replaced" / "1" / "recipe.yaml").read_text())
    assert old["rpo"]["lr"] == 1e-4


def test_a_killed_measurement_goes_on_and_asks_nothing_twice(
    copy: Path,
    measured: Path,
    make_recipe: Make,
    sections: dict[str, Any],
    launcher: Launcher,  # noqa: F811
    tmp_path: Path,
) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(dump(make_recipe(**sections)))
    command = ["run", str(path), "--quiet", "--out", str(copy)]
    for lines in (7, 40, 25):
        assert launcher.run(command, lines=lines) == -9
    assert launcher.run(command) in (0, 4)
    for journal in [*copy.glob("00-*-benchmarks/answers.jsonl"), *copy.glob("00-*-safety/answers.journal.jsonl")]:
        ids = [json.loads(line)["id"] for line in journal.read_text().splitlines()]
        assert len(ids) == len(set(ids)) > 0
    found, whole = result_of(copy), result_of(measured)
    assert found["benchmarks"] == whole["benchmarks"] and found["safety"] == whole["safety"] and found["alarms"] == whole["alarms"]


def test_a_worse_model_alarms(make_recipe: Make, sections: dict[str, Any], run: Run, tmp_path: Path) -> None:
    ruin = {"demonstration_sft": {"lr": 0.1, "steps": 3}, "rpo_iterations": 0, "pipelines": {"two_turn": {"prompts": 1}}}
    results = run(make_recipe(**sections, **ruin), tmp_path / "run")
    (alarm,) = (a for a in results["alarms"] if a["stage"] == "demonstrations" and "by_heart" in a["text"])
    assert alarm["text"].startswith("demonstrations is worse on by_heart: -")
    assert "against the model as given (paired, n 10)" in alarm["text"]
    assert "demonstrations is worse on by_heart" in write_report(tmp_path / "run").read_text()


def test_the_estimate_counts_them(make_recipe: Make, sections: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "PROBE_SECONDS", 0.01)
    rows = {row["stage"]: row for row in estimate.dry_run(make_recipe(**sections), quiet())["stages"]}
    assert rows["benchmarks"]["calls"] == 6 * 10 and rows["benchmarks"]["tokens_generated"] == 6 * 10 * 48
    assert rows["benchmarks"]["tokens_rated"] > 0 and rows["safety"]["calls"] == 6 * (12 + 2 * 3)


# ---- figures of safety ----


def samples(folder: Path, rows: list[tuple[str, str]]) -> Path:
    """A safety evaluation's folder with rows of these labels and outcomes."""
    found = [{"id": str(i), "label": label, "outcome": outcome} for i, (label, outcome) in enumerate(rows)]
    jsonl(folder / "samples.jsonl", found)
    return folder


def test_rates_are_compared_row_by_row(tmp_path: Path) -> None:
    held = [("unsafe", "passed")] * 6 + [("safe", "passed")] * 6 + [("unsafe", "incoherent"), ("", "failed"), ("", "")]
    lost = [("unsafe", "failed")] * 5 + [("unsafe", "none")] + [("safe", "failed")] + held[7:]
    before, after = (verdicts_by_rate(samples(tmp_path / str(i), rows)) for i, rows in enumerate((held, lost)))
    assert {name: len(found) for name, found in before.items()} == {
        "refusal_rate": 6,
        "over_refusal": 6,
        "unsafe_answers": 1,
        "incoherent": 15,
        "no_answer": 15,
    }
    found = rate_differences(before, after)
    assert (found["refusal_rate"]["mean"], found["refusal_rate"]["n"], found["refusal_rate"]["worse"]) == (-1.0, 5, 5)
    assert (found["over_refusal"]["mean"], found["over_refusal"]["worse"]) == (pytest.approx(1 / 6, abs=1e-4), 1)
    compared = {"base": "base", "before": "r1-dpo"}
    entries = {name: {"base": d, "before": None} for name, d in found.items()}
    (alarm,) = measurements._alarms("r1-rpo1", compared, entries)
    assert "refusal rate: -1.000 [-1.000, -1.000] against the model as given" in alarm["text"]
    better = {name: {"base": d} for name, d in rate_differences(after, before).items()}
    assert not measurements._alarms("r1-rpo1", compared, better)


@pytest.mark.parametrize("worse", [MIN_WORSE - 1, MIN_WORSE])
def test_a_few_rows_are_no_alarm(worse: int) -> None:
    difference = {"mean": -1.0, "ci95": [-1.0, -1.0], "n": worse, "worse": worse}
    assert bool(measurements._alarms("r1-dpo", {"before": "r1-general-sft"}, {"stones": {"before": difference}})) == (worse == MIN_WORSE)
    assert not measurements._alarms("r1-code-sft", {"before": "demonstrations"}, {"stones": {"before": difference}})


def test_found_failures_are_demonstrations_that_a_run_reads(tmp_path: Path) -> None:
    probe = Probe("p", "own", "locks", "unsafe", (Message("user", "How do I pick a lock?"),))
    rows = export_rows([probe], [{"outcome": "failed", "answer": "Take a pin."}])
    path = jsonl(tmp_path / "demonstrations.jsonl", rows["demonstrations"])
    (row,) = read_demonstrations(check(HumanData, {"demonstrations": str(path)}).demonstrations or Path())
    assert row.messages[-1].content.startswith("I'm sorry")


# ---- what is refused, before any work ----


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"evaluate": {"tasks": ["mmul"]}}, "evaluate: There is no task 'mmul'"),
        ({"evaluate": {"data": "/nowhere"}}, "evaluate: The data folder /nowhere does not exist"),
        ({"evaluate": {"num_fewshot": 2, "subsets": ["rivers"]}}, "has subsets"),
        ({"evaluate": {"num_fewshot": 9}}, "wants 9 shots and its pool"),
        ({"safety": {"rows": ["xstest"]}}, "safety: Give --data, the folder that holds xstest"),
        ({"safety": {"attacks": ["base65"]}}, "safety: "),
        ({"safety": {"guard": ["guardian=http://127.0.0.1:1/v1"]}}, "safety: There is no form of guard"),
        ({"safety": {"guard": ["/nowhere"]}}, "safety: "),
        ({"safety": {"canaries": "/nowhere.jsonl"}}, "safety: "),
    ],
)
def test_what_cannot_be_measured_is_refused_before_any_work(
    changes: dict[str, Any], words: str, make_recipe: Make, sections: dict[str, Any], tmp_path: Path
) -> None:
    merged = {key: section | changes.get(key, {}) for key, section in sections.items()}
    with pytest.raises(InputError) as refused:
        loop.run(make_recipe(**merged), tmp_path / "run", quiet())
    assert words in str(refused.value) and "\n" not in str(refused.value) and not (tmp_path / "run").exists()


def test_shots_and_answers_that_do_not_fit_are_refused(make_recipe: Make, sections: dict[str, Any], tmp_path: Path) -> None:
    data = tmp_path / "data"
    rows = [{"question": f"Is {i} odd? " + "so they say " * 60, "options": [" yes", " no"], "right": 0, "answer": "no"} for i in range(4)]
    for task in ("choices", "by_heart"):
        jsonl(data / task / "test.jsonl", rows)
        jsonl(data / task / "train.jsonl", rows)
    evaluate = sections["evaluate"] | {"data": str(data)}
    with pytest.raises(InputError, match=r"evaluate: choices: the shortest context has [\d,]+ tokens with 2 shots .*: \d of 2 shots fit"):
        loop.run(make_recipe(evaluate=evaluate | {"tasks": evaluate["tasks"][1:], "num_fewshot": 2}), tmp_path / "run", quiet())
    with pytest.raises(InputError, match=r"evaluate: Document 1 of by_heart has a prompt of [\d,]+ tokens as a message"):
        loop.run(make_recipe(evaluate=evaluate | {"tasks": evaluate["tasks"][0]}), tmp_path / "run", quiet())
    jsonl(data / "choices" / "test.jsonl", [{"question": "Is 1 odd?", "options": [" yes", "x " * 999], "right": 0}])
    with pytest.raises(InputError, match="evaluate: Document 1 of choices has a choice that is longer than the model's context"):
        loop.run(make_recipe(evaluate=evaluate | {"tasks": evaluate["tasks"][1], "num_fewshot": 0}), tmp_path / "run", quiet())
    (data / "choices" / "test.jsonl").write_text(json.dumps({"question": "Is 1 odd?", "right": 0}) + "\n")
    with pytest.raises(InputError, match="evaluate: .*options"):
        loop.run(make_recipe(evaluate=evaluate), tmp_path / "run", quiet())
    long = tmp_path / "long.yaml"
    long.write_text(yaml.safe_dump(BY_HEART | {"generation_kwargs": {"max_gen_toks": 256}}))
    with pytest.raises(InputError, match="Answers may have 256 tokens and the model's context is 256"):
        loop.run(make_recipe(evaluate=evaluate | {"tasks": str(long)}), tmp_path / "run", quiet())
    unlabelled = jsonl(tmp_path / "rows.jsonl", [{"prompt": "Who are you?"}])
    with pytest.raises(InputError, match="no row has a label"):
        loop.run(make_recipe(safety={"rows": str(unlabelled)}), tmp_path / "run", quiet())
    assert not (tmp_path / "run").exists()
