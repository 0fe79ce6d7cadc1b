"""The text metrics are what their definitions say."""

import itertools
import math
import re
import time
import unicodedata
from collections import Counter

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gristmill.curate.filters.heuristics import RULES, Filter, heuristics
from gristmill.curate.outcome import DOCUMENT
from gristmill.curate.text.text_column import TERMINALS, TextColumn
from gristmill.curate.text.text_metrics import METRICS, compute
from gristmill.curate.text.words import CLUSTER, SINGLE, split

MARKS = ("...", "\u2026", "[...]", "(...)", "[\u2026]", "-\u00bb", "read more", "read more..")
PRIVACY = ("privacy policy", "privacy overview", "privacy cookies policy", "privacy & cookies policy", "privacy and cookies policy")
POLICIES = (*PRIVACY, "terms of use", "cookie policy", "uses cookies", "use of cookies", "use cookies")
COMMON = ("the", "be", "to", "of", "and", "that", "have", "with")
BULLETS = tuple("\u2022\u2023\u2043\u204c\u204d\u2219\u25cb\u25cf\u25d8\u25e6\u29be\u29bf")


def lower(text: str) -> str:
    return text.translate({c: c + 32 for c in range(65, 91)})


def is_letter(char: str) -> bool:
    return unicodedata.category(char).startswith("L")


def no_spaces(char: str) -> bool:
    """Whether it is a letter of a script that puts no spaces between words."""
    return bool(split()[ord(char)] & SINGLE)


def cut(text: str) -> list[str]:
    """Words of `str.split()`, and in scripts without spaces each letter with what follows it and is no letter or digit."""
    words = []
    for run in text.replace("\u1361", " ").split():  # the Ethiopic space
        for i, char in enumerate(run):
            plain = is_letter(char) or unicodedata.category(char) == "Nd"
            if i == 0 or no_spaces(char) or (plain and no_spaces(words[-1][0])):
                words.append(char)
            else:
                words[-1] += char
    return words


def joined(text: str, words: list[str]) -> list[int]:
    """1 for each word that white space stands before."""
    found, at = [], 0
    for word in words:
        begin = text.index(word, at)
        found.append(int(begin > at and begin > 0 and bool(found)))
        at = begin + len(word)
    return found


def ends(line: str) -> bool:
    while line and ord(line[-1]) >= 0x80 and unicodedata.category(line[-1]) in ("Pe", "Pf", "Pi"):
        line = line[:-1]
    return line.endswith((".", "?", "!", '"', "'", *TERMINALS)) or "\u0e00" <= line[-1:] <= "\u0eff"


def sentences(text: str) -> int:
    runs = [list(cut(run)) for run in text.split()]
    thai = sum(no_spaces(run[-1][0]) and "\u0e00" <= run[-1][-1] <= "\u0eff" for run in runs)
    words = [word for run in runs for word in run]
    marks = sum(len(re.findall(f"[{TERMINALS}]+", word)) for word in words)
    return thai + marks + sum(word.endswith((".", "!", "?")) for word in words)


def share(part: float, whole: float, of_nothing: float = 0.0) -> float:
    return part / whole if whole else of_nothing


def step(words: list[str]) -> int:
    """How many letters stand for a word in n-grams."""
    clusters = sum(bool(split()[ord(word[0])] & CLUSTER) for word in words)
    letters = sum(no_spaces(word[0]) for word in words)
    return 3 if 2 * clusters > len(words) else 2 if 2 * letters > len(words) else 1


def top(words: list[str], spaces: list[int], n: int) -> int:
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    if not grams:
        return 0
    gram, times = Counter(grams).most_common(1)[0]  # of equals, the first met
    first = grams.index(gram)
    found, i = 0, 0
    while times > 1 and i < len(grams):
        found, i = (found + 1, i + n) if grams[i] == gram else (found, i + 1)
    return found * (len("".join(gram)) + sum(spaces[first + 1 : first + n]))


