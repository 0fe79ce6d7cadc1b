"""Templated generation for pipelines: render a template, complete it through the cache, parse the answer, keep its lineage."""

import asyncio
import os
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from gristmill.core.concurrent import map_concurrent
from gristmill.core.response_text import strip_thinking
from gristmill.data.chat import Message
from gristmill.data.rows import make_id
from gristmill.generation.api import Completion, Request, SamplingParams
from gristmill.generation.cached import CachedClient, Client
from gristmill.generation.endpoint import RowFailed
from gristmill.runs.journal import Journal
from gristmill.synth.parsing import normalize, parse_list, parse_yes_no, unique
from gristmill.synth.templates import TemplatePack

Item = TypeVar("Item")
Result = TypeVar("Result")
ANSWER_SAMPLING = SamplingParams(temperature=0.0, max_tokens=1024)
MAX_BRANCHES = 64  # branches of a pipeline that are under way at once, at each level


class ParseError(Exception):
    """An answer that cannot be parsed as what was asked for. One branch of a pipeline ends there."""


@dataclass(frozen=True)
class Reply:
    """Answer of a model, with the id of its call.

    Attributes:
        id: of the call.
        logprob: sum over the answer's tokens; None where the source tells none.
        finished: whether the answer came to its end and is not empty.
        request: what was said to the model last.
    """

    text: str
    id: str
    model: str
    num_tokens: int
    logprob: float | None
    finished: bool
    request: str = ""


@dataclass(frozen=True)
class Topic:
    """Seed text that others grow from: a topic, a question, an item of a list. Its origin is a model, or "human".

    The id of an item is that of the call that made it, "#" and its place; its root is what it grew from at last, a topic or document; its
    request is what the model was told, where the item was the whole answer.
    """

    text: str
    id: str
    origin: str = "human"
    root: str = ""
    request: str = ""


