"""Answers of a round: drawn over the temperatures, with votes, within the context; and what the loop makes of prompts and ratings."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from gristmill.core.config import check
from gristmill.data.chat import Message
from gristmill.data.rows import Demonstration, Prompt, Rated, Response
from gristmill.generation.api import Completion, Request
from gristmill.generation.cached import BatchingClient, CachedClient
from gristmill.judge.judges import Judges
from gristmill.judge.programs import Verifier
from gristmill.runs import artifacts
from gristmill.synth.templates import TemplatePack
from gristmill.workflows.alignment.answering import answer, prompt_demonstrations
from gristmill.workflows.alignment.loop import _human_pairs, _repeat
from gristmill.workflows.alignment.recipe import AlignmentRecipe


def prompt(name: str, task: str = "sums", **more: Any) -> Prompt:
    return Prompt(name, task, (Message("user", f"Ask {name}"),), "model", **more)


def answered(
    folder: Path, text: Any, prompts: list[Prompt], max_characters: int = 10**6, temperatures: tuple[float, ...] = ()
) -> tuple[list[Response], list[Request]]:
    """Answers of a fake model to prompts, and what it was asked."""
    recipe = check(AlignmentRecipe, {"world": "miniature", "answers": {"samples": 5}})
    asked: list[Request] = []

    class Fake:
        name = "fake"

        def generate(self, requests: Iterable[Request]) -> Iterator[tuple[Request, list[Completion]]]:
            for r in requests:
                asked.append(r)
                yield r, [Completion(text(r, k), 3, (-1.0,), "stop") for k in range(r.sampling.n)]

    context: Any = SimpleNamespace(
        recipe=recipe,
        templates=TemplatePack.load("miniature"),
        holds=lambda messages: sum(len(m.content) for m in messages) <= max_characters,
        cached=CachedClient,
        progress=SimpleNamespace(tick=None),
        judges=lambda stack, folder, reward_folder, client: Judges(recipe.judging, Verifier(), None, client=client),
    )

    async def work(rows: list[Response], judges: Judges) -> list[Response]:
        return rows

    client = BatchingClient(Fake(), 1000)
    return answer(context, client, prompts, 0, folder=folder, reward_folder=None, work=work, temperatures=temperatures), asked


def test_samples_are_spread_over_the_temperatures(tmp_path: Path) -> None:
    rows, asked = answered(tmp_path, lambda r, k: f" {r.sampling.temperature} {k}", [prompt("a"), prompt("b")])
    assert [(r.prompt, r.temperature, r.sample) for r in rows] == [
        (p, t, k) for p in "ab" for t, count in ((0.7, 3), (1.0, 2)) for k in range(count)
    ]
    assert len({r.id for r in rows}) == 10 and len({r.id for r in asked}) == 4
    assert rows[0].text == " 0.7 0", "what the model said, space included: the loss and the reward model see it too"
    assert artifacts.RESPONSES.read(tmp_path) == rows
    again, asked = answered(tmp_path, lambda r, k: "other", [prompt("a"), prompt("b")])
    assert again == rows and not asked, "nothing is drawn twice"


def test_a_stage_of_pairs_has_its_own_temperatures(tmp_path: Path) -> None:
    rows, _ = answered(tmp_path, lambda r, k: f" {r.sampling.temperature} {k}", [prompt("a")], temperatures=(0.3,))
    assert [r.temperature for r in rows] == [0.3] * 5


def test_a_repeated_answer_to_a_prompt_counts_as_a_vote(tmp_path: Path) -> None:
    rows, _ = answered(tmp_path, lambda r, k: "the same", [prompt("a"), prompt("b")])
    assert [(r.prompt, r.votes) for r in rows] == [("a", 5), ("b", 5)]


def test_an_answer_that_outgrows_the_context_is_dropped(tmp_path: Path) -> None:
    rows, _ = answered(tmp_path, lambda r, k: "long" * 60 if k else "short", [prompt("a")], 100)
    assert {r.text for r in rows} == {"short"}


def test_prompts_that_led_to_kept_answers_teach_to_write() -> None:
    prompts = [prompt(f"p{i}", request="Write a sum.") for i in range(5)] + [prompt("file"), prompt("waste", request="Write a sum.")]
    kept = [Demonstration(p.id, p.task, p.messages, "m", (f"{p.id}-0", p.id)) for p in prompts if p.id != "waste"]
    rows = prompt_demonstrations(prompts, kept, 3)
    assert [d.parents for d in rows] == [("p0",), ("p1",), ("p2",)] and {d.task for d in rows} == {"prompt-writing"}
    assert [m.content for m in rows[0].messages] == ["Write a sum.", "Ask p0"]


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
