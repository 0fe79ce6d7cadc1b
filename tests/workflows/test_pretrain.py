"""Pretraining from each kind of text, and what it refuses before work."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from gristmill.core.config import load
from gristmill.core.errors import InputError
from gristmill.data.token_store import TOKEN
from gristmill.data.tokenizer import Tokenizer
from gristmill.model.config import PRESETS, ModelConfig, uniform_blocks
from gristmill.model.hf import load_model
from gristmill.train.batches import collate_tokens
from gristmill.train.objectives.next_token import next_token_objective, token_samples
from gristmill.workflows import pretrain as pretraining_


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def config_file(folder: Path, **values: Any) -> Path:
    path = folder / "base.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> ModelConfig:
    """A preset that is trained in no time."""
    config = ModelConfig("nemotron", 400, 16, uniform_blocks(1, 2, 1, 8, 32), max_positions=64)
    monkeypatch.setitem(PRESETS, "small", config)
    return config


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Documents with enough different words for 400 tokens."""
    words = ["".join(chr(97 + (i * k + k) % 26) for k in range(2, 7)) for i in range(300)]
    return write(tmp_path / "texts.jsonl", [{"text": " ".join(words[i % 300 : i % 300 + 12]) + "."} for i in range(400)])


def pretraining(**values: Any) -> pretraining_.Pretraining:
    quick = {"preset": "small", "tokens": 2000, "batch_tokens": 500, "warmup_steps": 1, "precision": "fp32"}
    return pretraining_.Pretraining(**{**quick, **values})


@pytest.mark.parametrize("kind", ["world", "jsonl", "folder"])
def test_pretraining_from_each_kind_of_text(kind: str, small: ModelConfig, texts: Path, tmp_path: Path) -> None:
    if kind == "folder":
        (tmp_path / "library" / "deep").mkdir(parents=True)
        for i, line in enumerate(texts.read_text().splitlines()):
            (tmp_path / "library" / "deep" / f"{i}.txt").write_text(json.loads(line)["text"])
    source = {"world": {"world": "miniature"}, "jsonl": {"documents": texts}, "folder": {"documents": tmp_path / "library"}}[kind]
    steps: list[int] = []
    result = pretraining_.pretrain(pretraining(**source), tmp_path / "out", lambda step, total, metrics: steps.append(step))
    assert steps == list(range(1, result.steps + 1)) and result.steps >= 3 and math.isfinite(result.metrics["loss"])
    assert 2000 <= result.tokens <= 2200
    model, tokenizer = load_model(tmp_path / "out" / "model")
    assert model.config == small and tokenizer.has("<extra_id_1>")
    assert len((tmp_path / "out" / "train" / "metrics.jsonl").read_text().splitlines()) == result.steps


def test_pretraining_from_a_blend_of_tokens(small: ModelConfig, texts: Path, tmp_path: Path) -> None:
    pretraining_.pretrain(pretraining(documents=texts), tmp_path / "one")
    tokenizer = Tokenizer.load(tmp_path / "one" / "model")
    documents = [[*tokenizer.encode(json.loads(line)["text"]), tokenizer.eos_id] for line in texts.read_text().splitlines()]
    tokens, folder = np.concatenate(documents), tmp_path / "blend"
    folder.mkdir()
    tokens.astype(TOKEN).tofile(folder / "tokens-00000.bin")
    np.save(folder / "ends.npy", np.cumsum([len(ids) for ids in documents]))
    shards = [{"file": "tokens-00000.bin", "tokens": len(tokens), "documents": len(documents)}]
    (folder / "blend.json").write_text(json.dumps({"shards": shards, "tokenizer": {"fingerprint": tokenizer.fingerprint()}}))
    tokenizer.save(folder / "tokenizer")
    result = pretraining_.pretrain(pretraining(documents=folder), tmp_path / "two")
    assert result.steps >= 3 and 1900 <= result.tokens <= 2100 and math.isfinite(result.metrics["loss"])
    assert load_model(tmp_path / "two" / "model")[0].config == small
    again = pretraining_.pretrain(pretraining(documents=folder), tmp_path / "two", lambda *args: pytest.fail("it trained again"))
    assert again == result


