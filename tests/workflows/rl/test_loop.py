"""Reinforcement learning in the loop: exact resume after kills, the mismatch metric, prompts drawn by (seed, step), bad input."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from gristmill.cli.main import app
from gristmill.core.config import check, dump
from gristmill.core.errors import InputError
from gristmill.core.progress import Progress
from gristmill.data.rows import read_records
from gristmill.engine.engine import Engine
from gristmill.model.adapters import load_model as load_adapted
from gristmill.model.hf import load_model
from gristmill.model.packed import PackedShape
from gristmill.report.rl import curves, write_page
from gristmill.report.summary import stage_line
from gristmill.runs.journal import Journal
from gristmill.runs.reader import read_run
from gristmill.studio.sources import Sources
from gristmill.workflows.rl import loop
from gristmill.workflows.rl.policy import Policy
from gristmill.workflows.rl.recipe import RlRecipe
from gristmill.workflows.rl.rollouts import Group, RolloutSource

STEPS = 4
# Short answers pass now and then, so that groups have a spread.
TRUTH = {"kind": "instructions", "checks": [{"id": "length_constraints:number_words", "relation": "less than", "num_words": 8}]}
KILLED = """
import json, os, signal, sys
from pathlib import Path
from gristmill.core.config import load
from gristmill.core.progress import Progress
from gristmill.runs.journal import Journal
from gristmill.train import checkpoint
from gristmill.workflows.rl import loop
from gristmill.workflows.rl.recipe import RlRecipe

loop.CHECKPOINT_SECONDS = 0.0
folder, moments = Path(sys.argv[1]), json.loads(sys.argv[2])
append, save = Journal.append, checkpoint.CheckpointStore.save

def start(appends, saves):
    def dying_append(journal, record):
        nonlocal appends
        appends -= 1
        if appends == 0:
            journal._file.write(json.dumps(record).encode()[:9])
            os.kill(os.getpid(), signal.SIGKILL)
        append(journal, record)

    def dying_save(store, state):
        nonlocal saves
        saves -= 1
        if saves == 0:
            os.rename = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
        save(store, state)

    Journal.append, checkpoint.CheckpointStore.save = dying_append, dying_save
    loop.run(load(folder / "rl.yaml", RlRecipe), folder / "run", Progress(quiet=True))

for appends, saves in [*moments, (-1, -1)]:
    pid = os.fork()
    if pid == 0:
        start(appends, saves)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def make(folder: Path, base: Path, **changes: Any) -> RlRecipe:
    rows = [{"prompt": f"Say {word}.", "truth": TRUTH} for word in ("bee", "moss", "rain", "salt", "wind", "tree")]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:4]))
    (folder / "evaluation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[4:]))
    values = {
        "model": str(base),
        "data": {"prompts": str(folder / "prompts.jsonl"), "evaluation": str(folder / "evaluation.jsonl")},
        "threads": 1,
        "steps": STEPS,
        "prompts": 3,
        "samples": 4,
        "max_tokens": 20,
        "training": {"lr": 3e-3, "precision": "fp32"},
        "engine": {"precision": "fp32"},
        **changes,
    }
    recipe = check(RlRecipe, values)
    (folder / "rl.yaml").write_text(dump(recipe))
    return recipe


def run(recipe: RlRecipe, folder: Path) -> dict[str, Any]:
    return loop.run(recipe, folder / "run", Progress(quiet=True))


def metrics(folder: Path) -> list[dict[str, float]]:
    lines = (folder / "run/01-rl/train/metrics.jsonl").read_text().splitlines()
    timed = ("generation_seconds", "update_seconds", "tokens_per_second")
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]


@pytest.fixture(scope="module")
def calm(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calm")
    run(make(folder, tiny_base, method="dapo"), folder)
    return folder


def test_a_run_trains_and_says_what_it_did(calm: Path) -> None:
    steps = metrics(calm)
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1)) and any("loss" in line for line in steps)
    for line in steps:
        if "loss" in line:
            assert line["ratio"] == 1 and line["mismatch"] < 1e-4 and line["grad_norm"] > 0
    data = read_run(calm / "run")
    assert data.results is not None and data.results["steps"] == STEPS and data.results["updates"] == sum("loss" in s for s in steps)
    assert "4 steps" in stage_line(data.stages[1]) and "the model as given" in stage_line(data.stages[0])
    before = load_file(Path(data.recipe["model"]) / "model.safetensors")
    after = load_file(calm / "run" / data.results["model"] / "model.safetensors")
    assert any((before[name] != after[name]).any() for name in before)


