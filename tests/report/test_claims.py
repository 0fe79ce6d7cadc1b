"""What a run shows: who is compared with whom, and that a failure is said out loud."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from gristmill.evaluate.stats import accuracy, wilson
from gristmill.report.claims import difference, full, predecessors, prompt_tasks, short, sign, statements, steps, unpaired
from gristmill.runs.reader import read_run

MakeRun = Callable[..., Path]

NAMES = ["demonstrations", "r1-code-sft", "r1-general-sft", "r1-dpo", "r1-rpo1", "r2-code-sft", "r2-general-sft", "r2-dpo", "r2-rpo1"]


def test_sft_is_compared_with_the_model_that_wrote_its_data() -> None:
    found = predecessors(NAMES)
    assert found["r1-code-sft"] == found["r1-general-sft"] == "demonstrations"
    assert found["r2-code-sft"] == found["r2-general-sft"] == "r1-rpo1"
    assert found["r1-dpo"] == "r1-general-sft" and found["r2-rpo1"] == "r2-dpo"
    assert "demonstrations" not in found


def test_names_for_people() -> None:
    assert [short(n) for n in NAMES[:5]] == ["demonstrations", "code SFT", "general SFT", "DPO", "RPO 1"]
    assert full("r2-rpo3") == "round 2 RPO 3" and full("r1-dpo-pairs") == "round 1 DPO pairs"


def _set(folder: Path, stage: str, outcomes: dict[str, dict[str, bool]]) -> None:
    (folder / stage / "outcomes.json").write_text(json.dumps(outcomes))


def _outcomes(folder: Path, right: Any) -> dict[str, dict[str, bool]]:
    ids = list(read_run(folder).outcomes("02-demonstrations")["greedy"])
    return {mode: {name: right(i) for i, name in enumerate(ids)} for mode in ("greedy", "sampled")}


def test_differences_are_paired_by_prompt_whatever_the_order(make_run: MakeRun) -> None:
    folder = make_run()
    before, after = _outcomes(folder, lambda i: i < 60), _outcomes(folder, lambda i: i < 66)
    after = {mode: dict(reversed(right.items())) for mode, right in after.items()}
    _set(folder, "02-demonstrations", before)
    _set(folder, "07-r1-code-sft", after)
    found = difference(read_run(folder), "02-demonstrations", "07-r1-code-sft", "greedy")
    assert found is not None
    assert found["mean"] == 0.05 and found["n"] == 120
    assert found["ci95"][0] > 0.01  # only six prompts changed: paired, that is sure; unpaired it would not be
    assert sign(unpaired(accuracy(list(before["greedy"].values())), accuracy(list(after["greedy"].values())))) == 0


def test_a_difference_on_one_task_uses_that_tasks_prompts(make_run: MakeRun) -> None:
    data = read_run(make_run())
    tasks = prompt_tasks(data)
    found = difference(data, "02-demonstrations", "08-r1-general-sft", "sampled", tasks, "sums")
    assert found is not None and found["n"] == 40


def test_every_model_but_the_first_is_compared(make_run: MakeRun) -> None:
    found = steps(read_run(make_run()))
    assert [s.name for s in found] == NAMES[1:]
    assert all(set(s.differences) == {"greedy", "sampled"} for s in found)


def test_a_stage_that_made_it_worse_and_one_that_did_nothing_are_named(make_run: MakeRun) -> None:
    folder = make_run()
    for stage, right in {"08-r1-general-sft": 100, "10-r1-dpo": 60, "12-r1-rpo1": 61}.items():
        _set(folder, stage, _outcomes(folder, lambda i, right=right: i < right))
    said = statements(read_run(folder))
    assert any(s.startswith("Round 1 DPO is worse than round 1 general SFT: greedy -0.333") for s in said)
    assert any(s.startswith("Round 1 RPO 1 did not measurably improve on round 1 DPO: greedy +0.008") for s in said)
    assert not any("Round 1 general SFT" in s for s in said)


def test_a_last_model_that_is_not_better_is_said_first(make_run: MakeRun) -> None:
    folder = make_run()
    same = _outcomes(folder, lambda i: i % 2 == 0)
    _set(folder, "02-demonstrations", same)
    _set(folder, "21-r2-rpo1", same)
    first = statements(read_run(folder))[0]
    assert first.startswith("The last model (round 2 RPO 1) did not measurably improve on the demonstrations alone: greedy +0.000")


def test_a_task_that_got_worse_is_named(make_run: MakeRun) -> None:
    folder = make_run()
    tasks = prompt_tasks(read_run(folder))
    ids = list(tasks)
    for stage, right in {"02-demonstrations": "code", "21-r2-rpo1": "facts"}.items():
        _set(folder, stage, {mode: {i: tasks[i] == right for i in ids} for mode in ("greedy", "sampled")})
    assert any(s.startswith("On code (greedy) the last model is worse") for s in statements(read_run(folder)))


def test_a_judge_that_guesses_is_said(make_run: MakeRun) -> None:
    said = statements(read_run(make_run()))
    assert any("On hard pairs the reward model is not measurably better than guessing" in s for s in said)
    assert not any("On easy pairs" in s for s in said)


def test_a_run_that_has_just_begun_claims_nothing(make_run: MakeRun) -> None:
    assert all("reward model" in s for s in statements(read_run(make_run(finished=False))))


@given(st.integers(1, 300), st.integers(1, 300), st.floats(0, 1), st.floats(0, 1))
def test_unpaired_intervals_hold_the_difference_and_turn_around(n: int, m: int, p: float, q: float) -> None:
    a, b = round(n * p), round(m * q)
    one = {"mean": a / n, "ci95": wilson(a, n)}
    two = {"mean": b / m, "ci95": wilson(b, m)}
    there, back = unpaired(one, two), unpaired(two, one)
    low, high = there["ci95"]
    assert -1 - 1e-4 <= low <= there["mean"] <= high <= 1 + 1e-4
    assert abs(there["mean"] + back["mean"]) < 2e-4 and abs(low + back["ci95"][1]) < 2e-4


def test_newcombes_own_example() -> None:
    # Newcombe 1998, table II (a): 56/70 - 48/80, method 10: 0.0524 to 0.3339
    one = {"mean": 48 / 80, "ci95": wilson(48, 80)}
    two = {"mean": 56 / 70, "ci95": wilson(56, 70)}
    assert unpaired(one, two) == {"mean": 0.2, "ci95": [0.0524, 0.3339]}
