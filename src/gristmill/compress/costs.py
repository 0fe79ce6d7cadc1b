"""Cost table: what each variant takes in our own engine on this machine, at one operating point.

A model of random weights is served in which every layer but the first has the variant, beside one with the parent's layers, in turns; the
difference, divided by the layers, is the variant's. So it holds at this batch and these lengths alone, which are kept with it.
"""

import gc
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from gristmill.compress.variants import HALVES, Choice, Half, Space, block_config, size_of
from gristmill.core.errors import InputError
from gristmill.core.progress import Progress
from gristmill.data.chat_format import ChatFormat
from gristmill.data.rows import make_id
from gristmill.data.tokenizer import Tokenizer
from gristmill.engine.engine import Engine, convert_matrices
from gristmill.generation.api import Request, SamplingParams
from gristmill.model.config import BlockConfig, ModelConfig
from gristmill.model.transformer import Transformer
from gristmill.runs.journal import Journal

JOURNAL, PARENT = "costs.jsonl", "parent"


@dataclass(frozen=True)
class OperatingPoint:
    """What a model is measured at: answers in flight, tokens of prompt and answer, the engine's precision (fp32, bf16 or int8), and the
    type of device.
    """

    batch: int
    prompt_tokens: int
    output_tokens: int
    precision: str
    device: str

    @property
    def dtype(self) -> torch.dtype:
        """Of activations, and of matrices that are not quantized."""
        return torch.float32 if self.precision == "fp32" else torch.bfloat16


class Meter:
    """Seconds a generated token of models, measured in turns.

    Where a single thread computes them all they are its processor seconds, which neighbours change least; else those of the clock.
    """

    def __init__(self, point: OperatingPoint, tokenizer: Tokenizer, chat_format: ChatFormat) -> None:
        self.point, self._tokenizer, self._format = point, tokenizer, chat_format
        self._engines: dict[str, Engine] = {}

    def add(self, name: str, model: Transformer, *, own: bool) -> None:
        """Serve a model beside the others; one that nobody else uses (`own`) is held in the engine's type alone."""
        if own:  # random ones and children lie anywhere, and with one answer in flight that was up to a quarter of the time
            convert_matrices(model, self.point.dtype)
        engine = Engine(
            model,
            self._tokenizer,
            self._format,
            name=name,
            max_batch=self.point.batch,
            dtype=self.point.dtype,
            quantize="int8" if self.point.precision == "int8" else "",
            own=own,
        )
        engine.stop_V[:] = False  # all answers are equally long
        self._engines[name] = engine

    def round(self, seed: int) -> dict[str, float]:
        """Measure each model once, in an order that turns round by round; Python's collector waits, which may take as long as a model."""
        names = list(self._engines)
        shift = seed % len(names)
        clock = time.process_time if all(map(self._is_alone, self._engines.values())) else time.perf_counter
        collects = gc.isenabled()
        gc.collect()
        gc.disable()
        try:
            return {name: self._seconds(self._engines[name], seed, clock) for name in names[shift:] + names[:shift]}
        finally:
            if collects:
                gc.enable()

    def _is_alone(self, engine: Engine) -> bool:
        """Whether a single thread of a processor computes this model."""
        num_threads = torch.get_num_threads() if engine.num_workers == 1 else engine.useful_workers(self.point.batch)
        return engine.device.type == "cpu" and num_threads == 1

    def warm_up(self) -> None:
        """Let kernels and libraries get ready."""
        for engine in self._engines.values():
            self._seconds(engine, 0, time.perf_counter)

    def _seconds(self, engine: Engine, seed: int, clock: Callable[[], float]) -> float:
        point = self.point
        sampling = SamplingParams(temperature=1.0, max_tokens=point.output_tokens)
        # no two begin alike, or the engine would compute what they share once
        prompts = np.random.default_rng(seed).integers(engine.model.config.vocab_size, size=(point.batch, point.prompt_tokens))
        requests = [Request(str(i), (), sampling, seed, prompt_ids=tuple(row)) for i, row in enumerate(prompts.tolist())]
        began = clock()
        count = sum(outs[0].num_tokens for _, outs in engine.generate(requests))
        return (clock() - began) / count


def check_room(point: OperatingPoint, config: ModelConfig) -> None:
    """InputError where prompts and answers are longer than the model's context."""
    if point.prompt_tokens + point.output_tokens > config.max_positions:
        raise InputError(
            f"Lower costs.prompt_tokens ({point.prompt_tokens}) or costs.output_tokens ({point.output_tokens}): together they are more "
            f"than the model's context of {config.max_positions}."
        )


def check_measurable(config: ModelConfig, space: Space) -> None:
    """InputError where only the first layer has a variant: costs are measured with that one as it is."""
    if not all(_kinds(config, space).values()):
        raise InputError("Costs are measured with the first layer as it is: leave it out of the search (space.fixed_layers: [0]).")