def test_each_visit_of_a_prompt_sees_other_answers(calm: Path) -> None:
    seen: dict[str, list[str]] = {}
    for record in read_records(calm / "run/01-rl/rollouts.jsonl"):
        if "prompt" in record:
            seen.setdefault(record["prompt"], []).append(json.dumps([one["tokens"] for one in record["out"]]))
    assert len(seen) == 4 and all(len(found) == len(set(found)) == 3 for found in seen.values()), "12 prompts of 4: each three times"


@pytest.mark.parametrize("method", ["dapo", "gspo"])
def test_kills_change_no_weight_and_no_metric(tiny_base: Path, tmp_path: Path, method: str) -> None:
    """In evaluation, generation, rewards and saving; of GSPO there are two updates a step and a reference besides."""
    more: dict[str, Any] = {"method": method} if method == "dapo" else {"method": method, "updates": 2, "beta": 0.1}
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    for folder in (calm, killed):
        folder.mkdir()
        recipe = make(folder, tiny_base, **more)
    moments = [(3, -1), (-1, 1), (4, -1), (3, -1)]  # a journal's n-th line from then on, or the n-th save
    if method == "dapo":
        moments = [(3, -1), (-1, 1), (2, -1), (3, -1), (3, -1), (-1, 1), (2, -1), (4, -1), (1, -1), (-1, 1)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    out = subprocess.run(
        [sys.executable, "-c", KILLED, str(killed), json.dumps(moments)], capture_output=True, text=True, env=environment, check=True
    )
    codes = out.stdout.split()
    assert codes == ["-9"] * len(moments) + ["0"], out.stderr[-2000:]
    subprocess.run([sys.executable, "-c", KILLED, str(calm), "[]"], env=environment, check=True, capture_output=True)
    one, other = (load_file(folder / "run/01-rl/model/model.safetensors") for folder in (calm, killed))
    assert all((one[name] == other[name]).all() for name in one)
    assert metrics(calm) == metrics(killed)
    ids = [json.loads(line)["id"] for line in (killed / "run/01-rl/rollouts.jsonl").read_text().splitlines()]
    assert len(ids) == len(set(ids)) == (3 + 1) * STEPS, "nothing is sampled or judged twice"
    assert recipe.method == method


def test_a_sampler_that_is_not_refreshed_is_told_by_the_mismatch(
    calm: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "refresh", lambda engine: None)
    stale = make(tmp_path, tiny_base, method="dapo", engine={"precision": "bf16"})  # a copy, which does not see later weights
    run(stale, tmp_path)
    first, *_, last = [line["mismatch"] for line in metrics(tmp_path) if "mismatch" in line]
    monkeypatch.undo()
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    run(make(fresh, tiny_base, method="dapo", engine={"precision": "bf16"}), fresh)
    assert last > 10 * [line["mismatch"] for line in metrics(fresh) if "mismatch" in line][-1]
    assert first < last


def test_groups_of_the_page_open_in_the_studio(calm: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(calm / "run", tmp_path / "run"))
    found = Sources(run, tmp_path / "cache")
    link = r'href="http://127\.0\.0\.1:8600/#/rows\?source=01-rl%2Frollouts\.jsonl&amp;place=(\d+)"'
    links = re.findall(link, write_page(read_run(run)).read_text())
    assert links
    record = next(r for r in Journal(run / "01-rl/rollouts.jsonl", read_only=True).values() if "out" in r)
    texts = [answer["text"] for answer in record["out"]]
    for place in map(int, links):
        row, others = found.row("01-rl/rollouts.jsonl", place), found.siblings("01-rl/rollouts.jsonl", place)
        scores = {one["facts"]["score"] for one in (row, *others)}
        assert (
            row["id"].endswith("-0") and len(others) == len(texts) - 1 and len(scores) > 1
        )  # a group with a spread, from its first answer
    row = found.row("01-rl/rollouts.jsonl", 0)
    assert row["messages"][0]["content"] == record["question"] and row["answers"][0]["text"] == texts[0]
    assert found.choose_items("01-rl/rollouts.jsonl", "pair", num=2, seed=0)
    (run / "01-rl/done.json").unlink()  # at work: its journal grows
    assert not found.all()


def test_groups_without_a_spread_end_the_run_with_advice(tiny_base: Path, tmp_path: Path) -> None:
    never = {"kind": "exact", "value": "zzzz"}
    recipe = make(tmp_path, tiny_base, max_idle_steps=2)
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "Say bee.", "truth": never}) + "\n")
    with pytest.raises(InputError, match="No group had a spread for 2 steps .0% of the answers are right.: give easier prompts"):
        run(recipe, tmp_path)
    assert len(read_records(tmp_path / "run/01-rl/rollouts.jsonl")) == (3 + 1) * 2


