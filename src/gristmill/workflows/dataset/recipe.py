"""The recipe of a dataset: who writes, what is written, who judges, and what is kept."""

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from gristmill.core.config import FilePath, Line, NameOrPath, Recipe, RunName, Section
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

    @model_validator(mode="after")
    def _all_asked(self) -> Self:
        if len(self.temperatures) > self.samples and self.temperatures != type(self).model_fields["temperatures"].default:
            raise ValueError(
                f"{self.samples} samples cannot be at {len(self.temperatures)} temperatures: give as many, or fewer temperatures"
            )
        return self

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
    licence: Line = Field("other", description="for the dataset card, as the Hugging Face Hub names it")

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, values: Any) -> Any:
        """`turn` that is given in part keeps the rest of its own defaults."""
        if not isinstance(values, dict) or not isinstance(values.get("turn"), dict):
            return values
        return values | {"turn": cls.model_fields["turn"].default.model_dump(exclude_unset=True) | values["turn"]}

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if not self.generators:
            raise ValueError("generators: name at least one endpoint (base_url and model) or folder")
        if any(g.checkpoint or g.rounds for g in self.generators):
            raise ValueError("generators: checkpoint and rounds are for alignment runs")
        if not self.pipelines.named():
            raise ValueError("name at least one pipeline")
        return self

    @model_validator(mode="after")
    def _all_read(self) -> Self:
        """What is given and nothing would read is refused. A value that is the default's counts as not given."""
        reads = self.pipelines.reads()
        inputs = {name: getattr(self, name) is not None for name in ("documents", "prompts", "entities")}
        for name, given in (inputs | {"topics": self.topics != Topics()}).items():
            if given and name not in reads:
                raise ValueError(f"{name} would not be read, as no pipeline starts from them: name one that does, or take them out")
        if self.turn.samples != 1 or len(self.turn.temperatures) != 1:
            raise ValueError("turn is one answer at one temperature: leave samples out, and name one of the temperatures")
        if self.dialogues is not None and self.dialogues.threshold and self.judging.reward is None:
            raise ValueError("dialogues.threshold needs ratings: name a reward model in judging.reward, or take it out")
        judging = self.judging.given() - ({"reward"} if self.dialogues is not None else set())
        if self.answers is None and judging:
            raise ValueError(f"judging needs answers ({min(judging)} is given): add `answers:` to the recipe, or take it out")
        if self.judging.reward is None and "min_gap" in judging:
            raise ValueError("judging.min_gap is of reward models: name one in judging.reward, or take it out")
        if self.answers is not None:
            self.judging.check_votes(self.answers.samples)
        return self

    def changed(self, old: dict[str, Any]) -> list[str]:
        """As `Recipe.changed`; of the generators only what decides who answers what counts."""
        asked = [GeneratorSettings.model_validate(g).identity for g in old.get("generators", ())]
        same = asked == [g.identity for g in self.generators]
        return [key for key in super().changed(old) if key != "generators" or not same]
