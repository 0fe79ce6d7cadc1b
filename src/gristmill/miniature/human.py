"""Simulated human data: demonstrations, and rated answers by annotators who disagree.

Shapes follow HelpSteer2 (2406.08673): two answers a prompt, five attributes from 0 to 4, at least three annotators an answer, two
more when helpfulness ranges over more than 2, the three in best agreement kept, a prompt dropped when they still disagree.
"""

import itertools
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gristmill.data.chat import Conversation, Message, to_dicts
from gristmill.data.rows import ATTRIBUTES
from gristmill.miniature import code, facts, followups, lists, sums
from gristmill.miniature.problem import Problem, pick
from gristmill.miniature.world import TASKS, World, writing_problem
from gristmill.verify.verify import verify

# People are asked about what no program can check, above all: facts, in one turn or two.
RATED_TASKS = (facts.TASK, followups.TASK, facts.TASK, sums.TASK, lists.TASK, code.TASK)
WRITING = "prompt-writing"  # task name of its demonstrations
CARELESS = 0.06  # share of marks that an annotator gives without looking
SPREADS = (0.5, 0.5, 0.6, 0.6, 0.6)  # of the others around what a careful one would give
NUM_WRITING = 1  # of them for one demonstration of each task


def demonstrations(world: World, num: int, seed: int) -> list[dict[str, Any]]:
    """`num` human-written conversations: the five tasks in equal parts, and prompt writing (one sixth).

    Returns:
        rows with `task` and `messages` (ending with the assistant's answer).
    """
    rng = random.Random(f"demonstrations-{seed}")
    rows: list[dict[str, Any]] = []
    seen: set[Conversation] = set()
    while len(rows) < num:
        turn = len(rows) % (len(TASKS) + NUM_WRITING)
        messages: Conversation
        if turn < len(TASKS):
            problem = world.draw(rng, TASKS[turn])
            messages = (*problem.messages, Message("assistant", problem.answer))
            task = problem.task
        else:
            asked, said = writing_problem(world, rng)
            messages = (Message("user", asked), Message("assistant", said))
            task = WRITING
        if messages not in seen or task == WRITING:
            seen.add(messages)
            rows.append({"task": task, "messages": to_dicts(messages)})
    return rows


@dataclass(frozen=True)
class WrittenAnswer:
    """An answer somebody wrote, with how complete and how clear it is (0..1)."""

    text: str
    clear: float = 1.0
    length: int = 0


def write(rng: random.Random, problem: Problem, good: bool) -> WrittenAnswer:
    """A good answer, or one with a fault of the kinds that people and small models make."""
    if good:
        return WrittenAnswer(problem.answer)
    kind = rng.random()
    if kind < 0.6:
        return WrittenAnswer(wrong_answer(rng, problem))
    if kind < 0.7:
        return WrittenAnswer(problem.answer[: max(3, int(len(problem.answer) * rng.uniform(0.2, 0.7)))], clear=0.7)
    if kind < 0.8:
        return WrittenAnswer(f"{problem.answer} {problem.answer}", length=1)
    if kind < 0.9:
        words = problem.answer.split(" ")
        rng.shuffle(words)
        return WrittenAnswer(" ".join(words), clear=0.2)
    return WrittenAnswer(pick(rng, ["I do not know.", "Yes.", "No.", problem.question]), clear=0.9)


def wrong_answer(rng: random.Random, problem: Problem) -> str:
    """A clear answer that is wrong: another value, a slip in the working, another function, a list that breaks a demand."""
    value = str(problem.truth.get("value", ""))
    if problem.others:
        return problem.answer.replace(value, pick(rng, problem.others))
    if problem.truth["kind"] == "number":
        numbers = [m for m in re.finditer(r"= (\d+)", problem.answer)]
        slip = pick(rng, numbers)
        wrong = str(max(0, int(slip[1]) + pick(rng, [-20, -10, -2, -1, 1, 2, 10, 20])))
        text = problem.answer[: slip.start(1)] + wrong + problem.answer[slip.end(1) :]
        if slip is numbers[-1]:
            text = re.sub(r"\d+\.$", f"{wrong}.", text)
        return text
    if problem.truth["kind"] == "code":
        digits = [m for m in re.finditer(r"\d", problem.answer)]
        if digits and rng.random() < 0.5:
            spot = pick(rng, digits)
            return problem.answer[: spot.start()] + str((int(spot[0]) + rng.randint(1, 8)) % 10) + problem.answer[spot.end() :]
        swaps = [("+", "-"), ("-", "+"), ("*", "+"), ("max", "min"), ("min", "max"), ("[::-1]", ""), ("sorted", "len"), ("%", "*")]
        fits = [s for s in swaps if s[0] in problem.answer] or [("x", "1")]
        old, new = pick(rng, fits)
        head, body = problem.answer.split("return ", 1)
        return f"{head}return {body.replace(old, new, 1)}"
    items = re.findall(r"\w+", problem.answer)
    kind = rng.random()
    if kind < 0.4 and len(items) > 1:
        return ", ".join(items[:-1])
    if kind < 0.7:
        return " ".join(items) if "," in problem.answer else ", ".join(items)
    return problem.answer.swapcase() if kind < 0.85 else f"{problem.answer}, {pick(rng, items)}"


