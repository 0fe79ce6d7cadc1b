"""Registry of the prompt pipelines: the recipe section that names them, and the run of all of them."""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from pydantic import model_serializer, model_validator

from gristmill.core.config import Section
from gristmill.core.errors import InputError
from gristmill.data.rows import Demonstration, Prompt
from gristmill.synth.pipelines.base import Inputs, Pipeline
from gristmill.synth.pipelines.by_task import ByTask
from gristmill.synth.pipelines.closed_qa import ClosedQA
from gristmill.synth.pipelines.document_qa import DocumentQA
from gristmill.synth.pipelines.from_file import FromFile
from gristmill.synth.pipelines.genetic import Genetic
from gristmill.synth.pipelines.incapable import Incapable
from gristmill.synth.pipelines.instructions import Instructions
from gristmill.synth.pipelines.math import Math
from gristmill.synth.pipelines.open_qa import OpenQA
from gristmill.synth.pipelines.python import Python
from gristmill.synth.pipelines.tools import Tools
from gristmill.synth.pipelines.topic_following import TopicFollowing
from gristmill.synth.pipelines.topics import Topics
from gristmill.synth.pipelines.two_turn import TwoTurn
from gristmill.synth.pipelines.writing import Writing
from gristmill.synth.writer import Writer

Item = TypeVar("Item")


class Pipelines(Section):
    """Recipe section of the pipelines, by name. One that is not named writes nothing."""

    open_qa: OpenQA | None = None
    writing: Writing | None = None
    closed_qa: ClosedQA | None = None
    math: Math | None = None
    python: Python | None = None
    instructions: Instructions | None = None
    two_turn: TwoTurn | None = None
    by_task: ByTask | None = None
    from_file: FromFile | None = None
    topic_following: TopicFollowing | None = None
    incapable: Incapable | None = None
    document_qa: DocumentQA | None = None
    tools: Tools | None = None
    genetic: Genetic | None = None

    @model_validator(mode="before")
    @classmethod
    def _bare(cls, values: Any) -> Any:
        """A name alone, `math:`, takes the pipeline's defaults."""
        return {k: {} if v is None else v for k, v in values.items()} if isinstance(values, dict) else values

    @model_serializer(mode="wrap")
    def _named_only(self, dump: Any) -> dict[str, Any]:
        """Written out, a name alone would take the defaults."""
        return {name: values for name, values in dump(self).items() if values is not None}

    def named(self) -> dict[str, Pipeline]:
        """The pipelines of the recipe."""
        found = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: pipeline for name, pipeline in found.items() if pipeline is not None}

    def reads(self) -> set[str]:
        """Which inputs any of the pipelines starts from."""
        return set().union(*(pipeline.reads for pipeline in self.named().values()))

    def check(self, have: Sequence[str]) -> None:
        """Raise `InputError` unless every pipeline has what it starts from: topics, documents, prompts, entities or tasks."""
        for name, pipeline in self.named().items():
            if pipeline.needs and not any(need in have for need in pipeline.needs.split(" or ")):
                raise InputError(f"Pipeline {name} needs {pipeline.needs}: give them in the recipe, or take the pipeline out.")


@dataclass
class PipelineOutput:
    """Rows of all pipelines, in an order that depends on the rows alone.

    Attributes:
        num: rows by pipeline.
    """

    prompts: list[Prompt] = field(default_factory=list)
    demonstrations: list[Demonstration] = field(default_factory=list)
    num: Counter[str] = field(default_factory=Counter)


async def run_pipelines(
    writer: Writer, topics: Topics, pipelines: Pipelines, *, inputs: Inputs, limit: int | None = None
) -> PipelineOutput:
    """Run all pipelines concurrently, after the topics if one needs them.

    Args:
        limit: most rows of a pipeline.
    """
    output = PipelineOutput()
    if any("topics" in pipeline.needs for pipeline in pipelines.named().values()):
        inputs = replace(inputs, topics=await topics.collect(writer))

    async def one(name: str, pipeline: Pipeline) -> None:
        async for row in take(pipeline.write(writer, inputs), limit):
            output.num[name] += 1
            if isinstance(row, Prompt):
                output.prompts.append(row)
            else:
                output.demonstrations.append(row)

    await asyncio.gather(*(one(name, pipeline) for name, pipeline in pipelines.named().items()))
    output.prompts.sort(key=lambda p: (p.task, p.id))
    output.demonstrations.sort(key=lambda d: (d.task, d.id))
    return output


async def take(rows: AsyncIterator[Item], limit: int | None) -> AsyncIterator[Item]:
    """The first `limit` rows, or all. What is under way beyond them is cancelled."""
    num = 0
    try:
        async for row in rows:
            yield row
            num += 1
            if num == limit:
                return
    finally:
        if isinstance(rows, AsyncGenerator):
            await rows.aclose()
