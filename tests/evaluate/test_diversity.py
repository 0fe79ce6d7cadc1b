import math
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill.core.errors import InputError
from gristmill.evaluate.diversity import LEVELS, alarms, compression, distinct, measure, rare_types, self_bleu


def tokenize(text: str) -> list[int]:
    """One token a character."""
    return [ord(c) for c in text]


def corpus(seed: int, num: int, words: int = 12, vocabulary: int = 60) -> list[str]:
    """Texts of random words, the frequent ones much more frequent."""
    rng = random.Random(seed)
    spelling = random.Random("words")
    names = ["".join(spelling.choices("abcdefghijklmnopqrstuvwxyz", k=5)) for _ in range(vocabulary)]
    weights = [1 / rank for rank in range(1, vocabulary + 1)]
    return [" ".join(rng.choices(names, weights, k=words)) for _ in range(num)]


def brute_self_bleu(ids: list[list[int]]) -> float:
    """The definition, written out: every text against a list of all others."""

    def grams(text: list[int], order: int) -> Counter[tuple[int, ...]]:
        return Counter(tuple(text[i : i + order]) for i in range(len(text) - order + 1))

    scores = []
    for i, text in enumerate(ids):
        others = ids[:i] + ids[i + 1 :]
        product, orders = 1.0, min(4, len(text))
        for order in range(1, orders + 1):
            clipped = sum(min(n, max(grams(o, order)[g] for o in others)) for g, n in grams(text, order).items())
            product *= clipped / (len(text) - order + 1)
        nearest = min((len(o) for o in others), key=lambda n: (abs(n - len(text)), n))
        scores.append(product ** (1 / orders) * min(1.0, math.exp(1 - nearest / len(text))))
    return 100 * sum(scores) / len(scores)


# ---- the metrics by hand ----


@pytest.mark.parametrize("length", [1, 2, 3, 4, 30])
def test_self_bleu_of_identical_texts_is_100(length: int) -> None:
    assert self_bleu([list(range(length))] * 3) == 100


def test_self_bleu_of_texts_with_nothing_in_common_is_0() -> None:
    assert self_bleu([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]) == 0


def test_self_bleu_clips_at_the_highest_count_of_another_text() -> None:
    # The longer text has an n-gram that the shorter lacks: 0. The shorter pays for its brevity only.
    assert self_bleu([[1, 1, 1], [1, 1]]) == pytest.approx(100 * (0 + math.exp(1 - 3 / 2)) / 2)
    assert self_bleu([[1, 1, 1], [1, 1, 1, 1]]) == pytest.approx(100 * (math.exp(1 - 4 / 3) + 0) / 2)


def test_self_bleu_does_not_count_empty_texts_and_needs_two() -> None:
    assert self_bleu([[], [1, 2], [], [1, 2]]) == 100
    assert self_bleu([[1, 2, 3]]) == self_bleu([]) == 0


def test_self_bleu_scores_a_hundred_texts_against_all() -> None:
    alone, copied = [[i * 10 + j for j in range(5)] for i in range(100)], [[-1, -2, -3, -4]] * 2
    assert self_bleu(alone + copied) == 0, "the 101st and 102nd are not scored"
    assert self_bleu([copied[0], *alone[:99], *alone[99:], copied[1]]) == pytest.approx(1), "but compared with"


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=12), min_size=2, max_size=7))
def test_self_bleu_equals_its_definition(ids: list[list[int]]) -> None:
    assert self_bleu(ids) == pytest.approx(brute_self_bleu(ids))
    assert 0 <= self_bleu(ids) <= 100 + 1e-9


@pytest.mark.parametrize("length", [4, 5, 50])
def test_distinct_of_one_repeated_token_is_one_over_the_count(length: int) -> None:
    assert distinct([[7] * length], 4) == pytest.approx(1 / (length - 3))


def test_distinct_does_not_cross_texts() -> None:
    assert distinct([[1, 2, 3, 4], [5, 6, 7, 8]], 4) == 1
    assert distinct([[1, 2], [3, 4]], 4) == 0, "no 4-gram at all"
    assert distinct([[1, 2, 1, 2, 1], [1, 2, 1, 2]], 4) == pytest.approx(2 / 3)


