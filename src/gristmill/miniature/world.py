"""The miniature world: deterministic by seed, every truth known.

Who may look at the truth: the simulated annotators of the small human set, verifiers of sums, code and lists, and the evaluation on
held-out prompts. Nothing else.
"""

import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from gristmill.data.chat import Conversation
from gristmill.miniature import code, facts, followups, lists, sums
from gristmill.miniature.problem import Problem, pick

TASKS = (facts.TASK, sums.TASK, code.TASK, lists.TASK, followups.TASK)

# How a person asks the model to write a prompt, and to name a topic. The demonstrations teach both.
TOPIC_REQUEST = {
    "facts": "Name a land.",
    "sums": "Name a thing to count.",
    "code": "Name a kind of input for a function.",
}
PROMPT_REQUEST = {
    "facts": "Write a question about {topic}.",
    "sums": "Write a word sum about {topic}.",
    "code": "Write a coding task about {topic}.",
    "lists": "Write a list request about {topic}.",
}
NEXT_REQUEST = "Asked: {question}\nSaid: {answer}\nWrite the next question."


HELD_OUT_PER_TASK, HELD_OUT_PER_LEVEL = 150, 60
# Kinds of documents, and up to which share of them each goes.
KINDS = {"facts": 0.24, "sums": 0.56, "code": 0.72, "lists": 0.87, "followups": 1.0}
LONG_SUMS = "long_sums"  # a kind that is drawn only where weights name it: sums of as many operations as runs that think have
QUESTION = re.compile(r"(?:Question|Exercise|Asked)[:.] (.+?)(?: Reply|\n|$)")
SPEAKER = re.compile(r"^(?:Asked|Said): ", re.M)


@dataclass(frozen=True)
class World:
    """Sampler of problems and documents of all tasks, with the held-out problems.

    Attributes:
        held_out: problems of each task that only the evaluation may ask: their texts occur in no document and no human row.
        reserved: the texts of all that is held out.
        levels: held-out sums by their number of operations, more than documents and human rows have.
    """

    lands: facts.Lands
    held_out: dict[str, list[Problem]]
    reserved: frozenset[str]
    levels: dict[int, list[Problem]] = field(default_factory=dict)

    @staticmethod
    def make(seed: int = 0) -> "World":
        """The world of this seed. Another seed is another world; the shipped Base knows world 0."""
        empty = World(facts.Lands.make(seed), {}, frozenset())
        rng = random.Random(f"held-out-{seed}")
        held_out: dict[str, list[Problem]] = {}
        reserved: set[str] = set()
        for task in TASKS:
            problems = held_out[task] = []
            while len(problems) < HELD_OUT_PER_TASK:
                problem = empty.sample(rng, task)
                text = prompt_text(problem.messages)
                if text not in reserved and not _asks(problem.messages, reserved):
                    reserved.add(text)
                    problems.append(problem)
        rng = random.Random(f"held-out-levels-{seed}")
        levels: dict[int, list[Problem]] = {level: [] for level in sums.ALL_LEVELS}
        for level, problems in levels.items():
            while len(problems) < HELD_OUT_PER_LEVEL:
                problem = sums.sample(rng, level)
                if problem.question not in reserved:
                    reserved.add(problem.question)
                    problems.append(problem)
        return World(empty.lands, held_out, frozenset(reserved), levels)

    def allowed(self, messages: Conversation) -> bool:
        """Whether a conversation keeps clear of the held-out texts, in each of its user turns and as a whole."""
        asked = messages[:-1] if messages[-1].role == "assistant" else messages
        return prompt_text(asked) not in self.reserved and not _asks(asked, self.reserved)

    def draw(self, rng: random.Random, task: str) -> Problem:
        """A random problem of a task that is not held out."""
        while True:
            problem = self.sample(rng, task)
            if self.allowed(problem.messages):
                return problem

    def sample(self, rng: random.Random, task: str) -> Problem:
        """A random problem of a task."""
        if task == facts.TASK:
            return self.lands.sample(rng)
        if task == sums.TASK:
            return sums.sample(rng)
        if task == code.TASK:
            return code.sample(rng)
        if task == lists.TASK:
            return lists.sample(rng)
        return followups.sample(rng, self.lands)

    def documents(self, seed: int, weights: Mapping[str, float] | None = None) -> Iterator[str]:
        """An endless stream of pretraining documents.

        Args:
            weights: shares of the kinds of documents (`KINDS`, LONG_SUMS); default the Base model's.
        """
        rng = random.Random(f"documents-{seed}")
        while True:
            kind = "" if weights is None else rng.choices(list(weights), list(weights.values()))[0]
            document = self._document(rng, kind)
            talk = SPEAKER.sub("", document.removeprefix("Talk.\n").rsplit("\nSaid: ", 1)[0])  # up to its last answer
            if self.reserved.isdisjoint([*QUESTION.findall(document), talk]):
                yield document

    def _document(self, rng: random.Random, kind: str = "") -> str:
        if not kind:
            drawn = rng.random()
            kind = next((name for name, bound in KINDS.items() if drawn < bound), "followups")
        if kind == "facts":
            return self.lands.document(rng)
        if kind == "sums":
            return sums.document(rng)
        if kind == LONG_SUMS:
            return sums.document(rng, sums.ALL_LEVELS)
        if kind == "code":
            return code.document(rng)
        if kind == "lists":
            return lists.document(rng)
        return followups.document(rng, self.lands)

    def verifier(self, task: str, messages: Conversation) -> dict[str, Any] | None:
        """What a program can check of an answer to a prompt that anyone may have written; None when nothing can be.

        Facts have no verifier: whether a told fact is true is for the reward model to judge.
        """
        question = messages[-1].content
        if task == sums.TASK:
            value = sums.parse_question(question)
            return None if value is None else {"kind": "number", "value": value, "working": True}
        if task == code.TASK:
            return code.parse_question(question)
        if task == lists.TASK:
            return lists.parse_question(question)
        if task == followups.TASK:
            return followups.parse_question(messages)
        return None

    def checkable(self, task: str, messages: Conversation) -> bool:
        """Whether a task's prompts are judged by a program (then one that no verifier understands is worthless)."""
        if task == followups.TASK:
            return not any(messages[-1].content.strip() in wordings for wordings in followups.NEXT_FACT.values())
        return task != facts.TASK


def writing_problem(world: World, rng: random.Random) -> tuple[str, str]:
    """A request to write a prompt (or to name a topic) and a good reply, for the demonstrations."""
    task = pick(rng, TASKS)
    problem = world.draw(rng, task)
    if task == followups.TASK:
        asked, said = problem.messages[0].content, problem.messages[1].content
        return NEXT_REQUEST.format(question=asked, answer=said), problem.question
    if task in TOPIC_REQUEST and rng.random() < 0.2:
        return TOPIC_REQUEST[task], problem.topic
    return PROMPT_REQUEST[task].format(topic=problem.topic), problem.question


def prompt_text(messages: Conversation) -> str:
    """A prompt as one text, for comparing prompts."""
    return "\n".join(m.content.strip() for m in messages)


def _asks(messages: Conversation, texts: frozenset[str] | set[str]) -> bool:
    return any(m.role == "user" and m.content.strip() in texts for m in messages)
