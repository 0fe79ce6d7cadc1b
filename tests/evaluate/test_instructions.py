"""IFEval's scores from answers: both levels, both modes, types, and pairs of models."""

from gristmill.evaluate.instructions import instruction_scores, instruction_verdicts, looping, paired_scores

TRUTHS = {
    "a": {"kind": "instructions", "checks": [{"id": "punctuation:no_comma"}, {"id": "detectable_format:title"}]},
    "b": {"kind": "instructions", "checks": [{"id": "punctuation:no_comma"}]},
    "c": {"kind": "number", "value": 3},
}


def test_levels_modes_and_types() -> None:
    answers = {"a": "Well, here:\n<<Mill>>\nIt turns.", "b": "<think>Hm, a comma.</think>It turns.", "c": "3"}
    verdicts = instruction_verdicts(TRUTHS, answers)
    assert verdicts == {"strict": {"a": [False, True], "b": [True]}, "loose": {"a": [True, True], "b": [True]}}
    scores = instruction_scores(TRUTHS, verdicts)
    assert (scores["prompt"]["strict"]["mean"], scores["prompt"]["loose"]["mean"], scores["prompt"]["strict"]["n"]) == (0.5, 1.0, 2)
    assert (scores["instruction"]["strict"]["mean"], scores["instruction"]["strict"]["n"]) == (0.6667, 3)
    assert {name: (s["strict"]["mean"], s["loose"]["mean"], s["strict"]["n"]) for name, s in scores["types"].items()} == {
        "punctuation:no_comma": (0.5, 1.0, 2),
        "detectable_format:title": (1.0, 1.0, 1),
    }


def test_pairs() -> None:
    before = instruction_verdicts(TRUTHS, {"a": "Well, no.", "b": "Yes, so.", "c": "3"})
    after = instruction_verdicts(TRUTHS, {"a": "<<Well>>", "b": "Yes, so.", "c": "3"})
    found = paired_scores(before, after)
    assert found["prompt"]["strict"]["mean"] == 0.5 and found["instruction"]["strict"]["mean"] == 0.6667
    assert found["instruction"]["strict"]["n"] == 3 and paired_scores(before, before)["instruction"]["loose"]["mean"] == 0.0


def test_looping_answers() -> None:
    assert looping(["so it goes " * 20, "each word here stands alone", "", "one two three four five six one two three four"]) == [
        True,
        False,
        False,
        False,
    ]
