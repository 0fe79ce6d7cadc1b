"""Pages are counted right, found by what they hold, and never two people's at once."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gristmill.engine import block_manager as module
from gristmill.engine.block_manager import ROOT, Pages


def test_a_page_goes_to_one_and_comes_back() -> None:
    pages = Pages(2)
    one, other = pages.take(), pages.take()
    assert {one, other} == {0, 1} and pages.take() is None and pages.in_use == 2
    assert one is not None
    pages.release([one])
    assert pages.available == 1 and pages.take() == one


def test_a_full_page_is_found_by_all_that_came_before() -> None:
    pages = Pages(4)
    first, second = pages.take(), pages.take()
    assert first is not None and second is not None
    content = pages.name(first, ROOT, b"a")
    after = pages.name(second, content, b"b")
    assert pages.find(ROOT, b"a") == (first, content) and pages.find(content, b"b") == (second, after)
    assert pages.find(ROOT, b"b") is None, "the same tokens after others are something else"
    twin = pages.take()
    assert twin is not None and pages.name(twin, ROOT, b"a") == content and pages.find(ROOT, b"a") == (first, content)
    pages.release([first, second, twin])
    assert pages.available == 4 and pages.find(content, b"b") == (second, after), "unread pages are still known"
    pages.share(second)
    assert pages.available == 3
    pages.forget_all()
    assert pages.find(ROOT, b"a") is None and pages.available == 3


def test_the_longest_unread_page_is_given_away_first() -> None:
    pages = Pages(3)
    owned = [page for _ in range(3) if (page := pages.take()) is not None]
    for page, text in zip(owned, (b"a", b"b", b"c"), strict=True):
        pages.name(page, ROOT, text)
    for page in (owned[1], owned[0], owned[2]):
        pages.release([page])
    assert [pages.take() for _ in range(2)] == [owned[1], owned[0]]
    assert pages.find(ROOT, b"b") is None and pages.find(ROOT, b"c") is not None


def test_memory_is_used_again_before_more_is_touched() -> None:
    pages = Pages(10_000)
    for number in range(1000):
        page = pages.take()
        assert page is not None and page <= module.KEPT + 1
        pages.name(page, ROOT, str(number).encode())
        pages.release([page])


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 30)), max_size=120))
def test_no_page_has_two_owners_and_none_is_lost(steps: list[tuple[int, int]]) -> None:
    pages = Pages(6)
    held: list[list[int]] = []  # a chain of pages each
    names: dict[int, bytes] = {}
    for action, number in steps:
        if action <= 1:
            page = pages.take()
            assert (page is None) == (sum(len(set(h)) for h in [sum(held, [])]) == 6)
            if page is not None:
                assert all(page not in chain for chain in held)
                names.pop(page, None)
                held.append([page])
        elif action == 2 and held:
            pages.release(held.pop(number % len(held)))
        elif action == 3 and held:
            page = held[number % len(held)][0]
            if page not in names:
                key = bytes([number])
                known = pages.find(ROOT, key)
                pages.name(page, ROOT, key)
                if known is None:
                    names[page] = key
        elif action == 4:
            hit = pages.find(ROOT, bytes([number]))
            if hit is not None:
                assert names[hit[0]] == bytes([number]), "a found page holds what was asked for"
                pages.share(hit[0])
                held.append([hit[0]])
        assert pages.in_use == len(np.unique(sum(held, []) or [0])) - (not held)
    for chain in held:
        pages.release(chain)
    assert pages.available == 6
