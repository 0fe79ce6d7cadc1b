"""What every stage of an alignment run works with: the recipe, models, engines, clients of the generators, and judges."""

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch

from gristmill import __version__
from gristmill.core.config import Section, read
from gristmill.core.device import pick_device, pick_precision
from gristmill.core.errors import InputError
from gristmill.core.progress import Progress
from gristmill.data.chat import Message
from gristmill.data.chat_format import ChatFormat
from gristmill.data.find_format import find_format, with_template_of
from gristmill.data.rows import Prompt, make_id
from gristmill.engine.engine import Engine
from gristmill.evaluate.attacks import ATTACKS
from gristmill.evaluate.safety import Canary, Probe, read_canaries
from gristmill.evaluate.task import find_tasks
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
from gristmill.model.flops import num_parameters
from gristmill.model.hf import fingerprint, load_model, load_reward
from gristmill.model.lora import check_adapters
from gristmill.model.quantized import Quantize
from gristmill.model.transformer import TRAINING_PRECISIONS
from gristmill.parallel.mesh import Mesh
from gristmill.runs import artifacts
from gristmill.runs.journal import Journal
from gristmill.runs.run_dir import RunDir
from gristmill.synth.templates import TemplatePack
from gristmill.train.by_size import Kind, described, fill
from gristmill.train.settings import Training
from gristmill.train.sharded import check_parallel
from gristmill.workflows.alignment.ranks import AlignmentRanks
from gristmill.workflows.alignment.recipe import AlignmentRecipe
from gristmill.workflows.alignment.source import DataSource, FileSource, normalize_prompt
from gristmill.workflows.alignment.state import ReadSaid
from gristmill.workflows.benchmark_requests import BenchmarkArgs, Checked, check_benchmarks
from gristmill.workflows.dataset.steps import check_given_tests, open_verifier
from gristmill.workflows.safety import Guard, HeadGuard, SafetySettings, guard_identity, open_guards, read_sets
from gristmill.workflows.train import lora_config

CONTEXT_MARGIN = 16  # an answer's text may take some tokens more when it is tokenized again
ALL_AT_ONCE = 1 << 20  # requests: an engine makes its own batches
STAGE_KINDS: dict[str, Kind] = {
    "demonstration_sft": "demonstration_sft",
    "reward": "reward",
    "code_sft": "code_sft",
    "general_sft": "sft",
    "dpo": "preference",
    "rpo": "preference",
}
ROWS_OF: dict[str, Callable[[DataSource], Sequence[Any]]] = {  # where they are known before the run
    "demonstration_sft": lambda source: source.demonstrations(),
    "reward": lambda source: source.ratings(),
}
WHERE = {"base_url", "api_key_env", "api_key_file"}  # of a model that is asked
ASKED = ("answers.max_tokens", "engine.precision")  # how models are evaluated
LATEST = "latest"  # checkpoint of a generator: the model before this round


def resolved_recipe(
    recipe: AlignmentRecipe, num_parameters: int, device: torch.device, *, source: DataSource, folder: Path, mesh: Mesh | None = None
) -> AlignmentRecipe:
    """The recipe with everything that it leaves to the model's size and the device, as `train.by_size` chooses it.

    Args:
        num_parameters: of the Base model.
        folder: the run's. What computes in which precision stays as it was there, also on another device.
        mesh: the processes of the run, of which the first chooses by measuring.
    """
    picked = mesh.first(pick_precision(device)) if mesh is not None and mesh.size > 1 else ""
    before: dict[str, Any] = {}
    with suppress(InputError):
        before = read(folder / "recipe.yaml")

    def precision(name: str) -> str:
        section = before.get(name)
        found = section.get("precision") if isinstance(section, dict) else None
        return found if found in TRAINING_PRECISIONS else picked

    changes: dict[str, Any] = {}
    for name, kind in STAGE_KINDS.items():
        section: Training = getattr(recipe, name)
        rows = ROWS_OF[name](source) if name in ROWS_OF and section.batch_size is None else ()
        changes[name] = fill(section, kind, num_parameters, device=device, num_rows=len(rows), precision=precision(name))
    if recipe.engine.precision == "auto":
        changes["engine"] = recipe.engine.model_copy(update={"precision": precision("engine") or pick_precision(device)})
    return recipe.model_copy(update=changes)


