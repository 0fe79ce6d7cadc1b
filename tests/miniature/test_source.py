"""The world as the source of a run: amounts, ids, and what another seed changes."""

from collections import Counter

import pytest

from gristmill.core.errors import InputError
from gristmill.core.progress import Progress
from gristmill.data.chat import Message
from gristmill.data.human import HumanData
from gristmill.miniature.source import LIMITS, MiniatureSource
from gristmill.workflows.alignment.source import DataSource, normalize_prompt

DATA = HumanData(num_demonstrations=50, num_rated_prompts=30, num_held_out_ratings=5, num_evaluation=4, num_prompts=20)


@pytest.fixture(scope="module")
def source() -> MiniatureSource:
    return MiniatureSource(DATA, 0)


def test_amounts_are_those_of_the_recipe(source: MiniatureSource) -> None:
    given: DataSource = source
    assert len(given.demonstrations()) == 50 and len(given.ratings()) == 2 * 35 and len(given.prompts()) == 20
    assert [p.task for p in given.evaluation()] == [t for t in source.tasks for _ in range(4)]


def test_rows_have_ids_of_their_own(source: MiniatureSource) -> None:
    ids = [r.id for rows in (source.demonstrations(), source.ratings(), source.prompts(), source.evaluation()) for r in rows]
    assert len(set(ids)) == len(ids)


def test_another_seed_draws_other_people_but_asks_the_same(source: MiniatureSource) -> None:
    other = MiniatureSource(DATA, 1)
    assert source.demonstrations() == MiniatureSource(DATA, 0).demonstrations() != other.demonstrations()
    assert {d.id for d in source.demonstrations()}.isdisjoint(d.id for d in other.demonstrations())
    assert source.evaluation() == other.evaluation() and source.world == other.world


def test_drawn_prompts_are_different_and_none_is_held_out(source: MiniatureSource) -> None:
    """As many draws of every task; of facts the world soon has no others."""
    drawn = source.drawn(2000, Progress(quiet=True))
    texts = [normalize_prompt(p.messages) for p in drawn]
    assert len(set(texts)) == len({p.id for p in drawn}) == len(drawn) and all(source.world.allowed(p.messages) for p in drawn)
    counts = Counter(p.task for p in drawn)
    assert max(counts.values()) <= 400 and counts["facts"] < 0.95 * counts["sums"] and counts["sums"] > 390


def test_every_evaluation_prompt_has_a_truth(source: MiniatureSource) -> None:
    assert all(p.truth for p in source.evaluation()) and len({normalize_prompt(p.messages) for p in source.evaluation()}) == 20


def test_verifiers_know_prompts_but_no_facts(source: MiniatureSource) -> None:
    land = next(iter(source.world.lands.facts))
    assert source.truth("facts", (Message("user", f"Tell me the river of {land}."),)) is None
    known = source.truth("sums", (Message("user", "Ana has 5 nuts. Ana buys 2 more. How many nuts are there now?"),))
    assert known is not None and known["value"] == 7
    assert all(p.truth or not source.checkable(p.task, p.messages) for p in source.prompts())
    assert source.checkable("sums", (Message("user", "What?"),)) and not source.checkable("facts", (Message("user", "What?"),))


@pytest.mark.parametrize("name", LIMITS)
def test_more_than_the_world_has_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=f"data.{name} is {LIMITS[name] + 1}: the miniature world has {LIMITS[name]} at most"):
        MiniatureSource(HumanData(**{name: LIMITS[name] + 1}), 0)


def test_the_world_has_what_the_limits_promise() -> None:
    source = MiniatureSource(HumanData(num_prompts=LIMITS["num_prompts"], num_demonstrations=LIMITS["num_demonstrations"]), 0)
    assert len({p.messages for p in source.prompts()}) == LIMITS["num_prompts"]
    assert len(source.demonstrations()) == LIMITS["num_demonstrations"]
