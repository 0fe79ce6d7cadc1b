"""What an alignment run would take: calls, tokens, hours, memory and disk, stage by stage, after a probe of its model of some seconds."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch

from gristmill.core.device import free_memory
from gristmill.core.progress import Progress
from gristmill.data.chat import Message
from gristmill.data.rows import Demonstration, Prompt
from gristmill.evaluate.runner import MODES
from gristmill.generation.api import Completion, Request, SamplingParams
from gristmill.generation.cached import Client
from gristmill.judge.reward import RewardScorer
from gristmill.model.config import ModelConfig
from gristmill.model.flops import kv_bytes_per_token, num_parameters
from gristmill.model.hf import load_model
from gristmill.model.reward import RewardModel
from gristmill.model.transformer import TRAINING_PRECISIONS
from gristmill.parallel.memory import USABLE_SHARE, fits_into
from gristmill.synth.pipelines.base import Inputs
from gristmill.synth.registry import run_pipelines
from gristmill.synth.writer import DryRun
from gristmill.train.objectives.sft import demonstration_samples, sft_objective
from gristmill.train.settings import PreferenceTraining, Training, ramp_of
from gristmill.train.trainer import Trainer, TrainSettings
from gristmill.workflows.alignment.context import AlignmentContext
from gristmill.workflows.alignment.monitors import SAMPLES
from gristmill.workflows.alignment.recipe import BASE_ROW, AlignmentRecipe
from gristmill.workflows.train import training_memory

PROBE_SECONDS = 3.0  # of each of the probes
PROBE_PROMPTS = 16
KEPT = 0.5  # of the prompts get an answer that is kept, and of those that pairs are made for a pair: nobody knows before
REFERENCE = 1 / 3  # of training's work a token: log-probabilities of the reference, forward only
ROW_BYTES = 6  # a token, in rows and journals
LIBRARY_BYTES = 200 * 2**20  # of a run, beside what training alone loads


@dataclass(frozen=True)
class Speeds:
    """What the probe has measured on the run's device, in tokens a second.

    Attributes:
        answer_tokens: mean length of an answer.
        loading: seconds that reading the model takes.
    """

    generation: float
    training: float
    rating: float
    answer_tokens: float
    loading: float


@dataclass
class Stage:
    """What one stage would take; `endpoint_calls` are those of others, whose time is not known, `loads` how often a model is read or
    written."""

    stage: str
    calls: float = 0.0
    endpoint_calls: float = 0.0
    tokens_generated: float = 0.0
    tokens_trained: float = 0.0
    tokens_rated: float = 0.0
    models: int = 0
    loads: int = 0
    hours: float = 0.0
    disk_mib: float = 0.0


def dry_run(recipe: AlignmentRecipe, progress: Progress, unsafe_code: bool = False) -> dict[str, Any]:
    """Probe the model, and estimate a whole run without making anything.

    Returns:
        {"stages": [..], "total": {..}, "probe": {..}, "parameters", "device", "peak_memory_mib"}

    Raises:
        InputError: as a run.
    """
    with TemporaryDirectory() as folder:
        context = AlignmentContext(recipe, Path(folder) / "run", progress, unsafe_code)
        try:
            speeds = _probe(context)
            stages = _Plan(context, speeds).stages()
            config = context.base_config
        finally:
            context.close()
    size = num_parameters(config)
    peak, free = _peak_bytes(config, context.recipe, context.device), free_memory(context.device)
    for stage in stages:
        seconds = stage.tokens_generated / speeds.generation + stage.tokens_trained / speeds.training + stage.tokens_rated / speeds.rating
        stage.hours = (seconds + speeds.loading * stage.loads) / 3600
        tokens = stage.tokens_generated + stage.tokens_rated
        stage.disk_mib = (stage.models * 2 * 4 * size + ROW_BYTES * tokens) / 2**20  # a model and its last checkpoint, in fp32
    rows = [asdict(stage) for stage in stages]
    return {
        "stages": rows,
        "total": {key: sum(row[key] for row in rows) for key in rows[0] if key != "stage"},
        "probe": asdict(speeds),
        "parameters": size,
        "device": str(context.device),
        "peak_memory_mib": round(peak / 2**20),
        "usable_memory_mib": round(USABLE_SHARE * free / 2**20),
        "fits": fits_into(peak, free),
    }


def _peak_bytes(config: ModelConfig, recipe: AlignmentRecipe, device: torch.device) -> float:
    """Memory of the largest training stage beside the two engines that a run keeps."""
    training = max(training_memory(config, section, device).total for section in _sections(recipe))
    engines = 2 * num_parameters(config) * (4 if recipe.engine.precision == "fp32" else 6)
    in_flight = min(recipe.engine.max_batch, PROBE_PROMPTS * 4)
    cache = in_flight * kv_bytes_per_token(config, 4) * 2 * (recipe.answers.max_tokens + 128)
    return training + engines + cache + LIBRARY_BYTES


def _sections(recipe: AlignmentRecipe) -> list[Training]:
    return [recipe.demonstration_sft, recipe.reward, recipe.code_sft, recipe.general_sft, recipe.dpo, recipe.rpo]


# ---- the probe ----


def _probe(context: AlignmentContext) -> Speeds:
    asked = [p.messages for p in [*context.evaluation, *context.source.prompts()]][:PROBE_PROMPTS]
    asked = asked or [(Message("user", "What is rain?"),)]
    generation, answer_tokens, answered = _generation(context, asked)
    talks = [d.messages for d in context.source.demonstrations()[:64]] or answered
    started = time.perf_counter()
    load_model(context.base_folder)
    loading = time.perf_counter() - started
    return Speeds(generation, _training(context, talks), _rating(context, talks), answer_tokens, loading)


def _generation(context: AlignmentContext, asked: Sequence[tuple[Message, ...]]) -> tuple[float, float, list[tuple[Message, ...]]]:
    """Output tokens a second, reading the prompts included, the mean length of an answer, and the conversations.

    A short pass and a longer one: their difference is what a token costs, and the short one's rest what reading the prompts does.
    """
    engine, most = context.engine(BASE_ROW, context.base_folder), context.recipe.answers.max_tokens
    samples = context.recipe.answers.samples

    def answer(num_tokens: int, name: str) -> tuple[float, list[list[Completion]]]:
        sampling = SamplingParams(temperature=1.0, max_tokens=num_tokens, n=samples)
        requests = [Request(f"{name}-{i}", messages, sampling, context.recipe.seed) for i, messages in enumerate(asked)]
        started = time.perf_counter()
        done = {request.id: completions for request, completions in engine.generate(requests)}
        return time.perf_counter() - started, [done[request.id] for request in requests]

    answer(1, "first")  # what is built and allocated once
    seconds, short = answer(min(most, 4), "short")
    tokens = _num_tokens(short)
    longer = int(min(most, max(12, 4 * PROBE_SECONDS / seconds)))
    more_seconds, more = answer(longer, "long")
    more_tokens = _num_tokens(more)
    each = max((more_seconds - seconds) / (more_tokens - tokens), 1e-9) if more_tokens > tokens else seconds / max(1, tokens)
    reading = max(0.0, seconds - each * tokens) / (len(asked) * samples)
    # what was cut off here would have gone on to the recipe's limit, for all that is known
    length = fmean(float(c.num_tokens if c.finish == "stop" else most) for answers in more for c in answers)
    talks = [(*messages, Message("assistant", answers[0].text)) for messages, answers in zip(asked, more, strict=True)]
    return length / max(reading + each * length, 1e-9), length, talks


def _num_tokens(answers: Sequence[Sequence[Completion]]) -> int:
    return sum(c.num_tokens for some in answers for c in some)


def _training(context: AlignmentContext, talks: Sequence[tuple[Message, ...]]) -> float:
    """Tokens a second of SFT, the optimizer included."""
    section = context.recipe.general_sft
    model, tokenizer = load_model(context.base_folder)
    rows = [Demonstration(str(i), "probe", messages, "probe") for i, messages in enumerate(talks)]
    samples = demonstration_samples(rows, context.format, tokenizer)
    settings = TrainSettings(
        lr=1e-9, steps=9, batch_size=1, precision=section.precision, micro_batch_tokens=section.micro_batch_tokens, schedule="constant"
    )
    trainer = Trainer(model, sft_objective, settings, device=context.device)
    size = ramp_of(section.batch_size or 8)[0][1]
    trainer.step([samples[0]])  # what is allocated once
    started, tokens, place = time.perf_counter(), 0.0, 0
    while not place or (time.perf_counter() - started < PROBE_SECONDS and place < 8 * size):
        before = trainer.result.tokens
        trainer.step([samples[(place + i) % len(samples)] for i in range(size)])
        tokens += trainer.result.tokens - before
        place += size
        if trainer.result.steps == 9:
            break
    return tokens / (time.perf_counter() - started)


def _rating(context: AlignmentContext, talks: Sequence[tuple[Message, ...]]) -> float:
    """Tokens a second of a reward model of this size."""
    model, tokenizer = load_model(context.base_folder)
    model.compute_dtype = TRAINING_PRECISIONS[context.recipe.reward.precision]
    scorer = RewardScorer(RewardModel(model.to(context.device)), tokenizer, context.format)
    talks = [messages for messages in talks if scorer.fits(messages)]
    started, tokens = time.perf_counter(), 0
    for start in range(0, len(talks), 8):
        some = talks[start : start + 8]
        scorer.score(some)
        tokens += sum(len(context.format.render(messages, tokenizer).ids) for messages in some)
        if time.perf_counter() - started > PROBE_SECONDS:
            break
    return tokens / (time.perf_counter() - started)


# ---- the plan ----


class _Plan:
    """Counts of every stage, from the recipe, the files and the probe."""

    def __init__(self, context: AlignmentContext, speeds: Speeds):
        self.context, self.recipe, self.answer = context, context.recipe, speeds.answer_tokens
        self.demonstrations, self.ratings = context.source.demonstrations(), context.source.ratings()
        self.prompts = context.source.prompts()

        def whole(messages: Sequence[Message]) -> float:
            return float(len(context.format.render(messages, context.tokenizer).ids))

        asked = [p.messages for p in [*context.evaluation, *self.prompts][:200]]
        texts = [messages[-1].content for messages in asked]
        self.chars = sum(map(len, texts)) / max(1, sum(len(context.tokenizer.encode(text)) for text in texts)) or 1.0  # a token's
        self.asked = _mean([float(len(context.format.render_prompt(messages, context.tokenizer))) for messages in asked])
        self.demonstration = _mean([whole(d.messages) for d in self.demonstrations[:200]])
        # the answers to one prompt are rated together, and the prompt is read once
        rated = self.ratings[:200]
        prompts = {r.pair: len(context.format.render_prompt(r.messages[:-1], context.tokenizer)) for r in rated}
        again = sum(prompts[r.pair] for r in rated) - sum(prompts.values())
        self.rated = max(0.0, sum(whole(r.messages) for r in rated) - again) / max(1, len(rated))

    def stages(self) -> list[Stage]:
        recipe, num_evaluation = self.recipe, len(self.context.evaluation)
        held = min(recipe.data.num_held_out_ratings, len(self.ratings) // 3)
        out = [self._asks(BASE_ROW, len(MODES) * num_evaluation)]
        if self.ratings:
            out.append(self._trains("reward", recipe.reward, len(self.ratings) - held, self.rated))
        if self.demonstrations:
            out.append(self._model("demonstrations", recipe.demonstration_sft, len(self.demonstrations), self.demonstration))
        if self.ratings:
            check = self._asks("reward-check", num_evaluation * recipe.answers.samples)
            check.tokens_rated += held * self.rated + check.calls * (self.asked + self.answer)
            out.append(check)
        out += self._monitors("monitors")
        synthetic = 0.0
        for number in range(1, recipe.rounds + 1):
            out += self._round(number, synthetic)
            synthetic += self._kept
        models = [row for row in out if row.models and row.stage != "reward"]
        validation = self._asks("validation", (len(models) + 1) * len(self.context.validation))
        validation.loads = len(models) + 1
        return [*out, validation, *self._measurements(len(models) + 1)]

    def _measurements(self, num_models: int) -> list[Stage]:
        """Benchmarks and safety rows of all models that are asked; what guards cost is not known."""
        recipe, out = self.recipe, []
        num_asked = {"each_stage": num_models, "each_round": recipe.rounds + 1 + bool(self.demonstrations), "end": 3}
        if recipe.evaluate is not None and (asked := self.context.benchmarks) is not None:
            num = num_asked[recipe.evaluate.when]
            stage = Stage("benchmarks", calls=num * asked.num_answers, tokens_generated=num * asked.num_tokens, loads=num)
            stage.tokens_rated = num * asked.num_read / self.chars
            out.append(stage)
        if recipe.safety is not None:
            num = num_asked[recipe.safety.when]
            stage = self._asks("safety", num * (len(self.context.probes) + 2 * len(self.context.canaries)))
            stage.loads = num
            out.append(stage)
        return out

    def _round(self, number: int, synthetic: float) -> list[Stage]:
        recipe, answer = self.recipe, self.asked + self.answer
        local, name = self._is_local(number), f"r{number}"
        self._kept = 0.0
        prompts: Sequence[Prompt] = self.prompts
        out, num_prompts = [], 0.0
        if recipe.control != "human-only":
            writes, written = self._writes(f"{name}-prompts", local)
            num_prompts = len(prompts) * (1 - KEPT) ** (number - 1) + written
            answers = self._asks(f"{name}-answers", num_prompts * recipe.answers.samples, local)
            answers.tokens_rated = self._rates(answers)
            repaired = recipe.judging.repair.max_per_prompt if recipe.judging.repair else 0
            self._kept = KEPT * num_prompts * min(recipe.judging.max_per_prompt + repaired, recipe.answers.samples)
            out += [writes, answers]
        human = len(self.demonstrations)
        code = sum(d.task in self.context.source.code_tasks for d in self.demonstrations)
        share = code / max(1, human)
        total = human + synthetic + self._kept
        mean = (human * self.demonstration + (total - human) * answer) / max(1.0, total)
        if code:
            out.append(self._model(f"{name}-code-sft", recipe.code_sft, total * share, mean))
        out.append(self._model(f"{name}-general-sft", recipe.general_sft, total * (1 - share), mean))
        stages: list[tuple[str, PreferenceTraining]] = [("dpo", recipe.dpo)]
        stages += [(f"rpo{i}", recipe.rpo) for i in range(1, recipe.rpo_iterations + 1)]
        for stage, settings in stages:
            num = min(settings.num_prompts, num_prompts)
            pairs = self._asks(f"{name}-{stage}-pairs", num * recipe.answers.samples)
            pairs.tokens_rated = self._rates(pairs)
            trained = self._model(f"{name}-{stage}", settings, min(settings.num_pairs, KEPT * num), self.asked + 2 * self.answer)
            trained.tokens_trained += REFERENCE * min(settings.num_pairs, KEPT * num) * (self.asked + 2 * self.answer)
            out += [pairs, trained]
        return [*out, *self._monitors(f"{name}-monitors")]

    def _asks(self, stage: str, num: float, local: bool = True) -> Stage:
        if not local:
            return Stage(stage, endpoint_calls=num)
        return Stage(stage, calls=num, tokens_generated=num * self.answer)

    def _rates(self, answers: Stage) -> float:
        judged = self.ratings or (self.recipe.judging.reward and self.recipe.judging.reward.folder)
        return (answers.calls + answers.endpoint_calls) * (self.asked + self.answer) if judged else 0.0

    def _trains(self, stage: str, settings: Training, num_rows: float, tokens: float) -> Stage:
        batch = max(size for _, size in ramp_of(settings.batch_size or 1))
        samples = settings.steps * batch if settings.steps else num_rows * (settings.epochs or 1)
        return Stage(stage, tokens_trained=samples * tokens if num_rows else 0.0, models=1, loads=4)

    def _model(self, stage: str, settings: Training, num_rows: float, tokens: float) -> Stage:
        """A stage that trains a model and evaluates it."""
        trained, asked = self._trains(stage, settings, num_rows, tokens), self._asks(stage, len(MODES) * len(self.context.evaluation))
        trained.calls, trained.tokens_generated = asked.calls, asked.tokens_generated
        return trained

    def _monitors(self, stage: str) -> list[Stage]:
        if not self.ratings and not self.demonstrations:  # no text of people to measure against
            return []
        num = min(SAMPLES, len(self.context.evaluation))
        out = self._asks(stage, num)
        out.tokens_rated = 2 * num * (self.asked + self.answer)  # two models' likelihoods
        return [out]

    def _is_local(self, number: int) -> bool:
        return not any(g.base_url for g in self.context.generators(number))

    def _writes(self, stage: str, local: bool) -> tuple[Stage, int]:
        """Prompts that the pipelines write, by their own code with made-up answers."""
        recipe = self.recipe
        writer = DryRun(cast(Client, _Nobody()), self.context.templates, recipe.seed)
        inputs = Inputs(tasks=self.context.source.tasks, prompts=list(self.prompts))
        made = asyncio.run(run_pipelines(writer, recipe.topics, recipe.pipelines, inputs=inputs))
        calls, tokens = sum(writer.calls.values()), sum(writer.tokens_out.values())
        out = Stage(stage, calls=calls, tokens_generated=tokens) if local else Stage(stage, endpoint_calls=calls)
        return out, len(made.prompts)


class _Nobody:
    """Stands for a client: a dry run asks nobody."""

    concurrency = 1

    def model_of(self, key: str) -> str:
        return "model"


def _mean(values: Sequence[float]) -> float:
    return fmean(values) if values else 0.0


def estimate_lines(estimate: dict[str, Any], spoken: Callable[[float], str]) -> list[str]:
    """The estimate as aligned lines; `spoken` writes seconds as people say them."""
    probe, total = estimate["probe"], estimate["total"]
    head = f"{'stage':<20}{'calls':>9}{'generated':>12}{'trained':>12}{'rated':>12}{'time':>14}{'disk MiB':>10}"
    lines = [
        f"{estimate['parameters'] / 1e6:,.4g}M parameters on {estimate['device']}, probed: {probe['generation']:,.0f} tokens/s generated, "
        f"{probe['training']:,.0f} trained, {probe['rating']:,.0f} rated; answers of about {probe['answer_tokens']:,.0f} tokens",
        head,
    ]
    for row in [*estimate["stages"], {"stage": "in all", **total}]:
        calls, hours, disk = row["calls"] + row["endpoint_calls"], row["hours"], row["disk_mib"]
        tokens = "".join(f"{row[f'tokens_{kind}']:>12,.0f}" for kind in ("generated", "trained", "rated"))
        lines.append(f"{row['stage']:<20}{calls:>9,.0f}{tokens}{spoken(3600 * hours):>14}{disk:>10,.0f}")
    if total["endpoint_calls"]:
        lines.append(f"{total['endpoint_calls']:,.0f} of the calls are an endpoint's, whose time is not counted.")
    room = "" if estimate["fits"] else f"It does not fit: {estimate['usable_memory_mib']:,} MiB of memory are usable. "
    lines.append(
        f"In all {spoken(3600 * total['hours'])}, {estimate['peak_memory_mib']:,} MiB of memory at the peak, {total['disk_mib']:,.0f} MiB "
        f"of disk. {room}Assumed: half of the prompts get an answer that is kept, and half of those asked again a pair. Nothing was made."
    )
    return lines
