"""A dataset run: prompts, answers and judgements as stages of a run folder, then the files that other tools read.

runs/NAME/00-prompts/          calls.jsonl (every call that ended, with its answer as it came), prompts, conversations, topics, refused
runs/NAME/01-answers/          calls.jsonl, responses as they came
runs/NAME/02-judging/          ratings.jsonl and calls.jsonl of endpoints, responses judged, kept, pairs
runs/NAME/calls.parquet        all calls, for queries
runs/NAME/export/, README.md   files that other tools read, and the dataset card
runs/NAME/results.json
"""

import asyncio
import hashlib
import random
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack, ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from gristmill.core.errors import InputError
from gristmill.core.progress import Progress
from gristmill.data.find_format import find_format
from gristmill.data.rows import Demonstration, Prompt, Refused, Response, make_id
from gristmill.data.tokenizer import Tokenizer
from gristmill.generation.cached import CachedClient, Client
from gristmill.generation.mixture import opened, shown, usage_of
from gristmill.judge.backends import check_reward, client_of, engine_client, rater_of
from gristmill.judge.filter_expr import FilterExpr
from gristmill.judge.judges import Judges, Rater
from gristmill.judge.programs import is_code
from gristmill.judge.reward_client import weight_set
from gristmill.judge.select import pair, select
from gristmill.runs import artifacts
from gristmill.runs.journal import Journal
from gristmill.runs.run_dir import RunDir, Stage
from gristmill.synth.pipelines.base import Inputs
from gristmill.synth.registry import PipelineOutput, run_pipelines, take
from gristmill.synth.templates import TemplatePack
from gristmill.synth.writer import DryRun, Writer
from gristmill.verify.repair import instructions_of
from gristmill.workflows.dataset import inputs
from gristmill.workflows.dataset.export import export, write_calls
from gristmill.workflows.dataset.recipe import DatasetRecipe
from gristmill.workflows.dataset.steps import (
    ANSWER_FILES,
    PROMPT_FILES,
    answer_prompts,
    check_given_tests,
    distinct,
    open_verifier,
    write_topics,
)

JUDGING_FILES: list[artifacts.AnyArtifact] = [artifacts.RESPONSES, artifacts.KEPT, artifacts.PAIRS]


def dry_run(recipe: DatasetRecipe) -> dict[str, Any]:
    """What a run would take: calls, tokens and money of each model. Nobody is asked, so lists have as many items as were asked for
    and all rows are kept: an estimate, four characters a token, and short of repairs and retries.

    Raises:
        InputError: as `run`.
    """
    templates, given, source = _check(recipe, asks=False)

    async def go() -> DryRun:
        writer = DryRun(source, templates, recipe.seed, answer_sampling=recipe.turn.sampling()[0])
        made, _ = await _write(recipe, writer, given, None)
        rows = await answer_prompts(writer, made.prompts, recipe.answers.sampling()) if recipe.answers else []
        if recipe.judging.llm:
            judge = _judge_model(recipe) or source.model_of("")
            writer.calls[judge] += 2 * len(made.prompts)
            writer.tokens_in[judge] += 2 * sum(len(r.text) for r in rows) // 4
        if recipe.judging.reward is not None and recipe.judging.reward.base_url:
            writer.calls["reward model"] += len(rows)
            writer.tokens_in["reward model"] += sum(len(r.text) + sum(len(m.content) for m in r.messages) for r in rows) // 4
        return writer

    writer = asyncio.run(go())
    prices = {g.model: (g.price_in, g.price_out) for g in recipe.generators}
    models = {}
    for name, calls in sorted(writer.calls.items()):
        tokens_in, tokens_out = writer.tokens_in[name], writer.tokens_out[name]
        cost = (tokens_in * prices.get(name, (0, 0))[0] + tokens_out * prices.get(name, (0, 0))[1]) / 1e6
        models[name] = {"calls": calls, "tokens_in": tokens_in, "tokens_out": tokens_out, "cost": round(cost, 4)}
    return {"models": models, "calls": sum(writer.calls.values()), "cost": round(sum(m["cost"] for m in models.values()), 4)}


