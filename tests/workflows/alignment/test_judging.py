"""From answers to training rows: who judges, what is kept, and which pairs are made. Rows are made by hand, judges are faked."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gristmill.core.config import check
from gristmill.data.chat import FORMATS, Message
from gristmill.data.rows import Demonstration, Prompt, Rated, Rating, Response, read_rows
from gristmill.generation.api import Completion
from gristmill.model.hf import load_model
from gristmill.train.settings import PreferenceTraining
from gristmill.verify.verify import verify
from gristmill.workflows.alignment.judging import contested, holds, judge, pair, respond, select, written
from gristmill.workflows.alignment.loop import _human_pairs, _repeat
from gristmill.workflows.alignment.recipe import AlignmentRecipe

DPO = PreferenceTraining(lr=1e-4, steps=1, min_chosen=2.0)


def mill_of(control: str | None = None, **judging: Any) -> Any:
    recipe = check(AlignmentRecipe, {"world": "miniature", "control": control, "judging": judging, "responses": {"samples": 5}})
    return SimpleNamespace(
        recipe=recipe,
        rate=lambda scorer, talks: [scorer.rating(talk[-1].content) for talk in talks],
        check=lambda cases: [verify(truth, answer) for truth, answer in cases],
    )


class Scorer:
    """Correctness is what the text says: `good 3.5` is 3.5."""

    def rating(self, text: str) -> Rating:
        return Rating(0.0, float(text.split()[-1]), 0.0, 0.0, 0.0)

    def total(self, rating: Rating) -> float:
        return rating.correctness


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


# ---- judge ----


def test_the_verifier_decides_where_there_is_a_truth_and_the_reward_model_elsewhere() -> None:
    prompts = {"a": prompt("a", truth={"kind": "number", "value": 4}), "b": prompt("b", task="facts")}
    rows = [
        replace(answer("a", 0), text="4"),
        replace(answer("a", 1), text="5"),
        *(replace(answer("b", i), text=t) for i, t in enumerate("13")),
    ]
    out = judge(mill_of(min_correctness=2.5), Scorer(), prompts, rows)
    assert [(r.judge, r.verified, r.good) for r in out] == [
        ("verifier", True, True),
        ("verifier", False, False),  # though the reward model likes it better
        ("reward", None, False),
        ("reward", None, True),
    ]
    assert [r.score for r in out] == [4, 5, 1, 3] and all(r.rating for r in out), "every answer is rated, whoever decides"


def test_an_unfinished_answer_is_never_good() -> None:
    rows = [replace(answer("a", 0), text="4", finished=False)]
    (out,) = judge(mill_of(), Scorer(), {"a": prompt("a", truth={"kind": "number", "value": 4})}, rows)
    assert out.verified is True and out.good is False


def test_without_a_reward_model_only_what_a_verifier_accepts_is_good() -> None:
    prompts = {"a": prompt("a", truth={"kind": "number", "value": 4}), "b": prompt("b")}
    out = judge(mill_of(), None, prompts, [replace(answer("a", 0), text="4"), answer("b", 1)])
    assert [(r.judge, r.good, r.rating, r.score) for r in out] == [("verifier", True, None, None), ("none", False, None, None)]


# ---- select ----


def test_the_best_good_finished_answers_of_a_prompt_are_kept() -> None:
    rows = [verified("a", i, True) for i in range(4)] + [verified("a", 8, False), verified("a", 9, True, finished=False)]
    kept, funnel = select(mill_of(keep_per_prompt=2), rows, {"sums": 99}, 0)
    assert sorted(d.parents for d in kept) == [("a-2", "a"), ("a-3", "a")]
    assert funnel["sums"]["prompts"] == 1 and funnel["sums"]["answers"] == 6 and funnel["sums"]["kept"] == 2
    assert funnel["sums"]["score_before"] == pytest.approx(23 / 6, abs=1e-3) and funnel["sums"]["score_after"] == 2.5
    assert [m.content for m in kept[0].messages][0] == "Ask a" and kept[0].messages[-1].role == "assistant"


@given(st.integers(0, 12), st.integers(0, 12), st.integers(1, 3), st.integers(0, 5))
def test_quotas_hold_by_task(num_sums: int, num_lists: int, per_prompt: int, seed: int) -> None:
    rows = [verified(f"s{i}", k, True) for i in range(num_sums) for k in range(3)]
    rows += [verified(f"l{i}", k, True, task="lists") for i in range(num_lists) for k in range(3)]
    kept, funnel = select(mill_of(keep_per_prompt=per_prompt), rows, {"sums": 7, "lists": 4}, seed)
    count = {t: sum(d.task == t for d in kept) for t in ("sums", "lists")}
    assert count == {"sums": min(7, num_sums * per_prompt), "lists": min(4, num_lists * per_prompt)}
    assert all(funnel[t]["kept"] == n for t, n in count.items() if t in funnel)
    assert len({d.id for d in kept}) == len(kept)


def test_where_only_the_reward_model_judges_one_answer_is_kept_that_samples_agree_on() -> None:
    rows = [answer("a", 9), answer("a", 3, votes=3), answer("a", 5, votes=2), answer("b", 9), answer("c", 4, votes=3, good=False)]
    kept, _ = select(mill_of(keep_per_prompt=2, min_votes=2), rows, {"sums": 99}, 0)
    assert [d.parents[0] for d in kept] == ["a-3"], "none of b's answers was given twice, and c's is not good"
    kept, _ = select(mill_of(keep_per_prompt=2, min_votes=1), rows, {"sums": 99}, 0)
    assert {d.parents[0] for d in kept} == {"a-3", "b-9"}


def test_a_task_without_a_quota_keeps_nothing() -> None:
    kept, funnel = select(mill_of(), [answer("a", 1)], {}, 0)
    assert kept == [] and funnel["sums"]["good"] == 1


def test_unfiltered_takes_answers_as_they_come() -> None:
    rows = [answer(f"p{i}", k, good=False) for i in range(50) for k in range(4)] + [answer("q", 0, finished=False)]
    kept, _ = select(mill_of("unfiltered", keep_per_prompt=2), rows, {"sums": 999}, 0)
    assert len(kept) == 100 and not any(d.parents[1] == "q" for d in kept)
    assert len({d.parents[0][-1] for d in kept}) == 4, "not only the best"


def test_random_filter_keeps_as_many_as_the_judge() -> None:
    rows = [verified(f"p{i}", k, k < i % 3) for i in range(60) for k in range(5)]
    real, _ = select(mill_of(keep_per_prompt=2), rows, {"sums": 999}, 0)
    blind, _ = select(mill_of("random-filter", keep_per_prompt=2), rows, {"sums": 999}, 0)
    good = {r.id for r in rows if r.good}
    assert sorted(d.parents[1] for d in blind) == sorted(d.parents[1] for d in real), "as many of each prompt"
    assert {d.parents[0] for d in real} <= good and not {d.parents[0] for d in blind} <= good


def test_selection_depends_on_nothing_but_its_arguments() -> None:
    rows = [answer(f"p{i}", k) for i in range(20) for k in range(4)]
    assert select(mill_of(), rows, {"sums": 5}, 3) == select(mill_of(), rows, {"sums": 5}, 3)
    assert select(mill_of(), rows, {"sums": 5}, 3) != select(mill_of(), rows, {"sums": 5}, 4)


def test_prompts_that_led_to_kept_answers_teach_to_write() -> None:
    prompts = [prompt(f"p{i}", request="Write a sum.") for i in range(5)] + [prompt("file"), prompt("waste", request="Write a sum.")]
    kept = [Demonstration(p.id, p.task, p.messages, "m", (f"{p.id}-0", p.id)) for p in prompts if p.id != "waste"]
    rows = written(prompts, kept, 3)
    assert [d.parents for d in rows] == [("p0",), ("p1",), ("p2",)] and {d.task for d in rows} == {"prompt-writing"}
    assert [m.content for m in rows[0].messages] == ["Write a sum.", "Ask p0"]


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
    pairs, facts = pair(mill_of(pairs_per_prompt=9, verified_gap=2.0), rows, DPO, 0)
    assert len(pairs) == 2 and facts["judges"] == {"verifier": 2} and facts["tasks"] == {"sums": 2}
    by_id = {r.id: r for r in rows}
    for p in pairs:
        chosen, rejected = (by_id[i] for i in p.parents)
        assert chosen.good and not rejected.good and (p.chosen, p.rejected) == (chosen.text, rejected.text)
        assert p.chosen_reward - p.rejected_reward == pytest.approx(2.0) and p.rejected_reward == rejected.score
    assert len({i for p in pairs for i in p.parents}) == 4, "no answer is in two pairs"


def test_the_reward_model_pairs_the_best_with_the_worst() -> None:
    (made,), facts = pair(mill_of(min_gap=1.5), [answer("a", n) for n in (2, 5, 3)], DPO, 0)
    assert made.parents == ("a-5", "a-2") and (made.chosen_reward, made.rejected_reward) == (5, 2) and facts["judges"] == {"reward": 1}


def test_agreement_of_samples_comes_before_the_reward() -> None:
    (made,), _ = pair(mill_of(min_gap=1.5), [answer("a", 2), answer("a", 5), answer("a", 4, votes=3)], DPO, 0)
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
    pairs, facts = pair(mill_of(min_gap=1.5, min_votes=2), rows, DPO, 0)
    assert pairs == [] and facts["funnel"] == {why: 1}


def test_random_filter_draws_both_answers_blindly() -> None:
    rows = [verified(f"p{i}", k, k % 2 == 0) for i in range(40) for k in range(4)]
    real, facts = pair(mill_of(), rows, DPO, 0)
    blind, blind_facts = pair(mill_of("random-filter"), rows, DPO, 0)
    assert facts == blind_facts and len(real) == len(blind)
    by_id = {r.id: r for r in rows}
    backwards = sum(not by_id[p.parents[0]].good and bool(by_id[p.parents[1]].good) for p in blind)
    assert 0 < backwards < len(blind) and all(p.chosen != p.rejected for p in blind)
    assert all({by_id[i].prompt for i in p.parents} == {p.prompt} for p in blind)


# ---- respond, and odds and ends ----


class FakeEngine:
    """Answers `n` samples with the temperature and the sample's number; asked for nothing else."""

    name = "fake"

    def __init__(self, folder: Path, max_positions: int = 10**6):
        _, self.tokenizer = load_model(folder)
        self.chat_format = FORMATS["nemotron"]
        self.model = SimpleNamespace(config=SimpleNamespace(max_positions=max_positions))


