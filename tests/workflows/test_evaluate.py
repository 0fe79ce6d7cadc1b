"""Evaluation on a file of prompts with known answers."""

import json
from pathlib import Path
from typing import Any

import pytest

from gristmill.core.errors import InputError
from gristmill.core.progress import Progress
from gristmill.engine.load import load_engine
from gristmill.workflows.evaluate import evaluate


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_evaluation_on_a_file(tmp_path: Path, tiny_base: Path) -> None:
    rows = [{"prompt": f"Ask {i}?", "answer": i, "task": "ab"[i % 2]} for i in range(6)]
    engine = load_engine(tiny_base)
    scores = evaluate(engine, write(tmp_path / "test.jsonl", rows), Progress(quiet=True), max_tokens=5, seed=0)
    assert scores["greedy"].keys() == {"overall", "a", "b"} and scores["sampled"]["overall"]["n"] == 6
    assert len(scores["outcomes"]["greedy"]) == 6
    again = evaluate(engine, write(tmp_path / "test.jsonl", rows), Progress(quiet=True), max_tokens=5, seed=0)
    assert again == scores


def test_an_evaluation_must_know_what_is_right(tmp_path: Path, tiny_base: Path) -> None:
    with pytest.raises(InputError, match="neither `truth` nor `answer`"):
        evaluate(load_engine(tiny_base), write(tmp_path / "t.jsonl", [{"prompt": "?"}]), Progress(quiet=True), max_tokens=5, seed=0)
