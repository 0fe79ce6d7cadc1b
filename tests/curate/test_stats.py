"""Statistics of a step: bins that hold what they say, shards that add up to the whole, and samples that show both sides of a limit."""

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gristmill.curate import stats
from gristmill.curate.filters.heuristics import Filter, heuristics
from gristmill.curate.outcome import Outcome, none_dropped, with_text
from gristmill.curate.stats import edge, histogram
from gristmill.curate.transforms.clean import Clean

WORDS = Filter(limits={"words": (5, 100)}, rules="fineweb")


def table(*texts: str) -> pa.Table:
    columns = {"id": [f"d{i}" for i in range(len(texts))], "text": pa.array(texts, pa.large_string())}
    return pa.table({**columns, "source": [""] * len(texts), "meta": ["{}"] * len(texts)})


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), max_size=30))
def test_every_value_is_in_its_bin(values: list[float]) -> None:
    found = histogram(np.array(values, np.float32))
    assert sum(found.values()) == sum(not np.isnan(value) for value in values)
    for value in values:
        if np.isfinite(value):
            (number,) = map(int, histogram(np.array([value])))
            low, high = sorted((edge(number - 1 if number > 0 else number + 1 if number < 0 else 0), edge(number)))
            assert low - 1e-6 * abs(low) <= value <= high + 1e-6 * abs(high)


def test_bins_by_hand() -> None:
    """Fiftieths up to 1, then four to an octave: 2 ends the fourth bin after that of 1."""
    assert histogram(np.array([0, 0.01, 0.02, 1, 2, -1, 4, np.nan])) == {"-50": 1, "0": 1, "1": 2, "50": 1, "54": 1, "58": 1}
    assert edge(54) == 2 and edge(50) == 1 and edge(-58) == -4


def test_shards_add_up_to_the_whole() -> None:
    texts = [" ".join(["word"] * count) + "." for count in range(59, 0, -1)]
    parts = [table(*texts[i : i + 13]) for i in range(0, len(texts), 13)]
    of_parts = [stats.of_step(WORDS, part, heuristics(part, WORDS), 1.0) for part in parts]
    (of_whole,) = [stats.of_step(WORDS, one, heuristics(one, WORDS), 5.0) for one in [table(*texts)]]
    whole, added = stats.add([of_whole]), stats.add(json.loads(json.dumps(of_parts)))
    assert added == whole
    assert whole["metrics"]["words"]["outside"] == 4 == whole["reasons"]["words"] and whole["metrics"]["words"]["documents"] == 59
    samples = stats.add_samples(of_parts)
    assert sorted(sample["figure"] for sample in samples["kept"]["words"]) == [5, 6], "the nearest of all shards"
    assert [sample["figure"] for sample in samples["dropped"]["words"]] == [4, 3], "the first"


def test_what_was_not_measured_is_in_no_bin() -> None:
    """N-grams of a document that an earlier rule drops are not looked at."""
    texts = table(*["short"] * 3, " ".join(f"word{i} the other and" for i in range(40)))
    settings = Filter(rules="gopher")
    metrics = stats.of_step(settings, texts, heuristics(texts, settings))["metrics"]
    assert metrics["words"]["documents"] == 4 and metrics["top_2gram"]["documents"] == 1


@pytest.mark.parametrize("dropped", [[], ["d0"]])
def test_a_change_is_shown_where_it_is(dropped: list[str]) -> None:
    before = table("first", "same", "x" * 500 + " mail a@b.c now")
    here = with_text(before, pa.array(["first", "same", "x" * 500 + " mail <EMAIL> now"]))
    gone = before.filter(pa.array([name in dropped for name in before["id"].to_pylist()]))
    kept = here.filter(pa.array([name not in dropped for name in here["id"].to_pylist()]))
    extra: dict[str, Any] = {"step": "clean", "reason": "empty", "figure": None, "limit": None}
    drops = pa.Table.from_pylist([row | extra for row in gone.to_pylist()], none_dropped().schema)
    (sample,) = stats.of_step(Clean(), before, Outcome(kept, drops, {"emails": 1}))["samples"]["kept"][""]
    assert sample["id"] == "d2" and sample["text"].startswith("...x") and "<EMAIL>" in sample["text"] and len(sample["text"]) < 150


def test_reasons_do_not_name_documents() -> None:
    rows = [{"id": f"d{i}", "text": "t", "source": "", "meta": "", "step": "exact", "reason": f"same text as a{i}\nb"} for i in range(3)]
    facts = stats.of_step(Clean(), table("t"), Outcome(table("t"), pa.Table.from_pylist(rows, none_dropped().schema)))
    assert facts["reasons"] == {"same text as another": 3} and len(facts["samples"]["dropped"]["same text as another"]) == 2