class AlignmentContext:
    """One alignment run in progress.

    Args:
        recipe: resolved.
        folder: the run's folder.
        progress: where work announces itself.
        unsafe_code: run model-written programs without a jail.
        redo: as `RunDir` takes it.
        mesh: the processes of the run, of which the first alone has the folder (`AlignmentRanks`); default this one alone.
        read_said: as `loop.run` takes it.

    Raises:
        InputError: a file of the recipe is missing or wrong, or there is no jail for a run that needs one.
    """

    def __init__(
        self,
        recipe: AlignmentRecipe,
        folder: Path,
        progress: Progress,
        unsafe_code: bool = False,
        *,
        redo: bool = False,
        mesh: Mesh | None = None,
        read_said: ReadSaid | None = None,
    ):
        self.read_said = read_said
        self.device, self.progress = pick_device(recipe.device), progress
        if recipe.threads:
            torch.set_num_threads(recipe.threads)
        self.templates = TemplatePack.load(recipe.templates)
        request = self.templates["task_prompt"]
        self.source: DataSource = MiniatureSource(recipe.data, recipe.seed) if recipe.world else FileSource(recipe.data, request)
        topics = recipe.topics
        have = {"tasks": bool(self.source.tasks), "topics": bool(topics.given() or topics.macro or topics.broad), "prompts": True}
        for pipelines in (recipe.pipelines, recipe.probe.fallback):
            pipelines.check([name for name, there in have.items() if there])
        self.base_folder = BASE if recipe.model == "miniature" else Path(recipe.model)
        base, self.tokenizer = load_model(self.base_folder)  # fails here, before any work, when the checkpoint is bad
        sections = (recipe.demonstration_sft, recipe.reward, recipe.code_sft, recipe.general_sft, recipe.dpo, recipe.rpo)
        for section in sections:
            if section.lora is not None:
                check_adapters(base, lora_config(section.lora), base=section.lora.base)
        check_parallel(base.config, (mesh or Mesh()).dims, bases=[section.lora.base for section in sections if section.lora is not None])
        self.base_config, self.max_positions = base.config, base.config.max_positions
        given, size = recipe, num_parameters(base.config)
        self.recipe = recipe = resolved_recipe(given, size, self.device, source=self.source, folder=folder, mesh=mesh)
        self.base_fingerprint = fingerprint(self.base_folder)
        self.format: ChatFormat = find_format(recipe.chat_format, self.tokenizer)
        self.format.end_of_turn_id(self.tokenizer)
        self.saved_templates = with_template_of(self.format, self.tokenizer).chat_templates
        self.evaluation: list[Prompt] = self.source.evaluation()
        self.validation: list[Prompt] = self.source.validation()
        self.evaluated = frozenset(normalize_prompt(p.messages) for p in self.evaluation)
        # A world's prompts stay as they always were: what a round asked is no validation prompt any more (`best`).
        self.held_out = self.evaluated if recipe.world else self.evaluated | {normalize_prompt(p.messages) for p in self.validation}
        prompts = [*self.evaluation, *self.validation, *self.source.prompts()]
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
        self.unsafe_code = unsafe_code
        self.benchmarks: Checked | None = None
        self.guards: list[Guard] = []
        self.probes: list[Probe] = []
        self.canaries: list[Canary] = []
        self.asked: dict[str, str] = {}  # hash of all that a kind of measurement asks, and of how it is judged
        self._check_measurements()
        self._resources = ExitStack()
        self._engines: dict[str, Engine] = {}
        self._folders: WeakKeyDictionary[Engine, Path] = WeakKeyDictionary()
        self._scorer: tuple[Path, RewardScorer] | None = None
        self.reward_report: dict[str, Any] = {}
        training = {"chat_format": self.format, "device": self.device, "seed": recipe.seed, "weights": self.weights or None}
        training |= {"on_step": progress.train_step}
        self.ranks = AlignmentRanks(mesh or Mesh(), engine=self.engine, scorer=self.scorer, options=training)
        self.ranks.mesh.agree(make_id(__version__, recipe.model_dump(mode="json")), "recipes or versions of gristmill")
        if self.ranks.mesh.is_writer:
            try:
                self._open(folder, prompts, given, redo=redo)
            except BaseException:
                self.ranks.dismiss()
                raise

    def _open(self, folder: Path, prompts: Sequence[Prompt], given: AlignmentRecipe, *, redo: bool) -> None:
        """What the first process of a run alone has: the sandbox and the folder."""
        recipe, progress, unsafe_code = self.recipe, self.progress, self.unsafe_code
        needs_code = bool(self.source.code_tasks) or any(is_code(p.truth) for p in prompts) or self._runs_benchmark_code()
        self.verifier = open_verifier(self._resources, needs_code=needs_code, unsafe_code=unsafe_code, tick=progress.tick)
        if not recipe.world:  # the built-in world's are known to be right
            check_given_tests(prompts, unsafe_code=unsafe_code, quiet=progress.quiet)
        self.run = RunDir(folder, recipe, progress, redo=redo)
        if chosen := [name for name in STAGE_KINDS if getattr(recipe, name) != getattr(given, name)]:
            size = num_parameters(self.base_config)
            progress.say(f"settings for {size / 1e6:,.4g}M parameters on {self.device}, where the recipe gives none:")
            for name in chosen:
                progress.say(f"  {name}: {described(getattr(recipe, name))}")

    def close(self) -> None:
        """Stop the sandbox, let go of the folder, and let the other processes end."""
        self._resources.close()
        if self.ranks.mesh.is_writer:
            self.run.close()
            self.ranks.dismiss()

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

    # ---- benchmarks and safety rows ----

    def benchmark_args(self, out: Path | None = None) -> BenchmarkArgs:
        """What `evaluate` says, for the runner of benchmarks."""
        section = self.recipe.evaluate
        assert section is not None
        return BenchmarkArgs(**section.model_dump(exclude={"when"}), out=out, unsafe_code=self.unsafe_code)

    def safety_settings(self) -> SafetySettings:
        """What `safety` says, for the safety evaluation."""
        section = self.recipe.safety
        assert section is not None
        return SafetySettings(
            sets=section.rows,
            data=section.data,
            attacks=list(ATTACKS) if section.attacks == ("all",) else section.attacks,
            limit=section.limit,
            max_tokens=section.max_tokens or self.recipe.answers.max_tokens,
            seed=self.recipe.seed,
            concurrency=self.recipe.calls.concurrency,
            system=section.system,
            guards=self.guards,
        )

    def _runs_benchmark_code(self) -> bool:
        section = self.recipe.evaluate
        return section is not None and any(m.metric == "pass@1" for task in find_tasks(section.tasks) for m in task.metric_list)

    def _check_measurements(self) -> None:
        """Raise `InputError` unless the benchmarks and the safety rows can be asked of the run's models."""
        kind = "evaluate"
        try:
            if self.recipe.evaluate is not None:
                self.benchmarks = check_benchmarks(
                    self.benchmark_args(),
                    self.tokenizer,
                    self.max_positions,
                    chat_tokens=lambda text: len(self.format.render_prompt((Message("user", text),), self.tokenizer)),
                )
                self.asked[kind] = self.benchmarks.identity
            if (section := self.recipe.safety) is not None:
                kind = "safety"
                permissive = section.caution == "permissive"
                self.guards = open_guards(
                    section.guard,
                    section.guard_model,
                    section.guard_key_env,
                    logprobs=section.guard_logprobs,
                    taxonomy=section.taxonomy,
                    permissive=permissive,
                )
                for guard in self.guards:
                    if isinstance(guard, HeadGuard):
                        fingerprint(guard.folder)
                    elif not guard.asked.is_endpoint:
                        fingerprint(guard.asked.folder)
                self.canaries = read_canaries(section.canaries) if section.canaries is not None else []
                self.probes = read_sets(self.safety_settings()) if section.rows or section.data is not None else []
                if not self.canaries and not self.guards and not any(p.label for p in self.probes):
                    raise InputError(
                        "no row has a label (safe or unsafe) and there is no guard, so nothing could be judged: give one of both."
                    )
                told = [[p.id, p.label] for p in self.probes], [c.secret for c in self.canaries]
                settings = section.model_dump(mode="json", exclude={"when", "guard_key_env"})
                self.asked[kind] = make_id(told, settings, list(map(guard_identity, self.guards)), self.safety_settings().max_tokens)
        except InputError as e:
            raise InputError(f"{kind}: {e}") from e

    # ---- what a stage is made from ----

    def parts(self, *paths: str) -> dict[str, Any]:
        """Keys of the recipe, as `section` or `section.key`, that a stage reads, with their plain values."""
        out = {}
        for path in paths:
            value: Any = self.recipe
            for key in path.split("."):
                value = getattr(value, key)
            out[path] = value.model_dump(mode="json", exclude=WHERE) if isinstance(value, Section) else value
        return out

    def judging_parts(self, without: frozenset[str]) -> dict[str, Any]:
        """The section of the judges but for some keys; where a reward model answers, and with which key, changes nothing."""
        found = self.recipe.judging.model_dump(mode="json", exclude=set(without))
        reward = found.get("reward")
        return found | {"reward": reward and {key: value for key, value in reward.items() if key not in WHERE}}

    def who(self, number: int, made: dict[str, str], latest: str) -> list[Any]:
        """What decides how the generators of a round write: what was asked of them, and which models they are."""
        out: list[Any] = []
        for g in self.generators(number) or [GeneratorSettings(checkpoint=LATEST)]:
            name = latest if g.checkpoint == LATEST else g.checkpoint
            out.append([g.identity, made.get(name, "") if g.checkpoint else fingerprint(g.folder) if g.folder else ""])
        return out

    def fits(self, messages: Sequence[Message]) -> bool:
        """Whether a prompt and its longest answer fit in the model's context."""
        used = len(self.format.render_prompt(messages, self.tokenizer)) + self.recipe.answers.max_tokens
        return used + CONTEXT_MARGIN <= self.max_positions

    def holds(self, messages: Sequence[Message]) -> bool:
        """Whether a whole conversation fits in the model's context. Bytes that are no UTF-8 become up to three times as many tokens."""
        return self.format.fits(messages, self.tokenizer, self.max_positions)

    # ---- models ----

    def engine(self, name: str, folder: Path) -> Engine:
        """The model in a folder, ready to generate; the two last used are kept."""
        key = str(folder)
        if key not in self._engines:
            while len(self._engines) >= 2:
                self._engines.pop(next(iter(self._engines)))
            settings = self.recipe.engine
            dtype = torch.float32 if settings.precision == "fp32" else torch.bfloat16
            quantize: Quantize = "int8" if settings.precision == "int8" else ""
            held = torch.float32 if quantize else dtype
            model, tokenizer = load_model(folder, held, vector_dtype=torch.float32, device=self.device)
            # a generator may be another model; Base has its folder's template, the run's other models that of the run's format
            same = tokenizer.fingerprint() == self.tokenizer.fingerprint()
            same = same and tokenizer.chat_templates in (self.tokenizer.chat_templates, self.saved_templates)
            chat_format = self.format if same else find_format("auto", tokenizer)
            self._engines[key] = Engine(
                model, tokenizer, chat_format, name=name, max_batch=settings.max_batch, dtype=dtype, quantize=quantize, own=True
            )
            self._folders[self._engines[key]] = folder
        return self._engines[key]

    def scorer(self, folder: Path) -> RewardScorer:
        """A reward model that the run has trained, with the recipe's aggregation weights; the last one used is kept."""
        if self._scorer is None or self._scorer[0] != folder:
            self._scorer = None
            precision = TRAINING_PRECISIONS[self.recipe.reward.precision]  # as in its training
            model, tokenizer = load_reward(folder, precision, vector_dtype=torch.float32, device=self.device)
            self._scorer = folder, RewardScorer(model, tokenizer, self.format, weights=self.weights)
        return self._scorer[1]

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

    def engine_client(self, engine: Engine, num_at_once: int = ALL_AT_ONCE) -> Client:
        """An engine whose answers show as progress. All that waits goes through it together, so that a run gives the same rows again."""
        return BatchingClient(_Tracked(engine, self._folders[engine], self.progress, self.ranks), num_at_once)

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
            rater = LocalRater(self.ranks.shared_scorer(reward_folder), self.progress.tick)
        return Judges(self.recipe.judging, self.verifier, rater, weights=self.weights, client=client)


class _Tracked:
    """An engine whose answers show as progress."""

    def __init__(self, engine: Engine, folder: Path, progress: Progress, ranks: AlignmentRanks):
        self.engine, self.folder, self.progress, self.name, self.ranks = engine, folder, progress, engine.name, ranks

    def generate(self, requests: Iterable[Request]) -> Iterator[tuple[Request, list[Completion]]]:
        wave, stats = list(requests), self.engine.stats
        tokens = stats.output_tokens
        done = self.ranks.generate(wave, self.name, self.folder)
        yield from self.progress.track(done, len(wave), lambda: f"answers, {stats.output_tokens - tokens:,} tokens")
