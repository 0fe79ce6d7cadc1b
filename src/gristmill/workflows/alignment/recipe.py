"""The recipe of a run of the mill."""

from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import AfterValidator, Field, ValidationInfo, model_validator

from gristmill.core.config import RECIPES, NameOrPath, Recipe, Section, read, resolved
from gristmill.data.human import HumanData
from gristmill.synth.pipelines.by_task import ByTask
from gristmill.synth.pipelines.topics import Topics
from gristmill.synth.registry import Pipelines
from gristmill.train.settings import PreferenceTraining, Training

World = Literal["miniature"]
CONTROLS = ("unfiltered", "random-filter", "reward-only", "human-only", "replace")
Control = Literal["unfiltered", "random-filter", "reward-only", "human-only", "replace"]


def _model_path(name: str, info: ValidationInfo) -> str:
    return name if name == "miniature" else resolved(name, info)


BaseModelPath = Annotated[str, AfterValidator(_model_path)]


class Writing(Section):
    """What a round's generator writes: the pipelines of `gristmill synth`. The second turns grow from the round's other prompts."""

    templates: NameOrPath = Field("default", description="a shipped pack of templates, or a file of them")
    topics: Topics = Field(Topics(macro=0, subtopics=0), description="for the pipelines that need topics")
    pipelines: Pipelines = Field(Pipelines(by_task=ByTask()), description="which pipelines write, and how much")


class Responses(Section):
    """How answers are drawn."""

    samples: int = Field(4, gt=0, description="answers a prompt and generator, spread over the temperatures")
    temperatures: tuple[float, ...] = (0.7, 1.0)
    max_tokens: int = Field(80, gt=0)
    max_batch: int = Field(256, gt=0)
    precision: Literal["fp32", "bf16", "int8"] = Field("fp32", description="of generation; int8: products in int8, all else in bf16")


class Judging(Section):
    """What is kept."""

    weights: str = Field("goodness", description="named set of aggregation weights of the reward model")
    min_correctness: float = Field(2.5, description="predicted correctness of an answer that no verifier can check")
    keep_per_prompt: int = Field(2, gt=0)
    pairs_per_prompt: int = Field(2, gt=0)
    quota: int = Field(400, gt=0, description="answers kept a task and round for general SFT")
    writing_quota: int = Field(150, ge=0, description="prompts of kept answers a task and round that general SFT learns to write")
    code_quota: int = Field(400, gt=0, description="answers kept a round for code SFT")
    code_share: float = Field(0.02, ge=0, le=1, description="share of code-SFT answers repeated in general SFT")
    min_votes: int = Field(1, gt=0, description="samples that must agree on an answer that no verifier can check")
    verified_gap: float = Field(2.0, gt=0, description="reward gap of a pair that a verifier decided")
    min_gap: float = Field(1.5, ge=0, description="smallest reward gap of a pair that the reward model decided")


class Collapse(Section):
    """Alarm levels of the monitors, relative to the human text; `stop` ends the run after this many alarms at once."""

    tokens: int = Field(4000, gt=0, description="token budget every text set is cut to")
    stop: int = Field(4, gt=0)


class AlignmentRecipe(Recipe):
    """A whole run."""

    may_change: ClassVar[frozenset[str]] = frozenset({"rounds", "threads"})

    kind: Literal["alignment"] = "alignment"
    name: str = Field("miniature", pattern=r"^[A-Za-z0-9._-]+$")
    world: World | None = Field(None, description="a built-in world that supplies data, or none: your own files")
    model: BaseModelPath = Field("miniature", description="Hugging Face folder of the Base model; `miniature` is the shipped one")
    chat_format: Literal["auto", "nemotron", "chatml", "llama3"] = "auto"
    seed: int = 0
    rounds: int = Field(2, gt=0)
    rpo_iterations: int = Field(3, ge=0)
    control: Control | None = None
    threads: int | None = Field(None, gt=0, description="CPU threads; default all cores")
    data: HumanData = HumanData()
    writing: Writing = Writing()
    responses: Responses = Responses()
    judging: Judging = Judging()
    collapse: Collapse = Collapse()
    demonstration_sft: Training = Training(lr=1e-3, epochs=15, batch_size=16)
    reward: Training = Training(lr=1e-3, epochs=3, batch_size=32)
    code_sft: Training = Training(lr=1e-4, steps=15)
    general_sft: Training = Training(lr=1e-3, epochs=5, batch_size=32)
    dpo: PreferenceTraining = PreferenceTraining(lr=5e-5, epochs=3, batch_size=32, beta=0.1, sft_weight=1.0)
    rpo: PreferenceTraining = PreferenceTraining(lr=5e-5, epochs=3, batch_size=32, beta=0.1, sft_weight=1.0, loss="rpo")

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, values: Any) -> Any:
        """A training section that is given in part keeps the rest of its own defaults, e.g. `rpo: {lr: 1e-5}` stays RPO."""
        if not isinstance(values, dict):
            return values
        merged = dict(values)
        if values.get("world") in get_args(World) and isinstance(given := values.get("writing", {}), dict):  # a world has its own way
            merged["writing"] = {**read(RECIPES / f"{values['world']}.yaml")["writing"], **given}
        for name, given in merged.items():
            default = cls.model_fields[name].default if name in cls.model_fields else None
            if isinstance(default, Training) and isinstance(given, dict):
                kept = default.model_dump(exclude_unset=True)
                for one, other in (("steps", "epochs"), ("epochs", "steps")):
                    if given.get(one) is not None:
                        kept.pop(other, None)
                merged[name] = {**kept, **given}
        return merged

    @model_validator(mode="after")
    def _sources(self) -> Self:
        if self.world is None and (self.data.demonstrations is None or self.data.evaluation is None):
            raise ValueError("without a world, data.demonstrations and data.evaluation must name files")
        return self

    def changed(self, old: dict[str, Any]) -> list[str]:
        """As `Recipe.changed`; rounds may grow, not shrink."""
        return [*super().changed(old), *(["rounds, which may grow, not shrink"] if self.rounds < old.get("rounds", 0) else [])]
