"""Adaptive token budget: steps stay short on machines of several speeds, and prompts get on."""

import random
from collections.abc import Callable

import pytest

from gristmill.engine.token_budget import GPU_STEP_SECONDS, IDLE_STEP_SECONDS, MIN_PROMPT_TOKENS, STEP_RATIO, TokenBudget

MOST = 2048
# seconds of a step with so many decoded and prompt tokens
SLOW_CPU = lambda decoded, prompt: 0.03 + 0.003 * decoded + 0.0028 * prompt  # noqa: E731
SMALL_MODEL = lambda decoded, prompt: 0.0008 + 0.00005 * decoded + 0.00003 * prompt  # noqa: E731
GPU_GRAPHS = lambda decoded, prompt: 0.003 if not prompt else 0.015 + 2e-5 * prompt  # noqa: E731  # launches cost more beside prompts


@pytest.mark.parametrize("machine", [SLOW_CPU, SMALL_MODEL, GPU_GRAPHS])
@pytest.mark.parametrize("decoded", [1, 8, 64])
def test_steps_stay_short_and_use_the_time_they_have(machine: Callable[[int, int], float], decoded: int) -> None:
    least = GPU_STEP_SECONDS if machine is GPU_GRAPHS else 0.0
    budget, draw = TokenBudget(least), random.Random(0)
    for step in range(300):
        rows = max(1, decoded + draw.randint(-3, 3)) if step > 4 else 0
        prompt = budget.prompt_tokens(rows, 0, MOST) if draw.random() < 0.7 or not rows else 0
        if draw.random() < 0.2:  # the last piece of a prompt
            prompt = min(prompt, draw.randint(1, 100))
        seconds = machine(rows, prompt)
        budget.observe(rows, prompt, seconds * draw.uniform(0.95, 1.05) * (8 if draw.random() < 0.01 else 1))
        if step > 60 and prompt > MIN_PROMPT_TOKENS:
            assert seconds < 1.3 * max(STEP_RATIO * machine(rows, 0), least)
    prompt = budget.prompt_tokens(decoded, 0, MOST)
    assert prompt == MOST or machine(decoded, prompt) > 0.6 * max(STEP_RATIO * machine(decoded, 0), least)


def test_where_nobody_decodes_a_step_is_longer() -> None:
    budget = TokenBudget()
    assert budget.prompt_tokens(0, 9, MOST) < MOST, "nothing is known yet"
    for _ in range(50):
        prompt = budget.prompt_tokens(0, 9, MOST)
        budget.observe(0, prompt, SLOW_CPU(0, prompt))
    assert SLOW_CPU(0, prompt) == pytest.approx(IDLE_STEP_SECONDS, rel=0.1)


@pytest.mark.parametrize("machine", [SLOW_CPU, SMALL_MODEL])
def test_the_first_who_decode_do_not_wait_until_a_steps_price_is_known(machine: Callable[[int, int], float]) -> None:
    budget = TokenBudget()
    budget.observe(0, 256, machine(0, 256))
    longest = 0
    for _ in range(12):
        prompt = budget.prompt_tokens(3, 2, MOST)
        assert machine(3, prompt) < 1.3 * STEP_RATIO * machine(5, 0)
        budget.observe(3, prompt, machine(3, prompt))
        longest = max(longest, prompt)
    assert machine(3, longest) > 0.8 * STEP_RATIO * machine(5, 0)


def test_those_who_wait_make_a_step_longer() -> None:
    budget, draw = TokenBudget(), random.Random(0)
    for _ in range(60):
        rows, prompt = draw.randint(1, 9), draw.choice((0, 40, 120))
        budget.observe(rows, prompt, SLOW_CPU(rows, prompt))
    for waiting in (0, 7, 40):
        prompt = budget.prompt_tokens(8, waiting, MOST)
        assert SLOW_CPU(8, prompt) == pytest.approx(STEP_RATIO * SLOW_CPU(8 + waiting, 0), rel=0.02)


def test_steps_that_no_line_fits_do_not_mislead_it() -> None:
    """Seconds of a small model's steps as they came, the dearest beside long prompts: free fits make the constant -30 ms."""
    budget = TokenBudget()
    beside = [(0, 256, 0.0374), (4, 512, 0.1172), (7, 101, 0.0366), (7, 40, 0.023)]
    for step in [*beside, (7, 0, 0.006), (7, 50, 0.0116), (7, 0, 0.005), (6, 0, 0.0045)]:
        budget.observe(*step)
    assert 40 < budget.prompt_tokens(7, 1, MOST) < 110


def test_prompts_always_get_on() -> None:
    budget = TokenBudget()
    for _ in range(50):
        budget.observe(1, 40, 1.0)
        budget.observe(1, 0, 0.01)
    assert budget.prompt_tokens(1, 0, MOST) == MIN_PROMPT_TOKENS and budget.prompt_tokens(1, 0, 3) == 3


def test_prompt_tokens_that_seem_to_cost_nothing_are_no_division_by_zero() -> None:
    """Nobody decodes, and long steps were no slower than short ones: all of a step's time seems to be its constant, above the target."""
    budget = TokenBudget()
    for _ in range(5):
        budget.observe(0, 16, 1.0)
        budget.observe(0, MOST, 0.9)
    assert budget.prompt_tokens(0, 1, MOST) == MOST
