"""Rewards of sampled answers by parts: the verifier's verdict, models, functions, the form of thinking, the punishment of length."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from gristmill.data.rows import Prompt
from gristmill.data.thinking import keeps_form, thinks
from gristmill.generation.api import Completion
from gristmill.judge.programs import Verifier
from gristmill.train.objectives.policy_gradient import overlong_penalty
from gristmill.workflows.rl.process import step_verdicts
from gristmill.workflows.rl.recipe import Rewards


@dataclass(frozen=True)
class Reward:
    """What an answer earned, and of what.

    Attributes:
        total: the weighted sum of `right` and `parts`, of which a wrong form leaves nothing above 0; and `overlong`.
        right: 1 where its verifier passes it, whatever its form.
        form: 1 where it keeps to the form that its prompt asks for.
        overlong: 0, or down to -1.
        parts: of models and functions, by name; one that does not apply is not there.
        steps: under process supervision the verdicts of its trace's steps, up to the first that is wrong.
        error: of a part that failed on it.
        is_masked: it is left out of training.
    """

    total: float
    right: float
    form: float
    overlong: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)
    error: str = ""
    is_masked: bool = False
    steps: Sequence[float] = ()


class RewardPart(Protocol):
    """A part of the reward beside the verifier's verdict: a model, or a user's function."""

    name: str
    weight: float

    def rewards(self, prompts: Sequence[Prompt], answers: Sequence[Completion]) -> Sequence[float | str | None]:
        """Of each answer its value, None where the part does not apply, or the error it ended with; `InputError` where all failed."""
        ...


class Rewarder:
    """Rewards answers by the verifier's verdict and other parts."""

    def __init__(self, rewards: Rewards, verifier: Verifier, max_tokens: int, parts: Sequence[RewardPart] = ()):
        self._rewards, self._verifier, self._max_tokens, self._parts = rewards, verifier, max_tokens, parts

    def rewards(self, prompts: Sequence[Prompt], answers: Sequence[Completion]) -> list[Reward]:
        """Rewards of answers, one prompt an answer. One that did not end is never judged: a prefix may be right by chance.

        Raises:
            InputError: a part fails on every answer.
        """
        ended = [i for i, answer in enumerate(answers) if answer.finish == "stop"]
        known = [i for i in ended if prompts[i].truth is not None]
        verdicts = self._verifier.verify([(prompts[i].truth or {}, answers[i].text) for i in known])  # what is said behind the thinking
        right = dict(zip(known, map(float, verdicts), strict=True))
        found: list[dict[str, float | str | None]] = [{} for _ in answers]
        for part in self._parts:
            values = part.rewards([prompts[i] for i in ended], [answers[i] for i in ended])
            for i, value in zip(ended, values, strict=True):
                found[i][part.name] = value
        return [self._reward(prompts[i], answers[i], right.get(i, 0.0), found[i]) for i in range(len(answers))]

    def _reward(self, prompt: Prompt, answer: Completion, right: float, found: dict[str, float | str | None]) -> Reward:
        rewards = self._rewards
        form = float(rewards.form == "any" or keeps_form(answer.text, thinks(prompt.messages)))
        buffer = rewards.overlong_buffer
        overlong = overlong_penalty(answer.num_tokens, self._max_tokens, buffer) if buffer else 0.0
        parts = {name: value for name, value in found.items() if isinstance(value, float)}
        error = next((value for value in found.values() if isinstance(value, str)), "")
        earned = rewards.verifier * right + sum(part.weight * parts[part.name] for part in self._parts if part.name in parts)
        total = (earned if form else min(0.0, earned) - rewards.form_penalty) + overlong
        masked = bool(error) or (answer.finish != "stop" and rewards.cut_off == "masked")
        return Reward(total, right, form, overlong, parts, error, masked, self._steps(prompt, answer, total if form else None))

    def _steps(self, prompt: Prompt, answer: Completion, earned: float | None) -> tuple[float, ...]:
        """Verdicts of the steps of an answer that thinks. A wrong form, or no end, leaves nothing of them."""
        steps = (prompt.truth or {}).get("steps")
        if self._rewards.supervision != "process" or not steps or not thinks(prompt.messages):
            return ()
        return (0.0,) if earned is None or answer.finish != "stop" else step_verdicts(steps, answer.text, earned)
