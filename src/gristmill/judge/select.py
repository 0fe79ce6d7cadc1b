"""Selection of training rows from judged answers: demonstrations within quotas, and preference pairs."""

import random
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from gristmill.core.response_text import repetition
from gristmill.data.chat import Message
from gristmill.data.rows import Demonstration, Pair, Prompt, Rating, Response, make_id
from gristmill.judge.filter_expr import FilterExpr
from gristmill.judge.pairwise import Verdict
from gristmill.judge.settings import Control, Judging
from gristmill.synth.dedup import NearDuplicates

# (chosen, rejected, who decided)
Compared = tuple[Response, Response, str]
Compare = Callable[[Sequence[tuple[Response, Response]]], Awaitable[Mapping[str, Verdict]]]


def unique_answers(rows: Sequence[Response]) -> list[Response]:
    """Each different answer to a prompt once, with the number of samples that said exactly this."""
    votes = Counter((r.prompt, r.text) for r in rows)
    first = {(r.prompt, r.text): r for r in reversed(rows)}
    return [r if r.votes == votes[key] else replace(r, votes=votes[key]) for key, r in reversed(first.items())]


def meets(expr: FilterExpr, rating: Rating | None, score: float | None) -> bool:
    """Whether an answer's attributes and score meet a condition; an answer without them does not."""
    return rating is not None and score is not None and expr.holds({**asdict(rating), "score": score})


def loops(text: str, judging: Judging) -> bool:
    """Whether an answer repeats itself more than the recipe allows."""
    return judging.max_repetition < 1 and repetition(text) > judging.max_repetition


def by_prompt(rows: Iterable[Response]) -> dict[str, list[Response]]:
    """The answers to each prompt, in their order."""
    groups: dict[str, list[Response]] = defaultdict(list)
    for r in rows:
        groups[r.prompt].append(r)
    return groups


def select(
    rows: Sequence[Response],
    judging: Judging,
    seed: int,
    *,
    control: Control | None = None,
    topics: Mapping[str, str] | None = None,
    quotas: Mapping[str, int] | None = None,
    instructions: Mapping[str, Iterable[str]] | None = None,
) -> tuple[list[Demonstration], dict[str, Any]]:
    """The answers worth imitating: the best of each prompt, then at most a quota a task and a topic, spread over prompts.

    Verified answers stay in random order, since a reward model's taste adds nothing there; judged ones come best first.

    Args:
        control: "unfiltered" takes answers as they come; "random-filter" keeps as many as the judge would, drawn blindly.
        topics: of each prompt the topic that it grew from.
        quotas: of tasks whose quota is not `judging.max_per_task`.
        instructions: of each prompt the types of instruction that `judging.repair` counts sampled answers by.

    Returns:
        demonstrations, and for each task how many prompts, answers, good and kept ones there were, by which judge, with what scores; with
        `judging.repair` how many answers were repaired, and how many of those were kept, by the instruction that they were edited for.
    """
    rng = random.Random(f"select-{seed}")
    kept: dict[str, list[Response]] = defaultdict(list)
    repair = judging.repair if control is None else None
    for group in by_prompt(rows).values():
        finished = [r for r in group if r.finished and not r.edits]
        good = sorted((r for r in finished if r.good), key=_rank, reverse=True)[: judging.max_per_prompt]
        if good and good[0].verified is None:
            good = good[: judging.max_judged_per_prompt if good[0].votes >= judging.min_votes else 0]
        if control == "unfiltered":
            good = rng.sample(finished, min(judging.max_per_prompt, len(finished)))
        elif control == "random-filter":
            good = rng.sample(finished, len(good))
        kept[group[0].task] += good
        if repair is not None:
            kept[group[0].task] += [r for r in group if r.edits and r.finished and r.good][: repair.max_per_prompt]
    out: list[Demonstration] = []
    funnel: dict[str, Any] = {}
    per_topic: Counter[str] = Counter()
    per_instruction: Counter[tuple[bool, str]] = Counter()
    for task, good in kept.items():
        rng.shuffle(good)
        if control is None:  # stable: verified answers stay shuffled
            good.sort(key=lambda r: (r.score or 0.0) if r.judge == "reward" else 0.0, reverse=True)
        chosen: list[Response] = []
        for r in good:
            topic = (topics or {}).get(r.prompt, r.prompt)
            if len(chosen) >= (quotas or {}).get(task, judging.max_per_task) or per_topic[topic] >= judging.max_per_topic:
                continue
            if repair is not None:
                limit = repair.max_per_instruction if r.edits else repair.max_sampled_per_instruction
                counted = [(bool(r.edits), name) for name in dict.fromkeys(r.edits or (instructions or {}).get(r.prompt, ()))]
                if any(per_instruction[key] >= limit for key in counted):
                    continue
                per_instruction.update(counted)
            per_topic[topic] += 1
            chosen.append(r)
        answers = [r for r in rows if r.task == task and not r.edits]
        funnel[task] = {
            "prompts": len({r.prompt for r in answers}),
            "answers": len(answers),
            "good": sum(bool(r.good) for r in answers),
            "kept": len(chosen),
            "judge": dict(Counter(r.judge for r in answers)),
            "score_before": _mean([r.score for r in answers]),
            "score_after": _mean([r.score for r in chosen]),
        }
        if repair is not None:
            funnel[task]["repaired"] = sum(bool(r.edits) for r in rows if r.task == task)
            funnel[task]["repaired_kept"] = dict(sorted(Counter(name for r in chosen for name in r.edits).items()))
        for r in chosen:
            messages = (*r.messages, Message("assistant", r.text))
            out.append(Demonstration(make_id("kept", r.id), task, messages, r.generator, (r.id, r.prompt)))
    return out, funnel


