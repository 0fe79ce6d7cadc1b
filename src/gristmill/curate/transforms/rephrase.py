"""Rephrasing: documents in other words, by a model, each checked against its source; the tasks are in `synth/rephrase.py`.

Calls go out from the process that runs the curation, whoever does the other tasks: one window to an endpoint, or one model in memory.
Every answer is in the run's `journal.jsonl` before it is used, and is never bought twice, not even by a changed recipe.

Shapes: N documents, M texts made from them.
"""

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Self

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from gristmill.core.config import FilePath, NameOrPath, Section
from gristmill.core.errors import InputError
from gristmill.core.io import state
from gristmill.curate.filters.heuristics import Limits, check_limits, chosen
from gristmill.curate.outcome import DOCUMENT, Metric, Outcome, hash_uniform, split
from gristmill.curate.quality import lm_scores
from gristmill.curate.transforms import faithfulness
from gristmill.data.rows import make_id
from gristmill.generation.settings import Calls, GeneratorSettings
from gristmill.judge.settings import Reward

if TYPE_CHECKING:
    from gristmill.data.chat import Message
    from gristmill.generation.cached import CachedClient, Client
    from gristmill.runs.journal import Journal
    from gristmill.synth.writer import Writer

Task = Literal["wikipedia", "diverse_qa", "distill", "extract_knowledge", "knowledge_list"]
Tick = Callable[[int, int | None, str], None]
TICK_SECONDS = 0.5
MADE: Final = "rephrase"  # keys of a made document's `meta` begin with it; it alone holds the task
MAX_FAILED = 0.1  # of all calls, for reasons that may pass, or of all ratings; of more the run stops, to be taken up again
MAX_SHOWN = 10_000  # characters of an answer that cannot be read
BYTES_A_TOKEN = 4  # where no tokenizer is given

# [min, max] of each metric, for all tasks and for some: what says all of its source again must have most of its names and numbers,
# what picks from it need not; questions may want a calculation. Measured in bench/rephrase.py.
EVERY: Limits = {"entity_support": (0.8, None), "number_support": (0.9, None), "word_support": (0.4, None), "distinct": (0.5, None)}
LIMITS: dict[Task, Limits] = {
    "wikipedia": {"entity_recall": (0.7, None), "number_recall": (0.8, None), "word_support": (0.3, None), "length": (0.4, 2.0)},
    "diverse_qa": {"number_support": (0.7, None), "word_support": (0.3, None)},
    "distill": {"entity_recall": (0.6, None), "number_recall": (0.7, None), "length": (0.15, 1.1)},
    "extract_knowledge": {"length": (0.1, 1.5)},
    "knowledge_list": {"length": (0.05, 1.2)},
}


class Rephrase(Section):
    """Rephrasing by a language model; what is not faithful to its source is dropped."""

    step: Literal["rephrase"] = "rephrase"
    tasks: tuple[Task, ...] = Field(min_length=1)
    generators: tuple[GeneratorSettings, ...] = Field((), description="who writes: models behind endpoints, or one folder")
    chat_format: Literal["auto", "plain", "nemotron", "chatml", "llama3"] = "auto"
    templates: NameOrPath = Field("default", description="a shipped pack, or a file of templates")
    tokenizer: FilePath | None = Field(None, description="folder of the writer's tokenizer; four bytes count as a token without one")
    calls: Calls = Calls()
    column: str = Field("", description="of the table, or a key of `meta`")
    values: list[str] = Field([], description="of the column, of the documents to rephrase")
    share: float = Field(1.0, gt=0, le=1, description="of these documents")
    originals: bool = Field(True, description="keep documents that were rephrased as a whole")
    limits: Limits = Field({}, description="metric: [min, max], instead of the task's; null is no limit")
    reward: Reward | None = Field(None, description="who scores")
    min_reward: float | None = Field(None, description="lowest score; null keeps all")
    seed: int = 0

    @property
    def folder(self) -> Path | None:
        """The model that writes in this process, if it is one."""
        return next((g.folder for g in self.generators if g.folder is not None), None)

    @model_validator(mode="after")
    def _sound(self) -> Self:
        if not self.generators or any(g.checkpoint for g in self.generators) or (self.folder is not None and len(self.generators) > 1):
            raise ValueError("generators: give endpoints, or one folder (a model in process)")
        if bool(self.column) != bool(self.values):
            raise ValueError("give both column and values, or neither")
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError("tasks: each once")
        if any(g.kind == "completions" for g in self.generators):
            raise ValueError("generators: a task has a system message, which kind 'completions' does not take: use 'chat'")
        if self.min_reward is not None and self.reward is None:
            raise ValueError("min_reward needs a reward model: give reward")
        check_limits(self.limits, faithfulness.METRICS)
        return self

    def limits_of(self, task: Task) -> Limits:
        """What a text of a task is held to, in the order of METRICS."""
        limits = EVERY | LIMITS[task] | self.limits
        return {name: limits[name] for name in faithfulness.METRICS if name in limits}


