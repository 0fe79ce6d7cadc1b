"""The search equals brute force; greedy and random keep to the limits and are no better; what is out of reach is said."""

import itertools
import os
from typing import Any

import numpy as np
import pytest
import scipy.optimize

from gristmill.compress.search import Limits, Problem, check_feasible, greedy, random_architectures, solve
from gristmill.core.errors import InputError


def problem(seed: int, num_layers: int = 3, num_choices: int = 3) -> Problem:
    """The parent's own choice has score 0 and takes the most; less costs more score."""
    rng = np.random.default_rng(seed)

    def layer(scale: float) -> np.ndarray:
        return np.append(0.0, rng.random(num_choices - 1) * scale)

    scores = [layer(1) for _ in range(num_layers)]
    costs = {name: [-layer(0.9 / num_layers) for _ in range(num_layers)] for name in ("time", "memory", "parameters")}
    return Problem(scores, costs)


@pytest.mark.parametrize("seed", range(8))
def test_the_program_equals_brute_force(seed: int) -> None:
    one, limits = problem(seed), Limits(time=0.8, memory=0.9)
    every = [a for a in itertools.product(range(3), repeat=3) if limits.hold(one, a)]
    found = solve(one, limits)
    assert found is not None and limits.hold(one, found)
    assert one.score(found) == min(map(one.score, every))


def test_the_solver_prints_nothing(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """HiGHS has lines of its own for some problems, which would stand before what `--json` prints."""
    real = scipy.optimize.milp

    def prints(*args: Any, **kwargs: Any) -> Any:
        os.write(1, b"HighsMipSolverData\n")
        return real(*args, **kwargs)

    monkeypatch.setattr(scipy.optimize, "milp", prints)
    assert solve(problem(0), Limits(time=0.8)) is not None and capfd.readouterr().out == ""


def test_without_a_limit_the_parent_is_best() -> None:
    assert solve(problem(0), Limits()) == (0, 0, 0) and problem(0).cost("time", (0, 0, 0)) == 1


def test_a_diverse_solution_differs_in_a_fifth_of_the_layers() -> None:
    one, limits = problem(1, 10), Limits(time=0.8)
    first = solve(one, limits)
    assert first is not None
    second = solve(one, Limits(time=0.8, earlier=(first,), alpha=0.8))
    assert second is not None and sum(a != b for a, b in zip(first, second, strict=True)) >= 2
    assert one.score(second) >= one.score(first)


def test_greedy_and_random_keep_to_the_limits_and_are_no_better() -> None:
    better = 0
    for seed in range(6):
        one, limits = problem(seed, 8, 5), Limits(time=0.7)
        best, other = solve(one, limits), greedy(one, limits)
        drawn = random_architectures(one, limits, 5, seed)
        assert best is not None and len(drawn) == 5 and all(limits.hold(one, a) for a in drawn)
        assert all(one.cost("time", a) > 0.65 for a in drawn), "close to the limit"
        if other is not None:
            assert limits.hold(one, other) and one.score(best) <= one.score(other)
            better += one.score(other) < np.mean([one.score(a) for a in drawn])
    assert better >= 4


@pytest.mark.parametrize("seed", range(4))
def test_a_child_without_any_layer_is_none(seed: int) -> None:
    """The last choice of each layer leaves it out and takes the least; the nearest target that is told must still hold a child."""
    drawn = problem(seed)
    costs = {name: [np.sort(of_layer)[::-1] for of_layer in ones] for name, ones in drawn.costs.items()}
    one = Problem(drawn.scores, costs, (2, 2, 2))
    children = [a for a in itertools.product(range(3), repeat=3) if a != one.empty]
    least = min(one.cost("time", a) for a in children)
    assert one.least("time") == pytest.approx(least) and least > one.cost("time", one.empty) + 1e-3
    with pytest.raises(InputError, match="out of reach"):
        check_feasible(one, Limits(time=one.cost("time", one.empty)))
    found = solve(one, Limits(time=least))
    assert found is not None and found != one.empty and one.empty not in random_architectures(one, Limits(time=least), 5, seed)


def test_what_is_out_of_reach_is_said_with_what_is_in_it() -> None:
    one = problem(0)
    with pytest.raises(InputError, match=r"A speed of 50.00x is out of reach: the search space ends at (.*)x, since embeddings") as told:
        check_feasible(one, Limits(time=0.02))
    nearest = float(str(told.value).split("--speed ")[1].split(",")[0])
    check_feasible(one, Limits(time=1 / nearest))
    with pytest.raises(InputError, match="target.memory 0.01 is out of reach"):
        check_feasible(one, Limits(memory=0.01))
    # each alone is in reach: what saves time saves no memory
    split = Problem([np.array([0.0, 1, 1])] * 2, {"time": [np.array([0, -0.3, 0])] * 2, "memory": [np.array([0, 0, -0.3])] * 2,
                                                  "parameters": [np.zeros(3)] * 2})  # fmt: skip
    with pytest.raises(InputError, match="contradict each other: with the others, the fastest child is 1.43x"):
        check_feasible(split, Limits(time=0.5, memory=0.7))
