"""Process supervision: which steps of a trace earn something, which tokens they are, and that nothing else earns."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gristmill.core.config import check
from gristmill.data.chat import Message
from gristmill.data.rows import Prompt
from gristmill.data.thinking import LINES, Mode, with_toggle
from gristmill.data.tokenizer import Tokenizer
from gristmill.generation.api import Completion
from gristmill.judge.programs import Verifier
from gristmill.miniature.base import BASE
from gristmill.runs.journal import Journal
from gristmill.workflows.rl.process import step_advantages, step_verdicts, token_advantages
from gristmill.workflows.rl.recipe import Rewards, RlRecipe
from gristmill.workflows.rl.rewards import Reward, Rewarder
from gristmill.workflows.rl.rollouts import Group, RolloutSource

STEPS = ["3 + 4 = 7", "7 * 2 = 14"]
TRUTH: dict[str, Any] = {"kind": "number", "value": 14, "steps": STEPS}
RIGHT = "<think>3 + 4 = 7. 7 * 2 = 14.</think>The answer is 14."


def rewarded(text: str, mode: Mode = "on", finish: Any = "stop") -> Reward:
    rewards = Rewards(form="thinking", supervision="process")
    prompt = Prompt("p", "", with_toggle((Message("user", "3, 4 more, twice?"),), mode), "file", (), TRUTH)
    return Rewarder(rewards, Verifier(None), 64).rewards([prompt], [Completion(text, 9, (), finish)])[0]


@pytest.mark.parametrize(
    ("text", "verdicts"),
    [
        (RIGHT, [1, 1, 1]),
        ("<think>3 + 4 = 7. 7 * 2 = 14.</think>The answer is 15.", [1, 1, 0]),
        ("<think>3 + 4 = 7. 7 * 2 = 15.</think>The answer is 14.", [1, 0]),  # right by chance
        ("<think>3 + 4 = 8. 7 * 2 = 14.</think>The answer is 14.", [0]),
        ("<think>3 + 4 = 7. 3 + 4 = 7.</think>The answer is 14.", [1, 0]),  # said twice
        ("<think>3 + 4 = 7. 7 * 2 = 14. 14 + 0 = 14.</think>The answer is 14.", [1, 1, 0]),
        ("<think>7 * 2 = 14.</think>The answer is 14.", [0]),
        ("<think>It is 14.</think>3 + 4 = 7. 7 * 2 = 14. The answer is 14.", [0]),  # behind the thinking
    ],
)
def test_steps_are_right_up_to_the_first_that_is_not_the_references(text: str, verdicts: list[float]) -> None:
    assert list(rewarded(text).steps) == verdicts


@pytest.mark.parametrize(
    "text",
    [
        "3 + 4 = 7. 7 * 2 = 14. The answer is 14.",
        "<think></think>The answer is 14.",
        "<think>3 + 4 = 7. 7 * 2 = 14.</think>",
        "<think>3 + 4 = 7.</think><think>7 * 2 = 14.</think>The answer is 14.",
        "<think>3 + 4 = 7. 7 * 2 = 14. The answer is 14.",
        f"I think. {RIGHT}",
    ],
)
def test_a_wrong_form_earns_nothing_whatever_its_steps(text: str) -> None:
    reward = rewarded(text)
    assert reward.total == 0 and list(reward.steps) == [0]
    assert list(rewarded(RIGHT, finish="length").steps) == [0], "nor does an answer that did not end"
    assert list(rewarded("The answer is 14.", mode="off").steps) == [] and LINES["off"]


def test_a_wrong_form_may_cost_something() -> None:
    """Where no answer is right, as of sums with thinking off, nothing else tells a leaking trace from a plain wrong answer."""
    prompt = Prompt("p", "", with_toggle((Message("user", "3, 4 more, twice?"),), "off"), "file", (), TRUTH)
    texts = ("The answer is 15.", "3 + 4 = 7.</think>The answer is 15.", "3 + 4 = 7.</think>The answer is 14.")
    rewarder = Rewarder(Rewards(form="thinking", form_penalty=0.5), Verifier(None), 64)
    assert [r.total for r in rewarder.rewards([prompt] * 3, [Completion(t, 9, (), "stop") for t in texts])] == [0.0, -0.5, -0.5]


def test_a_step_is_told_apart_only_from_answers_that_came_as_far() -> None:
    found = step_advantages("mean", [[1, 1, 1], [1, 0], [0], [1, 1, 0]])
    assert found == [pytest.approx(x) for x in ([0.25, 1 / 3, 0.5], [0.25, -2 / 3], [-0.75], [0.25, 1 / 3, -0.5])]
    assert step_advantages("std", [[1, 0], [0]])[0] == [1.0, 0.0], "one alone has nobody beside it"


def test_tokens_have_the_advantage_of_their_step() -> None:
    tokenizer = Tokenizer.load(BASE).with_tokens(["<think>", "</think>"], special=False)

    def by_text(text: str, steps: list[float]) -> list[tuple[str, float]]:
        tokens = [*tokenizer.encode(text), tokenizer.eos_id]
        values = token_advantages(tokenizer, text, tokens, steps)
        both = itertools.groupby(zip(tokens, values.tolist(), strict=True), key=lambda pair: pair[1])
        return [(tokenizer.decode([token for token, _ in pairs]), value) for value, pairs in both]

    assert by_text(RIGHT, [0.5, -1.0, 2.0]) == [
        ("<think>3 + 4 = 7", 0.5), (". 7 * 2 = 14", -1.0), (".</think>The answer is 14.", 2.0),
    ]  # fmt: skip
    wrong = "<think>\u00e9 3 + 4 = 7. 7 * 2 = 15. 15 + 1 = 16.</think>The answer is 16."
    assert by_text(wrong, [0.5, -1.0]) == [
        ("<think>\u00e9 3 + 4 = 7", 0.5), (". 7 * 2 = 15", -1.0), (". 15 + 1 = 16.</think>The answer is 16.", 0.0),
    ]  # fmt: skip


def test_a_group_that_is_all_wrong_has_a_spread_in_its_steps(tmp_path: Path) -> None:
    """Its training samples have an advantage for each token; a group of equal steps has none."""
    tokenizer = Tokenizer.load(BASE).with_tokens(["<think>", "</think>"], special=False)
    texts = ["<think>3 + 4 = 7. 7 * 2 = 15.</think>15", "<think>3 + 4 = 8.</think>8"]
    prompt = Prompt("p", "", with_toggle((Message("user", "3, 4 more, twice?"),), "on"), "file", (), TRUTH)
    answers = [Completion(t, len(ids := tokenizer.encode(t)), (-0.1,) * len(ids), "stop", tuple(ids)) for t in texts]
    rewards = [Reward(0.0, 0.0, 1.0, steps=step_verdicts(STEPS, text, 0.0)) for text in texts]
    rewards = [Reward(**json.loads(json.dumps(vars(reward)))) for reward in rewards]  # as a journal keeps them
    group = Group("g", prompt, answers, rewards)
    assert group.has_spread and not Group("g", prompt, answers, [rewards[0]] * 2).has_spread
    policy = SimpleNamespace(chat_format=SimpleNamespace(render_prompt=lambda messages, tokenizer: [1]), tokenizer=tokenizer)
    with Journal(tmp_path / "rollouts.jsonl") as journal:
        source = RolloutSource(check(RlRecipe, {"world": "miniature"}), [prompt], policy, None, journal)  # type: ignore[arg-type]
        one, other = source.samples(group)
    assert isinstance(one.advantage, np.ndarray) and isinstance(other.advantage, np.ndarray)
    assert one.advantage.max() == 1.0 and one.advantage.min() == 0.0 and other.advantage.min() == -1.0