class Writer:
    """Generation by template, for pipelines.

    Args:
        seed: another one gives other calls with other answers.
        answering: how an assistant's turn is drawn where a pipeline needs one.

    Attributes:
        dropped: branches that ended early, by reason.
        topics: what prompts grew from so far, by id.
    """

    def __init__(self, client: CachedClient, templates: TemplatePack, seed: int = 0, *, answer_sampling: SamplingParams = ANSWER_SAMPLING):
        self.client, self.templates, self.seed, self.answer_sampling = client, templates, seed, answer_sampling
        self.dropped: Counter[str] = Counter()
        self.topics: dict[str, Topic] = {}

    def random(self, *parts: object) -> random.Random:
        """A generator of random numbers that depends on the seed and these parts alone."""
        return random.Random(make_id(self.seed, *parts))

    async def reply(
        self,
        template: str,
        *,
        parents: Sequence[str] = (),
        salt: object = "",
        sampling: SamplingParams | None = None,
        **slots: Any,
    ) -> Reply:
        """The answer to a template, without what a reasoning model thinks before it.

        Args:
            parents: ids of what goes into the slots, the topic or document that all grew from last.
            salt: makes equal calls different ones.
            sampling: instead of the template's.

        Raises:
            RowFailed: there is no answer.
            ParseError: the answer was cut off, or is nothing but thinking.
        """
        entry = self.templates[template]
        message = Message("user", entry.render(**slots))
        sampling = sampling or entry.sampling
        reply = await self.answer((message,), template, parents, salt=salt, sampling=sampling, num=slots.get("num"))
        text = strip_thinking(reply.text).strip()
        if not text:
            raise ParseError("only thinking")
        return replace(reply, text=text)

    async def next_turn(self, template: str, talk: Sequence[Message], parents: Sequence[str], **slots: Any) -> Reply:
        """What a user says next in a conversation that the assistant spoke in last; as `reply`."""
        question, answer = talk[-2].content, talk[-1].content
        return await self.reply(template, parents=parents, history=format_conversation(talk), question=question, answer=answer, **slots)

    async def answer(
        self,
        messages: Sequence[Message],
        purpose: str,
        parents: Sequence[str],
        *,
        salt: object = "",
        sampling: SamplingParams | None = None,
        num: object = None,
    ) -> Reply:
        """The assistant's next turn in a conversation; as `reply`."""
        (reply,) = await self.answers(messages, purpose, parents, salt=salt, sampling=sampling, num=num)
        if not reply.finished:
            raise ParseError("cut off")
        return reply

    async def answers(
        self,
        messages: Sequence[Message],
        purpose: str,
        parents: Sequence[str],
        *,
        salt: object = "",
        sampling: SamplingParams | None = None,
        num: object = None,
        name: str = "",
        strip: bool = True,
    ) -> list[Reply]:
        """All samples of the next turn, without the space around them unless `strip` is off.

        A list is asked for with its `num` of items; a call may be given another `name` than its hash.
        """
        sampling = sampling or self.answer_sampling
        name = name or make_id(purpose, [(m.role, m.content) for m in messages], sampling.described(), salt, self.seed)
        request = messages[-1].content
        note = {"for": purpose, "parents": list(parents), "sampling": sampling.described(), **({"num": num} if num else {})}
        outs = await self.complete(Request(name, tuple(messages), sampling, self.seed), note)
        model = self.client.source.model_of(name)
        return [
            Reply(
                c.text.strip() if strip else c.text,
                name,
                model,
                c.num_tokens,
                sum(c.logprobs) if c.logprobs else None,
                c.finish == "stop" and (bool(c.text.strip()) or not strip),
                request,
            )
            for c in outs
        ]

    async def complete(self, request: Request, note: Mapping[str, Any]) -> list[Completion]:
        """Complete a request; every call goes through here."""
        return await self.client.complete(request, note=note)

    async def items(self, template: str, num: int, *, parents: Sequence[str] = (), salt: object = "", **slots: Any) -> list[Topic]:
        """The different items of a list, `num` at most. A list that cannot be read is given back once, to be put in order.

        Raises:
            RowFailed, ParseError: there is no answer, or no list in it.
        """
        if self.templates[template].parser == "text":  # a pack for models that write one item at a time
            return await self._one_by_one(template, num, parents, salt, slots)
        reply = await self.reply(template, parents=parents, salt=salt, num=num, **slots)
        found = unique(parse_list(reply.text))
        if 2 * len(found) < num:
            mended = await self.reply("repair_list", parents=[reply.id], num=num, answer=reply.text)
            words = normalize(reply.text)
            # an item that the answer does not hold was made up in the mending
            found = max(found, unique(item for item in parse_list(mended.text) if normalize(item) in words), key=len)
        if not found:
            raise ParseError("no list")
        if len(found) < num:
            self.dropped["list too short"] += 1
        root = parents[-1] if parents else ""
        return [Topic(text, f"{reply.id}#{n}", reply.model, root) for n, text in enumerate(found[:num])]

    async def _one_by_one(self, template: str, num: int, parents: Sequence[str], salt: object, slots: Mapping[str, Any]) -> list[Topic]:
        async def one(number: int) -> list[Topic]:
            reply = await self.reply(template, parents=parents, salt=f"{salt}#{number}", num=1, **slots)
            return [Topic(reply.text, f"{reply.id}#0", reply.model, parents[-1] if parents else "", reply.request)]

        named = await self.all(range(num), one)
        times = Counter(normalize(topic.text) for topic in named)
        first = {normalize(topic.text): topic for topic in reversed(named)}
        found = [first[text] for text, count in times.most_common() if count >= self.templates[template].agree]
        if not found:
            raise ParseError("no list")
        return found

    async def yes(self, template: str, *, parents: Sequence[str] = (), **slots: Any) -> tuple[bool, Reply]:
        """Whether the answer begins with yes, and the answer.

        Raises:
            RowFailed, ParseError: there is no answer, or it says neither yes nor no.
        """
        reply = await self.reply(template, parents=parents, **slots)
        if self.templates[template].parser == "text":  # a pack for models that cannot judge
            return True, reply
        verdict = parse_yes_no(reply.text)
        if verdict is None:
            raise ParseError("neither yes nor no")
        return verdict, reply

    async def each(
        self, items: Iterable[Item], work: Callable[[Item], Awaitable[Iterable[Result]]], num: int = MAX_BRANCHES
    ) -> AsyncIterator[Result]:
        """What `work` makes of each item, `num` at a time, in order of finishing. A branch that fails is counted and left out."""

        async def branch(item: Item) -> list[Result]:
            try:
                return list(await work(item))
            except RowFailed:
                self.dropped["no answer"] += 1
            except ParseError as e:
                self.dropped[str(e)] += 1
            return []

        async for results in map_concurrent(items, branch, num):
            for result in results:
                yield result

    async def all(
        self, items: Iterable[Item], work: Callable[[Item], Awaitable[Iterable[Result]]], num: int = MAX_BRANCHES
    ) -> list[Result]:
        """As `each`, in the items' order."""

        async def numbered(entry: tuple[int, Item]) -> list[tuple[int, Result]]:
            return [(entry[0], result) for result in await work(entry[1])]

        found = [pair async for pair in self.each(enumerate(items), numbered, num)]
        return [result for _, result in sorted(found, key=lambda pair: pair[0])]


class DryRun(Writer):
    """Cost estimate without a model: answers are made up in the asked form, and the calls' tokens are added up.

    Attributes:
        calls, tokens_in, tokens_out: estimates, four characters a token.
    """

    def __init__(self, source: Client, templates: TemplatePack, seed: int = 0, *, answer_sampling: SamplingParams = ANSWER_SAMPLING):
        client = CachedClient(source, Journal(Path(os.devnull), read_only=True))
        super().__init__(client, templates, seed, answer_sampling=answer_sampling)
        self.calls: Counter[str] = Counter()
        self.tokens_in: Counter[str] = Counter()
        self.tokens_out: Counter[str] = Counter()

    async def complete(self, request: Request, note: Mapping[str, Any]) -> list[Completion]:
        await asyncio.sleep(0)
        entry = self.templates.get(note["for"])
        if entry is not None and entry.parser == "list":
            items = (f"{n}. made-up item {request.id} {n} of a list, about as long as real ones are" for n in range(1, note["num"] + 1))
            text = "\n".join(items)
        elif entry is not None and entry.parser == "yes":
            text = "Yes, it is."
        else:
            text = f"made-up answer {request.id} " + "word " * (request.sampling.max_tokens // 4)
        model = self.client.source.model_of(request.id)
        self.calls[model] += 1
        self.tokens_in[model] += sum(len(m.content) for m in request.messages) // 4
        self.tokens_out[model] += request.sampling.n * (len(text) // 4)
        return [Completion(text, len(text) // 4, (), "stop")] * request.sampling.n


def format_conversation(messages: Sequence[Message]) -> str:
    """Format a conversation as plain text, one paragraph a turn."""
    return "\n\n".join(f"{m.role.capitalize()}: {m.content}" for m in messages)
