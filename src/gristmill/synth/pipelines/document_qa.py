"""Document-QA pipeline: a document -> questions that it answers -> answers that quote it (report, section 3.2.5)."""

from collections.abc import AsyncIterator

from pydantic import Field

from gristmill.data.chat import Message
from gristmill.data.rows import Demonstration
from gristmill.synth.pipelines.base import Inputs, Pipeline, demonstration
from gristmill.synth.writer import Topic, Writer


class DocumentQA(Pipeline):
    """Questions with answers from each document."""

    questions: int = Field(5, gt=0, description="questions a document")

    @property
    def needs(self) -> str:
        return "documents"

    async def write(self, writer: Writer, inputs: Inputs) -> AsyncIterator[Demonstration]:
        async def about(document: Topic) -> list[Demonstration]:
            found = await writer.items("document_questions", self.questions, parents=[document.id], document=document.text)

            async def answer(question: Topic) -> list[Demonstration]:
                parents = [question.id, document.id]
                reply = await writer.reply("document_answer", parents=parents, document=document.text, question=question.text)
                asked = writer.templates["closed_prompt"].render(document=document.text, question=question.text)
                talk = [Message("user", asked), Message("assistant", reply.text)]
                return [demonstration("document_qa", talk, reply.model, parents=[reply.id, *parents])]

            return await writer.all(found, answer)

        async for row in writer.each(inputs.documents, about):
            yield row