def test_a_device_that_is_not_here_is_refused_before_work(small: ModelConfig, texts: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown device 'gpu'"):
        pretraining_.pretrain(pretraining(documents=texts, device="gpu"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pretraining_again_is_the_same_model_at_once(small: ModelConfig, texts: Path, tmp_path: Path) -> None:
    first = pretraining_.pretrain(pretraining(documents=texts), tmp_path / "out")
    weights = (tmp_path / "out" / "model" / "model.safetensors").read_bytes()
    again = pretraining_.pretrain(pretraining(documents=texts), tmp_path / "out", lambda *args: pytest.fail("it trained again"))
    assert again == first and (tmp_path / "out" / "model" / "model.safetensors").read_bytes() == weights


def test_continued_pretraining_tells_what_it_did_to_each_source(small: ModelConfig, texts: Path, tmp_path: Path) -> None:
    pretraining_.pretrain(pretraining(documents=texts), tmp_path / "base")
    old = write(tmp_path / "old.jsonl", [json.loads(line) for line in texts.read_text().splitlines()[:20]])
    new = write(tmp_path / "new.jsonl", [{"text": f"zzz yyy {i}."} for i in range(40)])
    folder = tmp_path / "base" / "model"
    how = {"tokens": 500, "batch_size": [[0, 4], [16, 8]], "optimizer": "adamw", "lr": 1e-2, "warmup_steps": 1, "precision": "fp32"}
    recipe = pretraining_.Pretraining(documents=new, model=folder, held_out={"old": old, "new": new}, **how)
    pretraining_.pretrain(recipe, tmp_path / "on")
    found = json.loads((tmp_path / "on" / "held_out.json").read_text())
    start, end = load_model(folder)[0], load_model(tmp_path / "on" / "model")[0]
    tokenizer = Tokenizer.load(folder)
    ids = tokenizer.encode("zzz yyy 0.") + [tokenizer.eos_id]
    samples = token_samples([ids], 64)
    first, last = (pretraining_.document_losses(model, samples)[0] for model in (start, end))
    whole = next_token_objective(start, collate_tokens(samples, torch.device("cpu")))
    assert first == pytest.approx(float(whole.sum.detach()) / whole.count, rel=1e-5) and last < first
    assert found["change"]["new"]["ci95"][1] < 0 and found["before"]["old"]["n"] == 20
    change = found["change"]["old"]
    assert change["value"] == pytest.approx(found["after"]["old"]["value"] - found["before"]["old"]["value"], abs=1e-6)
    assert [line.split()[0] for line in pretraining_.held_out_lines(tmp_path / "on")] == ["old", "new"]


def test_pretraining_with_a_given_tokenizer(small: ModelConfig, texts: Path, tmp_path: Path) -> None:
    pretraining_.pretrain(pretraining(documents=texts), tmp_path / "one")
    pretraining_.pretrain(pretraining(documents=texts, tokenizer=tmp_path / "one" / "model", seed=1), tmp_path / "two")
    prints = [Tokenizer.load(tmp_path / name / "model").fingerprint() for name in ("one", "two")]
    assert prints[0] == prints[1]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "either world or documents"),
        ({"world": "miniature", "documents": "a.jsonl"}, "either world or documents"),
        ({"documents": "a.jsonl", "weights": {"sums": 1}}, "weights are of a world"),
        ({"world": "miniature", "model": "a", "preset": "miniature"}, "leave preset, tokenizer and chat_format out"),
        ({"world": "miniature", "held_out": {"mine": "mine.jsonl"}}, "give model, or leave it out"),
        ({"world": "miniature", "tokns": 5}, "did you mean 'tokens'"),
        ({"world": "miniature", "tokens": 0}, "tokens"),
    ],
)
def test_a_wrong_pretraining_recipe(values: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words) as caught:
        load(config_file(tmp_path, **values), pretraining_.Pretraining)
    assert "base.yaml" in str(caught.value) and "\n" not in str(caught.value)


def test_a_right_pretraining_recipe(tmp_path: Path) -> None:
    assert load(config_file(tmp_path, world="miniature", tokens=5), pretraining_.Pretraining).tokens == 5


@pytest.mark.parametrize("text", ["", "tokens: [", "- a"])
def test_a_file_that_is_no_pretraining_recipe(text: str, tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(text)
    with pytest.raises(InputError, match="base.yaml"):
        load(tmp_path / "base.yaml", pretraining_.Pretraining)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "no documents"),
        ([{"text": "fine"}, {"txt": "?"}], "Row 2 .* no `text`"),
        ([{"text": 5}], "Row 1"),
        ([{"text": "a b"}], "tokens"),
    ],
)
def test_documents_that_cannot_be_used(rows: list[dict[str, Any]], words: str, small: ModelConfig, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words):
        pretraining_.pretrain(pretraining(documents=write(tmp_path / "bad.jsonl", rows), preset="miniature"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_of_another_size_is_refused_before_work(small: ModelConfig, texts: Path, tmp_path: Path, tiny_base: Path) -> None:
    with pytest.raises(InputError, match="tokenizer"):
        pretraining_.pretrain(pretraining(documents=texts, tokenizer=tiny_base), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unknown_preset(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="preset 'huge'.*miniature"):
        pretraining_.pretrain(pretraining(world="miniature", preset="huge"), tmp_path / "out")
