"""Reasoning in the miniature world: pairs of both modes, traces that hold, slips that are found, held-out sums by level."""

import itertools
import re
from collections import Counter

import pytest

from gristmill.data.thinking import keeps_form, split_answer, toggle_of
from gristmill.judge.programs import Verifier
from gristmill.miniature import reasoning, sums
from gristmill.miniature.world import HELD_OUT_PER_LEVEL, LONG_SUMS, World
from gristmill.sandbox.sandbox import Sandbox
from gristmill.verify.verify import EQUATION, check_truth, verify, working_holds
from gristmill.workflows.reasoning.rows import judged


@pytest.fixture(scope="module")
def world() -> World:
    return World.make()


def test_every_prompt_is_answered_in_both_modes_and_slips_are_found(world: World) -> None:
    rows = reasoning.pairs(world, 6, 6, seed=1)
    assert len(rows) == 2 * (6 * 6 + 4 * 6) and Counter(row.meta["reasoning"] for row, _ in rows) == {"on": 60, "off": 60}
    for (on, _), (off, _) in zip(rows[::2], rows[1::2], strict=True):
        assert on.messages[1:-1] == off.messages[1:-1] and (toggle_of(on.messages), toggle_of(off.messages)) == ("on", "off")
        assert all(not m.trained for m in on.messages[:-1] if m.role == "assistant")
        assert keeps_form(on.messages[-1].content, True) and keeps_form(off.messages[-1].content, False)
    with Sandbox() as sandbox:
        why = judged(rows, Verifier(sandbox).verify)
    assert {"", "wrong reply", "false step"} == set(why)
    kept = {row.messages[-2].content for (row, _), reason in zip(rows, why, strict=True) if not reason}
    assert len(kept) > 50, "nearly every prompt has a good answer in one of the modes at least"
    for (row, truth), reason in zip(rows, why, strict=True):
        trace, reply = split_answer(row.messages[-1].content)
        if reason == "false step":
            assert verify(truth or {}, reply) and not working_holds(trace), "the end is right all the same"


@pytest.mark.parametrize("level", reasoning.LEVELS)
def test_held_out_sums_have_as_many_steps_as_their_level_says(world: World, level: int) -> None:
    problems = world.levels[level]
    assert len({p.question for p in problems}) == HELD_OUT_PER_LEVEL
    for problem in problems:
        assert len(EQUATION.findall(problem.trace)) == level and working_holds(problem.trace)
        assert (
            problem.reply == f"The answer is {problem.truth['value']}." and sums.parse_question(problem.question) == problem.truth["value"]
        )
        assert not world.allowed(problem.messages)


def test_nobody_is_trained_on_what_is_held_out(world: World) -> None:
    held = {p.messages[-1].content for p in reasoning.held_out(world, HELD_OUT_PER_LEVEL, 0)}
    asked = [row.messages[-2].content for row, _ in reasoning.pairs(world, 10, 20, seed=0)]
    asked += [p.messages[-1].content for p in reasoning.prompts(world, reasoning.LEVELS, 300, on=0.7, others=0.2, seed=0)]
    assert held.isdisjoint(asked) and len(held) == 6 * HELD_OUT_PER_LEVEL
    for document in itertools.islice(world.documents(0), 300):
        assert held.isdisjoint(re.findall(r"Exercise\. (.+)", document))
    long = list(itertools.islice(world.documents(0, {LONG_SUMS: 1.0}), 300))
    asked = [question for document in long for question in re.findall(r"Exercise\. (.+)", document)]
    assert held.isdisjoint(asked) and max(len(EQUATION.findall(document)) for document in long if "Exercise" in document) == 6


def test_prompts_of_sums_say_their_steps_and_no_others_do(world: World) -> None:
    for prompt in reasoning.prompts(world, (2, 5), 40, on=0.7, others=0.3, seed=0):
        assert prompt.truth is not None
        check_truth(prompt.truth)
        assert len(prompt.truth.get("steps", ())) == (prompt.meta["level"] if prompt.task == sums.TASK else 0)


def test_prompts_of_a_stage_keep_to_its_levels_and_shares(world: World) -> None:
    found = reasoning.prompts(world, (2, 4), 400, on=0.7, others=0.25, seed=3)
    assert {p.meta["level"] for p in found if p.task == "sums"} == {2, 4}
    assert {p.task for p in found} == {"sums", "code", "lists", "followups"}
    assert all(p.truth and p.truth["kind"] != "mention" for p in found)
    assert 0.55 < sum(toggle_of(p.messages) == "on" for p in found) / 400 < 0.75
    assert found == reasoning.prompts(world, (2, 4), 400, on=0.7, others=0.25, seed=3) and len({p.id for p in found}) == 400


def test_the_same_prompts_are_held_out_in_both_modes_and_beyond_those_that_are_skipped(world: World) -> None:
    first, others = reasoning.held_out(world, 5, 3), reasoning.held_out(world, 5, 3, skip=5)
    assert len(first) == 2 * (6 * 5 + 4 * 3) and {p.messages[1:] for p in first[::2]} == {p.messages[1:] for p in first[1::2]}
    assert {p.messages for p in first}.isdisjoint(p.messages for p in others) and {p.id for p in first}.isdisjoint(p.id for p in others)
