"""The recipe of a reasoning run: on/off pairs for SFT, stages of reinforcement learning from easy to hard, and what is measured."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from gristmill.core.config import FilePath, Recipe, RunName, Section
from gristmill.train.settings import Training
from gristmill.workflows.alignment.recipe import BaseModelPath, EngineSettings
from gristmill.workflows.pretrain import DocumentKind, Pretraining
from gristmill.workflows.rl.recipe import Curriculum, Method, Rewards, RlData, RlRecipe, RlTraining

OWN_STAGES = ("data", "pretraining", "base", "sft", "before", "after")


class ReasoningData(Section):
    """Answers with thinking on and off, prompts with truths, and prompts that are held out. A world supplies its own."""

    demonstrations: FilePath | None = Field(
        None,
        description="Llama-Nemotron's records, or conversations with the toggle's line; with a `truth` in a row, wrong ones are left out",
    )
    prompts: FilePath | None = Field(
        None, description="for reinforcement learning: with `answer`, `truth` or tests, and `level` if stages ask"
    )
    evaluation: FilePath | None = Field(None, description="the same, asked for nothing but the evaluation, with thinking on and off")
    task: str = Field("", description="the task that thinking is for; others are only to keep what they had; none: all are")
    num_level: int = Field(40, gt=0, description="of a world: prompts of each level of its sums, answered in both modes")
    num_task: int = Field(40, gt=0, description="of a world: prompts of each other task, answered in both modes")
    num_evaluation: int = Field(30, gt=0, description="held-out prompts of each level, and of each task without levels")


class MidTraining(Section):
    """Continued pretraining before SFT, as by `gristmill pretrain`: knowledge that SFT and reinforcement learning bring out."""

    documents: FilePath | None = Field(
        None, description="a .jsonl or .parquet file with a `text` column, a folder of .txt files, or one of `gristmill blend`"
    )
    weights: dict[DocumentKind, Annotated[float, Field(gt=0)]] | None = Field(
        None, description="of a world: shares of its kinds of documents"
    )
    tokens: int = Field(1_000_000, gt=0, description="tokens to train on; fewer when the documents end")
    batch_tokens: int = Field(8192, gt=0)
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: float = Field(3e-4, gt=0)
    muon_lr: float = Field(0.01, gt=0)
    schedule: Literal["constant", "cosine", "linear"] = "linear"
    warmup_steps: int = Field(10, ge=0)
    weight_decay: float = Field(0.1, ge=0)
    precision: Literal["fp32", "bf16"] = "bf16"


class RlStage(Section):
    """One stage of reinforcement learning, from the model of the stage before."""

    added: ClassVar[frozenset[str]] = frozenset({"rewards"})

    name: RunName
    levels: tuple[int, ...] = Field((), description="only prompts of these levels; none: all")
    num_prompts: int = Field(400, gt=0, description="at most, before the curriculum leaves any out")
    steps: int = Field(50, gt=0, description="rollout steps")
    max_thinking_tokens: int | None = Field(None, ge=0, description="a budget for thinking; null: any")
    curriculum: Curriculum | None = Field(None, description="within the stage; none: the order of the seed")
    rewards: Rewards | None = Field(None, description="of the stage; none: those of `rl`")


class RlSettings(Section):
    """What the stages of reinforcement learning share, as in `gristmill rl`."""

    method: Method = "dapo"
    prompts: int = Field(32, gt=0, description="prompts a step")
    samples: int = Field(8, gt=1, description="answers a prompt")
    max_tokens: int = Field(256, gt=0, description="longest answer")
    beta: float = Field(0.0, ge=0, description="weight of the KL divergence from the model that the stage starts from")
    share_on: float = Field(
        0.75, gt=0, lt=1, description="of prompts, with thinking on (of a world's other tasks half); the others keep the toggle working"
    )
    share_others: float = Field(0.25, ge=0, lt=1, description="of a world: share of prompts of its other tasks")
    rewards: Rewards = Rewards(form="thinking")
    training: RlTraining = RlTraining()
    engine: EngineSettings = EngineSettings()


class StageRecipe(RlRecipe):
    """`gristmill rl` of a stage. Its paths lie in the run, which may be moved; the run itself knows what the stage is made of."""

    may_change: ClassVar[frozenset[str]] = RlRecipe.may_change | {"model", "data"}


class ReasoningRecipe(Recipe):
    """A whole reasoning run."""

    may_change: ClassVar[frozenset[str]] = frozenset({"threads", "device"})
    added: ClassVar[frozenset[str]] = frozenset({"pretraining"})

    kind: Literal["reasoning"] = "reasoning"
    name: RunName = "reasoning"
    model: BaseModelPath = Field("miniature", description="folder of the model to start from")
    chat_format: Literal["auto", "plain", "nemotron", "chatml", "llama3"] = "auto"
    seed: int = 0
    threads: int | None = Field(None, gt=0, description="CPU threads; default all cores")
    device: str = Field("auto", description="auto (a GPU where there is one), cpu, cuda, cuda:N or mps")
    world: Literal["miniature"] | None = Field(None, description="a built-in world that supplies its own data")
    data: ReasoningData = ReasoningData()
    pretraining: MidTraining | None = Field(None, description="continued pretraining of the model before SFT; none: it is taken as it is")
    sft: Training = Training()
    rl: RlSettings = RlSettings()
    stages: tuple[RlStage, ...] = Field((RlStage(name="rl"),), description="in order, easy to hard; none: SFT alone")
    budgets: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (8, 16, 32, 64), description="of thinking tokens, with which the last model is measured again"
    )

    @model_validator(mode="after")
    def _complete(self) -> Self:
        files = {name: getattr(self.data, name) for name in ("demonstrations", "prompts", "evaluation")}
        if self.world is None and (missing := [name for name, path in files.items() if path is None]):
            raise ValueError(f"data: give {' and '.join(missing)}, or name a world")
        if self.world is not None and any(files.values()):
            raise ValueError("data: a world supplies its own rows; leave the files out, or the world")
        if self.pretraining is not None and (self.world is None) == (self.pretraining.documents is None):
            raise ValueError("pretraining: a world supplies its own documents, and without one give `documents`")
        if any(self.rewards_of(stage).form != "thinking" for stage in self.stages) or self.rl.rewards.form != "thinking":
            raise ValueError("rl.rewards.form must be thinking: without it the toggle would be lost")
        names = [*OWN_STAGES, *(stage.name for stage in self.stages)]
        if len(set(names)) < len(names):
            raise ValueError(f"stages: give each another name, and none of {', '.join(OWN_STAGES)}")
        return self

    def pretraining_recipe(self, model: Path) -> Pretraining:
        """The recipe of the continued pretraining of a model."""
        assert self.pretraining is not None
        return Pretraining(world=self.world, model=model, seed=self.seed, device=self.device, **dict(self.pretraining))

    def rewards_of(self, stage: RlStage) -> Rewards:
        """What answers earn in a stage."""
        return stage.rewards or self.rl.rewards

    def rl_recipe(self, stage: RlStage, *, model: str, prompts: str, evaluation: str) -> StageRecipe:
        """The recipe of a stage's `gristmill rl`, on files of prompts."""
        shared: dict[str, Any] = {
            name: getattr(self.rl, name) for name in RlSettings.model_fields if name not in ("share_on", "share_others")
        }
        own: dict[str, Any] = {name: getattr(stage, name) for name in ("steps", "max_thinking_tokens", "curriculum")}
        shared["rewards"] = self.rewards_of(stage)
        run = {"name": stage.name, "model": model, "chat_format": self.chat_format, "seed": self.seed}
        data = RlData.model_validate({"prompts": prompts, "evaluation": evaluation})
        return StageRecipe(**shared, **own, **run, threads=self.threads, device=self.device, data=data)
