import re
from collections.abc import Callable, Iterable, Iterator

import pytest

from gristmill.data.chat import Message
from gristmill.generation.api import Completion, Request
from gristmill.judge.pairwise import Comparison, combine_verdicts, compare


class Judge:
    """Answers with what `opinion(answer A, answer B)` says, the last request first."""

    name = "judge"

    def __init__(self, opinion: Callable[[str, str], str]):
        self.opinion = opinion
        self.asked: list[Request] = []

    def generate(self, requests: Iterable[Request]) -> Iterator[tuple[Request, list[Completion]]]:
        self.asked = list(requests)
        for request in reversed(self.asked):
            text = request.messages[0].content
            shown = re.search(r"Answer A:\n(.*)\nAnswer B:\n(.*)\nWhich", text, re.S)
            assert shown is not None
            yield request, [Completion(self.opinion(shown[1], shown[2]), 1, (0.0,), "stop")]


def comparisons(num: int) -> list[Comparison]:
    return [Comparison(f"c{i}", (Message("user", f"q{i}"),), f"good {i}", f"bad {i}") for i in range(num)]


def verdicts(judge: Judge, cases: list[Comparison]) -> dict[str, str]:
    return {c.id: v for c, v in compare(judge, cases)}


def test_a_judge_that_sees_the_better_answer_names_it_wherever_it_stands() -> None:
    better = Judge(lambda a, b: "A" if a.startswith("good") else "B")
    assert verdicts(better, comparisons(3)) == {"c0": "first", "c1": "first", "c2": "first"}
    worse = Judge(lambda a, b: "A" if a.startswith("bad") else "B")
    assert verdicts(worse, comparisons(2)) == {"c0": "second", "c1": "second"}


@pytest.mark.parametrize("letter", ["A", "B"])
def test_a_judge_that_prefers_a_place_decides_nothing(letter: str) -> None:
    assert verdicts(Judge(lambda a, b: letter), comparisons(2)) == {"c0": "tie", "c1": "tie"}


def test_a_judge_is_not_shown_what_was_thought() -> None:
    judge = Judge(lambda a, b: "A" if a == "good" else "B")
    thought = [Comparison("c", (Message("user", "q"),), "<think>bad, bad</think>good", "<think>good</think>bad")]
    assert verdicts(judge, thought) == {"c": "first"} and not any("<think>" in r.messages[0].content for r in judge.asked)


def test_one_unreadable_order_makes_the_pair_unparsed() -> None:
    judge = Judge(lambda a, b: "A" if a.startswith("good") else "both are fine")
    assert verdicts(judge, comparisons(1)) == {"c0": "unparsed"}


def test_both_orders_are_asked_greedily_with_the_same_request() -> None:
    judge = Judge(lambda a, b: "A")
    case = Comparison("x#1", (Message("user", "hi"), Message("assistant", "ho"), Message("user", "{a} {}")), "one", "two")
    assert verdicts(judge, [case]) == {"x#1": "tie"}, "an id with the separator in it, and braces in a text"
    assert [r.id for r in judge.asked] == ["x#1#0", "x#1#1"]
    assert {r.sampling.temperature for r in judge.asked} == {0.0}
    straight, swapped = (r.messages[0].content for r in judge.asked)
    assert "user: hi\nassistant: ho\nuser: {a} {}\n" in straight
    assert "Answer A:\none\nAnswer B:\ntwo\n" in straight and "Answer A:\ntwo\nAnswer B:\none\n" in swapped


REPLIES = [
    "A",
    "a",
    " A.",
    "[[A]]",
    "Answer A",
    "answer A is better",
    "A\nB",
    "**A**",
    "Verdict: A",
    "<think>B?</think>A",
    "Both try.\n[[A]]",
]


@pytest.mark.parametrize("reply", REPLIES)
def test_replies_that_name_an_answer(reply: str) -> None:
    assert combine_verdicts(reply, "B") == "first"
    assert combine_verdicts("B", reply) == "second"
    assert combine_verdicts(reply, "A") == "tie"


@pytest.mark.parametrize("reply", ["", "C", "Both", "I prefer A", "Apples", "neither A nor B"])
def test_replies_that_name_none(reply: str) -> None:
    assert combine_verdicts(reply, "B") == combine_verdicts("B", reply) == combine_verdicts(reply, reply) == "unparsed"


def test_nothing_to_compare() -> None:
    assert verdicts(Judge(lambda a, b: "A"), []) == {}
