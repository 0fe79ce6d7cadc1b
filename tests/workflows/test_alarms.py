"""Alarms: when they come, and that their text says what, why and what to change."""

import pytest

from gristmill.train.settings import Training
from gristmill.workflows.alarms import few_steps, few_updates, learned_by_heart, not_distilled, slower_than_asked, worse_on

GAPS = Training.model_construct(steps=None, epochs=None, batch_size=None)


def text(alarms: list[dict[str, str]]) -> str:
    return " ".join(alarm["text"] for alarm in alarms)


def test_few_steps_name_what_is_known() -> None:
    told = text(few_steps("sft", 3, 12, settings=GAPS))
    assert "sft takes 3 steps only: 12 rows. Under 20 a model hardly changes." in told and "(its `steps` say that few are meant)" in told
    known = GAPS.model_copy(update={"epochs": 1.5, "batch_size": 4})
    told = text(few_steps("sft", 3, 12, settings=known, min_steps=5))
    assert "12 rows, 1.5 epochs, batches of 4. Under 5" in told and "alarms.min_steps" in told
    assert not few_steps("sft", 5, 12, settings=known, min_steps=5) and not few_steps("sft", 20, 12, settings=GAPS)
    assert not few_steps("sft", 3, 12, settings=GAPS.model_copy(update={"steps": 3}))


@pytest.mark.parametrize(("updates", "alarms"), [(0, True), (4, True), (5, False), (10, False)])
def test_reinforcement_learning_that_mostly_taught_nothing(updates: int, alarms: bool) -> None:
    assert ("makes" in text(few_updates("rl", updates, 10))) == alarms


@pytest.mark.parametrize(("speed", "alarms"), [(1.0, True), (1.23, True), (1.24, False), (1.5, False)])
def test_a_child_slower_than_asked(speed: float, alarms: bool) -> None:
    assert ("1.30 were asked for" in text(slower_than_asked("child", speed, 1.3))) == alarms


@pytest.mark.parametrize(("after", "alarms"), [(0.1, False), (0.5, True), (0.9, True), (float("nan"), True)])
def test_a_distillation_that_brought_nothing(after: float, alarms: bool) -> None:
    assert ("KL 0.5" in text(not_distilled("child", 0.5, after))) == alarms


@pytest.mark.parametrize(("held_out", "alarms"), [(0.01, False), (0.03, False), (0.031, True)])
def test_a_child_that_knows_its_text_by_heart(held_out: float, alarms: bool) -> None:
    assert ("Give it more different prompts" in text(learned_by_heart("child", 0.01, held_out))) == alarms


def test_a_model_worse_by_more_than_chance() -> None:
    told = text(worse_on("rl", "the evaluation", "base", [1] * 10, [0] * 6 + [1] * 4))
    assert "rl is worse on the evaluation: -0.600" in told and "against the model as given" in told
    assert not worse_on("rl", "it", "base", [1, 1], [0, 0])  # two prompts may be chance
    assert not worse_on("rl", "it", "base", [1] * 3 + [0] * 7, [0] * 3 + [1] * 7) and not worse_on("rl", "it", "base", [], [])
