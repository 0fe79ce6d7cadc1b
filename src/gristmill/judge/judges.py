"""Judges of answers, in the recipe's order: verifiers, the reward model, and an LLM judge of pairs."""

from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from gristmill.core.concurrent import map_concurrent
from gristmill.core.response_text import repetition, strip_thinking
from gristmill.data.chat import Message
from gristmill.data.rows import Demonstration, Prompt, Rating, Response, make_id
from gristmill.generation.cached import CachedClient
from gristmill.generation.endpoint import RowFailed, Target
from gristmill.generation.settings import Calls
from gristmill.judge.filter_expr import FilterExpr
from gristmill.judge.pairwise import Comparison, Verdict, combine_verdicts, comparison_requests
from gristmill.judge.programs import Tick, Verifier
from gristmill.judge.reward_client import RemoteRewardScorer, RewardModelEndpoint
from gristmill.judge.select import by_prompt, loops, meets, unique_answers, verdict_id
from gristmill.judge.settings import Judging, Reward
from gristmill.runs.journal import Journal
from gristmill.verify.repair import Repaired, repair
from gristmill.verify.text_edits import MAX_REPETITION

RATED_AT_ONCE = 512  # conversations, so that progress shows
CONCURRENT = 512  # calls that wait for an endpoint, which itself bounds what is in flight
Talk = Sequence[Message]
Item = TypeVar("Item")
Result = TypeVar("Result")


class Scorer(Protocol):
    """A reward model in this process (`judge.reward.RewardScorer`)."""

    def fits(self, messages: Talk) -> bool: ...

    def score(self, conversations: Sequence[Talk]) -> list[Rating]: ...


class Rater(Protocol):
    """A reward model, wherever it is."""

    failed: int
    left_out: Counter[str]  # ratings without a field that the endpoint refused, by field

    async def rate(self, talks: Mapping[str, Talk]) -> dict[str, Rating]:
        """Ratings of the last turn of conversations, by their ids; none of those that cannot be rated."""
        ...


class LocalRater:
    """A reward model in this process."""

    failed = 0

    def __init__(self, scorer: Scorer, tick: Tick | None = None):
        self._scorer, self._tick = scorer, tick
        self.left_out: Counter[str] = Counter()

    async def rate(self, talks: Mapping[str, Talk]) -> dict[str, Rating]:
        fitting = {name: talk for name, talk in talks.items() if self._scorer.fits(talk)}
        names = list(fitting)
        out: dict[str, Rating] = {}
        for start in range(0, len(names), RATED_AT_ONCE):
            part = names[start : start + RATED_AT_ONCE]
            out |= dict(zip(part, self._scorer.score([fitting[name] for name in part]), strict=True))
            if self._tick:
                self._tick(len(out), len(names), "answers rated")
        return out


class EndpointRater:
    """A reward model behind an endpoint; what it said is in the journal.

    Attributes:
        failed: calls that failed for good, met in this start.
    """

    def __init__(self, target: Target, reward: Reward, calls: Calls, journal: Journal, *, retry_failed: bool = False):
        self._target, self._reward, self._calls, self._journal, self._retry = target, reward, calls, journal, retry_failed
        self.failed = 0
        self.left_out: Counter[str] = Counter()

    async def rate(self, talks: Mapping[str, Talk]) -> dict[str, Rating]:
        if not talks:
            return {}
        async with RewardModelEndpoint([self._target], **self._calls.model_dump()) as source:
            client = CachedClient(source, self._journal, retry_failed=self._retry)
            judge = RemoteRewardScorer(client, self._reward.weights)

            async def one(name: str) -> tuple[str, Rating]:
                return name, await judge.rate(talks[name], make_id("rating", self._reward.model, name, talks[name][-1].content))

            found = await gather_unfailed(list(talks), one)
        self.failed += client.failed
        self.left_out += client.left_out
        return dict(found)


async def gather_unfailed(items: Iterable[Item], work: Callable[[Item], Awaitable[Result]]) -> list[Result]:
    """What `work` makes of each item, many at a time, without those whose call failed for good."""

    async def one(item: Item) -> list[Result]:
        try:
            return [await work(item)]
        except RowFailed:
            return []

    return [result async for results in map_concurrent(items, one, CONCURRENT) for result in results]