def duplicate(words: list[str], spaces: list[int], n: int) -> int:
    places, at = [], 0  # of each word, in the words joined by one space where there is white space
    for word, space in zip(words, spaces, strict=True):
        at += space
        places.append((at, at + len(word)))
        at += len(word)
    seen, covered = set(), set()
    for i in range(len(words) - n + 1):
        gram = tuple(words[i : i + n])
        if gram in seen:
            covered.update(range(places[i][0], places[i + n - 1][1]))
        seen.add(gram)
    return len(covered)


def slow(text: str) -> dict[str, float]:
    """All metrics from their definitions."""
    words = cut(text)
    spaces, k = joined(text, words), step(words)
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    blocks = itertools.groupby(text.split("\n"), key=lambda line: bool(line.strip()))
    parts = ["\n".join(block).strip() for full, block in blocks if full]
    chars, small = len(text), lower(text)
    urls = [re.search(r"https?://|www\.", word, re.I | re.A) for word in words]
    url_chars = sum(len(word) - url.start() for word, url in zip(words, urls, strict=True) if url)
    lorem = float("lorem ipsum" in small)
    letters, digits = sum(map(is_letter, text)), sum(unicodedata.category(c) == "Nd" for c in text)

    def of_lines(test) -> float:  # type: ignore[no-untyped-def]
        return share(sum(bool(test(line)) for line in lines), len(lines))

    return {
        "non_alphanumeric": share(len(re.findall(r"[^a-zA-Z0-9\n?!,.]", text)), chars),
        "symbol_words": share(sum(word in MARKS or word.count("#") > len(word) / 2 for word in words), len(words)),
        "digits": share(digits, chars),
        "urls": share(url_chars, chars),
        "white_space": share(sum(text.count(c) for c in "\t\n\r\b "), chars),
        "brackets": share(sum(text.count(c) for c in "()[]{}\u27e8\u27e9"), chars),
        "policy_paragraphs": max(lorem, share(sum(any(p in lower(part) for p in POLICIES) for part in parts), len(parts))),
        "unique_lines": share(len(set(lines)), len(lines), 1),
        "unique_paragraphs": share(len(set(parts)), len(parts), 1),
        "unique_line_characters": share(sum(map(len, set(lines))), sum(map(len, lines)), 1),
        "unique_paragraph_characters": share(sum(map(len, set(parts))), sum(map(len, parts)), 1),
        "words": len(words),
        "unpunctuated_lines": of_lines(lambda line: not ends(line)),
        "words_with_letter": share(sum(any(map(is_letter, word)) for word in words), len(words), 1),
        "common_words": sum(word in COMMON for word in words),
        "mean_word": share(sum(5 if no_spaces(word[0]) else len(word) for word in words), len(words)),
        "longest_word": max(map(len, words), default=0),
        "ellipsis_lines": of_lines(lambda line: lower(line).endswith(MARKS)),
        **{f"top_{n}gram": share(top(words, spaces, n * k), chars) for n in range(2, 5)},
        **{f"duplicate_{n}gram": share(duplicate(words, spaces, n * k), chars) for n in range(2, 11)},
        "bullet_lines": of_lines(lambda line: line.startswith(BULLETS)),
        "lines": len(lines),
        "sentences": sentences(text),
        "hashes_per_word": share(text.count("#"), len(words)),
        "ellipses_per_word": share(text.count("...") + text.count("\u2026"), len(words)),
        "lorem_ipsum": lorem,
        "javascript_lines": of_lines(lambda line: "javascript" in lower(line)),
        "curly_brackets": text.count("{"),
        "short_lines": of_lines(lambda line: len(line) <= 30),
        "newlines_per_word": share(text.count("\n"), len(words)),
        "letters": share(letters, chars),
        "letters_and_digits": share(letters + digits, chars),
        "xml_header": float("<?xml version=" in lower(text[:100])),
        "mean_line": share(sum(map(len, lines)), len(lines)),
        "longest_line": max(map(len, lines), default=0),
    }


def fast(texts: list[str]) -> list[dict[str, float]]:
    return [dict(zip(METRICS, row, strict=True)) for row in compute(TextColumn.of(pa.array(texts, pa.large_string()))).tolist()]


