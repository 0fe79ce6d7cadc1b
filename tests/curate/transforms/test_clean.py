"""Repairs of texts: each kind, what must stay as it is, and the properties that hold for any text."""

import itertools

import numpy as np
import pyarrow as pa
import pytest
from ftfy import TextFixerConfig, fix_text
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill.curate.outcome import DOCUMENT, DROPPED
from gristmill.curate.text.text_column import TextColumn
from gristmill.curate.transforms import clean as module
from gristmill.curate.transforms.clean import Clean, clean, mend, needs

FTFY = TextFixerConfig(
    unescape_html=False, uncurl_quotes=False, fix_latin_ligatures=False, fix_character_width=False, fix_line_breaks=False, explain=False
)
PIECES = [
    *"abZ09 .,;&<>\n\t\r\x00\x0b\x0c\x1b\x7f\x85\x92\xa0\xad\ufeff\u200b\u200c\u200d\u2028\u2060é",
    *("Ã©", "â€œ", "Â ", "e\u0301", "œ", "“", "”", "’", "—", "…", "•", "ВГ", "漢", "か", "\u3099", "한", "\u11a8", "🙂", "\x1b[31m"),
    *("&nbsp;", "&amp;", "&lt;", "&gt;", "&#8217;", "<br>", "</p>", "<div x>", "<i>", "</i>", "<td>", "`", '"', "    "),
    *("\n\n", "\n\n\n\n", "Privacy policy", "We use cookies", "lorem ipsum", "Text.", "import x", "```"),
]
ANY = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=3)), max_size=12).map("".join)
INERT = [*"\u2013\u2014\u2018\u2019\u201c\u201d\u2022\u2026←⇿🌀🫿\ufe0f、。ぁゖァヺ一鿿가힣", "か", "ガ", "漢", "한"]


def table(*texts: str) -> pa.Table:
    n = len(texts)
    return pa.table([[f"d{i}" for i in range(n)], list(texts), ["s"] * n, ["{}"] * n], schema=DOCUMENT)


def cleaned(text: str, **switches: bool) -> str:
    return clean(table(text + "\nEnd."), Clean(**switches)).kept["text"][0].as_py().removesuffix("\nEnd.")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("schÃ¶n", "schön"),
        ("plain\nschÃ¶n\nbleibt schön", "plain\nschön\nbleibt schön"),
        ("cafe\u0301", "café"),
        ("“curly” ﬁligature　Ｗide", "“curly” ﬁligature　Ｗide"),
        ("a\r\nb\rc\x0cd", "a\nb\nc\nd"),
        ("a\x00b\x08c\x7fd", "abcd"),
        ("\ufeffzero\u200bwidth so\u00adft", "zerowidth soft"),
        ("می\u200cخواهم 👩\u200d🔬", "می\u200cخواهم 👩\u200d🔬"),
        ("a\u200db", "ab"),
        ("\x1b[1;31mred\x1b[0m", "red"),
        ("tabs\tstay", "tabs\tstay"),
        ("fish&nbsp;&amp;&nbsp;chips", "fish & chips"),
        ("AT&amp;amp;T &#8217;s &eacute;", "AT&T ’s é"),
        ("one<br/>two</p>three", "one\ntwo\nthree"),
        ('a <span class="x">word</span> <b>bold</b>', "a word bold"),
        ("a &lt; b", "a < b"),
        ("one\n\n\n\n\ntwo\r\n\r\n\r\nthree", "one\n\ntwo\n\nthree"),
        ("two\n\nlines", "two\n\nlines"),
    ],
)
def test_repairs(text: str, expected: str) -> None:
    assert cleaned(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "The tag &lt;br&gt; breaks a line, as &amp; stands for an ampersand.",
        "Write `<br>` to break the line.",
        "Write '&nbsp;' between them.",
        "Example:\n\n    <p>Hello</p>\n",
        "```\n<br>\n```",
        "<!DOCTYPE html>\n<p>page</p>",
        "#include <map>\nstd::map<a, b> x;\nint main() {\nvector<i> y;\n}",
        "a < b and c > d, Vec<T>, List<String>, x<b>y",
        "AT&T; R&D, &unknown; ?a=1&b=2",
        "if (a <b && c> d) return;",
    ],
)
def test_code_and_texts_about_markup_stay(text: str) -> None:
    assert cleaned(text) == text


POLICY = "Read our Privacy Policy and Terms of Use."


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{POLICY}\n\nBody.\n\nMore.", "Body.\n\nMore."),
        (f"Body.\n\nMore.\n\nThis site uses cookies.\n\n{POLICY}", "Body.\n\nMore."),
        (f"{POLICY}\n\nBody.\n\n{POLICY}", "Body."),
        (f"Body.\n\n{POLICY}\n\nMore.", f"Body.\n\n{POLICY}\n\nMore."),
        (f"{POLICY}\n\nBody.\n\n{POLICY}\n\nMore.", f"{POLICY}\n\nBody.\n\n{POLICY}\n\nMore."),
        (f"{POLICY}\n\n{POLICY}", f"{POLICY}\n\n{POLICY}"),
        (POLICY, POLICY),
    ],
)
def test_policies_only_go_from_the_ends(text: str, expected: str) -> None:
    assert clean(table(text), Clean()).kept["text"].to_pylist() == [expected]


