"""The rules drop documents by their text metrics, and say by which."""

import pyarrow as pa
import pytest

from gristmill.core.config import check
from gristmill.core.errors import InputError
from gristmill.curate.filters.heuristics import RULES, Filter, heuristics
from gristmill.curate.outcome import DOCUMENT, DROPPED
from gristmill.curate.text.text_metrics import METRICS


def documents(texts: list[str], **columns: list[str]) -> pa.Table:
    values = {"id": [str(i) for i in range(len(texts))], "text": texts, "source": ["s"] * len(texts), "meta": ["{}"] * len(texts)}
    table = pa.table(values | {k: v for k, v in columns.items() if k in values}, schema=DOCUMENT)
    for name in columns.keys() - values.keys():
        table = table.append_column(name, pa.array(columns[name]))
    return table


def test_repeated_lines_and_words_without_letters_are_dropped() -> None:
    loose = {name: (None, None) for name in METRICS if name not in ("unique_lines", "words_with_letter")}
    dropped = heuristics(documents(["a\nb\na", "1 2 3 4"]), Filter(limits=loose)).dropped
    assert dropped["reason"].to_pylist() == ["unique_lines", "words_with_letter"]
    assert dropped["limit"].to_pylist() == [0.7, 0.8]


@pytest.mark.parametrize("rules", list(RULES))
def test_the_least_documents_pass_through(rules: str) -> None:
    texts = ["", " ", "\n", "a", ".", "\u4e2d", "\U0001f600", "one line of words", "word\n", "\n\nword\n\n"]
    outcome = heuristics(documents(texts), Filter(rules=rules))  # type: ignore[arg-type]
    assert outcome.kept.num_rows + outcome.dropped.num_rows == len(texts)
    empty = outcome.dropped.slice(0, 1).to_pylist()[0]
    assert empty["id"] == "0" and empty["figure"] == 0  # no word, no line or no sentence
    none = heuristics(documents([]), Filter(rules=rules))  # type: ignore[arg-type]
    assert none.kept.num_rows == none.dropped.num_rows == 0


PROSE = """The baker of the town opened his shop before dawn and sold bread to people who went to work with empty hands.
Later that morning a judge came by, bought nothing, and asked what the rolls had cost last winter.
"More than they cost now," said the baker, who remembers every price that he has ever asked.
Nobody believed him, of course, but his bread was good and so they let him talk."""


def test_the_first_rule_that_is_broken_is_the_reason() -> None:
    outcome = heuristics(documents([PROSE, "Too short.", PROSE + " 1234567890" * 30]), Filter())
    assert outcome.dropped.schema == DROPPED and outcome.kept["id"].to_pylist() == ["0"]
    short, numbers = outcome.dropped.to_pylist()
    assert (short["step"], short["reason"], short["figure"], short["limit"]) == ("filter", "words", 2, 50)
    assert (numbers["reason"], numbers["limit"]) == ("digits", 0.15) and numbers["figure"] > 0.4


def test_limits_replace_and_add_rules() -> None:
    table = documents(["too short", "brackets {", "three short words"])
    alone = Filter(rules="c4", limits={"sentences": (None, None), "unpunctuated_lines": (None, None), "words": (2, 2)})
    outcome = heuristics(table, alone)
    assert outcome.kept["id"].to_pylist() == ["0"]
    broken = [tuple(row.values()) for row in outcome.dropped.select(["reason", "figure", "limit"]).to_pylist()]
    assert broken == [("curly_brackets", 1, 0), ("words", 3, 2)]


def test_wrong_settings_are_told() -> None:
    with pytest.raises(InputError, match="'word': did you mean 'words'"):
        check(Filter, {"limits": {"word": [1, 2]}}, "filter")
    with pytest.raises(InputError, match="min of words is above"):
        check(Filter, {"limits": {"words": [3, 2]}}, "filter")
    with pytest.raises(InputError, match="both column and values"):
        check(Filter, {"column": "quality"}, "filter")
    assert {rule.metric for rules in RULES.values() for rule in rules} <= set(METRICS)


def test_only_the_documents_with_a_value_are_filtered() -> None:
    texts, settings = ["short", "short", "short"], Filter(column="quality", values=["low", "1"])
    by_column = heuristics(documents(texts, quality=["low", "high", "1"]), settings)
    by_meta = heuristics(documents(texts, meta=['{"quality": "low"}', "{}", '{"quality": 1}']), settings)
    for outcome in (by_column, by_meta):
        assert outcome.kept["id"].to_pylist() == ["1"] and outcome.dropped["id"].to_pylist() == ["0", "2"]
    assert len(heuristics(documents(texts), settings).kept) == 3, "a shard may have none of them"
    deep = '{"quality": ' + "[" * 100_000 + "]" * 100_000 + "}"
    metas = [deep, deep[:-1] + ', "quality": 1}', '{"quality": %s}' % ("9" * 5000)]
    assert len(heuristics(documents(texts, meta=metas), settings).kept) == 3, "what cannot be read has no value"
