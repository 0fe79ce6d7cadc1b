"""What every stage of an alignment run works with: the recipe, models, engines, clients of the generators, and judges."""

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from gristmill.core.device import pick_device
from gristmill.core.errors import InputError
from gristmill.core.progress import Progress
from gristmill.data.chat import ChatFormat, Message, find_format, with_template_of
from gristmill.data.rows import Prompt
from gristmill.engine.engine import Engine
from gristmill.generation.api import Completion, Request
from gristmill.generation.cached import BatchingClient, CachedClient, Client, completions_of
from gristmill.generation.settings import GeneratorSettings
from gristmill.judge.backends import client_of, rater_of
from gristmill.judge.filter_expr import FilterExpr
from gristmill.judge.judges import Judges, LocalRater
from gristmill.judge.programs import is_code
from gristmill.judge.reward import RewardScorer
from gristmill.judge.reward_client import weight_set
from gristmill.miniature.base import BASE
from gristmill.miniature.source import MiniatureSource
from gristmill.model.hf import fingerprint, load_model, load_reward
from gristmill.model.quantized import Quantize
from gristmill.model.transformer import PRECISIONS
from gristmill.runs import artifacts
from gristmill.runs.journal import Journal
from gristmill.runs.run_dir import RunDir
from gristmill.synth.templates import TemplatePack
from gristmill.workflows.alignment.recipe import AlignmentRecipe
from gristmill.workflows.alignment.source import DataSource, FileSource, normalize_prompt
from gristmill.workflows.dataset.steps import check_given_tests, open_verifier

CONTEXT_MARGIN = 16  # an answer's text may take some tokens more when it is tokenized again
ALL_AT_ONCE = 1 << 20  # requests: an engine makes its own batches
LATEST = "latest"  # checkpoint of a generator: the model before this round


