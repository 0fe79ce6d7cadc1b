"""Agreement with people: files of three forms, habits of judges whose answers are known, kappa and alpha."""

import json
from pathlib import Path
from typing import Any

import pytest

from gristmill.core.errors import InputError
from gristmill.data.chat import Message
from gristmill.evaluate.judge_agreement import LabelledPair, agreement, people_agreement, read_labelled_pairs
from gristmill.evaluate.stats import bootstrap

LLMBAR = {"input": "ask", "output_1": "good", "output_2": "a much longer and bad one", "label": 1}
PANDALM = {"instruction": "do", "input": "this", "response1": "x", "response2": "y", "annotator1": 2, "annotator2": 2, "annotator3": 0}
JUDGEBENCH = {"pair_id": "p", "source": "mmlu-pro-law", "question": "q", "response_A": "a", "response_B": "b", "label": "B>A"}


def test_three_forms(tmp_path: Path) -> None:
    for name, row in (("natural", LLMBAR), ("pandalm", PANDALM), ("judgebench", JUDGEBENCH)):
        (tmp_path / f"{name}.json").write_text(json.dumps([row]))
    (tmp_path / "other.json").write_text('[{"a": 1}]')
    found = {p.subset: p for p in read_labelled_pairs(tmp_path)}
    assert {s: p.label for s, p in found.items()} == {"natural": "first", "pandalm": "second", "mmlu": "second"}
    assert found["pandalm"].messages == (Message("user", "do\n\nthis"),) and found["pandalm"].labels == ("second", "second", "tie")


@pytest.mark.parametrize("row", [LLMBAR | {"label": 3}, LLMBAR | {"label": "1"}, PANDALM | {"annotator1": 5}, LLMBAR | {"input": None}])
def test_bad_rows(tmp_path: Path, row: dict[str, Any]) -> None:
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps([LLMBAR, row]))
    with pytest.raises(InputError, match="Row"):
        read_labelled_pairs(path)


def test_people_of_three_minds_make_a_tie(tmp_path: Path) -> None:
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps([PANDALM | {"annotator1": 1}]))
    assert read_labelled_pairs(path)[0].label == "tie"


def pair(i: int, label: Any, longer: str = "second") -> LabelledPair:
    first, second = ("long answer", "x") if longer == "first" else ("x", "long answer")
    return LabelledPair(str(i), "s", (Message("user", "q"),), first, second, label, (label,))


PAIRS = [pair(0, "first"), pair(1, "second"), pair(2, "first", "first"), pair(3, "second", "first")]


def test_a_judge_that_agrees_with_people() -> None:
    replies = {p.id: ("[[A]]", "[[B]]") if p.label == "first" else ("[[B]]", "[[A]]") for p in PAIRS}
    found = agreement(PAIRS, replies)
    assert found["agreement"]["mean"] == found["consistent"]["mean"] == found["kappa"]["mean"] == found["single_order"]["mean"] == 1.0
    assert found["first_place"]["mean"] == 0.5 and found["length"]["difference"]["mean"] == 0.0


def test_a_judge_that_prefers_the_first_place() -> None:
    found = agreement(PAIRS, {p.id: ("[[A]]", "[[A]]") for p in PAIRS})
    assert found["first_place"]["mean"] == 1.0 and found["consistent"]["mean"] == 0.0 and found["verdicts"] == {"tie": 4}
    assert found["agreement"]["mean"] == 0.0 and found["single_order"]["mean"] == 0.5 and found["decided"]["n"] == 0


def test_a_judge_that_prefers_the_longer_answer() -> None:
    replies = {p.id: ("[[A]]", "[[B]]") if len(p.first) > len(p.second) else ("[[B]]", "[[A]]") for p in PAIRS}
    length = agreement(PAIRS, replies)["length"]
    assert (length["judge"]["mean"], length["people"]["mean"], length["difference"]["mean"]) == (1.0, 0.5, 0.5)


def test_ties_and_unreadable_replies() -> None:
    pairs = [pair(0, "tie"), pair(1, "first")]
    found = agreement(pairs, {"0": ("[[C]]", "[[C]]"), "1": ("", "[[B]]")})
    assert found["verdicts"] == {"tie": 1, "unparsed": 1} and found["agreement"]["mean"] == 0.5 and found["consistent"]["n"] == 1


def test_people_among_themselves() -> None:
    labels: list[Any] = [("first", "first", "first"), ("second", "second", "tie"), ("tie", "tie", "tie")]
    found = people_agreement([LabelledPair(str(i), "s", (), "", "", "tie", p) for i, p in enumerate(labels)])
    assert found["unanimous"]["mean"] == pytest.approx(0.6667) and found["kappas"][0] == 1.0 and found["kappas"][1] == pytest.approx(0.5)


def test_bootstrap_draws_clusters() -> None:
    wide, narrow = bootstrap([[0.0] * 4, [1.0] * 4]), bootstrap([[0.0]] * 4 + [[1.0]] * 4)
    assert wide["mean"] == narrow["mean"] == 0.5 and wide["n"] == narrow["n"] == 8
    assert wide["ci95"] == [0.0, 1.0] and narrow["ci95"][0] > 0.0
    assert bootstrap([])["mean"] is None and bootstrap([[], [2.0]])["mean"] == 2.0
