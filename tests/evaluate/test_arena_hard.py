"""Arena-Hard: verdicts, scores of two games, Bradley-Terry, style control and its guards."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gristmill.core.errors import InputError
from gristmill.evaluate.arena_hard import (
    SCORES,
    STYLE,
    Battle,
    Question,
    battle_scores,
    judging_prompt,
    leaderboard,
    notes,
    parse_verdict,
    read_baselines,
    read_questions,
    style_features,
    style_of,
    win_rate,
)


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("My verdict is [[A>B]]", "A>B"),
        ("[[A=B]] at first; then [[b>>a]].", "B>>A"),
        ("so [A>>B]", "A>>B"),
        ("[[A<B]]", "A<B"),
        ("a list [a] and [B=]", None),
        ("[[A]] [[A>B]]", "A>B"),
        ("<think>[[A>B]]</think>[[B>A]]", "B>A"),
        ("A is better", None),
    ],
)
def test_verdicts(reply: str, verdict: str | None) -> None:
    assert parse_verdict(reply) == verdict


def test_scores_of_both_games() -> None:
    assert battle_scores("B>A", "A>>B") == (1, 1, 1, 1)  # the worked case: [1,1,1] of game 2 and [1] of game 1
    assert battle_scores("A>>B", "A=B") == (0.5, 0, 0, 0)
    assert battle_scores("A>B", None) == battle_scores(None, "A>B") == ()
    mirror = str.maketrans("AB<>", "BA<>")
    for label, scores in SCORES.items():  # what B's side gets for the same verdict is the rest to 1
        assert SCORES[label.translate(mirror)] == [1 - s for s in scores]


def battles(scores: list[tuple[float, ...]], model: str = "m", styles: list[tuple[int, ...]] | None = None) -> list[Battle]:
    same = (10, 1, 2, 3)
    return [Battle(str(i), model, "b", s, styles[i] if styles else same, same) for i, s in enumerate(scores)]


def test_equal_models_are_at_50() -> None:
    found = win_rate(battles([battle_scores("A>B", "A>B"), battle_scores("B>>A", "B>>A"), battle_scores("A=B", "A=B")]))
    assert found["mean"] == found["bradley_terry"] == 50.0 and found["n"] == 3


def test_bradley_terry_of_one_model_is_its_mean() -> None:
    found = win_rate(battles([(1, 1, 1, 0), (1, 0.5), (0, 0, 0), (1,)] * 5))
    assert found["mean"] == pytest.approx(55.0) and found["bradley_terry"] == pytest.approx(55.0, abs=0.02)
    assert found["ci95"][0] < found["ci90"][0] < 55 < found["ci90"][1] < found["ci95"][1]


def test_a_model_that_wins_everything_is_finite_and_said() -> None:
    won = battles([(1, 1)] * 20)
    board = leaderboard(won, num_bootstraps=5)["m"]
    assert 99 < board["mean"] <= 100 and all(map(math.isfinite, board["ci95"]))
    assert [n for n in notes([], {}, won) if "ridge" in n] and not [n for n in notes([], {}, battles([(1,), (0,)])) if "ridge" in n]


def test_identical_styles_change_nothing() -> None:
    rows = battles([(1, 1, 1, 0), (1, 0.5), (0, 0, 0), (1,)])
    assert style_features((10, 1, 2, 3), (10, 1, 2, 3)) == [0, 0, 0, 0]
    densities = [(0.1 - 0.05) / 1.15, (0 - 0.1) / 1.1, 0.2 / 1.2]  # of 10 and 20 tokens
    assert style_features((9, 1, 0, 2), (19, 1, 2, 0)) == pytest.approx([-10 / 28, *densities])
    controlled, plain = leaderboard(rows, num_bootstraps=0)["m"], leaderboard(rows, features=(), num_bootstraps=0)["m"]
    assert controlled["mean"] == plain["mean"] and set(controlled["style"].values()) == {0.0}


def simulated(seed: int = 0, strength: dict[str, float] | None = None, effect: float = 2.0) -> list[Battle]:
    rng, out = np.random.default_rng(seed), []
    for model, own in (strength or {"long": 0.0, "short": 0.0}).items():
        for i in range(400):
            tokens = int(rng.integers(100, 400)) + (150 if model == "long" else 0)
            style, base = (tokens, 0, 0, 0), (250, 0, 0, 0)
            p = 1 / (1 + math.exp(-own - effect * style_features(style, base)[0] * 5))
            out.append(Battle(f"{model}{i}", model, "b", (float(rng.random() < p),), style, base))
    return out


@pytest.mark.parametrize("features", [STYLE, ("length",)])
def test_style_control_takes_away_what_length_brings(features: tuple[str, ...]) -> None:
    rows = simulated()
    plain, controlled = leaderboard(rows, features=(), num_bootstraps=0), leaderboard(rows, features=features, num_bootstraps=20)
    assert plain["long"]["mean"] - plain["short"]["mean"] > 25
    assert abs(controlled["long"]["mean"] - controlled["short"]["mean"]) < 10  # columns of models are there with a single feature, too
    assert controlled["long"]["style"]["length"] > 0 and list(controlled["long"]["style"]) == list(features)
    assert controlled["long"]["ci95"][0] < controlled["long"]["median"] < controlled["long"]["ci95"][1]


def test_the_fit_is_that_of_arena_hard_auto() -> None:
    # its own form: float32, LBFGS from .5, no ridge, coefficients of models that are told apart from the baseline's alone
    rng = np.random.default_rng(3)

    def style() -> tuple[int, ...]:
        return tuple(int(v) for v in rng.integers((50, 0, 0, 0), (600, 9, 30, 20)))

    rows = [
        Battle(f"{model}{i}", model, "b", tuple(rng.choice([0, 0.5, 1], 1 + int(rng.integers(3)))), style(), style())
        for model in ("x", "y")
        for i in range(80)
    ]
    scores = [(b, s) for b in rows for s in b.scores]
    features = torch.tensor([style_features(b.style, b.baseline_style) for b, _ in scores])
    hot = torch.tensor([[-1.0, float(b.model == "x"), float(b.model == "y")] for b, _ in scores])
    x, y = torch.cat([hot, (features - features.mean(0)) / features.std(0)], 1), torch.tensor([float(s) for _, s in scores])
    weights = torch.nn.Parameter(torch.full((7,), 0.5))
    optimizer = torch.optim.LBFGS([weights], max_iter=50, tolerance_grad=1e-9, tolerance_change=1e-9)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = torch.nn.functional.binary_cross_entropy_with_logits(x @ weights, y, reduction="sum")
        value.backward()
        return value

    optimizer.step(loss)
    board = leaderboard(rows, num_bootstraps=0)
    for place, model in ((1, "x"), (2, "y")):
        wanted = 100 * torch.sigmoid(weights[place] - weights[0]).item()
        assert board[model]["mean"] == pytest.approx(wanted, abs=0.02)
    assert list(board["x"]["style"].values()) == pytest.approx(weights[3:].tolist(), abs=1e-3)


def test_style_counts_leave_out_fenced_code() -> None:
    text = "# Title\n\n- one\n  * two\n3. three\n\n**bold** and __bold__\n```\n# no header\n- no item\n```\n#no header\n"
    assert style_of(text)[1:] == (1, 3, 2)
    assert style_of("a b c!", None)[0] == 4 and style_of("a b c!", 99)[0] == 99
    assert style_of("\n" * 100_000 + "- x")[2] == 1


def test_fenced_code_is_taken_away_in_its_order() -> None:
    for letter in "abcdefghijklmnopqrst":  # the second block is no longer found when the first is gone, and the header stays
        assert style_of(f"```{letter}``` and ```{letter}# ```\n{letter}# header\n")[1] == 1


def test_answers_of_no_length() -> None:
    assert style_features((0, 0, 0, 0), (0, 0, 0, 0)) == [0, 0, 0, 0]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def answers(model: str, names: str = "xy") -> list[dict[str, Any]]:
    return [
        {
            "uid": n,
            "model": model,
            "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": {"answer": f"{model} {n}"}}],
        }
        for n in names
    ]


def test_files_of_both_versions(tmp_path: Path) -> None:
    write(
        tmp_path / "question.jsonl",
        [{"uid": "x", "category": "coding", "prompt": "p"}, {"uid": "y", "category": "creative_writing", "prompt": "p"}],
    )
    write(tmp_path / "model_answer" / "o3-mini-2025-01-31.jsonl", answers("o3-mini-2025-01-31"))
    questions = read_questions(tmp_path)
    with pytest.raises(InputError, match="gemini-2.0-flash-001"):
        read_baselines(tmp_path, questions)
    mine = write(tmp_path / "mine.jsonl", answers("mine"))
    assert {c: b.model for c, b in read_baselines(tmp_path, questions, mine).items()} == {"coding": "mine", "creative_writing": "mine"}
    assert len([n for n in notes(questions, read_baselines(tmp_path, questions, mine), []) if "published one" in n]) == 2
    write(tmp_path / "model_answer" / "gemini-2.0-flash-001.jsonl", answers("gemini-2.0-flash-001"))
    assert read_baselines(tmp_path, questions)["creative_writing"].of("y", "y") == ("gemini-2.0-flash-001 y",)
    old = write(tmp_path / "old.jsonl", [{"question_id": "z", "cluster": "c", "turns": [{"content": "p"}]}])
    assert read_questions(old) == [Question("z", "arena-hard-v0.1", "p")]


def test_creative_writing_is_judged_without_an_own_answer() -> None:
    assert "yourself, before" in judging_prompt(Question("x", "coding", "p"), "a", "b")[0].content
    assert "yourself, before" not in judging_prompt(Question("x", "creative_writing", "p"), "a", "b")[0].content
