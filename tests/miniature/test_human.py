"""The small human set: deterministic, in its proportions, apart from the evaluation, and annotated by the consensus rule."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gristmill.data.chat import conversation
from gristmill.data.chat_format import FORMATS
from gristmill.miniature import human
from gristmill.miniature.human import WrittenAnswer, annotate, demonstrations, evaluation, ratings
from gristmill.miniature.world import TASKS, World
from gristmill.model.hf import load_model
from gristmill.model.reward import ATTRIBUTES
from gristmill.workflows.alignment.source import contaminated, normalize_prompt

SEEDS = (0, 1, 2, 17)
WORLD = World.make()


@pytest.fixture
def world() -> World:
    return WORLD


def test_rows_depend_on_their_seed_only(world: World) -> None:
    assert demonstrations(world, 80, 4) == demonstrations(World.make(), 80, 4) != demonstrations(world, 80, 5)
    assert ratings(world, 40, 4) == ratings(World.make(), 40, 4) != ratings(world, 40, 5)


def test_fewer_rows_are_the_first_of_more(world: World) -> None:
    assert demonstrations(world, 30, 1) == demonstrations(world, 90, 1)[:30]
    assert ratings(world, 30, 1) == ratings(world, 90, 1)[:60]


def test_demonstrations_are_of_every_task_in_equal_parts(world: World) -> None:
    count = Counter(r["task"] for r in demonstrations(world, 120, 0))
    assert count.pop("prompt-writing") == 20 and count == dict.fromkeys(TASKS, 20)


@pytest.mark.parametrize("seed", SEEDS)
def test_people_never_see_what_the_evaluation_asks(world: World, seed: int) -> None:
    held_out = frozenset(normalize_prompt(conversation(r["messages"])) for r in evaluation(world, 10**6))
    assert len(held_out) == sum(map(len, world.held_out.values()))
    rows = demonstrations(world, 600, seed) + ratings(world, 600, seed)
    for row in rows:
        messages = conversation(row["messages"])
        assert not contaminated(messages[:-1], held_out), messages
        assert normalize_prompt(messages[-1:]) not in held_out, "not even as an answer"
    collected = human.collected(world, 600, seed)
    assert not any(contaminated(p.messages, held_out) for p in collected)
    assert len({normalize_prompt(p.messages) for p in collected}) == 600
    texts = json.dumps(rows)
    single = [p.question for task, problems in world.held_out.items() if task != "followups" for p in problems]
    assert [text for text in single if json.dumps(text)[1:-1] in texts] == []


@pytest.mark.parametrize("name", FORMATS)
def test_every_row_renders(world: World, tiny_base: Path, name: str) -> None:
    rows = demonstrations(world, 300, 3) + ratings(world, 100, 3)
    _, tokenizer = load_model(tiny_base)
    if name != "nemotron":
        tokenizer = type(tokenizer).train([m["content"] for r in rows for m in r["messages"]], 400, FORMATS[name].special_tokens)
    for row in rows:
        messages = conversation(row["messages"])
        rendered = FORMATS[name].render(messages, tokenizer)
        prompt = FORMATS[name].render_prompt(messages[:-1], tokenizer)
        assert rendered.ids[: len(prompt)] == prompt and any(rendered.mask[len(prompt) :])
        answer = FORMATS[name].response_text([i for i in rendered.ids[len(prompt) :]], tokenizer)
        assert messages[-1].content in answer


def test_ratings_have_the_shape_of_helpsteer2(world: World) -> None:
    rows = ratings(world, 200, 0)
    assert len(rows) == 400
    pairs: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        pairs.setdefault(row["pair"], []).append(row)
        assert set(row) == {"task", "pair", "messages", *ATTRIBUTES}
        assert all(type(row[a]) is int and 0 <= row[a] <= 4 for a in ATTRIBUTES)
    for first, second in pairs.values():
        assert first["messages"][:-1] == second["messages"][:-1] and first["messages"][-1] != second["messages"][-1]
    tasks = Counter(r["task"] for r in rows)
    assert set(tasks) == set(TASKS) and min(tasks.values()) > 30
    assert min(Counter(r["helpfulness"] for r in rows).values()) > 10, "every mark is given"


def test_annotators_see_what_is_right_and_disagree(world: World) -> None:
    rng = random.Random(0)
    marks: dict[bool, list[tuple[int, ...]]] = {True: [], False: []}
    for _ in range(400):
        problem = world.draw(rng, rng.choice(TASKS))
        for good in (True, False):
            mark = annotate(rng, problem, WrittenAnswer(problem.answer if good else "I do not know."))
            if mark:
                marks[good].append(mark)
    mean = {good: sum(m[1] for m in m2) / len(m2) for good, m2 in marks.items()}
    assert mean[True] > 3.5 and mean[False] < 2
    assert len({m[1] for m in marks[True]}) > 1, "people disagree"


class Marks:
    """Randomness of annotators who are all careless and give the marks of a script, one annotator after the other."""

    def __init__(self, helpful: list[int], rest: int = 2):
        self.script = [mark for h in helpful for mark in (h, rest, rest, rest, rest)]

    def random(self) -> float:
        return 0.0

    def uniform(self, low: float, high: float) -> float:
        return float(self.script.pop(0))


def consensus(world: World, helpful: list[int]) -> tuple[tuple[int, ...] | None, int]:
    """What the annotators agree on, and how many were asked."""
    problem = world.held_out["sums"][0]
    script = Marks(helpful)
    rng: Any = script
    return annotate(rng, problem, WrittenAnswer(problem.answer)), len(helpful) - len(script.script) // 5


@given(st.lists(st.integers(0, 4), min_size=5, max_size=5))
def test_the_consensus_rule(helpful: list[int]) -> None:
    mark, asked = consensus(WORLD, helpful)
    first = helpful[:3]
    if max(first) - min(first) <= 2:
        assert asked == 3 and mark is not None and mark[0] == round(sum(first) / 3)
        return
    assert asked == 5, "two more are asked when three disagree"
    ordered = sorted(helpful)
    closest = min(ordered[i + 2] - ordered[i] for i in range(3))
    if closest > 2:
        assert mark is None
    else:
        best = [ordered[i : i + 3] for i in range(3) if ordered[i + 2] - ordered[i] == closest]
        assert mark is not None and mark[0] in {round(sum(three) / 3) for three in best}


@pytest.mark.parametrize(
    ("helpful", "asked", "agreed"),
    [([4, 4, 3, 0, 0], 3, 4), ([4, 2, 3, 0, 0], 3, 3), ([4, 4, 0, 0, 0], 5, 0), ([0, 4, 1, 4, 4], 5, 4), ([0, 3, 4, 1, 2], 5, None)],
)
def test_examples_of_the_rule(world: World, helpful: list[int], asked: int, agreed: int | None) -> None:
    mark, number = consensus(world, helpful)
    assert number == asked and mark is not None
    if agreed is not None:
        assert mark == (agreed, 2, 2, 2, 2)


def test_faulty_answers_are_mostly_wrong_and_never_like_the_model_answer(world: World) -> None:
    rng = random.Random(0)
    wrong = 0
    for _ in range(500):
        problem = world.draw(rng, rng.choice(TASKS))
        written = human.write(rng, problem, good=False)
        assert human.write(rng, problem, good=True).text == problem.answer
        wrong += written.text != problem.answer
    assert wrong > 480
