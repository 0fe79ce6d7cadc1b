"""Lists task: lists under format instructions that a program can check."""

import random
import re
from typing import Any

from gristmill.miniature.problem import Problem, pick, single_turn

TASK = "lists"
WORDS = {
    "fruits": ["apple", "pear", "plum", "fig", "cherry", "peach", "lemon", "grape", "melon", "quince"],
    "tools": ["hammer", "saw", "drill", "file", "wrench", "chisel", "plane", "clamp", "ruler", "level"],
    "birds": ["robin", "crow", "heron", "finch", "owl", "swan", "eagle", "wren", "stork", "gull"],
    "metals": ["iron", "copper", "tin", "zinc", "lead", "gold", "silver", "nickel", "steel", "brass"],
    "trees": ["oak", "ash", "elm", "birch", "pine", "maple", "willow", "cedar", "beech", "larch"],
    "drinks": ["tea", "milk", "water", "cider", "cocoa", "juice", "coffee", "soda", "broth", "mead"],
}
NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five"}
SHAPES = {
    "commas": "separated by commas",
    "dashes": "one a line with a dash",
    "numbered": "as a numbered list",
    "slashes": "with slashes between",
    "brackets": "each in square brackets",
}
EXTRAS = {
    "upper": "in capital letters",
    "sorted": "in alphabetical order",
    "end": "and end with the word stop",
    "start": "and start with the word here",
}
OPENINGS = ["List {n} {what} {how}.", "Give me {n} {what} {how}.", "Name {n} {what} {how}."]


def render(items: list[str], shape: str, extras: list[str]) -> str:
    """The items in the asked form."""
    if "sorted" in extras:
        items = sorted(items)
    if shape == "commas":
        text = ", ".join(items)
    elif shape == "dashes":
        text = "\n".join(f"- {i}" for i in items)
    elif shape == "numbered":
        text = "\n".join(f"{i}. {item}" for i, item in enumerate(items, 1))
    elif shape == "slashes":
        text = " / ".join(items)
    else:
        text = " ".join(f"[{i}]" for i in items)
    if "upper" in extras:
        text = text.upper()
    if "start" in extras:
        text = f"here {text}"
    return f"{text} stop" if "end" in extras else text


def trace(items: list[str], what: str, extras: list[str]) -> str:
    """What is chosen, and its order where one is asked for: `three trees: oak, elm, ash. Sorted: ash, elm, oak.`"""
    chosen = f"{NUMBERS[len(items)]} {what}: {', '.join(items)}."
    return f"{chosen} Sorted: {', '.join(sorted(items))}." if "sorted" in extras else chosen


def how(shape: str, extras: list[str]) -> str:
    """The instruction in words."""
    return " ".join([SHAPES[shape], *(EXTRAS[e] for e in EXTRAS if e in extras)])


def plan(rng: random.Random) -> tuple[str, int, str, list[str]]:
    """Category, number of items, shape and extra demands."""
    level = pick(rng, (0, 1, 1, 2))
    return pick(rng, list(WORDS)), pick(rng, list(NUMBERS)), pick(rng, list(SHAPES)), rng.sample(list(EXTRAS), level)


def truth(what: str, n: int, shape: str, *, extras: list[str]) -> dict[str, Any]:
    """What `verify.verify` checks: every demand, and that the items are of the category."""
    return {"kind": "list", "n": n, "words": WORDS[what], "shape": shape, "extras": [e for e in EXTRAS if e in extras]}


def sample(rng: random.Random) -> Problem:
    """A random list request."""
    what, n, shape, extras = plan(rng)
    question = pick(rng, OPENINGS).format(n=NUMBERS[n], what=what, how=how(shape, extras))
    items = rng.sample(WORDS[what], n)
    demands = truth(what, n, shape, extras=extras)
    plan_text = trace(items, what, extras)
    return single_turn(TASK, question, render(items, shape, extras), truth=demands, topic=what, level=1 + len(extras), trace=plan_text)


def document(rng: random.Random) -> str:
    """Captioned lists, as in a catalogue, or requests with their fulfilment."""
    parts = []
    for _ in range(rng.randint(1, 3)):
        what, n, shape, extras = plan(rng)
        items = render(rng.sample(WORDS[what], n), shape, extras)
        if rng.random() < 0.7:
            parts.append(f"Here are {NUMBERS[n]} {what} {how(shape, extras)}:\n{items}")
        else:
            parts.append(f"Exercise. {pick(rng, OPENINGS).format(n=NUMBERS[n], what=what, how=how(shape, extras))}\nList. {items}")
    return "\n".join(parts)


def parse_question(text: str) -> dict[str, Any] | None:
    """The truth of a list request written in the wordings of this world, or None."""
    match = re.fullmatch(r"(?:List|Give me|Name) (\w+) (\w+) (.+)\.", text.strip())
    if not match or match[1] not in NUMBERS.values() or match[2] not in WORDS:
        return None
    n = next(k for k, v in NUMBERS.items() if v == match[1])
    for shape in SHAPES:
        for extras in _subsets():
            if match[3] == how(shape, extras):
                return truth(match[2], n, shape, extras=extras)
    return None


def _subsets() -> list[list[str]]:
    names = list(EXTRAS)
    return [[n for i, n in enumerate(names) if bits >> i & 1] for bits in range(2 ** len(names))]