def test_steps_that_taught_nothing_are_an_alarm(tiny_base: Path, tmp_path: Path) -> None:
    make(tmp_path, tiny_base, steps=1)
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "Say bee.", "truth": {"kind": "exact", "value": "zzzz"}}) + "\n")
    shown = CliRunner().invoke(app, ["rl", str(tmp_path / "rl.yaml"), "--out", str(tmp_path / "run"), "--quiet"])
    assert shown.exit_code == 4 and "gristmill: alarm: rl makes 0 of 1 updates" in shown.stderr, shown.output
    assert "alarm: rl makes 0 of 1 updates" in CliRunner().invoke(app, ["status", str(tmp_path / "run")]).stdout
    assert "<b>Alarm. </b>rl makes 0 of 1 updates" in (tmp_path / "run/report.html").read_text()


def test_a_function_that_says_the_same_of_all_is_named(tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "rewards.py").write_text("def reward(completions): return [1.0] * len(completions)")
    rewards = {"verifier": 0, "cut_off": "masked", "functions": [{"file": str(tmp_path / "rewards.py")}]}
    with pytest.raises(InputError, match="look at what rewards, which says the same"):
        run(make(tmp_path, tiny_base, max_idle_steps=1, rewards=rewards), tmp_path)


def test_dynamic_sampling_draws_until_enough_groups_have_a_spread(tiny_base: Path, tmp_path: Path) -> None:
    run(make(tmp_path, tiny_base, max_draws=4, steps=2), tmp_path)
    drawn = [json.loads(line) for line in (tmp_path / "run/01-rl/rollouts.jsonl").read_text().splitlines()]
    groups = Counter(record["step"] for record in drawn if "out" in record)
    for line in metrics(tmp_path):
        num = groups[int(line["step"]) - 1]
        assert num % 3 == 0 and (round(line["spread"] * num) >= 3 or num == 12), "what was drawn and left out counts too"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "Say wind.", "truth": TRUTH}, "is asked by the evaluation too"),
        ({"prompt": "Say nothing."}, "nothing can judge it"),
        ({"prompt": "long " * 200, "truth": TRUTH}, "leaves no room"),
    ],
)
def test_bad_prompts_are_refused_before_any_work(tiny_base: Path, tmp_path: Path, row: dict[str, Any], words: str) -> None:
    recipe = make(tmp_path, tiny_base)
    with (tmp_path / "prompts.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    with pytest.raises(InputError, match=words):
        run(recipe, tmp_path)
    assert not (tmp_path / "run").exists()


def test_the_page_shows_every_step_and_right_beside_wrong_and_runs_no_answer(calm: Path) -> None:
    journal = calm / "run/01-rl/rollouts.jsonl"
    hostile = journal.read_text().replace("Say ", "Say <script>alert(1)</script> ")
    journal.write_text(hostile)
    page = write_page(read_run(calm / "run")).read_text()
    assert "share of groups with a spread" in page and "paired" in page and "right, " in page and "wrong, " in page
    assert "<script" not in page and "&lt;script&gt;" in page


def test_the_page_draws_means_of_ten_steps_over_what_is_noise(calm: Path) -> None:
    data = read_run(calm / "run")
    assert 'class="greedy curve faint"' not in write_page(data).read_text()
    log = calm / "run/01-rl/train/metrics.jsonl"
    before = log.read_text()
    log.write_text("".join(json.dumps({"step": i, "reward_total": float(i % 2)}) + "\n" for i in range(1, 41)))
    (figure,) = map(str, curves(data, "01-rl"))
    log.write_text(before)
    noise, means = (part.split('"')[0].split() for part in figure.split('points="')[1:])
    assert len(noise) == 40 and len(means) == 31 and len({point.split(",")[1] for point in means}) == 1


def test_the_command_runs_and_prints_the_change(tiny_base: Path, tmp_path: Path) -> None:
    make(tmp_path, tiny_base, steps=1)
    shown = CliRunner().invoke(app, ["rl", str(tmp_path / "rl.yaml"), "--out", str(tmp_path / "run"), "--quiet"])
    assert shown.exit_code == 0, shown.output
    assert "greedy: " in shown.stdout and "serve it: gristmill serve" in shown.stdout and "report: " in shown.stdout
    assert "finished" in CliRunner().invoke(app, ["status", str(tmp_path / "run")]).stdout
    again = CliRunner().invoke(app, ["rl", str(tmp_path / "rl.yaml"), "--out", str(tmp_path / "run"), "--quiet", "--json"])
    assert json.loads(again.stdout)["steps"] == 1
    other = CliRunner().invoke(app, ["run", str(tmp_path / "rl.yaml")])
    assert other.exit_code == 2 and "use `gristmill rl" in other.stderr


def test_a_curriculum_estimates_pass_rates_once_and_takes_prompts_by_them(tiny_base: Path, tmp_path: Path) -> None:
    recipe = make(tmp_path, tiny_base, curriculum={"samples": 4, "max_pass_rate": 1.1}, steps=2, prompts=2, method="dapo")
    run(recipe, tmp_path)
    done = read_run(tmp_path / "run").stages[1]
    rates = dict(zip(("bee", "moss", "rain", "salt"), done["rates"], strict=True))
    assert done["num_kept"] == 4 and all(0 <= rate <= 1 for rate in rates.values())
    asked = [r["question"].split()[1].strip(".") for r in read_records(tmp_path / "run/02-rl/rollouts.jsonl") if "question" in r]
    found = [np.mean([rates[word] for word in asked[k : k + 2]]) for k in (0, 2)]
    assert len(set(asked)) == 4 and found[0] >= found[1] - 0.1


class Interrupted(Exception):
    """Stands for whatever ends a process between two steps."""


def interrupt(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """End the run before it samples a step, with a checkpoint of the one before."""
    sample = RolloutSource.step

    def interrupted(source: RolloutSource, number: int) -> list[Group]:
        if number == step:
            raise Interrupted
        return sample(source, number)

    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(RolloutSource, "step", interrupted)


def test_steps_without_a_spread_are_counted_over_a_restart(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make(tmp_path, tiny_base, max_idle_steps=3)
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "Say bee.", "truth": {"kind": "exact", "value": "zzzz"}}) + "\n")
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt(patch, 2)
        run(recipe, tmp_path)
    with pytest.raises(InputError, match="No group had a spread for 3 steps"):
        run(recipe, tmp_path)
    assert len(read_records(tmp_path / "run/01-rl/rollouts.jsonl")) == (3 + 1) * 3


