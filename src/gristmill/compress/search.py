"""Architecture search: of every layer one choice, so that the sum of scores is least and time, memory and parameters keep to limits.

A mixed-integer program, solved by HiGHS; a greedy and a random search beside it, to compare with. Source: Puzzle (arXiv 2411.19146),
section 2 and appendix. Everything is a share of the parent's: a limit of 0.5 is half of what the parent takes. Indices: layer i, choice j.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec

import numpy as np

from gristmill.core.echo import silenced
from gristmill.core.errors import InputError

Architecture = tuple[int, ...]  # of every layer its choice
LIMITS = ("time", "memory", "parameters")
TOLERANCE = 1e-9
RANDOM_DRAWS = 20_000


@dataclass(frozen=True)
class Problem:
    """Scores and costs of every choice; the parent's own is the first of each layer.

    Attributes:
        scores: [i][j], less is better.
        costs: by the names of LIMITS: [i][j], shares of the parent's whole cost that the layer takes less than its own (so at most 0,
            but for what was measured with noise).
        empty: the architecture that leaves no layer, which is no child; () where the space holds none.
    """

    scores: Sequence[np.ndarray]
    costs: Mapping[str, Sequence[np.ndarray]]
    empty: Architecture = ()

    @property
    def num_layers(self) -> int:
        return len(self.scores)

    def score(self, architecture: Architecture) -> float:
        """Sum of the layers' scores."""
        return float(sum(scores[j] for scores, j in zip(self.scores, architecture, strict=True)))

    def cost(self, name: str, architecture: Architecture) -> float:
        """Predicted share of the parent's cost."""
        return 1.0 + float(sum(costs[j] for costs, j in zip(self.costs[name], architecture, strict=True)))

    def least(self, name: str) -> float:
        """The smallest share that any architecture reaches."""
        costs = self.costs[name]
        best = tuple(int(of_layer.argmin()) for of_layer in costs)
        next_best = min(float(np.partition(of_layer, 1)[1] - of_layer.min()) for of_layer in costs) if best == self.empty else 0.0
        return self.cost(name, best) + next_best


@dataclass(frozen=True)
class Limits:
    """Largest shares of the parent's time a token, memory and parameters; 1 or more is no limit."""

    time: float = 1.0
    memory: float = 1.0
    parameters: float = 1.0
    earlier: tuple[Architecture, ...] = field(default=())  # solutions that a new one must differ from
    alpha: float = 0.8  # the share of layers that it may have in common with each

    def active(self) -> dict[str, float]:
        """The limits that limit anything."""
        return {name: value for name in LIMITS if (value := getattr(self, name)) < 1}

    def hold(self, problem: Problem, architecture: Architecture) -> bool:
        """Whether an architecture is a child that keeps to them."""
        return architecture != problem.empty and all(
            problem.cost(name, architecture) <= value + TOLERANCE for name, value in self.active().items()
        )


def check_solver() -> None:
    """InputError where scipy is not installed."""
    if find_spec("scipy") is None:
        raise InputError("The search needs scipy: install gristmill[compress].")


