"""Pipeline for the user's own tasks, asked for by the task's name: a model that was trained on examples of them knows what is meant."""

from collections.abc import AsyncIterator
from dataclasses import replace

from pydantic import Field

from gristmill.data.rows import Prompt
from gristmill.synth.pipelines.base import Inputs, Pipeline, prompt
from gristmill.synth.writer import Topic, Writer


class ByTask(Pipeline):
    """Prompts by task."""

    tasks: tuple[str, ...] = Field((), description="names of tasks; none: those of the run's demonstrations")
    prompts: int = Field(500, gt=0, description="prompts asked for, a task")
    max_tokens: int = Field(96, gt=0, description="tokens of a prompt, at most")

    @property
    def needs(self) -> str:
        return "" if self.tasks else "tasks"

    async def write(self, writer: Writer, inputs: Inputs) -> AsyncIterator[Prompt]:
        template = writer.templates["task_prompt"]
        sampling = replace(template.sampling, max_tokens=self.max_tokens)

        async def one(entry: tuple[str, int]) -> list[Prompt]:
            task, number = entry
            reply = await writer.reply("task_prompt", salt=number, sampling=sampling, task=task)
            return [prompt(task, Topic(reply.text, reply.id, reply.model, request=reply.request), [])]

        tasks = self.tasks or inputs.tasks
        async for row in writer.each(((task, number) for task in tasks for number in range(self.prompts)), one):
            yield row
