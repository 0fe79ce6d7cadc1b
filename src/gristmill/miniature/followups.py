"""Follow-ups task: two-turn problems whose second question leans on the first."""

import random
import re
from typing import Any

from gristmill.data.chat import Conversation, Message
from gristmill.miniature import lists, sums
from gristmill.miniature.facts import ANSWER, ATTRIBUTES, Lands, trace
from gristmill.miniature.problem import Problem, pick

TASK = "followups"
NEXT_FACT = {
    "capital": ["And its capital?", "What about the capital?"],
    "river": ["And its river?", "What about the river?"],
    "animal": ["And its animal?", "What about the animal?"],
    "crop": ["And its crop?", "What about the crop?"],
    "flag": ["And its flag?", "What about the flag?"],
    "king": ["And its king?", "What about the king?"],
}
NEXT_SUM = {"+": ["And if {n} more come?", "Now add {n}."], "-": ["And if {n} are lost?", "Now take away {n}."]}
NEXT_LIST = ["Now {how}.", "Write the same {how}."]


def sample(rng: random.Random, lands: Lands) -> Problem:
    """A random two-turn question; the first answer is right."""
    kind = rng.random()
    if kind < 0.4:
        first = lands.sample(rng)
        land = first.topic
        asked = lands.parse_question(first.question)
        attribute = pick(rng, [a for a in ATTRIBUTES if asked is None or a != asked[1]])
        question = pick(rng, NEXT_FACT[attribute])
        fact = lands.facts[land][attribute]
        others = tuple(v for v in lands.values(attribute) if v != fact)
        answer = ANSWER[attribute].format(land=land, value=fact)
        truth: dict[str, Any] = {"kind": "mention", "value": fact, "not": list(others)}
        return _two(first, question, answer, truth, others=others, trace=trace(land, attribute, fact))
    if kind < 0.7:
        first = sums.sample(rng, level=pick(rng, (1, 2)))
        before = int(first.truth["value"])
        op = "-" if before > 5 and rng.random() < 0.5 else "+"
        n = rng.randint(2, min(99, before) if op == "-" else 99)
        worked, value = sums.work(before, [(op, n)])
        question = pick(rng, NEXT_SUM[op]).format(n=n)
        truth = {"kind": "number", "value": value}
        return _two(first, question, f"{worked} The answer is {value}.", truth, trace=worked)
    what, n, shape, _ = lists.plan(rng)
    items = rng.sample(lists.WORDS[what], n)
    asked_how = lists.how(shape, [])
    first = Problem(
        lists.TASK,
        (Message("user", pick(rng, lists.OPENINGS).format(n=lists.NUMBERS[n], what=what, how=asked_how)),),
        lists.render(items, shape, []),
        {},
        what,
    )
    shape2 = pick(rng, [s for s in lists.SHAPES if s != shape])
    extras = rng.sample(list(lists.EXTRAS), pick(rng, (0, 1)))
    truth = {**lists.truth(what, n, shape2, extras=extras), "words": items}
    question, answer = pick(rng, NEXT_LIST).format(how=lists.how(shape2, extras)), lists.render(items, shape2, extras)
    return _two(first, question, answer, truth, trace=lists.trace(items, what, extras))


def _two(first: Problem, question: str, answer: str, truth: dict[str, Any], **more: Any) -> Problem:
    messages = (*first.messages, Message("assistant", first.answer), Message("user", question))
    return Problem(TASK, messages, answer, truth, first.topic, level=2, **more)


def document(rng: random.Random, lands: Lands) -> str:
    """A talk with two questions and their replies."""
    p = sample(rng, lands)
    return f"Talk.\nAsked: {p.messages[0].content}\nSaid: {p.messages[1].content}\nAsked: {p.messages[2].content}\nSaid: {p.answer}"


def parse_question(messages: Conversation) -> dict[str, Any] | None:
    """The truth of a second turn that a program can check (sums and lists), given the answer before it; None otherwise."""
    if len(messages) != 3:
        return None
    before, question = messages[1].content, messages[2].content.strip()
    for op, wordings in NEXT_SUM.items():
        for wording in wordings:
            step = re.fullmatch(re.escape(wording).replace(r"\{n\}", r"(\d{1,3})"), question)
            last = re.search(r"The answer is (\d{1,6})\.$", before)
            if step and last and sums.parse_question(messages[0].content) is not None:
                return {"kind": "number", "value": sums.apply(op, int(last[1]), int(step[1])), "working": True}
    first = lists.parse_question(messages[0].content)
    for wording in NEXT_LIST if first else ():
        match = re.fullmatch(re.escape(wording).replace(r"\{how\}", "(.+)"), question)
        request = match and first and lists.parse_question(f"List two fruits {match[1]}.")
        if request and first:
            items = [w for w in first["words"] if re.search(rf"\b{w}\b", before.lower())]
            if len(items) == first["n"]:
                return {**request, "n": first["n"], "words": items}
    return None
