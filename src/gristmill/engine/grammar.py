"""Guided decoding: responses that keep to a JSON schema, a regular expression or a choice, by token masks from llguidance.

A grammar is a string; requests carry it in `SamplingParams.grammar`.
"""

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import llguidance
import llguidance.numpy
import numpy as np

from gristmill.core.errors import InputError
from gristmill.data.tokenizer import Tokenizer

WHITESPACE = r"(?:\x20|\x0A\x20{0,16})"  # of JSON, at one place; small models would otherwise go on with it for ever
MAX_GRAMMAR_CHARS = 100_000  # what builds a grammar works longer than its size would suggest
MAX_GRAMMAR_SECONDS = 4.0  # of a processor, to build it and its first mask
MAX_MASK_SECONDS = 0.1  # a token
MAX_CACHED_GRAMMARS = 16
MAX_ERROR_CHARS = 300
LIMITS = llguidance.LLParserLimits(max_lexer_states=50_000)  # each takes a kilobyte or two


def json_schema_grammar(schema: dict[str, Any]) -> str:
    """Grammar of the JSON that a schema accepts; {} for any object at all."""
    schema = schema or {"type": "object"}
    guidance = schema.get("x-guidance")
    schema = schema | {"x-guidance": (guidance if isinstance(guidance, dict) else {}) | {"whitespace_pattern": WHITESPACE}}
    return json.dumps({"grammars": [{"name": "json_schema", "json_schema": schema}]})


def regex_grammar(regex: str) -> str:
    """Grammar of the texts that a regular expression matches as a whole."""
    _check_size(len(regex))
    return str(llguidance.LLMatcher.grammar_from_regex(regex))


def choice_grammar(choices: Sequence[str]) -> str:
    """Grammar of one of these texts."""
    if not choices or not all(choices):
        raise InputError("a choice needs texts to choose from, none of them empty")
    _check_size(sum(map(len, choices)) + len(choices))
    plain = lambda c: c.isalnum() or c.isspace() or c in "_<>" or not c.isascii()  # noqa: E731
    return regex_grammar("|".join("".join(c if plain(c) else f"\\{c}" for c in one) for one in choices))


def _check_size(num_chars: int) -> None:
    if num_chars > MAX_GRAMMAR_CHARS:
        raise InputError(f"the grammar has {num_chars:,} characters, and at most {MAX_GRAMMAR_CHARS:,} are taken")


class GrammarBackend:
    """Grammars over a model's vocabulary. The last ones are kept as they were built: building takes long, a copy does not.

    Args:
        vocab_size: of the model, which may have more embeddings than the tokenizer has tokens.
        stop_tokens: tokens that end a response: they may come where the grammar may end.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_tokens: Sequence[int]) -> None:
        self._tokenizer = llguidance.LLTokenizer(tokenizer.to_json(), n_vocab=vocab_size, eos_token=list(stop_tokens))
        self.vocab_size = vocab_size
        self._lock = threading.Lock()
        self._built: OrderedDict[str, llguidance.LLMatcher | str] = OrderedDict()  # a matcher, or why there is none

    def validate(self, grammar: str) -> None:
        """Raise `InputError` unless it is a grammar, and one that can be kept to without holding others up."""
        self._matcher(grammar)

    def new_matcher(self, grammar: str) -> "GrammarMatcher":
        """Matcher of a response that has said nothing yet."""
        return GrammarMatcher(self, self._matcher(grammar))

    def token_mask(self, matcher: llguidance.LLMatcher) -> np.ndarray:
        """Bool [V]: which tokens may come next."""
        mask = llguidance.numpy.allocate_token_bitmask(1, self.vocab_size)
        llguidance.numpy.fill_next_token_bitmask(matcher, mask)
        return np.unpackbits(mask.view(np.uint8), bitorder="little")[: self.vocab_size].astype(np.bool_)

    def _matcher(self, grammar: str) -> llguidance.LLMatcher:
        """Copy of a grammar's matcher, which is built unless it is among the last ones."""
        with self._lock:
            found = self._built.get(grammar)
        if found is None:
            _check_size(len(grammar))
            found = self._build(grammar)
        with self._lock:
            self._built[grammar] = found
            self._built.move_to_end(grammar)
            if len(self._built) > MAX_CACHED_GRAMMARS:
                self._built.popitem(last=False)
            if not isinstance(found, str):
                return found.deep_copy()
        raise InputError(f"the grammar cannot be used: {found}")

    def _build(self, grammar: str) -> llguidance.LLMatcher | str:
        """A matcher with its first mask, or why there is none. The library lets other threads run meanwhile."""
        started = time.thread_time()
        matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0, limits=LIMITS)
        if not matcher.is_error():
            self.token_mask(matcher)
        if matcher.is_error():
            return " ".join(matcher.get_error().split("<state>")[0].split())[:MAX_ERROR_CHARS]
        built = time.thread_time()
        self.token_mask(matcher)
        if built - started > MAX_GRAMMAR_SECONDS or time.thread_time() - built > MAX_MASK_SECONDS:
            return "it takes too long to build, or at every token: make it simpler"
        return matcher


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
