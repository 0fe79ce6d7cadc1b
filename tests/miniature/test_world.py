"""The world is the same for the same seed, and what the evaluation asks is asked nowhere else."""

import itertools
import random
from collections import Counter

import pytest

from gristmill.core.config import RECIPES, load
from gristmill.data.chat import Conversation, Message
from gristmill.miniature import followups
from gristmill.miniature.facts import ATTRIBUTES, NUM_LANDS, Lands
from gristmill.miniature.source import PIPELINES
from gristmill.miniature.world import (
    HELD_OUT_PER_TASK,
    NEXT_REQUEST,
    PROMPT_REQUEST,
    TASKS,
    TOPIC_REQUEST,
    World,
    writing_problem,
)
from gristmill.workflows.alignment.recipe import AlignmentRecipe
from gristmill.workflows.alignment.source import contaminated, normalize_prompt

NUM_DOCUMENTS = 20_000


@pytest.fixture(scope="module")
def world() -> World:
    return World.make()


def test_a_seed_makes_one_world() -> None:
    assert World.make(3) == World.make(3)
    assert World.make(3).lands != World.make(4).lands and World.make(3).reserved.isdisjoint(World.make(4).reserved) is False
    assert World.make(3).held_out != World.make(4).held_out


def test_documents_depend_on_their_seed_only(world: World) -> None:
    one, same, other = (list(itertools.islice(world.documents(seed), 200)) for seed in (1, 1, 2))
    assert one == same != other
    assert list(itertools.islice(World.make().documents(1), 200)) == one
    assert len(set(one)) > 195 and all(one)


def test_names_of_lands_and_their_facts_cannot_be_confused() -> None:
    for seed in range(5):
        facts = Lands.make(seed).facts
        assert len(facts) == NUM_LANDS and all(set(f) == set(ATTRIBUTES) for f in facts.values())
        names = [*facts, *(f[a] for f in facts.values() for a in ("capital", "river", "king"))]
        assert len({n.lower() for n in names}) == len(names)
        assert not [(a, b) for a, b in itertools.permutations(names, 2) if a.lower() in b.lower()]


def test_held_out_problems_differ(world: World) -> None:
    assert set(world.held_out) == set(TASKS)
    texts = [normalize_prompt(p.messages) for problems in world.held_out.values() for p in problems]
    assert len(set(texts)) == len(texts) == len(TASKS) * HELD_OUT_PER_TASK
    assert all(p.task == task for task, problems in world.held_out.items() for p in problems)


def test_no_document_asks_what_is_held_out(world: World) -> None:
    corpus = "\n\n".join(itertools.islice(world.documents(0), NUM_DOCUMENTS)) + "\n\n"
    single = [p.question for task, problems in world.held_out.items() if task != followups.TASK for p in problems]
    assert [text for text in single if text in corpus] == []
    talks = [
        f"Asked: {first.content}\nSaid: {said.content}\nAsked: {second.content}\n"
        for first, said, second in (p.messages for p in world.held_out[followups.TASK])
    ]
    assert [text for text in talks if text in corpus] == []
    # the forms that are searched for are those that the documents have
    for form in ("Question: ", "Exercise. ", "Talk.\nAsked: ", "\nSaid: "):
        assert corpus.count(form) > 100


def test_the_search_would_find_a_held_out_text(world: World) -> None:
    bare = World(world.lands, {}, frozenset())  # reserves nothing, so its documents ask everything
    corpus = "\n\n".join(itertools.islice(bare.documents(0), NUM_DOCUMENTS))
    found = {task: sum(p.messages[0].content in corpus for p in problems) for task, problems in world.held_out.items()}
    assert found["facts"] > 50 and found["followups"] > 10


def test_what_is_drawn_is_not_held_out(world: World) -> None:
    rng = random.Random(1)
    held_out = frozenset(normalize_prompt(p.messages) for problems in world.held_out.values() for p in problems)
    for task in TASKS:
        for _ in range(400):
            assert not contaminated(world.draw(rng, task).messages, held_out)


def test_a_conversation_is_refused_for_any_of_its_turns(world: World) -> None:
    held = world.held_out["facts"][0].messages
    talk = world.held_out["followups"][0].messages
    said, more = Message("assistant", "So it is."), Message("user", "And more?")
    refused: list[Conversation] = [held, (*held, said), (*held, said, more), (more, said, *held), talk, (*talk, said)]
    assert [world.allowed(messages) for messages in refused] == [False] * len(refused)
    assert world.allowed((more,)) and world.allowed((Message("user", f"{held[0].content} Say why."),))


def test_writing_problems_teach_every_request(world: World) -> None:
    rng = random.Random(0)
    kinds: Counter[str] = Counter()
    heads = {**PROMPT_REQUEST, **{f"topic {t}": r for t, r in TOPIC_REQUEST.items()}, "next": NEXT_REQUEST}
    for _ in range(600):
        asked, said = writing_problem(world, rng)
        (kind,) = [k for k, form in heads.items() if asked.startswith(form.split("{")[0]) and asked.endswith(form.split("}")[-1])]
        kinds[kind] += 1
        if kind in PROMPT_REQUEST:
            assert world.allowed((Message("user", said),))
            assert not world.checkable(kind, (Message("user", said),)) or world.verifier(kind, (Message("user", said),))
    assert set(kinds) == set(heads) and min(kinds.values()) > 5


def test_manual_topics_of_the_recipe_are_topics_of_the_task(world: World) -> None:
    rng = random.Random(0)
    recipe = load(RECIPES / "miniature.yaml", AlignmentRecipe)
    own = {name: getattr(recipe.pipelines, name).own for name in ("math", "python", "writing")} | {"open_qa": recipe.topics.own}
    for pipeline, names in own.items():
        drawn = {world.draw(rng, PIPELINES[pipeline]).topic for _ in range(2000)}
        assert names and set(names) <= drawn and len(set(names)) == len(names)
