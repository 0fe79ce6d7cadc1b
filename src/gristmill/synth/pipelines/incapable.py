"""Incapable-task pipeline: requests that an assistant without tools cannot fulfil, with answers that say so (report, section 3.2.5)."""

from collections.abc import AsyncIterator

from pydantic import Field

from gristmill.data.chat import Message
from gristmill.data.rows import Demonstration
from gristmill.synth.pipelines.base import Inputs, Pipeline, demonstration
from gristmill.synth.writer import Topic, Writer

LACKS = (
    "it has no access to the internet",
    "it does not know the present time, date, weather or news",
    "it cannot send messages, make calls, buy or book anything",
    "it cannot see, hear or open files that are not in the conversation",
    "it remembers nothing of other conversations",
)


class Incapable(Pipeline):
    """Requests that cannot be fulfilled, and refusals that explain why."""

    lacks: tuple[str, ...] = Field(LACKS, min_length=1, description="what the assistant lacks")
    tasks: int = Field(5, gt=0, description="requests for each of them")

    @property
    def needs(self) -> str:
        return ""

    async def write(self, writer: Writer, inputs: Inputs) -> AsyncIterator[Demonstration]:
        async def about(lack: str) -> list[Demonstration]:
            async def answer(request: Topic) -> list[Demonstration]:
                reply = await writer.reply("incapable_answer", parents=[request.id], request=request.text, lack=lack)
                talk = [Message("user", request.text), Message("assistant", reply.text)]
                return [demonstration("incapable", talk, reply.model, parents=[reply.id, request.id])]

            return await writer.all(await writer.items("incapable_tasks", self.tasks, lack=lack), answer)

        async for row in writer.each(self.lacks, about):
            yield row
