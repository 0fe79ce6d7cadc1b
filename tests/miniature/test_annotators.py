"""Simulated annotators: right and wrong answers of every task that they can judge, their noise, and what they cannot tell."""

import random

import pytest

from gristmill.data.chat import Message
from gristmill.miniature import code, facts, lists, sums
from gristmill.miniature.annotators import SimulatedAnnotator, truth_of
from gristmill.miniature.human import write
from gristmill.miniature.world import World


@pytest.fixture(scope="module")
def world() -> World:
    return World.make()


@pytest.mark.parametrize("task", [facts.TASK, sums.TASK, lists.TASK])
def test_right_answers_are_rated_above_wrong_ones(world: World, task: str) -> None:
    rng, careful = random.Random(0), SimulatedAnnotator(world, 0, careless=0)
    gaps, preferred = [], []
    for _ in range(40):
        problem = world.draw(rng, task)
        wrong = write(rng, problem, False).text
        if careful.accepts(problem.messages, wrong):
            continue
        assert careful.accepts(problem.messages, problem.answer)
        good, bad = (careful.rate(problem.messages, text) for text in (problem.answer, wrong))
        assert good is not None and bad is not None
        gaps.append(good["helpfulness"] - bad["helpfulness"])
        preferred.append(careful.compare(problem.messages, problem.answer, wrong) or 0)
    assert sum(gaps) / len(gaps) > 1 and sum(preferred) < 0  # the left one is better: below zero
    assert all(-3 <= strength <= 3 for strength in preferred)


def test_people_differ_and_programs_are_not_judged(world: World) -> None:
    problem = world.draw(random.Random(1), facts.TASK)
    marks = {tuple((SimulatedAnnotator(world, seed).rate(problem.messages, problem.answer) or {}).values()) for seed in range(20)}
    assert len(marks) > 3
    program = world.draw(random.Random(1), code.TASK)
    one = SimulatedAnnotator(world, 0)
    assert truth_of(world, program.messages) is None and one.rate(program.messages, program.answer) is None
    assert one.compare(program.messages, "a", "b") is None and one.accepts((Message("user", "Who are you?"),), "Me.") is None


def test_a_lenient_person_gives_more(world: World) -> None:
    problem = world.draw(random.Random(2), sums.TASK)
    means = []
    for bias in (-1.0, 1.0):
        one = SimulatedAnnotator(world, 3, bias=bias, careless=0)
        means.append(sum((one.rate(problem.messages, "It is 3.") or {})["helpfulness"] for _ in range(20)) / 20)
    assert means[1] > means[0] + 1
