"""Faithfulness metrics of a rephrased text: recall and support of names, numbers and words, and lengths; no model is asked.

A name is a word with a capital letter where the language asks for none: not one at the beginning of a sentence or line (unless it has
several capitals), nor in a line of capitals, nor one that stands in small letters too. In a language that writes all nouns with capitals
every noun is a name; in a script without capitals there are none. A name is found again by its first letters: America, American.

A number is what is written in digits, or in English words from three to ninety-nine thousand, ordinals too: 1,234.50 and 1234.5 are the
same, 05 is 5, the nineteenth century is the 19th. Numbers that count the points of a list do not count.
"""

import re
import unicodedata
from collections.abc import Iterator

METRICS = ("entity_recall", "number_recall", "entity_support", "number_support", "word_support", "distinct", "length")
STEM = 5  # letters

_WORD = re.compile(r"[^\W\d_]+(?:['\u2019\-][^\W\d_]+)*")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_APOSTROPHE = re.compile("['\u2019]")
_POINT = re.compile(r"^[ \t]*\(?\d{1,3}[.)][ \t]", re.M)
_THOUSANDS = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_OPENING = " \t\"'([{\u2018\u201c\u201e\u00ab*_-\u2013\u2014\u2022#>"  # may stand between the end of a sentence and the next
_STOPS = ".!?:;\u2026"
_UNITS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_ORDINALS = "zeroth first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth fifteenth"
_ORDINALS += " sixteenth seventeenth eighteenth nineteenth"
_SPELT = {word: n for words in (_UNITS, _ORDINALS) for n, word in enumerate(words.split())}
_SPELT |= {word: 10 * n for words in (_TENS, _TENS.replace("y", "ieth")) for n, word in enumerate(words.split(), 2)}
_TIMES = {"hundred": 100, "thousand": 1000, "hundredth": 100, "thousandth": 1000}


def compute(source: str, text: str, *, source_tokens: int, tokens: int) -> dict[str, float]:
    """The METRICS of a text that was made from a source, by their names.

    Returns:
        `entity_recall`, `number_recall`: share of the source's names and numbers that the text has, 1 where the source has none.
        `entity_support`, `number_support`: share of the text's that the source has, 1 where the text has none; `word_support`: of its
            different words of five letters or more.
        `distinct`: share of its runs of three words that are different ones, for each of the source's share.
        `length`: tokens of the text for each of the source.
    """
    source, text = unicodedata.normalize("NFC", source), unicodedata.normalize("NFC", text)
    return {
        "entity_recall": _share({name[:STEM] for name in entities(source)}, _stems(text)),
        "number_recall": _share(numbers(source), numbers(text, loose=True)),
        "entity_support": _share({name[:STEM] for name in entities(text)}, _stems(source)),
        "number_support": _share(numbers(text), numbers(source, loose=True)),
        "word_support": _share(_stems(text, STEM), _stems(source)),
        "distinct": _distinct(text) / _distinct(source),
        "length": tokens / max(1, source_tokens),
    }


def _share(wanted: set[str], there: set[str]) -> float:
    return len(wanted & there) / len(wanted) if wanted else 1.0


def entities(text: str) -> set[str]:
    """The names in a text, folded."""
    names: set[str] = set()
    small: set[str] = set()
    for line in text.split("\n"):
        words = list(_WORD.finditer(line))
        shouted = len(words) > 2 and line.isupper()
        for found in words:
            word = found[0].removesuffix("'s").removesuffix("\u2019s")
            if not word[0].isupper():
                small.add(_folded(word))
            elif not shouted:
                before = line[: found.start()].rstrip(_OPENING)
                alone = len(_APOSTROPHE.split(word)[0]) == 1  # I, I'm
                if (before and before[-1] not in _STOPS and not alone) or sum(map(str.isupper, word)) > 1:
                    names.add(_folded(word))
    return names - small


def _folded(word: str) -> str:
    return word.casefold().replace("\u0307", "")  # the dot of a Turkish capital


def _stems(text: str, min_letters: int = 1) -> set[str]:
    """The beginnings of all words of so many letters, folded, and of the parts of those with hyphens."""
    words = map(_folded, _WORD.findall(text))
    parts = (part for word in words for part in (word.removesuffix("'s").removesuffix("\u2019s"), *word.split("-")))
    return {part[:STEM] for part in parts if len(part) >= min_letters}


def _distinct(text: str) -> float:
    words = text.casefold().split()
    runs = list(zip(words, words[1:], words[2:], strict=False))
    return len(set(runs)) / len(runs) if runs else 1.0


def numbers(text: str, loose: bool = False) -> set[str]:
    """The numbers in a text, written in one way; `loose`: also one and two, which words often mean something else by."""
    found = set(map(_plain, _NUMBER.findall(_POINT.sub("", text))))
    return found | {str(n) for n in _spelt(text) if loose or n > 2}


def _plain(number: str) -> str:
    if not number.isascii():
        number = "".join(str(unicodedata.digit(c)) if c.isdigit() else c for c in number)
    if _THOUSANDS.fullmatch(number):
        number = number.replace(",", "")
    elif number.count(",") == 1 and "." not in number:
        number = number.replace(",", ".")
    if number.count(".") == 1 and "," not in number:
        number = number.rstrip("0").rstrip(".")
    return number.lstrip("0") or "0"


def _spelt(text: str) -> Iterator[int]:
    last = 0  # that the word before it says
    for word in _WORD.findall(text.casefold()):
        tens, _, units = word.partition("-")
        value = _SPELT.get(tens, 0)
        if tens in _SPELT:
            value += _SPELT.get(units, 0) if value >= 20 else 0
            yield value
        elif last and word in _TIMES:
            value = last * _TIMES[word]
            yield value
        last = value
