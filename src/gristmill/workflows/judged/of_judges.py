"""Benchmarks of the judge itself: agreement with people, reward benchmarks."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from gristmill.core.concurrent import map_concurrent
from gristmill.core.untrusted import read_untrusted_json
from gristmill.data.chat import Conversation, Message, to_dicts
from gristmill.data.rows import Rating, make_id
from gristmill.evaluate import judge_agreement, reward_bench
from gristmill.generation.api import Completion
from gristmill.generation.cached import CachedClient
from gristmill.generation.endpoint import RowFailed
from gristmill.generation.mixture import opened, shown
from gristmill.judge.pairwise import (
    EXPLAINED_TEMPLATE,
    EXPLAINED_TOKENS,
    SHORT_TOKENS,
    TEMPLATE,
    Comparison,
    combine_verdicts,
    comparison_requests,
    marked_answer,
    named_answer,
)
from gristmill.judge.party import Party
from gristmill.judge.reward_client import RemoteRewardScorer, RewardModelEndpoint
from gristmill.model.adapters import is_adapter, is_reward_adapter
from gristmill.runs.journal import Journal
from gristmill.workflows.judged.session import (
    RATED_AT_ONCE,
    RATING_CALLS,
    VERDICT_CALLS,
    Ask,
    JudgedSession,
    Prepared,
    call_identity,
)


def is_reward_model(judge: Party) -> bool:
    """Whether a folder holds a reward model."""
    if judge.is_endpoint:
        return False
    if is_adapter(judge.folder):
        return is_reward_adapter(judge.folder)
    return "reward_weights" in read_untrusted_json(judge.folder / "config.json")


def _replies(session: JudgedSession, comparisons: Sequence[Comparison]) -> dict[str, tuple[str, str]]:
    """The judge's replies to both orders of each comparison, cut down to their verdicts; "" where there is none to read."""
    explain = session.args.explain
    template, tokens = (EXPLAINED_TEMPLATE, EXPLAINED_TOKENS) if explain else (TEMPLATE, SHORT_TOKENS)

    async def compare(ask: Ask, c: Comparison) -> list[Completion | None]:
        requests = comparison_requests([c], template, session.args.judge_tokens or tokens)
        return [await ask(request.messages, request.sampling) for request in requests]

    found = session.answer(session.judge, comparisons, compare, calls=VERDICT_CALLS, what="verdicts")
    out = {}
    for c, replies in zip(comparisons, found, strict=True):
        names = []
        for reply in replies:
            name = "" if reply is None else marked_answer(reply.text) if explain else named_answer(reply.text)
            names.append(f"[[{name}]]" if session.read(name, reply) else "")
        out[c.id] = (names[0], names[1])
    return out


def _rewards_of(session: JudgedSession, talks: Mapping[str, Conversation]) -> dict[str, float]:
    """Rewards of conversations by name, from the reward model in process or behind an endpoint; none of what cannot be rated."""
    args, judge = session.args, session.judge
    identity = call_identity(judge)
    if judge.is_endpoint:
        return _endpoint_rewards(session, talks, identity)
    from gristmill.judge.reward import load_scorer

    scorer = load_scorer(judge.folder, judge.chat_format, device=judge.device, dtype=judge.dtype)
    ids = {name: make_id("rating", identity, to_dicts(talk)) for name, talk in talks.items()}
    ratings: dict[str, Rating] = {}
    with Journal(args.out / RATING_CALLS) as journal, session.progress.stage("ratings"):
        fitting = [name for name, talk in talks.items() if ids[name] in journal or scorer.fits(talk)]
        todo = [name for name in fitting if ids[name] not in journal]
        for start in range(0, len(todo), RATED_AT_ONCE):
            part = todo[start : start + RATED_AT_ONCE]
            for name, rating in zip(part, scorer.score([talks[name] for name in part]), strict=True):
                journal.append({"id": ids[name], "rating": asdict(rating)})
            session.progress.tick(start + len(part), len(todo), "answers rated")
        ratings = {name: Rating(**journal[ids[name]]["rating"]) for name in fitting}
    return {name: scorer.total(rating) for name, rating in ratings.items()}


def _endpoint_rewards(session: JudgedSession, talks: Mapping[str, Conversation], identity: Any) -> dict[str, float]:
    args = session.args

    target = session.judge.target
    assert target is not None

    async def all_of_them() -> dict[str, float]:
        source = RewardModelEndpoint([target], concurrency=args.concurrency)
        with Journal(args.out / RATING_CALLS) as journal:
            client = CachedClient(source, journal, retry_failed=args.retry_failed)
            scorer = RemoteRewardScorer(client, args.weights)

            async def one(name: str) -> tuple[str, float | None]:
                try:
                    return name, scorer.total(await scorer.rate(talks[name], make_id("rating", identity, to_dicts(talks[name]))))
                except RowFailed:
                    return name, None

            async with opened(source), shown(client, session.progress.tick, len(talks)):
                found = [pair async for pair in map_concurrent(list(talks), one, min(2 * source.concurrency, max(1, len(talks))))]
            session.failed += client.failed
            return {name: reward for name, reward in found if reward is not None}

    with session.progress.stage("ratings"):
        return asyncio.run(all_of_them())


