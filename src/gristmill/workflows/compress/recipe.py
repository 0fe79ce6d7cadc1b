"""The recipe of `gristmill compress`: the text, the search space, the operating point, the target, and the distillation."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from gristmill.core.config import FilePath, Recipe, RunName, Section, check
from gristmill.train.settings import DistillationTraining
from gristmill.workflows.alignment.recipe import BaseModelPath

TOKENS_A_DRAW = 40


class CompressionData(Section):
    """What the parent is distilled on, and what parent and child are asked. A world supplies both."""

    prompts: FilePath | None = Field(
        None, description="JSONL or Parquet with `prompt` or `messages`; the parent's own answers are the text"
    )
    documents: FilePath | None = Field(None, description="in place of prompts: a file with a `text` column, or a folder of .txt files")
    evaluation: FilePath | None = Field(None, description="prompts with known answers; none: accuracy is not measured")
    num_evaluation: int | None = Field(None, gt=0, description="a task; default all")


class Calibration(Section):
    """The text of blockwise distillation, scores and global distillation."""

    tokens: int = Field(1_000_000, gt=0, description="in all; prompts are asked again until there are so many")
    block_tokens: int = Field(64_000, gt=0, description="of them, for blockwise distillation")
    validation_tokens: int = Field(8_000, gt=0, description="besides, for scores and KL")
    max_tokens: int = Field(80, gt=0, description="longest answer")

    @property
    def num_draws(self) -> int:
        """Prompts that are drawn of a world for the text: of 120,000 of the miniature's half are different, with answers of 80 tokens."""
        return 1 + (self.tokens + self.validation_tokens) // TOKENS_A_DRAW


class SearchSpace(Section):
    """Which layers a child may have in place of the parent's."""

    kv_heads: tuple[int, ...] | None = Field(None, description="numbers of key-value heads; none: all that divide the parent's")
    widths: tuple[float, ...] = Field((0.75, 0.5, 0.25, 0.125), description="of MLPs, as shares of the parent's")
    width_multiple: int = Field(32, gt=0, description="of which widths are multiples; 256 for a DeciLM export")
    no_attention: bool = True
    no_mlp: bool = True
    fixed_layers: tuple[int, ...] = Field((), description="layers that stay, from 0; -1 is the last")


class Bld(Section):
    """Blockwise local distillation of each variant."""

    steps: int = Field(40, ge=0, description="optimizer steps; 0: variants stay as they are made")
    lr: float = Field(1e-3, gt=0)


class Costs(Section):
    """The operating point at which variants and children are measured."""

    batch: int = Field(64, gt=0, description="answers in flight; 1 for latency")
    prompt_tokens: int = Field(32, gt=0)
    output_tokens: int = Field(64, gt=0)
    repeats: int = Field(5, gt=0, description="rounds, in which all are measured in turns")
    precision: Literal["auto", "fp32", "bf16", "int8"] = Field(
        "auto", description="of the engine; auto: bf16 where the device is made for it"
    )

    @property
    def name(self) -> str:
        """Short name of the operating point, for folders: what differs from the default, each behind a dash."""
        words = {"batch": "batch", "prompt_tokens": "prompt", "output_tokens": "output", "precision": ""}
        told = {word: getattr(self, key) for key, word in words.items() if getattr(self, key) != Costs.model_fields[key].default}
        return "".join(f"-{word}{value}" for word, value in told.items())


class Target(Section):
    """What a child must come to, in shares of the parent's."""

    speed: float = Field(1.3, ge=1, description="tokens a second, in those of the parent")
    memory: float = Field(1.0, gt=0, le=1, description="largest share of the memory of weights and cache")
    parameters: float = Field(1.0, gt=0, le=1, description="largest share of the parameters")

    @property
    def name(self) -> str:
        """Short name, for folders."""
        more = [f"{key}{getattr(self, key):g}" for key in ("memory", "parameters") if getattr(self, key) < 1]
        return "-".join([f"{self.speed:g}x", *more])


class Search(Section):
    """Which architecture is taken."""

    metric: Literal["kl", "lm_loss", "accuracy"] = Field(
        "kl", description="score of a layer; accuracy: greedy, on those of data.prompts whose answers are known"
    )
    num_prompts: int = Field(200, ge=20, description="of accuracy: prompts that each model is asked, at most")
    candidates: int = Field(
        3, gt=0, description="solutions, each different enough from those before; that of the lowest KL (highest accuracy) is taken"
    )
    diversity: float = Field(0.8, gt=0, lt=1, description="largest share of layers that two solutions have in common")
    curve: tuple[Annotated[float, Field(gt=1)], ...] = Field(
        (1.15, 1.3, 1.5, 2.0), description="speeds whose best child is measured too, for the Pareto curve"
    )


class CompressionRecipe(Recipe):
    """A whole compression."""

    may_change: ClassVar[frozenset[str]] = frozenset(
        {"threads", "device", "costs", "target", "search", "fusion", "fusion_limit", "distillation"}
    )

    kind: Literal["compress"] = "compress"
    name: RunName = "compress"
    model: BaseModelPath = Field("miniature", description="folder of the parent")
    chat_format: Literal["auto", "plain", "nemotron", "chatml", "llama3"] = "auto"
    seed: int = 0
    threads: int | None = Field(None, gt=0, description="CPU threads; default all cores")
    device: str = Field("auto", description="auto (a GPU where there is one), cpu, cuda, cuda:N or mps")
    world: Literal["miniature"] | None = Field(None, description="a built-in world that supplies prompts and their truths")
    data: CompressionData = CompressionData()
    calibration: Calibration = Calibration()
    space: SearchSpace = SearchSpace()
    bld: Bld = Bld()
    costs: Costs = Costs()
    target: Target = Target()
    search: Search = Search()
    fusion: bool = Field(False, description="fuse runs of MLPs in layers without attention, before the distillation")
    fusion_limit: float = Field(
        0.1, gt=0, le=2, description="largest dependency (cosine distance) of one fused MLP on another; 2 fuses all of a run"
    )
    distillation: DistillationTraining = DistillationTraining(epochs=1, batch_size=32, weight_decay=0.0)

    @model_validator(mode="after")
    def _complete(self) -> Self:
        given = [name for name in ("prompts", "documents") if getattr(self.data, name) is not None]
        if self.world is None and len(given) != 1:
            raise ValueError("data: give prompts or documents, or name a world")
        if self.world is not None and (given or self.data.evaluation is not None):
            raise ValueError("data: a world supplies prompts and evaluation; leave the files out, or the world")
        if self.calibration.block_tokens > self.calibration.tokens:
            raise ValueError("calibration.block_tokens must be at most calibration.tokens")
        if self.distillation.lora is not None:
            raise ValueError("distillation trains all weights; leave lora out")
        return self

    def with_speed(self, speed: float) -> Self:
        """The same for a child of another speed.

        Raises:
            InputError: it is below 1.
        """
        return self.model_copy(update={"target": check(Target, self.target.model_dump() | {"speed": speed}, "--speed")})
