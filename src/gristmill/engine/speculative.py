"""Speculative decoding by n-gram look-up in a sequence's own prompt and response (prompt look-up decoding).

What follows an earlier occurrence of the last tokens is a draft of the next ones. One forward pass gives the distribution behind each
of them; a token is sampled from every one in turn, and the draft holds as long as it is what was sampled. For drafts that are certain of
themselves this is the rejection sampling of Leviathan, Kalman and Matias (Fast inference from transformers via speculative decoding,
2023): a draft token is accepted with the probability that the model gives it. Since random numbers belong to positions, even sampled
tokens are those that come without drafts.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gristmill.core.errors import InputError

MAX_SPECULATIVE_TOKENS = 64
MAX_LOOKUP = 64


@dataclass(frozen=True, kw_only=True)
class SpeculativeConfig:
    """Speculative decoding settings; names are vLLM's.

    Attributes:
        num_speculative_tokens: most tokens of a draft.
        prompt_lookup_max, prompt_lookup_min: last tokens that are looked for: the more agree the better, and fewer than the least are none.

    Raises:
        InputError: a value out of its range.
    """

    num_speculative_tokens: int = 5
    prompt_lookup_max: int = 4
    prompt_lookup_min: int = 2

    def __post_init__(self) -> None:
        if not 1 <= self.num_speculative_tokens <= MAX_SPECULATIVE_TOKENS:
            raise InputError(f"num_speculative_tokens must be 1 to {MAX_SPECULATIVE_TOKENS}, got {self.num_speculative_tokens}.")
        if not 1 <= self.prompt_lookup_min <= self.prompt_lookup_max <= MAX_LOOKUP:
            raise InputError(
                f"prompt_lookup_min and prompt_lookup_max must be 1 to {MAX_LOOKUP}, the first at most the second, "
                f"got {self.prompt_lookup_min} and {self.prompt_lookup_max}."
            )

    @staticmethod
    def parse(config: "str | Mapping[str, Any] | None") -> "SpeculativeConfig | None":
        """Settings as vLLM takes them: an object, or its JSON, with method "ngram"; the word ngram alone means the defaults.

        Raises:
            InputError: they are none, or of another method.
        """
        if not config:
            return None
        if config == "ngram":
            return SpeculativeConfig()
        try:
            values = dict(json.loads(config) if isinstance(config, str) else config)
        except (ValueError, TypeError, RecursionError) as e:
            raise InputError(f"The speculative config is no JSON object: say ngram, or {EXAMPLE}.") from e
        if values.pop("method", None) != "ngram":
            raise InputError(f'The speculative config needs "method": "ngram", the only one that is implemented: {EXAMPLE}.')
        known = ("num_speculative_tokens", "prompt_lookup_max", "prompt_lookup_min")
        for name, value in values.items():
            if name not in known or type(value) is not int:
                what = "is a whole number" if name in known else f"is unknown: give {', '.join(known)}"
                raise InputError(f"{ascii(str(name)[:60])[1:-1]} of the speculative config {what}.")
        if "prompt_lookup_min" not in values:  # as with vLLM, the larger one alone may be given
            values["prompt_lookup_min"] = min(SpeculativeConfig.prompt_lookup_min, values.get("prompt_lookup_max", MAX_LOOKUP))
        values.setdefault("prompt_lookup_max", max(SpeculativeConfig.prompt_lookup_max, values["prompt_lookup_min"]))
        return SpeculativeConfig(**values)


EXAMPLE = '{"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 4}'


def propose(tokens_L: np.ndarray, num_tokens: int, *, max_ngram: int, min_ngram: int) -> np.ndarray:
    """N-gram draft: up to `num_tokens` tokens that followed the longest earlier occurrence of the last `min_ngram` to `max_ngram` tokens.

    Of equally long ones it is the latest that has so many tokens behind it, else the earliest.
    """
    last = len(tokens_L) - 1
    ends = found = np.flatnonzero(tokens_L[:last] == tokens_L[last])  # last places of occurrences, at first of one token
    agreed = 1
    while agreed < max_ngram and len(ends):
        ends = ends[ends >= agreed]
        ends = ends[tokens_L[ends - agreed] == tokens_L[last - agreed]]
        if len(ends):
            agreed, found = agreed + 1, ends
    if agreed < min_ngram or not len(found):
        return tokens_L[:0]
    whole = found[found < len(tokens_L) - num_tokens]
    start = int(whole[-1] if len(whole) else found[0]) + 1
    return tokens_L[start : start + num_tokens]
