"""Heuristic filters: rules that drop a document by its text metrics.

Sources: Gopher (2112.11446), C4 (1910.10683), FineWeb (2406.17557), StarCoder (2305.06161) for code; the English cascade is NeMo Curator's.
Shapes: N documents.
"""

import difflib
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, NamedTuple, Self

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from gristmill.core.config import Section
from gristmill.curate.outcome import Metric, Outcome, in_meta, split
from gristmill.curate.text import text_metrics
from gristmill.curate.text.repetition import DUPLICATE, TOP
from gristmill.curate.text.text_column import TextColumn
from gristmill.curate.text.text_metrics import DESCRIPTIONS, METRICS, NGRAMS

Limits = dict[str, tuple[float | None, float | None]]  # min and max of metrics; None is no limit


class Rule(NamedTuple):
    """Heuristic rule: keep a document whose metric is at least `min` and at most `max`."""

    metric: str
    min: float | None = None
    max: float | None = None


_REPEATED = (
    *(Rule(f"top_{n}gram", max=limit) for n, limit in zip(TOP, (0.2, 0.18, 0.16), strict=True)),
    *(Rule(f"duplicate_{n}gram", max=limit) for n, limit in zip(DUPLICATE[3:], (0.15, 0.14, 0.13, 0.12, 0.11, 0.1), strict=True)),
)
_UNIQUE = (
    Rule("unique_lines", min=0.7),
    Rule("unique_paragraphs", min=0.7),
    Rule("unique_line_characters", min=0.8),
    Rule("unique_paragraph_characters", min=0.8),
)
_ENGLISH = (
    Rule("non_alphanumeric", max=0.25),
    Rule("symbol_words", max=0.1),
    Rule("digits", max=0.15),
    Rule("urls", max=0.2),
    Rule("white_space", max=0.25),
    Rule("brackets", max=0.1),
    Rule("policy_paragraphs", max=0.4),
    *_UNIQUE,
    Rule("words", 50, 100_000),
    Rule("unpunctuated_lines", max=0.85),
    Rule("words_with_letter", min=0.8),
    Rule("common_words", min=2),
    Rule("mean_word", 3, 10),
    Rule("longest_word", max=1000),
    Rule("ellipsis_lines", max=0.3),
    *_REPEATED,
    Rule("bullet_lines", max=0.9),
)
RULES: dict[str, tuple[Rule, ...]] = {
    "english": _ENGLISH,
    "any-language": tuple(r for r in _ENGLISH if r.metric not in ("non_alphanumeric", "words_with_letter", "common_words")),
    "gopher": (
        Rule("words", 50, 100_000),
        Rule("mean_word", 3, 10),
        Rule("hashes_per_word", max=0.1),
        Rule("ellipses_per_word", max=0.1),
        Rule("bullet_lines", max=0.9),
        Rule("ellipsis_lines", max=0.3),
        Rule("words_with_letter", min=0.8),
        Rule("common_words", min=2),
        *_UNIQUE,
        *_REPEATED,
    ),
    "c4": (  # it takes lines away and then counts; of whole documents, most of what is left has to be good
        Rule("sentences", min=5),
        Rule("longest_word", max=1000),
        Rule("lorem_ipsum", max=0),
        Rule("curly_brackets", max=0),
        Rule("unpunctuated_lines", max=0.85),
        Rule("javascript_lines", max=0.4),
        Rule("policy_paragraphs", max=0.4),
    ),
    "fineweb": (
        Rule("words", min=1),
        Rule("unpunctuated_lines", max=0.88),
        Rule("short_lines", max=0.67),
        Rule("unique_line_characters", min=0.99),
        Rule("newlines_per_word", max=0.3),
    ),
    "code": (
        Rule("lines", 5, 20_000),
        Rule("letters", min=0.25),
        Rule("xml_header", max=0),
        Rule("mean_line", max=100),
        Rule("longest_line", max=1000),
        Rule("letters_and_digits", min=0.25),
    ),
}