def test_rare_types_by_hand() -> None:
    reference = [[1, 2, 2], [3, 3, 3, 4, 4, 4, 4]]  # 2 and 3 are rare: 1 is seen once, 4 four times
    assert rare_types([[2, 9]], reference) == 0.5
    assert rare_types([[2, 3]], reference) == 1
    assert rare_types([[1, 4]], reference) == 0
    assert rare_types([[1]], [[1]]) == 0, "no rare type to keep"


def test_compression_sees_repetition() -> None:
    assert compression([]) == 0
    assert compression(["the same line"] * 200) > 20 > 6 > compression(corpus(0, 200)) > 1


# ---- one budget ----


def test_every_set_is_cut_to_one_budget() -> None:
    long, short = corpus(1, 400), corpus(2, 12)
    assert measure(long, tokenize, 1000, reference=long)["tokens"] == 1000
    in_short = len("".join(short))
    assert measure(short, tokenize, 10_000, reference=long)["tokens"] == in_short
    assert measure(long, tokenize, 10_000, reference=short)["tokens"] == in_short
    assert measure(long, tokenize, 5, reference=long)["tokens"] == 5


def test_the_cut_by_hand() -> None:
    # abcdefgh + abcd: five 4-grams and one seen before. Of aabb, a and b are rare; c lies behind the cut.
    got = measure(["abcdefgh", "abcdefgh", "xyz"], tokenize, 12, reference=["q" * 50])
    assert got["tokens"] == 12 and got["distinct_4"] == pytest.approx(5 / 6)
    assert measure(["acac", "bb"], tokenize, 4, reference=["aabbcc"])["rare_types"] == 0.5


def test_length_trap_more_text_is_not_less_variety() -> None:
    """The same source seems less varied the more of it is counted, but not on one budget."""
    few, many = corpus(3, 30), corpus(4, 600)
    uncut = [distinct([tokenize(t) for t in texts], 4) for texts in (few, many)]
    assert uncut[1] < 0.7 * uncut[0]
    a, b = (measure(texts, tokenize, 1500, reference=corpus(5, 100)) for texts in (few, many))
    assert a["tokens"] == b["tokens"] == 1500
    for name in ("distinct_4", "compression", "rare_types"):
        assert b[name] == pytest.approx(a[name], rel=0.15), name


@pytest.mark.parametrize("budget", [25, 31, 99, 100])
def test_a_text_cut_in_the_middle_is_not_scored_for_its_length(budget: int) -> None:
    assert measure(["abcdefghij"] * 10, tokenize, budget, reference=["abcdefghij"] * 10)["self_bleu"] == 100


def test_text_beyond_the_budget_changes_nothing() -> None:
    texts = corpus(6, 50)
    assert measure(texts, tokenize, 700, reference=texts) == measure([*texts, "zzzz" * 90], tokenize, 700, reference=texts)


def test_compression_counts_only_the_text_within_the_budget() -> None:
    """A long text that is cut counts with its beginning: here the repetitive part lies behind the cut."""
    start = corpus(7, 1, words=40)[0]
    cut = measure([start + "a" * 5000], tokenize, len(start), reference=[start])
    assert cut["compression"] == compression([start])


def test_a_silent_model_scores_zero_and_alarms() -> None:
    human = corpus(8, 60)
    first = measure(corpus(9, 60), tokenize_words, 600, reference=human)
    for silent in ([], ["", ""]):
        now = measure(silent, tokenize_words, 600, reference=human)
        assert now == dict.fromkeys(now, 0.0)
        assert {"distinct_4", "rare_types"} <= set(alarms(now, first))