def same(texts: list[str]) -> None:
    for text, row in zip(texts, fast(texts), strict=True):
        wanted = slow(text)
        assert list(wanted) == list(METRICS)
        assert all(math.isfinite(value) for value in row.values())
        assert row == pytest.approx(wanted, rel=0, abs=1e-9), text


LETTERS = st.sampled_from(
    ["a", "b", "c", "the", "of", "and", "to", "with", "Of", "naive", "r\u00e9sum\u00e9", "\u4e2d\u6587", "\u0627\u0644", "\u03a9"]
)
SYMBOLS = st.sampled_from(
    [
        *MARKS,
        *BULLETS,
        "#",
        "##a",
        "#a",
        "12",
        "\u0663\u0664",
        "\U0001f600",
        "\U0001d7d8",
        "{}",
        "(x)",
        "\u27e8y\u27e9",
        "end.",
        "What?!",
        '"so"',
    ]
    + ["....", "a......b", "\b", "\0", "\0be", "e\u0301", "\u00ad", "\u200b", "\u212aey", "'"]
)
PHRASES = st.sampled_from(
    [*POLICIES, "Terms of Use", "use of cookies", "Privacy Policy.", "abuses cookiesx", "my-privacy policyholder", "cookie", "privacy"]
    + ["lorem ipsum", "Lorem Ipsums", "lorem", "ipsum", "JavaScript", "(javascript)", "Read more", "xread more..", "read", "more", "more.."]
    + ["http://a.b/c", "see(https://x.y)", "www.x.org/\u00e9", "HTTP://Q", "http:/", "ww.www.z", "<?xml version='1'?>", "terms", "use"]
)
GAPS = st.sampled_from(
    [*[" "] * 12, "\n", "\n", "\n\n", "\r\n", "\r\n\r\n", "  ", "\t", "\u00a0", "\u3000", "\u2028", "\x1c", "\x85", "\n \n", "\r", ""]
)
PIECES = st.lists(st.tuples(st.one_of(LETTERS, LETTERS, LETTERS, SYMBOLS, PHRASES), GAPS), max_size=12).map(
    lambda pairs: "".join(itertools.chain.from_iterable(pairs))
)
# a few pieces, some of them again and again: lines, paragraphs and n-grams that are repeated
TEXTS = st.lists(PIECES, min_size=1, max_size=4).flatmap(
    lambda pieces: st.lists(st.tuples(st.sampled_from(pieces), GAPS), max_size=8).map(
        lambda some: "".join(itertools.chain.from_iterable(some))
    )
)


@given(st.lists(TEXTS, max_size=4))
def test_the_metrics_are_those_of_the_definitions(texts: list[str]) -> None:
    same(texts)


@given(st.lists(st.text(st.characters(codec="utf-8")), max_size=4))
def test_of_any_text(texts: list[str]) -> None:
    same(texts)


@given(st.lists(st.sampled_from("abc"), max_size=80), st.lists(st.sampled_from(["a", "bb"]), max_size=60))
def test_of_few_words_repeated_much(some: list[str], others: list[str]) -> None:
    same([" ".join(some), " ".join(others), "\n".join(some), "\n\n".join(others)])


def test_every_character_is_of_the_right_kind() -> None:
    every = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    same(["".join(every[i : i + 4096]) for i in range(0, 0x4000, 4096)])
    same([f"a{c}b" for c in every[:0x3100] if c.isspace() or unicodedata.category(c) in ("Zs", "Cc", "Cf")])


def test_repeated_ngrams_by_hand() -> None:
    first, second = fast(["a b c a b d a b e f", "one two three four one two three four five"])
    assert first["top_2gram"] == pytest.approx(9 / 19) and first["duplicate_2gram"] == pytest.approx(6 / 19)
    assert second["top_2gram"] == pytest.approx(14 / 42) and second["duplicate_2gram"] == pytest.approx(18 / 42)
    assert first["top_3gram"] == first["duplicate_3gram"] == 0
    over, apart = fast(["a a a", "a b x a b y"])
    assert over["top_2gram"] == over["duplicate_2gram"] == 3 / 5 and apart["top_2gram"] == 6 / 11


