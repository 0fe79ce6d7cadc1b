"""A dataset run: a folder that says what was asked, answered, judged and kept, and that is taken up where it was cut off.

runs/NAME/recipe.yaml          the resolved recipe
runs/NAME/journal.jsonl        every call that ended, with its answer as it came
runs/NAME/calls.parquet        the same, for queries, written at the end
runs/NAME/prompts.parquet, responses.parquet, demonstrations.parquet, pairs.parquet
runs/NAME/export/, README.md   files that other tools read, and the dataset card
runs/NAME/results.json
"""

import asyncio
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from pathlib import Path
from typing import Any, TypeVar

from gristmill.core.config import dump, read
from gristmill.core.errors import InputError
from gristmill.core.io import lock, write_json
from gristmill.core.progress import Progress
from gristmill.data.rows import Prompt, Response, write_rows
from gristmill.generation.api import SamplingParams
from gristmill.generation.cached import CachedClient, Client
from gristmill.generation.endpoint import Endpoint
from gristmill.judge.backends import check_reward, source_of
from gristmill.judge.filter_expr import FilterExpr
from gristmill.runs.journal import Journal
from gristmill.synth.pipelines.base import Inputs
from gristmill.synth.registry import PipelineOutput, run_pipelines, take
from gristmill.synth.templates import TemplatePack
from gristmill.synth.writer import DryRun, Writer
from gristmill.workflows.dataset import inputs
from gristmill.workflows.dataset.export import export
from gristmill.workflows.dataset.judging import Judges
from gristmill.workflows.dataset.recipe import Answers, DatasetRecipe
from gristmill.workflows.dataset.select import distinct

TICK = 0.5  # seconds
Item = TypeVar("Item")


def sampling_of(answers: Answers, index: int = 0) -> SamplingParams:
    """How the answers of one of the temperatures are drawn."""
    num, temperatures = answers.samples, answers.temperatures
    n = num // len(temperatures) + (index < num % len(temperatures))
    return SamplingParams(temperature=temperatures[index], max_tokens=answers.max_tokens, n=max(1, n))


def dry_run(recipe: DatasetRecipe) -> dict[str, Any]:
    """What a run would take: calls, tokens and money of each model. Nobody is asked, so lists have as many items as were asked for
    and all rows are kept: an estimate, four characters a token, and short of repairs and retries.

    Raises:
        InputError: as `run`.
    """
    pack, given, source = _check(recipe, asks=False)

    async def go() -> DryRun:
        writer = DryRun(source, pack, recipe.seed, answer_sampling=sampling_of(recipe.turn))
        made, _ = await _write(recipe, writer, given, None)
        rows = await _answer(recipe, writer, made.prompts)
        if recipe.judging.llm:
            judge = recipe.models[0].model if recipe.models else source.model_of("")
            writer.calls[judge] += 2 * len(made.prompts)
            writer.tokens_in[judge] += 2 * sum(len(r.text) for r in rows) // 4
        if recipe.judging.reward is not None and recipe.judging.reward.base_url:
            writer.calls["reward model"] += len(rows)
            writer.tokens_in["reward model"] += sum(len(r.text) + sum(len(m.content) for m in r.messages) for r in rows) // 4
        return writer

    writer = asyncio.run(go())
    prices = {model.model: (model.price_in, model.price_out) for model in recipe.models}
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
    pack, given, source = _check(recipe)
    with _open(folder, recipe), progress:
        return asyncio.run(_Run(recipe, folder, progress, pack, given, source, limit, unsafe_code).go(retry_failed))


def _check(recipe: DatasetRecipe, asks: bool = True) -> tuple[TemplatePack, Inputs, Client]:
    """Everything that can be wrong before the first call is."""
    pack, given = TemplatePack.load(recipe.templates), inputs.read(recipe)
    if recipe.judging.keep:
        FilterExpr.parse(recipe.judging.keep)
        if recipe.judging.reward is None:
            raise InputError("judging.keep needs ratings: name a reward model in judging.reward, or take the condition out.")
    if recipe.answers is None and (recipe.judging.keep or recipe.judging.llm):
        raise InputError("judging needs answers: add `answers:` to the recipe, or take keep and llm out.")
    if recipe.judging.reward is not None:
        check_reward(recipe.judging.reward, asks)
    return pack, given, source_of(recipe.models, recipe.folder, recipe.calls, recipe.chat_format, asks=asks)


