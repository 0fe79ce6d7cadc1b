"""Rewards of sampled answers by parts: the verifier's verdict, the form of thinking, the punishment of long answers."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from gristmill.data.chat import Message
from gristmill.data.rows import Prompt
from gristmill.generation.api import Completion
from gristmill.judge.programs import Verifier
from gristmill.train.objectives.policy_gradient import overlong_penalty
from gristmill.workflows.rl.recipe import Rewards

THINKING_ON, THINKING_OFF = "detailed thinking on", "detailed thinking off"
OPEN, CLOSE = "<think>", "</think>"
_TAG = re.compile(r"<\s*/?\s*think", re.I)


@dataclass(frozen=True)
class Reward:
    """What an answer earned, and of what.

    Attributes:
        right: 1 where its verifier passes it, whatever its form.
        form: 1 where it keeps to the form that its prompt asks for.
        overlong: 0, or down to -1.
        is_masked: it is left out of training.
    """

    right: float
    form: float
    overlong: float
    is_masked: bool = False

    @property
    def total(self) -> float:
        """A wrong form earns nothing: an added term would teach the form of wrong answers first."""
        return self.right * self.form + self.overlong


def reward_answers(
    prompts: Sequence[Prompt], answers: Sequence[Completion], verifier: Verifier, rewards: Rewards, max_tokens: int
) -> list[Reward]:
    """Rewards of answers, one prompt an answer. One that did not end is never judged: a prefix may be right by chance."""
    ended = [answer.finish == "stop" for answer in answers]
    asked = [(p.truth or {}, answer.text) for p, answer, whole in zip(prompts, answers, ended, strict=True) if whole]
    verdicts = iter(verifier.verify(asked))  # which read what is said behind the thinking
    out = []
    for prompt, answer, whole in zip(prompts, answers, ended, strict=True):
        right = float(next(verdicts)) if whole else 0.0
        keeps = rewards.form == "any" or keeps_form(answer.text, thinks(prompt.messages))
        overlong = overlong_penalty(answer.num_tokens, max_tokens, rewards.overlong_buffer) if rewards.overlong_buffer else 0.0
        out.append(Reward(right, float(keeps), overlong, is_masked=not whole and rewards.cut_off == "masked"))
    return out


def thinks(messages: Sequence[Message]) -> bool:
    """Whether a prompt's system line switches thinking on."""
    lines = [line.strip().lower() for m in messages if m.role == "system" for line in m.content.splitlines()]
    return THINKING_ON in lines


def keeps_form(text: str, thinking: bool) -> bool:
    """With thinking: one block that is not empty, in front, and a reply behind it. Without: no tag at all."""
    if not thinking:
        return not _TAG.search(text)
    body, close, reply = text.removeprefix(OPEN).partition(CLOSE)
    return text.startswith(OPEN) and bool(close and body.strip() and reply.strip()) and not _TAG.search(body) and not _TAG.search(reply)
