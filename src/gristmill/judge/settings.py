"""Sections of recipes about judges and what they keep."""

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from gristmill.core.config import FilePath, Line, PatternPath, Section
from gristmill.generation.openai_format import check_fields
from gristmill.generation.settings import RequestFields

Control = Literal["unfiltered", "random-filter", "reward-only", "human-only", "replace"]


class Reward(RequestFields):
    """A reward model: behind an endpoint, or in a folder; neither: the one that the run trains."""

    base_url: Line = Field("", description="of an endpoint")
    model: Line = Field("", description="name that the endpoint knows it by")
    folder: FilePath | None = Field(None, description="a reward model's folder instead, run in process")
    api_key_env: str = ""
    api_key_file: PatternPath = ""
    weights: str = Field("nemotron4-340b", description="named set of aggregation weights")

    @model_validator(mode="after")
    def _of_endpoints(self) -> Self:
        if (self.fields or self.extra_body) and not self.base_url:
            raise ValueError("fields and extra_body are of endpoints: give base_url, or leave them out")
        if self.base_url and self.folder is not None:
            raise ValueError("give either base_url or folder, not both")
        check_fields(self.fields, self.extra_body)
        return self

    @model_serializer(mode="wrap")
    def _as_before(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What is not given is not written: earlier runs know it by this."""
        return {name: value for name, value in serialize(self).items() if value or name not in RequestFields.model_fields}


class Repair(Section):
    """Repair of failing answers that a program can edit until they pass (`verify/repair.py`). It teaches what no sample shows."""

    max_per_instruction: int = Field(55, ge=0, description="repaired answers kept, by each type of instruction that they were edited for")
    max_sampled_per_instruction: int = Field(40, ge=0, description="answers kept as they were sampled, by type of instruction")
    max_per_prompt: int = Field(1, gt=0, description="repaired answers kept a prompt: those of fewest edits, the longest first")
    min_words: int = Field(10, ge=0, description="words of an answer that is worth a repair, before and after it")
    pairs: bool = Field(False, description="pairs of a repaired answer and the failing one that it was made of, beside the others")


class Judging(Section):
    """Who judges answers, and what is kept. The order of judges: verifier, LLM judge (of pairs), reward model."""

    added: ClassVar[frozenset[str]] = frozenset({"max_repetition", "max_length_difference", "repair"})

    reward: Reward | None = None
    llm: bool = Field(False, description="let the first generator compare answers that no verifier decides, in both orders")
    keep: str = Field("", description="condition on attributes and score of an answer to keep, as `correctness >= 3 and verbosity <= 2`")
    keep_chosen: str = Field("", description="condition on the chosen answer of a pair that the reward model decides; none: that of keep")
    max_per_prompt: int = Field(1, gt=0, description="answers kept a prompt")
    max_judged_per_prompt: int = Field(1, gt=0, description="of them where no verifier decides: several may contradict each other")
    max_per_task: int = Field(10_000, gt=0, description="answers kept a task")
    max_per_topic: int = Field(10_000, gt=0, description="answers kept a topic, so that none crowds out the others")
    min_votes: int = Field(1, gt=0, description="samples that must agree on an answer that no verifier decides")
    max_pairs_per_prompt: int = Field(1, gt=0)
    max_pairs_per_task: int = Field(10_000, gt=0, description="of more, as many easy as hard ones are kept")
    min_gap: float = Field(0.5, ge=0, description="smallest reward gap of a pair that the reward model decides")
    verified_gap: float = Field(2.0, gt=0, description="reward gap of a pair that a verifier or the LLM judge decides")
    near_duplicates: float = Field(0.9, gt=0, le=1, description="Jaccard similarity from which two answers make no pair; 1: off")
    max_repetition: float = Field(
        1.0, ge=0, le=1, description="share of repeated 4-grams of words beyond which an answer loops and is not good; 1: off"
    )
    max_length_difference: float = Field(
        1.0,
        ge=0,
        le=1,
        description="share of the longer answer's characters by which those of a pair may differ, unless one loops; 1: off",
    )
    repair: Repair | None = Field(None, description="edits of answers that fail verifiable instructions; none: off")

    def given(self) -> set[str]:
        """Keys whose values are not the defaults."""
        return {name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default}

    def check_votes(self, samples: int) -> None:
        """Raise `ValueError` where no answer could have votes enough."""
        if self.min_votes > samples:
            raise ValueError(f"judging.min_votes is {self.min_votes}, and answers.samples {samples}: so many can never agree")
