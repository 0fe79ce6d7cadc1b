"""Recipe of a curation: inputs, steps in their order, output format, executor."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from gristmill.core.config import PatternPath, Recipe, RunName, Section
from gristmill.curate.dedup.duplicates import Exact, Fuzzy
from gristmill.curate.dedup.seen_index import Remember, Seen
from gristmill.curate.dedup.semantic import Semantic
from gristmill.curate.dedup.substring import Substring
from gristmill.curate.filters.decontaminate import Decontaminate
from gristmill.curate.filters.heuristics import Filter
from gristmill.curate.filters.language import Language
from gristmill.curate.io.readers import Reading
from gristmill.curate.quality.buckets import Quality
from gristmill.curate.transforms.clean import Clean
from gristmill.curate.transforms.pii import Pii
from gristmill.curate.transforms.rephrase import Rephrase

Step = Annotated[
    Clean | Language | Filter | Exact | Fuzzy | Pii | Decontaminate | Remember | Seen | Quality | Rephrase | Substring | Semantic,
    Field(discriminator="step"),
]


class Output(Section):
    """How documents are written."""

    format: Literal["parquet", "jsonl", "jsonl.zst"] = "parquet"
    shard_mb: int = Field(256, gt=0, description="text of an output file")


class Curation(Recipe):
    """A curation, from files to files."""

    kind: Literal["curation"] = "curation"
    name: RunName = "curated"
    inputs: list[PatternPath] = Field(default_factory=list, description="files, folders and patterns")
    reading: Reading = Reading()
    steps: list[Step] = Field(default_factory=list)
    output: Output = Output()
    executor: Literal["processes", "ray"] = "processes"
    workers: int = Field(0, ge=0, description="processes; 0: one a core")

    def changed(self, old: dict[str, Any]) -> list[str]:
        """None: a run of another recipe begins again where they differ."""
        return []

    @model_validator(mode="after")
    def _one_index(self) -> Self:
        if sum(step.step == "remember" for step in self.steps) > 1:
            raise ValueError("steps: a run has one index, so that `remember` can stand in it once")
        return self
