"""Reasoning in the miniature world: sums of up to six operations, which nobody does in the head, and on/off pairs for every task."""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from gristmill.data.chat import Message
from gristmill.data.rows import Demonstration, Prompt, make_id
from gristmill.data.thinking import LINES, Mode, thinking_answer, with_toggle
from gristmill.miniature import code, facts, followups, human, lists, sums
from gristmill.miniature.problem import Problem, pick
from gristmill.miniature.world import World, prompt_text

LEVELS = sums.ALL_LEVELS
OTHER_TASKS = (facts.TASK, code.TASK, lists.TASK, followups.TASK)
JUDGED_TASKS = (code.TASK, lists.TASK, followups.TASK)  # of them, those whose answers a program checks, of follow-ups all but facts
CARELESS = 0.15  # share of answers with a slip, where a program will find it


def pairs(world: World, num: int, num_sums: int, *, seed: int) -> list[tuple[Demonstration, dict[str, Any] | None]]:
    """Answers of somebody who is careless now and then: each prompt with thinking switched on, and with thinking switched off.

    Args:
        num: prompts of each task but sums.
        num_sums: prompts of each level of sums.

    Returns:
        demonstrations, with the truths that programs can judge them by.
    """
    rng = random.Random(f"reasoning-{seed}")
    asked = [_sum(world, rng, level) for level in LEVELS for _ in range(num_sums)]
    asked += [world.draw(rng, task) for task in OTHER_TASKS for _ in range(num)]
    rng.shuffle(asked)
    out: list[tuple[Demonstration, dict[str, Any] | None]] = []
    for i, problem in enumerate(asked):
        for mode in LINES:
            trace, reply = _written(rng, problem)
            answer = thinking_answer(trace, reply) if mode == "on" else reply
            before = [replace(m, trained=False) if m.role == "assistant" else m for m in problem.messages]  # its working is no reply
            turns = with_toggle(before, mode)
            meta = {"level": problem.level, "reasoning": mode}
            row = Demonstration(
                make_id("reasoning", seed, i, mode), problem.task, (*turns, Message("assistant", answer)), "human", meta=meta
            )
            out.append((row, _judged(problem)))
    return out


def _written(rng: random.Random, problem: Problem) -> tuple[str, str]:
    """Trace and reply to a problem, with a slip now and then."""
    if _judged(problem) is None or rng.random() >= CARELESS:
        return problem.trace, problem.reply
    wrong = human.wrong_answer(rng, problem)
    if problem.trace and problem.answer.startswith(problem.trace):
        trace, _, value = wrong.rpartition(" The answer is ")
        return trace, f"The answer is {value}"
    return problem.trace, wrong


def _judged(problem: Problem) -> dict[str, Any] | None:
    """The truth of a problem, where a program judges: facts are for people."""
    return problem.truth if problem.truth["kind"] != "mention" else None


def _sum(world: World, rng: random.Random, level: int) -> Problem:
    while True:
        problem = sums.sample(rng, level)
        if world.allowed(problem.messages):
            return problem


def _other(world: World, rng: random.Random) -> Problem:
    task = pick(rng, JUDGED_TASKS)
    while _judged(problem := world.draw(rng, task)) is None:
        pass
    return problem


def prompts(world: World, levels: Sequence[int], num: int, *, on: float, others: float, seed: int) -> list[Prompt]:
    """Prompts for reinforcement learning, with truths.

    Args:
        levels: of sums.
        num: how many.
        on: share of the sums with thinking switched on; of other tasks it is half.
        others: share of other tasks, which keep what they had.
    """
    rng = random.Random(f"reasoning-prompts-{seed}-{levels}")
    out = []
    for i in range(num):
        is_other = rng.random() < others
        problem = _other(world, rng) if is_other else _sum(world, rng, levels[i % len(levels)])
        mode: Mode = "on" if rng.random() < (0.5 if is_other else on) else "off"
        prompt = _prompt(problem, mode, make_id("reasoning-prompt", seed, list(levels), i))
        out.append(replace(prompt, truth=problem.truth | {"steps": _steps(problem)}) if problem.task == sums.TASK else prompt)
    return out


def held_out(world: World, num_level: int, num_task: int, *, skip: int = 0) -> list[Prompt]:
    """Held-out prompts, each with thinking on and off: sums by level, and the other tasks.

    Args:
        num_level: of each level of sums.
        num_task: of each other task.
        skip: of each kind, left out in front.
    """
    found = [p for level in LEVELS for p in world.levels[level][skip : skip + num_level]]
    found += [p for task in OTHER_TASKS for p in world.held_out[task][skip : skip + num_task]]
    return [_prompt(problem, mode, make_id("held-out", prompt_text(problem.messages), mode)) for problem in found for mode in LINES]


def _steps(problem: Problem) -> list[str]:
    """The equations of a sum's trace."""
    return [step.strip(". ") for step in problem.trace.split(". ")]


def _prompt(problem: Problem, mode: Mode, name: str) -> Prompt:
    meta = {"level": problem.level, "reasoning": mode} | ({"trace": problem.trace} if problem.task == sums.TASK else {})
    return Prompt(name, problem.task, with_toggle(problem.messages, mode), "human", (), problem.truth, meta=meta)
