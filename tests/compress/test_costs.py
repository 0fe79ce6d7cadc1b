"""Measured speeds: every prompt is computed, and a round is only taken for the models and the operating point that it was measured at."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gristmill.compress.costs import Meter, OperatingPoint, check_measurable, compare_models, random_model
from gristmill.compress.variants import Space
from gristmill.core.errors import InputError
from gristmill.core.progress import Progress
from gristmill.data.chat_format import FORMATS
from gristmill.data.tokenizer import Tokenizer
from gristmill.engine import engine as engine_module
from gristmill.engine.engine import Engine
from gristmill.model.config import ModelConfig, uniform_blocks
from gristmill.model.transformer import Transformer

TOKENIZER = Tokenizer.train(["a b c"], 300, FORMATS["chatml"].special_tokens)
QUIET = Progress(quiet=True)


def model(num_layers: int = 1) -> Transformer:
    config = ModelConfig("llama", TOKENIZER.vocab_size, 16, uniform_blocks(num_layers, 2, 1, 8, 16), 1024)
    return random_model(config, torch.float32, torch.device("cpu"))


def point(batch: int = 2, prompt_tokens: int = 4) -> OperatingPoint:
    return OperatingPoint(batch, prompt_tokens, 1, "fp32", "cpu")


def test_every_prompt_is_computed_whole() -> None:
    """Prompts that begin alike would be computed once, and long prompts be measured as if they were free."""
    torch.set_num_threads(1)
    meter = Meter(point(24, 128), TOKENIZER, FORMATS["chatml"])
    meter.add("one", model(), own=True)
    assert meter.round(0)["one"] > 0
    (engine,) = meter._engines.values()
    assert engine.stats.prompt_tokens == 24 * 128 and engine.stats.output_tokens == 24


def test_seconds_are_a_single_threads_or_the_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processor seconds of several threads say little of when they are done."""
    clocks: list[object] = []
    monkeypatch.setattr(Meter, "_seconds", lambda meter, engine, seed, clock: clocks.append(clock) or 1.0)
    for num_threads, num_workers, step_products in ((1, 1, 1), (3, 1, 1), (3, 3, 1), (3, 3, 10**9)):
        torch.set_num_threads(num_threads)
        try:
            monkeypatch.setattr(engine_module, "STEP_PRODUCTS", step_products)
            meter = Meter(point(24), TOKENIZER, FORMATS["chatml"])
            meter.add("one", model(), own=True)
            meter._engines["one"].num_workers = num_workers
            meter.round(0)
        finally:
            torch.set_num_threads(1)
    assert clocks == [time.process_time, time.perf_counter, time.perf_counter, time.process_time]


def test_rounds_stay_for_the_same_models_at_the_same_point_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = 0

    def seconds(meter: Meter, engine: Engine, seed: int, clock: Callable[[], float]) -> float:
        nonlocal measured
        measured += 1
        return float(engine.model.config.num_layers)

    monkeypatch.setattr(Meter, "_seconds", seconds)

    def speeds(children: dict[str, int], at: OperatingPoint) -> dict[str, float]:
        makers = {name: lambda layers=layers: model(layers) for name, layers in children.items()}
        meter = Meter(at, TOKENIZER, FORMATS["chatml"])
        found = compare_models(model(4), makers, meter, tmp_path / "measured.jsonl", QUIET, repeats=2)
        return {name: one["median"] for name, one in found.items()}

    assert speeds({"a": 2}, point()) == {"a": 2.0} and measured == 6
    assert speeds({"a": 2}, point()) == {"a": 2.0} and measured == 6, "nothing is measured twice"
    assert speeds({"b": 1}, point()) == {"b": 4.0} and measured == 12, "another child"
    assert speeds({"a": 2}, point(batch=3)) == {"a": 2.0} and measured == 18


def test_a_variant_that_only_the_first_layer_has_is_refused() -> None:
    config = ModelConfig("llama", 96, 16, (*uniform_blocks(1, 2, 2, 8, 64), *uniform_blocks(1, 2, 1, 8, 16)), 64)
    check_measurable(config, Space.of(config, width_multiple=16, fixed_layers=(0,)))
    with pytest.raises(InputError, match="leave it out of the search"):
        check_measurable(config, Space.of(config, width_multiple=16))
