"""Agreement statistics against published and hand-derived numbers."""

import math

import numpy as np
import pytest

from gristmill.evaluate.reliability import alpha, alpha_of, bootstrap, coincidences, dawid_skene, mean_kappa, weighted_kappa

_ = None
# Krippendorff (2011), four observers and twelve units, values 1 to 5 moved to 0 to 4
EXAMPLE = [[None if v is None else v - 1 for v in row] for row in [
    [1, 1, _, 1], [2, 2, 3, 2], [3, 3, 3, 3], [3, 3, 3, 3], [2, 2, 2, 2], [1, 2, 3, 4],
    [4, 4, 4, 4], [1, 1, 2, 1], [2, 2, 2, 2], [_, 5, 5, 5], [_, _, 1, 1], [_, _, 3, _],
]]  # fmt: skip


@pytest.mark.parametrize(("level", "wanted"), [("nominal", 0.743421), ("ordinal", 0.815388), ("interval", 0.849107)])
def test_alpha_of_krippendorffs_example(level: str, wanted: float) -> None:
    found = alpha(EXAMPLE, 5, level)  # type: ignore[arg-type]
    assert found.value == pytest.approx(wanted, abs=1e-6)
    assert found.low is not None and found.high is not None and found.low < wanted < found.high


def test_coincidences_of_an_item_count_its_pairable_values() -> None:
    each = coincidences([[0, 0, 1], [2, None, None]], 3)
    # three values: ordered pairs 00 twice, 01 twice, 10 twice, each 1 / (3 - 1); a single value counts nothing
    assert each[0].tolist() == [[1, 1, 0], [1, 0, 0], [0, 0, 0]]
    assert not each[1].any()


@pytest.mark.parametrize("ratings", [[], [[3, 3], [3, 3]], [[1, None], [None, 2]]])
def test_alpha_is_undefined_without_pairs_or_without_variation(ratings: list[list[int | None]]) -> None:
    assert alpha(ratings, 5).value is None


def test_alpha_is_below_zero_for_systematic_disagreement() -> None:
    assert alpha_of(coincidences([[0, 1], [1, 0]], 2).sum(0), "nominal") == pytest.approx(-0.5)  # Do 1, De 2 x 2 x 2 / (4 x 3)


def test_weighted_kappa_by_hand() -> None:
    # O: 2 at (0, 0), 1 at (0, 1), 1 at (1, 1); margins (3, 1) and (2, 2): E off the diagonal (3 x 2 + 1 x 2) / 4 = 2; 1 - 1 / 2
    assert weighted_kappa([0, 0, 0, 1], [0, 0, 1, 1], 2, weights="none") == pytest.approx(0.5)
    # values 0 2 against 0 1 of three, w = d^2: observed 1; expected (1 x 1 + 4 x 1 + 1 x 1) / 2 with margins (1, 0, 1), (1, 1, 0)
    assert weighted_kappa([0, 2], [0, 1], 3, weights="quadratic") == pytest.approx(1 - 1 / 3)
    # 0 0 1 1 0 against 0 1 1 1 0: observed .8, chance .6 x .4 + .4 x .6
    assert weighted_kappa([0, 0, 1, 1, 0], [0, 1, 1, 1, 0], 2, weights="none") == pytest.approx((0.8 - 0.48) / 0.52)
    assert weighted_kappa([], [], 3, weights="quadratic") is None
    assert weighted_kappa([1, 1], [1, 1], 3, weights="quadratic") is None


def test_mean_kappa_weighs_pairs_by_shared_items() -> None:
    # people 0 and 1 share four items (kappa 1), 0 and 2 share two (kappa -1); 1 and 2 share the same two (kappa -1)
    ratings = [[0, 0, 1], [1, 1, 0], [0, 0, None], [1, 1, None]]
    assert mean_kappa(ratings, 2) == pytest.approx((4 * 1 - 2 - 2) / 8)
    assert mean_kappa([[1, None]], 2) is None


def test_bootstrap_covers_the_mean() -> None:
    values = np.arange(100.0)
    found = bootstrap(100, lambda weight: float(weight @ values / weight.sum()), seed=1)
    assert found.value == 49.5
    # the standard error is sqrt((100^2 - 1) / 12 / 100) = 2.89
    assert found.low == pytest.approx(49.5 - 1.96 * 2.89, abs=0.7) and found.high == pytest.approx(49.5 + 1.96 * 2.89, abs=0.7)


def test_dawid_skene_finds_the_careless_person_and_the_truth() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, 200)
    rates = (0.95, 0.9, 0.9, 0.55)
    ratings = [[int(t) if rng.random() < rate else 1 - int(t) for rate in rates] for t in truth]
    found = dawid_skene(ratings, 2)
    assert (found.probabilities.argmax(1) == truth).mean() > 0.95
    skill = found.confusion[:, [0, 1], [0, 1]].mean(1)
    assert np.abs(skill - rates).max() < 0.08
    assert math.isclose(found.prior.sum(), 1, abs_tol=1e-9)


def test_dawid_skene_of_few_answers_has_one_rate_of_errors_a_person() -> None:
    found = dawid_skene([[0, 0], [1, 1], [2, 2], [0, 1]], 3)
    for matrix in found.confusion:
        off = matrix[~np.eye(3, dtype=bool)]
        assert np.allclose(np.diag(matrix), matrix[0, 0]) and np.allclose(off, off[0])
