"""Responses that keep to a JSON schema, a regular expression or a choice: the tokens that may come next, from llguidance.

A constraint is a grammar, a string; requests carry it in `SamplingParams.grammar`.
"""

import json
from collections.abc import Sequence
from typing import Any

import llguidance
import llguidance.numpy
import numpy as np

from gristmill.core.errors import InputError
from gristmill.data.tokenizer import Tokenizer

WHITESPACE = r"(?:\x20|\x0A\x20{0,16})"  # of JSON, at one place; small models would otherwise go on with it for ever
LARGEST_GRAMMAR = 100_000  # characters: what builds a grammar works longer than its size would suggest


def of_json_schema(schema: dict[str, Any]) -> str:
    """JSON that a schema accepts; {} for any object at all."""
    text = json.dumps(schema or {"type": "object"})
    return str(llguidance.LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_pattern": WHITESPACE}))


def of_regex(regex: str) -> str:
    """Text that a regular expression matches as a whole."""
    return str(llguidance.LLMatcher.grammar_from_regex(regex))


def of_choice(choices: Sequence[str]) -> str:
    """One of these texts."""
    if not choices or not all(choices):
        raise InputError("a choice needs texts to choose from, none of them empty")
    plain = lambda c: c.isalnum() or c.isspace() or c in "_<>" or not c.isascii()  # noqa: E731
    return of_regex("|".join("".join(c if plain(c) else f"\\{c}" for c in one) for one in choices))


class Constraints:
    """What grammars mean to a model.

    Args:
        vocab_size: of the model, which may have more embeddings than the tokenizer has tokens.
        stops: tokens that end a response: they may come where the grammar may end.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stops: Sequence[int]) -> None:
        self._tokenizer = llguidance.LLTokenizer(tokenizer.to_json(), n_vocab=vocab_size, eos_token=list(stops))
        self.vocab_size = vocab_size

    def check(self, grammar: str) -> None:
        """Raise `InputError` unless it is a grammar."""
        if len(grammar) > LARGEST_GRAMMAR:
            raise InputError(f"the grammar has {len(grammar):,} characters, and at most {LARGEST_GRAMMAR:,} are taken")
        failed, words = llguidance.LLMatcher.validate_grammar_with_warnings(grammar, self._tokenizer)
        if failed:
            raise InputError(f"the grammar cannot be used: {' '.join(words[0].split())}")

    def begin(self, grammar: str) -> "Matcher":
        """A response that has said nothing yet."""
        return Matcher(self, llguidance.LLMatcher(self._tokenizer, grammar, log_level=0))

    def allowed(self, matcher: llguidance.LLMatcher) -> np.ndarray:
        """Bool [V]: which tokens may come next."""
        mask = llguidance.numpy.allocate_token_bitmask(1, self.vocab_size)
        llguidance.numpy.fill_next_token_bitmask(matcher, mask)
        return np.unpackbits(mask.view(np.uint8), bitorder="little")[: self.vocab_size].astype(np.bool_)


class Matcher:
    """One response under a grammar."""

    def __init__(self, constraints: Constraints, matcher: llguidance.LLMatcher) -> None:
        self._constraints, self._matcher = constraints, matcher

    def add(self, token: int) -> str:
        """The token that was drawn. Returns why the grammar can say no more, where it has become too much for its limits; else ""."""
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)
        return self._matcher.get_error().strip().split("\n")[0] if self._matcher.is_error() else ""

    def allowed(self) -> np.ndarray | None:
        """Bool [V], or None if the grammar has given up, as `add` will say."""
        mask = None if self._matcher.is_error() else self._constraints.allowed(self._matcher)
        return None if self._matcher.is_error() else mask