class AlignmentContext:
    """One alignment run in progress.

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
        self.device = pick_device(recipe.device)
        if recipe.threads:
            torch.set_num_threads(recipe.threads)
        self.templates = TemplatePack.load(recipe.templates)
        request = self.templates["task_prompt"]
        self.source: DataSource = MiniatureSource(recipe.data, recipe.seed) if recipe.world else FileSource(recipe.data, request)
        topics = recipe.topics
        have = {"tasks": bool(self.source.tasks), "topics": bool(topics.given() or topics.macro or topics.broad), "prompts": True}
        recipe.pipelines.check([name for name, there in have.items() if there])
        self.base_folder = BASE if recipe.model == "miniature" else Path(recipe.model)
        base, self.tokenizer = load_model(self.base_folder)  # fails here, before any work, when the checkpoint is bad
        self.max_positions = base.config.max_positions
        self.base_fingerprint = fingerprint(self.base_folder)
        self.format: ChatFormat = find_format(recipe.chat_format, self.tokenizer)
        self.format.end_of_turn_id(self.tokenizer)
        self.saved_templates = with_template_of(self.format, self.tokenizer).chat_templates
        self.evaluation: list[Prompt] = self.source.evaluation()
        self.held_out = frozenset(normalize_prompt(p.messages) for p in self.evaluation)
        prompts = [*self.evaluation, *self.source.prompts()]
        for p in prompts:
            if not self.fits(p.messages):
                raise InputError(
                    f"Prompt {p.messages[-1].content[:60]!r} leaves no room for an answer of {recipe.answers.max_tokens} tokens in the "
                    f"model's context of {self.max_positions}: take it out, or lower answers.max_tokens."
                )
        for text in (recipe.judging.keep, recipe.judging.keep_chosen, recipe.dpo.keep_chosen, recipe.rpo.keep_chosen):
            if text:
                FilterExpr.parse(text)
        self.weights = weight_set(recipe.judging.reward.weights) if recipe.judging.reward else ()
        self._check_generators()
        self._resources = ExitStack()
        needs_code = bool(self.source.code_tasks) or any(is_code(p.truth) for p in prompts)
        self.verifier = open_verifier(self._resources, needs_code=needs_code, unsafe_code=unsafe_code, tick=progress.tick)
        if not recipe.world:  # the built-in world's are known to be right
            check_given_tests(prompts, unsafe_code=unsafe_code, quiet=progress.quiet)
        self._engines: dict[str, Engine] = {}
        self._scorer: RewardScorer | None = None
        self.reward_report: dict[str, Any] = {}
        self.run = RunDir(folder, recipe, progress)

    def close(self) -> None:
        """Stop the sandbox and let go of the folder."""
        self._resources.close()
        self.run.close()

    def _check_generators(self) -> None:
        """Raise `InputError` unless every generator can be asked."""
        for g in self.recipe.generators:
            if g.base_url:
                client_of([g], self.recipe.calls, lambda g: self._local(g, {}, ""))
            elif g.folder is not None:
                fingerprint(g.folder)
            elif g.checkpoint not in (LATEST, *self.recipe.model_stages()):
                names = ", ".join((LATEST, *self.recipe.model_stages()))
                raise InputError(f"The run will have no checkpoint {g.checkpoint!r}: generators.checkpoint is one of {names}.")

    def fits(self, messages: Sequence[Message]) -> bool:
        """Whether a prompt and its longest answer fit in the model's context."""
        used = len(self.format.render_prompt(messages, self.tokenizer)) + self.recipe.answers.max_tokens
        return used + CONTEXT_MARGIN <= self.max_positions

    def holds(self, messages: Sequence[Message]) -> bool:
        """Whether a whole conversation fits in the model's context. Bytes that are no UTF-8 become up to three times as many tokens."""
        return len(self.format.render(messages, self.tokenizer).ids) <= self.max_positions

    # ---- models ----

    def engine(self, name: str, folder: Path) -> Engine:
        """The model in a folder, ready to generate; the two last used are kept."""
        key = str(folder)
        if key not in self._engines:
            while len(self._engines) >= 2:
                self._engines.pop(next(iter(self._engines)))
            model, tokenizer = load_model(folder)
            # a generator may be another model; Base has its folder's template, the run's other models that of the run's format
            same = tokenizer.fingerprint() == self.tokenizer.fingerprint()
            same = same and tokenizer.chat_templates in (self.tokenizer.chat_templates, self.saved_templates)
            chat_format = self.format if same else find_format("auto", tokenizer)
            settings = self.recipe.engine
            dtype = torch.float32 if settings.precision == "fp32" else torch.bfloat16
            quantize: Quantize = "int8" if settings.precision == "int8" else ""
            self._engines[key] = Engine(
                model.to(self.device), tokenizer, chat_format, name=name, max_batch=settings.max_batch, dtype=dtype, quantize=quantize
            )
        return self._engines[key]

    def scorer(self, folder: Path) -> RewardScorer:
        """The reward model that the run has trained, with the recipe's aggregation weights."""
        if self._scorer is None:
            model, tokenizer = load_reward(folder)
            model.backbone.compute_dtype = PRECISIONS[self.recipe.reward.precision]  # as in its training
            self._scorer = RewardScorer(model.to(self.device), tokenizer, self.format, weights=self.weights)
        return self._scorer

    # ---- generation ----

    def generators(self, number: int) -> list[GeneratorSettings]:
        """Who writes in a round; none: its latest model."""
        return [g for g in self.recipe.generators if not g.rounds or number in g.rounds]

    def client(self, number: int, models: dict[str, Path], latest: str) -> Client:
        """Who writes in a round: the recipe's generators, or else the latest model of the run."""
        found = self.generators(number) or [GeneratorSettings(checkpoint=LATEST)]
        return client_of(found, self.recipe.calls, lambda g: self._local(g, models, latest))

    def _local(self, g: GeneratorSettings, models: dict[str, Path], latest: str) -> tuple[Client, str]:
        """A model in this process, and its name: a checkpoint of the run, or a folder's."""
        if g.folder is not None:
            name, folder = g.folder.name, g.folder
        else:
            name = latest if g.checkpoint == LATEST else g.checkpoint
            if name not in models:
                raise InputError(f"The run has no model {name!r} yet: generators.checkpoint is one of {', '.join([LATEST, *models])}.")
            folder = models[name]
        return self.engine_client(self.engine(name, folder)), name

    def engine_client(self, engine: Engine) -> Client:
        """An engine whose answers show as progress. All that waits goes through it together, so that a run gives the same rows again."""
        return BatchingClient(_Tracked(engine, self.progress), ALL_AT_ONCE)

    def cached(self, client: Client, journal: Journal) -> CachedClient:
        """Asks a client what the journal does not hold. A full disk ends the run at once: it is taken up when there is room."""
        return CachedClient(client, journal, disk_patience=0.0)

    def generate(self, engine: Engine, requests: Sequence[Request], journal: Path) -> dict[str, list[Completion]]:
        """Completions of every request; those that an earlier start finished are read from the journal."""

        async def ask(client: CachedClient) -> None:
            await asyncio.gather(*(client.complete(request) for request in requests))

        with Journal(journal) as done:
            asyncio.run(ask(self.cached(self.engine_client(engine), done)))
            return {request.id: completions_of(done[request.id]) for request in requests}

    # ---- judging ----

    def judges(self, stack: ExitStack, folder: Path, *, reward_folder: Path | None, client: CachedClient) -> Judges:
        """The judges of a stage, as long as the stack is open."""
        reward, rater = self.recipe.judging.reward, None
        if reward is not None and (reward.base_url or reward.folder):
            ratings = stack.enter_context(Journal(folder / artifacts.RATING_CALLS.file))
            chat_format, device = self.recipe.chat_format, self.recipe.device
            rater = rater_of(reward, self.recipe.calls, ratings, chat_format=chat_format, device=device, tick=self.progress.tick)
        elif reward is not None and reward_folder is not None:
            rater = LocalRater(self.scorer(reward_folder), self.progress.tick)
        return Judges(self.recipe.judging, self.verifier, rater, weights=self.weights, client=client)


class _Tracked:
    """An engine whose answers show as progress."""

    def __init__(self, engine: Engine, progress: Progress):
        self.engine, self.progress, self.name = engine, progress, engine.name

    def generate(self, requests: Iterable[Request]) -> Iterator[tuple[Request, list[Completion]]]:
        wave, stats = list(requests), self.engine.stats
        tokens = stats.output_tokens
        yield from self.progress.track(self.engine.generate(wave), len(wave), lambda: f"answers, {stats.output_tokens - tokens:,} tokens")