def generating(context: Any, text: Any) -> Any:
    def generate(engine: Any, requests: list[Any], journal: Path) -> dict[str, list[Completion]]:
        context.asked = requests
        return {r.id: [Completion(text(r, k), 3, (-1.0,), "stop") for k in range(r.sampling.n)] for r in requests}

    context.generate = generate
    return context


def test_samples_are_spread_over_the_temperatures(tiny_base: Path, tmp_path: Path) -> None:
    context = generating(mill_of(), lambda r, k: f"{r.sampling.temperature} {k}")
    rows = respond(context, [FakeEngine(tiny_base)], [prompt("a"), prompt("b")], None, 0, tmp_path)
    assert [(r.prompt, r.temperature, r.sample) for r in rows] == [
        (p, t, k) for p in "ab" for t, count in ((0.7, 3), (1.0, 2)) for k in range(count)
    ]
    assert len({r.id for r in rows}) == 10 and len({r.id for r in context.asked}) == 4
    assert read_rows(tmp_path / "responses.parquet", Response) == rows


def test_a_repeated_answer_to_a_prompt_is_dropped(tiny_base: Path, tmp_path: Path) -> None:
    context = generating(mill_of(), lambda r, k: "the same")
    rows = respond(context, [FakeEngine(tiny_base)], [prompt("a"), prompt("b")], None, 0, tmp_path)
    assert [(r.prompt, r.votes) for r in rows] == [("a", 5), ("b", 5)]