def contested(prompts: Sequence[Prompt], rows: Sequence[Response], min_num: int) -> list[Prompt]:
    """The prompts most likely to make a pair: those that have right and wrong answers, or several that no verifier decides.

    If there are fewer than `min_num`, those whose answers were all wrong come next, then all others.
    """
    groups = by_prompt(r for r in rows if not r.edits)

    def rank(prompt: Prompt) -> int:
        group = groups.get(prompt.id, [])
        if len(group) > 1 and (group[0].verified is None or len({r.good for r in group}) == 2):
            return 0
        return 1 if group and not any(r.good for r in group) else 2

    ordered = sorted(prompts, key=rank)
    return ordered[: max(min_num, sum(rank(p) == 0 for p in prompts))]


async def pair(
    rows: Sequence[Response],
    judging: Judging,
    seed: int,
    *,
    keep_chosen: str = "",
    control: Control | None = None,
    compare: Compare | None = None,
) -> tuple[list[Pair], dict[str, Any]]:
    """Preference pairs: of right and wrong answers where a verifier decides, else of the best and the worst of a prompt.

    Prompts whose answers are all right, all wrong, or too alike make none. The LLM judge decides before the reward model does.

    Args:
        keep_chosen: instead of `judging.keep_chosen`.
        control: "random-filter" draws both answers blindly.
        compare: asks the LLM judge; None: there is none.

    Returns:
        pairs, and how many prompts made how many, or why none; by task and by judge.
    """
    rng = random.Random(f"pair-{seed}")
    expr = FilterExpr.parse(keep_chosen or judging.keep_chosen) if keep_chosen or judging.keep_chosen else None
    groups = [_comparable(group, judging) for group in by_prompt(r for r in rows if not r.edits).values()]
    undecided = [_ends(g) for g in groups if compare and len(g) > 1 and not _is_verified(g)]
    verdicts = await compare(undecided) if compare and undecided else {}
    out: list[Pair] = []
    funnel: Counter[str] = Counter()
    repaired = by_prompt(r for r in rows if r.edits) if judging.repair and judging.repair.pairs and control is None else {}
    for group in groups:
        made = _pairs_of(group, judging, rng, expr, verdicts if compare else None)
        mended = _repaired_pairs(repaired.get(group[0].prompt, []), group, judging) if group else []
        if mended:
            made = ([] if isinstance(made, str) else made) + mended
        if isinstance(made, str):
            funnel[made] += 1
            continue
        for chosen, rejected, judge in made:
            funnel["pairs"] += 1
            low, gap = rejected.score or 0.0, judging.verified_gap
            if judge == "reward":
                gap = (chosen.score or 0.0) - low
            if control == "random-filter":
                chosen, rejected = rng.sample(group, 2)
                low = rejected.score or 0.0
            out.append(_pair(chosen, rejected, round(low + gap, 4), round(low, 4), judge))
    out = _thinned(out, judging.max_pairs_per_task)
    if dropped := funnel["pairs"] - len(out):
        funnel["over a quota"], funnel["pairs"] = dropped, len(out)
    return out, {"funnel": dict(funnel), "tasks": dict(Counter(p.task for p in out)), "judges": dict(Counter(p.judge for p in out))}


def verdict_id(one: Response, other: Response) -> str:
    """Names the comparison of two answers."""
    return make_id(one.id, other.id)


def _pair(chosen: Response, rejected: Response, high: float, low: float, judge: str) -> Pair:
    name, parents = make_id("pair", chosen.id, rejected.id), (chosen.id, rejected.id)
    ended = chosen.finished, rejected.finished
    return Pair(name, chosen.prompt, chosen.task, chosen.messages, chosen.text, rejected.text, high, low, judge, parents, {}, *ended)


