"""HTML that a model's text cannot break out of."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gristmill.report.markup import Markup, el, join, table, visible

ReadPage = Callable[[str], Any]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text())
def test_text_and_attributes_come_back_as_they_went_in(text: str, read_page: ReadPage) -> None:
    read = read_page(el("p", text, title=text))
    assert len(read.tags) == 1
    assert read.text == visible(text) and read.tags[0][1]["title"] == visible(text)


@given(st.text())
def test_nothing_invisible_is_left(text: str) -> None:
    import unicodedata

    left = {unicodedata.category(c) for c in visible(text) if c not in "\n\t\u200c\u200d"}
    assert left.isdisjoint({"Cc", "Cf", "Cs", "Zl", "Zp"})


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\u202eb", "a\u2039U+202E\u203ab"),
        ("a\x00b", "a\u2039U+0000\u203ab"),
        ("\ufeffa", "\u2039U+FEFF\u203aa"),
        ("a\u2066b\u2069", "a\u2039U+2066\u203ab\u2039U+2069\u203a"),
        ("a\r\nb\tc", "a\nb\tc"),
        ("\ud800", "\u2039U+D800\u203a"),
        ("\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"),
    ],
)
def test_control_characters_are_written_out(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_only_finished_markup_goes_in_unchanged() -> None:
    assert el("p", Markup("<b>x</b>"), "<b>", None, [1, el("br")]) == "<p><b>x</b>&lt;b&gt;1<br></p>"
    assert join("<") == "&lt;"
    assert el("p", class_="a", aria_label="b", style=None) == '<p class="a" aria-label="b"></p>'


def test_a_cell_that_only_looks_finished_is_escaped(read_page: ReadPage) -> None:
    page = table(["<th>"], [["<td><script>x</script></td>"]])
    assert "<script" not in page and [t for t, _ in read_page(page).tags].count("td") == 1
