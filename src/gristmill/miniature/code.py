"""Code task: one-line Python functions described in words; answers are really executed."""

import random
from dataclasses import dataclass

from gristmill.miniature.problem import Problem, pick, single_turn

TASK = "code"
LEVELS = (1, 2, 3)


@dataclass(frozen=True)
class Operation:
    """One step: words with a slot {k}, an expression over {e} and {k}, and the types it maps between."""

    words: str
    expression: str
    takes: str
    gives: str


# Types: n number, l list of numbers, s text.
OPERATIONS = [
    Operation("adds {k}", "({e} + {k})", "n", "n"),
    Operation("subtracts {k}", "({e} - {k})", "n", "n"),
    Operation("multiplies by {k}", "({e} * {k})", "n", "n"),
    Operation("squares", "({e} ** 2)", "n", "n"),
    Operation("negates", "(-{e})", "n", "n"),
    Operation("takes the remainder by {k}", "({e} % {k})", "n", "n"),
    Operation("turns into text", "str({e})", "n", "s"),
    Operation("sums", "sum({e})", "l", "n"),
    Operation("takes the largest", "max({e})", "l", "n"),
    Operation("takes the smallest", "min({e})", "l", "n"),
    Operation("counts", "len({e})", "l", "n"),
    Operation("sorts", "sorted({e})", "l", "l"),
    Operation("reverses", "{e}[::-1]", "l", "l"),
    Operation("drops the first", "{e}[1:]", "l", "l"),
    Operation("doubles the list", "({e} * 2)", "l", "l"),
    Operation("adds {k} to each", "[y + {k} for y in {e}]", "l", "l"),
    Operation("keeps those over {k}", "[y for y in {e} if y > {k}]", "l", "l"),
    Operation("makes upper case", "{e}.upper()", "s", "s"),
    Operation("reverses", "{e}[::-1]", "s", "s"),
    Operation("repeats {k} times", "({e} * {k})", "s", "s"),
    Operation("appends a star", "({e} + '*')", "s", "s"),
    Operation("takes the first letter", "{e}[:1]", "s", "s"),
    Operation("counts the letters", "len({e})", "s", "n"),
]
KINDS = {"n": ("a number", "numbers"), "l": ("a list", "lists"), "s": ("a text", "texts")}
INPUTS = {
    "n": ["0", "1", "7", "-4", "12", "25"],
    "l": ["[3, 1, 2]", "[5]", "[9, -2, 4, 4]", "[10, 20, 1, 7, 8]"],
    "s": ["'moon'", "'a'", "'Red fox'", "'zebra9'"],
}
OPENINGS = [
    "Write a function f that takes {what} x, {steps} and returns it.",
    "Write f(x): it takes {what}, {steps} and returns the result.",
]


def plan(rng: random.Random, level: int) -> tuple[str, list[tuple[Operation, int]]]:
    """An input type and `level` operations that fit together."""
    start = kind = pick(rng, list(KINDS))
    steps = []
    for _ in range(level):
        op = pick(rng, [o for o in OPERATIONS if o.takes == kind])
        steps.append((op, rng.randint(2, 9)))
        kind = op.gives
    return start, steps


def words(steps: list[tuple[Operation, int]]) -> str:
    """`adds 3, then squares`."""
    return ", then ".join(op.words.format(k=k) for op, k in steps)


def source(steps: list[tuple[Operation, int]]) -> str:
    """`def f(x): return ...`."""
    expression = "x"
    for op, k in steps:
        expression = op.expression.format(e=expression, k=k)
    if expression.startswith("(") and _closes_at_end(expression):
        expression = expression[1:-1]
    return f"def f(x): return {expression}"


def trace(steps: list[tuple[Operation, int]]) -> str:
    """The expression after each step: `x + 3; (x + 3) ** 2`."""
    return "; ".join(source(steps[: i + 1]).removeprefix("def f(x): return ") for i in range(len(steps)))


def _closes_at_end(expression: str) -> bool:
    depth = 0
    for i, c in enumerate(expression):
        depth += (c == "(") - (c == ")")
        if depth == 0:
            return i == len(expression) - 1
    return False


def tests(start: str, steps: list[tuple[Operation, int]]) -> str:
    """Asserts over fixed inputs. A step that fails on an input (the largest of nothing) leaves that input out."""
    namespace: dict[str, object] = {}
    exec(source(steps), namespace)  # our own source built from OPERATIONS, never model text
    lines = []
    for value in INPUTS[start]:
        try:
            expected = eval(f"f({value})", namespace)
        except ValueError:
            continue
        lines.append(f"assert f({value}) == {expected!r}")
    return "\n".join(lines)


def sample(rng: random.Random, level: int | None = None) -> Problem:
    """A random coding task."""
    level = level or pick(rng, LEVELS)
    start, steps = plan(rng, level)
    question = pick(rng, OPENINGS).format(what=KINDS[start][0], steps=words(steps))
    truth = {"kind": "code", "tests": tests(start, steps)}
    return single_turn(TASK, question, source(steps), truth=truth, topic=KINDS[start][1], level=level, trace=trace(steps))


def document(rng: random.Random) -> str:
    """Commented functions, as in a source file, or a task from a book with its program."""
    parts = []
    for _ in range(rng.randint(1, 3)):
        start, steps = plan(rng, pick(rng, LEVELS))
        if rng.random() < 0.7:
            parts.append(f"# {KINDS[start][0]}: {words(steps)}\n{source(steps)}")
        else:
            task = pick(rng, OPENINGS).format(what=KINDS[start][0], steps=words(steps))
            parts.append(f"Exercise. {task}\nProgram. {source(steps)}")
    return "\n".join(parts)


def parse_question(text: str) -> dict[str, str] | None:
    """The truth of a coding task written in the wordings of this world, or None."""
    for opening in OPENINGS:
        for kind, (what, _) in KINDS.items():
            head, tail = opening.format(what=what, steps="\0").split("\0")
            if text.startswith(head) and text.endswith(tail) and len(text) > len(head) + len(tail):
                steps = _parse(text[len(head) : len(text) - len(tail)], kind)
                return {"kind": "code", "tests": tests(kind, steps)} if steps else None
    return None


def _parse(text: str, kind: str) -> list[tuple[Operation, int]] | None:
    steps = []
    for part in text.split(", then "):
        for op in OPERATIONS:
            head, _, tail = op.words.partition("{k}")
            if op.takes != kind or not part.startswith(head) or not part.endswith(tail):
                continue
            middle = part[len(head) : len(part) - len(tail)] if "{k}" in op.words else ""
            if middle in set("123456789") if middle else part == op.words:  # one digit: model text sets no bigger program
                steps.append((op, int(middle or 0)))
                kind = op.gives
                break
        else:
            return None
    return steps if len(steps) <= max(LEVELS) else None
