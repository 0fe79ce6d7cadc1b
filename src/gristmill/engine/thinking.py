"""Thinking budget: after so many tokens of thinking its closing tag is forced, a token a step, and the model goes on with its reply.

As in NVIDIA NIM (`max_thinking_tokens`) and vLLM (`thinking_token_budget`). Tags may be a token each or several.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gristmill.data.thinking import CLOSE, OPEN

TAIL = 16  # tokens in whose text a tag is looked for


@dataclass(frozen=True)
class ThinkingTags:
    """The tags of thinking in a model's tokens.

    Attributes:
        close: ids that spell the closing tag.
        decode: text of ids, control tokens included.
    """

    close: tuple[int, ...]
    decode: Callable[[Sequence[int]], str]


class ThinkingBudget:
    """Where a response stands in its thinking.

    Args:
        limit: most tokens between the tags.
        prompt: last ids of the prompt, whose end may open the thinking.
        begun: text of the answer that the prompt leaves open, which may stop in the midst of thinking: what is left of it has the budget.
    """

    def __init__(self, tags: ThinkingTags, limit: int, prompt: Sequence[int], begun: str = "") -> None:
        self._tags, self._limit = tags, limit
        self._is_open = begun.rfind(OPEN) > begun.rfind(CLOSE) or tags.decode(prompt).rstrip().endswith(OPEN)
        self._is_done = False
        self._ids: list[int] = []  # said so far, or thought

    def accept_token(self, token: int) -> None:
        """Advance by a token of the response."""
        if self._is_done:
            return
        self._ids.append(token)
        if self._is_open:
            self._is_done = CLOSE in self._tags.decode(self._ids[-TAIL:])
            return
        text = self._tags.decode(self._ids).lstrip()
        if text.startswith(OPEN):
            self._is_open, self._ids = True, []
        self._is_done = not self._is_open and not OPEN.startswith(text)

    def forced_token(self) -> int | None:
        """The token that must come next; None where the model may choose."""
        if self._is_done or not self._is_open or len(self._ids) < self._limit:
            return None
        close = self._tags.close
        begun = next(k for k in range(len(close) - 1, -1, -1) if not k or tuple(self._ids[-k:]) == close[:k])
        return close[begun]
