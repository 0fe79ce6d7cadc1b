"""From judged answers to training rows: which answers are kept as demonstrations, and which make pairs."""

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict

from gristmill.data.chat import Message
from gristmill.data.rows import Demonstration, Pair, Prompt, Response, make_id
from gristmill.judge.filter_expr import FilterExpr
from gristmill.synth.dedup import NearDuplicates
from gristmill.synth.parsing import normalize
from gristmill.workflows.dataset.recipe import Judging


def distinct(prompts: Iterable[Prompt], similarity: float) -> tuple[list[Prompt], int]:
    """Prompts that no earlier one of their task equals or, below a similarity of 1, nearly equals; and how many were left out."""
    seen: dict[str, NearDuplicates] = defaultdict(lambda: NearDuplicates(similarity))
    exact: set[tuple[str, str]] = set()
    kept, dropped = [], 0
    for prompt in prompts:
        words = "\n".join(m.content for m in prompt.messages if m.role != "assistant")
        key = (prompt.task, normalize(words))
        if key in exact or (similarity < 1 and not seen[prompt.task].add(words)):
            dropped += 1
            continue
        exact.add(key)
        kept.append(prompt)
    return kept, dropped


def passes(response: Response, keep: FilterExpr | None) -> bool:
    """Whether an answer may be kept: it ended, what can be verified is right, and the recipe's condition holds for the rest."""
    if not response.finished or response.verified is False:
        return False
    if response.verified or keep is None:
        return True
    if response.rating is None or response.score is None:
        return False
    return keep.holds({**asdict(response.rating), "score": response.score})


def demonstrations(rows: Sequence[Response], topics: dict[str, str], judging: Judging) -> tuple[list[Demonstration], dict[str, int]]:
    """The best answers within the quotas, and what became of all.

    Args:
        topics: of each prompt the topic it grew from.
    """
    ranked = sorted((r for r in rows if r.good), key=lambda r: (-(r.score or 0.0), r.id))
    per_prompt: Counter[str] = Counter()
    per_topic: Counter[str] = Counter()
    per_task: Counter[str] = Counter()
    funnel: Counter[str] = Counter(answers=len(rows), good=len(ranked))
    out = []
    for r in ranked:
        topic = topics.get(r.prompt, r.prompt)
        if per_prompt[r.prompt] >= judging.keep_per_prompt:
            funnel["beside a better answer"] += 1
        elif per_topic[topic] >= judging.quota_per_topic or per_task[r.task] >= judging.quota:
            funnel["over a quota"] += 1
        else:
            per_prompt[r.prompt] += 1
            per_topic[topic] += 1
            per_task[r.task] += 1
            talk = (*r.messages, Message("assistant", r.text))
            out.append(Demonstration(make_id("kept", r.id), r.task, talk, r.generator, (r.id, r.prompt)))
    funnel["kept"] = len(out)
    return out, dict(funnel)


def contests(rows: Sequence[Response], judging: Judging) -> tuple[list[tuple[Response, Response, str]], Counter[str]]:
    """Of each prompt the answers to compare, the better first as far as is known, and who decided: "verifier", "reward", or "" where
    nothing has; and why other prompts have none."""
    groups: dict[str, list[Response]] = defaultdict(list)
    for r in rows:
        if r.finished:
            groups[r.prompt].append(r)
    found: list[tuple[Response, Response, str]] = []
    why: Counter[str] = Counter()
    for name in sorted(groups):
        group = _different(groups[name])
        if any(r.score is not None for r in group):  # an answer whose rating failed has no place among rated ones
            group = [r for r in group if r.score is not None]
        group.sort(key=lambda r: (-(r.score or 0.0), r.id))
        right, wrong = [r for r in group if r.verified], [r for r in group if r.verified is False]
        if len(group) < 2:
            why["one answer"] += 1
        elif right or wrong:
            if right and wrong:
                found.append((right[0], wrong[-1], "verifier"))
            else:
                why["all right" if right else "all wrong"] += 1
        elif judging.llm:
            found.append((group[0], group[-1], ""))
        elif group[0].score is None:
            why["no judge"] += 1
        elif reason := unfit(group[0], group[-1], judging):
            why[reason] += 1
        else:
            found.append((group[0], group[-1], "reward"))
    return found, why


def unfit(best: Response, worst: Response, judging: Judging) -> str:
    """Why the best and the worst by the reward model make no pair; "" if they make one."""
    score = best.score or 0.0
    if not best.good or (judging.min_chosen is not None and score < judging.min_chosen):
        return "none good"
    return "alike" if score - (worst.score or 0.0) < judging.min_gap else ""


def _different(group: Sequence[Response]) -> list[Response]:
    """Answers of which none nearly equals another."""
    seen = NearDuplicates(0.9)
    return [r for r in sorted(group, key=lambda r: r.id) if seen.add(r.text)]


def pairs(contested: Sequence[tuple[Response, Response, str]], judging: Judging, seed: int) -> list[Pair]:
    """Pairs with their rewards. Of a task with too many, as many easy as hard ones are kept: evenly over the reward gap."""
    made: dict[str, list[Pair]] = defaultdict(list)
    for chosen, rejected, judge in contested:
        low, high = rejected.score or 0.0, chosen.score or 0.0
        if judge != "reward":
            high = max(high, low + judging.verified_gap)
        name = make_id("pair", chosen.id, rejected.id)
        rewards = round(high, 4), round(low, 4)
        parents = (chosen.id, rejected.id, chosen.prompt)
        pair = Pair(name, chosen.prompt, chosen.task, chosen.messages, chosen.text, rejected.text, *rewards, judge, parents)
        made[chosen.task].append(pair)
    out = []
    for task in sorted(made):
        ordered = sorted(made[task], key=lambda p: (p.chosen_reward - p.rejected_reward, p.id))
        num = min(len(ordered), judging.pairs_per_task)
        out += [ordered[(2 * i + 1) * len(ordered) // (2 * num)] for i in range(num)]
    random.Random(seed).shuffle(out)
    return out
