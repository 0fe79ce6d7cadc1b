"""The word tokenizer, with every table, against plain Python."""

import re
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gristmill.curate.text import words
from gristmill.curate.text.text_column import read_only


def cut(text: str, table: np.ndarray) -> list[tuple[str, int]]:
    """Words and hashes."""
    data = read_only(np.frombuffer(text.encode(), np.uint8))
    hash_W, start_W, stop_W = words.buffers(np.array([0, len(data)]))
    count = words.tokenize(data, 0, len(data), table, words.FNV_OFFSET, hash_W, start_W, stop_W)
    return [(bytes(data[start_W[w] : stop_W[w]]).decode(), int(hash_W[w])) for w in range(count)]


PLAIN: dict[str, tuple[Callable[[], np.ndarray], Callable[[str], list[str]], Callable[[str], str]]] = {
    "split": (words.split, str.split, str),
    "letters and marks": (words.letters_and_marks, lambda text: re.findall(r"[^\W_]+|[^\w\s]|_", text), str),
    "lower letters": (words.lower_letters, lambda text: re.findall(r"[^\W_]+", text), str.lower),
    "bytes": (lambda: words.BYTES, lambda text: re.findall(r"[A-Za-z0-9\x80-\U0010ffff]+", text), lambda word: ascii_lower(word)),
    "bytes and marks": (
        lambda: words.BYTES_AND_MARKS,
        lambda text: re.findall(r"[\u3000-\u9fff]|[!-/:-@\[-`{-~]|[A-Za-z0-9\x80-\u2fff\ua000-\U0010ffff]+", text),
        lambda word: ascii_lower(word),
    ),
}


def ascii_lower(word: str) -> str:
    return re.sub("[A-Z]", lambda found: found[0].lower(), word)


@pytest.mark.parametrize("name", PLAIN)
@given(text=st.text(st.sampled_from("aB7.,_ \n\t\x1c\u3000naïveÉé語本ж٣😀-")))
def test_words_are_those_of_plain_python(name: str, text: str) -> None:
    table, plain, folded = PLAIN[name]
    found = cut(text, table())
    assert [word for word, _ in found] == plain(text)
    hashes = {folded(word): value for word, value in found}
    assert all(hashes[folded(word)] == value for word, value in found) and len(set(hashes.values())) == len(hashes)


def test_hashes_stay() -> None:
    """Trained classifiers hold them: FNV-1a of a word's bytes, or the bytes of a mark or an ideograph as a number, through SplitMix64."""
    abc, comma = ("abc", 996580060897260808), (",", 18098828467231111927)
    assert cut("abc, \u8a9e", words.BYTES_AND_MARKS) == [abc, comma, ("\u8a9e", 14706904887240658719)]
    assert cut("abc,", words.letters_and_marks()) == [abc, (",", 12514950921433800972)]