@pytest.mark.parametrize(
    ("switch", "text"),
    [("unicode", "schÃ¶n"), ("control", "a\r\nb"), ("html", "a<br>b"), ("boilerplate", f"{POLICY}\n\nBody."), ("newlines", "a\n\n\nb")],
)
def test_each_kind_can_be_switched_off_and_is_counted(switch: str, text: str) -> None:
    outcome = clean(table(text, "fine"), Clean())
    assert outcome.counts[switch] == 1 and outcome.kept["text"][1].as_py() == "fine"
    off = clean(table(text, "fine"), Clean(**{switch: False}))
    assert off.kept["text"].to_pylist() == [text, "fine"]
    assert switch not in off.counts and not any(off.counts.values())


def test_empty_documents_are_dropped_as_they_were() -> None:
    outcome = clean(table("", "kept", "\x00\n", " \t", "<br>"), Clean())
    assert outcome.kept["id"].to_pylist() == ["d1"]
    assert outcome.dropped.schema == DROPPED
    assert outcome.dropped["text"].to_pylist() == ["", "\x00\n", " \t", "<br>"]
    assert set(outcome.dropped["reason"].to_pylist()) == {"empty"}
    assert clean(table(), Clean()).kept.num_rows == 0


def test_texts_that_need_nothing_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "repair", lambda *_: pytest.fail("read"))
    texts = table("ordinary text & more < less", "dashes – “quotes”", "漢字と仮名")
    assert clean(texts, Clean()).kept.equals(texts)
    assert clean(table("a\n\n\n\nb"), Clean()).kept["text"].to_pylist() == ["a\n\nb"]


def test_a_slice_of_a_table() -> None:
    outcome = clean(table("x", "schÃ¶n", "a\n\n\nb", "y").slice(1, 2), Clean())
    assert outcome.kept["text"].to_pylist() == ["schön", "a\n\nb"]


@settings(max_examples=400)
@given(st.lists(ANY, max_size=4))
def test_cleaning_twice_is_cleaning_once(texts: list[str]) -> None:
    once = clean(table(*texts), Clean()).kept
    again = clean(once, Clean())
    assert again.kept["text"].to_pylist() == once["text"].to_pylist()
    assert not any(again.counts.values()) and again.dropped.num_rows == 0


@settings(max_examples=400)
@given(ANY)
def test_the_scan_misses_nothing(text: str) -> None:
    """A text without a need comes back from every repair as it is; so does one from the repairs that it has no need of."""
    mask = int(needs(TextColumn.of(pa.array([text])))[0])
    for bit, change in module._REPAIRS.items():
        if not mask & bit:
            assert change(text) == text


@settings(max_examples=600)
@given(ANY)
def test_mending_is_ftfy(text: str) -> None:
    assert mend(text) == fix_text(text, FTFY)


def test_ftfy_changes_no_plain_ascii_nor_inert_characters() -> None:
    """All strings of four inert characters, and of what stands for each class of ASCII in ftfy's signs, by brute force."""
    ascii = "".join(chr(c) for c in [9, 10, 12, 13, *range(32, 127)])
    assert all(fix_text(a + b, FTFY) == a + b for a in ascii for b in ascii)
    alphabet = [*INERT[:8], "、", "か", "漢", "한", "a", "A", "0", " ", "."]
    joined = "\n".join(map("".join, itertools.product(alphabet, repeat=4)))
    assert needs(TextColumn.of(pa.array([joined.replace("\n", " ")])))[0] & module.UNICODE == 0
    from ftfy.badness import is_bad

    assert not is_bad(joined) and fix_text("\n".join(INERT), FTFY) == "\n".join(INERT)


def test_every_inert_character_is_composed_and_no_sign_of_mojibake() -> None:
    every = [chr(c) for c in (*range(0x2010, 0xD7B0), 0xFE0F, *range(0x1F000, 0x20000))]
    inert = [c for c, need in zip(every, needs(TextColumn.of(pa.array(every))), strict=True) if not need & module.UNICODE]
    assert len(inert) > 30_000 and set(INERT) <= set(inert)
    rng = np.random.default_rng(0)
    text = "".join(rng.permutation(inert))
    assert fix_text(text, FTFY) == text


def test_what_is_not_suspect_is_no_sign_of_mojibake() -> None:
    """One character beyond ASCII between all that ASCII is to the signs, and two of them too far from each other."""
    from ftfy.badness import BADNESS_RE, is_bad

    wide = sorted({c for c in BADNESS_RE.pattern if not c.isascii()} | {chr(c) for c in range(0x80, 0x180)})
    ascii = "aZ0 .,?!-\n\t'\""
    for c in wide:
        if not module._SUSPECT.search(c):
            assert not is_bad("".join(f"{a}{b}{c}{d}{e}" for a, b, d, e in itertools.product("aZ ", ascii, ascii, "aZ ")))
    pairs = [f"{c}{gap}{d}a a" for c in wide for d in wide for gap in ("aa", "- ")]
    assert not is_bad("".join(pair for pair in pairs if not module._SUSPECT.search(pair)))
