"""What every stage works with: the recipe, the models made so far, generation that loses nothing, and the judges."""

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from gristmill.core.errors import InputError
from gristmill.core.progress import Progress
from gristmill.data.chat import FORMATS, ChatFormat, Message, guess_format
from gristmill.data.rows import Prompt
from gristmill.engine.engine import Engine
from gristmill.generation.api import Completion, Request
from gristmill.generation.cached import BatchingClient, CachedClient, completions_of
from gristmill.judge.reward import RewardScorer
from gristmill.miniature.base import BASE
from gristmill.miniature.source import MiniatureSource
from gristmill.model.hf import fingerprint, load_model, load_reward
from gristmill.model.quantized import Quantize
from gristmill.model.reward import REWARD_WEIGHTS
from gristmill.model.transformer import PRECISIONS
from gristmill.runs.journal import Journal
from gristmill.runs.run_dir import RunDir
from gristmill.sandbox.sandbox import Sandbox
from gristmill.synth.templates import TemplatePack
from gristmill.verify.verify import verify
from gristmill.workflows.alignment.recipe import AlignmentRecipe
from gristmill.workflows.alignment.source import FileSource, Source, normalize_prompt

CONTEXT_MARGIN = 16  # an answer's text may take some tokens more when it is tokenized again


class AlignmentContext:
    """One run in progress.

    Args:
        recipe: resolved.
        folder: the run's folder.
        progress: where work announces itself.
        unsafe_code: run model-written programs without a jail.

    Raises:
        InputError: a file of the recipe is missing or wrong, or there is no jail for a run that needs one.
    """

    def __init__(self, recipe: AlignmentRecipe, folder: Path, progress: Progress, unsafe_code: bool = False):
        self.recipe, self.progress = recipe, progress
        if recipe.threads:
            torch.set_num_threads(recipe.threads)
        self.pack = TemplatePack.load(recipe.writing.templates)
        asked = self.pack["task_prompt"]
        self.source: Source = MiniatureSource(recipe.data, recipe.seed) if recipe.world else FileSource(recipe.data, asked)
        topics = recipe.writing.topics
        have = {"tasks": bool(self.source.tasks), "topics": bool(topics.given() or topics.macro or topics.broad), "prompts": True}
        recipe.writing.pipelines.check([name for name, there in have.items() if there])
        self.base_folder = BASE if recipe.model == "miniature" else Path(recipe.model)
        base, self.tokenizer = load_model(self.base_folder)  # fails here, before any work, when the checkpoint is bad
        self._context = base.config.max_positions
        self.base_fingerprint = fingerprint(self.base_folder)
        self.format: ChatFormat = guess_format(self.tokenizer) if recipe.chat_format == "auto" else FORMATS[recipe.chat_format]
        self.format.end_of_turn_id(self.tokenizer)
        self.evaluation: list[Prompt] = self.source.evaluation()
        self.held_out = frozenset(normalize_prompt(p.messages) for p in self.evaluation)
        for p in [*self.evaluation, *self.source.prompts()]:
            if not self.fits(p.messages):
                raise InputError(
                    f"Prompt {p.messages[-1].content[:60]!r} leaves no room for an answer of {recipe.responses.max_tokens} tokens in the "
                    f"model's context of {self._context}: take it out, or lower responses.max_tokens."
                )
        if recipe.judging.weights not in REWARD_WEIGHTS:
            raise InputError(f"Unknown reward weights {recipe.judging.weights!r}: choose one of {', '.join(REWARD_WEIGHTS)}.")
        self._resources = ExitStack()
        needs_code = bool(self.source.code_tasks) or any((p.truth or {}).get("kind") == "code" for p in self.evaluation)
        self._sandbox = self._resources.enter_context(Sandbox(unsafe=unsafe_code)) if needs_code else None
        self._programs: dict[tuple[str, str], bool] = {}
        self._engines: dict[str, Engine] = {}
        self._scorer: RewardScorer | None = None
        self.reward_report: dict[str, Any] = {}
        self.run = RunDir(folder, recipe, progress)

    def close(self) -> None:
        """Stop the sandbox."""
        self._resources.close()

    def fits(self, messages: Sequence[Message]) -> bool:
        """Whether a prompt and its longest answer fit in the model's context."""
        used = len(self.format.render_prompt(messages, self.tokenizer)) + self.recipe.responses.max_tokens
        return used + CONTEXT_MARGIN <= self._context

    # ---- models ----

    def engine(self, name: str, folder: Path) -> Engine:
        """The model in a folder, ready to generate; the two last used are kept."""
        key = str(folder)
        if key not in self._engines:
            while len(self._engines) >= 2:
                self._engines.pop(next(iter(self._engines)))
            model, _ = load_model(folder)
            responses = self.recipe.responses
            dtype = torch.float32 if responses.precision == "fp32" else torch.bfloat16
            quantize: Quantize = "int8" if responses.precision == "int8" else ""
            self._engines[key] = Engine(model, self.tokenizer, self.format, name, responses.max_batch, dtype, quantize=quantize)
        return self._engines[key]

    def scorer(self, folder: Path) -> RewardScorer:
        """The reward model, with the recipe's aggregation weights."""
        if self._scorer is None:
            model, tokenizer = load_reward(folder)
            model.backbone.compute_dtype = PRECISIONS[self.recipe.reward.precision]  # as in its training
            self._scorer = RewardScorer(model, tokenizer, self.format, weights=REWARD_WEIGHTS[self.recipe.judging.weights])
        return self._scorer

    # ---- generation ----

    def client(self, engine: Engine, journal: Journal) -> CachedClient:
        """Asks an engine what the journal does not hold. A full disk ends the run at once: it is taken up when there is room."""
        return CachedClient(BatchingClient(_Tracked(engine, self.progress)), journal, disk_patience=0.0)

    def generate(self, engine: Engine, requests: Sequence[Request], journal: Path) -> dict[str, list[Completion]]:
        """Completions of every request; those that an earlier start finished are read from the journal."""

        async def ask(client: CachedClient) -> None:
            await asyncio.gather(*(client.ask(request) for request in requests))

        with Journal(journal) as done:
            asyncio.run(ask(self.client(engine, done)))
            return {request.id: completions_of(done[request.id]) for request in requests}

    # ---- judging ----

    def check(self, cases: Sequence[tuple[dict[str, Any], str]]) -> list[bool]:
        """Verify (truth, answer) pairs; programs run in the sandbox, each different one once."""
        collected: list[tuple[str, str]] = []

        def collect(program: str, tests: str) -> bool:
            if (program, tests) not in self._programs:
                collected.append((program, tests))
            return False

        for truth, answer in cases:
            if truth.get("kind") == "code":
                verify(truth, answer, collect)
        if collected:
            assert self._sandbox is not None
            unique = list(dict.fromkeys(collected))
            for start in range(0, len(unique), 64):
                part = unique[start : start + 64]
                for key, result in zip(part, self._sandbox.run_many(part), strict=True):
                    self._programs[key] = result.passed
                self.progress.tick(start + len(part), len(unique), "programs run")
        return [verify(truth, answer, lambda p, t: self._programs[p, t]) for truth, answer in cases]

    def rate(self, scorer: RewardScorer, conversations: Sequence[Sequence[Message]]) -> list[Any]:
        """Ratings in portions, so that progress shows."""
        out: list[Any] = []
        for start in range(0, len(conversations), 512):
            out += scorer.score(conversations[start : start + 512])
            self.progress.tick(len(out), len(conversations), "answers rated")
        return out


class _Tracked:
    """An engine whose answers show as progress."""

    def __init__(self, engine: Engine, progress: Progress):
        self.engine, self.progress, self.name = engine, progress, engine.name

    def generate(self, requests: Iterable[Request]) -> Iterator[tuple[Request, list[Completion]]]:
        wave, stats = list(requests), self.engine.stats
        tokens = stats.output_tokens
        yield from self.progress.track(self.engine.generate(wave), len(wave), lambda: f"answers, {stats.output_tokens - tokens:,} tokens")


def on_step(progress: Progress) -> Callable[[int, int, dict[str, float]], None]:
    """A training callback that shows step, loss and speed."""

    def show(step: int, total: int, metrics: dict[str, float]) -> None:
        progress.tick(step, total, f"steps, loss {metrics['loss']:.3f}, {metrics['tokens_per_second']:,.0f} tokens/s")

    return show