def _open(folder: Path, recipe: DatasetRecipe) -> Any:
    """Hold the folder for this process.

    Raises:
        InputError: it holds a run of another recipe, holds something else, or is in use.
    """
    saved, journal = folder / "recipe.yaml", folder / "journal.jsonl"
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is not a folder: choose another with --out.")
    if folder.exists() and not saved.exists() and any(p.name != ".lock" for p in folder.iterdir()):
        raise InputError(f"{folder} is not empty and holds no dataset run: choose another folder with --out.")
    if saved.exists() and journal.exists() and journal.stat().st_size:
        changed = recipe.changed(read(saved))
        if changed:
            raise InputError(
                f"{folder} was made by another recipe (they differ in {', '.join(changed)}): choose another folder with --out, or go back "
                "to that recipe."
            )
    folder.mkdir(parents=True, exist_ok=True)
    held = lock(folder)
    saved.write_text(dump(recipe))
    return held


async def _write(recipe: DatasetRecipe, writer: Writer, given: Inputs, limit: int | None) -> tuple[PipelineOutput, int]:
    """The pipelines' rows, then dialogues grown from the prompts; and how many prompts were too much alike."""
    written = await run_pipelines(writer, recipe.topics, recipe.pipelines, inputs=given, limit=limit)
    written.prompts, alike = distinct(written.prompts, recipe.near_duplicates)
    if recipe.dialogues is not None:
        chosen = recipe.dialogues.chosen(writer, written.prompts)
        async for row in take(recipe.dialogues.write(writer, chosen), limit):
            written.num["dialogues"] += 1
            written.demonstrations.append(row)
    written.demonstrations.sort(key=lambda d: (d.task, d.id))
    return written, alike


async def _answer(recipe: DatasetRecipe, writer: Writer, prompts: Sequence[Prompt]) -> list[Response]:
    """Answers to every prompt, several at each temperature."""
    if recipe.answers is None:
        return []
    answers = recipe.answers

    async def answer(entry: tuple[Prompt, int]) -> list[Response]:
        prompt, index = entry
        sampling = sampling_of(answers, index)
        replies = await writer.answers(prompt.messages, "answer", [prompt.id], salt=f"response {prompt.id} {index}", sampling=sampling)
        return [
            Response(
                f"{reply.id}#{number}",
                prompt.id,
                prompt.task,
                prompt.messages,
                reply.text,
                reply.model,
                sampling.temperature,
                number,
                reply.num_tokens,
                reply.logprob,
                reply.finished,
            )
            for number, reply in enumerate(replies)
        ]

    used = range(min(answers.samples, len(answers.temperatures)))
    return await writer.all(((prompt, index) for prompt in prompts for index in used), answer)


