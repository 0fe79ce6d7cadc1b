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
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from gristmill.chat import Message
from gristmill.dataset import inputs
from gristmill.dataset import recipe as recipes
from gristmill.dataset.export import export
from gristmill.dataset.recipe import Answers, DatasetRecipe, Reward
from gristmill.dataset.select import contests, demonstrations, distinct, pairs, passes
from gristmill.engine.generator import Completion, Request, Sampling
from gristmill.errors import InputError
from gristmill.files import lock, write_json
from gristmill.flywheel.progress import Progress
from gristmill.judge import llm
from gristmill.judge.conditions import Condition
from gristmill.judge.reward_api import RewardEndpoint, rating_of_text, weight_set
from gristmill.judge.verify import verify
from gristmill.rows import Demonstration, Prompt, Rating, Response, make_id, write_rows
from gristmill.synth.ask import Asker, Source, Waves
from gristmill.synth.endpoint import Endpoint, RowFailed, Target
from gristmill.synth.journal import Journal
from gristmill.synth.pack import Pack
from gristmill.synth.pipelines.base import Inputs, Pipeline
from gristmill.synth.writer import Rehearsal, Writer

TICK = 0.5  # seconds
Item = TypeVar("Item")


def sampling_of(answers: Answers, index: int = 0) -> Sampling:
    """How the answers of one of the temperatures are drawn."""
    num, temperatures = answers.samples, answers.temperatures
    n = num // len(temperatures) + (index < num % len(temperatures))
    return Sampling(temperature=temperatures[index], max_tokens=answers.max_tokens, n=max(1, n))


def rehearse(recipe: DatasetRecipe) -> dict[str, Any]:
    """What a run would take: calls, tokens and money of each model. Nobody is asked, so lists have as many items as were asked for
    and all rows are kept: an estimate, four characters a token, and short of repairs and retries.

    Raises:
        InputError: as `run`.
    """
    pack, given, source = _check(recipe)

    async def go() -> Rehearsal:
        writer = Rehearsal(Asker(source, _NoJournal()), pack, recipe.seed, sampling_of(recipe.turn))
        made = await _write(recipe, writer, given, None)
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


def _check(recipe: DatasetRecipe) -> tuple[Pack, Inputs, Source]:
    """Everything that can be wrong before the first call is."""
    pack, given = Pack.load(recipe.templates), inputs.read(recipe)
    if recipe.judging.keep:
        Condition.parse(recipe.judging.keep)
        if recipe.judging.reward is None:
            raise InputError("judging.keep needs ratings: name a reward model in judging.reward, or take the condition out.")
    if recipe.answers is None and (recipe.judging.keep or recipe.judging.llm):
        raise InputError("judging needs answers: add `answers:` to the recipe, or take keep and llm out.")
    if recipe.judging.reward is not None:
        _check_reward(recipe.judging.reward)
    if recipe.folder is not None:
        return pack, given, _in_process(recipe)
    calls = recipe.calls
    targets = [model.target() for model in recipe.models]
    return (
        pack,
        given,
        Endpoint(targets, concurrency=calls.concurrency, timeout=calls.timeout, retries=calls.retries, patience=calls.patience),
    )


def _check_reward(reward: Reward) -> None:
    weight_set(reward.weights)
    if reward.base_url:
        Endpoint([_target(reward)])
    elif not reward.model or not (Path(reward.model) / "config.json").is_file():
        raise InputError(f"judging.reward.model {reward.model!r} is no model folder: name one, or give base_url for an endpoint.")


def _target(reward: Reward) -> Target:
    return Target(reward.base_url, reward.model, api_key_env=reward.api_key_env, api_key_file=reward.api_key_file)


