"""Near-duplicates are found and others are not."""

import random

from gristmill.synth.dedup import NearDuplicates

WORDS = [f"word{n}" for n in range(500)]


def test_equal_texts_are_found_whatever_their_case() -> None:
    seen = NearDuplicates()
    assert seen.add("What is the tide?") and not seen.add("what is the TIDE") and seen.add("What is the moon?")
    assert seen.add("") and not seen.add("") and seen.add("?!")


def test_texts_that_share_most_of_their_words_are_found() -> None:
    rng, seen, missed = random.Random(0), NearDuplicates(0.7), 0
    for _ in range(100):
        words = rng.sample(WORDS, 40)
        assert seen.add(" ".join(words))
        missed += seen.add(" ".join([*words[:39], "other"]))  # shares 37 of 39 triples
    assert missed <= 2


def test_different_texts_are_kept() -> None:
    rng, seen = random.Random(1), NearDuplicates(0.7)
    assert all(seen.add(" ".join(rng.sample(WORDS, 12))) for _ in range(300))
