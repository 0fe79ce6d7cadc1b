"""Two-turn pipeline: prompts of user - assistant - user, for preference data (report, section 3.2.1)."""

from collections.abc import AsyncIterator

from pydantic import Field

from gristmill.data.chat import Message
from gristmill.data.rows import Prompt, make_id
from gristmill.synth.dialogues import strip_politeness
from gristmill.synth.pipelines.base import Inputs, Pipeline
from gristmill.synth.writer import Topic, Writer


class TwoTurn(Pipeline):
    """A first request (from the recipe's prompts, else about a topic), its answer, and the user's next request."""

    prompts: int = Field(100, gt=0, description="prompts to write")

    @property
    def needs(self) -> str:
        return "topics or prompts"

    async def write(self, writer: Writer, inputs: Inputs) -> AsyncIterator[Prompt]:
        async def follow(first: Topic) -> list[Prompt]:
            talk = [Message("user", first.text)]
            answer = await writer.answer(talk, "answer", [first.id])
            talk.append(Message("assistant", answer.text))
            request = await writer.next_turn("next_turn", talk, [answer.id, first.id])
            talk.append(Message("user", strip_politeness(request.text)))
            name = make_id("two_turn", request.id, first.id)
            parents = (request.id, answer.id, first.id, first.root or first.id)
            return [Prompt(name, "two_turn", tuple(talk), request.model, parents, request=request.request)]

        async for row in writer.each(await openings(writer, inputs, self.prompts), follow):
            yield row


async def openings(writer: Writer, inputs: Inputs, num: int) -> list[Topic]:
    """First user turns: the recipe's single-turn prompts, else questions about its topics; `num`, drawn by the seed."""
    if inputs.prompts:
        found = [Topic(p.messages[0].content, p.id, p.origin) for p in inputs.prompts if len(p.messages) == 1]
    else:
        each = -(-num // max(1, len(inputs.topics)))
        topics = writer.random("openings").sample(list(inputs.topics), min(num, len(inputs.topics)))
        found = await writer.all(topics, lambda t: writer.items("questions", each, parents=[t.id], salt="openings", topic=t.text))
    writer.random("openings", "order").shuffle(found)
    return found[:num]
