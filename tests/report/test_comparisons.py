"""What a run shows: who is compared with whom, and that a failure is said out loud."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from gristmill.evaluate.stats import accuracy, wilson
from gristmill.report.comparisons import (
    baseline_comparisons,
    differences_by_task,
    paired_difference,
    prompt_tasks,
    short_label,
    shortfalls,
    significance,
    stage_label,
    unpaired_difference,
)
from gristmill.runs import artifacts
from gristmill.runs.reader import read_run
from gristmill.runs.stage_names import baselines

MakeRun = Callable[..., Path]

NAMES = ["demonstrations", "r1-code-sft", "r1-general-sft", "r1-dpo", "r1-rpo1", "r2-code-sft", "r2-general-sft", "r2-dpo", "r2-rpo1"]


def test_sft_is_compared_with_the_model_that_wrote_its_data() -> None:
    found = baselines(NAMES)
    assert found["r1-code-sft"] == found["r1-general-sft"] == "demonstrations"
    assert found["r2-code-sft"] == found["r2-general-sft"] == "r1-rpo1"
    assert found["r1-dpo"] == "r1-general-sft" and found["r2-rpo1"] == "r2-dpo"
    assert "demonstrations" not in found


def test_names_for_people() -> None:
    assert [short_label(n) for n in NAMES[:5]] == ["demonstrations", "code SFT", "general SFT", "DPO", "RPO 1"]
    assert stage_label("r2-rpo3") == "round 2 RPO 3" and stage_label("r1-dpo-pairs") == "round 1 DPO pairs"


def test_differences_are_paired_by_prompt_whatever_the_order(make_run: MakeRun, set_outcomes: Any, stage_folder: Any) -> None:
    folder = make_run()
    set_outcomes(folder, "demonstrations", lambda i, task: i < 4)
    set_outcomes(folder, "r1-dpo", lambda i, task: i < 8)
    last = stage_folder(folder, "r1-dpo")
    outcomes = artifacts.OUTCOMES.read(last)
    artifacts.OUTCOMES.write(last, {mode: dict(reversed(right.items())) for mode, right in outcomes.items()})
    data = read_run(folder)
    stages = {s["name"]: s for s in data.stages}
    found = paired_difference(data, stages["demonstrations"]["folder"], last.name, mode="greedy")
    assert found is not None
    assert found["mean"] == 0.4 and found["n"] == 10
    assert found["ci95"][0] > 0.05  # only four prompts changed: paired, that is sure; unpaired it would not be
    scores = [stages[name]["greedy"]["overall"] for name in ("demonstrations", "r1-dpo")]
    assert significance(unpaired_difference(*scores)) == 0


def test_a_difference_on_one_task_uses_that_tasks_prompts(make_run: MakeRun, stage_folder: Any) -> None:
    folder = make_run()
    data = read_run(folder)
    tasks = prompt_tasks(data)
    before, after = (stage_folder(folder, name).name for name in ("demonstrations", "r1-general-sft"))
    found = differences_by_task(data, before, after, mode="sampled", tasks=tasks)
    assert found.keys() == set(tasks.values()) and found["sums"]["n"] == sum(task == "sums" for task in tasks.values()) == 2


def test_every_model_but_the_first_is_compared(make_run: MakeRun) -> None:
    found = baseline_comparisons(read_run(make_run()))
    assert [c.name for c in found] == NAMES[:5]
    assert all(set(c.differences) == {"greedy", "sampled"} for c in found)


def test_a_stage_that_made_it_worse_and_one_that_did_nothing_are_named(make_run: MakeRun, set_outcomes: Any) -> None:
    folder = make_run()
    for stage, right in {"demonstrations": 0, "r1-general-sft": 9, "r1-dpo": 4, "r1-rpo1": 5}.items():
        set_outcomes(folder, stage, lambda i, task, right=right: i < right)
    said = shortfalls(read_run(folder))
    assert any(s.startswith("Round 1 DPO is worse than round 1 general SFT: greedy -0.500") for s in said)
    assert any(s.startswith("Round 1 RPO 1 did not measurably improve on round 1 DPO: greedy +0.100") for s in said)
    assert not any("Round 1 general SFT" in s for s in said)


def test_a_last_model_that_is_not_better_is_said_first(make_run: MakeRun, set_outcomes: Any) -> None:
    folder = make_run()
    for stage in ("base", "r1-rpo1"):
        set_outcomes(folder, stage, lambda i, task: i % 2 == 0)
    first = shortfalls(read_run(folder))[0]
    assert first.startswith("The last model (round 1 RPO 1) did not measurably improve on the model as given: greedy +0.000")


def test_a_task_that_got_worse_is_named(make_run: MakeRun, set_outcomes: Any) -> None:
    folder = make_run()
    for stage, good in {"base": "code", "r1-rpo1": "facts"}.items():
        set_outcomes(folder, stage, lambda i, task, good=good: task == good)
    assert any(s.startswith("On code (greedy) the last model is worse") for s in shortfalls(read_run(folder)))


def test_a_reward_model_that_guesses_is_said(make_run: MakeRun, stage_folder: Any, change_json: Any) -> None:
    folder = make_run()

    def measure(done: dict[str, Any]) -> None:
        done["easy"]["overall"], done["hard"]["overall"] = accuracy([True] * 9 + [False]), accuracy([True, False] * 5)
        done["llm_judge"]["easy"]["overall"] = done["llm_judge"]["hard"]["overall"] = {"mean": 0.4, "ci95": [0.3, 0.5], "n": 10}

    change_json(stage_folder(folder, "reward-check") / "done.json", measure)
    said = shortfalls(read_run(folder))
    assert any("On hard pairs the reward model is not measurably better than guessing" in s for s in said)
    assert not any("On easy pairs" in s for s in said)


def test_a_run_that_has_just_begun_claims_nothing(make_run: MakeRun) -> None:
    assert all("reward model" in s or "as given" in s or "on base" in s for s in shortfalls(read_run(make_run(done=False))))


@given(st.integers(1, 300), st.integers(1, 300), st.floats(0, 1), st.floats(0, 1))
def test_unpaired_intervals_hold_the_difference_and_turn_around(n: int, m: int, p: float, q: float) -> None:
    a, b = round(n * p), round(m * q)
    one = {"mean": a / n, "ci95": wilson(a, n)}
    two = {"mean": b / m, "ci95": wilson(b, m)}
    there, back = unpaired_difference(one, two), unpaired_difference(two, one)
    low, high = there["ci95"]
    assert -1 - 1e-4 <= low <= there["mean"] <= high <= 1 + 1e-4
    assert abs(there["mean"] + back["mean"]) < 2e-4 and abs(low + back["ci95"][1]) < 2e-4


def test_newcombes_own_example() -> None:
    # Newcombe 1998, table II (a): 56/70 - 48/80, method 10: 0.0524 to 0.3339
    one = {"mean": 48 / 80, "ci95": wilson(48, 80)}
    two = {"mean": 56 / 70, "ci95": wilson(56, 70)}
    assert unpaired_difference(one, two) == {"mean": 0.2, "ci95": [0.0524, 0.3339]}