def run_agreement(session: JudgedSession) -> Prepared:
    args, judge = session.args, session.judge
    pairs = session.limited(judge_agreement.read_labelled_pairs(args.data), lambda p: p.subset)
    is_reward = is_reward_model(judge) if args.is_reward is None else args.is_reward

    def work() -> tuple[dict[str, Any], list[dict[str, Any]]]:
        if is_reward:
            sides = {(p.id, i): (*p.messages, Message("assistant", text)) for p in pairs for i, text in enumerate((p.first, p.second))}
            rewards = _rewards_of(session, {f"{name}#{i}": talk for (name, i), talk in sides.items()})
            replies = {p.id: _as_replies(rewards.get(f"{p.id}#0"), rewards.get(f"{p.id}#1")) for p in pairs}
        else:
            replies = _replies(session, [p.comparison for p in pairs])
        scores = judge_agreement.agreement(pairs, replies, seed=args.seed)
        samples = [
            {
                "id": p.id,
                "subset": p.subset,
                "messages": to_dicts(p.messages),
                "first": p.first,
                "second": p.second,
                "label": p.label,
                "replies": list(replies[p.id]),
                "verdict": combine_verdicts(*replies[p.id]),
            }
            for p in pairs
        ]
        return {"judge_kind": "reward model" if is_reward else "LLM judge", "scores": scores, "verdicts": session.counts}, samples

    return work


def _as_replies(first: float | None, second: float | None) -> tuple[str, str]:
    """The verdicts of both orders that two rewards stand for."""
    if first is None or second is None:
        return "", ""
    return ("[[C]]", "[[C]]") if first == second else ("[[A]]", "[[B]]") if first > second else ("[[B]]", "[[A]]")


def run_rewards(session: JudgedSession) -> Prepared:
    args, judge = session.args, session.judge
    items = session.limited(reward_bench.read_benchmarks(args.data), lambda i: f"{i.benchmark}/{i.subset}")
    is_reward = is_reward_model(judge) if args.is_reward is None else args.is_reward

    def work() -> tuple[dict[str, Any], list[dict[str, Any]]]:
        outcomes: dict[str, list[list[float]]] = {}
        samples: list[dict[str, Any]] = []
        unrated = 0
        if is_reward:
            talks = {
                f"{item.id}#{side}{i}": (*item.messages, Message("assistant", text))
                for item in items
                for side, texts in (("c", item.chosen), ("r", item.rejected))
                for i, text in enumerate(texts)
            }
            rewards = _rewards_of(session, talks)
            unrated = len(talks) - len(rewards)
            for item in items:
                better = [rewards.get(f"{item.id}#c{i}") for i in range(len(item.chosen))]
                worse = [rewards.get(f"{item.id}#r{i}") for i in range(len(item.rejected))]
                outcomes[item.id] = [[reward_bench.outcome_of_rewards(b, w) for w in worse] for b in better]
                samples.append(_reward_sample(item, outcomes[item.id]) | {"chosen_rewards": better, "rejected_rewards": worse})
        else:
            cases = {
                (item.id, i, j): (item, b, w) for item in items for i, b in enumerate(item.chosen) for j, w in enumerate(item.rejected)
            }
            comparisons = {key: Comparison(f"{key[0]}#{key[1]}#{key[2]}", item.messages, b, w) for key, (item, b, w) in cases.items()}
            replies = _replies(session, list(comparisons.values()))
            for item in items:
                said = [[replies[comparisons[item.id, i, j].id] for j in range(len(item.rejected))] for i in range(len(item.chosen))]
                outcomes[item.id] = [[reward_bench.outcome_of_replies(*pair) for pair in row] for row in said]
                samples.append(_reward_sample(item, outcomes[item.id]) | {"replies": [[list(pair) for pair in row] for row in said]})
        scores = reward_bench.benchmark_scores(items, outcomes, seed=args.seed)
        notes = [f"{name}: {note}" for name, found in scores.items() for note in found.pop("notes")]
        notes += (
            [f"{unrated} answers have no reward (too long for the model, or the call failed): their pairs are lost."] if unrated else []
        )
        kind = "reward model" if is_reward else "LLM judge"
        return {"judge_kind": kind, "scores": scores, "verdicts": session.counts, "unrated": unrated, "notes": notes}, samples

    return work


def _reward_sample(item: reward_bench.RewardItem, outcome: Sequence[Sequence[float]]) -> dict[str, Any]:
    head = {"id": item.id, "benchmark": item.benchmark, "subset": item.subset, "messages": to_dicts(item.messages)}
    return {**head, "chosen": list(item.chosen), "rejected": list(item.rejected), "outcome": [list(row) for row in outcome]}
