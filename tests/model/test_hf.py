"""Model folders: round trips, shards, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gristmill.core.errors import InputError
from gristmill.data.tokenizer import Tokenizer
from gristmill.model.config import BlockConfig, ModelConfig, uniform_blocks
from gristmill.model.hf import (
    INDEX_FILE,
    SINGLE_FILE,
    fingerprint,
    load_model,
    load_reward,
    save_model,
    save_reward,
)
from gristmill.model.packed import PackedShape
from gristmill.model.reward import RewardModel
from gristmill.model.transformer import Transformer

TOKENIZER = Tokenizer.train(["a mill that grinds its own grain"] * 3, 270, [])
CONFIG = ModelConfig("nemotron", 272, 32, uniform_blocks(2, 4, 2, 8, 64), 64)


def assert_same_weights(a: torch.nn.Module, b: torch.nn.Module) -> None:
    torch.testing.assert_close(a.state_dict(), b.state_dict(), atol=0, rtol=0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(Transformer(CONFIG), TOKENIZER, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        replace(CONFIG, tie_embeddings=True),
        replace(CONFIG, family="qwen2", rotary_fraction=1.0),
        replace(CONFIG, family="qwen3", rotary_fraction=1.0),
        replace(CONFIG, blocks=(BlockConfig(4, 1, 8, 64), BlockConfig(0, 0, 0, 16), BlockConfig(2, 2, 8, 0))),
    ],
    ids=["nemotron", "tied", "qwen2", "qwen3", "heterogeneous"],
)
def test_saved_models_come_back_bit_for_bit(config: ModelConfig, tmp_path: Path) -> None:
    model = Transformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    save_model(model, TOKENIZER, tmp_path / "model")
    loaded, tokenizer = load_model(tmp_path / "model")
    assert loaded.config == config
    assert tokenizer.fingerprint() == TOKENIZER.fingerprint()
    assert_same_weights(loaded, model)


def test_folder_holds_what_others_read(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", SINGLE_FILE} <= names
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == TOKENIZER.eos_id
    tensors = load_file(folder / SINGLE_FILE)
    assert tensors["model.layers.1.self_attn.k_proj.weight"].shape == (16, 32)
    assert len(tensors) == 2 * (2 * 2 + 4 + 2) + 4


def test_shards_hold_each_tensor_once(tmp_path: Path) -> None:
    model = Transformer(CONFIG)
    save_model(model, TOKENIZER, tmp_path / "model", max_shard_bytes=20_000)
    index = json.loads((tmp_path / "model" / INDEX_FILE).read_text())
    files = sorted(path.name for path in (tmp_path / "model").glob("*.safetensors"))
    assert len(files) > 2 and set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(4 * p.numel() for p in model.parameters())
    assert_same_weights(load_model(tmp_path / "model")[0], model)


def test_dtype_on_loading(folder: Path) -> None:
    model, _ = load_model(folder, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    out = model(torch.arange(6), PackedShape.from_lengths([6]))
    assert out.dtype == model.compute_dtype == torch.bfloat16


def test_reward_model_round_trip(tmp_path: Path) -> None:
    model = RewardModel(Transformer(CONFIG), [0.1, 0.2, 0.3, 0.4, -0.5], seed=3)
    with torch.no_grad():
        model.head.bias.normal_()
    save_reward(model, TOKENIZER, tmp_path / "reward")
    loaded, _ = load_reward(tmp_path / "reward")
    assert loaded.weights == (0.1, 0.2, 0.3, 0.4, -0.5)
    assert_same_weights(loaded, model)
    assert {"reward_head.weight", "reward_head.bias"} <= set(load_file(tmp_path / "reward" / SINGLE_FILE))
    with pytest.raises(InputError, match="reward model"):
        load_model(tmp_path / "reward")


def test_a_language_model_is_no_reward_model(folder: Path) -> None:
    with pytest.raises(InputError, match=r"reward_head\.bias"):
        load_reward(folder)


def change_tensors(folder: Path, name: str, value: torch.Tensor | None) -> None:
    tensors = load_file(folder / SINGLE_FILE)
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value
    save_file(tensors, folder / SINGLE_FILE)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("model.layers.0.mlp.up_proj.weight", None, r"lacks model\.layers\.0\.mlp\.up_proj\.weight"),
        ("model.layers.2.mlp.up_proj.weight", torch.zeros(64, 32), r"unexpected.*layers\.2\.mlp\.up_proj"),
        ("model.layers.0.self_attn.q_proj.bias", torch.zeros(32), r"unexpected.*q_proj\.bias"),
        (
            "model.layers.1.self_attn.v_proj.weight",
            torch.zeros(32, 32),
            r"v_proj\.weight.*\[32, 32\], not \[16",
        ),
        ("model.norm.weight", torch.zeros(1), r"model\.norm\.weight.*\[1\]"),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder: Path, name: str, value: torch.Tensor | None, said: str) -> None:
    change_tensors(folder, name, value)
    with pytest.raises(InputError, match=said):
        load_model(folder)


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_refused(folder: Path, kept: float) -> None:
    path = folder / SINGLE_FILE
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(InputError, match=SINGLE_FILE):
        load_model(folder)


@pytest.mark.parametrize("name", ["config.json", SINGLE_FILE, "tokenizer.json"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(InputError, match=name):
        load_model(folder)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    save_model(Transformer(CONFIG), TOKENIZER, tmp_path / "model", max_shard_bytes=50_000)
    shard = sorted((tmp_path / "model").glob("*.safetensors"))[-1]
    shard.unlink()
    with pytest.raises(InputError, match=shard.name):
        load_model(tmp_path / "model")


def test_invalid_json_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text('{"architectures": [')
    with pytest.raises(InputError, match="not valid JSON"):
        load_model(folder)


def test_a_tokenizer_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    larger = Tokenizer.train(["the quick brown fox jumps over the lazy dog"] * 5, 290, [])
    larger.save(folder)
    with pytest.raises(InputError, match="272 embeddings"):
        load_model(folder)
    far_smaller = replace(CONFIG, vocab_size=TOKENIZER.vocab_size + 512)
    with pytest.raises(InputError, match="tokenizer"):
        save_model(Transformer(far_smaller), TOKENIZER, tmp_path / "padded")
    assert not (tmp_path / "padded").exists()


def test_the_fingerprint_follows_weights_and_config(folder: Path, tmp_path: Path) -> None:
    before = fingerprint(folder)
    save_model(Transformer(CONFIG), TOKENIZER, tmp_path / "copy")
    assert fingerprint(tmp_path / "copy") == before
    other = Transformer(CONFIG)
    other.init_weights(1)
    save_model(other, TOKENIZER, tmp_path / "copy")
    assert fingerprint(tmp_path / "copy") != before
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 1.0}))
    assert fingerprint(folder) != before


def test_saving_never_removes_other_files(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    before = fingerprint(folder)
    with pytest.raises(InputError, match="another folder"):
        save_model(Transformer(CONFIG), TOKENIZER, folder)
    assert (folder / "notes.txt").read_text() == "mine" and fingerprint(folder) == before


def test_a_failed_save_leaves_the_old_model_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint(folder)

    def full_disk(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gristmill.model.hf.save_file", full_disk)
    with pytest.raises(InputError, match="No space left"):
        save_model(Transformer(CONFIG), TOKENIZER, folder)
    assert fingerprint(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