def test_bad_input() -> None:
    with pytest.raises(InputError, match="no reference text"):
        measure(["a"], tokenize, 10, reference=[""])
    with pytest.raises(InputError, match="at least 1"):
        measure(["a"], tokenize, 0, reference=["a"])


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.text(max_size=30), max_size=8),
    st.lists(st.text(max_size=30), max_size=8),
    st.integers(1, 120),
)
def test_bounds(texts: list[str], reference: list[str], budget: int) -> None:
    if not any(reference):
        return
    got = measure(texts, lambda t: list(t.encode()), budget, reference=reference)
    assert set(got) == {"distinct_4", "self_bleu", "compression", "rare_types", "tokens"}
    sizes = [sum(len(t.encode()) for t in s) for s in (texts, reference)]
    assert got["tokens"] == min(budget, *sizes)
    assert 0 <= got["distinct_4"] <= 1 and 0 <= got["rare_types"] <= 1 and 0 <= got["self_bleu"] <= 100 + 1e-9
    assert math.isfinite(got["compression"]) and got["compression"] >= 0
    assert alarms(got, got) == []


# ---- alarms ----


def test_a_healthy_corpus_does_not_alarm_and_a_collapsed_one_does() -> None:
    human, healthy = corpus(10, 200), corpus(11, 200)
    first = measure(human, tokenize_words, 2000, reference=corpus(12, 200))
    assert alarms(measure(healthy, tokenize_words, 2000, reference=corpus(12, 200)), first) == []
    collapsed = random.Random(0).choices(corpus(13, 5), k=200)
    assert set(alarms(measure(collapsed, tokenize_words, 2000, reference=corpus(12, 200)), first)) == {
        "distinct_4",
        "self_bleu",
        "compression",
        "rare_types",
    }


def test_a_lost_tail_is_seen_by_rare_types_alone() -> None:
    """Varied sentences of the frequent words only: nothing repeats, the rare words are gone."""
    rng = random.Random(1)
    reference = corpus(14, 100, vocabulary=400)
    frequent = [w for w, _ in Counter(" ".join(reference).split()).most_common(60)]
    tail_lost = [" ".join(rng.choices(frequent, k=12)) for _ in range(100)]
    first = measure(corpus(15, 100, vocabulary=400), tokenize_words, 1200, reference=reference)
    assert alarms(measure(tail_lost, tokenize_words, 1200, reference=reference), first) == ["rare_types"]


def tokenize_words(text: str) -> list[int]:
    return [int.from_bytes(w.encode(), "big") for w in text.split()]


FIRST = {
    "distinct_4": 0.8,
    "self_bleu": 20.0,
    "compression": 2.0,
    "rare_types": 0.6,
    "human_nll": 2.0,
    "base_nll": 1.0,
}


@pytest.mark.parametrize(
    ("name", "fine", "bad"),
    [
        ("distinct_4", 0.57, 0.55),
        ("self_bleu", 44.9, 45.1),
        ("compression", 2.99, 3.01),
        ("rare_types", 0.31, 0.29),
        ("human_nll", 2.99, 3.01),
        ("base_nll", 0.51, 0.49),
    ],
)
def test_each_level(name: str, fine: float, bad: float) -> None:
    assert alarms({**FIRST, name: fine}, FIRST) == []
    assert alarms({**FIRST, name: bad}, FIRST) == [name]
    assert alarms({**FIRST, name: math.nan}, FIRST) == [name], "a diverged model"


def test_the_good_direction_never_alarms() -> None:
    better = {
        "distinct_4": 1.0,
        "self_bleu": 0.0,
        "compression": 1.0,
        "rare_types": 1.0,
        "human_nll": 0.1,
        "base_nll": 9.0,
    }
    assert alarms(better, FIRST) == []


def test_missing_monitors_are_skipped_and_levels_can_be_given() -> None:
    assert set(LEVELS) == set(FIRST)
    assert alarms({"distinct_4": 0.1, "tokens": 5.0}, {"distinct_4": 0.8}) == ["distinct_4"]
    assert alarms({"distinct_4": 0.1}, {"self_bleu": 5.0}) == []
    assert alarms({"distinct_4": 0.7, "self_bleu": 99.0}, FIRST, {"distinct_4": 0.9}) == ["distinct_4"]
