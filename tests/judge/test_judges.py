"""Judges in the recipe's order: verifier, reward model, LLM judge; programs in batches, equal ones once."""

import asyncio
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from gristmill.data.chat import Message
from gristmill.data.rows import Demonstration, Prompt, Rating, Response
from gristmill.judge import programs
from gristmill.judge.judges import Judges, LocalRater
from gristmill.judge.programs import Verifier
from gristmill.judge.settings import Judging, Repair

WEIGHTS = (0.0, 1.0, 0.0, 0.0, 0.0)


class Scorer:
    """Correctness is what the text says: `good 3.5` is 3.5."""

    def __init__(self) -> None:
        self.scored: list[str] = []

    def fits(self, talk: Sequence[Message]) -> bool:
        return len(talk[-1].content) < 100

    def score(self, talks: Sequence[Sequence[Message]]) -> list[Rating]:
        self.scored += [talk[-1].content for talk in talks]
        return [Rating(0.0, float(talk[-1].content.split()[-1]), 0.0, 0.0, 0.0) for talk in talks]


def prompt(name: str, truth: dict[str, Any] | None = None) -> Prompt:
    return Prompt(name, "sums", (Message("user", f"Ask {name}"),), "model", truth=truth)


def answer(name: str, number: int, text: str, finished: bool = True) -> Response:
    return Response(f"{name}-{number}", name, "sums", (Message("user", f"Ask {name}"),), text, "m", 1.0, number, 2, -1.0, finished)


def judge(prompts: Sequence[Prompt], rows: Sequence[Response], scorer: Scorer | None, **more: Any) -> list[Response]:
    rater = LocalRater(scorer) if scorer else None
    judges = Judges(Judging(keep="correctness >= 2.5"), Verifier(), rater, weights=WEIGHTS, **more)
    return asyncio.run(judges.judge(prompts, rows))


def test_the_verifier_decides_where_there_is_a_truth_and_the_reward_model_elsewhere() -> None:
    prompts = [prompt("a", {"kind": "number", "value": 4}), prompt("b")]
    rows = [answer("a", 0, "4"), answer("a", 1, "5"), answer("b", 0, "1"), answer("b", 1, "3")]
    out = judge(prompts, rows, Scorer())
    assert [(r.judge, r.verified, r.good) for r in out] == [
        ("verifier", True, True),
        ("verifier", False, False),  # though the reward model likes it better
        ("reward", None, False),
        ("reward", None, True),
    ]
    assert [r.score for r in out] == [4, 5, 1, 3] and all(r.rating for r in out), "every answer is rated, whoever decides"


def test_an_unfinished_answer_is_never_good_and_need_not_be_rated() -> None:
    prompts, rows = [prompt("a", {"kind": "number", "value": 4})], [answer("a", 0, "4", finished=False)]
    (out,) = judge(prompts, rows, scorer := Scorer())
    assert out.verified is True and out.good is False and scorer.scored == ["4"]
    (out,) = judge(prompts, rows, scorer := Scorer(), finished_only=True)
    assert out.verified is None and out.good is False and scorer.scored == []


def test_without_a_reward_model_only_what_a_verifier_accepts_is_good() -> None:
    prompts = [prompt("a", {"kind": "number", "value": 4}), prompt("b")]
    out = judge(prompts, [answer("a", 0, "4"), answer("b", 1, "1")], None)
    assert [(r.judge, r.good, r.rating, r.score) for r in out] == [("verifier", True, None, None), ("none", False, None, None)]


def test_equal_answers_are_judged_once() -> None:
    out = judge([prompt("b")], [answer("b", n, "3") for n in range(4)], scorer := Scorer())
    assert [(r.votes, r.good) for r in out] == [(4, True)] and scorer.scored == ["3"]


def test_an_answer_that_is_too_long_for_the_reward_model_has_no_rating() -> None:
    out = judge([prompt("b")], [answer("b", 0, "word " * 50 + "3"), answer("b", 1, "3")], Scorer())
    assert [(r.judge, r.good) for r in out] == [("none", False), ("reward", True)]


