"""Rewards: every way round the form earns nothing, and what did not end is never judged."""

import pytest

from gristmill.data.chat import Message
from gristmill.data.rows import Prompt
from gristmill.data.thinking import THINKING_OFF, THINKING_ON
from gristmill.generation.api import Completion
from gristmill.judge.programs import Verifier
from gristmill.workflows.rl.recipe import Rewards
from gristmill.workflows.rl.rewards import Reward, Rewarder

TRUTH = {"kind": "number", "value": 7}


def earned(text: str, *, on: bool = True, finish: str = "stop", num_tokens: int = 5, **rewards: object) -> Reward:
    system = Message("system", THINKING_ON if on else THINKING_OFF)
    prompt = Prompt("p", "sums", (system, Message("user", "3 and 4?")), "file", (), TRUTH)
    answer = Completion(text, num_tokens, (), finish)  # type: ignore[arg-type]
    (reward,) = Rewarder(Rewards.model_validate({"form": "thinking", **rewards}), Verifier(), 10).rewards([prompt], [answer])
    return reward


def test_a_thought_and_a_right_reply_earn_all() -> None:
    assert earned("<think>3 + 4 = 7</think>The answer is 7.").total == 1
    assert earned("The answer is 7.", on=False).total == 1


@pytest.mark.parametrize(
    "text",
    [
        "The answer is 7.",
        "<think></think>The answer is 7.",
        "<think> \n </think>The answer is 7.",
        "<think>The answer is 7.</think>",
        "<think>The answer is 7.</think>  ",
        "<think>The answer is 7.",
        "7</think>The answer is 7.",
        "So: <think>3 + 4</think>The answer is 7.",
        "<think>3<think>4</think>The answer is 7.",
        "<think>3</think><think>4</think>The answer is 7.",
        "<think>3 + 4</think>The answer is 7.</think>",
        "<think>3 + 4</think>The < THINK > answer is 7.",
        "<think>3 + 4 = 7</think>The answer is 8.",
        "<think>the answer is 7</think>I do not know.",
    ],
)
def test_a_form_that_is_only_feigned_earns_nothing(text: str) -> None:
    assert earned(text).total == 0


def test_thinking_that_is_switched_off_earns_nothing() -> None:
    assert earned("<think>3 + 4 = 7</think>The answer is 7.", on=False).total == 0
    assert earned("The answer is 7.</think>", on=False).total == 0


def test_a_right_prefix_that_was_cut_off_earns_nothing_or_is_left_out() -> None:
    cut = earned("<think>3 + 4 = 7</think>The answer is 7", finish="length")
    assert cut.total == 0 and cut.right == 0 and not cut.is_masked
    assert earned("x", finish="length", cut_off="masked").is_masked


def test_long_answers_are_punished_over_the_buffer() -> None:
    text = "<think>3 + 4 = 7</think>The answer is 7."
    assert [earned(text, num_tokens=n, overlong_buffer=4).total for n in (6, 8, 10)] == [1.0, 0.5, 0.0]
