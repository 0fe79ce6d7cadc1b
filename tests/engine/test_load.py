"""A model folder as an engine, and its answers as rows."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gristmill.core.errors import InputError
from gristmill.data.chat import Message
from gristmill.data.find_format import find_format
from gristmill.engine import load
from gristmill.engine.engine import Engine
from gristmill.engine.load import EngineArgs, answer_rows, load_engine
from gristmill.engine.speculative import SpeculativeConfig
from gristmill.generation.api import SamplingParams
from gristmill.model.config import uniform_blocks
from gristmill.model.hf import load_model
from gristmill.model.hf_save import save_model
from gristmill.model.transformer import Transformer
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


@pytest.mark.parametrize("kind", ["int8", "int8-weight", "int4", "fp8"])
def test_layers_quantized_while_they_are_read_are_those_of_the_whole_model(kind: Any, tiny_base: Path) -> None:
    greedy, talk = SamplingParams(temperature=0.0, max_tokens=8), [Message("user", "Name a land.")]
    whole, by_block = (load_engine(tiny_base, EngineArgs(dtype="bf16", quantize=kind), own=own) for own in (False, True))
    said = [next(answer_rows(engine, [talk], greedy, seed=0))["responses"] for engine in (whole, by_block)]
    assert said[0] == said[1]
    matrices = [p for p in by_block.model.blocks.parameters() if p.ndim == 2]
    assert all(p.is_meta for p in matrices) and by_block.model.embedding.dtype == torch.bfloat16
    assert by_block.num_workers == whole.num_workers
    with pytest.raises(InputError, match="has let go of the weights"):
        by_block.refresh()


def test_an_engine_holds_its_weights_once_and_norms_in_fp32(tiny_base: Path) -> None:
    engine = load_engine(tiny_base, EngineArgs(dtype="bf16"))
    assert engine.model is engine._trained
    assert {(p.ndim, p.dtype) for p in engine.model.parameters()} == {(1, torch.float32), (2, torch.bfloat16)}
    model, tokenizer = load_model(tiny_base)
    converted = Engine(model, tokenizer, find_format("auto", tokenizer), name="own", dtype=torch.bfloat16, own=True)
    assert converted.model is model and model.embedding.dtype == torch.bfloat16
    for one, other in zip(engine.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)


MEASURED = """
import re, sys
from pathlib import Path
from gristmill.engine.load import EngineArgs, load_engine
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
for folder in sys.argv[2:]:  # the first for what is made once
    before = peak()
    load_engine(Path(folder), EngineArgs(dtype="bf16", quantize=sys.argv[1]))
print(peak() - before)
"""


def test_loading_takes_the_memory_of_the_weights_once(tiny_base: Path, tmp_path: Path) -> None:
    _, tokenizer = load_model(tiny_base)
    config = replace(load_model(tiny_base)[0].config, hidden_size=512, blocks=uniform_blocks(8, 8, 8, 64, 4096))
    with torch.device("meta"):
        model = Transformer(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(0.01)
    save_model(model, tokenizer, tmp_path / "model")
    size = (tmp_path / "model" / "model.safetensors").stat().st_size
    taken = []
    for quantize in ("", "int8"):
        command = [sys.executable, "-c", MEASURED, quantize, str(tiny_base), str(tmp_path / "model")]
        taken.append(int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout) / size)
    # fp32 on the way would make it 2 and more, the whole before its int8 1.5
    assert taken[0] < 1.4 and taken[1] < 1.2, taken


def test_engine_arguments_are_found_among_a_commands_options() -> None:
    options = {"dtype": "bf16", "format": "chatml", "speculative_config": "ngram", "seed": 3, "step_tokens": 7}
    args = EngineArgs.of(options)
    assert args == EngineArgs(dtype="bf16", chat_format="chatml", speculative=SpeculativeConfig(), step_tokens=7)
    assert EngineArgs.of({"chat_format": "plain", "prompt": ""}) == EngineArgs(chat_format="plain")
