"""Constraints that are asked for are constraints that the verifier knows, and none contradicts another."""

import random

from hypothesis import given
from hypothesis import strategies as st

from gristmill.synth.pipelines.instructions import ALONE, CLASHES, CONSTRAINTS, draw_constraints
from gristmill.verify.ifeval import CHECKS, check_instructions


@given(st.integers(0, 10_000), st.integers(1, 4))
def test_what_is_drawn_can_be_checked_and_fits_together(seed: int, num: int) -> None:
    checks, words = draw_constraints(random.Random(seed), "Tell me about bees.", num)
    names = [check["id"] for check in checks]
    assert 1 <= len(names) <= num and len(set(names)) == len(names) and words
    assert len(check_instructions(checks, "An answer about bees.")) == len(names)  # and no field is missing or unknown
    assert len(names) == 1 or not ALONE & set(names)
    assert all(len(clash & set(names)) <= 1 for clash in CLASHES)


def test_every_type_of_the_verifier_is_drawn() -> None:
    assert set(CONSTRAINTS) == set(CHECKS) and len(CHECKS) == 25
    drawn = {check["id"] for seed in range(600) for check in draw_constraints(random.Random(seed), "Tell me about bees.", 3)[0]}
    assert drawn == set(CHECKS)
