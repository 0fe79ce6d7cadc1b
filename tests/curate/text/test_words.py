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
    "split": (words.split, lambda text: re.findall(r"[語本](?:[^\w\s]|_)*|[^\s語本]+", text), str),
    "letters and marks": (words.letters_and_marks, lambda text: re.findall(r"[語本]|[^\W_語本]+|[^\w\s]|_", text), str),
    "lower letters": (words.lower_letters, lambda text: re.findall(r"[語本]|[^\W_語本]+", text), str.lower),
    "signs and lower": (
        words.signs_and_lower,
        lambda text: re.findall(r"[語本]|[A-Za-z0-9ïÉéж٣😀]+", text),
        lambda word: ascii_lower(word),
    ),
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
    text = re.sub("[.-]", ",", text)  # which may be signs
    found = cut(text, table())
    assert [word for word, _ in found] == plain(text)
    hashes = {folded(word): value for word, value in found}
    assert all(hashes[folded(word)] == value for word, value in found) and len(set(hashes.values())) == len(hashes)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("7 + 2, 7 - 2, 7-2, 7/2 and 7*2", "7 + 2 7 - 2 7 - 2 7 / 2 and 7 * 2"),
        ("x-y n - 1 (-x) = -4", "x - y n - 1 - x = - 4"),
        ("well-known 10-year e-mail the end - or so--it seemed -- yes", "well known 10 year e mail the end or so it seemed yes"),
        ("C++, C#; C", "c + + c # c"),
        ("a<b a > b a <= b a != b !a n!", "a < b a > b a < = b a ! = b ! a n !"),
        ("Yes! No? It's (so) e.g. 3.5", "yes no it s so e g 3 5"),
        ("- one\n* two\n+ three\n# four\n> five\n----\n***\n=====", "one two three four five"),
        ("**bold** and *so* on, 2**3", "bold and so on 2 * * 3"),
        ("and/or km/h http://a.org // note", "and or km / h http a org note"),
        ("$5 50% #1 R&D .5 --i i++", "$ 5 50 % # 1 r & d . 5 - - i i + +"),
        ("3 \u2212 4 \u20ac5 x\u00b2", "3 \u2212 4 \u20ac 5 x\u00b2"),
    ],
)
def test_signs_are_words_and_marks_of_writing_are_none(text: str, found: str) -> None:
    for table in (words.signs_and_lower(), words.lower_letters()):
        assert [word.lower() for word, _ in cut(text, table)] == found.split()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("\u6cb3\u5ddd\u3002", ["\u6cb3", "\u5ddd"]),
        ("\u304b\u308f\uff11\uff10", ["\u304b", "\u308f", "\uff11\uff10"]),
        ("\u0e19\u0e49\u0e33\u0e43\u0e2a", ["\u0e19\u0e49", "\u0e33", "\u0e43", "\u0e2a"]),
        ("\u1791\u17b9\u1780", ["\u1791\u17b9", "\u1780"]),
        ("\u101b\u1031\u1015\u102b", ["\u101b\u1031", "\u1015\u102b"]),
        ("\u0ea5\u0eb2\u0ea7", ["\u0ea5", "\u0eb2", "\u0ea7"]),
        ("\u0939\u093f\u0902\u0926\u0940 \u092d\u093e\u0937\u093e", ["\u0939\u093f\u0902\u0926\u0940", "\u092d\u093e\u0937\u093e"]),
        ("\u0645\u06cc\u200c\u0631\u0648\u0645", ["\u0645\u06cc\u200c\u0631\u0648\u0645"]),
        ("\uac15\ubb3c", ["\uac15\ubb3c"]),
    ],
)
def test_scripts_without_spaces_and_combining_marks(text: str, found: list[str]) -> None:
    for table in (words.signs_and_lower(), words.lower_letters()):
        assert [word for word, _ in cut(text, table)] == found
    assert [word for word, _ in cut(text, words.letters_and_marks())][: len(found)] == found
    assert len({value for _, value in cut(text, words.split())}) == len(found)


@given(st.text(st.sampled_from("aB1 +-=.\n\u0301\u0338\u00ad\u8a9e\u0e01\u0e49\u20ac")))
def test_equal_words_and_signs_are_equal_words_without_signs(text: str) -> None:
    table = words.lower_letters()
    expected = []
    for word, _ in cut(text, table):
        entry = table[ord(word[0])]
        if not entry & words.SINGLE or entry & (words.HAN | words.CLUSTER):
            first = next((i for i, char in enumerate(word) if not table[ord(char)] & words.JOINS), len(word))
            expected += [word[first:]] * (first < len(word))
    assert [word for word, _ in cut(text, words.lower_letters_alone())] == expected


def test_runs_of_a_million_signs_end() -> None:
    assert [word for word, _ in cut("-" * 1_000_000 + " a" + " + b" * 3, words.signs_and_lower())] == ["a", *["+", "b"] * 3]


def test_hashes_stay() -> None:
    """Trained classifiers hold them: FNV-1a of a word's bytes, or the bytes of a mark or an ideograph as a number, through SplitMix64."""
    abc, comma = ("abc", 996580060897260808), (",", 18098828467231111927)
    assert cut("abc, \u8a9e", words.BYTES_AND_MARKS) == [abc, comma, ("\u8a9e", 14706904887240658719)]
    assert cut("abc,", words.letters_and_marks()) == [abc, (",", 12514950921433800972)]
