"""Calibration text: what is scored is nothing that was distilled on, and as many prompts are asked as it takes."""

from pathlib import Path

import pytest

from gristmill.core.errors import InputError
from gristmill.core.progress import Progress
from gristmill.data.chat import conversation
from gristmill.data.find_format import find_format
from gristmill.data.rows import Prompt
from gristmill.engine.engine import Engine
from gristmill.model.hf import load_model
from gristmill.train.batches import Sample
from gristmill.workflows.compress import text
from gristmill.workflows.compress.recipe import Calibration
from gristmill.workflows.compress.text import CalibrationText


def samples(num_prompts: int, passes: int) -> list[Sample]:
    return [Sample([p] * 20, [True] * 20, f"prompt {p}") for _ in range(passes) for p in range(num_prompts)]


def test_no_prompt_is_both_distilled_on_and_scored() -> None:
    """Prompts are asked several times: another answer to the same prompt is no validation text."""
    found = CalibrationText.of(samples(40, 5), Calibration(tokens=3000, block_tokens=600, validation_tokens=200), 0)
    trained, scored = ({sample.id for sample in part} for part in (found.train, found.validation))
    assert trained.isdisjoint(scored) and len(scored) >= 5
    assert sum(s.num_tokens for s in found.validation) >= 200 and found.num_tokens >= 3000
    assert list(found.blocks) == list(found.train)[: len(found.blocks)] and sum(s.num_tokens for s in found.blocks) >= 600


def test_one_prompt_asked_often_is_too_little() -> None:
    with pytest.raises(InputError, match="4,000 tokens of 2 prompts or documents"):
        CalibrationText.of(samples(2, 100), Calibration(), 0)
    few = CalibrationText.of(samples(4, 50), Calibration(validation_tokens=400), 0)
    assert {s.id for s in few.validation}.isdisjoint(s.id for s in few.train) and len({s.id for s in few.train}) == 3


def test_prompts_are_asked_until_there_are_enough_tokens(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a whole file, of which the first prompts may be of one kind; and each again only when all were asked."""
    monkeypatch.setattr(text, "AT_ONCE", 4)
    model, tokenizer = load_model(tiny_base)
    engine = Engine(model, tokenizer, find_format("auto", tokenizer), name="parent")
    prompts = [Prompt(f"p{i}", "t", conversation([{"role": "user", "content": f"Say {i}."}]), "file") for i in range(12)]

    def asked(tokens: int, folder: str) -> list[str]:
        wanted = Calibration(tokens=tokens, validation_tokens=1, max_tokens=8)
        (tmp_path / folder).mkdir(exist_ok=True)
        return [sample.id for sample in text.answer_samples(engine, prompts, wanted, tmp_path / folder, Progress(quiet=True), 0)]

    few, many = asked(20, "few"), asked(700, "many")
    assert len(set(few)) == len(few) == 4 and few != [f"say {i}." for i in range(4)]
    assert many[:4] == few and len(set(many[:12])) == 12 and many[12:16] == few
