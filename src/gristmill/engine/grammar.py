"""Guided decoding: responses that keep to a JSON schema, a regular expression or a choice, by token masks from llguidance.

A grammar is a string; requests carry it in `SamplingParams.grammar`.
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
MAX_GRAMMAR_CHARS = 100_000  # what builds a grammar works longer than its size would suggest


def json_schema_grammar(schema: dict[str, Any]) -> str:
    """Grammar of the JSON that a schema accepts; {} for any object at all."""
    text = json.dumps(schema or {"type": "object"})
    return str(llguidance.LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_pattern": WHITESPACE}))


def regex_grammar(regex: str) -> str:
    """Grammar of the texts that a regular expression matches as a whole."""
    return str(llguidance.LLMatcher.grammar_from_regex(regex))


def choice_grammar(choices: Sequence[str]) -> str:
    """Grammar of one of these texts."""
    if not choices or not all(choices):
        raise InputError("a choice needs texts to choose from, none of them empty")
    plain = lambda c: c.isalnum() or c.isspace() or c in "_<>" or not c.isascii()  # noqa: E731
    return regex_grammar("|".join("".join(c if plain(c) else f"\\{c}" for c in one) for one in choices))


class GrammarBackend:
    """Grammars over a model's vocabulary.

    Args:
        vocab_size: of the model, which may have more embeddings than the tokenizer has tokens.
        stop_tokens: tokens that end a response: they may come where the grammar may end.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_tokens: Sequence[int]) -> None:
        self._tokenizer = llguidance.LLTokenizer(tokenizer.to_json(), n_vocab=vocab_size, eos_token=list(stop_tokens))
        self.vocab_size = vocab_size

    def validate(self, grammar: str) -> None:
        """Raise `InputError` unless it is a grammar."""
        if len(grammar) > MAX_GRAMMAR_CHARS:
            raise InputError(f"the grammar has {len(grammar):,} characters, and at most {MAX_GRAMMAR_CHARS:,} are taken")
        failed, words = llguidance.LLMatcher.validate_grammar_with_warnings(grammar, self._tokenizer)
        if failed:
            raise InputError(f"the grammar cannot be used: {' '.join(words[0].split())}")

    def new_matcher(self, grammar: str) -> "GrammarMatcher":
        """Matcher of a response that has said nothing yet."""
        return GrammarMatcher(self, llguidance.LLMatcher(self._tokenizer, grammar, log_level=0))

    def token_mask(self, matcher: llguidance.LLMatcher) -> np.ndarray:
        """Bool [V]: which tokens may come next."""
        mask = llguidance.numpy.allocate_token_bitmask(1, self.vocab_size)
        llguidance.numpy.fill_next_token_bitmask(matcher, mask)
        return np.unpackbits(mask.view(np.uint8), bitorder="little")[: self.vocab_size].astype(np.bool_)


class GrammarMatcher:
    """Grammar state of one response."""

    def __init__(self, backend: GrammarBackend, matcher: llguidance.LLMatcher) -> None:
        self._backend, self._matcher = backend, matcher

    def accept_token(self, token: int) -> str:
        """Advance by a sampled token. Returns why the grammar can say no more, where it has become too much for its limits; else ""."""
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)
        return self._matcher.get_error().strip().split("\n")[0] if self._matcher.is_error() else ""

    def token_mask(self) -> np.ndarray | None:
        """Bool [V], or None if the grammar has given up, as `accept_token` will say."""
        mask = None if self._matcher.is_error() else self._backend.token_mask(self._matcher)
        return None if self._matcher.is_error() else mask