def _quality(problem: Problem, written: WrittenAnswer) -> tuple[float, float, float, float, float]:
    """What a careful annotator would say: the five attributes on 0..4. Looks at the truth."""
    right = verify(problem.truth, written.text, run_code=None if problem.truth["kind"] != "code" else _same_code(problem))
    share = min(1.0, len(written.text) / max(1, len(problem.answer)))
    correctness = 4.0 if right else partly_right(problem.truth) if written.clear > 0.5 and share > 0.4 else 0.2
    helpfulness = correctness - 1.0 * written.length if right else 0.9 * correctness
    coherence = 4.0 * written.clear - 0.6 * written.length
    complexity = min(4.0, 0.6 + 0.8 * problem.level) if share > 0.4 else 0.4
    verbosity = min(4.0, len(written.text) / 24 + 1.5 * written.length)
    return helpfulness, correctness, coherence, complexity, verbosity


def partly_right(truth: dict[str, Any]) -> float:
    """Credit for a clear answer that is wrong: a slip in the working or a broken demand leaves more that is right than a wrong fact."""
    return {"mention": 1.2, "code": 1.6, "number": 2.0, "list": 2.0}[truth["kind"]]


def _same_code(problem: Problem) -> Any:
    """Annotators read code: only the reference solution (spaces apart) counts as right."""
    squeeze = lambda s: re.sub(r"\s+", "", s)  # noqa: E731
    return lambda program, _: squeeze(program) == squeeze(problem.answer)


def annotate(rng: random.Random, problem: Problem, written: WrittenAnswer) -> tuple[int, ...] | None:
    """Consensus of three annotators out of three to five, or None when they disagree too much."""
    center = _quality(problem, written)

    def one() -> tuple[int, ...]:
        careless = rng.random() < CARELESS
        return tuple(
            min(4, max(0, round(rng.uniform(0, 4) if careless else c + rng.gauss(0, spread))))
            for c, spread in zip(center, SPREADS, strict=True)
        )

    marks = [one() for _ in range(3)]
    if _range(marks) > 2:
        marks += [one(), one()]
    best = min(itertools.combinations(marks, 3), key=lambda three: (_range(three), sum(map(_spread, zip(*three, strict=True)))))
    if _range(best) > 2:
        return None
    return tuple(round(sum(m) / 3) for m in zip(*best, strict=True))


def _range(marks: Any) -> int:
    helpful = [m[0] for m in marks]
    return max(helpful) - min(helpful)


def _spread(values: tuple[int, ...]) -> float:
    return float(max(values) - min(values))


def ratings(world: World, num_prompts: int, seed: int) -> list[dict[str, Any]]:
    """Rated answers, two a prompt: rows with `task`, `messages` (ending with the answer), the five attributes and `pair`."""
    rng = random.Random(f"ratings-{seed}")
    rows: list[dict[str, Any]] = []
    for pair in itertools.count():
        if len(rows) >= 2 * num_prompts:
            return rows
        problem = world.draw(rng, RATED_TASKS[pair % len(RATED_TASKS)])
        good = (True, False) if rng.random() < 0.7 else (rng.random() < 0.5,) * 2
        answers = [write(rng, problem, g) for g in rng.sample(good, 2)]
        marks = [annotate(rng, problem, a) for a in answers]
        if answers[0].text == answers[1].text or None in marks:
            continue
        for answer, mark in zip(answers, marks, strict=True):
            assert mark is not None
            messages = (*problem.messages, Message("assistant", answer.text))
            rows.append({"task": problem.task, "pair": pair, "messages": to_dicts(messages), **dict(zip(ATTRIBUTES, mark, strict=True))})
    raise AssertionError


def collected(world: World, num: int, seed: int) -> list[Problem]:
    """`num` different prompts that people typed, without answers: what LMSYS-Chat-1M and ShareGPT were to the report."""
    rng = random.Random(f"collected-{seed}")
    out: dict[Conversation, Problem] = {}
    while len(out) < num:
        problem = world.draw(rng, TASKS[len(out) % len(TASKS)])
        out[problem.messages] = problem
    return list(out.values())


def drawn(world: World, num: int, seed: int) -> Iterator[Problem]:
    """`num` draws, as many of each task, of which many may be alike."""
    rng = random.Random(f"drawn-{seed}")
    return (world.draw(rng, TASKS[i % len(TASKS)]) for i in range(num))


def evaluation(world: World, num_per_task: int) -> list[dict[str, Any]]:
    """Held-out prompts with their truths: rows with `task`, `messages` and `truth`."""
    return [
        {"task": task, "messages": to_dicts(problem.messages), "truth": problem.truth}
        for task in TASKS
        for problem in world.held_out[task][:num_per_task]
    ]
