"""Curriculum by pass rate: who is left out, and orders from easy to hard."""

import numpy as np
import pytest

from gristmill.core.errors import InputError
from gristmill.workflows.rl.curriculum import curriculum_order, kept_by_rate
from gristmill.workflows.rl.recipe import Curriculum


def rates_of(num: int = 4000) -> list[float]:
    """Pass rates of 8 answers, below .75."""
    rng = np.random.default_rng(0)
    return [float(rate) for rate in rng.binomial(8, rng.beta(1.2, 1.2, num)) / 8 if rate < 0.75]


def drift(order: list[int], rates: list[float], size: int) -> float:
    """Sum of all upward moves of the steps' mean pass rate; 0 where it only falls."""
    means = [float(np.mean([rates[i] for i in order[k : k + size]])) for k in range(0, len(order), size)]
    return sum(max(0.0, b - a) for a, b in zip(means, means[1:], strict=False))


def test_what_is_too_easy_is_left_out() -> None:
    assert kept_by_rate([1.0, 0.75, 0.5, 0.0], Curriculum()) == [2, 3]
    assert kept_by_rate([1.0, 0.75, 0.5, 0.0], Curriculum(min_pass_rate=0.1, max_pass_rate=1.1)) == [0, 1, 2]
    with pytest.raises(InputError, match="of 2 the model passes 1 at a rate of 0.75 or more, and 1 below 0.2"):
        kept_by_rate([1.0, 0.1], Curriculum(min_pass_rate=0.2))


def test_jitter_takes_each_once_and_never_goes_back_to_easier_steps() -> None:
    rates = rates_of()
    size, steps = 72, len(rates_of()) // 72
    order = curriculum_order(rates, steps, size, curriculum=Curriculum(), seed=0)
    assert len(order) == steps * size == len(set(order)) and drift(order, rates, size) < 1e-9
    assert 0.02 < np.mean([np.std([rates[i] for i in order[k : k + size]]) for k in range(0, len(order), size)]) < 0.08


def test_the_form_of_the_paper_takes_each_once_and_ends_with_what_is_left() -> None:
    rates = rates_of()
    size, steps = 72, len(rates_of()) // 72
    order = curriculum_order(rates, steps, size, curriculum=Curriculum(order="paper", sigma=0.15), seed=0)
    assert len(order) == len(set(order)) == steps * size and drift(order, rates, size) > 0.1
    first, last = (np.mean([rates[i] for i in part]) for part in (order[: 5 * size], order[-15 * size : -10 * size]))
    assert first > last


@pytest.mark.parametrize("name", ["jitter", "paper", "random"])
def test_few_prompts_come_again_equally_often(name: str) -> None:
    order = curriculum_order([0.5, 0.25, 0.0], 5, 2, curriculum=Curriculum(order=name), seed=0)  # type: ignore[arg-type]
    counts = [order.count(i) for i in range(3)]
    assert len(order) == 10 and min(counts) >= 2 and max(counts) <= 4
    assert order == curriculum_order([0.5, 0.25, 0.0], 5, 2, curriculum=Curriculum(order=name), seed=0)  # type: ignore[arg-type]
