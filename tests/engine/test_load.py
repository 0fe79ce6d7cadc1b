"""A model folder as an engine, and its answers as rows."""

import json
from pathlib import Path

import pytest

from gristmill.data.chat import Message
from gristmill.engine import load
from gristmill.engine.load import EngineArgs, answer_rows, load_engine
from gristmill.generation.api import SamplingParams
from tests.other_device import OTHER, other_device


def test_answers_are_rows(tiny_base: Path) -> None:
    engine = load_engine(tiny_base)
    prompts = [[Message("user", f"Name a land. {i}")] for i in range(3)]
    rows = list(answer_rows(engine, prompts, SamplingParams(max_tokens=6, n=2), seed=7))
    assert sorted(r["index"] for r in rows) == [0, 1, 2] and engine.name == tiny_base.name
    for row in rows:
        assert row["messages"] == [{"role": "user", "content": f"Name a land. {row['index']}"}] and len(row["responses"]) == 2
        for r in row["responses"]:
            assert 1 <= r["num_tokens"] <= 6 and r["logprob"] < 0 and r["finish"] in ("stop", "length")
    again = list(answer_rows(engine, prompts, SamplingParams(max_tokens=6, n=2), seed=7))
    assert json.loads(json.dumps(again)) == rows


def test_an_engine_on_another_device_says_the_same(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = [(Message("user", "Name a land."), Message("assistant", "It is one."))]
    greedy = SamplingParams(temperature=0.0, max_tokens=8)
    engine = load_engine(tiny_base, EngineArgs(device="cpu"))
    here = list(answer_rows(engine, [talk[0][:1]], greedy, seed=7)), engine.loglikelihood(talk)
    asked: list[str] = []
    monkeypatch.setattr(load, "pick_device", lambda name: asked.append(name) or OTHER)
    with other_device():
        engine = load_engine(tiny_base, EngineArgs(device="cuda:1"))
        assert engine.device == OTHER and asked == ["cuda:1"]
        there = list(answer_rows(engine, [talk[0][:1]], greedy, seed=7)), engine.loglikelihood(talk)
    assert [r["text"] for r in there[0][0]["responses"]] == [r["text"] for r in here[0][0]["responses"]]
    assert there[1][0] == pytest.approx(here[1][0], rel=1e-5)
