"""Genetic-Instruct pipeline: programming tasks evolve by mutation and crossover under a judge of fitness (report, section 3.2.4)."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from gristmill.data.chat import Message
from gristmill.data.rows import Demonstration
from gristmill.synth.parsing import normalize
from gristmill.synth.pipelines.base import Inputs, Pipeline, demonstration
from gristmill.synth.writer import ParseError, Reply, Topic, Writer

EXAMPLES = 3  # tasks of the population that a mutation is shown


@dataclass(frozen=True)
class _Birth:
    kind: str
    parents: list[Topic]
    salt: str


class Genetic(Pipeline):
    """Programming tasks with solutions, several colonies of them."""

    colonies: int = Field(2, gt=0, description="populations that evolve apart")
    generations: int = Field(3, gt=0)
    births: int = Field(8, gt=0, description="tasks made in each generation of a colony")
    seeds: int = Field(8, gt=0, description="first tasks of a colony, from the recipe's prompts or written for its topics")

    @property
    def needs(self) -> str:
        return "topics or prompts"

    async def write(self, writer: Writer, inputs: Inputs) -> AsyncIterator[Demonstration]:
        first = [Topic(p.messages[0].content, p.id, p.origin) for p in inputs.prompts if len(p.messages) == 1]
        if not first:
            topics = writer.random("genetic").sample(list(inputs.topics), min(len(inputs.topics), self.colonies * self.seeds))
            each = -(-self.colonies * self.seeds // max(1, len(topics)))
            first = await writer.all(
                topics, lambda t: writer.items("python_problems_beginner", each, parents=[t.id], salt="genetic", topic=t.text)
            )
        known = {normalize(task.text) for task in first}
        for generation in range(self.generations):
            # A generation is born from the whole one before it, in a stated order, so that a run can be taken up again.
            colonies = [first[colony :: self.colonies] for colony in range(self.colonies)]
            births = [
                birth for number, colony in enumerate(colonies) if colony for birth in self._births(writer, generation, number, colony)
            ]
            children = await writer.all(births, lambda birth: self._live(writer, birth))
            for task, row in children:
                if normalize(task.text) not in known:
                    known.add(normalize(task.text))
                    first.append(task)
                    yield row

    def _births(self, writer: Writer, generation: int, colony: int, tasks: list[Topic]) -> list[_Birth]:
        rng = writer.random("births", generation, colony)
        out = []
        for number in range(self.births if tasks else 0):
            kind = rng.choice(["code_mutation", "code_harder", "code_crossover"])
            num = min(len(tasks), {"code_mutation": EXAMPLES, "code_harder": 1, "code_crossover": 2}[kind])
            if kind == "code_crossover" and num < 2:
                kind, num = "code_harder", 1
            out.append(_Birth(kind, rng.sample(tasks, num), f"{generation}/{colony}/{number}"))
        return out

    async def _live(self, writer: Writer, birth: _Birth) -> list[tuple[Topic, Demonstration]]:
        ids, texts = [task.id for task in birth.parents], [task.text for task in birth.parents]
        if birth.kind == "code_mutation":
            slots: dict[str, Any] = {"examples": "\n\n".join(f"{n}. {text}" for n, text in enumerate(texts, 1))}
        elif birth.kind == "code_harder":
            slots = {"task": texts[0]}
        else:
            slots = {"first": texts[0], "second": texts[1]}
        child: Reply = await writer.reply(birth.kind, parents=ids, salt=birth.salt, **slots)
        solution = await writer.reply("code_solution", parents=[child.id], task=child.text)
        fit, judged = await writer.yes("code_fitness", parents=[child.id, solution.id], task=child.text, solution=solution.text)
        if not fit:
            raise ParseError("not fit")
        talk = [Message("user", child.text), Message("assistant", solution.text)]
        row = demonstration("genetic", talk, solution.model, parents=[solution.id, child.id, judged.id, *ids])
        return [(Topic(child.text, child.id), row)]