def solve(problem: Problem, limits: Limits) -> Architecture | None:
    """The architecture of the least score within the limits; None where there is none."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    sizes = [len(scores) for scores in problem.scores]
    starts = np.cumsum([0, *sizes])
    one_a_layer = np.zeros((len(sizes), starts[-1]))
    for i, start in enumerate(starts[:-1]):
        one_a_layer[i, start : start + sizes[i]] = 1
    constraints = [LinearConstraint(one_a_layer, 1, 1)]
    for name, value in limits.active().items():
        constraints.append(LinearConstraint(np.concatenate(problem.costs[name])[None], -np.inf, value - 1 + TOLERANCE))
    unlike = [(earlier, limits.alpha * len(sizes)) for earlier in limits.earlier]
    for other, most in [*unlike, *([(problem.empty, len(sizes) - 1)] if problem.empty else [])]:
        same = np.zeros((1, starts[-1]))
        same[0, [start + j for start, j in zip(starts, other, strict=False)]] = 1
        constraints.append(LinearConstraint(same, -np.inf, most))
    with silenced(1):  # HiGHS prints lines of its own on some problems
        found = milp(
            np.concatenate(problem.scores),
            integrality=np.ones(starts[-1]),
            bounds=Bounds(0, 1),
            constraints=constraints,
            options={"mip_rel_gap": 0.0},
        )
    if found.x is None:
        return None
    return tuple(int(np.argmax(found.x[start : start + size])) for start, size in zip(starts, sizes, strict=False))


def check_feasible(problem: Problem, limits: Limits) -> None:
    """InputError where no architecture keeps to the limits; it names the nearest one that does."""
    if solve(problem, limits) is not None:
        return
    for name, value in limits.active().items():
        if (least := problem.least(name)) > value + TOLERANCE:
            if name == "time":
                raise InputError(
                    f"A speed of {1 / value:.2f}x is out of reach: the search space ends at {1 / least:.2f}x, since embeddings, output "
                    "matrix and sampling are a part that no choice removes. "
                    f"Ask for at most --speed {np.floor(100 / least) / 100:.2f}, or widen space."
                )
            raise InputError(
                f"target.{name} {value:.3g} is out of reach: the search space ends at {least:.3g} of the parent's. "
                "Raise it, or widen space."
            )
    others = Limits(memory=limits.memory, parameters=limits.parameters)
    fastest = solve(_fastest(problem), others) if limits.time < 1 else None
    near = "" if fastest is None else f": with the others, the fastest child is {1 / problem.cost('time', fastest):.2f}x"
    raise InputError(f"The limits of target contradict each other{near}. Raise one of them.")


def _fastest(problem: Problem) -> Problem:
    return Problem(problem.costs["time"], problem.costs, problem.empty)


def greedy(problem: Problem, limits: Limits) -> Architecture | None:
    """Greedy search: layers in the order of their mean score, each with an equal share of what is to be saved, and the best choice
    that saves it; what a layer saves too much or too little is the next ones'. None where that does not keep to the limits.
    """
    order = np.argsort([scores[1:].mean() if len(scores) > 1 else np.inf for scores in problem.scores], kind="stable")
    due = {name: (1 - value) / problem.num_layers for name, value in limits.active().items()}
    owed = dict.fromkeys(due, 0.0)
    chosen = [0] * problem.num_layers
    for i in order:
        for name in due:
            owed[name] += due[name]
        saved = {name: -problem.costs[name][i] for name in due}
        fits, total = np.ones(len(problem.scores[i]), bool), np.zeros(len(problem.scores[i]))
        for name in due:
            fits &= saved[name] >= owed[name] - TOLERANCE
            total += saved[name]
        # where nothing saves enough, what saves most: the debt goes on to the next layer
        best = int(np.where(fits, problem.scores[i], np.inf).argmin() if fits.any() else total.argmax())
        chosen[i] = best
        for name in due:
            owed[name] -= float(saved[name][best])
    return tuple(chosen) if limits.hold(problem, tuple(chosen)) else None


def random_architectures(problem: Problem, limits: Limits, count: int, seed: int) -> list[Architecture]:
    """Random architectures within the limits, of many drawn those that come closest to the limit of time."""
    rng = np.random.default_rng(seed)
    drawn = np.stack([rng.integers(len(scores), size=RANDOM_DRAWS) for scores in problem.scores], axis=1)
    costs = {name: np.ones(RANDOM_DRAWS) for name in LIMITS}
    for name in LIMITS:
        for i, of_layer in enumerate(problem.costs[name]):
            costs[name] += of_layer[drawn[:, i]]
    fits = (drawn != np.array(problem.empty)).any(1) if problem.empty else np.ones(RANDOM_DRAWS, bool)
    for name, value in limits.active().items():
        fits &= costs[name] <= value + TOLERANCE
    nearest = np.flatnonzero(fits)[np.argsort(-costs["time"][fits], kind="stable")]
    return list(dict.fromkeys(tuple(map(int, drawn[n])) for n in nearest[: 4 * count]))[:count]
