"""Inter-rater reliability: Krippendorff's alpha, weighted kappa, bootstrap intervals over items, and Dawid-Skene.

Sources: Krippendorff, "Computing Krippendorff's alpha-reliability" (2011); Cohen (1968); Dawid and Skene (1979).
Values are whole numbers from 0 to K - 1. N items, J people, K values.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Level = Literal["nominal", "ordinal", "interval"]
Ratings = Sequence[Sequence[int | None]]  # a row an item, a column a person; None where nobody answered
Floats = NDArray[np.float64]
NUM_BOOTSTRAPS = 1000
MIN_CONFUSION_ANSWERS = 20  # of a person, below which the errors of Dawid-Skene are one number
SMOOTHING, TOLERANCE, MAX_STEPS = 0.01, 1e-6, 1000


def coincidences(ratings: Ratings, num_values: int) -> Floats:
    """Coincidence matrix of each item, (N, K, K): every ordered pair of its m values counts 1 / (m - 1). Single values count nothing."""
    out = np.zeros((len(ratings), num_values, num_values))
    for number, row in enumerate(ratings):
        counts = np.bincount([value for value in row if value is not None], minlength=num_values).astype(float)
        if (m := counts.sum()) > 1:
            out[number] = (np.outer(counts, counts) - np.diag(counts)) / (m - 1)
    return out


def alpha_of(coincidence_KK: Floats, level: Level = "ordinal") -> float | None:
    """Krippendorff's alpha, 1 - Do / De, of a coincidence matrix. None where it is not defined: no pair, or all values equal."""
    n_K = coincidence_KK.sum(1)
    n = n_K.sum()
    expected_KK = np.outer(n_K, n_K)
    distance_KK = _distance(n_K, level)
    expected = float((expected_KK * distance_KK).sum())
    if n <= 1 or expected == 0:
        return None
    return 1 - float((coincidence_KK * distance_KK).sum()) * (float(n) - 1) / expected


def _distance(n_K: Floats, level: Level) -> Floats:
    """Squared distance of each two values. Ordinal: how many answers lie between them, half of both ends' included."""
    places_K = np.arange(len(n_K), dtype=float)
    if level == "nominal":
        return 1 - np.eye(len(n_K))
    if level == "ordinal":
        places_K = np.cumsum(n_K) - n_K / 2
    return (places_K[:, None] - places_K[None, :]) ** 2


def weighted_kappa(first: Sequence[int], second: Sequence[int], num_values: int, *, weights: Literal["none", "quadratic"]) -> float | None:
    """Cohen's kappa of two people on the items that both answered, 1 - sum w O / sum w E. None where it is not defined."""
    observed_KK = np.zeros((num_values, num_values))
    np.add.at(observed_KK, (np.asarray(first, int), np.asarray(second, int)), 1.0)
    return kappa_of(observed_KK, weights=weights)


def kappa_of(observed_KK: Floats, *, weights: Literal["none", "quadratic"] = "quadratic") -> float | None:
    """Cohen's kappa of a confusion matrix. None where it is not defined: no item, or both always gave the same one value."""
    num_values = len(observed_KK)
    weight_KK = _distance(np.ones(num_values), "nominal" if weights == "none" else "interval")
    n = observed_KK.sum()
    if n == 0:
        return None
    expected = float((weight_KK * np.outer(observed_KK.sum(1), observed_KK.sum(0))).sum() / n)
    return 1 - float((weight_KK * observed_KK).sum()) / expected if expected else None


def confusions(ratings: Ratings, num_values: int) -> dict[tuple[int, int], Floats]:
    """Confusion matrix of each two people (numbers of columns, the smaller first) over the items that both answered."""
    out: dict[tuple[int, int], Floats] = {}
    for row in ratings:
        given = [(person, value) for person, value in enumerate(row) if value is not None]
        for place, (i, first) in enumerate(given):
            for j, second in given[place + 1 :]:
                out.setdefault((i, j), np.zeros((num_values, num_values)))[first, second] += 1
    return out


def mean_kappa(ratings: Ratings, num_values: int) -> float | None:
    """Quadratic kappa over all pairs of people, weighted by how many items each pair shares. None where no pair has one."""
    found = [(kappa, matrix.sum()) for matrix in confusions(ratings, num_values).values() if (kappa := kappa_of(matrix)) is not None]
    total = sum(shared for _, shared in found)
    return float(sum(kappa * shared for kappa, shared in found) / total) if found else None


