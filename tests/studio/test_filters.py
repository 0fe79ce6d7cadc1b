"""Row filters over Arrow tables."""

import pyarrow as pa
import pytest

from gristmill.core.errors import InputError
from gristmill.studio.filters import mask

TABLE = pa.table(
    {
        "task": ["sums", "lists", "sums", None],
        "score": [1.0, 2.5, None, 0.0],
        "good": [True, False, None, True],
        "votes": [1, 2, 3, 4],
        "text": ["Seven", 'a "quoted" one', "", None],
        "messages": [[{"role": "user", "content": c} for c in row] for row in (["one"], ["two", "SEVEN up"], [], ["x"])],
    }
)


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("", [0, 1, 2, 3]),
        ("task = sums", [0, 2]),
        ("task != sums", [1]),
        ("score < 2", [0, 3]),
        ("score >= 2.5 or votes = 3", [1, 2]),
        ("task = sums and score < 2", [0]),
        ("not task = sums", [1, 3]),
        ("good = true and (votes = 1 or votes = 4)", [0, 3]),
        ("text ~ seven", [0, 1]),
        ("text ~ '\"quoted\"'", [1]),
        ("task ~ UM and not score < 2", [2]),
        ("votes = 1 or votes = 2 and score < 1", [0]),
    ],
)
def test_filters(text: str, rows: list[int]) -> None:
    found = mask(TABLE, text)
    assert (list(range(4)) if found is None else [i for i, yes in enumerate(found.to_pylist()) if yes]) == rows


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("scor < 1", "did you mean score?"),
        ("score < one", "is a number"),
        ("score", "a sign such as"),
        ("score <", "a value"),
        ("(score < 1", "closing bracket"),
        ("score < 1 votes = 1", "`and` or `or`"),
        ("good = yes", "true or false"),
        ("text = seven", "searched with ~"),
        ("score ~ 1", "is no text"),
        ("score ! 1", "cannot be read"),
        ("(" * 60 + "score < 1", "too many brackets"),
        ("x" * 3000, "characters"),
        ("'; drop table item; --", "cannot be read"),
    ],
)
def test_what_is_no_filter_is_told(text: str, words: str) -> None:
    with pytest.raises(InputError) as refused:
        mask(TABLE, text)
    assert words in str(refused.value)
