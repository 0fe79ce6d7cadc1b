"""Open-QA pipeline: topic -> questions -> revisions, since the first questions are too short (report, section 3.2.1)."""

from collections.abc import AsyncIterator

from pydantic import Field

from gristmill.data.rows import Prompt
from gristmill.synth.pipelines.base import Inputs, Pipeline, prompt
from gristmill.synth.writer import Topic, Writer


class OpenQA(Pipeline):
    """Open questions about each topic."""

    questions: int = Field(5, gt=0, description="questions a topic")
    revisions: int = Field(2, ge=0, description="richer forms of each question, used instead of it; 0 keeps the question")

    async def write(self, writer: Writer, inputs: Inputs) -> AsyncIterator[Prompt]:
        async def about(topic: Topic) -> list[Prompt]:
            found = await writer.items("questions", self.questions, parents=[topic.id], topic=topic.text)
            if not self.revisions:
                return [prompt("open_qa", q, [topic.id]) for q in found]
            return await writer.all(found, lambda question: revise(question, topic))

        async def revise(question: Topic, topic: Topic) -> list[Prompt]:
            parents = [question.id, topic.id]
            richer = await writer.items("revise_question", self.revisions, parents=parents, question=question.text)
            return [prompt("open_qa", r, parents) for r in richer]

        async for row in writer.each(inputs.topics, about):
            yield row
