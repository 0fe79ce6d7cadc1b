"""Rows of a reasoning run: answers to imitate in both modes, prompts of a stage, held-out prompts. From a world or from files."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gristmill.core.errors import InputError
from gristmill.data.readers import read_demonstrations, read_prompts
from gristmill.data.rows import Demonstration, Prompt
from gristmill.data.thinking import LINES, Mode, keeps_form, split_answer, toggle_of, with_toggle
from gristmill.data.truths import read_truth
from gristmill.miniature import reasoning, sums
from gristmill.miniature.world import HELD_OUT_PER_LEVEL, World
from gristmill.verify.verify import check_truth, working_holds
from gristmill.workflows.alignment.source import normalize_prompt
from gristmill.workflows.reasoning.recipe import ReasoningRecipe, RlStage

Truth = dict[str, Any]
NUM_WATCHED = 40  # held-out prompts that a stage of reinforcement learning is watched on


class WorldRows:
    """Rows of the miniature world."""

    def __init__(self, recipe: ReasoningRecipe):
        self._recipe, self._world, self._num = recipe, World.make(), recipe.data.num_evaluation
        if 2 * self._num > HELD_OUT_PER_LEVEL:
            raise InputError(f"data.num_evaluation is {self._num}: the miniature world has {HELD_OUT_PER_LEVEL // 2} at most.")
        tasks = (sums.TASK, *reasoning.OTHER_TASKS)
        if recipe.data.task not in ("", *tasks):
            raise InputError(f"data.task is {recipe.data.task!r}: the miniature world has {', '.join(tasks)}.")
        for stage in recipe.stages:
            if wrong := [level for level in stage.levels if level not in reasoning.LEVELS]:
                raise InputError(f"The stage {stage.name!r} asks for level {wrong[0]}: the miniature world has {reasoning.LEVELS}.")

    def demonstrations(self) -> list[tuple[Demonstration, Truth | None]]:
        """Answers in both modes, with what a program can judge them by."""
        data = self._recipe.data
        return reasoning.pairs(self._world, data.num_task, data.num_level, seed=self._recipe.seed)

    def prompts(self, stage: RlStage) -> list[Prompt]:
        """Prompts of a stage, each in one of the modes."""
        rl, levels = self._recipe.rl, stage.levels or reasoning.LEVELS
        return reasoning.prompts(self._world, levels, stage.num_prompts, on=rl.share_on, others=rl.share_others, seed=self._recipe.seed)

    def watched(self, stage: RlStage) -> list[Prompt]:
        """Held-out prompts that the evaluation does not ask, of a stage's levels."""
        levels = stage.levels or reasoning.LEVELS
        num = -(-NUM_WATCHED // len(levels))
        found = reasoning.held_out(self._world, num, 0, skip=self._num)
        return [p for p in found if p.meta["level"] in levels and p.meta["reasoning"] == "on"]

    def evaluation(self) -> list[Prompt]:
        """Held-out prompts, each in both modes."""
        return reasoning.held_out(self._world, self._num, self._num)


class FileRows:
    """Rows of a user's files, read and checked at once.

    Raises:
        InputError: a row cannot be used.
    """

    def __init__(self, recipe: ReasoningRecipe):
        data = recipe.data
        assert data.demonstrations is not None and data.prompts is not None and data.evaluation is not None
        self._recipe = recipe
        self._demonstrations = read_demonstrations(data.demonstrations)
        self._prompts = _read_prompts(data.prompts, "file")
        self._evaluation = _few(_read_prompts(data.evaluation, "human"), data.num_evaluation)
        self._truths = [_truth(row, number, data.demonstrations) for number, row in enumerate(self._demonstrations, 1)]
        for number, row in enumerate(self._demonstrations, 1):
            if toggle_of(row.messages) is None:
                raise InputError(
                    f"Row {number} of {data.demonstrations} does not say whether thinking is on: give it `reasoning` (on or off), or a "
                    f"system turn with the line {LINES['on']!r} or {LINES['off']!r}."
                )
        if data.task and data.task not in {p.task for p in self._evaluation}:
            raise InputError(f"data.task is {data.task!r}, and no row of {data.evaluation} has that `task`.")
        asked = {normalize_prompt(_plain(p)) for p in self._evaluation}
        for number, prompt in enumerate(self._prompts, 1):
            if normalize_prompt(_plain(prompt)) in asked:
                raise InputError(f"Row {number} of {data.prompts} is asked by the evaluation too: take it out of one.")

    def demonstrations(self) -> list[tuple[Demonstration, Truth | None]]:
        """Answers in both modes, with their rows' truths."""
        return list(zip(self._demonstrations, self._truths, strict=True))

    def prompts(self, stage: RlStage) -> list[Prompt]:
        """Prompts of a stage's levels, each in the mode that it says or that the seed gives it."""
        rng = random.Random(f"modes-{self._recipe.seed}-{stage.name}")
        found = [p for p in self._prompts if not stage.levels or p.meta.get("level") in stage.levels]
        if not found:
            raise InputError(f"No row of {self._recipe.data.prompts} has a `level` of the stage {stage.name!r}: {list(stage.levels)}.")
        rng.shuffle(found)
        return [
            _in_mode(p, toggle_of(p.messages) or ("on" if rng.random() < self._recipe.rl.share_on else "off"))
            for p in found[: stage.num_prompts]
        ]

    def watched(self, stage: RlStage) -> list[Prompt]:
        """The first prompts of the evaluation, with thinking on."""
        found = [p for p in self._evaluation if not stage.levels or p.meta.get("level") in stage.levels] or self._evaluation
        return [_in_mode(p, "on") for p in found[:NUM_WATCHED]]

    def evaluation(self) -> list[Prompt]:
        """Held-out prompts, each in both modes."""
        return [_in_mode(p, mode) for p in self._evaluation for mode in LINES]


def judged(rows: Sequence[tuple[Demonstration, Truth | None]], verify: Callable[[list[tuple[Truth, str]]], list[bool]]) -> list[str]:
    """Why each answer to imitate is rejected; "" for those that are kept.

    Rejected are: a form that the toggle does not ask for, a reply that its truth finds wrong, and false equations in a trace, whose
    reply may be right all the same.
    """
    known = [i for i, (_, truth) in enumerate(rows) if truth is not None]
    verdicts = dict(zip(known, verify([(rows[i][1] or {}, rows[i][0].messages[-1].content) for i in known]), strict=True))
    why = []
    for i, (row, _) in enumerate(rows):
        text = row.messages[-1].content
        if not keeps_form(text, toggle_of(row.messages) == "on"):
            why.append("form")
        elif not verdicts.get(i, True):
            why.append("wrong reply")
        else:
            why.append("" if working_holds(split_answer(text)[0]) else "false step")
    return why


def _truth(row: Demonstration, number: int, path: Path) -> Truth | None:
    """The truth of an answer to imitate, if its row has one."""
    try:
        if (truth := read_truth({"truth": row.meta.get("truth")})) is not None:
            check_truth(truth)
        return truth
    except InputError as e:
        raise InputError(f"Row {number} of {path}: {e}") from e


def _read_prompts(path: Path, origin: str) -> list[Prompt]:
    """Prompts with truths; a level is a whole number, or there is none."""
    out = []
    for number, prompt in enumerate(read_prompts(path, origin, truth=True), 1):
        level = prompt.meta.get("level")
        if level is not None and type(level) is not int:
            raise InputError(f"Row {number} of {path} has the level {level!r}: give a whole number, or none.")
        out.append(prompt if level is not None else replace(prompt, meta={k: v for k, v in prompt.meta.items() if k != "level"}))
    return out


def _few(prompts: list[Prompt], num: int) -> list[Prompt]:
    """At most `num` prompts of each level of each task."""
    seen: dict[tuple[str, Any], int] = {}
    out = []
    for prompt in prompts:
        key = prompt.task, prompt.meta.get("level")
        seen[key] = seen.get(key, 0) + 1
        if seen[key] <= num:
            out.append(prompt)
    return out


def _plain(prompt: Prompt) -> list[Any]:
    return [m for m in prompt.messages if m.role != "system"]


def _in_mode(prompt: Prompt, mode: Mode) -> Prompt:
    return replace(prompt, id=f"{prompt.id}-{mode}", messages=with_toggle(prompt.messages, mode), meta=prompt.meta | {"reasoning": mode})