class Judges:
    """The judges of one stage.

    Args:
        judging: the recipe's section.
        verifier: of answers to prompts with a known truth.
        rater: the reward model; None: there is none.
        weights: its aggregation weights.
        client: whom the LLM judge's questions go to.
        judge_model: the model among the client's that is the LLM judge; "" for the one of its row.
        finished_only: leave answers that were cut off unrated.

    Attributes:
        comparisons: of the LLM judge so far, by verdict.
    """

    def __init__(
        self,
        judging: Judging,
        verifier: Verifier,
        rater: Rater | None,
        *,
        weights: Sequence[float] = (),
        client: CachedClient | None = None,
        judge_model: str = "",
        finished_only: bool = False,
    ):
        self.judging, self.verifier, self.rater, self.weights = judging, verifier, rater, tuple(weights)
        self.client, self.judge_model, self.finished_only = client, judge_model, finished_only
        self.comparisons: Counter[str] = Counter()
        self._keep = FilterExpr.parse(judging.keep) if judging.keep else None

    async def judge(self, prompts: Iterable[Prompt], rows: Sequence[Response]) -> list[Response]:
        """Each different answer once, with its verdict where there is a truth, its rating, and whether it is good."""
        rows = unique_answers(rows)
        truths: dict[str, Any] = {p.id: p.truth for p in prompts if p.truth is not None}
        judged = [r for r in rows if r.finished or not self.finished_only]
        talks = {r.id: (*r.messages, Message("assistant", strip_thinking(r.text))) for r in judged}
        ratings = await self.rater.rate(talks) if self.rater else {}
        checkable = [r for r in judged if r.prompt in truths]
        verdicts = self.verifier.verify([(truths[r.prompt], r.text) for r in checkable])
        verified = {r.id: right for r, right in zip(checkable, verdicts, strict=True)}
        weak = {r.id for r in checkable if self.verifier.is_weak(truths[r.prompt], r.text)}
        return [self._judged(r, ratings.get(r.id), verified.get(r.id), True if r.id in weak else None) for r in rows]

    async def repair(self, prompts: Iterable[Prompt], rows: Sequence[Response]) -> list[Response]:
        """Judged answers that a program has edited until they pass: some a prompt, of those that ended, say something and do not loop."""
        settings = self.judging.repair
        assert settings is not None
        truths = {p.id: p.truth for p in prompts if p.truth is not None}
        max_repetition = min(self.judging.max_repetition, MAX_REPETITION)
        made: list[Response] = []
        for name, group in by_prompt(rows).items():
            usable = [r for r in group if r.finished and r.verified is not None and repetition(r.text) <= max_repetition]
            known = {r.text for r in group}
            found: list[Response] = []
            for r in usable:
                if r.verified or len(r.text.split()) < settings.min_words:
                    continue
                others = [o for o in usable if o is not r]
                done = repair(truths[name], r.text, [o.text for o in others])
                if done is not None and done.text not in known and len(done.text.split()) >= settings.min_words:
                    known.add(done.text)
                    found.append(_repaired(r, done, [others[place].id for place in done.sources]))
            made += sorted(found, key=lambda r: (len(r.edits), -len(r.text)))[: settings.max_per_prompt]
        return await self.judge(prompts, made)

    def left_out(self) -> dict[str, dict[str, int]]:
        """For a stage's summary: the rows that were asked for without a field that an endpoint refused, by field, where there are some."""
        sources = [source.left_out for source in (self.client, self.rater) if source is not None]
        found = sum(sources, Counter[str]())
        return {"left_out": dict(found)} if found else {}

    def _judged(self, r: Response, rating: Rating | None, verified: bool | None, weak: bool | None) -> Response:
        score = round(rating.score(self.weights), 4) if rating else None
        good = verified if verified is not None else self._keep is None or meets(self._keep, rating, score)
        good = good and not loops(r.text, self.judging)
        judge = "verifier" if verified is not None else "reward" if rating else "none"
        return replace(r, rating=rating, score=score, verified=verified, judge=judge, good=bool(good and r.finished), weak=weak)

    async def compare(self, pairs: Sequence[tuple[Response, Response]]) -> dict[str, Verdict]:
        """The LLM judge's verdict about each pair, asked in both orders; none where a call failed."""
        assert self.client is not None
        client = self.client

        async def one(pair: tuple[Response, Response]) -> tuple[str, Verdict]:
            first, second = pair
            comparison = Comparison(make_id("compare", first.id, second.id), first.messages, first.text, second.text)
            note = {"for": "compare", "parents": [first.id, second.id]}
            replies = [
                (await client.complete(request, self.judge_model, note=note))[0].text for request in comparison_requests([comparison])
            ]
            return verdict_id(first, second), combine_verdicts(*replies)

        found = dict(await gather_unfailed(pairs, one))
        self.comparisons.update(found.values())
        return found

    async def good_dialogues(self, rows: Sequence[Demonstration], min_score: float) -> list[Demonstration]:
        """Dialogues of which every assistant turn reaches a score."""
        assert self.rater is not None
        turns = {f"{d.id}#{i}": (d, i) for d in rows for i, message in enumerate(d.messages) if message.role == "assistant"}
        ratings = await self.rater.rate({name: d.messages[: i + 1] for name, (d, i) in turns.items()})
        low = {turns[name][0].id for name, rating in ratings.items() if rating.score(self.weights) < min_score}
        unrated = {turns[name][0].id for name in turns.keys() - ratings.keys()}
        return [d for d in rows if d.id not in low | unrated]


def _repaired(r: Response, done: Repaired, sources: Sequence[str]) -> Response:
    """The row of a repaired answer. Its tokens are estimated by its length: it is text, and nobody has drawn it."""
    return replace(
        r,
        id=make_id("repaired", r.id, done.text),
        text=done.text,
        num_tokens=round(r.num_tokens * len(done.text) / max(1, len(r.text))),
        logprob=None,
        votes=1,
        edits=done.edits,
        repaired_from=(r.id, *sources),
    )
