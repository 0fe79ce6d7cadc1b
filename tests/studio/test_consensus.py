"""Consensus by HelpSteer2's rule: the data card's example, and each tie by hand."""

from typing import Any

import pytest

from gristmill.data.rows import ATTRIBUTES
from gristmill.studio.consensus import LABELED, SPLIT, TOO_FEW, preference_consensus, rating_consensus, wants_more


def answers(**columns: list[int]) -> list[dict[str, Any]]:
    num = len(next(iter(columns.values())))
    return [{name: columns.get(name, [2] * num)[i] for name in ATTRIBUTES} for i in range(num)]


def test_the_data_cards_example() -> None:
    found = rating_consensus(
        answers(helpfulness=[3, 3, 4], correctness=[3, 4, 4], coherence=[4, 3, 4], complexity=[2, 2, 2], verbosity=[2, 1, 1])
    )
    assert found.rounded == {"helpfulness": 3, "correctness": 4, "coherence": 4, "complexity": 2, "verbosity": 1}
    assert found.values["helpfulness"] == pytest.approx(10 / 3)
    assert found.state == LABELED


@pytest.mark.parametrize(
    ("helpfulness", "used", "rounded", "state"),
    [
        ([0, 1, 4, 4, 3], (2, 3, 4), 4, LABELED),  # 11 / 3
        ([0, 2, 4, 0, 4], (0, 1, 3), 1, LABELED),  # (0, 0, 2) and (2, 4, 4) both differ by 4: the earlier answers; 2 / 3
        ([0, 1, 4], (0, 1, 2), 2, SPLIT),
    ],
)
def test_the_three_who_agree_most(helpfulness: list[int], used: tuple[int, ...], rounded: float, state: str) -> None:
    found = rating_consensus(answers(helpfulness=helpfulness))
    assert (found.used, found.rounded["helpfulness"], found.state) == (used, rounded, state)


def test_all_attributes_count_in_agreement_and_helpfulness_breaks_the_tie() -> None:
    # the fourth answer differs by 2 on coherence, as the third does on helpfulness: the triple with the smaller helpfulness range wins
    found = rating_consensus(answers(helpfulness=[2, 2, 4, 2], coherence=[2, 2, 2, 4]))
    assert found.used == (0, 1, 3)


def test_fewer_than_three_answers_give_their_mean() -> None:
    assert rating_consensus(answers(helpfulness=[1, 2])).rounded["helpfulness"] == 1.5
    assert rating_consensus(answers(helpfulness=[1])).rounded["helpfulness"] == 1
    assert rating_consensus([]).state == preference_consensus([]).state == TOO_FEW


def test_who_differs_by_more_than_two_asks_for_more() -> None:
    assert wants_more(answers(helpfulness=[0, 2, 4]))
    assert not wants_more(answers(helpfulness=[1, 2, 3]))


def preferences(*strengths: int | None) -> list[dict[str, Any]]:
    return [{"preference": 0, "neither": True} if s is None else {"preference": s, "neither": False} for s in strengths]


@pytest.mark.parametrize(
    ("strengths", "rounded", "state"),
    [
        ((-3, -2, -2), -2, LABELED),
        ((2, 1, 1, -3), 1, LABELED),  # the three most similar
        ((-1, -2), -1.5, LABELED),
        ((-1, 1, 2), 1, SPLIT),  # a spread of 3; the mean is 2 / 3
        ((None, None, 2), None, SPLIT),
        ((None, 1, 2), 1.5, LABELED),
    ],
)
def test_preferences(strengths: tuple[int | None, ...], rounded: float | None, state: str) -> None:
    found = preference_consensus(preferences(*strengths))
    assert (found.rounded.get("preference"), found.state) == (rounded, state)


def test_preferences_of_opposite_sign_round_alike() -> None:
    assert preference_consensus(preferences(1, 2, 2)).rounded == {"preference": 2}
    assert preference_consensus(preferences(-1, -2, -2)).rounded == {"preference": -2}
    assert preference_consensus(preferences(-2, -1)).values == {"preference": -1.5}
