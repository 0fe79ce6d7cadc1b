"""MinHash and LSH by their theory."""

import numpy as np
import pytest

from gristmill.data import minhash


@pytest.mark.parametrize("similarity", [0.5, 0.7, 0.8, 0.9])
def test_signatures_estimate_jaccard_as_theory_says(similarity: float) -> None:
    draw = np.random.default_rng(0)
    functions, errors, true = minhash.permutations(260), [], []
    for _ in range(60):
        left = draw.integers(0, 2**64, 400, np.uint64)
        right = left.copy()
        changed = round(400 * (1 - similarity) / (1 + similarity))
        right[-changed:] = draw.integers(0, 2**64, changed, np.uint64)
        true.append(minhash.jaccard(np.sort(left), np.sort(right)))
        signature_2H = np.full((2, 260), minhash.EMPTY)
        for row, shingles in zip(signature_2H, (left, right), strict=True):
            minhash.update(row, shingles[:150], 150, *functions)  # piece by piece
            minhash.update(row, shingles[150:], 250, *functions)
        errors.append((signature_2H[0] == signature_2H[1]).mean() - true[-1])
    expected = np.sqrt(np.mean([j * (1 - j) / 260 for j in true]))
    assert true[-1] == pytest.approx(similarity, abs=0.01)
    assert abs(np.mean(errors)) < 3 * expected / np.sqrt(60)
    assert 0.7 * expected < np.sqrt(np.square(errors).mean()) < 1.3 * expected


@pytest.mark.parametrize(
    ("bands", "rows", "row"),
    [
        (20, 13, (0.0024, 0.0258, 0.1769, 0.3818, 0.6773, 0.9240, 0.9972, 1.0)),
        (14, 8, (0.0533, 0.2111, 0.5645, 0.7716, 0.9235, 0.9884, 0.9996, 1.0)),
        (25, 10, (0.0241, 0.1407, 0.5115, 0.7652, 0.9416, 0.9958, 1.0, 1.0)),
    ],
)
def test_the_s_curve(bands: int, rows: int, row: tuple[float, ...]) -> None:
    found = [minhash.candidate_probability(j, bands, rows) for j in (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)]
    assert found == pytest.approx(row, abs=1e-4)


def test_candidates_are_as_frequent_as_the_curve_says() -> None:
    draw = np.random.default_rng(1)
    agree = draw.random((4000, 112)) < 0.7  # places where two signatures of similarity .7 agree
    left = draw.integers(0, 2**32, (4000, 112), np.uint32)
    right = np.where(agree, left, draw.integers(0, 2**32, (4000, 112), np.uint32))
    met = (minhash.band_keys(left, 14, 8) == minhash.band_keys(right, 14, 8)).any(1).mean()
    expected = minhash.candidate_probability(0.7, 14, 8)
    assert abs(met - expected) < 3 * np.sqrt(expected * (1 - expected) / 4000)
