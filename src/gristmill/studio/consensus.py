"""Consensus labels of several people's answers, by HelpSteer2's rule (its data card, and the HelpSteer2-Preference paper).

Not published there, and ours: how "the three who agree most" is measured, what decides between equals, and what fewer than three give.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import floor
from typing import Any

from gristmill.data.rows import ATTRIBUTES
from gristmill.runs.checks import VERDICTS

MAX_RANGE = 2  # of helpfulness, or of preferences: more is a dispute
NUM_EXTRA = 2  # people who are asked when the first ones differ by more
NEITHER = "neither"  # of a preference: both answers are unacceptable
LABELED, SPLIT, TOO_FEW = "labeled", "split", "too few"


@dataclass(frozen=True)
class Consensus:
    """What people said of an item, taken together.

    Attributes:
        values: mean of the answers that were used, by name.
        rounded: the same as whole numbers (half up), where three were used.
        spread: range of helpfulness, or of the preference, over those.
        used: their places among the answers.
        state: "labeled"; "split" where they still differ by more than 2, or say "neither"; "too few" without an answer.
    """

    values: dict[str, float]
    rounded: dict[str, float]
    spread: float
    used: tuple[int, ...]
    state: str


def wants_more(answers: Sequence[Mapping[str, Any]]) -> bool:
    """Whether two more people are to be asked: those who answered differ by more than 2 on helpfulness."""
    values = [answer["helpfulness"] for answer in answers]
    return bool(values) and max(values) - min(values) > MAX_RANGE


def rating_consensus(answers: Sequence[Mapping[str, Any]]) -> Consensus:
    """Label of a rated answer: the mean of the three who agree most, of answers in the order in which they came.

    That triple has the least sum of absolute differences over pairs and attributes; then the smaller range of helpfulness; then the
    earlier answers. Fewer than three give their mean, unrounded: who asks for one person only takes that one's word.
    """
    if not answers:
        return Consensus({}, {}, 0.0, (), TOO_FEW)
    triples: list[tuple[int, ...]] = [*combinations(range(len(answers)), 3)] or [tuple(range(len(answers)))]
    used = min(triples, key=lambda t: (sum(_difference(answers[i], answers[j]) for i, j in combinations(t, 2)), _range(answers, t), t))
    means = {name: sum(answers[i][name] for i in used) / len(used) for name in ATTRIBUTES}
    spread = _range(answers, used)
    rounded = {name: nearest(mean) for name, mean in means.items()} if len(used) == 3 else means
    return Consensus(means, rounded, spread, used, SPLIT if spread > MAX_RANGE else LABELED)


def preference_consensus(answers: Sequence[Mapping[str, Any]]) -> Consensus:
    """Label of a pair: the mean of the three most similar strengths from -3 (the first is far better) to 3 (the second is).

    Split where they spread over more than 2, or where any two of three say that neither answer is acceptable.
    """
    if not answers:
        return Consensus({}, {}, 0.0, (), TOO_FEW)
    neither = [bool(answer.get(NEITHER)) for answer in answers]
    places = [i for i, is_neither in enumerate(neither) if not is_neither]
    if sum(neither) * 3 >= len(answers) * 2 or not places:
        return Consensus({}, {}, 0.0, tuple(places), SPLIT)
    strengths = {i: answers[i]["preference"] for i in places}
    triples: list[tuple[int, ...]] = [*combinations(places, 3)] or [tuple(places)]
    used = min(triples, key=lambda t: (sum(abs(strengths[i] - strengths[j]) for i, j in combinations(t, 2)), t))
    mean = sum(strengths[i] for i in used) / len(used)
    spread = max(strengths[i] for i in used) - min(strengths[i] for i in used)
    rounded = {"preference": nearest(mean)} if len(used) == 3 else {"preference": mean}
    return Consensus({"preference": mean}, rounded, spread, tuple(used), SPLIT if spread > MAX_RANGE else LABELED)


def check_consensus(answers: Sequence[Mapping[str, Any]]) -> Consensus:
    """Shares of the verdicts on a row of a round check; `verdict_of` says what comes of them."""
    if not answers:
        return Consensus({}, {}, 0.0, (), TOO_FEW)
    given = [answer["verdict"] for answer in answers]
    shares = {verdict: given.count(verdict) / len(given) for verdict in VERDICTS}
    return Consensus(shares, shares, 1.0 - max(shares.values()), tuple(range(len(answers))), LABELED)


def verdict_of(answers: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The answer that decides about a row: the newest one of the most frequent verdict; of equals, of the worse one."""
    given = [answer["verdict"] for answer in answers]
    decided = max(VERDICTS, key=lambda verdict: (given.count(verdict), VERDICTS.index(verdict)))
    return next(answer for answer in reversed(answers) if answer["verdict"] == decided)


def _difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> float:
    return float(sum(abs(a[name] - b[name]) for name in ATTRIBUTES))


def _range(answers: Sequence[Mapping[str, Any]], used: Sequence[int]) -> float:
    values = [answers[i]["helpfulness"] for i in used]
    return float(max(values) - min(values))


def nearest(mean: float) -> float:
    """Nearest whole number, half away from zero: so that -1.5 and 1.5 are treated alike."""
    return float(floor(abs(mean) + 0.5) * (1 if mean >= 0 else -1))
