"""Recipe sections of endpoints: `Model` and `Calls`."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from gristmill.core.config import FilePath, Line, PatternPath, Section
from gristmill.generation.openai_format import check_fields


class Calls(Section):
    """How endpoints are called."""

    concurrency: int = Field(64, gt=0, description="most requests in flight at each base URL")
    timeout: float = Field(120.0, gt=0, description="seconds an attempt may take")
    retries: int = Field(5, ge=0, description="further attempts of a row")
    patience: float = Field(600.0, ge=0, description="seconds that an endpoint may be away")


class RequestFields(Section):
    """What an endpoint's requests are made of, where it is not the usual."""

    fields: dict[str, str | None] = Field(
        {}, description="what the endpoint calls a field, or null to leave it out: `{max_tokens: max_completion_tokens, seed: null}`"
    )
    extra_body: dict[str, Any] = Field({}, description="what is sent besides, as `{reasoning_effort: low}`")


class GeneratorSettings(RequestFields):
    """A model that writes: behind an OpenAI-compatible endpoint, in a folder, or a checkpoint of the run."""

    base_url: Line = Field("", description="of an endpoint, up to and including /v1")
    model: Line = Field("", description="name that the endpoint knows the model by")
    folder: FilePath | None = Field(None, description="a model folder instead, run in process")
    checkpoint: str = Field("", description="in an alignment run: a model of the run instead, `latest` or a stage such as r1-rpo3")
    weight: float = Field(1.0, gt=0, description="share of the rows, relative to the other generators")
    rounds: tuple[int, ...] = Field((), description="in an alignment run: the rounds that it writes in; none: all")
    kind: Literal["chat", "completions"] = "chat"
    api_key_env: str = Field("", description="environment variable that holds the key")
    api_key_file: PatternPath = Field("", description="file that holds the key")
    price_in: float = Field(0.0, ge=0, description="money a million tokens")
    price_out: float = Field(0.0, ge=0)
    logprobs: bool = False

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if bool(self.base_url) + (self.folder is not None) + bool(self.checkpoint) != 1:
            raise ValueError("give one of base_url (with model), folder and checkpoint")
        if bool(self.base_url) != bool(self.model):
            raise ValueError("base_url and model go together")
        if (self.fields or self.extra_body) and not self.base_url:
            raise ValueError("fields and extra_body are of endpoints: give base_url, or leave them out")
        check_fields(self.fields, self.extra_body)
        return self

    @property
    def identity(self) -> list[Any]:
        """What decides which rows it writes."""
        asked = [self.fields, self.extra_body] if self.fields or self.extra_body else []
        return [self.model or self.checkpoint or str(self.folder), self.kind, self.weight, *asked]
