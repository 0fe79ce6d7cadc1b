"""AlpacaEval 2: preferences from replies, win rates, length control and its names."""

import json
import math
import random
from pathlib import Path

import pytest

from gristmill.core.errors import InputError
from gristmill.evaluate.alpaca_eval import (
    Difficulty,
    length_controlled,
    notes,
    parse_preference,
    read_annotations,
    read_difficulty,
    read_instructions,
    win_rates,
)


@pytest.mark.parametrize(
    ("reply", "logprob", "first", "preference"),
    [
        ("m", math.log(0.9), True, 1.9),
        ("M", math.log(0.9), True, 1.1),
        ("m", math.log(0.9), False, 1.1),
        ("M", None, False, 2.0),
        ("**M**", None, True, 1.0),
        ("m", math.log(0.3), True, 1.5),
        ("m or M", None, True, None),
        ("I'm not sure", None, True, None),
        ("Model", None, True, None),
        ("", -0.1, True, None),
    ],
)
def test_preferences(reply: str, logprob: float | None, first: bool, preference: float | None) -> None:
    found = parse_preference(reply, logprob, first=first)
    assert found == (None if preference is None else pytest.approx(preference))


def test_win_rates_count_a_tie_half_and_leave_out_what_is_unreadable() -> None:
    found = win_rates([1.0, 2.0, 0, 1.8, None], [(5, 5)] * 5, Difficulty())
    assert found["win_rate"]["mean"] == pytest.approx(57.5) and found["win_rate"]["n"] == 4  # (0 + 1 + .5 + .8) / 4
    assert found["discrete_win_rate"] == 62.5 and found["length_controlled"]["mean"] is None


def drawn(num: int, strength: float, effect: float, seed: int = 0) -> tuple[list[float], list[tuple[int, int]], list[float]]:
    rng = random.Random(seed)
    lengths = [(1000, round(rng.gauss(1400, 300))) for _ in range(num)]
    hard = [rng.gauss(0, 1) for _ in range(num)]
    spread = math.sqrt(sum((b - 1400) ** 2 for _, b in lengths) / num)
    points = [
        1 / (1 + math.exp(-(strength + 0.5 * h - effect * math.tanh((a - b) / spread)))) for (a, b), h in zip(lengths, hard, strict=True)
    ]
    return points, lengths, hard


def test_length_control_finds_what_equal_lengths_would_give() -> None:
    points, lengths, hard = drawn(400, 0.0, 1.0)
    wanted = 100 * sum(1 / (1 + math.exp(-0.5 * h)) for h in hard) / len(hard)
    raw = 100 * sum(points) / len(points)
    controlled, name = length_controlled(points, lengths, Difficulty(hard, [(0.5, 0.0, 0.0)] * 2))
    assert name == "LC" and raw > wanted + 10 and controlled == pytest.approx(wanted, abs=1.5)


def test_the_estimate_is_that_of_scikit_learn() -> None:
    points, lengths, hard = drawn(200, -0.7, 1.2, 1)
    gamed = [(0.1, -0.8, h) for h in hard] + [(0.9, 0.5, -h) for h in hard]
    controlled, _ = length_controlled(points, lengths, Difficulty(hard, gamed))
    assert controlled == pytest.approx(53.6055, abs=0.02)  # by_scikit_learn of bench/judges.py


def test_the_name_says_which_files_were_absent() -> None:
    points, lengths, hard = drawn(50, 0.3, 0.5)
    assert length_controlled(points, lengths, Difficulty(hard))[1] == "LC (re-estimated)"
    value, name = length_controlled(points, lengths, Difficulty())
    assert name == "LC (re-estimated, by length alone)" and value is not None
    assert [n for n in notes(50, ["gpt4_1106_preview"], name) if "df_gamed.csv" in n] and len(notes(805, ["gpt4_1106_preview"], "LC")) == 0


def test_answers_of_equal_length_leave_the_win_rate() -> None:
    value, _ = length_controlled([0.2, 0.4, 0.6, 0.8, 0.9, 0.1] * 20, [(7, 7)] * 120, Difficulty())
    assert value == pytest.approx(50.0, abs=0.1)


def test_published_files(tmp_path: Path) -> None:
    (tmp_path / "instruction_difficulty.csv").write_text(",instruction_difficulty\n0,0.5\n1,-0.5\n")
    gamed = "index,model,preference,std_delta_len,instruction_difficulty,not_gamed_baseline\n0,g,1.0,0.2,0.5,False\n1,g,0,0.1,-0.5,False\n"
    (tmp_path / "df_gamed.csv").write_text(gamed)
    assert read_difficulty(tmp_path, 2) == Difficulty([0.5, -0.5], [(0.0, 0.2, 0.5), (0.5, 0.1, -0.5)])
    with pytest.raises(InputError, match="another set"):
        read_difficulty(tmp_path, 3)
    (tmp_path / "df_gamed.csv").write_text("index,preference\n0,x\n")
    with pytest.raises(InputError, match="AlpacaEval's file"):
        read_difficulty(tmp_path, 2)


def test_files_of_answers_and_of_annotations(tmp_path: Path) -> None:
    path = tmp_path / "base.json"
    path.write_text(json.dumps([{"instruction": "i", "output": "o", "generator": "gpt4_1106_preview"}]))
    assert read_instructions(path)[0].baseline == "gpt4_1106_preview" and read_annotations(path) is None
    row = {"instruction": "i", "output_1": "a", "output_2": "b", "generator_1": "x", "generator_2": "y", "preference": 1.25}
    path.write_text(json.dumps([row]))
    assert read_annotations(path) == [row]
    path.write_text(json.dumps([row | {"preference": 3}]))
    with pytest.raises(InputError, match="preference 3"):
        read_annotations(path)