def _in_process(recipe: DatasetRecipe) -> Source:
    from gristmill.engine.engine import Engine
    from gristmill.jobs import chat_format_of
    from gristmill.model.weights import load_model

    assert recipe.folder is not None
    model, tokenizer = load_model(recipe.folder)
    return Waves(Engine(model, tokenizer, chat_format_of(recipe.chat_format, tokenizer), recipe.folder.name, 256))


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
        changed = recipes.differences(saved, recipe)
        if changed:
            raise InputError(
                f"{folder} was made by another recipe (they differ in {', '.join(changed)}): choose another folder with --out, or go back "
                "to that recipe."
            )
    folder.mkdir(parents=True, exist_ok=True)
    held = lock(folder)
    saved.write_text(recipes.dump(recipe))
    return held


class _NoJournal(Journal):
    """Remembers nothing."""

    def __init__(self) -> None:
        self._places = {}

    def append(self, record: dict[str, Any]) -> None:
        pass


class _Legible(Endpoint):
    """A reward model's endpoint, of which an answer that is no rating is a failed row like any other."""

    async def complete(self, request: Request, model: str = "") -> list[Completion]:
        outs = await super().complete(request, model)
        try:
            rating_of_text(outs[0].text)
        except InputError as e:
            raise RowFailed(f"the answer is no rating: {e}", 1, 200) from e
        return outs


class _Made:
    """Rows of the pipelines."""

    def __init__(self) -> None:
        self.prompts: list[Prompt] = []
        self.demonstrations: list[Demonstration] = []
        self.written: Counter[str] = Counter()
        self.alike = 0


async def _write(recipe: DatasetRecipe, writer: Writer, given: Inputs, limit: int | None) -> _Made:
    """Topics, then all pipelines side by side, then dialogues."""
    made = _Made()
    pipelines = recipe.pipelines.named()
    if any("topics" in pipeline.needs for pipeline in pipelines.values()):
        given = replace(given, topics=await recipe.topics.collect(writer))

    async def one(name: str, pipeline: Pipeline) -> None:
        async for row in first(pipeline.write(writer, given), limit):
            made.written[name] += 1
            if isinstance(row, Prompt):
                made.prompts.append(row)
            else:
                made.demonstrations.append(row)

    await asyncio.gather(*(one(name, pipeline) for name, pipeline in pipelines.items()))
    made.prompts, made.alike = distinct(sorted(made.prompts, key=lambda p: (p.task, p.id)), recipe.near_duplicates)
    if recipe.dialogues is not None:
        chosen = recipe.dialogues.chosen(writer, made.prompts)
        async for row in first(recipe.dialogues.write(writer, chosen), limit):
            made.written["dialogues"] += 1
            made.demonstrations.append(row)
    made.demonstrations.sort(key=lambda d: (d.task, d.id))
    return made


async def first(rows: AsyncIterator[Item], limit: int | None) -> AsyncIterator[Item]:
    """The first `limit` rows, or all."""
    num = 0
    if limit == 0:
        return
    async for row in rows:
        yield row
        num += 1
        if num == limit:
            return