def run(
    recipe: DatasetRecipe,
    folder: Path,
    progress: Progress,
    *,
    limit: int | None = None,
    retry_failed: bool = False,
    unsafe_code: bool = False,
) -> dict[str, Any]:
    """Make the dataset, from the start or from where it was cut off; returns what stands in results.json.

    Args:
        limit: most rows of a pipeline, to try a recipe.
        retry_failed: ask again what failed for good in an earlier start.

    Raises:
        InputError: a part of the recipe or an input is wrong, the folder holds another run, or an endpoint refuses everything.
    """
    if limit is not None and limit < 1:
        raise InputError(f"--limit is {limit}: give at least 1.")
    templates, given, source = _check(recipe)
    check_given_tests(given.prompts, unsafe_code=unsafe_code, quiet=progress.quiet)
    with progress, RunDir(folder, recipe, progress) as run_dir:
        return asyncio.run(_Run(recipe, run_dir, templates, given, source, limit, retry_failed, unsafe_code).go())


def _check(recipe: DatasetRecipe, asks: bool = True) -> tuple[TemplatePack, Inputs, Client]:
    """Everything that can be wrong before the first call is."""
    judging = recipe.judging
    templates, given = TemplatePack.load(recipe.templates), inputs.read(recipe)
    for name, text in (("keep", judging.keep), ("keep_chosen", judging.keep_chosen)):
        if text:
            FilterExpr.parse(text)
            if judging.reward is None:
                raise InputError(f"judging.{name} needs ratings: name a reward model in judging.reward, or take the condition out.")
    if recipe.answers is None and (judging.keep or judging.keep_chosen or judging.llm):
        raise InputError("judging needs answers: add `answers:` to the recipe, or take keep and llm out.")
    if judging.reward is not None:
        check_reward(judging.reward, asks)

    local = partial(engine_client, chat_format=recipe.chat_format, device=recipe.device)
    return templates, given, client_of(recipe.generators, recipe.calls, lambda g: local(g.folder or Path()), asks=asks)


def _judge_model(recipe: DatasetRecipe) -> str:
    """The LLM judge, the same in both orders: the first generator."""
    first_one = recipe.generators[0]
    return first_one.model or (first_one.folder.name if first_one.folder else "")


async def _write(recipe: DatasetRecipe, writer: Writer, given: Inputs, limit: int | None) -> tuple[PipelineOutput, list[Refused]]:
    """The pipelines' rows, then dialogues grown from the prompts; and the prompts that were too much alike."""
    written = await run_pipelines(writer, recipe.topics, recipe.pipelines, inputs=given, limit=limit)
    written.prompts, refused = distinct(written.prompts, recipe.near_duplicates)
    if recipe.dialogues is not None:
        chosen = recipe.dialogues.chosen(writer, written.prompts)
        async for row in take(recipe.dialogues.write(writer, chosen), limit):
            written.num["dialogues"] += 1
            written.demonstrations.append(row)
    written.demonstrations.sort(key=lambda d: (d.task, d.id))
    return written, refused


