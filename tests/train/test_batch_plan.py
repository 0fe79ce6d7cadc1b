"""The plan of batches: every sample is seen once an epoch, and the order follows from (seed, step)."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gristmill.core.errors import InputError
from gristmill.train.batch_plan import BatchPlan
from gristmill.train.settings import training_section
from gristmill.train.trainer import TrainSettings


@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=40),
    st.integers(1, 3),
    st.integers(1, 50),
    st.sampled_from(["batch_size", "batch_tokens"]),
    st.integers(0, 5),
)
def test_every_sample_is_seen_once_an_epoch(lengths: list[int], epochs: int, batch: int, unit: str, seed: int) -> None:
    batch = max(batch, max(lengths)) if unit == "batch_tokens" else batch
    plan = BatchPlan(lengths, seed=seed, epochs=epochs, **{unit: batch})
    steps = [plan.step(step) for step in range(plan.num_steps)]
    assert all(steps)
    assert Counter(index for step in steps for index in step) == Counter(dict.fromkeys(range(len(lengths)), epochs))
    # a fresh plan asked for one late step gives the same step: resuming needs no replay
    fresh = BatchPlan(lengths, seed=seed, epochs=epochs, **{unit: batch})
    assert fresh.step(plan.num_steps - 1) == steps[-1]


def test_steps_of_the_helpsteer2_recipe() -> None:
    # two epochs of 20,324 rated answers in batches of 128 are 317 steps (HelpSteer2, 2406.08673)
    assert BatchPlan([1] * 20324, seed=0, epochs=2, batch_size=128).num_steps == 317


def test_epochs_are_shuffled_differently_and_seeds_too() -> None:
    plan = BatchPlan([1] * 50, seed=0, steps=2, batch_size=50)
    other = BatchPlan([1] * 50, seed=1, steps=2, batch_size=50)
    assert plan.step(0) != plan.step(1) and plan.step(0) != other.step(0)


RAMP = ((0, 4), (10, 8), (30, 16))


def test_a_ramp_of_batch_sizes_counts_samples() -> None:
    plan = BatchPlan([1] * 20, seed=0, steps=8, batch_size=RAMP)
    sizes = [len(plan.step(step)) for step in range(8)]
    assert sizes == [4, 4, 4, 8, 8, 8, 16, 16]  # the first step that begins at sample 10 (12), and at 30 (36)
    flat = BatchPlan([1] * 20, seed=0, steps=68, batch_size=1)  # the stream is that of any other size
    assert [i for step in range(8) for i in plan.step(step)] == [i for step in range(68) for i in flat.step(step)]


@given(st.integers(1, 120), st.integers(1, 3), st.integers(0, 5))
def test_every_sample_is_seen_once_an_epoch_of_a_ramp(num: int, epochs: int, seed: int) -> None:
    plan = BatchPlan([1] * num, seed=seed, epochs=epochs, batch_size=RAMP)
    steps = [plan.step(step) for step in range(plan.num_steps)]
    assert Counter(index for step in steps for index in step) == Counter(dict.fromkeys(range(num), epochs))
    assert min(map(len, steps)) >= min(4, num * epochs) and max(map(len, steps)) < 32


def test_a_recipe_may_hold_a_ramp() -> None:
    assert training_section("sft", {"batch_size": [[0, 4], [10, 8], [30, 16]]}).batch_size == RAMP
    with pytest.raises(InputError, match="from sample 0 on and in order"):
        training_section("sft", {"batch_size": [[5, 4]]})


@pytest.mark.parametrize("ramp", [(), ((1, 4),), ((0, 4), (0, 8)), ((0, 4), (9, 0))], ids=str)
def test_what_is_no_ramp_is_refused(ramp: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(InputError, match="from sample 0 on and in order"):
        TrainSettings(steps=1, batch_size=ramp)


def test_a_sample_longer_than_a_step_is_refused() -> None:
    with pytest.raises(InputError, match="longest sample has 30 tokens"):
        BatchPlan([5, 30], seed=0, epochs=1, batch_tokens=20)
