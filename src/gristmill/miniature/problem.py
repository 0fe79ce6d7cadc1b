"""Problems of the miniature world: prompt, reference answer, truth."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from gristmill.data.chat import Conversation, Message


@dataclass(frozen=True, slots=True)
class Problem:
    """A question of the world with a model answer and what a checker needs to know.

    Attributes:
        task: name of the task.
        messages: the prompt, ending with a user turn.
        answer: a right and well-written answer.
        truth: what `verify.verify` needs to check an answer (JSON).
        topic: what the question is about, for prompt-writing demonstrations.
        level: difficulty, 1 is the easiest.
        others: plausible values for a wrong answer.
        trace: what one thinks before the answer; that of sums stands in the answer, in front.
    """

    task: str
    messages: Conversation
    answer: str
    truth: dict[str, Any]
    topic: str
    level: int = 1
    others: tuple[str, ...] = field(default=())
    trace: str = ""

    @property
    def question(self) -> str:
        """Text of the last user turn."""
        return self.messages[-1].content

    @property
    def reply(self) -> str:
        """The answer without its working."""
        return self.answer.removeprefix(f"{self.trace} ")


def single_turn(task: str, question: str, answer: str, *, truth: dict[str, Any], topic: str, **more: Any) -> Problem:
    """Problem of one user turn."""
    return Problem(task, (Message("user", question),), answer, truth, topic, **more)


def pick(rng: random.Random, options: Sequence[Any]) -> Any:
    """One of `options`."""
    return options[rng.randrange(len(options))]