@dataclass(frozen=True)
class Estimate:
    """A statistic with its 95 % bootstrap interval; None where it is not defined."""

    value: float | None
    low: float | None = None
    high: float | None = None


def bootstrap(num_items: int, statistic: Callable[[Floats], float | None], *, seed: int = 0, num: int = NUM_BOOTSTRAPS) -> Estimate:
    """Percentile bootstrap over items.

    Args:
        statistic: of the weight of each item, (N,): all ones, or how often a resample drew it.
    """
    value = statistic(np.ones(num_items))
    if value is None:
        return Estimate(None)
    rng = np.random.default_rng(seed)
    draws = (np.bincount(rng.integers(0, num_items, num_items), minlength=num_items).astype(float) for _ in range(num))
    found = [one for draw in draws if (one := statistic(draw)) is not None]
    if len(found) < num / 2:  # most resamples are constant: too little to say
        return Estimate(value)
    low, high = np.percentile(found, [2.5, 97.5])
    return Estimate(value, float(low), float(high))


def alpha(ratings: Ratings, num_values: int, level: Level = "ordinal", *, seed: int = 0) -> Estimate:
    """Krippendorff's alpha of N items by J people, with its interval over the items that at least two people answered."""
    each_NKK = coincidences(ratings, num_values)
    flat = each_NKK[each_NKK.any((1, 2))].reshape(-1, num_values * num_values)
    return bootstrap(len(flat), lambda weight_N: alpha_of((weight_N @ flat).reshape(num_values, num_values), level), seed=seed)


@dataclass(frozen=True)
class DawidSkene:
    """True values as Dawid-Skene estimates them.

    Attributes:
        probabilities: of each value of each item, (N, K).
        confusion: of each person, (J, K, K): what they say (columns) where the truth is a row.
        prior: of each value, (K,).
    """

    probabilities: Floats
    confusion: Floats
    prior: Floats


def dawid_skene(ratings: Ratings, num_values: int) -> DawidSkene:
    """Dawid-Skene by expectation maximization, from the shares of votes, until no probability moves by more than 1e-6.

    A person with fewer than 20 answers has one rate of errors (one coin), spread evenly over the wrong values.
    """
    num_people = max(map(len, ratings), default=0)
    votes_NJK = np.zeros((len(ratings), num_people, num_values))
    for item, row in enumerate(ratings):
        for person, value in enumerate(row):
            if value is not None:
                votes_NJK[item, person, value] = 1
    few_J = votes_NJK.sum((0, 2)) < MIN_CONFUSION_ANSWERS
    share_NK = votes_NJK.sum(1)
    num_votes_N1 = share_NK.sum(1, keepdims=True)
    truth_NK = np.divide(share_NK, num_votes_N1, out=np.full_like(share_NK, 1 / num_values), where=num_votes_N1 > 0)
    for _ in range(MAX_STEPS):
        prior_K = truth_NK.mean(0)
        confusion_JKK = np.einsum("nk,njl->jkl", truth_NK, votes_NJK) + SMOOTHING
        confusion_JKK /= confusion_JKK.sum(2, keepdims=True)
        right_J = np.einsum("nk,njk->j", truth_NK, votes_NJK) + SMOOTHING
        right_J /= votes_NJK.sum((0, 2)) + SMOOTHING * num_values
        for person in np.flatnonzero(few_J).tolist():
            wrong = (1 - right_J[person]) / max(1, num_values - 1)
            confusion_JKK[person] = np.eye(num_values) * (right_J[person] - wrong) + wrong
        score_NK = np.log(prior_K + 1e-300) + np.einsum("njl,jkl->nk", votes_NJK, np.log(confusion_JKK + 1e-300))
        new_NK = np.exp(score_NK - score_NK.max(1, keepdims=True))
        new_NK /= new_NK.sum(1, keepdims=True)
        moved = float(np.abs(new_NK - truth_NK).max(initial=0))
        truth_NK = new_NK
        if moved < TOLERANCE:
            break
    return DawidSkene(truth_NK, confusion_JKK, prior_K)
