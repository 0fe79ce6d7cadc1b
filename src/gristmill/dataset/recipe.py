"""The recipe of a dataset: who writes, what is written, who judges, and what is kept."""

from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, model_validator

from gristmill.recipe import Calls, Model, Reward, Section, checked, read
from gristmill.synth.dialogues import Dialogues
from gristmill.synth.pipelines.topics import Topics
from gristmill.synth.plan import Pipelines


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


class DatasetRecipe(Section):
    """A whole dataset."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    seed: int = 0
    models: tuple[Model, ...] = Field((), description="who writes: models behind endpoints")
    folder: Path | None = Field(None, description="who writes instead: a model folder, run in process")
    chat_format: Literal["auto", "nemotron", "chatml", "llama3"] = "auto"
    context: int = Field(8192, gt=0, description="tokens that fit into the models, for documents that are too long")
    templates: str = Field("default", description="a shipped pack, or a file of templates")
    calls: Calls = Calls()
    topics: Topics = Topics()
    documents: Path | None = Field(None, description="JSONL or Parquet with `text`, or a folder of text files")
    prompts: Path | None = Field(None, description="JSONL or Parquet with `prompt` or `messages`")
    entities: Path | None = Field(None, description="text file of words that mathematics and Python are asked about")
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


def load(path: Path, overrides: dict[str, Any] | None = None) -> DatasetRecipe:
    """Read a recipe file. Relative paths in it are relative to the file.

    Raises:
        InputError: the file is missing, is not YAML, or holds a wrong key or value.
    """
    recipe = checked(DatasetRecipe, {"name": path.stem, **read(path), **(overrides or {})}, str(path))
    base = path.parent
    paths = {k: (base / v).resolve() for k in ("documents", "prompts", "entities", "folder") if (v := getattr(recipe, k)) is not None}
    changes: dict[str, Any] = dict(paths)
    if recipe.models:
        changes["models"] = tuple(model.model_copy(update=_key_file(model.api_key_file, base)) for model in recipe.models)
    if reward := recipe.judging.reward:
        folder = {} if reward.base_url else {"model": str((base / reward.model).resolve()) if reward.model else ""}
        reward = reward.model_copy(update={**_key_file(reward.api_key_file, base), **folder})
        changes["judging"] = recipe.judging.model_copy(update={"reward": reward})
    if recipe.topics.file is not None:
        changes["topics"] = recipe.topics.model_copy(update={"file": (base / recipe.topics.file).resolve()})
    if recipe.templates.endswith((".yaml", ".yml")):
        changes["templates"] = str((base / recipe.templates).resolve())
    return recipe.model_copy(update=changes)


def _key_file(name: str, base: Path) -> dict[str, str]:
    return {"api_key_file": str((base / Path(name).expanduser()).resolve())} if name else {}


# A run may be taken up with other values of these: they decide who is called how, and what is kept, and no call.
MAY_CHANGE = {"calls", "judging", "near_duplicates", "licence", "context", "answers", "dialogues", "pipelines"}


def differences(saved: Path, recipe: DatasetRecipe) -> list[str]:
    """The parts of a recipe that a run cannot be taken up with, since another recipe made it."""
    old, new = yaml.safe_load(saved.read_text(encoding="utf-8")), yaml.safe_load(dump(recipe))
    for values in (old, new):
        values["models"] = [[model["model"], model["kind"], model["weight"]] for model in values.get("models", ())]
    return [key for key in sorted(old.keys() | new.keys()) if key not in MAY_CHANGE and old.get(key) != new.get(key)]


def dump(recipe: DatasetRecipe) -> str:
    """The resolved recipe as YAML. It holds no key: recipes name where keys are."""
    return yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True), sort_keys=False)
