"""Selection of training rows: which answers are kept, and which pairs are made. Rows are made by hand."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gristmill.core.errors import InputError
from gristmill.data.chat import Message
from gristmill.data.rows import Pair, Prompt, Rating, Response
from gristmill.judge import select as module
from gristmill.judge.pairwise import Verdict
from gristmill.judge.select import contested, select, unique_answers, verdict_id
from gristmill.judge.settings import Judging, Repair

AGREED: dict[str, Any] = {"min_gap": 1.5, "keep_chosen": "correctness >= 2", "max_pairs_per_prompt": 9, "near_duplicates": 1.0}


def judging(**values: Any) -> Judging:
    return Judging(**{"keep": "correctness >= 2.5", **AGREED, **values})


def pair(settings: Judging, rows: Sequence[Response], seed: int = 0, **more: Any) -> tuple[list[Pair], dict[str, Any]]:
    return asyncio.run(module.pair(rows, settings, seed, **more))


def prompt(name: str, task: str = "sums", truth: dict[str, Any] | None = None, **more: Any) -> Prompt:
    return Prompt(name, task, (Message("user", f"Ask {name}"),), "model", truth=truth, **more)


def answer(prompt: str, number: int, **more: Any) -> Response:
    values: dict[str, Any] = {"finished": True, "score": float(number), "judge": "reward", "good": True, "task": "sums"} | more
    if "rating" not in values:
        values["rating"] = Rating(0.0, values["score"], 0.0, 0.0, 0.0)
    messages = (Message("user", f"Ask {prompt}"),)
    return Response(
        f"{prompt}-{number}", prompt, messages=messages, text=f"text {number}", generator="m", temperature=1.0, sample=number,
        num_tokens=2, logprob=-1.0, **values,
    )  # fmt: skip


def verified(prompt: str, number: int, right: bool, **more: Any) -> Response:
    return answer(prompt, number, judge="verifier", verified=right, good=right, **more)


# ---- select ----


def test_the_best_good_finished_answers_of_a_prompt_are_kept() -> None:
    rows = [verified("a", i, True) for i in range(4)] + [verified("a", 8, False), verified("a", 9, True, finished=False)]
    kept, funnel = select(rows, judging(max_per_prompt=2), 0)
    assert sorted(d.parents for d in kept) == [("a-2", "a"), ("a-3", "a")]
    assert funnel["sums"]["prompts"] == 1 and funnel["sums"]["answers"] == 6 and funnel["sums"]["kept"] == 2
    assert funnel["sums"]["score_before"] == pytest.approx(23 / 6, abs=1e-3) and funnel["sums"]["score_after"] == 2.5
    assert [m.content for m in kept[0].messages][0] == "Ask a" and kept[0].messages[-1].role == "assistant"


@given(st.integers(0, 12), st.integers(0, 12), st.integers(1, 3), st.integers(0, 5))
def test_quotas_hold_by_task(num_sums: int, num_lists: int, per_prompt: int, seed: int) -> None:
    rows = [verified(f"s{i}", k, True) for i in range(num_sums) for k in range(3)]
    rows += [verified(f"l{i}", k, True, task="lists") for i in range(num_lists) for k in range(3)]
    kept, funnel = select(rows, judging(max_per_prompt=per_prompt, max_per_task=7), seed, quotas={"lists": 4})
    count = {t: sum(d.task == t for d in kept) for t in ("sums", "lists")}
    assert count == {"sums": min(7, num_sums * per_prompt), "lists": min(4, num_lists * per_prompt)}
    assert all(funnel[t]["kept"] == n for t, n in count.items() if t in funnel)
    assert len({d.id for d in kept}) == len(kept)


def test_where_only_the_reward_model_judges_one_answer_is_kept_that_samples_agree_on() -> None:
    rows = [answer("a", 9), answer("a", 3, votes=3), answer("a", 5, votes=2), answer("b", 9), answer("c", 4, votes=3, good=False)]
    kept, _ = select(rows, judging(max_per_prompt=2, min_votes=2), 0)
    assert [d.parents[0] for d in kept] == ["a-3"], "none of b's answers was given twice, and c's is not good"
    kept, _ = select(rows, judging(max_per_prompt=2, min_votes=1), 0)
    assert {d.parents[0] for d in kept} == {"a-3", "b-9"}


def test_a_task_with_a_quota_of_none_keeps_nothing() -> None:
    kept, funnel = select([answer("a", 1)], judging(), 0, quotas={"sums": 0})
    assert kept == [] and funnel["sums"]["good"] == 1


def test_unfiltered_takes_answers_as_they_come() -> None:
    rows = [answer(f"p{i}", k, good=False) for i in range(50) for k in range(4)] + [answer("q", 0, finished=False)]
    kept, _ = select(rows, judging(max_per_prompt=2), 0, control="unfiltered")
    assert len(kept) == 100 and not any(d.parents[1] == "q" for d in kept)
    assert len({d.parents[0][-1] for d in kept}) == 4, "not only the best"


def test_random_filter_keeps_as_many_as_the_judge() -> None:
    rows = [verified(f"p{i}", k, k < i % 3) for i in range(60) for k in range(5)]
    real, _ = select(rows, judging(max_per_prompt=2), 0)
    blind, _ = select(rows, judging(max_per_prompt=2), 0, control="random-filter")
    good = {r.id for r in rows if r.good}
    assert sorted(d.parents[1] for d in blind) == sorted(d.parents[1] for d in real), "as many of each prompt"
    assert {d.parents[0] for d in real} <= good and not {d.parents[0] for d in blind} <= good


def test_selection_depends_on_nothing_but_its_arguments() -> None:
    rows = [answer(f"p{i}", k) for i in range(20) for k in range(4)]
    assert select(rows, judging(max_per_task=5), 3) == select(rows, judging(max_per_task=5), 3)
    assert select(rows, judging(max_per_task=5), 3) != select(rows, judging(max_per_task=5), 4)


# ---- pairs ----


def test_contested_prompts_are_those_that_may_make_a_pair() -> None:
    rows = [
        *(verified("right", n, True) for n in range(3)),
        *(verified("mixed", n, n == 1) for n in range(3)),
        *(verified("wrong", n, False) for n in range(2)),
        answer("told once", 1),
        *(answer("told twice", n) for n in range(2)),
    ]
    prompts = [prompt(name) for name in ("unanswered", "right", "wrong", "mixed", "told once", "told twice")]
    assert [p.id for p in contested(prompts, rows, 0)] == ["mixed", "told twice"]
    assert [p.id for p in contested(prompts, rows, 4)] == ["mixed", "told twice", "wrong", "unanswered"]
    assert contested(prompts, [], 9) == prompts


def test_a_verifier_pairs_right_with_wrong() -> None:
    rows = [verified("a", i, i % 2 == 0, score=9.0 - i) for i in range(5)]
    pairs, facts = pair(judging(verified_gap=2.0), rows)
    assert len(pairs) == 2 and facts["judges"] == {"verifier": 2} and facts["tasks"] == {"sums": 2}
    by_id = {r.id: r for r in rows}
    for p in pairs:
        chosen, rejected = (by_id[i] for i in p.parents)
        assert chosen.good and not rejected.good and (p.chosen, p.rejected) == (chosen.text, rejected.text)
        assert p.chosen_reward - p.rejected_reward == pytest.approx(2.0) and p.rejected_reward == rejected.score
    assert len({i for p in pairs for i in p.parents}) == 4, "no answer is in two pairs"


def test_the_reward_model_pairs_the_best_with_the_worst() -> None:
    (made,), facts = pair(judging(), [answer("a", n) for n in (2, 5, 3)])
    assert made.parents == ("a-5", "a-2") and (made.chosen_reward, made.rejected_reward) == (5, 2) and facts["judges"] == {"reward": 1}


def test_agreement_of_samples_comes_before_the_reward() -> None:
    (made,), _ = pair(judging(), [answer("a", 2), answer("a", 5), answer("a", 4, votes=3)])
    assert made.parents == ("a-4", "a-2")


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ([answer("a", 1)], "one answer"),
        ([verified("a", 1, True), verified("a", 2, True)], "all right"),
        ([verified("a", 1, False), verified("a", 2, False)], "all wrong"),
        ([answer("a", 3, votes=2), answer("a", 4, votes=2)], "alike"),
        ([answer("a", 0, score=-4.0), answer("a", 1, score=1.0, votes=2)], "none good"),
        ([answer("a", 1), answer("a", 9, votes=2, finished=False)], "none good"),
        ([answer("a", 1, votes=1), answer("a", 9, votes=1)], "none good"),
        ([answer("a", 1, judge="none", score=None, rating=None), answer("a", 2, judge="none", score=None, rating=None)], "no judge"),
    ],
)
def test_why_there_is_no_pair(rows: list[Response], why: str) -> None:
    pairs, facts = pair(judging(min_votes=2), rows)
    assert pairs == [] and facts["funnel"] == {why: 1}


def test_random_filter_draws_both_answers_blindly() -> None:
    rows = [verified(f"p{i}", k, k % 2 == 0) for i in range(40) for k in range(4)]
    real, facts = pair(judging(max_pairs_per_prompt=2), rows)
    blind, blind_facts = pair(judging(max_pairs_per_prompt=2), rows, control="random-filter")
    assert facts == blind_facts and len(real) == len(blind)
    by_id = {r.id: r for r in rows}
    backwards = sum(not by_id[p.parents[0]].good and bool(by_id[p.parents[1]].good) for p in blind)
    assert 0 < backwards < len(blind) and all(p.chosen != p.rejected for p in blind)
    assert all({by_id[i].prompt for i in p.parents} == {p.prompt} for p in blind)


# ---- what both workflows need ----


def test_equal_answers_to_a_prompt_are_one_with_votes() -> None:
    texts = {("a", 0): "x", ("a", 1): "y", ("a", 2): "x", ("b", 0): "x"}
    rows = [Response(f"{p}{n}", p, "t", (), text, "m", 1.0, n, 1, None, True) for (p, n), text in texts.items()]
    assert [(r.id, r.votes) for r in unique_answers(rows)] == [("a1", 1), ("a0", 2), ("b0", 1)]


def test_quotas_a_topic_hold_over_tasks() -> None:
    rows = [verified(f"p{i}", 0, True, task="sums" if i % 2 else "lists") for i in range(20)]
    kept, funnel = select(rows, judging(max_per_topic=3), 0, topics={f"p{i}": f"topic {i // 10}" for i in range(20)})
    assert len(kept) == 6 == sum(f["kept"] for f in funnel.values())


def test_several_judged_answers_of_a_prompt_are_kept_where_asked_for() -> None:
    rows = [answer("a", n) for n in range(3, 7)]
    assert len(select(rows, judging(max_per_prompt=3), 0)[0]) == 1
    assert len(select(rows, judging(max_per_prompt=3, max_judged_per_prompt=2), 0)[0]) == 2


def test_nearly_equal_answers_make_no_pair() -> None:
    text = "The harbour sells fish on Mondays and bread on Tuesdays and nothing at all on Sundays"
    rows = [verified("a", 0, True), verified("a", 1, False)]
    object.__setattr__(rows[0], "text", text)
    object.__setattr__(rows[1], "text", text + "!")
    assert pair(judging(near_duplicates=0.9), rows)[1]["funnel"] == {"one answer": 1}
    assert len(pair(judging(near_duplicates=1.0), rows)[0]) == 1


def test_of_too_many_pairs_as_many_easy_as_hard_ones_are_kept() -> None:
    rows = [r for i in range(30) for r in (answer(f"p{i}", 3), answer(f"p{i}", 8, score=5.0 + i))]
    pairs, facts = pair(judging(max_pairs_per_task=3), rows)
    assert facts["funnel"] == {"pairs": 3, "over a quota": 27}
    assert [round(p.chosen_reward - p.rejected_reward) for p in pairs] == [7, 17, 27]


def test_an_answer_whose_rating_failed_has_no_place_among_rated_ones() -> None:
    rows = [answer("a", 5), answer("a", 6, score=None, rating=None, judge="none"), answer("a", 2)]
    (made,), _ = pair(judging(), rows)
    assert made.parents == ("a-5", "a-2")


@pytest.mark.parametrize(("verdict", "judge"), [("first", "llm"), ("second", "llm"), ("tie", "reward"), (None, "reward")])
def test_what_a_language_model_leaves_open_the_reward_model_decides(verdict: Verdict | None, judge: str) -> None:
    rows = [answer("a", 1), answer("a", 5)]

    async def compare(pairs: Sequence[tuple[Response, Response]]) -> dict[str, Verdict]:
        return {verdict_id(a, b): verdict for a, b in pairs} if verdict else {}

    (made,), _ = pair(judging(), rows, compare=compare)
    assert made.judge == judge and made.parents == (("a-1", "a-5") if verdict == "second" else ("a-5", "a-1"))
    assert made.chosen_reward - made.rejected_reward == (4.0 if judge == "reward" else 2.0)


def test_without_ratings_a_judge_that_contradicts_itself_makes_no_pair() -> None:
    rows = [answer("a", n, judge="none", score=None, rating=None) for n in (1, 2)]

    async def compare(pairs: Sequence[tuple[Response, Response]]) -> dict[str, Verdict]:
        return {verdict_id(*pairs[0]): "tie"}

    assert pair(judging(), rows, compare=compare)[1]["funnel"] == {"the judge contradicts itself": 1}


def test_a_stage_may_ask_for_better_chosen_answers() -> None:
    rows = [answer("a", 1), answer("a", 4)]
    assert len(pair(judging(), rows)[0]) == 1
    assert pair(judging(), rows, keep_chosen="correctness >= 4.5")[1]["funnel"] == {"none good": 1}
    with pytest.raises(InputError, match="correctness"):
        pair(judging(), rows, keep_chosen="correctnes > 1")


# ---- loops, lengths, cut answers ----


def test_lengths_of_a_pair_may_be_kept_near() -> None:
    rows = [
        verified(
            "a",
            0,
            True,
        ),
        verified("a", 1, False),
        verified("a", 2, False),
    ]
    rows = [replace(r, text=text) for r, text in zip(rows, ["x" * 100, "y" * 300, "z" * 70], strict=True)]
    (made,), _ = pair(judging(max_length_difference=0.4), rows)
    assert made.rejected == "z" * 70
    assert pair(judging(max_length_difference=0.2), rows)[1]["funnel"] == {"lengths too far apart": 1}
    judged = [replace(answer("b", n), text="x" * size) for n, size in ((1, 100), (5, 300))]
    assert pair(judging(max_length_difference=0.5), judged)[1]["funnel"] == {"lengths too far apart": 1}
    assert len(pair(judging(), judged)[0]) == 1


def test_an_answer_that_loops_is_paired_at_any_length() -> None:
    rows = [verified("p", 0, True), replace(verified("p", 1, False), text="it goes on and on " * 40, finished=False)]
    near = judging(max_length_difference=0.2, max_repetition=0.3)
    (made,), _ = pair(near, rows)
    assert made.rejected.startswith("it goes on and on") and not made.rejected_finished
    assert pair(judging(max_length_difference=0.2), rows)[1]["funnel"] == {"lengths too far apart": 1}  # where nobody calls it a loop


def test_a_pair_remembers_which_answer_was_cut_off() -> None:
    (made,), _ = pair(judging(), [verified("a", 0, True), verified("a", 1, False, finished=False)])
    assert made.chosen_finished and not made.rejected_finished

    async def compare(pairs: Sequence[tuple[Response, Response]]) -> dict[str, Verdict]:
        return {verdict_id(a, b): "first" for a, b in pairs}

    cut = [answer("a", 5, finished=False), answer("a", 1)]
    assert pair(judging(), cut, compare=compare)[1]["funnel"] == {"none good": 1}, "what was cut off is no example"
    loop = [replace(answer("a", 5), text="round and round " * 9), answer("a", 1)]
    assert len(pair(judging(), loop)[0]) == 1
    assert pair(judging(max_repetition=0.3), loop)[1]["funnel"] == {"none good": 1}


# ---- repaired answers ----


def repaired(prompt: str, number: int, parent: int, *edits: str, **more: Any) -> Response:
    row = verified(prompt, number, True, **more)
    return replace(row, edits=edits, repaired_from=(f"{prompt}-{parent}",))


def test_sampled_and_repaired_answers_have_quotas_of_their_own_by_instruction() -> None:
    rows = [verified(f"p{i}", 0, True) for i in range(6)] + [verified(f"p{i}", 1, False) for i in range(6)]
    rows += [repaired(f"p{i}", 2, 1, "title" if i < 4 else "comma") for i in range(6)]
    asked = {f"p{i}": ["comma", "title"] for i in range(6)}
    quotas = Repair(max_per_instruction=3, max_sampled_per_instruction=2)
    kept, funnel = select(rows, judging(repair=quotas), 0, instructions=asked)
    names = [d.parents[0] for d in kept]
    assert sum(name.endswith("-0") for name in names) == 2 and sum(name.endswith("-2") for name in names) == 5
    assert funnel["sums"]["repaired"] == 6 and funnel["sums"]["repaired_kept"] == {"comma": 2, "title": 3}
    assert (funnel["sums"]["answers"], funnel["sums"]["good"], funnel["sums"]["kept"]) == (12, 6, 7)
    kept, funnel = select(rows, judging(repair=quotas), 0, control="unfiltered", instructions=asked)
    assert not any(d.parents[0].endswith("-2") for d in kept), "a control that filters nothing repairs nothing"


def test_repaired_answers_make_pairs_only_where_that_is_asked_for() -> None:
    rows = [verified("a", 0, False), verified("a", 1, False), repaired("a", 2, 1, "title")]
    assert pair(judging(repair=Repair()), rows)[1]["funnel"] == {"all wrong": 1}
    (made,), facts = pair(judging(repair=Repair(pairs=True)), rows)
    assert made.parents == ("a-2", "a-1") and made.judge == "verifier" and facts["funnel"] == {"pairs": 1}
    assert contested([prompt("a")], rows, 0) == [] and contested([prompt("a")], rows, 1) == [prompt("a")]
