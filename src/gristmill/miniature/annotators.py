"""Simulated annotators: people of the miniature world who are shown a conversation and an answer, and know the truth of it.

They see what a person in the studio sees, texts alone. `human` makes the ratings that a run starts from; these rate what models wrote.
"""

import random
from typing import Any

from gristmill.data.chat import Conversation
from gristmill.data.rows import ATTRIBUTES
from gristmill.miniature import code, facts, followups
from gristmill.miniature.human import CARELESS, SPREADS, partly_right
from gristmill.miniature.world import TASKS, World
from gristmill.verify.verify import verify

MAX_STRENGTH = 3


def truth_of(world: World, messages: Conversation) -> dict[str, Any] | None:
    """What an answer to a prompt must say; None where a person could not tell either, as of programs, which nobody here runs."""
    asked = world.lands.parse_question(messages[-1].content)
    if asked is None and len(messages) == 3 and (first := world.lands.parse_question(messages[0].content)):
        question = messages[-1].content.strip()
        asked = next(((first[0], name) for name, wordings in followups.NEXT_FACT.items() if question in wordings), None)
    if asked is not None:
        land, attribute = asked
        value = world.lands.facts[land][attribute]
        return {"kind": "mention", "value": value, "not": [v for v in world.lands.values(attribute) if v != value]}
    found = (world.verifier(task, messages) for task in TASKS if task not in (facts.TASK, code.TASK))
    return next((truth for truth in found if truth is not None), None)


class SimulatedAnnotator:
    """A person with a hand of their own: noise around what a careful annotator would say, and a careless mark now and then.

    Args:
        bias: what is added to every mark, as of lenient people.
    """

    def __init__(self, world: World, seed: int, *, bias: float = 0.0, careless: float = CARELESS):
        self.world, self.bias, self.careless, self._rng = world, bias, careless, random.Random(f"annotator-{seed}")

    def rate(self, messages: Conversation, answer: str) -> dict[str, int] | None:
        """The five attributes of an answer, 0 to 4; None where this person cannot tell."""
        center = self._quality(messages, answer)
        if center is None:
            return None
        rng = self._rng
        marks = (
            rng.uniform(0, 4) if rng.random() < self.careless else c + self.bias + rng.gauss(0, spread)
            for c, spread in zip(center, SPREADS, strict=True)
        )
        return {name: min(4, max(0, round(mark))) for name, mark in zip(ATTRIBUTES, marks, strict=True)}

    def compare(self, messages: Conversation, left: str, right: str) -> int | None:
        """Which answer is better, from -3 (left by far) to 3 (right by far); None where this person cannot tell."""
        both = [self._quality(messages, text) for text in (left, right)]
        if both[0] is None or both[1] is None:
            return None
        gap = sum(b - a for a, b in zip(both[0][:3], both[1][:3], strict=True)) / 3 + self._rng.gauss(0, SPREADS[0])
        return max(-MAX_STRENGTH, min(MAX_STRENGTH, round(gap)))

    def accepts(self, messages: Conversation, answer: str) -> bool | None:
        """Whether an answer should be trained on; None where this person cannot tell."""
        truth = truth_of(self.world, messages)
        return None if truth is None else verify(truth, answer)

    def _quality(self, messages: Conversation, answer: str) -> tuple[float, float, float, float, float] | None:
        truth = truth_of(self.world, messages)
        if truth is None:
            return None
        words = answer.split()
        clear = min(1.0, 2 * len(set(words)) / len(words)) if words else 0.0  # an answer that loops says few words many times
        correctness = 4.0 if verify(truth, answer) else partly_right(truth) if clear > 0.5 else 0.2
        return correctness, correctness, 4 * clear, 1.4, min(4.0, len(answer) / 24)
