"""Prompts of a file that people wrote, such as LMSYS-Chat-1M's (report, section 3.2.2)."""

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Literal

from pydantic import Field

from gristmill.data.rows import Prompt, make_id
from gristmill.synth.pipelines.base import Inputs, Pipeline
from gristmill.synth.writer import Writer


class FromFile(Pipeline):
    """The prompts of the recipe's file."""

    half: Literal["both", "sft", "preference"] = Field("both", description="fine-tuning and preference data get halves without overlap")
    limit: int | None = Field(None, gt=0, description="most prompts to take")

    @property
    def needs(self) -> str:
        return "prompts"

    async def write(self, writer: Writer, inputs: Inputs) -> AsyncIterator[Prompt]:
        rows = sorted(inputs.prompts, key=lambda row: make_id(writer.seed, row.id))
        # by the prompt's own words, so that equal prompts never fall into both halves
        halves = {"sft": 0, "preference": 1}
        words = {r.id: "\n".join(m.content for m in r.messages if m.role == "user") for r in rows}
        kept = [r for r in rows if self.half == "both" or int(make_id(words[r.id])[-1], 16) % 2 == halves[self.half]]
        for row in kept[: self.limit]:
            yield replace(row, origin="file")
