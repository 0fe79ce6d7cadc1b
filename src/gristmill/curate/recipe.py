"""The recipe of a curation: what is read, the steps in their order, and how the rest is written."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, model_validator

from gristmill.curate.clean import Clean
from gristmill.curate.decontaminate import Decontaminate
from gristmill.curate.documents import Reading
from gristmill.curate.duplicates import Exact, Fuzzy
from gristmill.curate.heuristics import Filter
from gristmill.curate.language import Language
from gristmill.curate.pii import Pii
from gristmill.curate.quality import Quality
from gristmill.curate.rephrase import Rephrase
from gristmill.curate.semantic import Semantic
from gristmill.curate.snapshots import Remember, Seen
from gristmill.curate.substring import Substring
from gristmill.recipe import Section, checked, read

Step = Annotated[
    Clean | Language | Filter | Exact | Fuzzy | Pii | Decontaminate | Remember | Seen | Quality | Rephrase | Substring | Semantic,
    Field(discriminator="step"),
]


class Output(Section):
    """How documents are written."""

    format: Literal["parquet", "jsonl", "jsonl.zst"] = "parquet"
    shard_mb: int = Field(256, gt=0, description="text of an output file")


class Curation(Section):
    """A curation, from files to files."""

    name: str = Field("curated", pattern=r"^[\w.-]+$")
    inputs: list[str] = Field(default_factory=list, description="files, folders and patterns")
    reading: Reading = Reading()
    steps: list[Step] = Field(default_factory=list)
    output: Output = Output()
    executor: Literal["processes", "ray"] = "processes"
    workers: int = Field(0, ge=0, description="processes; 0: one a core")

    @model_validator(mode="after")
    def _one_index(self) -> Self:
        if sum(step.step == "remember" for step in self.steps) > 1:
            raise ValueError("steps: a run has one index, so that `remember` can stand in it once")
        return self


def load(path: Path, overrides: dict[str, Any] | None = None) -> Curation:
    """Read a recipe, with some of its values replaced.

    Raises:
        InputError: the file is missing or wrong; the sentence names the key.
    """
    return checked(Curation, read(path) | (overrides or {}), str(path))


def dump(recipe: Curation) -> str:
    """The recipe with all its values, as YAML."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