async def _answer(recipe: DatasetRecipe, writer: Writer, prompts: Sequence[Prompt]) -> list[Response]:
    """Answers to every prompt, several at each temperature."""
    if recipe.answers is None:
        return []
    answers = recipe.answers

    async def answer(entry: tuple[Prompt, int]) -> list[Response]:
        prompt, index = entry
        sampling = sampling_of(answers, index)
        replies = await writer.answers(prompt.messages, "answer", [prompt.id], f"response {prompt.id} {index}", sampling)
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
                0,
                0.0,
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
        pack: Pack,
        given: Inputs,
        source: Source,
        limit: int | None,
        unsafe_code: bool,
    ):
        self.recipe, self.folder, self.progress, self.pack = recipe, folder, progress, pack
        self.given, self.source, self.limit, self.unsafe_code = given, source, limit, unsafe_code
        self.funnel: dict[str, Any] = {}
        self.failed_ratings = 0
        self.total: int | None = None  # calls that this stage ends with, where that is known

    async def go(self, retry_failed: bool) -> dict[str, Any]:
        self.retry_failed = retry_failed
        started = time.monotonic()
        recipe = self.recipe
        async with AsyncExitStack() as stack:
            journal = stack.enter_context(Journal(self.folder / "journal.jsonl"))
            if isinstance(self.source, Endpoint):
                await stack.enter_async_context(self.source)
            self.asker = Asker(self.source, journal, retry_failed=retry_failed)
            self.writer = Writer(self.asker, self.pack, recipe.seed, sampling_of(recipe.turn))
            ticking = asyncio.ensure_future(self._tick())
            stack.callback(ticking.cancel)
            with self.progress.stage("prompts"):
                made = await _write(recipe, self.writer, self.given, self.limit)
            self._count("written", dict(sorted(made.written.items())) | {"too much alike": made.alike})
            write_rows(self.folder / "prompts.parquet", made.prompts)
            with self.progress.stage("answers"):
                if recipe.answers is not None:
                    self.total = self._calls() + len(made.prompts) * min(recipe.answers.samples, len(recipe.answers.temperatures))
                rows = await _answer(recipe, self.writer, made.prompts)
            self.total = None
            with self.progress.stage("judging"):
                rows = await self._judge(made.prompts, rows)
                kept, compared = await self._select(made, rows)
            write_rows(self.folder / "responses.parquet", rows)
            write_rows(self.folder / "demonstrations.parquet", kept)
            write_rows(self.folder / "pairs.parquet", compared)
            failed = _failed(journal) + self.failed_ratings
            calls = _calls(journal, self.folder / "calls.parquet")
        results = {
            "name": recipe.name,
            "seconds": round(time.monotonic() - started, 2),
            "prompts": len(made.prompts),
            "responses": len(rows),
            "demonstrations": len(kept),
            "pairs": len(compared),
            "funnel": self.funnel,
            "dropped": dict(self.writer.dropped),
            "calls": {"in journal": calls, "asked now": self.asker.asked, "failed": failed},
            "usage_of_this_start": self._usage(),
        }
        export(self.folder, recipe, results, kept, compared)
        write_json(self.folder / "results.json", results)
        return results

    def _count(self, name: str, value: Any) -> None:
        self.funnel[name] = value

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
            note = f"calls, {self.asker.found:,} of them from the journal, {self.asker.failed:,} failed"
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
        return self.asker.asked + self.asker.found + self.asker.failed

    # ---- judging ----

    async def _judge(self, prompts: Sequence[Prompt], rows: list[Response]) -> list[Response]:
        """Verdicts of the verifiers where there is a truth, ratings of the reward model, and whether the answer may be kept."""
        truths = {p.id: p.truth for p in prompts if p.truth}
        checked = self._verify(truths, [r for r in rows if r.prompt in truths and r.finished])
        ratings = await self._rate([r for r in rows if r.finished])
        weights = weight_set(self.recipe.judging.reward.weights) if self.recipe.judging.reward else ()
        keep = Condition.parse(self.recipe.judging.keep) if self.recipe.judging.keep else None
        out = []
        for r in rows:
            rating, verdict = ratings.get(r.id), checked.get(r.id)
            judge = "verifier" if verdict is not None else "reward" if rating is not None else "none"
            r = replace(r, rating=rating, score=round(rating.score(weights), 4) if rating else None, verified=verdict, judge=judge)
            out.append(replace(r, good=passes(r, keep)))
        return out

    def _verify(self, truths: dict[str, Any], rows: Sequence[Response]) -> dict[str, bool]:
        if not any(truth.get("kind") == "code" for truth in truths.values()):
            return {r.id: verify(truths[r.prompt], r.text) for r in rows}
        from gristmill.judge.sandbox import Sandbox

        with Sandbox(unsafe=self.unsafe_code) as sandbox:

            def run_code(program: str, tests: str) -> bool:
                return bool(sandbox.run_many([(program, tests)])[0].passed)

            return {r.id: verify(truths[r.prompt], r.text, run_code) for r in rows}

    async def _rate(self, rows: Sequence[Response]) -> dict[str, Rating]:
        reward = self.recipe.judging.reward
        if reward is None or not rows:
            return {}
        talks = {r.id: (*r.messages, Message("assistant", r.text)) for r in rows}
        if not reward.base_url:
            from gristmill.jobs import chat_format_of
            from gristmill.judge.reward import RewardScorer
            from gristmill.model.weights import load_reward

            model, tokenizer = load_reward(Path(reward.model))
            scores = RewardScorer(model, tokenizer, chat_format_of(self.recipe.chat_format, tokenizer)).score(list(talks.values()))
            return dict(zip(talks, scores, strict=True))
        source = _Legible([_target(reward)], **self.recipe.calls.model_dump())
        with Journal(self.folder / "ratings.jsonl") as journal:
            async with source:
                judge = RewardEndpoint(Asker(source, journal, retry_failed=self.retry_failed), reward.weights)

                async def rate(name: str) -> list[tuple[str, Rating]]:
                    return [(name, await judge.rate(talks[name], make_id("rating", name, talks[name][-1].content)))]

                ratings = dict(await self.writer.all(talks, rate))
            self.failed_ratings = _failed(journal)
        return ratings

    async def _select(self, made: _Made, rows: Sequence[Response]) -> tuple[list[Demonstration], list[Any]]:
        judging = self.recipe.judging
        topics = {p.id: p.parents[-1] for p in made.prompts if p.parents}
        dialogues = [d for d in made.demonstrations if d.task == "dialogue"]
        others = [d for d in made.demonstrations if d.task != "dialogue"]
        if judging.reward is not None and self.recipe.dialogues is not None and dialogues:
            good = await self._good_dialogues(dialogues, self.recipe.dialogues.threshold)
            self._count("dialogues", {"written": len(dialogues), "kept": len(good)})
            dialogues = good
        kept, counts = demonstrations(rows, topics, judging)
        self._count("answers", counts)
        contested, why = contests(rows, judging)
        decided = await self._compare([(a, b) for a, b, judge in contested if not judge])
        final = [(a, b, judge) for a, b, judge in contested if judge] + decided
        why["the judge contradicts itself"] += len([1 for *_, judge in contested if not judge]) - len(decided)
        made_pairs = pairs(sorted(final, key=lambda c: c[0].id), judging, self.recipe.seed)
        self._count("pairs", {"pairs": len(made_pairs), **{k: v for k, v in why.items() if v}})
        return [*others, *dialogues, *kept], made_pairs

    async def _good_dialogues(self, rows: Sequence[Demonstration], threshold: float) -> list[Demonstration]:
        """Dialogues of which every assistant turn reaches the threshold."""
        turns = {f"{d.id}#{i}": (d, i) for d in rows for i, message in enumerate(d.messages) if message.role == "assistant"}
        as_rows = [
            Response(name, d.id, d.task, d.messages[:i], d.messages[i].content, d.origin, 0.0, 0, 0, 0.0, True)
            for name, (d, i) in turns.items()
        ]
        ratings = await self._rate(as_rows)
        assert self.recipe.judging.reward is not None
        weights = weight_set(self.recipe.judging.reward.weights)
        low = {turns[name][0].id for name, rating in ratings.items() if rating.score(weights) < threshold}
        unrated = {turns[name][0].id for name in turns.keys() - ratings.keys()}
        return [d for d in rows if d.id not in low | unrated]

    async def _compare(self, rows: Sequence[tuple[Response, Response]]) -> list[tuple[Response, Response, str]]:
        """Ask a language model in both orders; only consistent verdicts count."""

        async def compare(pair: tuple[Response, Response]) -> list[tuple[Response, Response, str]]:
            one, other = pair
            comparison = llm.Comparison(make_id("compare", one.id, other.id), one.messages, one.text, other.text)
            note = {"for": "compare", "parents": [one.id, other.id]}
            judge = self.recipe.models[0].model if self.recipe.models else ""  # the same in both orders
            replies = [(await self.asker.ask(request, note, judge))[0].text for request in llm.questions([comparison])]
            verdict = llm.verdict(*replies)
            if verdict == "first":
                return [(one, other, "llm")]
            return [(other, one, "llm")] if verdict == "second" else []

        return await self.writer.all(rows, compare)


def _failed(journal: Journal) -> int:
    return sum("error" in record for record in journal.values())


def _calls(journal: Journal, path: Path) -> int:
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
