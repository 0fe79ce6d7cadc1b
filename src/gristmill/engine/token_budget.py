"""Adaptive token budget of chunked prefill: prompt tokens that a step may read, so that whoever decodes does not wait long for it."""

import numpy as np

STEP_RATIO = 3.5  # a step takes at most so many times one in which all who are here, those that wait among them, decode
GPU_STEP_SECONDS = 0.02  # or so long, on a GPU, where that is more: nobody sees such a gap, and launching a prompt has its own price
IDLE_STEP_SECONDS = 0.5  # where nobody decodes: who comes meanwhile waits until its end
FIRST_PROMPT_TOKENS = 256  # while nothing is known
MIN_PROMPT_TOKENS = 16  # of a step in any case, so that prompts get on
FORGETTING = 0.97  # weight of a step beside the next: the mean looks back over some thirty steps
SCALES = np.array([1.0, 16.0, 256.0])  # of the three parts of a step, so that they count alike
RIDGE = 1e-8  # where steps are all alike, any split of their time is as good


class TokenBudget:
    """Linear model of a step's time, fitted as steps go by: a constant, a part for each decoded token and one for each prompt token.

    Errors count as shares of the step's time (recursive least squares with forgetting), so that a rare slow step says little.

    Args:
        min_step_seconds: that a step may take in any case.
    """

    def __init__(self, min_step_seconds: float = 0.0) -> None:
        self.min_step_seconds = min_step_seconds
        self._reach = 2 * MIN_PROMPT_TOKENS  # slow start: beside decoded tokens at most twice as many as ever before, as the fit is a guess
        self._moments = np.zeros((3, 3))
        self._sums = np.zeros(3)

    def observe(self, num_decoded: int, num_prompt: int, seconds: float) -> None:
        """Learn from a step that has ended: its tokens that were decoded, drafts among them, and those of prompts."""
        parts = np.array([1.0, num_decoded, num_prompt]) / SCALES / max(seconds, 1e-6)
        if num_decoded:
            self._reach = max(self._reach, 2 * num_prompt)
        self._moments = FORGETTING * self._moments + np.outer(parts, parts)
        self._sums = FORGETTING * self._sums + parts

    def prompt_tokens(self, num_decoded: int, num_waiting: int, most: int) -> int:
        """Prompt tokens that a step with so many decoded ones may read, at most `most`.

        Args:
            num_waiting: sequences that wait for their prompts. The more they are, the longer those that decode wait for them.
        """
        most = min(most, self._reach) if num_decoded else most
        scale = float(np.trace(self._moments))
        if scale == 0:
            return min(most, FIRST_PROMPT_TOKENS)
        constant, decoded, prompt = self._fit(RIDGE * scale)
        alone = constant + decoded * num_decoded
        least = max(STEP_RATIO * (alone + decoded * num_waiting), self.min_step_seconds)
        target = least if num_decoded else IDLE_STEP_SECONDS
        if prompt == 0 or prompt * most <= target - alone:  # 0: so far longer prompts have cost nothing
            return most
        return min(most, max(MIN_PROMPT_TOKENS, int((target - alone) / prompt)))

    def _fit(self, ridge: float) -> np.ndarray:
        """Seconds of each of the three parts. None is below zero: parts that would be are left out, the lowest first."""
        moments, found, kept = self._moments + ridge * np.eye(3), np.zeros(3), [0, 1, 2]
        while kept:
            values = np.linalg.solve(moments[np.ix_(kept, kept)], self._sums[kept])
            if values.min() >= 0:
                found[kept] = values
                break
            del kept[int(values.argmin())]
        return found / SCALES
