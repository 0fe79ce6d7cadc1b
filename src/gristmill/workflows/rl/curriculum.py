"""Curriculum by pass rate: prompts that the starting model nearly always passes are left out, and the others come from easy to hard.

Source: Llama-Nemotron (2505.00949), section 5: pass rates of 8 answers, those of .75 and more filtered, batches from high to low rates.
"""

from collections.abc import Sequence

import numpy as np

from gristmill.core.errors import InputError
from gristmill.workflows.rl.recipe import Curriculum


def kept_by_rate(rates: Sequence[float], curriculum: Curriculum) -> list[int]:
    """Places of the prompts whose pass rate is at least `min_pass_rate` and below `max_pass_rate`.

    Raises:
        InputError: there is none.
    """
    kept = [i for i, rate in enumerate(rates) if curriculum.min_pass_rate <= rate < curriculum.max_pass_rate]
    if not kept:
        low, high = curriculum.min_pass_rate, curriculum.max_pass_rate
        above = sum(rate >= high for rate in rates)
        raise InputError(
            f"No prompt is left by the curriculum: of {len(rates)} the model passes {above} at a rate of {high} or more, "
            f"and {len(rates) - above} below {low}. Give other prompts, or other limits."
        )
    return kept


def curriculum_order(rates: Sequence[float], num_steps: int, size: int, *, curriculum: Curriculum, seed: int) -> list[int]:
    """Places of the prompts of all steps, one step after another.

    Where there are more prompts than places, an even choice of them; where fewer, each comes as often as another, or once more.

        jitter  sorted by pass rate and noise of `sigma`: each once, the rate falling from step to step
        paper   each step takes from every rate what a Gaussian asks for, whose centre moves from the highest to the lowest rate, and
                fills up from the rates with the most prompts left
    """
    rng = np.random.default_rng([seed, 1])
    num_places = num_steps * size
    visits = -(-num_places // len(rates))
    places_V = np.tile(np.arange(len(rates)), visits)
    if curriculum.order == "random":
        return [int(i) for i in np.concatenate([rng.permutation(len(rates)) for _ in range(visits)])[:num_places]]
    rates_V = np.asarray(rates, dtype=np.float64)[places_V]
    chosen_V = np.sort(rng.permutation(len(places_V))[:num_places])
    places_V, rates_V = places_V[chosen_V], rates_V[chosen_V]
    if curriculum.order == "jitter":
        order_V = np.argsort(-(rates_V + curriculum.sigma * rng.standard_normal(num_places)), kind="stable")
        return [int(i) for i in places_V[order_V]]
    return [int(places_V[i]) for i in _paper(rates_V, num_steps, size, sigma=curriculum.sigma, rng=rng)]


def _paper(rates_V: np.ndarray, num_steps: int, size: int, *, sigma: float, rng: np.random.Generator) -> list[int]:
    levels = np.unique(rates_V)[::-1]
    pools = [list(rng.permutation(np.flatnonzero(rates_V == level))) for level in levels]
    out: list[int] = []
    for center in np.linspace(levels[0], levels[-1], num_steps):
        weights = np.exp(-0.5 * ((levels - center) / max(sigma, 1e-6)) ** 2)
        wanted = np.floor(size * weights / weights.sum()).astype(int) if weights.sum() > 0 else np.zeros(len(levels), dtype=int)
        step = [pool.pop() for pool, num in zip(pools, wanted, strict=True) for _ in range(min(num, len(pool)))]
        while len(step) < size:
            step.append(max(pools, key=len).pop())
        rng.shuffle(step)
        out += [int(i) for i in step]
    return out
