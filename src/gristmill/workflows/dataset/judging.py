"""Who is right, what is kept and what makes a pair: verifiers, the reward model, a language model, in the recipe's order."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gristmill.data.chat import Message
from gristmill.data.rows import Demonstration, Pair, Prompt, Rating, Response, make_id
from gristmill.judge import pairwise
from gristmill.judge.backends import rate
from gristmill.judge.filter_expr import FilterExpr
from gristmill.judge.reward_client import weight_set
from gristmill.runs.journal import Journal
from gristmill.synth.writer import Writer
from gristmill.verify.verify import verify
from gristmill.workflows.dataset.recipe import DatasetRecipe
from gristmill.workflows.dataset.select import contests, demonstrations, pairs, passes, unfit


class Judges:
    """The judges of a run.

    Attributes:
        funnel: what became of dialogues, answers and pairs.
        failed_ratings: calls of the reward model that failed for good, met in this start.
    """

    def __init__(self, recipe: DatasetRecipe, folder: Path, writer: Writer, *, retry_failed: bool, unsafe_code: bool):
        self.recipe, self.folder, self.writer = recipe, folder, writer
        self.retry_failed, self.unsafe_code = retry_failed, unsafe_code
        self.funnel: dict[str, Any] = {}
        self.failed_ratings = 0

    async def judge(self, prompts: Sequence[Prompt], rows: list[Response]) -> list[Response]:
        """Verdicts of the verifiers where there is a truth, ratings of the reward model, and whether the answer may be kept."""
        truths = {p.id: p.truth for p in prompts if p.truth}
        checked = self._verify(truths, [r for r in rows if r.prompt in truths and r.finished])
        ratings = await self._rate([r for r in rows if r.finished])
        weights = weight_set(self.recipe.judging.reward.weights) if self.recipe.judging.reward else ()
        keep = FilterExpr.parse(self.recipe.judging.keep) if self.recipe.judging.keep else None
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
        from gristmill.sandbox.sandbox import Sandbox

        with Sandbox(unsafe=self.unsafe_code) as sandbox:

            def run_code(program: str, tests: str) -> bool:
                return bool(sandbox.run_many([(program, tests)])[0].passed)

            return {r.id: verify(truths[r.prompt], r.text, run_code) for r in rows}

    async def _rate(self, rows: Sequence[Response]) -> dict[str, Rating]:
        reward = self.recipe.judging.reward
        if reward is None or not rows:
            return {}
        talks = {r.id: (*r.messages, Message("assistant", r.text)) for r in rows}
        with Journal(self.folder / "ratings.jsonl") as journal:
            how = (reward, self.recipe.calls, self.recipe.chat_format, self.writer, journal)
            ratings, failed = await rate(talks, *how, retry_failed=self.retry_failed)
        self.failed_ratings += failed
        return ratings

    async def select(
        self, prompts: Sequence[Prompt], written: Sequence[Demonstration], rows: Sequence[Response]
    ) -> tuple[list[Demonstration], list[Pair]]:
        """Demonstrations (those that pipelines wrote whole, dialogues that pass, the best answers) and pairs."""
        judging = self.recipe.judging
        topics = {p.id: p.parents[-1] for p in prompts if p.parents}
        dialogues = [d for d in written if d.task == "dialogue"]
        others = [d for d in written if d.task != "dialogue"]
        if judging.reward is not None and self.recipe.dialogues is not None and dialogues:
            good = await self._good_dialogues(dialogues, self.recipe.dialogues.threshold)
            self.funnel["dialogues"] = {"written": len(dialogues), "kept": len(good)}
            dialogues = good
        kept, counts = demonstrations(rows, topics, judging)
        self.funnel["answers"] = counts
        contested, why = contests(rows, judging)
        verdicts = await self._compare([(a, b) for a, b, judge in contested if not judge])
        final = []
        for a, b, judge in contested:
            verdict = verdicts.get(make_id(a.id, b.id), "unparsed")
            if judge or verdict in ("first", "second"):
                final.append((b, a, "llm") if verdict == "second" and not judge else (a, b, judge or "llm"))
            elif a.score is None:  # and nobody else can decide
                why["the judge contradicts itself" if verdict == "tie" else "no verdict"] += 1
            elif reason := unfit(a, b, judging):
                why[reason] += 1
            else:
                final.append((a, b, "reward"))
        made_pairs = pairs(sorted(final, key=lambda c: c[0].id), judging, self.recipe.seed)
        self.funnel["pairs"] = {"pairs": len(made_pairs), **{k: v for k, v in why.items() if v}}
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

    async def _compare(self, rows: Sequence[tuple[Response, Response]]) -> dict[str, pairwise.Verdict]:
        """Ask a language model in both orders: the verdict about each pair, by a hash of its ids; none where a call failed."""

        async def compare(pair: tuple[Response, Response]) -> list[tuple[str, pairwise.Verdict]]:
            one, other = pair
            comparison = pairwise.Comparison(make_id("compare", one.id, other.id), one.messages, one.text, other.text)
            note = {"for": "compare", "parents": [one.id, other.id]}
            judge = self.recipe.models[0].model if self.recipe.models else ""  # the same in both orders
            replies = [
                (await self.writer.client.complete(request, judge, note=note))[0].text
                for request in pairwise.comparison_requests([comparison])
            ]
            return [(make_id(one.id, other.id), pairwise.combine_verdicts(*replies))]

        return dict(await self.writer.all(rows, compare))
