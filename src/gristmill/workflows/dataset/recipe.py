"""The recipe of a dataset: who writes, what is written, who judges, and what is kept."""

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from gristmill.core.config import FilePath, NameOrPath, Recipe, Section
from gristmill.generation.settings import Calls, Model
from gristmill.judge.settings import Reward
from gristmill.synth.dialogues import Dialogues
from gristmill.synth.pipelines.topics import Topics
from gristmill.synth.registry import Pipelines


class Answers(Section):
    """Answers to every prompt, from which demonstrations and pairs are chosen."""

    samples: int = Field(4, gt=0, description="answers a prompt, spread over the temperatures")
    temperatures: tuple[float, ...] = Field((0.7, 1.0), min_length=1)
    max_tokens: int = Field(1024, gt=0)


class Judging(Section):
    """What is kept. The order of judges: truth or verifier, language model, reward model."""

    reward: Reward | None = None
    llm: bool = Field(
        False,
        description="let the first generator compare answers that no verifier decides, in both orders; the reward model decides the rest",
    )
    keep: str = Field(
        "", description="condition on attributes and score of an answer to keep, such as `correctness >= 3 and verbosity <= 2`"
    )
    quota: int = Field(10_000, gt=0, description="answers kept a task, the best first")
    quota_per_topic: int = Field(10_000, gt=0, description="answers kept a topic, so that none crowds out the others")
    keep_per_prompt: int = Field(1, gt=0)
    min_gap: float = Field(0.5, ge=0, description="smallest reward gap of a pair")
    min_chosen: float | None = Field(None, description="lowest reward of a chosen answer")
    verified_gap: float = Field(2.0, gt=0, description="reward gap of a pair that a verifier or a language model decided")
    pairs_per_task: int = Field(10_000, gt=0, description="most pairs a task, so that easy tasks do not fill the set")


class DatasetRecipe(Recipe):
    """A whole dataset."""

    # These decide who is called how, and what is kept, and no call.
    may_change: ClassVar[frozenset[str]] = frozenset(
        {"calls", "judging", "near_duplicates", "licence", "context", "answers", "dialogues", "pipelines"}
    )

    kind: Literal["dataset"] = "dataset"
    name: str = Field("dataset", pattern=r"^[A-Za-z0-9._-]+$")
    seed: int = 0
    models: tuple[Model, ...] = Field((), description="who writes: models behind endpoints")
    folder: FilePath | None = Field(None, description="who writes instead: a model folder, run in process")
    chat_format: Literal["auto", "nemotron", "chatml", "llama3"] = "auto"
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
        if bool(self.models) == (self.folder is not None):
            raise ValueError("give either models (endpoints) or folder (a model in process)")
        if not self.pipelines.named():
            raise ValueError("name at least one pipeline")
        return self

    def changed(self, old: dict[str, Any]) -> list[str]:
        """As `Recipe.changed`; of the models only what decides who answers what counts."""
        asked = [[model["model"], model["kind"], model["weight"]] for model in old.get("models", ())]
        same = asked == [[model.model, model.kind, model.weight] for model in self.models]
        return [key for key in super().changed(old) if key != "models" or not same]