class _Run:
    def __init__(
        self,
        recipe: DatasetRecipe,
        folder: Path,
        progress: Progress,
        pack: TemplatePack,
        given: Inputs,
        source: Client,
        limit: int | None,
        unsafe_code: bool,
    ):
        self.recipe, self.folder, self.progress, self.pack = recipe, folder, progress, pack
        self.given, self.source, self.limit, self.unsafe_code = given, source, limit, unsafe_code
        self.total: int | None = None  # calls that this stage ends with, where that is known

    async def go(self, retry_failed: bool) -> dict[str, Any]:
        started = time.monotonic()
        recipe = self.recipe
        async with AsyncExitStack() as stack:
            journal = stack.enter_context(Journal(self.folder / "journal.jsonl"))
            if isinstance(self.source, AbstractAsyncContextManager):
                await stack.enter_async_context(self.source)
            self.client = CachedClient(self.source, journal, retry_failed=retry_failed)
            self.writer = Writer(self.client, self.pack, recipe.seed, answer_sampling=sampling_of(recipe.turn))
            ticking = asyncio.ensure_future(self._tick())
            stack.callback(ticking.cancel)
            with self.progress.stage("prompts"):
                made, alike = await _write(recipe, self.writer, self.given, self.limit)
            written = dict(sorted(made.num.items())) | {"too much alike": alike}
            write_rows(self.folder / "prompts.parquet", made.prompts)
            with self.progress.stage("answers"):
                if recipe.answers is not None:
                    self.total = self._calls() + len(made.prompts) * min(recipe.answers.samples, len(recipe.answers.temperatures))
                rows = await _answer(recipe, self.writer, made.prompts)
            self.total = None
            with self.progress.stage("judging"):
                judges = Judges(recipe, self.folder, self.writer, retry_failed=retry_failed, unsafe_code=self.unsafe_code)
                rows = await judges.judge(made.prompts, rows)
                kept, compared = await judges.select(made.prompts, made.demonstrations, rows)
            write_rows(self.folder / "responses.parquet", rows)
            write_rows(self.folder / "demonstrations.parquet", kept)
            write_rows(self.folder / "pairs.parquet", compared)
            failed = self.client.failed + judges.failed_ratings
            calls = _compact(journal, self.folder / "calls.parquet")
        results = {
            "name": recipe.name,
            "seconds": round(time.monotonic() - started, 2),
            "prompts": len(made.prompts),
            "responses": len(rows),
            "demonstrations": len(kept),
            "pairs": len(compared),
            "funnel": {"written": written, **judges.funnel},
            "dropped": dict(self.writer.dropped),
            "calls": {"in journal": calls, "asked now": self.client.asked, "failed": failed},
            "usage_of_this_start": self._usage(),
        }
        export(self.folder, recipe, results, kept, compared)
        write_json(self.folder / "results.json", results)
        return results

    def _usage(self) -> dict[str, Any]:
        if not isinstance(self.source, Endpoint):
            return {}
        usage = self.source.usage
        numbers = {"requests": usage.requests, "tokens_in": usage.tokens_in, "tokens_out": usage.tokens_out, "cost": round(usage.cost, 6)}
        return numbers | {"errors": dict(usage.errors)}

    async def _tick(self) -> None:
        """The progress line: calls, tokens a second, errors, cost, and in the answers' stage the time left."""
        tokens, calls, since = 0, self._calls(), time.monotonic()
        while True:
            await asyncio.sleep(TICK)
            now, done = time.monotonic(), self._calls()
            speed, calls = (done - calls) / (now - since), done
            note = f"calls, {self.client.found:,} of them from the journal, {self.client.failed:,} failed"
            if isinstance(self.source, Endpoint):
                usage = self.source.usage
                rate, tokens = (usage.tokens_out - tokens) / (now - since), usage.tokens_out
                note += f", {self.source.in_flight} in flight, {rate:,.0f} tokens/s, {sum(usage.errors.values()):,} errors"
                note += f", cost {usage.cost:.2f}" if usage.cost else ""
            if self.total is not None and speed > 0:
                note += f", {(self.total - done) / speed / 60:.0f} min left"
            since = now
            self.progress.tick(done, self.total, note)

    def _calls(self) -> int:
        return self.client.asked + self.client.found + self.client.failed


def _compact(journal: Journal, path: Path) -> int:
    """The journal as Parquet, a few thousand rows at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = ("id", "model", "for", "error")
    schema = pa.schema([*((name, pa.string()) for name in names), ("parents", pa.list_(pa.string())), ("answers", pa.list_(pa.string()))])
    temporary = path.with_name(path.name + ".tmp")
    num = 0
    with pq.ParquetWriter(temporary, schema) as writer:
        for part in _portions(journal.values(), 4096):
            rows = [
                {name: r.get(name) for name in names} | {"parents": r.get("parents") or [], "answers": [out[0] for out in r.get("out", ())]}
                for r in part
            ]
            writer.write_table(pa.Table.from_pylist(rows, schema))
            num += len(rows)
    temporary.replace(path)
    return num


def _portions(items: Iterable[Item], size: int) -> Iterable[list[Item]]:
    part: list[Item] = []
    for item in items:
        part.append(item)
        if len(part) == size:
            yield part
            part = []
    if part:
        yield part