def test_repeated_lines_and_words_without_letters_by_hand() -> None:
    lines, numbers = fast(["a\nb\na", "1 2 3 4"])
    assert lines["unique_lines"] == pytest.approx(2 / 3) and numbers["words_with_letter"] == 0


def test_of_the_least_documents() -> None:
    same(["", " ", "\n", "a", ".", "\u4e2d", "\U0001f600", "one line of words", "word\n", "\n\nword\n\n"])


@pytest.mark.parametrize(
    "unit", ["x", "\u4e2d", "k", "h", "w.", "/", "#", ".", "javascrip", "cooki", "a ", "\n", "a\n", "x y\n\n", "\u3000"]
)
def test_huge_documents_take_linear_time(unit: str) -> None:
    compute(TextColumn.of(pa.array(["compiled before the clock starts"])))
    texts = TextColumn.of(pa.array([unit * (2_000_000 // len(unit.encode()))], pa.large_string()))
    begin = time.process_time()
    compute(texts)
    assert time.process_time() - begin < 2  # of it 0.05 are needed, and hours if time were of the square


LIMITS = st.tuples(st.none() | st.sampled_from([0.0, 0.5, 2.0]), st.none() | st.sampled_from([2.0, 5.0, 20.0]))


@given(st.lists(TEXTS, max_size=4), st.sampled_from(sorted(RULES)), st.dictionaries(st.sampled_from(METRICS), LIMITS, max_size=8))
def test_ngrams_are_looked_at_wherever_they_matter(texts: list[str], name: str, limits: dict[str, tuple[float, float]]) -> None:
    settings = Filter(rules=name, limits={rule.metric: (None, None) for rule in RULES[name]} | limits)  # type: ignore[arg-type]
    expected = []
    for i, figure in enumerate(fast(texts)):
        broken = [
            (str(i), rule.metric, figure[rule.metric], limit)
            for rule in settings.all_rules()
            for limit, sign in ((rule.min, -1), (rule.max, 1))
            if limit is not None and sign * (figure[rule.metric] - limit) > 0
        ]
        expected += broken[:1]
    values = {"id": [str(i) for i in range(len(texts))], "text": texts, "source": ["s"] * len(texts), "meta": ["{}"] * len(texts)}
    table = pa.table(values, schema=DOCUMENT)
    dropped = heuristics(table, settings).dropped.select(["id", "reason", "figure", "limit"]).to_pylist()
    assert [tuple(row.values()) for row in dropped] == expected


SENTENCES = {  # a sentence of each: of a river, a mill and its bridge
    "zh": "河水经过{}号磨坊，村里人在桥边等着面粉。",
    "ja": "川は{}番の水車小屋のそばを流れています。",
    "th": "แม่น้ำไหลผ่านโรงสีที่{}ในหมู่บ้าน ",
    "km": "ទន្លេហូរកាត់ភូមិ{}របស់យើង។",
    "my": "မြစ်သည်ရွာ{}ကိုဖြတ်သွားသည်။",
    "hi": "नदी {} गाँव की चक्की के पास बहती है।",
    "am": "ወንዙ {} በወፍጮው አጠገብ ይፍሳል።",
    "hy": "Գետը {} հոսում է ջրաղացի մոտ։",
    "ur": "دریا {} گاؤں کی چکی کے پاس بہتا ہے۔",
}


@pytest.mark.parametrize("language", SENTENCES)
def test_sentences_and_words_of_every_script(language: str) -> None:
    text = "\n".join(SENTENCES[language].format("abc"[i % 3] * (i + 1)) for i in range(12))
    (row,) = fast([text])
    assert row["sentences"] == 12 and row["unpunctuated_lines"] == 0
    assert 50 <= row["words"] <= len(text) and 3 <= row["mean_word"] <= 10 and row["longest_word"] <= 15