def test_a_reward_file_that_was_changed_between_starts_is_refused(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rewards.py"
    file.write_text("def reward(completions): return [-len(c) for c in completions]")
    recipe = make(tmp_path, tiny_base, steps=2, rewards={"functions": [{"file": str(file)}]})
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt(patch, 1)
        run(recipe, tmp_path)
    before = file.read_text()
    file.write_text(before.replace("-len", "len"))
    with pytest.raises(InputError, match="rewards.py has changed since this run began: put it back"):
        run(recipe, tmp_path)
    file.write_text(before)
    assert run(recipe, tmp_path)["steps"] == 2


LORA: dict[str, Any] = {"method": "dapo", "beta": 0.1, "training": {"lr": 3e-2, "precision": "fp32", "lora": {"rank": 4}}}


def test_an_adapter_is_trained_sampled_from_and_merged(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = run(make(tmp_path, tiny_base, **LORA), tmp_path)
    first, *_, last = [line for line in metrics(tmp_path) if "kl" in line]
    assert first["kl"] == 0 < last["kl"], "the base with the adapter off is the reference"
    assert first["mismatch"] < 1e-4 and last["mismatch"] < 1e-4, "the sampler has the adapter as it is"
    stored, _ = load_model(tmp_path / "run" / results["model"])
    merged, _ = load_adapted(tmp_path / "run/01-rl/adapter")
    base, _ = load_model(tiny_base)
    ids = torch.arange(5, 25)
    one, two, start = (model.hidden(ids, PackedShape.from_lengths([20])) for model in (stored, merged, base))
    assert (one - two).abs().max() == 0 < (one - start).abs().max()

    calm = load_file(tmp_path / "run/01-rl/adapter/adapter_model.safetensors")
    again = tmp_path / "again"
    again.mkdir()
    recipe = make(again, tiny_base, **LORA)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt(patch, 2)
        run(recipe, again)
    run(recipe, again)
    found = load_file(again / "run/01-rl/adapter/adapter_model.safetensors")
    assert all((calm[name] == found[name]).all() for name in calm) and metrics(tmp_path) == metrics(again)


def test_a_sampler_without_the_adapter_is_told_by_the_mismatch(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Policy, "refresh", lambda policy: None)
    run(make(tmp_path, tiny_base, steps=2, **LORA), tmp_path)
    first, last = [line["mismatch"] for line in metrics(tmp_path) if "mismatch" in line]
    assert last > 100 * max(first, 1e-6)
