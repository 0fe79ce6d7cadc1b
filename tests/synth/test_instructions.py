"""Constraints that are asked for are constraints that the verifier knows, none contradicts another, and requests need no model."""

import asyncio
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any, cast

from hypothesis import given
from hypothesis import strategies as st

from gristmill.core.config import RECIPES, load
from gristmill.data.rows import Prompt
from gristmill.synth.parsing import parse_list
from gristmill.synth.pipelines.base import Inputs
from gristmill.synth.pipelines.instructions import ALONE, CLASHES, CONSTRAINTS, TOPIC, Instructions, ask_about, draw_constraints
from gristmill.synth.templates import TemplatePack
from gristmill.synth.writer import Topic, Writer
from gristmill.verify.ifeval import CHECKS, check_instructions
from gristmill.verify.repair import repair
from gristmill.verify.verify import check_truth
from gristmill.workflows.alignment.recipe import AlignmentRecipe

PACK = TemplatePack.load()
TOPICS = [Topic(name, f"id-{name}") for name in ("bees", "night trains", "moss")]
ANSWERS = [
    "Bees live in hives, and most of them work. They fly out for nectar when the sun is up. A hive holds thousands of bees. The queen lays "
    "eggs all summer. In winter they keep each other warm. Honey is what they live on until spring comes back.",
    "Some keep hives on roofs. Others plant flowers for wild bees. A garden without spray is a good start. Water helps on hot days.",
]


@given(st.integers(0, 10_000), st.integers(1, 4))
def test_what_is_drawn_can_be_checked_and_fits_together(seed: int, num: int) -> None:
    checks, words = draw_constraints(random.Random(seed), "Tell me about bees.", num)
    names = [check["id"] for check in checks]
    assert 1 <= len(names) <= num and len(set(names)) == len(names) and words
    assert len(check_instructions(checks, "An answer about bees.")) == len(names)  # and no field is missing or unknown
    assert len(names) == 1 or not set(ALONE) & set(names)
    assert all(len(clash & set(names)) <= 1 for clash in CLASHES)


def test_every_type_of_the_verifier_is_drawn_in_several_wordings() -> None:
    assert set(CONSTRAINTS) == set(CHECKS) and len(CHECKS) == 25
    drawn = Counter(check["id"] for seed in range(600) for check in draw_constraints(random.Random(seed), "Tell me about bees.", 3)[0])
    assert set(drawn) == set(CHECKS) and min(drawn.values()) > 20, "each about as often as the others"
    for name, make in CONSTRAINTS.items():
        made = [make(random.Random(seed), "Tell me about bees.") for seed in range(60)]
        masked = {"".join(c for c in words if not c.isdigit()) for _, words in made}
        assert len(masked) >= 3, name


def test_what_is_asked_for_together_can_be_met_together() -> None:
    """Nearly always: an edit may still be beyond a program, as a language is."""
    met = 0
    for seed in range(120):
        checks, _ = draw_constraints(random.Random(seed), "Tell me about bees.", 3)
        truth = {"kind": "instructions", "checks": [c for c in checks if c["id"] not in ("language:response_language",)]}
        met += not truth["checks"] or repair(truth, ANSWERS[0], ANSWERS[1:] * 2) is not None
    assert met >= 0.8 * 120


# ---- requests about topics ----


def test_requests_are_forms_of_the_pack_about_topics() -> None:
    forms = parse_list(PACK["instruction_requests"].render(topic=TOPIC))
    assert len(forms) >= 24 and all(TOPIC in form for form in forms) and len(set(forms)) == len(forms)
    found = ask_about(TOPICS, forms, 60, random.Random(0))
    assert len({topic.text for topic in found}) == 60 and all(topic.origin == "template" for topic in found)
    assert set(Counter(topic.root for topic in found).values()) == {20}, "each topic as often as the others"
    assert len(ask_about(TOPICS, forms, 10_000, random.Random(0))) == 3 * len(forms)
    assert ask_about([], forms, 5, random.Random(0)) == []


def test_with_forms_alone_no_model_is_asked() -> None:
    class Nobody:
        dropped: Counter[str] = Counter()
        templates = PACK
        random = Writer.random
        each = Writer.each
        seed = 3

    async def write(**options: Any) -> list[Prompt]:
        pipeline = Instructions(prompts=12, whole_talk=0, revision=0, **options)
        return [row async for row in cast(Any, pipeline).write(cast(Any, Nobody()), Inputs(topics=TOPICS))]

    rows = asyncio.run(write(forms=1))
    assert len(rows) == 12 and {row.origin for row in rows} == {"template"}
    for row in rows:
        assert row.truth is not None and len(row.parents) == 1 and row.parents[0] in {topic.id for topic in TOPICS}
        check_truth(row.truth)
    assert sorted(row.id for row in asyncio.run(write(forms=1))) == sorted(row.id for row in rows)
    assert Instructions(forms=0.5).needs == "topics" and Instructions().needs == "topics or prompts"


# ---- the shipped recipe ----


def test_held_out_prompts_of_the_real_recipe_are_about_other_topics() -> None:
    recipe = load(RECIPES / "real.yaml", AlignmentRecipe)
    assert recipe.data.evaluation == RECIPES / "real-held-out.jsonl" and recipe.judging.repair is not None
    topics = recipe.topics.given()
    assert len(topics) >= 126 and recipe.pipelines.instructions is not None and recipe.pipelines.instructions.forms > 0
    rows = [json.loads(line) for line in Path(recipe.data.evaluation).read_text().splitlines()]
    assert len(rows) >= 100 and len({row["prompt"] for row in rows}) == len(rows)
    for row in rows:
        check_truth(row["truth"])
        assert not any(f" {topic} " in f" {row['prompt'].lower()} " for topic in topics)
    assert {check["id"] for row in rows for check in row["truth"]["checks"]} == set(CHECKS)