def _comparable(group: list[Response], judging: Judging) -> list[Response]:
    """The answers to a prompt that may make a pair: none that nearly equals another, none without a rating among rated ones."""
    if judging.near_duplicates < 1:
        seen = NearDuplicates(judging.near_duplicates)
        group = [r for r in sorted(group, key=lambda r: r.id) if seen.add(r.text)]
    if not _is_verified(group) and any(r.score is not None for r in group):
        group = [r for r in group if r.score is not None]
    return group


def _is_verified(group: Sequence[Response]) -> bool:
    return any(r.verified is not None for r in group)


def _rank(r: Response) -> tuple[int, float]:
    """Where only the reward model judges, agreement among a prompt's samples comes first: its own knowledge is the policy's."""
    return (r.votes if r.judge == "reward" else 0, r.score or 0.0)


def _ends(group: Sequence[Response]) -> tuple[Response, Response]:
    """The best and the worst answer, as far as is known."""
    best = max(group, key=_rank)
    return best, min((r for r in group if r is not best), key=lambda r: r.score or 0.0)


def _pairs_of(
    group: list[Response], judging: Judging, rng: random.Random, expr: FilterExpr | None, verdicts: Mapping[str, Verdict] | None
) -> list[Compared] | str:
    """The pairs of one prompt, or why there are none."""
    if len(group) < 2:
        return "one answer"
    if _is_verified(group):
        right, wrong = [r for r in group if r.good], [r for r in group if not r.good]
        if not right or not wrong:
            return "all right" if right else "all wrong"
        count = min(judging.max_pairs_per_prompt, len(right), len(wrong))
        if judging.max_length_difference == 1:
            both = list(zip(rng.sample(right, count), rng.sample(wrong, count), strict=True))
        else:
            both, wrong = [], rng.sample(wrong, len(wrong))
            for chosen in rng.sample(right, len(right)):
                near = next((bad for bad in wrong if _near_in_length(chosen, bad, judging)), None)
                if near is not None and len(both) < count:
                    both.append((chosen, near))
                    wrong.remove(near)
        return [(chosen, bad, "verifier") for chosen, bad in both] or "lengths too far apart"
    best, worst = _ends(group)
    if verdicts is not None:
        verdict = verdicts.get(verdict_id(best, worst), "unparsed")
        if verdict in ("first", "second"):
            chosen, rejected = (best, worst) if verdict == "first" else (worst, best)
            if not _near_in_length(best, worst, judging):
                return "lengths too far apart"
            return [(chosen, rejected, "llm")] if chosen.finished and not loops(chosen.text, judging) else "none good"
        if best.score is None:  # and nobody else can decide
            return "the judge contradicts itself" if verdict == "tie" else "no verdict"
    if best.score is None:
        return "no judge"
    if best.score - (worst.score or 0.0) < judging.min_gap:
        return "alike"
    if not _near_in_length(best, worst, judging):
        return "lengths too far apart"
    good = meets(expr, best.rating, best.score) if expr else bool(best.good)
    good = good and not loops(best.text, judging)
    return [(best, worst, "reward")] if best.finished and best.votes >= judging.min_votes and good else "none good"


def _near_in_length(one: Response, other: Response, judging: Judging) -> bool:
    """Whether the sides of a pair are about as long. One that loops is as long as it was let, and so compares with any."""
    if judging.max_length_difference == 1 or any(loops(r.text, judging) for r in (one, other)):
        return True
    shorter, longer = sorted((len(one.text), len(other.text)))
    return longer - shorter <= judging.max_length_difference * longer


def _repaired_pairs(repaired: Sequence[Response], group: Sequence[Response], judging: Judging) -> list[Compared]:
    """Repaired answers over the failing ones that they were made of."""
    by_id = {r.id: r for r in group}
    both = [(r, by_id[r.repaired_from[0]]) for r in repaired if r.good and r.repaired_from[0] in by_id]
    near = [(r, failing) for r, failing in both if _near_in_length(r, failing, judging)]
    return [(r, failing, "verifier") for r, failing in near[: judging.max_pairs_per_prompt]]


def _thinned(pairs: list[Pair], max_per_task: int) -> list[Pair]:
    """Of a task with too many pairs, some that lie evenly over the reward gap: as many easy as hard ones."""
    by_task: dict[str, list[Pair]] = defaultdict(list)
    for p in pairs:
        by_task[p.task].append(p)
    kept: set[str] = set()
    for made in by_task.values():
        ordered = sorted(made, key=lambda p: (p.chosen_reward - p.rejected_reward, p.id))
        num = min(len(ordered), max_per_task)
        kept |= {ordered[(2 * i + 1) * len(ordered) // (2 * num)].id for i in range(num)}
    return [p for p in pairs if p.id in kept]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return round(sum(known) / len(known), 3) if known else None
