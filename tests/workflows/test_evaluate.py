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


IFEVAL = [
    {"key": 1, "prompt": "Say a word.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
    {
        "key": 2,
        "prompt": "Say two words.",
        "instruction_id_list": ["length_constraints:number_words", "detectable_format:title"],
        "kwargs": [{"num_words": 100, "relation": "less than"}, {}],
    },
]


def test_ifevals_file_and_another_models_answers(tmp_path: Path, tiny_base: Path) -> None:
    engine, prompts, quiet = load_engine(tiny_base), write(tmp_path / "ifeval.jsonl", IFEVAL), Progress(quiet=True)
    out = tmp_path / "answers.jsonl"
    scores = evaluate(engine, prompts, quiet, max_tokens=5, seed=0, greedy=True, out=out)
    assert "sampled" not in scores and scores["instructions"]["instruction"]["strict"]["n"] == 3
    assert scores["instructions"]["prompt"]["strict"] == scores["greedy"]["overall"] and scores["looping"]["n"] == 2
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["right"] for row in rows] == list(scores["outcomes"]["greedy"].values())
    write(out, [row | {"text": "<<No>> comma", "right": True} for row in rows])
    again = evaluate(engine, prompts, quiet, max_tokens=5, seed=0, greedy=True, against=out)
    assert again["paired"]["prompt"]["strict"]["mean"] == again["paired"]["right"]["mean"] == scores["greedy"]["overall"]["mean"] - 1
    assert again["paired"]["instruction"]["loose"]["n"] == 3 and again["paired"]["looping"]["n"] == 2
    write(out, rows[:1])
    with pytest.raises(InputError, match="no answer .* to prompt 2, 'Say two words.'"):
        evaluate(engine, prompts, quiet, max_tokens=5, seed=0, against=out)


def test_a_killed_evaluation_asks_only_for_what_is_missing(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, prompts, quiet = load_engine(tiny_base), write(tmp_path / "ifeval.jsonl", IFEVAL), Progress(quiet=True)
    out, asked, generate = tmp_path / "answers.jsonl", [], engine.generate

    def watched(requests: Any) -> Any:
        for r, outs in generate(requests):
            asked.append(r.id)
            yield r, outs

    monkeypatch.setattr(engine, "generate", watched)
    how: dict[str, Any] = {"max_tokens": 5, "seed": 0, "greedy": True, "out": out}
    whole, wanted = evaluate(engine, prompts, quiet, **how, identity="one"), out.read_bytes()
    journal = tmp_path / "answers.jsonl.journal"
    journal.write_bytes(journal.read_bytes().splitlines(keepends=True)[0] + b'{"id": "torn')
    out.unlink()
    asked.clear()
    assert evaluate(engine, prompts, quiet, **how, identity="one") == whole and out.read_bytes() == wanted
    assert len(asked) == 1
    evaluate(engine, prompts, quiet, **how, identity="another model")
    assert len(asked) == 3