def measure_variants(
    config: ModelConfig, space: Space, meter: Meter, folder: Path, progress: Progress, *, repeats: int, device: torch.device
) -> dict[str, Any]:
    """Measure every variant; rounds that `costs.jsonl` holds stay.

    Returns:
        `parent_seconds` a token, and by half and size the `shares` of it that a layer takes less than with the parent's half:
        `median`, `low` and `high` of the rounds.
    """
    changed = _kinds(config, space)
    configs = {PARENT: config} | {name: replace(config, blocks=tuple(_blocks(config, change))) for name, change in changed.items()}

    def add() -> None:
        for name, one in configs.items():
            meter.add(name, random_model(one, meter.point.dtype, device), own=True)

    rounds = _rounds(meter, configs, add, folder / JOURNAL, progress, repeats=repeats)
    shares = {}
    for name, change in changed.items():
        found = sorted((one[name] / one[PARENT] - 1) / len(change) for one in rounds)
        shares[name] = {"median": median(found), "low": found[0], "high": found[-1]}
    return {"parent_seconds": median(one[PARENT] for one in rounds), "shares": shares}


def _rounds(
    meter: Meter, names: Iterable[str], add: Callable[[], None], path: Path, progress: Progress, *, repeats: int
) -> list[dict[str, float]]:
    """Seconds a token of models in every round; rounds of these very models at this point that the journal holds stay.

    Args:
        add: gives the meter the models, where something is left to measure.
    """
    asked = make_id(asdict(meter.point), list(names))
    with Journal(path) as journal:
        missing = [number for number in range(repeats) if f"{number}-{asked}" not in journal]
        if missing:
            add()
            meter.warm_up()
        for number in progress.track(missing, len(missing), lambda: "rounds of measuring"):
            journal.append({"id": f"{number}-{asked}", "point": asdict(meter.point), "seconds": meter.round(number)})
        return [journal[f"{number}-{asked}"]["seconds"] for number in range(repeats)]


def _kinds(config: ModelConfig, space: Space) -> dict[str, dict[int, Choice]]:
    """By half and size the layers that are measured with it, and what they are then."""
    kinds = dict.fromkeys((half, size) for half in HALVES for sizes in space.sizes(half) for size in sizes[1:])
    return {f"{half}-{size}": _changed(config, half, size) for half, size in kinds}


def _changed(config: ModelConfig, half: Half, size: int) -> dict[int, Choice]:
    """Layers but the first that are larger than this size of a half, and what they are with it."""
    larger = [number for number, block in enumerate(config.blocks) if number and size_of(block, half) > size]
    own = {number: Choice(*(size_of(config.blocks[number], one) for one in HALVES)) for number in larger}
    return {number: replace(one, **{"kv_heads" if half == "attention" else "ffn_size": size}) for number, one in own.items()}


def _blocks(config: ModelConfig, change: Mapping[int, Choice]) -> Iterator[BlockConfig]:
    for number, block in enumerate(config.blocks):
        yield block_config(block, change[number]) if number in change else block


def random_model(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Transformer:
    """A model of random weights, with matrices of this type and never any of another."""
    with torch.device("meta"):
        model = Transformer(config).requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data = parameter.data.to(dtype)
    model.to_empty(device=device).init_weights(0)
    model.compute_dtype = dtype
    return model


def layer_share(table: Mapping[str, Any], own: Choice, choice: Choice) -> float:
    """Share of the parent's time that a layer takes more (below 0: less) than its own choice."""
    total = 0.0
    for half, mine, other in (("attention", own.kv_heads, choice.kv_heads), ("mlp", own.ffn_size, choice.ffn_size)):
        if other != mine:
            total += float(table["shares"][f"{half}-{other}"]["median"])
    return total


def compare_models(
    parent: Transformer, makers: Mapping[str, Callable[[], Transformer]], meter: Meter, path: Path, progress: Progress, *, repeats: int
) -> dict[str, dict[str, float]]:
    """Speeds of models against the parent, measured in turns: `median`, `low` and `high` of the rounds' ratios.

    Args:
        makers: make each model, where something is left to measure; a name stands for the same model at every start.
        path: journal of the rounds.
    """

    def add() -> None:
        meter.add(PARENT, parent, own=False)
        for name, make in makers.items():
            meter.add(name, make().requires_grad_(False), own=True)

    rounds = _rounds(meter, [PARENT, *makers], add, path, progress, repeats=repeats)
    ratios = {name: sorted(one[PARENT] / one[name] for one in rounds) for name in makers}
    return {name: {"median": median(ones), "low": ones[0], "high": ones[-1]} for name, ones in ratios.items()}