def check_limits(limits: Limits, metrics: Sequence[str]) -> None:
    """Raise ValueError for a metric that is not there, or whose min is above its max."""
    for name, (low, high) in limits.items():
        if name not in metrics:
            near = difflib.get_close_matches(name, metrics, n=1, cutoff=0)
            raise ValueError(f"limits: there is no metric {name!r}: did you mean {near[0]!r}?")
        if low is not None and high is not None and low > high:
            raise ValueError(f"limits: the min of {name} is above the max")


class Filter(Section):
    """Heuristic filter: rules in their order. With a `column`, only for documents whose value there is among the `values`."""

    step: Literal["filter"] = "filter"
    rules: Literal["english", "any-language", "gopher", "c4", "fineweb", "code"] = "english"
    limits: Limits = Field({}, description="metric: [min, max], in place of the rule's or after the rules; null is no limit")
    column: str = Field("", description="of the table, or a key of `meta`")
    values: list[str] = []

    @model_validator(mode="after")
    def _known(self) -> Self:
        check_limits(self.limits, METRICS)
        if bool(self.column) != bool(self.values):
            raise ValueError("give both column and values, or neither")
        return self

    def all_rules(self) -> list[Rule]:
        """The named set with the limits in it."""
        named = {rule.metric: rule for rule in RULES[self.rules]}
        return list((named | {name: Rule(name, *limits) for name, limits in self.limits.items()}).values())


def chosen(table: pa.Table, column: str, values: Sequence[str]) -> np.ndarray:
    """bool [N]: the documents whose value of a column, or of a key of `meta`, is among the values; all if no column is named."""
    if not column:
        return np.ones(len(table), np.bool_)
    there = column in table.column_names
    found = table[column].to_pylist() if there else [in_meta(record, column) for record in table["meta"].to_pylist()]
    plain = (None if isinstance(value, list | dict) else value for value in found)  # to spell out nested ones may go too deep
    return np.array([value is not None and str(value) in values for value in plain], np.bool_)


def _before_ngrams(rules: list[Rule]) -> dict[str, tuple[float, float]] | None:
    """The limits of the rules before the first one on n-grams: no other document's n-grams can matter. None if no rule is on them."""
    of_ngrams = [rule.metric in NGRAMS for rule in rules]
    if not any(of_ngrams):
        return None
    return {
        metric: (-math.inf if low is None else low, math.inf if high is None else high)
        for metric, low, high in rules[: of_ngrams.index(True)]
    }


def heuristics(table: pa.Table, settings: Filter) -> Outcome:
    """Drop documents that break a rule. The first one in order is the reason; with it go the metric's value and the limit that it broke."""
    rules = settings.all_rules()
    metrics_NF = text_metrics.compute(TextColumn.of(table["text"]), _before_ngrams(rules))
    open_N = chosen(table, settings.column, settings.values)
    reasons: list[str | None] = [None] * len(table)
    figure_N, limit_N = np.zeros(len(table)), np.zeros(len(table))
    chosen_N, measured = open_N.copy(), {}
    ngrams_N: np.ndarray | None = None  # the documents whose n-grams were looked at
    for rule in rules:
        value_N = metrics_NF[:, METRICS.index(rule.metric)]
        if rule.metric in NGRAMS and ngrams_N is None:
            ngrams_N = open_N.copy()
        known_N = ngrams_N if rule.metric in NGRAMS and ngrams_N is not None else chosen_N
        measured[rule.metric] = Metric(np.where(known_N, value_N, np.nan), rule.min, rule.max, DESCRIPTIONS[rule.metric])
        for limit, broken_N in ((rule.min, np.less), (rule.max, np.greater)):
            if limit is None:
                continue
            for d in np.flatnonzero(open_N & broken_N(value_N, limit)).tolist():
                reasons[d], figure_N[d], limit_N[d], open_N[d] = rule.metric, value_N[d], limit, False
    return replace(split(table, "filter", reasons, figure_N, limit_N), metrics=measured)
