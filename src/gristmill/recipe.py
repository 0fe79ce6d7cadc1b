"""What recipes are made of: typed sections, read from YAML. A key they do not know is an error that names the nearest right one."""

import difflib
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from gristmill.errors import InputError

Kind = TypeVar("Kind", bound=BaseModel)
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


class Model(Section):
    """A model behind an OpenAI-compatible endpoint; see `synth.endpoint.Target`."""

    base_url: str = Field(description="up to and including /v1")
    model: str
    weight: float = Field(1.0, gt=0, description="share of the rows, relative to the other models")
    kind: Literal["chat", "completions"] = "chat"
    api_key_env: str = Field("", description="environment variable that holds the key")
    api_key_file: str = Field("", description="file that holds the key")
    price_in: float = Field(0.0, ge=0, description="money a million tokens")
    price_out: float = Field(0.0, ge=0)
    logprobs: bool = False


class Calls(Section):
    """How endpoints are called."""

    concurrency: int = Field(64, gt=0, description="most requests in flight at each base URL")
    timeout: float = Field(120.0, gt=0, description="seconds an attempt may take")
    retries: int = Field(5, ge=0, description="further attempts of a row")
    patience: float = Field(600.0, ge=0, description="seconds that an endpoint may be away")


class Reward(Section):
    """The reward model: behind an endpoint, or in a folder."""

    base_url: str = ""
    model: str = Field("", description="name at the endpoint, or the folder of a reward model")
    api_key_env: str = ""
    api_key_file: str = ""
    weights: str = Field("nemotron4-340b", description="named set of aggregation weights")


def read(path: Path) -> dict[str, Any]:
    """The plain values of a recipe file.

    Raises:
        InputError: the file is missing, or is not a YAML mapping.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise InputError(f"The recipe {path} cannot be read ({e.strerror}): check the path, or write one with `gristmill init`.") from e
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise InputError(f"{path} is not YAML: {' '.join(str(e).split())}") from e
    if not isinstance(values, dict):
        raise InputError(f"{path} must be a mapping of keys to values.")
    return values


def checked(kind: type[Kind], values: Any, origin: str) -> Kind:
    """A recipe or a section of it from plain values.

    Raises:
        InputError: a key is unknown (the nearest right one is named) or a value is wrong.
    """
    if not isinstance(values, dict):
        raise InputError(f"{origin} must be a mapping of keys to values.")
    try:
        return kind.model_validate(values)
    except ValidationError as e:
        raise InputError(f"{origin}: {explain(e, kind)}") from e


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
    choices = [section]  # several where a list holds sections of different kinds
    for part in location:
        if isinstance(part, int):
            continue  # a place in a list, whose items are of the sections found last
        if part not in choices[0].model_fields:  # the name of one of those kinds
            choices = [kind for kind in choices if part in (field.default for field in kind.model_fields.values())] or choices
            continue
        choices = _sections(choices[0].model_fields[part].annotation)
        assert choices, f"{part} is no section"
    return list(choices[0].model_fields)


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """The sections that an annotation speaks of, however deep."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [kind for part in get_args(annotation) for kind in _sections(part)]


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
