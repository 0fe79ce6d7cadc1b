"""What the kernels know of characters, and columns as they see them."""

import sys
import unicodedata

import pyarrow as pa
import pytest

from gristmill.curate.text.text_column import (
    CLOSER,
    COMBINING,
    DIGIT,
    LETTER,
    NUMERIC,
    SPACE,
    SYMBOL,
    TERMINAL,
    TERMINALS,
    TextColumn,
    char_classes,
)


def test_classes_are_pythons() -> None:
    table = char_classes()
    for point in range(sys.maxunicode + 1):
        char = chr(point)
        kind = unicodedata.category(char)
        expected = SPACE * char.isspace() | LETTER * (kind[0] == "L") | DIGIT * char.isdecimal() | COMBINING * (kind[0] == "M")
        if point >= 0x80:
            expected |= SYMBOL * (kind in ("Sm", "Sc")) | CLOSER * (kind in ("Pe", "Pf", "Pi")) | TERMINAL * (char in TERMINALS)
        assert int(table[point]) & ~NUMERIC == expected, hex(point)
        assert bool(table[point] & NUMERIC) == (unicodedata.numeric(char, None) is not None), hex(point)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_texts_of_any_column(kind: pa.DataType) -> None:
    array = pa.array(["a", "", "naïve", "語"], kind)
    for column, expected in (
        (array, 4),
        (array.slice(1, 2), 2),
        (pa.chunked_array([array, array.slice(2)]), 6),
        (pa.chunked_array([], kind), 0),
    ):
        texts = TextColumn.of(column)
        assert len(texts) == expected == len(texts.sizes_N)
        assert [bytes(texts.bytes_of(i)).decode() for i in range(expected)] == column.to_pylist()
