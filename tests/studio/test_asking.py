"""What to ask next: the designs on data whose best choice is known, the random part, and projects of a run."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gristmill.core.errors import InputError
from gristmill.data.rows import Response, read_rows, write_rows
from gristmill.studio import asking
from gristmill.studio.sources import Sources


def test_a_batch_is_random_by_a_fifth_and_no_task_has_too_much() -> None:
    tasks = ["a"] * 60 + ["b"] * 60
    batch = asking.mixed(list(range(120)), tasks, num=40, seed=0)  # the strategy likes task a alone
    assert len({place for place, _ in batch}) == 40
    assert sum(not chosen for _, chosen in batch) >= 8 and [chosen for _, chosen in batch[:6]] == [False, True, True, True, True, False]
    chosen = [tasks[place] for place, by in batch if by]
    assert chosen.count("a") <= 40 and batch == asking.mixed(list(range(120)), tasks, num=40, seed=0)
    assert len(asking.mixed([0, 1], ["a", "a"], num=9, seed=0)) == 2


def test_a_task_has_at_most_twice_its_share() -> None:
    tasks = ["a"] * 100 + ["b"] * 50 + ["c"] * 50 + ["d"] * 50
    batch = asking.mixed(list(range(250)), tasks, num=40, seed=1)
    assert [tasks[place] for place, by in batch if by].count("a") == 20


def test_d_optimal_takes_directions_that_are_not_covered() -> None:
    rng = np.random.default_rng(0)
    near = [np.array([[1.0, 0.01 * rng.normal(), 0.0]]) for _ in range(20)]  # twenty times nearly the same
    far = [np.array([[0.0, 0.0, 0.9]]), np.array([[0.0, 0.8, 0.0]])]
    order = asking.d_optimal([*near, *far], num=3)
    assert {20, 21} <= set(order[:3]) and sorted(order) == list(range(22))
    x = np.stack([g[0] for g in [*near, *far]])

    def volume(chosen: list[int]) -> float:
        return float(np.linalg.slogdet(asking.RIDGE * np.eye(3) + x[chosen].T @ x[chosen])[1])

    best = max((volume([i, j, k]) for i in range(22) for j in range(i) for k in range(j)), default=0.0)
    assert volume(order[:3]) == pytest.approx(best, rel=1e-6)  # greedy is best here, by trying all triples


def test_heads_disagree_where_nobody_has_rated() -> None:
    rng = np.random.default_rng(0)
    known = np.concatenate([rng.normal(size=(200, 2)), 0.05 * rng.normal(size=(200, 1))], 1)
    heads = asking.bootstrap_heads(known, known[:, 0] + 0.1 * rng.normal(size=200), num=asking.NUM_HEADS, seed=0)
    spread = asking.disagreement(np.eye(3), heads)
    assert spread[2] > 5 * spread[:2].max()  # the third direction is hardly in the data


def test_conflict_is_a_verifier_against_the_reward_of_its_task() -> None:
    facts = [{"task": "t", "verified": v, "score": s} for v, s in ((True, 0.0), (False, 0.0), (True, 9.0), (False, 9.0))]
    found = asking.conflicts([*facts, {"task": "t", "score": 1.0}])
    assert set(asking.ranked(found)[:2]) == {0, 3} and found[4] == -np.inf


def test_conflict_chooses_only_where_there_is_something_to_conflict(sources: Sources, run_folder: Path, tmp_path: Path) -> None:
    path = run_folder / "01-answers/responses.parquet"
    rows = read_rows(path, Response)
    silent = {r.prompt for r in rows[3:]}
    write_rows(path, [replace(r, verified=None) if r.prompt in silent else r for r in rows])
    items = asking.choose_items(sources, "01-answers/responses.parquet", "rate", num=6, seed=0, strategy="conflict")
    assert {item.why for item in items if item.row_ids[0].partition("#")[0] in silent} == {"random"}
    assert len({item.prompt for item in items}) == 6
    write_rows(path, [replace(r, score=None) for r in rows])
    with pytest.raises(InputError, match="both a reward model's score and a verifier's verdict"):
        asking.choose_items(sources, "01-answers/responses.parquet", "rate", num=6, seed=0, strategy="conflict")


def test_the_newest_reward_model_is_the_last_rounds(tmp_path: Path) -> None:
    for name in ("00-r10-reward", "00-r2-reward", "01-reward"):  # the order in which they were written says nothing
        (tmp_path / name / "model").mkdir(parents=True)
        (tmp_path / name / "model" / "config.json").write_text("{}")
    assert asking.reward_folder(tmp_path) == tmp_path / "00-r10-reward" / "model"


@pytest.mark.parametrize("strategy", ["disagreement", "d-optimal"])
def test_a_run_chooses_by_its_reward_model(finished: Path, tmp_path: Path, strategy: str) -> None:
    sources = Sources(finished, tmp_path / "cache")
    name = next(s.name for s in sources.all() if s.name.endswith("r1-answers/responses.parquet"))
    kind = "pair" if strategy == "d-optimal" else "rate"
    items = asking.choose_items(sources, name, kind, num=5, seed=0, strategy=strategy)
    assert {item.why for item in items} == {strategy, "random"} and len({item.prompt for item in items}) == 5


def test_what_cannot_be_chosen_is_told(sources: Sources) -> None:
    with pytest.raises(InputError, match="no reward model"):
        asking.choose_items(sources, "01-answers/responses.parquet", "rate", num=3, seed=0, strategy="d-optimal")
    with pytest.raises(InputError, match="chosen by random, disagreement"):
        asking.choose_items(sources, "01-answers/responses.parquet", "rate", num=3, seed=0, strategy="best")
