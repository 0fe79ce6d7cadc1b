"""Sums task: arithmetic word problems with worked steps."""

import random
import re
from collections.abc import Sequence

from gristmill.miniature.problem import Problem, pick, single_turn

TASK = "sums"
PEOPLE = ["Ana", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ivo", "Jill", "Kit", "Lou", "Max", "Nora", "Otto", "Pia"]
THINGS = ["apples", "coins", "books", "stones", "eggs", "nuts", "beads", "cards", "shells", "stamps", "pears", "candles"]
LEVELS = (1, 2, 3)
ALL_LEVELS = (1, 2, 3, 4, 5, 6)  # of the runs that think

# operation -> wordings; {n} is the operand. "more" adds, "less" subtracts, "times" multiplies.
WORDINGS = {
    "+": ["buys {n} more", "finds {n} more", "gets {n} more"],
    "-": ["gives away {n}", "loses {n}", "sells {n}"],
    "*": ["then has {n} times as many"],
}
ASKS = ["How many {thing} does {who} have now?", "How many {thing} are there now?"]


def apply(op: str, a: int, b: int) -> int:
    """`a op b` for op in + - *."""
    return a + b if op == "+" else a - b if op == "-" else a * b


def plan(rng: random.Random, level: int) -> tuple[int, list[tuple[str, int]]]:
    """A start and `level` operations whose running totals stay within 0..999."""
    start = value = rng.randint(3, 99)
    steps: list[tuple[str, int]] = []
    for _ in range(level):
        ops = ["+", "-", "+", "-", "*"] if value <= 120 else ["+", "-"]
        op = pick(rng, ops)
        n = rng.randint(2, 5) if op == "*" else rng.randint(2, min(99, value - 1) if op == "-" and value > 3 else 99)
        if op == "-" and n > value:
            op = "+"
        steps.append((op, n))
        value = apply(op, value, n)
    return start, steps


def work(start: int, steps: list[tuple[str, int]]) -> tuple[str, int]:
    """The worked steps as text, and the result."""
    value, lines = start, []
    for op, n in steps:
        result = apply(op, value, n)
        lines.append(f"{value} {op} {n} = {result}.")
        value = result
    return " ".join(lines), value


def story(rng: random.Random, who: str, thing: str, *, start: int, steps: list[tuple[str, int]]) -> str:
    """The sum in words, without the question."""
    parts = [pick(rng, WORDINGS[op]).format(n=n) for op, n in steps]
    text = f"{who} has {start} {thing}."
    for part in parts:
        text += f" {who} {part}."
    return text


def sample(rng: random.Random, level: int | None = None) -> Problem:
    """A random word sum."""
    level = level or pick(rng, LEVELS)
    who, thing = pick(rng, PEOPLE), pick(rng, THINGS)
    start, steps = plan(rng, level)
    worked, value = work(start, steps)
    question = f"{story(rng, who, thing, start=start, steps=steps)} {pick(rng, ASKS).format(thing=thing, who=who)}"
    truth = {"kind": "number", "value": value}
    return single_turn(TASK, question, f"{worked} The answer is {value}.", truth=truth, topic=thing, level=level, trace=worked)


def document(rng: random.Random, levels: Sequence[int] = LEVELS) -> str:
    """Equations, a told story with its working, or an exercise with its solution."""
    kind = rng.random()
    if kind < 0.45:
        return " ".join(work(*plan(rng, 1))[0] for _ in range(rng.randint(4, 7)))
    start, steps = plan(rng, pick(rng, levels))
    worked, value = work(start, steps)
    who, thing = pick(rng, PEOPLE), pick(rng, THINGS)
    told = story(rng, who, thing, start=start, steps=steps)
    if kind < 0.75:
        return f"{told} {worked} So {who} has {value} {thing}."
    return f"Exercise. {told} {pick(rng, ASKS).format(thing=thing, who=who)}\nSolution. {worked} Result {value}."


OPENING = re.compile(r"(\w+) has (\d{1,4}) (\w+)\.")


def parse_question(text: str) -> int | None:
    """The result of a word sum written in the wordings of this world, or None."""
    opening = OPENING.match(text)
    if not opening:
        return None
    who, thing, value = opening[1], opening[3], int(opening[2])
    questions = [a.format(thing=thing, who=who) for a in ASKS]
    rest, num_steps = text[opening.end() :].strip(), 0
    while rest not in questions:
        for op, wordings in WORDINGS.items():
            pattern = "|".join(re.escape(w).replace(r"\{n\}", r"(\d{1,4})") for w in wordings)
            step = re.match(rf"{re.escape(who)} (?:{pattern})\. ?", rest)
            if step:
                value = apply(op, value, int(next(g for g in step.groups() if g)))
                rest, num_steps = rest[step.end() :], num_steps + 1
                break
        else:
            return None
    return value if num_steps else None