def test_dialogues_of_which_every_turn_is_good_are_kept() -> None:
    def dialogue(name: str, *marks: str) -> Demonstration:
        turns = [Message(role, text) for mark in marks for role, text in (("user", "?"), ("assistant", mark))]
        return Demonstration(name, "dialogue", tuple(turns), "m")

    judges = Judges(Judging(), Verifier(), LocalRater(Scorer()), weights=WEIGHTS)
    rows = [dialogue("good", "3", "4"), dialogue("bad", "3", "1"), dialogue("long", "3", "word " * 50 + "3")]
    assert [d.id for d in asyncio.run(judges.good_dialogues(rows, 2.0))] == ["good"]


def test_programs_run_in_batches_and_equal_ones_once(monkeypatch: Any) -> None:
    batches: list[list[tuple[str, str]]] = []

    class Sandbox:
        def run_many(self, batch: list[tuple[str, str]]) -> list[Any]:
            batches.append(batch)
            return [SimpleNamespace(passed="good" in program) for program, _ in batch]

    monkeypatch.setattr(programs, "BATCH", 4)
    truth = {"kind": "code", "tests": "assert f() == 1"}
    format_conversation: list[tuple[int, int, str]] = []
    verifier = Verifier(Sandbox(), lambda *tick: format_conversation.append(tick))  # type: ignore[arg-type]
    cases: list[tuple[Mapping[str, Any], str]] = [(truth, f"def f(): return {'good' if n % 2 else n % 5}") for n in range(120)]
    assert verifier.verify(cases) == [n % 2 == 1 for n in range(120)]  # type: ignore[arg-type]
    assert [len(batch) for batch in batches] == [4, 2] and format_conversation[-1] == (6, 6, "programs run")
    assert verifier.verify(cases[:9]) and len(batches) == 2, "what programs did is remembered"


# ---- loops and repairs ----

LOWER = {"kind": "instructions", "checks": [{"id": "change_case:english_lowercase"}]}
SAID = "The mill stands at the river and grinds grain for all who come to it."


def test_an_answer_that_loops_is_not_good() -> None:
    rows = [answer("a", 0, "the mill turns " * 9), answer("a", 1, "the mill turns at the river")]
    for max_repetition, good in ((1.0, [True, True]), (0.3, [False, True])):
        judges = Judges(Judging(max_repetition=max_repetition), Verifier(), None)
        out = asyncio.run(judges.judge([prompt("a", LOWER)], rows))
        assert [r.good for r in out] == good and all(r.verified for r in out)


def test_failing_answers_are_repaired_verified_and_rated() -> None:
    async def both(scorer: Scorer | None, rows: Sequence[Response], **settings: Any) -> list[Response]:
        judging = Judging(repair=Repair(**settings))
        judges = Judges(judging, Verifier(), LocalRater(scorer) if scorer else None, weights=WEIGHTS)
        prompts = [prompt("a", LOWER), prompt("b", {"kind": "number", "value": 4}), prompt("c")]
        return await judges.repair(prompts, await judges.judge(prompts, rows))

    rows = [answer("a", 0, f"{SAID} 3"), answer("a", 1, f"{SAID} Well. 4", finished=False), answer("a", 2, "Short. 1")]
    rows += [answer("b", 0, f"{SAID} 5"), answer("c", 0, f"{SAID} 6"), answer("a", 3, "Round and round we go " * 20 + "7")]
    (done,) = asyncio.run(both(Scorer(), rows))
    assert done.text == f"{SAID.lower()} 3" and done.finished and done.good and done.verified and done.judge == "verifier"
    assert done.edits == ("change_case:english_lowercase",) and done.repaired_from == ("a-0",) and done.logprob is None
    assert done.rating is not None and done.score == 3 and done.id not in {r.id for r in rows}
    more = [answer("a", 4, f"And here is one that is longer by far. {SAID} 9"), *rows]
    assert [r.repaired_from[0] for r in asyncio.run(both(None, more))] == ["a-4"], "the longest first"
    assert len(asyncio.run(both(None, more, max_per_prompt=5, min_words=1))) == 3
    known = [answer("a", 5, f"{SAID.lower()} 3"), *rows]
    assert asyncio.run(both(None, known)) == [], "what a sample says already is no repair"
