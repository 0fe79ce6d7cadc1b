"""The recipe of a dataset: who writes, what is written, who judges, and what is kept."""

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from gristmill.core.config import FilePath, NameOrPath, Recipe, RunName, Section
from gristmill.generation.api import SamplingParams
from gristmill.generation.settings import Calls, GeneratorSettings
from gristmill.judge.settings import Judging
from gristmill.synth.dialogues import Dialogues
from gristmill.synth.pipelines.topics import Topics
from gristmill.synth.registry import Pipelines


class Answers(Section):
    """Answers to every prompt, from which demonstrations and pairs are chosen."""

    samples: int = Field(4, gt=0, description="answers a prompt, spread over the temperatures")
    temperatures: tuple[float, ...] = Field((0.7, 1.0), min_length=1)
    max_tokens: int = Field(1024, gt=0)

    def sampling(self) -> list[SamplingParams]:
        """How the answers at each temperature are drawn; none where there are more temperatures than samples."""
        share, more = divmod(self.samples, len(self.temperatures))
        counts = [share + (i < more) for i in range(len(self.temperatures))]
        return [SamplingParams(temperature=t, max_tokens=self.max_tokens, n=n) for t, n in zip(self.temperatures, counts, strict=True) if n]


class DatasetRecipe(Recipe):
    """A whole dataset."""

    # These decide who is called how, and what is kept, and no call.
    may_change: ClassVar[frozenset[str]] = frozenset(
        {"calls", "judging", "near_duplicates", "licence", "context", "answers", "dialogues", "pipelines", "device"}
    )

    kind: Literal["dataset"] = "dataset"
    name: RunName = "dataset"
    seed: int = 0
    generators: tuple[GeneratorSettings, ...] = Field((), description="who writes: endpoints and model folders, by weight")
    chat_format: Literal["auto", "plain", "nemotron", "chatml", "llama3"] = "auto"
    device: str = Field("auto", description="where model folders compute: auto (a GPU where there is one), cpu, cuda, cuda:1, ...")
    context: int = Field(8192, gt=0, description="tokens that fit into the models, for documents that are too long")
    templates: NameOrPath = Field("default", description="a shipped pack, or a file of templates")
    calls: Calls = Calls()
    topics: Topics = Topics()
    documents: FilePath | None = Field(None, description="JSONL or Parquet with `text`, or a folder of text files")
    prompts: FilePath | None = Field(None, description="JSONL or Parquet with `prompt` or `messages`")
    entities: FilePath | None = Field(None, description="text file of words that mathematics and Python are asked about")
    pipelines: Pipelines = Pipelines()
    turn: Answers = Field(Answers(samples=1, temperatures=(0.0,)), description="an assistant's turn where a pipeline needs one")
    dialogues: Dialogues | None = None
    answers: Answers | None = None
    judging: Judging = Judging()
    near_duplicates: float = Field(0.8, gt=0, le=1, description="Jaccard similarity of word triples that makes two prompts alike; 1: off")
    licence: str = Field("other", description="for the dataset card, as the Hugging Face Hub names it")

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if not self.generators:
            raise ValueError("generators: name at least one endpoint (base_url and model) or folder")
        if any(g.checkpoint or g.rounds for g in self.generators):
            raise ValueError("generators: checkpoint and rounds are for alignment runs")
        if not self.pipelines.named():
            raise ValueError("name at least one pipeline")
        return self

    def changed(self, old: dict[str, Any]) -> list[str]:
        """As `Recipe.changed`; of the generators only what decides who answers what counts."""
        asked = [GeneratorSettings.model_validate(g).identity for g in old.get("generators", ())]
        same = asked == [g.identity for g in self.generators]
        return [key for key in super().changed(old) if key != "generators" or not same]
