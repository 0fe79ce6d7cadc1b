"""Calibration text: what is scored is nothing that was distilled on."""

import pytest

from gristmill.core.errors import InputError
from gristmill.train.batches import Sample
from gristmill.workflows.compress.recipe import Calibration
from gristmill.workflows.compress.text import CalibrationText


def samples(num_prompts: int, passes: int) -> list[Sample]:
    return [Sample([p] * 20, [True] * 20, f"prompt {p}") for _ in range(passes) for p in range(num_prompts)]


def test_no_prompt_is_both_distilled_on_and_scored() -> None:
    """Prompts are asked several times: another answer to the same prompt is no validation text."""
    text = CalibrationText.of(samples(40, 5), Calibration(tokens=3000, block_tokens=600, validation_tokens=200), 0)
    trained, scored = ({sample.id for sample in part} for part in (text.train, text.validation))
    assert trained.isdisjoint(scored) and len(scored) >= 5
    assert sum(s.num_tokens for s in text.validation) >= 200 and text.num_tokens >= 3000
    assert list(text.blocks) == list(text.train)[: len(text.blocks)] and sum(s.num_tokens for s in text.blocks) >= 600


def test_one_prompt_asked_often_is_too_little() -> None:
    with pytest.raises(InputError, match="4,000 tokens of 2 prompts or documents"):
        CalibrationText.of(samples(2, 100), Calibration(), 0)
    few = CalibrationText.of(samples(4, 50), Calibration(validation_tokens=400), 0)
    assert {s.id for s in few.validation}.isdisjoint(s.id for s in few.train) and len({s.id for s in few.train}) == 3
