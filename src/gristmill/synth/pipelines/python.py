"""Python pipeline: topics -> subtopics and classified entities -> problems at three levels (report, section 3.2.1)."""

from collections.abc import AsyncIterator
from typing import Literal

from pydantic import Field

from gristmill.data.rows import Prompt
from gristmill.synth.pipelines.base import Inputs, Pipeline, prompt
from gristmill.synth.pipelines.topics import deduplicate, own_topics
from gristmill.synth.writer import Topic, Writer


class Python(Pipeline):
    """Programming problems."""

    topics: int = Field(10, ge=0, description="topics")
    subtopics: int = Field(3, ge=0, description="subtopics a topic, used beside it")
    problems: int = Field(3, gt=0, description="problems a topic and level")
    levels: tuple[Literal["beginner", "intermediate", "advanced"], ...] = Field(("beginner", "intermediate", "advanced"), min_length=1)
    own: tuple[str, ...] = Field((), description="topics of your own, used beside those")

    @property
    def needs(self) -> str:
        return "" if self.topics or self.own else "entities"

    @property
    def reads(self) -> set[str]:
        return {"entities"}

    async def write(self, writer: Writer, inputs: Inputs) -> AsyncIterator[Prompt]:
        async def classify(entity: Topic) -> list[Topic]:
            fits, _ = await writer.yes("python_entity", parents=[entity.id], entity=entity.text)
            return [entity] if fits else []

        async def problems(entry: tuple[Topic, str]) -> list[Prompt]:
            topic, level = entry
            found = await writer.items(f"python_problems_{level}", self.problems, parents=[topic.id], topic=topic.text)
            return [prompt("python", p, [topic.id]) for p in found]

        broad = await writer.all([self.topics], lambda num: writer.items("python_topics", num)) if self.topics else []
        topics = [*own_topics(self.own), *broad, *await writer.all(inputs.entities, classify)]
        if self.subtopics:
            topics += await writer.all(broad, lambda t: writer.items("python_subtopics", self.subtopics, parents=[t.id], topic=t.text))
        async for row in writer.each(((topic, level) for topic in deduplicate(writer, topics) for level in self.levels), problems):
            yield row
