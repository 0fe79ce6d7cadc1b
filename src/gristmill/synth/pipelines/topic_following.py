"""Topic-following pipeline: an assistant with rules, and users who lead away from them (CantTalkAboutThis, 2404.03820)."""

from collections.abc import AsyncIterator

from pydantic import Field

from gristmill.data.chat import Message
from gristmill.data.rows import Demonstration
from gristmill.synth.dialogues import strip_politeness
from gristmill.synth.pipelines.base import Inputs, Pipeline, demonstration
from gristmill.synth.writer import Topic, Writer


class TopicFollowing(Pipeline):
    """Dialogues under rules that end with a distracting user turn and an answer that leads back."""

    dialogues: int = Field(50, gt=0, description="topics to write a dialogue for, at most")
    turns: int = Field(1, gt=0, description="user turns before the one that distracts")

    async def write(self, writer: Writer, inputs: Inputs) -> AsyncIterator[Demonstration]:
        async def dialogue(topic: Topic) -> list[Demonstration]:
            rules = await writer.reply("topic_rules", parents=[topic.id], topic=topic.text)
            (opening,) = await writer.items("questions", 1, parents=[topic.id, rules.id], salt="rules", topic=topic.text)
            parents, request = [topic.id, rules.id, opening.id], opening.text
            talk = [Message("system", rules.text)]
            for turn in range(self.turns):
                if turn:
                    reply = await writer.next_turn("next_turn", talk[1:], parents)
                    parents.append(reply.id)
                    request = strip_politeness(reply.text)
                talk.append(Message("user", request))
                answer = await writer.answer(talk, "answer", parents)
                talk.append(Message("assistant", answer.text))
                parents.append(answer.id)
            away = await writer.next_turn("distractor", talk[1:], parents, rules=rules.text)
            back = await writer.reply("return_to_topic", parents=[*parents, away.id], message=away.text, rules=rules.text)
            talk += [Message("user", away.text), Message("assistant", back.text)]
            return [demonstration("topic_following", talk, back.model, parents=[*parents, away.id, back.id])]

        topics = writer.random("topic_following").sample(list(inputs.topics), min(self.dialogues, len(inputs.topics)))
        async for row in writer.each(topics, dialogue):
            yield row
