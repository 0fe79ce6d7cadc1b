"""The recipe of a run: one typed object, read from YAML. A key it does not know is an error that names the nearest right one."""

import difflib
from pathlib import Path
from typing import Any, Literal, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from gristmill.errors import InputError

CONTROLS = ("unfiltered", "random-filter", "reward-only", "human-only", "replace")
Control = Literal["unfiltered", "random-filter", "reward-only", "human-only", "replace"]
Loss = Literal["dpo", "cdpo", "ipo", "rpo", "rpo_bwd_kl", "rpo_fwd_kl", "rpo_sq"]


class Section(BaseModel):
    """A part of the recipe: immutable, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Data(Section):
    """What people made. Without a world, `demonstrations` and `evaluation` must be given as files."""

    demonstrations: Path | None = None
    ratings: Path | None = None
    prompts: Path | None = None
    evaluation: Path | None = None
    num_demonstrations: int = Field(240, gt=0, description="human conversations to use")
    num_rated_prompts: int = Field(900, gt=0, description="rated prompts to use (two answers each)")
    num_prompts: int = Field(1000, ge=0, description="collected prompts to use beside those that the model writes")
    num_evaluation: int = Field(100, gt=0, description="held-out prompts a task")
    num_held_out_ratings: int = Field(200, ge=0, description="rated prompts kept from the reward model, to measure it")


class Training(Section):
    """One training stage. Give `steps` or `epochs`."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: float = Field(gt=0)
    muon_lr: float = Field(0.02, gt=0)
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    warmup_steps: int = Field(5, ge=0)
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    steps: int | None = Field(None, gt=0)
    epochs: float | None = Field(None, gt=0)
    batch_size: int = Field(64, gt=0)
    micro_batch_tokens: int = Field(8192, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    clip: float = Field(1.0, ge=0)
    precision: Literal["fp32", "bf16"] = "fp32"

    @model_validator(mode="after")
    def _length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs, not both or neither")
        return self


class PreferenceTraining(Training):
    """DPO and its relatives."""

    loss: Loss = "dpo"
    beta: float = Field(0.1, gt=0)
    eta: float = Field(1.0, gt=0)
    label_smoothing: float = Field(0.1, ge=0, lt=0.5, description="cdpo only")
    sft_weight: float = Field(0.0, ge=0, description="of -log p(chosen), added to the loss")
    logprobs: Literal["sum", "mean"] = "sum"
    num_prompts: int = Field(400, gt=0, description="prompts that pairs are made for")
    num_pairs: int = Field(10_000, gt=0, description="pairs to train on, at most")
    min_chosen: float = Field(2.0, description="lowest predicted correctness of a chosen answer that no verifier can check")


class Writing(Section):
    """How many prompts a round's generator writes."""

    topics: int = Field(60, ge=0, description="topic requests a task")
    prompts: int = Field(500, ge=0, description="prompts asked for, a task")
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(0.95, gt=0, le=1)
    max_tokens: int = Field(96, gt=0)


class Responses(Section):
    """How answers are drawn."""

    samples: int = Field(4, gt=0, description="answers a prompt and generator, spread over the temperatures")
    temperatures: tuple[float, ...] = (0.7, 1.0)
    max_tokens: int = Field(80, gt=0)
    max_batch: int = Field(256, gt=0)


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


class Recipe(Section):
    """A whole run."""

    name: str = Field("miniature", pattern=r"^[A-Za-z0-9._-]+$")
    world: Literal["miniature"] | None = Field(None, description="a built-in world that supplies data, or none: your own files")
    model: str = Field("miniature", description="Hugging Face folder of the Base model; `miniature` is the shipped one")
    chat_format: Literal["auto", "nemotron", "chatml", "llama3"] = "auto"
    seed: int = 0
    rounds: int = Field(2, gt=0)
    rpo_iterations: int = Field(3, ge=0)
    control: Control | None = None
    threads: int | None = Field(None, gt=0, description="CPU threads; default all cores")
    data: Data = Data()
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
    def _partial_training(cls, values: Any) -> Any:
        """A training section that is given in part keeps the rest of its own defaults, e.g. `rpo: {lr: 1e-5}` stays RPO."""
        if not isinstance(values, dict):
            return values
        merged = dict(values)
        for name, given in values.items():
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


def parse(values: Any, origin: str = "the recipe") -> Recipe:
    """A checked recipe from plain values.

    Raises:
        InputError: a key is unknown (the nearest right one is named) or a value is wrong.
    """
    if not isinstance(values, dict):
        raise InputError(f"{origin} must be a mapping of keys to values.")
    try:
        return Recipe.model_validate(values)
    except ValidationError as e:
        raise InputError(f"{origin}: {explain(e, Recipe)}") from e


def load(path: Path, overrides: dict[str, Any] | None = None) -> Recipe:
    """Read a recipe file. Relative paths in it are relative to the file.

    Raises:
        InputError: the file is missing, is not YAML, or holds a wrong key or value.
    """
    if not path.is_file():
        raise InputError(f"There is no recipe at {path}: check the path, or write one with `gristmill init`.")
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as e:
        raise InputError(f"{path} is not YAML: {' '.join(str(e).split())}") from e
    if not isinstance(values, dict):
        raise InputError(f"{path} must be a mapping of keys to values.")
    recipe = parse({**values, **(overrides or {})}, str(path))
    return _resolve(recipe, path.parent)


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def _resolve(recipe: Recipe, folder: Path) -> Recipe:
    paths = {k: (folder / v).resolve() for k, v in recipe.data.model_dump().items() if isinstance(v, Path)}
    changes: dict[str, Any] = {"data": recipe.data.model_copy(update=paths)}
    if recipe.model != "miniature":
        changes["model"] = str((folder / recipe.model).resolve())
    return recipe.model_copy(update=changes)


def explain(error: ValidationError, section: type[BaseModel]) -> str:
    """One sentence for the first error, with the nearest right key when a key is unknown."""
    # a misspelt key is told before the right one that is missing
    first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    where = ".".join(str(p) for p in first["loc"])
    if first["type"] != "extra_forbidden":
        return f"{where}: {first['msg']}." if where else f"{first['msg']}."
    known = _keys(first["loc"][:-1], section)
    near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}?" if near else f"the keys here are {', '.join(known)}."
    return f"unknown key {where!r}: {hint}"


def _keys(location: tuple[int | str, ...], section: type[BaseModel]) -> list[str]:
    for part in location:
        if isinstance(part, int):
            continue  # a place in a list, whose items are of the section found last
        annotation = section.model_fields[part].annotation
        sections = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type) and issubclass(kind, BaseModel)]
        assert sections, f"{part} is no section"
        section = sections[0]
    return list(section.model_fields)


def section(values: dict[str, Any], preference: bool) -> Training:
    """A checked training section from plain values.

    Raises:
        InputError: as `parse`.
    """
    kind = PreferenceTraining if preference else Training
    try:
        return kind.model_validate(values)
    except ValidationError as e:
        raise InputError(explain(e, kind)) from e
