"""Data source of the miniature world, for alignment runs."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from gristmill.core.errors import InputError
from gristmill.core.progress import Progress
from gristmill.data.chat import Conversation, conversation
from gristmill.data.human import HumanData
from gristmill.data.rows import ATTRIBUTES, Demonstration, Prompt, Rated, make_id
from gristmill.miniature import code, facts, followups, human, lists, sums
from gristmill.miniature.problem import Problem
from gristmill.miniature.world import HELD_OUT_PER_TASK, TASKS, World

# Beyond these the world has too few different questions about facts.
AMOUNTS = {"num_demonstrations": 240, "num_rated_prompts": 900, "num_prompts": 1000, "num_evaluation": 100}  # unless the recipe says
LIMITS = {"num_demonstrations": 5000, "num_prompts": 4000, "num_evaluation": HELD_OUT_PER_TASK}
VALIDATION_PER_TASK = 20
PIPELINES = {"open_qa": facts.TASK, "math": sums.TASK, "python": code.TASK, "writing": lists.TASK, "two_turn": followups.TASK}


class MiniatureSource:
    """Data of world 0 in the amounts that the recipe asks for; the run's seed draws other human rows, not another world."""

    tasks = TASKS
    code_tasks = frozenset({code.TASK})

    def __init__(self, data: HumanData, seed: int):
        self._num = {name: default if getattr(data, name) is None else getattr(data, name) for name, default in AMOUNTS.items()}
        for name, max_rows in LIMITS.items():
            if self._num[name] > max_rows:
                raise InputError(f"data.{name} is {self._num[name]}: the miniature world has {max_rows} at most.")
        self.world, self._num_held_out, self._seed = World.make(), data.num_held_out_ratings, seed

    def demonstrations(self) -> list[Demonstration]:
        """Human-written conversations of all tasks and of prompt writing."""
        rows = human.demonstrations(self.world, self._num["num_demonstrations"], self._seed)
        return [Demonstration(make_id("human", self._seed, i), r["task"], conversation(r["messages"]), "human") for i, r in enumerate(rows)]

    def task(self, pipeline: str) -> str:
        """The world's task that a pipeline writes for."""
        return PIPELINES.get(pipeline, pipeline)

    def ratings(self) -> list[Rated]:
        """Rated answers, two a prompt."""
        num = self._num["num_rated_prompts"] + self._num_held_out
        rows = human.ratings(self.world, num, self._seed)
        return [
            Rated(
                make_id("rated", self._seed, i),
                r["task"],
                conversation(r["messages"]),
                tuple(float(r[a]) for a in ATTRIBUTES),
                str(r["pair"]),
            )
            for i, r in enumerate(rows)
        ]

    def prompts(self) -> list[Prompt]:
        """Collected prompts; their verifiers are read off their texts, as for prompts that a model wrote."""
        return list(self._prompts)

    @cached_property
    def _prompts(self) -> list[Prompt]:
        return self._asked("collected", human.collected(self.world, self._num["num_prompts"], self._seed))

    def drawn(self, num: int, progress: Progress) -> list[Prompt]:
        """The different prompts of `num` draws, which may be more than the world has different ones of each task."""
        problems = progress.track(human.drawn(self.world, num, self._seed), num, lambda: "prompts drawn")
        return self._asked("drawn", list({problem.messages: problem for problem in problems}.values()))

    def _asked(self, origin: str, problems: Sequence[Problem]) -> list[Prompt]:
        return [
            Prompt(make_id(origin, self._seed, i), p.task, p.messages, "file", (), self.truth(p.task, p.messages))
            for i, p in enumerate(problems)
        ]

    def evaluation(self) -> list[Prompt]:
        """Held-out prompts with truths."""
        rows = human.evaluation(self.world, self._num["num_evaluation"])
        return [
            Prompt(make_id("evaluation", i), r["task"], conversation(r["messages"]), "human", (), r["truth"]) for i, r in enumerate(rows)
        ]

    validated_on = "held-out prompts of the world that are not evaluated"

    def validation(self) -> list[Prompt]:
        """Held-out prompts beyond those of the evaluation."""
        first, num = self._num["num_evaluation"], min(VALIDATION_PER_TASK, HELD_OUT_PER_TASK - self._num["num_evaluation"])
        rows = [r for i, r in enumerate(human.evaluation(self.world, first + num)) if i % (first + num) >= first]
        return [
            Prompt(make_id("validation", i), r["task"], conversation(r["messages"]), "human", (), r["truth"]) for i, r in enumerate(rows)
        ]

    def truth(self, task: str, messages: Conversation) -> dict[str, Any] | None:
        """What a program can check of a prompt that a model wrote."""
        return self.world.verifier(task, messages)

    def checkable(self, task: str, messages: Conversation) -> bool:
        """Whether the task's prompts are for programs to check."""
        return self.world.checkable(task, messages)
