"""Writing-task pipeline: topic x kind of text -> tasks -> revisions (report, section 3.2.1)."""

from collections.abc import AsyncIterator

from pydantic import Field

from gristmill.data.rows import Prompt
from gristmill.synth.pipelines.base import Inputs, Pipeline, prompt
from gristmill.synth.pipelines.topics import own_topics
from gristmill.synth.writer import Topic, Writer

KINDS = ("essay", "letter", "newsletter", "short story", "poem", "speech", "news report", "review", "blog post", "set of instructions")


class Writing(Pipeline):
    """Requests to write a text of some kind about each topic."""

    kinds: tuple[str, ...] = Field(KINDS, min_length=1, description="kinds of text")
    kinds_per_topic: int = Field(2, gt=0, description="of them, drawn for each topic")
    own: tuple[str, ...] = Field((), description="topics of your own for these tasks, instead of the run's")
    tasks: int = Field(2, gt=0, description="tasks a topic and kind")
    revisions: int = Field(2, ge=0, description="more demanding forms of each task, used instead of it; 0 keeps the task")

    @property
    def needs(self) -> str:
        return "" if self.own else "topics"

    async def write(self, writer: Writer, inputs: Inputs) -> AsyncIterator[Prompt]:
        async def about(entry: tuple[Topic, str]) -> list[Prompt]:
            topic, kind = entry
            found = await writer.items("writing_tasks", self.tasks, parents=[topic.id], kind=kind, topic=topic.text)
            if not self.revisions:
                return [prompt("writing", t, [topic.id]) for t in found]
            return await writer.all(found, lambda task: revise(task, topic))

        async def revise(task: Topic, topic: Topic) -> list[Prompt]:
            parents = [task.id, topic.id]
            richer = await writer.items("revise_writing_task", self.revisions, parents=parents, task=task.text)
            return [prompt("writing", r, parents) for r in richer]

        def drawn(topic: Topic) -> list[str]:
            return writer.random("kinds", topic.text).sample(self.kinds, min(self.kinds_per_topic, len(self.kinds)))

        topics = own_topics(self.own) or inputs.topics
        writer.topics |= {topic.id: topic for topic in topics}
        async for row in writer.each(((topic, kind) for topic in topics for kind in drawn(topic)), about):
            yield row
