"""LLM-as-judge, pairwise: asked in both orders and believed only when consistent (report, section 3.2.3)."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from gristmill.core.response_text import answer_text, strip_thinking
from gristmill.data.chat import Conversation, Message
from gristmill.generation.api import Generator, Request, SamplingParams

Verdict = Literal["first", "second", "tie", "unparsed"]

TEMPLATE = """Compare two answers to the same request and say which one is better.
Request:
{request}
Answer A:
{a}
Answer B:
{b}
Which answer is better? Reply with A or B."""
EXPLAINED_TEMPLATE = """Compare two answers to the same request. Say first, in a few sentences, how well each does what was asked:
whether it is right, helps, keeps to the point, and has the detail that is wanted. Neither the order of the answers nor their length may
count.
Request:
{request}
Answer A:
{a}
Answer B:
{b}
End with your verdict in exactly one of these forms: [[A]] if answer A is better, [[B]] if answer B is better, [[C]] for a tie."""
SHORT_TOKENS, EXPLAINED_TOKENS = 8, 2048  # of a reply
# "A", "[[B]]", "**A**", "Verdict: A." or "Answer B is better": a reply such as "A good answer" names nobody
VERDICT = re.compile(
    r"\W*(?:(?:(?:final\s+)?(?:verdict|answer|choice)\W*(?:is|:)|winner\W*(?:is|:)|the better (?:one|answer) is)\W*)?"
    r"(?:answer\s+[\W_]*([AB])\b|\(?([AB])[\])*_.:\"\'`]*\s*(?:\n|$))",
    re.IGNORECASE,
)
MARKED_VERDICT = re.compile(r"\[\[([ABC])\]\]")  # the form of judges that explain themselves first: the last one counts; C is a tie


@dataclass(frozen=True)
class Comparison:
    """Two answers to one prompt that the judge compares."""

    id: str
    messages: Conversation
    first: str
    second: str


def compare(generator: Generator, comparisons: Iterable[Comparison], template: str = TEMPLATE) -> Iterator[tuple[Comparison, Verdict]]:
    """Judge each comparison in both orders.

    Yields:
        the comparison with "first" or "second" when both orders agree, "tie" when they contradict each other or call it one,
        "unparsed" when a reply names neither answer.
    """
    kept = list(comparisons)
    by_id = {c.id: c for c in kept}
    replies: dict[str, list[str]] = {}
    for request, completions in generator.generate(comparison_requests(kept, template)):
        name, order = request.id.rsplit("#", 1)
        replies.setdefault(name, ["", ""])[int(order)] = completions[0].text
    for name, (straight, swapped) in replies.items():
        yield by_id[name], combine_verdicts(straight, swapped)


def combine_verdicts(straight: str, swapped: str) -> Verdict:
    """Combine both verdicts: the replies to (A = first, B = second) and to (A = second, B = first)."""
    one, two = named_answer(straight), named_answer(swapped)
    if not one or not two:
        return "unparsed"
    if one == two or "C" in (one, two):
        return "tie"
    return "first" if one == "A" else "second"


def named_answer(reply: str) -> str:
    """The answer that a reply names, A or B, C for a tie, "" for none."""
    if marked := marked_answer(reply):
        return marked
    m = VERDICT.match(answer_text(reply))
    return (m[1] or m[2]).upper() if m else ""


def marked_answer(reply: str) -> str:
    """The answer that a reply names in double brackets, the last one; "" for none."""
    marked = MARKED_VERDICT.findall(answer_text(reply))
    return str(marked[-1]) if marked else ""


def judge_prompt(task: str, parts: Sequence[str]) -> Conversation:
    """What a judge is asked: its task and what it judges, in one turn, since some models have no system turn."""
    return (Message("user", "\n\n".join([task, *parts])),)


def comparison_requests(comparisons: Sequence[Comparison], template: str = TEMPLATE, max_tokens: int = SHORT_TOKENS) -> Iterator[Request]:
    """Judge requests of each comparison in both orders, with ids that end in #0 and #1."""
    for c in comparisons:
        request = "\n".join(f"{m.role}: {m.content}" if len(c.messages) > 1 else m.content for m in c.messages)
        first, second = strip_thinking(c.first), strip_thinking(c.second)
        for order, (a, b) in enumerate([(first, second), (second, first)]):
            text = template.format(request=request, a=a, b=b)
            yield Request(f"{c.id}#{order}", (Message("user", text),), SamplingParams(temperature=0.0, max_tokens=max_tokens))