def check(how: Rephrase) -> list[Path]:
    """Find out, before work is spent, whether all that the step needs is there; returns the files that its results depend on.

    Raises:
        InputError: it is not.
    """
    from gristmill.judge.backends import check_reward
    from gristmill.synth import rephrase as tasks
    from gristmill.synth.templates import TemplatePack

    pack = TemplatePack.load(how.templates)
    if how.reward is not None:
        check_reward(how.reward)
    if how.folder is None:
        _source(how)
    else:
        lm_scores.check(how.folder)
    for folder, key in ((how.folder, "generators.folder"), (how.tokenizer, "tokenizer")):
        if folder is not None and not (folder / "tokenizer.json").exists():
            raise InputError(f"{folder} holds no tokenizer.json: give another folder as `{key}` of the step rephrase.")
    count = _counter(how)
    for task in how.tasks:
        if "{document}" not in pack[tasks.template_name(task)].text:
            raise InputError(f"The template {tasks.template_name(task)} lacks {{document}}: it would ask the same of every document.")
        if tasks.max_segment_tokens(task, pack, count) < tasks.TASKS[task].min_segment:
            raise InputError(f"The templates of the task {task} leave no room for a document: make them shorter.")
    given = [how.folder, how.tokenizer, Path(how.templates) if how.templates.endswith((".yaml", ".yml")) else None]
    given.append(how.reward.folder if how.reward is not None else None)
    return [path for path in given if path is not None]


@dataclass(frozen=True)
class _Work:
    """A segment that a model is to say in other words.

    Attributes:
        document: row of the table.
        name: id of what is made.
        segment: text and tokens.
    """

    document: int
    name: str
    task: Task
    number: int
    segment: tuple[str, int]


@dataclass(frozen=True)
class _Made:
    """A text that a model made of a segment, or of which nothing came.

    Attributes:
        talk: what was asked, without the system message, and what the model wrote.
        reason: why it is not kept; "" keeps it, until it is scored.
    """

    work: _Work
    meta: dict[str, Any]
    talk: "tuple[Message, ...]"
    text: str
    reason: str = ""
    figure: float = float("nan")
    limit: float = float("nan")


def rephrase(table: pa.Table, how: Rephrase, journals: "tuple[Journal, Journal | None]", *, tick: Tick) -> Outcome:
    """The documents, and what a model made of them that is true to them; what is not is dropped, with the figure and the limit.

    A made document's id is the document's with the task and the number of the segment, `ID#distill-0` (`ID#distill-0.2` if another has
    that); its `meta` is the document's, and beside it, under keys that begin with `rephrase`, what it was made from and how true it is.
    Other columns are the document's. What was made is not rephrased again.

    Args:
        journals: of the answers, and of the ratings if there is a reward model.
        tick: told how many calls have ended, of how many.

    Raises:
        InputError: a model refuses everything, is away for too long, or fails too many calls.
    """
    return asyncio.run(_Rephrasing(table, how, journals, tick).all())


