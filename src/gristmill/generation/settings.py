"""Recipe sections of endpoints: `Model` and `Calls`."""

from typing import Literal

from pydantic import Field

from gristmill.core.config import PatternPath, Section


class Model(Section):
    """A model behind an OpenAI-compatible endpoint; see `endpoint.Target`."""

    base_url: str = Field(description="up to and including /v1")
    model: str
    weight: float = Field(1.0, gt=0, description="share of the rows, relative to the other models")
    kind: Literal["chat", "completions"] = "chat"
    api_key_env: str = Field("", description="environment variable that holds the key")
    api_key_file: PatternPath = Field("", description="file that holds the key")
    price_in: float = Field(0.0, ge=0, description="money a million tokens")
    price_out: float = Field(0.0, ge=0)
    logprobs: bool = False


class Calls(Section):
    """How endpoints are called."""

    concurrency: int = Field(64, gt=0, description="most requests in flight at each base URL")
    timeout: float = Field(120.0, gt=0, description="seconds an attempt may take")
    retries: int = Field(5, ge=0, description="further attempts of a row")
    patience: float = Field(600.0, ge=0, description="seconds that an endpoint may be away")
