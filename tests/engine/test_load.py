"""A model folder as an engine, and its answers as rows."""

import json
from pathlib import Path

from gristmill.data.chat import Message
from gristmill.engine.load import answer_rows, load_engine
from gristmill.generation.api import SamplingParams


def test_answers_are_rows(tiny_base: Path) -> None:
    engine = load_engine(tiny_base)
    prompts = [[Message("user", f"Name a land. {i}")] for i in range(3)]
    rows = list(answer_rows(engine, prompts, SamplingParams(max_tokens=6, n=2), 7))
    assert sorted(r["index"] for r in rows) == [0, 1, 2] and engine.name == tiny_base.name
    for row in rows:
        assert row["messages"] == [{"role": "user", "content": f"Name a land. {row['index']}"}] and len(row["responses"]) == 2
        for r in row["responses"]:
            assert 1 <= r["num_tokens"] <= 6 and r["logprob"] < 0 and r["finish"] in ("stop", "length")
    again = list(answer_rows(engine, prompts, SamplingParams(max_tokens=6, n=2), 7))
    assert json.loads(json.dumps(again)) == rows
