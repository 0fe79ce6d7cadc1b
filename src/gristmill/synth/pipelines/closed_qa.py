"""Closed-QA pipeline: a document -> questions and tasks about it, joined with it (report, section 3.2.1)."""

from collections.abc import AsyncIterator
from dataclasses import replace

from pydantic import Field

from gristmill.data.rows import Prompt
from gristmill.synth.pipelines.base import Inputs, Pipeline, prompt
from gristmill.synth.writer import Topic, Writer


class ClosedQA(Pipeline):
    """Questions and tasks about each document."""

    questions: int = Field(5, gt=0, description="questions a document")

    @property
    def needs(self) -> str:
        return "documents"

    async def write(self, writer: Writer, inputs: Inputs) -> AsyncIterator[Prompt]:
        async def about(document: Topic) -> list[Prompt]:
            found = await writer.items("closed_questions", self.questions, parents=[document.id], document=document.text)
            joined = writer.templates["closed_prompt"]
            texts = [(q, joined.render(document=document.text, question=q.text)) for q in found]
            return [prompt("closed_qa", replace(q, text=text, request=""), [document.id]) for q, text in texts]

        async for row in writer.each(inputs.documents, about):
            yield row