def test_an_answer_that_outgrows_the_context_is_dropped(tiny_base: Path, tmp_path: Path) -> None:
    context = generating(mill_of(), lambda r, k: "\ufffd" * 60 if k else "short")
    rows = respond(context, [FakeEngine(tiny_base, 100)], [prompt("a")], None, 0, tmp_path)
    assert [r.text for r in rows] == ["short"]


def test_a_conversation_holds_up_to_its_last_token(tiny_base: Path) -> None:
    talk = (Message("user", "Ask"), Message("assistant", "Answer"))
    tokens = len(FORMATS["nemotron"].render(talk, load_model(tiny_base)[1]).ids)
    assert holds(FakeEngine(tiny_base, tokens), talk) and not holds(FakeEngine(tiny_base, tokens - 1), talk)


@given(st.integers(0, 30), st.integers(0, 300), st.floats(0, 1))
def test_general_sft_repeats_a_share_of_the_code(num_code: int, num_general: int, share: float) -> None:
    code = [Demonstration(str(i), "code", (), "m") for i in range(num_code)]
    again = _repeat(code, share, num_general, 1)
    assert len({d.id for d in again}) == len(again) <= num_code
    if len(again) < num_code:
        assert abs(len(again) - share * (num_general + len(again))) <= 1


def test_human_pairs_are_the_more_helpful_first_and_no_more_than_asked_for() -> None:
    marks = [(4, 1), (0, 3), (2, 2), (3, 1)]
    rows = [
        Rated(f"{pair}{side}", "facts", (Message("user", pair), Message("assistant", side)), (float(mark), 0.0, 0.0, 0.0, 0.0), pair)
        for pair, both in zip("wxyz", marks, strict=True)
        for side, mark in zip("ab", both, strict=True)
    ]
    pairs = _human_pairs(rows, 9, seed=0)
    assert [(p.prompt, p.chosen, p.rejected) for p in pairs] == [("w", "a", "b"), ("x", "b", "a"), ("z", "a", "b")], "y is a tie"
    drawn = [_human_pairs(rows, 2, seed) for seed in range(9)]
    assert {len(d) for d in drawn} == {2} and len({tuple(p.id for p in d) for d in drawn}) > 1
    assert drawn[0] == _human_pairs(rows, 2, seed=0)
