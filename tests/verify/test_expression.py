"""Expressions that are the same however they are written, and those that only look so."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gristmill.verify.expression import expression_value
from gristmill.verify.math import is_equiv


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("\\frac{x+1}{2}", "(x+1)/2"),
        ("\\frac{x}{2}+\\frac12", "\\frac{1+x}{2}"),
        ("2\\sqrt{3}", "\\sqrt{12}"),
        ("\\frac{\\sqrt2}{2}", "1/\\sqrt2"),
        ("\\sqrt[3]{2}", "2^{1/3}"),
        ("\\sqrt[3]{-8}", "-2"),
        ("(x-1)(x+1)", "x^2-1"),
        ("(a+b)^2", "a^2 + 2ab + b^2"),
        ("x^{10}", "x^10"),
        ("2^{n+1}", "2 \\cdot 2^n"),
        ("x^{-2}", "\\frac{1}{x^2}"),
        ("e^{2x}", "(e^x)^2"),
        ("\\ln 4", "2\\ln 2"),
        ("\\log_2 8", "3"),
        ("\\sin\\frac{\\pi}{6}", "1/2"),
        ("\\sin^2 x + \\cos^2 x", "1"),
        ("\\tan\\theta", "\\frac{\\sin\\theta}{\\cos\\theta}"),
        ("0.\\overline{3}", "1/3"),
        ("0.1\\overline{6}", "1/6"),
        ("\\binom{5}{2}", "10"),
        ("5!", "120"),
        ("(n+1)!", "(n+1) \\cdot n!"),
        ("|x-1|", "|1-x|"),
        ("(1+i)(1-i)", "2"),
        ("3+4i", "4i+3"),
        ("x_1 + x_2", "x_2 + x_1"),
        ("2\\pi r", "\\pi \\cdot 2r"),
        ("(\\sqrt{2}+1, 1)", "(1+\\sqrt2, 1.0)"),
        ("\\frac{a}{b}", "a/b"),
    ],
)
def test_the_same_expression(a: str, b: str) -> None:
    assert is_equiv(a, b) and is_equiv(b, a)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("x", "y"),
        ("x+1", "x-1"),
        ("2x", "x^2"),
        ("\\sqrt{x^2}", "x"),
        ("\\sin x", "\\cos x"),
        ("\\frac{1}{2004!}", "\\frac{1}{2006!}"),
        ("e^{-200}", "e^{-300}"),
        ("1 - \\frac{1}{\\mathrm{e}}", "1 + \\frac{1}{\\mathrm{e}}"),
        ("10^{50}+1", "10^{50}+2"),
        ("0.999999999999999999999999", "1"),
        ("1.41421356", "\\sqrt2"),
        ("3.14159", "\\pi"),
        ("4", "4\\sqrt(2)"),
        ("1/2x", "x/2"),
        ("x1", "1x"),
        ("no", "on"),
        ("3 or 4x", "4x or 3x"),
    ],
)
def test_other_expressions(a: str, b: str) -> None:
    assert not is_equiv(a, b) and not is_equiv(b, a)


@given(st.integers(-99, 99), st.integers(-99, 99), st.integers(1, 99))
def test_a_polynomial_is_its_factors(a: int, b: int, c: int) -> None:
    product, expanded = f"{c}(x+({a}))(x+({b}))", f"{c}x^2+({c * (a + b)})x+({a * b * c})"
    assert is_equiv(product, expanded) and not is_equiv(product, expanded + "+1")


@given(st.text(alphabet="x12+-*/^(){}! ", max_size=30) | st.text(max_size=30))
def test_any_text_has_a_value_or_none(text: str) -> None:
    hash(expression_value(text))


@pytest.mark.parametrize(
    "text", ["", "x+", "(x", "1/0", "x/(x-x)", "a thing", "--x", "x^", "2 3", "\\foo x", "9^9^9^9", "3000!", "e^{e^{e^9}}"]
)
def test_what_is_no_expression(text: str) -> None:
    assert expression_value(text) is None


def test_a_rational_value_is_a_fraction() -> None:
    assert expression_value("(1+1)/6") == Fraction(1, 3) and expression_value("\\sqrt{\\frac{4}{9}}") == Fraction(2, 3)
