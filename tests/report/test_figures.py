"""Figures keep to their frame and show what they are given."""

import re
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gristmill.evaluate.stats import accuracy
from gristmill.report.figures import Series, accuracy_bars, funnel, histogram, monitor_plot, stage_plot


def coordinates(page: str) -> Iterator[tuple[str, float]]:
    """Every x and y in a figure, with the axis."""
    for name, value in re.findall(r'\b(x|y|x1|x2|y1|y2|cx|cy)="([-\d.]+)"', page):
        yield ("x" if "x" in name else "y"), float(value)
    for points in re.findall(r'points="([^"]*)"', page):
        for point in points.split():
            x, y = point.split(",")
            yield "x", float(x)
            yield "y", float(y)


def inside(page: str) -> bool:
    _, _, width, height = map(float, re.search(r'viewBox="([^"]*)"', page)[1].split())  # type: ignore[index]
    return all(-0.1 <= value <= (width if axis == "x" else height) + 0.1 for axis, value in coordinates(page))


@pytest.mark.parametrize("small", [False, True])
@given(rights=st.lists(st.integers(0, 20), min_size=1, max_size=14))
def test_stage_plots_stay_in_their_frame(small: bool, rights: list[int]) -> None:
    scores = [accuracy([i < r for i in range(20)]) for r in rights]
    series = [Series("greedy", scores), Series("sampled", scores[::-1], frozenset({0}))]
    page = stage_plot([f"stage {i}" for i in range(len(rights))], [i // 4 for i in range(len(rights))], series, small=small)
    assert inside(page)
    assert page.count("<circle") == 2 * len(rights) and page.count("whisker") == 2 * len(rights)


def test_the_last_values_do_not_overlap() -> None:
    scores = [accuracy([True, False])]
    page = stage_plot(["a"], [0], [Series("greedy", scores), Series("sampled", scores)])
    first, second = [float(y) for y in re.findall(r'y="([\d.]+)" class="(?:greedy|sampled)"', page)]
    assert abs(first - second) >= 12


def test_a_specialist_is_drawn_apart_from_the_curve() -> None:
    scores = [accuracy([True])] * 3
    page = stage_plot(["a", "b", "c"], [0, 1, 1], [Series("greedy", scores, frozenset({1}))])
    assert page.count("hollow") == 1
    assert len(re.search(r'points="([^"]*)"', page)[1].split()) == 2  # type: ignore[index]


@given(st.lists(st.floats(-5, 9), max_size=60), st.lists(st.floats(-5, 9), max_size=60))
def test_histograms_stay_in_their_frame(before: list[float], after: list[float]) -> None:
    values = [*before, *after] or [0.0]
    assert inside(histogram(before, after, low=min(values), high=max(values)))


@given(st.lists(st.floats(0, 100), min_size=1, max_size=5), st.none() | st.floats(0, 200), st.booleans())
def test_gauges_stay_in_their_frame(values: list[float], level: float | None, falls: bool) -> None:
    page = monitor_plot([str(i) for i in range(len(values))], values, level=level, falls=falls)
    assert inside(page)
    assert ("alarm" in page) == (level is not None)


def test_the_alarm_zone_is_on_the_side_that_alarms() -> None:
    def zone(falls: bool) -> tuple[float, float]:
        page = monitor_plot(["start"], [1.0], level=0.5 if falls else 1.5, falls=falls)
        rect = re.search(r'<rect x="0" y="([\d.]+)" width="[\d.]+" height="([\d.]+)" class="alarm"', page)
        dot = re.search(r'cy="([\d.]+)"', page)
        assert rect and dot
        return float(rect[1]) - float(dot[1]), float(rect[1]) + float(rect[2]) - float(dot[1])

    assert zone(falls=True)[0] > 0  # the whole zone lies below the value
    assert zone(falls=False)[1] < 0


@given(st.lists(st.integers(0, 10**6), max_size=9))
def test_funnels_stay_in_their_frame(counts: list[int]) -> None:
    page = funnel([("head", 0, ""), *(("row", n, "fill") for n in counts)])
    assert inside(page)
    assert all(f"{n:,}" in page for n in counts)


def test_accuracy_bars_show_intervals_where_they_are_known() -> None:
    page = accuracy_bars([("a", accuracy([True] * 3), "fill"), ("b", {"mean": 0.5, "n": 3}, "fill3")])
    assert inside(page) and page.count('class="base"') == 1