class _Rephrasing:
    def __init__(self, table: pa.Table, how: Rephrase, journals: "tuple[Journal, Journal | None]", tick: Tick) -> None:
        from gristmill.synth.templates import TemplatePack

        self.table, self.how, self.tick = table, how, tick
        self.answers, self.ratings = journals
        self.pack, self.count = TemplatePack.load(how.templates), _counter(how)
        self.metas = [_meta(record) for record in table["meta"].to_pylist()]
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []  # of calls that another time may not fail
        # an answer of another model is another answer
        writers: list[Any] = sorted((g.model, g.weight) for g in how.generators if g.base_url)
        writers += [[g.fields, g.extra_body] for g in how.generators if g.fields or g.extra_body]
        self.salt = make_id(writers, [] if how.folder is None else [state(path)[1:3] for path in sorted(how.folder.iterdir())])

    async def all(self) -> Outcome:
        from gristmill.core.concurrent import map_concurrent
        from gristmill.generation.cached import CachedClient
        from gristmill.generation.endpoint import WORKERS_PER_SLOT
        from gristmill.synth.writer import Writer

        work = self._work()
        made: list[_Made] = []
        async with AsyncExitStack() as stack:
            source = _source(self.how)
            if isinstance(source, AbstractAsyncContextManager):
                await stack.enter_async_context(source)
            client = CachedClient(source, self.answers, retry_failed=True)
            writer = Writer(client, self.pack, self.how.seed)
            ticking = asyncio.ensure_future(self._ticking(client, source, len(work)))
            stack.callback(ticking.cancel)

            async def one(item: _Work) -> _Made:
                return await self._one(writer, item)

            async for text in map_concurrent(work, one, WORKERS_PER_SLOT * source.concurrency):
                made.append(text)
            if len(self.failures) > MAX_FAILED * len(work):
                raise InputError(
                    f"{len(self.failures):,} of {len(work):,} calls got no answer (the last: {self.failures[-1]}): see to the endpoint, "
                    "and run the same command again. What was answered is not asked again."
                )
            order = {one.name: place for place, one in enumerate(work)}
            made.sort(key=lambda one: order[one.work.name])
            made = await self._scored(made, writer)
        self.counts.update({"calls": client.asked, "calls answered before": client.found, "calls without answer": client.failed})
        self.counts.update({f"calls without {name}, which is refused": num for name, num in client.left_out.items()})
        return self._outcome(made)

    def _work(self) -> list[_Work]:
        """Every segment of every document that is wanted."""
        from gristmill.synth import rephrase as tasks

        wanted_N = chosen(self.table, self.how.column, self.how.values)
        wanted_N &= hash_uniform(self.table["id"], self.how.seed, "share") < self.how.share * 2.0**64
        rooms = {task: tasks.max_segment_tokens(task, self.pack, self.count) for task in self.how.tasks}
        texts, ids = self.table["text"].to_pylist(), self.table["id"].to_pylist()
        taken = set(ids)
        out = []
        for document in np.flatnonzero(wanted_N).tolist():
            if isinstance(self.metas[document].get(f"{MADE}_of"), str):
                continue
            text = texts[document] or ""
            for task in self.how.tasks:
                found = tasks.split_segments(task, text, rooms[task], count=self.count)
                self.counts["too short or without a part that fits"] += not found
                for number, segment in enumerate(found):
                    name = plain = f"{ids[document] or ''}#{task}-{number}"
                    again = 1
                    while name in taken:
                        again += 1
                        name = f"{plain}.{again}"
                    taken.add(name)
                    out.append(_Work(document, name, task, number, segment))
        return out

    async def _one(self, writer: "Writer", work: _Work) -> _Made:
        from gristmill.data.chat import Message
        from gristmill.generation.endpoint import RowFailed
        from gristmill.synth import rephrase as tasks
        from gristmill.synth.writer import ParseError

        task, segment = work.task, work.segment
        parent = self.table["id"][work.document].as_py() or ""
        asked = tasks.messages(task, segment[0], self.pack)
        template = tasks.template_name(task)
        meta: dict[str, Any] = {"": task, "of": parent, "segment": work.number}
        sampling = replace(self.pack[template].sampling, n=1)
        try:
            (reply,) = await writer.answers(asked, template, [parent], salt=self.salt, sampling=sampling)
        except RowFailed as e:
            if e.status in (0, 429) or e.status >= 500:
                self.failures.append(str(e))
            return _Made(work, meta | {"error": str(e)}, (), "", "no answer")
        meta["model"] = reply.model
        size = reply.num_tokens or self.count([reply.text])[0]
        try:
            if not reply.finished:
                raise ParseError("too many tokens" if reply.text else "empty")
            draw = writer.random("pairs", reply.id)
            whole, written = tasks.parse_answer(
                task, reply.text, size, max_tokens=sampling.max_tokens, segment=segment, draw=draw, count=self.count
            )
        except ParseError as e:
            return _Made(work, meta, (), reply.text[:MAX_SHOWN], str(e))
        found = faithfulness.compute(segment[0], written, source_tokens=segment[1], tokens=self.count([written])[0])
        meta |= {metric: round(value, 3) for metric, value in found.items()}
        text = _Made(work, meta, (*asked[1:], Message("assistant", written)), whole)
        for metric, (low, high) in self.how.limits_of(task).items():
            if low is not None and found[metric] < low:
                return replace(text, reason=metric, figure=found[metric], limit=low)
            if high is not None and found[metric] > high:
                return replace(text, reason=metric, figure=found[metric], limit=high)
        return text

    async def _scored(self, made: "list[_Made]", writer: "Writer") -> "list[_Made]":
        """With what the reward model says of those that have passed so far."""
        how = self.how
        if how.reward is None or self.ratings is None:
            return made
        from gristmill.judge.backends import rater_of
        from gristmill.judge.reward_client import weight_set

        names = [make_id([message.content for message in one.talk]) for one in made]  # equal texts are scored once
        talks = {name: one.talk for one, name in zip(made, names, strict=True) if not one.reason}
        rater = rater_of(how.reward, how.calls, self.ratings, chat_format=how.chat_format, retry_failed=True)
        ratings, failed = await rater.rate(talks), rater.failed
        if failed > MAX_FAILED * len(talks):
            raise InputError(
                f"{failed:,} of {len(talks):,} texts got no rating ({self.ratings.path} says why): see to the reward model, and run the "
                "same command again. What was answered is not asked again."
            )
        weights, out = weight_set(how.reward.weights), []
        for one, name in zip(made, names, strict=True):
            rating = ratings.get(name)
            if not one.reason and rating is None:
                one = replace(one, reason="no rating")
            elif not one.reason and rating is not None:
                score = rating.score(weights)
                one = replace(one, meta=one.meta | asdict(rating) | {"reward": round(score, 4)})
                if how.min_reward is not None and not score >= how.min_reward:
                    one = replace(one, reason="reward", figure=score, limit=how.min_reward)
            out.append(one)
        return out

    def _outcome(self, made: "list[_Made]") -> Outcome:
        table, num = self.table, len(self.table)
        good = Counter((one.work.document, one.work.task) for one in made if not one.reason)
        asked = Counter((one.work.document, one.work.task) for one in made)
        replaced = {document: count for (document, task), count in good.items() if count == asked[document, task]}  # the whole of it
        self.counts["written"] = good.total()
        rows = pa.array([one.work.document for one in made], pa.int64())
        columns = {
            "id": [one.work.name for one in made],
            "text": [one.text for one in made],
            "meta": [_record(self.metas[one.work.document], one.meta) for one in made],
        }
        new = table.drop_columns(list(columns)).take(rows)
        for name, values in columns.items():
            new = new.append_column(DOCUMENT.field(name), pa.array(values, DOCUMENT.field(name).type))
        reasons: list[str | None] = [None if self.how.originals or d not in replaced else "rephrased" for d in range(num)]
        figures = [float(replaced.get(d, 0)) for d in range(num)] + [one.figure for one in made]
        limits = [0.0] * num + [one.limit for one in made]
        both = pa.concat_tables([table, new.select(table.column_names).cast(table.schema)])
        outcome = split(both, self.how.step, reasons + [one.reason or None for one in made], np.array(figures), np.array(limits))
        metrics = {
            f"{metric} of {task}": Metric(
                np.array([one.meta[metric] for one in made if one.work.task == task and metric in one.meta], np.float64),
                *limits_of,
                "of the texts that this task gave, seen from their segments",
                of_input=False,
            )
            for task in self.how.tasks
            for metric, limits_of in self.how.limits_of(task).items()
        }
        return replace(outcome, counts={name: count for name, count in self.counts.items() if count}, metrics=metrics)

    async def _ticking(self, client: "CachedClient", source: "Client", total: int) -> None:
        usage = getattr(source, "usage", None)
        while True:
            await asyncio.sleep(TICK_SECONDS)
            note = f"calls, {client.found:,} of them from the journal, {client.failed:,} failed"
            if usage is not None:
                note += f", {usage.tokens_out:,} tokens" + (f", cost {usage.cost:.2f}" if usage.cost else "")
            self.tick(client.asked + client.found + client.failed, total, note)


def _source(how: Rephrase) -> "Client":
    from gristmill.judge.backends import client_of

    return client_of(how.generators, how.calls, lambda g: _in_process(g.folder or Path(), how.chat_format))


@cache
def _in_process(folder: Path, chat_format: str) -> "tuple[Client, str]":
    """A model that is loaded once for all shards."""
    from gristmill.judge.backends import engine_client

    return engine_client(folder, chat_format)


def _counter(how: Rephrase) -> Callable[[Sequence[str]], list[int]]:
    """Tokens of texts."""
    folder = how.tokenizer or how.folder
    if folder is None:
        return lambda texts: [-(-len(text.encode()) // BYTES_A_TOKEN) for text in texts]
    from gristmill.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(folder)
    return lambda texts: [len(ids) for ids in tokenizer.encode_batch(texts)]


def _meta(record: str | None) -> dict[str, Any]:
    try:
        value = json.loads(record or "{}")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _record(parent: dict[str, Any], own: dict[str, Any]) -> str:
    own = {f"{MADE}_{key}" if key else MADE: value for key, value in own.items()}
    try:
        return json.dumps(parent | own)
    except RecursionError:
        return json.dumps(own)
