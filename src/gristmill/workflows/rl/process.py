"""Process supervision: the steps of a trace are rewarded one by one, each beside the answers of its group that came as far.

Source: DeepSeekMath (2402.03300), section 4.1.3, with programs in place of its process reward model. Answers whose steps are all right up
to one have said the same so far. So a step needs no return of what comes after it: its own verdict against theirs is its advantage.
"""

from collections.abc import Sequence
from itertools import takewhile

import numpy as np

from gristmill.data.thinking import split_answer
from gristmill.data.tokenizer import Tokenizer
from gristmill.train.objectives.policy_gradient import Advantage, group_advantages
from gristmill.verify.verify import EQUATION


def step_verdicts(steps: Sequence[str], text: str, earned: float) -> tuple[float, ...]:
    """1 for each right step of an answer, then 0 for the first that is wrong or missing, or what the answer `earned` after all of them.

    Args:
        steps: the equations that the trace must have, in this order, and no others.
    """
    wanted = [EQUATION.findall(step)[0] for step in steps]
    found = EQUATION.findall(split_answer(text)[0])
    num_right = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(found, wanted, strict=False)))
    return (1.0,) * num_right + (earned if len(found) == num_right == len(wanted) else 0.0,)


def step_advantages(kind: Advantage, verdicts: Sequence[Sequence[float]]) -> list[list[float]]:
    """The advantage of every step of each answer, against the answers whose steps before are as right as its own."""
    out = [[0.0] * len(steps) for steps in verdicts]
    for place in range(max(map(len, verdicts))):
        reached = [i for i, steps in enumerate(verdicts) if len(steps) > place]
        for i, advantage in zip(reached, group_advantages(kind, [verdicts[i][place] for i in reached]), strict=True):
            out[i][place] = advantage
    return out


def token_advantages(tokenizer: Tokenizer, text: str, tokens: Sequence[int], steps: Sequence[float]) -> np.ndarray:
    """The advantage of each of an answer's tokens, which is that of its step, and 0 behind a wrong one."""
    ends = [len(text[: match.end()].encode()) for match in EQUATION.finditer(text)]
    places = np.cumsum([len(tokenizer.token_bytes(token, first=i == 0)) for i, token in enumerate(tokens)])
    out, begin = np.zeros(len(tokens), dtype=np.float32), 0
    for number, advantage in enumerate(steps):
        end = int(np.searchsorted(places, ends[number])) + 1 if number < len(ends) else len(tokens)
        out[begin:end] = advantage
        begin = end
    return out
