"""Near-duplicates are found and others are not."""

import random

import pytest

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


STORY = "In the old mill {} men grind {} sacks of corn a day and each sack weighs {} pounds. How much do they grind in a week? "


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (STORY.format(3, 40, 5) * 2, STORY.format(3, 41, 5) * 2),
        (STORY.format("three", 40, 5), STORY.format("four", 40, 5)),
        (STORY.format(3, 40, 5) + "Simplify 2x + 3 at last.", STORY.format(3, 40, 5) + "Simplify 2x - 3 at last."),
        (STORY.format(3, 40, 5) + "Is a < b?", STORY.format(3, 40, 5) + "Is a > b?"),
        (STORY.format(3, 40, 5) + "Write it in C++.", STORY.format(3, 40, 5) + "Write it in C#."),
        ("\u5c0f\u660e\u6709" + "\u4e09" + "\u4e2a\u82f9\u679c\u548c\u5f88\u591a\u6734\u7d20\u7684\u68a8\u5b50" * 3,
         "\u5c0f\u660e\u6709" + "\u4e94" + "\u4e2a\u82f9\u679c\u548c\u5f88\u591a\u6734\u7d20\u7684\u68a8\u5b50" * 3),
    ],
)  # fmt: skip
def test_numbers_and_signs_make_other_texts(one: str, other: str) -> None:
    seen = NearDuplicates(0.7)
    assert seen.add(one) and seen.add(other) and not seen.add(one)


@pytest.mark.parametrize("first", [0x4E10, 0x0E01, 0x1780, 0x3041, 0x0F40, 0x1000])
def test_scripts_without_spaces_are_compared_by_letter(first: int) -> None:
    letters = [chr(first + n) for n in range(40) if chr(first + n).isalpha()][:30]
    text, changed = "".join(letters), "".join([*letters[:-1], letters[0]])
    seen = NearDuplicates(0.7)
    assert seen.add(text) and not seen.add(changed) and seen.add(text[::-1])


def test_a_hyphen_and_a_bullet_are_no_signs() -> None:
    seen = NearDuplicates(0.7)
    assert seen.add("- a well known tale of the river that runs to the sea\n- and of a bell that rings at night by the old mill")
    assert not seen.add("a well-known tale of the river that runs to the sea and of a bell that rings at night by the old mill")


def test_different_texts_are_kept() -> None:
    rng, seen = random.Random(1), NearDuplicates(0.7)
    assert all(seen.add(" ".join(rng.sample(WORDS, 12))) for _ in range(300))
