"""Model folders: round trips, shards, and what is refused."""

import json
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from gristmill.core.errors import InputError
from gristmill.data.tokenizer import Tokenizer
from gristmill.model.config import BlockConfig, ModelConfig, uniform_blocks
from gristmill.model.hf import INDEX_FILE, MAX_HEADER_BYTES, SINGLE_FILE, fingerprint, load_model, load_reward
from gristmill.model.hf_save import save_model, save_quantized, save_reward
from gristmill.model.packed import PackedShape
from gristmill.model.quantized import PACKED
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


def change_config(folder: Path, **values: Any) -> None:
    hf = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(hf | values))


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 65_536},
        {"intermediate_size": 500_000},
        {"num_attention_heads": 1000, "num_key_value_heads": 1000},
        {"head_dim": 1024},
        {"num_hidden_layers": 512},
        {"hidden_size": 65_536, "intermediate_size": 500_000, "num_hidden_layers": 512, "tie_word_embeddings": True},
    ],
)
def test_no_memory_is_taken_for_what_the_file_does_not_hold(folder: Path, change: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    def allocate(*args: object, **kwargs: object) -> None:
        raise AssertionError("memory was asked for")

    monkeypatch.setattr(torch.nn.Module, "to_empty", allocate)
    change_config(folder, **change)
    with pytest.raises(InputError, match="tensors fit its config.json"):
        load_model(folder)


def test_more_memory_than_there_is_is_not_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = sum(parameter.nbytes for parameter in load_model(folder)[0].parameters())
    monkeypatch.setattr("gristmill.model.hf.free_memory", lambda device: taken - 1)
    load_model(folder, torch.bfloat16)
    monkeypatch.setattr(torch.nn.Module, "to_empty", None)
    with pytest.raises(InputError, match=r"does not fit: its weights take .* GB in float32.* bf16 .*more memory"):
        load_model(folder)


def test_a_file_that_cannot_be_mapped_is_not_called_damaged(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, framework: str) -> None:
        raise RuntimeError(f"unable to mmap 99 bytes from file <{path}>: Cannot allocate memory (12)")

    monkeypatch.setattr("gristmill.model.hf.safe_open", refuse)
    with pytest.raises(InputError, match=r"does not fit into the memory that this process may take .*: .* GB are free"):
        load_model(folder)


@pytest.mark.parametrize(
    "header",
    [
        struct.pack("<Q", 2**63 - 1),
        struct.pack("<Q", 2**64 - 1) + b"{}",
        struct.pack("<Q", 2**40) + b"{}",
        struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{" * (MAX_HEADER_BYTES + 1),
        struct.pack("<Q", 10**5) + b"[" * 10**5,
        struct.pack("<Q", 6) + b'{"a":1',
        b"\x80\x04\x95pickled" * 9,
        b"",
    ],
    ids=["2^63", "2^64", "2^40", "large", "deep", "torn", "pickle", "empty"],
)
def test_a_damaged_header_is_refused(folder: Path, header: bytes) -> None:
    (folder / SINGLE_FILE).write_bytes(header)
    with pytest.raises(InputError, match=SINGLE_FILE) as caught:
        load_model(folder)
    assert str(caught.value).isprintable()


def test_a_pointer_of_git_lfs_is_told_as_such(folder: Path) -> None:
    (folder / SINGLE_FILE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    with pytest.raises(InputError, match="git lfs pull"):
        load_model(folder)


def parts(folder: Path) -> tuple[dict[str, Any], bytes]:
    data = (folder / SINGLE_FILE).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_parts(folder: Path, header: dict[str, Any], body: bytes) -> None:
    text = json.dumps(header).encode()
    (folder / SINGLE_FILE).write_bytes(struct.pack("<Q", len(text)) + text + body)


@pytest.mark.parametrize(
    "change",
    [
        {"data_offsets": [0, 10**15]},
        {"data_offsets": [-5, 10]},
        {"data_offsets": [0, 0]},
        {"shape": [2**62, 4]},
        {"shape": [-16, -32]},
        {"shape": []},
        {"dtype": "\x1b[2JEVIL"},
        {"dtype": "I32"},
        {"dtype": "F8_E4M3", "shape": [64, 32]},
        {"dtype": "U16", "shape": [16, 64]},
    ],
)
def test_an_entry_that_does_not_fit_is_refused(folder: Path, change: dict) -> None:
    header, body = parts(folder)
    header["model.layers.1.self_attn.k_proj.weight"] |= change
    write_parts(folder, header, body)
    with pytest.raises(InputError, match=r"damaged|tensors fit") as caught:
        load_model(folder)
    assert str(caught.value).isprintable()


def test_a_name_that_cannot_be_printed_is_quoted(folder: Path) -> None:
    change_tensors(folder, "model.\x1b[2J\x07.weight", torch.zeros(1))
    with pytest.raises(InputError, match=r"unexpected tensor model\.\\x1b"):
        load_model(folder)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_damage_is_refused_or_harmless(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    place = tmp_path_factory.mktemp("fuzzed")
    save_model(Transformer(CONFIG), TOKENIZER, place / "model")
    folder = place / "model"
    name = data.draw(st.sampled_from([SINGLE_FILE, "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]))
    whole = bytearray((folder / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, min(len(whole), 4000) - 1))
        put = data.draw(
            st.sampled_from([b"", b"\0", b"9" * 20, b"-", b'"', b"{", b"]", b"null", b"\xff"]) | st.binary(min_size=1, max_size=9)
        )
        whole[at : at + data.draw(st.integers(0, 12))] = put
    (folder / name).write_bytes(bytes(whole))
    try:
        model, _ = load_model(folder)
    except InputError as error:
        assert len(str(error)) < 1000
        return
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30, 3e38])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.self_attn.k_proj.weight", "model.embed_tokens.weight"])
def test_values_that_no_training_makes_are_refused(folder: Path, name: str, value: float) -> None:
    tensor = load_file(folder / SINGLE_FILE)[name]
    tensor.view(-1)[-1] = value
    change_tensors(folder, name, tensor)
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        load_model(folder)


def test_values_beyond_the_type_that_is_asked_for_are_refused(folder: Path) -> None:
    change_tensors(folder, "model.norm.weight", torch.full((32,), 1e300, dtype=torch.float64))
    with pytest.raises(InputError, match=r"model\.norm\.weight"):
        load_model(folder)


def test_large_biases_of_published_models_are_not_too_large(folder: Path) -> None:
    change_tensors(folder, "model.norm.bias", torch.full((32,), 900.0))
    load_model(folder)


def sharded(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    save_model(Transformer(CONFIG), TOKENIZER, tmp_path / "model", max_shard_bytes=20_000)
    return tmp_path / "model", json.loads((tmp_path / "model" / INDEX_FILE).read_text())["weight_map"]


@pytest.mark.parametrize(
    "way", ["../other/{}", "{folder}/../other/{}", "/etc/passwd", "..", "", "a/../{}", "/dev/zero", "x\0y", "x" * 5000, 1, None, []]
)
def test_an_index_names_files_of_its_own_folder(tmp_path: Path, way: Any) -> None:
    folder, weight_map = sharded(tmp_path)
    (folder / ".." / "other").mkdir()
    for path in folder.glob("*.safetensors"):
        path.rename(tmp_path / "other" / path.name)
    changed = {k: way.format(v, folder=folder) if isinstance(way, str) else way for k, v in weight_map.items()}
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": changed}))
    for read in (load_model, fingerprint):
        with pytest.raises(InputError, match="no name of a safetensors file in its folder"):
            read(folder)


@pytest.mark.parametrize("weight_map", [[1, 2], None, {}, 5, "a"])
def test_an_index_without_a_map_is_refused(tmp_path: Path, weight_map: Any) -> None:
    folder, _ = sharded(tmp_path)
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InputError, match="no weight_map"):
        load_model(folder)


def test_links_into_a_cache_are_followed(tmp_path: Path) -> None:
    folder, _ = sharded(tmp_path)
    (tmp_path / "blobs").mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(tmp_path / "blobs" / str(number))
        path.symlink_to(f"../blobs/{number}")
    load_model(folder)


def test_a_shard_of_another_model_is_told_by_the_tensor(tmp_path: Path) -> None:
    folder, weight_map = sharded(tmp_path)
    first, second = sorted(set(weight_map.values()))[:2]
    (folder / second).write_bytes((folder / first).read_bytes())
    with pytest.raises(InputError, match="a second time"):
        load_model(folder)


def test_one_file_goes_before_an_index_as_elsewhere(folder: Path) -> None:
    (folder / INDEX_FILE).write_text('{"weight_map": {"a": "of-another-model.safetensors"}}')
    load_model(folder)


def test_a_tied_output_matrix_is_the_embedding(tmp_path: Path) -> None:
    save_model(Transformer(replace(CONFIG, tie_embeddings=True)), TOKENIZER, tmp_path / "model")
    embedding = load_file(tmp_path / "model" / SINGLE_FILE)["model.embed_tokens.weight"]
    change_tensors(tmp_path / "model", "lm_head.weight", embedding.clone())
    load_model(tmp_path / "model")
    change_tensors(tmp_path / "model", "lm_head.weight", embedding + 0.01)
    with pytest.raises(InputError, match="tie_word_embeddings"):
        load_model(tmp_path / "model")


@pytest.mark.parametrize("kind", ["int8", "int8-weight", "int4", "fp8"])
def test_parts_of_quantized_matrices_are_compared_too(kind: Any, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_quantized(Transformer(CONFIG), TOKENIZER, folder, kind=kind)
    load_model(folder)
    name = "model.layers.1.mlp.down_proj.weight"
    tensors = load_file(folder / SINGLE_FILE)
    values = f"{name}_packed" if kind in PACKED else name
    for part, value in (
        (values, tensors[values][:, :-1].contiguous()),
        (values, tensors[values].view(torch.uint8)),
        (f"{name}_scale", torch.ones(3, 1)),
        (f"{name}_scale", torch.full((32, 1), float("nan"))),
        *([(f"{name}_shape", torch.tensor([32, 10**15]))] if kind in PACKED else []),
        *([(f"{name}_shape", torch.tensor([32, 60]))] if kind in PACKED else []),
    ):
        save_file(tensors | {part: value}, folder / SINGLE_FILE)
        with pytest.raises(InputError, match="down_proj"):
            load_model(folder)


@pytest.mark.parametrize("weights", [5, "abcde", [1, 2, 3, 4], [1, 2, 3, 4, "5"], [1, 2, 3, 4, 1e300], [1, 2, 3, 4, None], [True] * 5])
def test_reward_weights_are_numbers(tmp_path: Path, weights: Any) -> None:
    save_reward(RewardModel(Transformer(CONFIG)), TOKENIZER, tmp_path / "reward")
    change_config(tmp_path / "reward", reward_weights=weights)
    with pytest.raises(InputError, match="aggregation weights"):
        load_reward(tmp_path / "reward")


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


BIG = """
import resource, sys
from pathlib import Path
import torch
from gristmill.data.tokenizer import Tokenizer
from gristmill.model.config import ModelConfig, uniform_blocks
from gristmill.model.hf_save import save_model
from gristmill.model.transformer import Transformer
from gristmill.train.checkpoint import Checkpoint, CheckpointStore, Identity

def peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

folder = Path(sys.argv[1])
tokenizer = Tokenizer.load(folder)
with torch.device("meta"):
    model = Transformer(ModelConfig("nemotron", 272, 1024, uniform_blocks(7, 32, 32, 64, 64), 64))
model = model.to_empty(device="cpu")
model.init_weights(0)
size = sum(parameter.nbytes for parameter in model.parameters())
before = peak()
save_model(model, tokenizer, folder / "big")
store = CheckpointStore(folder / "train", Identity("model", "data", "settings"))
store.save(Checkpoint(1, False, {}, {name: parameter.T for name, parameter in model.named_parameters()}))
print(size, peak() - before)
del model
before = peak()
assert store.load() is not None
print(size, peak() - before)
"""

LOADING = """
import resource, sys
from gristmill.model.hf import load_model

def peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

before = peak()
model, _ = load_model(sys.argv[1])
print(peak() - before)
"""


def test_neither_a_save_nor_a_load_holds_a_second_copy(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path)
    out = subprocess.run([sys.executable, "-c", BIG, str(tmp_path)], capture_output=True, text=True, check=True).stdout
    for line in out.splitlines():
        size, more = map(int, line.split())
        assert size > 200_000_000 and more < 0.25 * size
    loading = subprocess.run([sys.executable, "-c", LOADING, str(tmp_path / "big")], capture_output=True, text=True, check=True).stdout
    assert int(loading) < 1.08 * size


def test_a_failed_save_leaves_the_old_model_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint(folder)

    def full_disk(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gristmill.model.hf_save.write_tensors", full_disk)
    with pytest.raises(InputError, match="No space left"):
        save_model(Transformer(CONFIG), TOKENIZER, folder)
    assert fingerprint(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