class _Run:
    def __init__(
        self,
        recipe: DatasetRecipe,
        run_dir: RunDir,
        templates: TemplatePack,
        given: Inputs,
        source: Client,
        limit: int | None,
        retry_failed: bool,
        unsafe_code: bool,
    ):
        self.recipe, self.run_dir, self.templates, self.given, self.source = recipe, run_dir, templates, given, source
        self.limit, self.retry_failed, self.unsafe_code = limit, retry_failed, unsafe_code
        self.asked = 0  # calls of this start

    async def go(self) -> dict[str, Any]:
        started = time.monotonic()
        async with opened(self.source):
            prompts = await self._stage("prompts", self._identity(), self._prompts, PROMPT_FILES)
            rows = artifacts.PROMPTS.read(prompts.folder)
            answers = await self._stage("answers", self._answers_identity(rows), partial(self._answers, rows), ANSWER_FILES)
            judged = await self._judging(prompts, answers)
        kept, pairs = artifacts.KEPT.read(judged.folder), artifacts.PAIRS.read(judged.folder)
        left_out = sum((Counter(s.summary.get("left_out", {})) for s in (prompts, answers, judged)), Counter())
        results = {
            "name": self.recipe.name,
            "seconds": round(time.monotonic() - started, 2),
            "prompts": len(rows),
            "responses": judged.summary["responses"],
            "demonstrations": len(kept),
            **({"repaired": judged.summary["repaired"]} if "repaired" in judged.summary else {}),
            "pairs": len(pairs),
            "funnel": {"written": prompts.summary["written"], **judged.summary["funnel"]},
            "dropped": dict(sum((Counter(s.summary["dropped"]) for s in (prompts, answers)), Counter())),
            "calls": {
                "in journal": write_calls(self.run_dir.path),
                "asked now": self.asked,
                "failed": sum(s.summary["failed"] for s in (prompts, answers, judged)),
                # without a field that the endpoint refused, by field
                **({"left out": dict(left_out)} if left_out else {}),
            },
            "usage_of_this_start": usage_of(self.source),
            "chat_formats": self._chat_formats(),
            "alarms": _alarms(len(rows), judged.summary["responses"], len(kept)) or self._no_pairs(len(pairs)),
        }
        export(self.run_dir.path, self.recipe, results, kept, pairs)
        return self.run_dir.finish(results)

    def _no_pairs(self, num_pairs: int) -> list[dict[str, str]]:
        """What keeps judges from making pairs, and what to change."""
        recipe = self.recipe
        if num_pairs or recipe.answers is None or recipe.answers.samples < 2 or not (recipe.judging.reward or recipe.judging.llm):
            return []
        text = (
            "judging makes no pair. See `funnel` in results.json; then ask for more answers.samples or a higher temperature, or lower "
            "judging.min_gap or judging.keep_chosen."
        )
        return [{"stage": "judging", "text": text}]

    def _chat_formats(self) -> dict[str, str]:
        """How each model folder that wrote was asked; endpoints have formats of their own."""
        folders = [g.folder for g in self.recipe.generators if g.folder is not None]
        return {folder.name: find_format(self.recipe.chat_format, Tokenizer.load(folder)).name for folder in folders}

    async def _stage(self, name: str, stage_inputs: Any, work: Any, files: Sequence[artifacts.AnyArtifact]) -> Stage:
        return await self.run_dir.stage_async(
            name,
            stage_inputs,
            work,
            artifacts=files,
            on_change="continue",  # what was bought stays bought: the journal knows each call by all that was asked
            again=lambda done: self.retry_failed and done["failed"] > 0,
        )

    def _identity(self) -> list[Any]:
        recipe = self.recipe
        parts = recipe.model_dump(mode="json", include={"seed", "topics", "pipelines", "turn", "dialogues", "near_duplicates"})
        given = [[t.id for t in self.given.documents], [p.id for p in self.given.prompts], [t.id for t in self.given.entities]]
        files = [path for path in (recipe.topics.file,) if path is not None]
        texts = {name: [t.text, t.parser, t.sampling.described(), t.agree] for name, t in self.templates.items()}
        return [
            parts,
            given,
            [hashlib.blake2b(path.read_bytes()).hexdigest() for path in files],
            texts,
            [g.identity for g in recipe.generators],
            self.limit,
        ]

    def _answers_identity(self, prompts: Sequence[Prompt]) -> list[Any]:
        answers = self.recipe.answers.model_dump(mode="json") if self.recipe.answers else None
        return [make_id([p.id for p in prompts]), answers, self.recipe.seed, [g.identity for g in self.recipe.generators]]

    def _writer(self, journal: Journal) -> Writer:
        client = CachedClient(self.source, journal, retry_failed=self.retry_failed)
        return Writer(client, self.templates, self.recipe.seed, answer_sampling=self.recipe.turn.sampling()[0])

    async def _prompts(self, folder: Path) -> dict[str, Any]:
        with Journal(folder / artifacts.CALLS.file) as journal:
            writer = self._writer(journal)
            async with shown(writer.client, self.run_dir.progress.tick):
                made, refused = await _write(self.recipe, writer, self.given, self.limit)
        artifacts.PROMPTS.write(folder, made.prompts)
        artifacts.CONVERSATIONS.write(folder, made.demonstrations)
        artifacts.REFUSED.write(folder, refused)
        write_topics(folder, writer)
        written = dict(sorted(made.num.items())) | {"too much alike": len(refused)}
        return {"written": written, "prompts": len(made.prompts), **self._counts(writer)}

    async def _answers(self, prompts: Sequence[Prompt], folder: Path) -> dict[str, Any]:
        samplings = self.recipe.answers.sampling() if self.recipe.answers else []
        with Journal(folder / artifacts.CALLS.file) as journal:
            writer = self._writer(journal)
            async with shown(writer.client, self.run_dir.progress.tick, len(prompts) * len(samplings)):
                rows = await answer_prompts(writer, prompts, samplings)
        artifacts.RESPONSES.write(folder, rows)
        return {"responses": len(rows), **self._counts(writer)}

    def _counts(self, writer: Writer) -> dict[str, Any]:
        self.asked += writer.client.asked
        return {"dropped": dict(writer.dropped), "failed": writer.client.failed, "left_out": dict(writer.client.left_out)}

    async def _judging(self, prompts: Stage, answers: Stage) -> Stage:
        recipe = self.recipe
        asked, written = artifacts.PROMPTS.read(prompts.folder), artifacts.CONVERSATIONS.read(prompts.folder)
        rows = artifacts.RESPONSES.read(answers.folder)
        content = [(r.id, r.text) for r in rows], [d.id for d in written], [(p.id, p.truth) for p in asked]
        threshold = recipe.dialogues.threshold if recipe.dialogues else None
        identity = [make_id(*content), recipe.judging.model_dump(mode="json"), threshold, recipe.seed]
        return await self._stage("judging", identity, partial(self._judge, asked, written, rows), JUDGING_FILES)

    async def _judge(
        self, prompts: Sequence[Prompt], written: Sequence[Demonstration], rows: Sequence[Response], folder: Path
    ) -> dict[str, Any]:
        recipe, judging, tick = self.recipe, self.recipe.judging, self.run_dir.progress.tick
        funnel: dict[str, Any] = {}
        async with AsyncExitStack() as stack:
            verifier = open_verifier(
                stack.enter_context(ExitStack()), needs_code=any(is_code(p.truth) for p in prompts), unsafe_code=self.unsafe_code, tick=tick
            )
            ratings = stack.enter_context(Journal(folder / artifacts.RATING_CALLS.file))
            calls = stack.enter_context(Journal(folder / artifacts.CALLS.file))
            client = CachedClient(self.source, calls, retry_failed=self.retry_failed)
            rater: Rater | None = None
            weights: tuple[float, ...] = ()
            if judging.reward is not None:
                weights = weight_set(judging.reward.weights)
                rater = rater_of(
                    judging.reward,
                    recipe.calls,
                    ratings,
                    chat_format=recipe.chat_format,
                    device=recipe.device,
                    retry_failed=self.retry_failed,
                    tick=tick,
                )
            model = _judge_model(recipe)
            judges = Judges(judging, verifier, rater, weights=weights, client=client, judge_model=model, finished_only=True)
            judged = await judges.judge(prompts, rows)
            if judging.repair is not None:
                judged += await judges.repair(prompts, judged)
            dialogues, others = _parted(written)
            if rater is not None and recipe.dialogues is not None and dialogues:
                good = await judges.good_dialogues(dialogues, recipe.dialogues.threshold)
                funnel["dialogues"] = {"written": len(dialogues), "kept": len(good)}
                dialogues = good
            topics = {p.id: p.parents[-1] for p in prompts if p.parents}
            asked = {p.id: instructions_of(p.truth) for p in prompts}
            kept, funnel["answers"] = select(judged, judging, recipe.seed, topics=topics, instructions=asked)
            finished = [r for r in judged if r.finished]
            pairs, funnel["pairs"] = await pair(finished, judging, recipe.seed, compare=judges.compare if judging.llm else None)
        random.Random(recipe.seed).shuffle(pairs)
        artifacts.RESPONSES.write(folder, judged)
        artifacts.KEPT.write(folder, [*others, *dialogues, *kept])
        artifacts.PAIRS.write(folder, pairs)
        self.asked += client.asked
        failed = client.failed + (rater.failed if rater else 0)
        weak = sum(r.weak is True for r in judged)
        num_answers = sum(not r.edits for r in judged)
        counts = {"responses": num_answers, "funnel": funnel, "pairs": len(pairs), "failed": failed, "left_out": dict(client.left_out)}
        edited = {r.id for r in judged if r.edits}
        counts |= {"repaired": sum(d.parents[0] in edited for d in kept)} if judging.repair is not None else {}
        return counts | ({"weak": weak} if weak else {})


def _alarms(num_prompts: int, num_responses: int, num_kept: int) -> list[dict[str, str]]:
    """What leaves the dataset empty, and what to change."""
    if num_kept:
        return []
    if not num_prompts:
        text = "prompts: none is left. See `funnel` and `dropped` in results.json; ask for more, or let another model write (generators)."
        return [{"stage": "prompts", "text": text}]
    if not num_responses:
        return []  # a dataset of prompts alone
    text = (
        f"judging keeps none of {num_responses:,} answers. See `funnel` in results.json; then lower judging.keep or judging.min_votes, ask "
        "for more answers.samples, raise answers.max_tokens where answers are cut off, or let another model answer (generators)."
    )
    return [{"stage": "judging", "text": text}]


def _parted(written: Sequence[Demonstration]) -> tuple[list[Demonstration], list[Demonstration]]:
    """Dialogues, which the reward model rates, and what other pipelines wrote whole."""
    return [d for d in written if d.task == "dialogue"], [d for d in written if d.task != "dialogue"]
