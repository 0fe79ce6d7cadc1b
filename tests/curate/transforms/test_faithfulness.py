"""Names, numbers and lengths of a text beside those of its source."""

import unicodedata

import pytest

from gristmill.curate.transforms.faithfulness import METRICS, compute, entities, numbers

SOURCE = (
    "THE HISTORY OF THE BRIDGE\n"
    "The bridge over the Firth of Forth was designed by John Fowler and Benjamin Baker. Work began in 1882, and about 4,600 men built\n"
    "it in seven years. Its spans are 521.3 metres long. On 4 March 1890 the Prince of Wales drove home the last rivet.\n"
    "Today trains of ScotRail cross the bridge; the RAIL board's painters never rest."
)


def measured(source: str, text: str, source_tokens: int, tokens: int) -> dict[str, float]:
    return compute(source, text, source_tokens=source_tokens, tokens=tokens)


def test_names_are_capitals_that_no_sentence_asks_for() -> None:
    assert entities(SOURCE) == {"firth", "forth", "john", "fowler", "benjamin", "baker", "march", "prince", "wales", "scotrail", "rail"}
    assert entities("Who is it? Nobody. \u201cNobody,\u201d said I. - Perhaps") == set()
    assert entities("We went to Paris, and I'm sure that I\u2019ve seen what O'Brien and I saw.") == {"paris", "o'brien"}
    assert entities("") == entities("1234 ...") == entities("\u6771\u4eac\u306f\u65e5\u672c") == set()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("1,234.50 and 1234.5", {"1234.5"}),
        ("05 5 5.0 five", {"5"}),
        ("3,14", {"3.14"}),
        ("1.2.3 of 12/05/2020", {"1.2.3", "12", "5", "2020"}),
        ("one of two, or twenty-five of the sixty", {"25", "60"}),
        ("the nineteenth century, the twenty-first tower, two hundred years", {"19", "21", "200"}),
        ("1. alpha\n2) beta\n(3) gamma\n4 delta", {"4"}),
        ("\u0661\u0662", {"12"}),
        ("0.0 00 0,50", {"0", ".5"}),
        ("", set()),
    ],
)
def test_numbers_are_written_in_one_way(text: str, found: set[str]) -> None:
    assert numbers(text) == found
    assert numbers("one or two", loose=True) == {"1", "2"}


def test_the_source_itself_is_true_to_itself() -> None:
    assert measured(SOURCE, SOURCE, 80, 80) == dict.fromkeys(METRICS, 1.0)
    assert measured("", "", 0, 0)["entity_recall"] == 1.0


def test_other_words_for_the_same_are_true() -> None:
    same = (
        "Designed by Benjamin Baker and John Fowler, the bridge across the Firth of Forth was begun in 1882; some 4600 men needed 7 years. "
        "Each span measures 521.3 m. The last rivet was driven by the Prince of Wales on 4 March 1890. It is crossed by ScotRail trains."
    )
    found = measured(SOURCE, same, 80, 60)
    assert found["entity_recall"] >= 0.9 and found["number_recall"] == found["number_support"] == found["entity_support"] == 1.0
    assert found["length"] == 0.75


def test_what_is_lost_and_what_is_made_up_shows() -> None:
    lost = measured(SOURCE, "A bridge was built over the water by many men long ago. It is crossed by trains of ScotRail.", 80, 20)
    assert lost["entity_recall"] < 0.3 and lost["number_recall"] == 0.0 and lost["number_support"] == lost["entity_support"] == 1.0
    about = measured(SOURCE, "The paragraph is rewritten clearly, keeping its original meaning. " * 4, 80, 40)
    assert about["word_support"] == 0.0 and about["distinct"] < 0.3 and about["entity_support"] == about["number_support"] == 1.0
    invented = measured(
        SOURCE,
        "The bridge was designed by Gustave Eiffel and took 12 years; it opened in 1894 in Paris, with Queen Anne.",
        80,
        20,
    )
    assert invented["number_support"] == 0.0 and invented["entity_support"] == 0.0


@pytest.mark.parametrize(
    "text", ["In 1453 the city of \u0130stanbul fell and \u0130zmir did not.", "From Zu\u0308rich to Mu\u0308nchen it is far."]
)
def test_letters_with_marks_are_found_again(text: str) -> None:
    assert len(entities(text)) == 2
    found = measured(text, unicodedata.normalize("NFC", text), 10, 10)
    assert found["entity_recall"] == found["entity_support"] == found["word_support"] == 1.0
