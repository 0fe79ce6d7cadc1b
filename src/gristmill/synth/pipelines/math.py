"""Math pipeline: school levels -> topics -> subtopics and classified entities -> problems (report, section 3.2.1)."""

from collections.abc import AsyncIterator
from typing import Literal

from pydantic import Field

from gristmill.data.rows import Prompt
from gristmill.synth.pipelines.base import Inputs, Pipeline, prompt
from gristmill.synth.pipelines.topics import deduplicate, own_topics
from gristmill.synth.writer import Topic, Writer

LEVELS = ("elementary school", "middle school", "high school", "university")
FORMS = {"general": "math_problems", "beginner": "math_problems_beginner"}


class Math(Pipeline):
    """Problems in mathematics."""

    levels: tuple[str, ...] = Field(LEVELS, min_length=1, description="school levels that topics are named for")
    topics: int = Field(5, ge=0, description="topics a level")
    subtopics: int = Field(3, ge=0, description="subtopics a topic, used beside it")
    problems: int = Field(3, gt=0, description="problems a topic and form")
    forms: tuple[Literal["general", "beginner"], ...] = Field(("general", "beginner"), min_length=1)
    own: tuple[str, ...] = Field((), description="topics of your own, used beside those")

    @property
    def needs(self) -> str:
        return "" if self.topics or self.own else "entities"

    @property
    def reads(self) -> set[str]:
        return {"entities"}

    async def write(self, writer: Writer, inputs: Inputs) -> AsyncIterator[Prompt]:
        async def classify(entity: Topic) -> list[Topic]:
            fits, _ = await writer.yes("math_entity", parents=[entity.id], entity=entity.text)
            return [entity] if fits else []

        async def problems(entry: tuple[Topic, str]) -> list[Prompt]:
            topic, form = entry
            found = await writer.items(FORMS[form], self.problems, parents=[topic.id], topic=topic.text)
            return [prompt("math", p, [topic.id]) for p in found]

        broad = await writer.all(self.levels, lambda level: writer.items("math_topics", self.topics, level=level)) if self.topics else []
        topics = [*own_topics(self.own), *broad, *await writer.all(inputs.entities, classify)]
        if self.subtopics:
            topics += await writer.all(broad, lambda t: writer.items("math_subtopics", self.subtopics, parents=[t.id], topic=t.text))
        async for row in writer.each(((topic, form) for topic in deduplicate(writer, topics) for form in self.forms), problems):
            yield row
