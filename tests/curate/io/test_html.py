"""The main text of pages says the numbers and formulas that they show, once."""

import re

import pytest

from gristmill.curate.io.html import MAX_RAISED, PageError, _written_out, main_text

MATH = "<math><semantics><mrow><msup><mi>y</mi><mn>7</mn></msup></mrow>{}</semantics></math>"
SOURCE = '<annotation encoding="application/x-tex">y^7+z</annotation>'
KATEX = '<span class="katex"><span class="katex-mathml">{}</span><span class="katex-html"><b>y</b><b>7</b></span></span>'
WIKI = (
    '<span class="mwe-math-element"><span style="display: none;">{}</span><img class="mwe-math-fallback-image-inline" alt="y^7+z"></span>'
)
MATHJAX = (
    '<span class="MathJax_Preview">y7</span><span class="MathJax" data-mathml="<math></math>"><nobr>y7+z</nobr>'
    '<span class="MJX_Assistive_MathML">{}</span></span><script type="math/tex" id="a">y^7+z</script>'
)
MATHJAX_3 = "<mjx-container class='MathJax'><mjx-math>y7</mjx-math><mjx-assistive-mml>{}</mjx-assistive-mml></mjx-container>"


def said(inner: str) -> str:
    page = f"<html><body><main><p>As the old miller wrote, {inner} is what we count with every year by the pond.</p></main></body></html>"
    found = re.fullmatch("As the old miller wrote, (.*?) ?is what we count with every year by the pond.", main_text(page), re.S)
    assert found, main_text(page)
    return found[1]


@pytest.mark.parametrize(
    ("inner", "text"),
    [
        ("30<sup>4</sup>", "30^4"),
        ("10<SUP class=x>-6</SUP>", "10^-6"),
        ("<i>10</i><b><sup>9</sup></b>", "10^9"),
        ("(a+b)<sup>2</sup>", "(a+b)^2"),
        ("e<sup>x+1</sup>", "e^{x+1}"),
        ("e<sup>i\u03c0</sup>", "e^i\u03c0"),
        ("3<sup>3<sup>2</sup></sup>", "3^{3^2}"),
        ("10<sup>5</sup>7", "10^{5}7"),
        ("log<sub>3</sub>9", "log_{3}9"),
        ("110<sub>2</sub>", "110_2"),
        ("x<sub>1</sub><sup>2</sup>", "x_1^2"),
        ("1<sup>3</sup>/<sub>4</sub>", "1 3/4"),
        ("the 21<sup>st</sup> day", "the 21st day"),
        ("flour<sup>[3]</sup>", "flour[3]"),
        ("<sup>3</sup> a note", "3 a note"),
        ("9<sup>2", "92"),  # never closed: as it is
        (MATH.format(""), "y^7"),
        (MATH.format(SOURCE), "y^7+z"),
        (KATEX.format(MATH.format(SOURCE)), "y^7+z"),
        (WIKI.format(MATH.format(SOURCE)), "y^7+z"),
        (MATHJAX.format(MATH.format("")), "y^7+z"),
        (MATHJAX_3.format(MATH.format("")), "y^7"),
        ("<math><mfrac><mn>1</mn><mrow><mi>b</mi><mo>+</mo><mn>2</mn></mrow></mfrac></math>", "1/(b+2)"),
        ("<math><mfenced><mi>a</mi><mi>b</mi></mfenced></math>", "(a, b)"),
        ("<math><mi>f</mi><mo>&#x2061;</mo><mo>(</mo><mi>x</mi><mo>)</mo></math>", "f(x)"),
        ("<math><msubsup><mo>&sum;</mo><mn>1</mn><mi>n</mi></msubsup></math>", "\u2211_1^n"),
        ("<math><mmultiscripts><mi>C</mi><mn>2</mn><none/><mprescripts/><mn>6</mn><mn>14</mn></mmultiscripts></math>", "_6^14C_2"),
        ("<math><msubsup><mi>k</mi><mn>1</mn><mn>2</mn></msubsup><mo>&lt;</mo><msqrt><mn>5</mn></msqrt></math>", "k_1^2<sqrt(5)"),
        ("<math><mn>4</mn><mn>5</mn></math>", "4 5"),
    ],
)
def test_formulas_are_written_out(inner: str, text: str) -> None:
    assert said(inner) == text


@pytest.mark.parametrize(
    ("inner", "text"),
    [
        ("<i>a</i>\u2264<i>b</i>, <i>a</i>&ge;<i>c</i>", "a\u2264b, a\u2265c"),
        ("<a>\u4e2d\u56fd</a>\u3001<b>\u65e5</b>", "\u4e2d\u56fd\u3001\u65e5"),
        ("<b>&amp;\u0431</b>, <i>\u2605</i>", "&\u0431, \u2605"),
        ("<b>\u2022</b> word\u2060joiner", "word\u2060joiner"),
    ],
)
def test_short_texts_of_elements_are_kept(inner: str, text: str) -> None:
    assert said(inner) == text


def test_pages_that_would_take_long() -> None:
    with pytest.raises(PageError, match=f"{MAX_RAISED} deep"):
        main_text("<sup>a" * (MAX_RAISED + 1))
    for hostile in ('<a "' * 100_000, "<sup " * 100_000, "<!--" * 100_000, "<script>" * 100_000, "<math>" + "<mrow>" * 900):
        assert _written_out(f"9<sup>1</sup>{hostile}").startswith("9^<sup>1</sup>")
