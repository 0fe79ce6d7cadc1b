"""Adapter folders: PEFT's form both ways, the base they belong to, merging on disk, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gristmill.core.errors import InputError
from gristmill.data.tokenizer import Tokenizer
from gristmill.model.adapters import CONFIG_FILE, FACTS_FILE, WEIGHTS_FILE, load_model, load_reward, merge_folder, save_adapter
from gristmill.model.config import ModelConfig, uniform_blocks
from gristmill.model.hf import load_model as load_base
from gristmill.model.hf_save import save_model, save_quantized
from gristmill.model.hf_tensors import hf_tensors
from gristmill.model.lora import LoraConfig, adapter_parts, add_adapters
from gristmill.model.reward import RewardModel
from gristmill.model.transformer import Transformer

TOKENIZER = Tokenizer.train(["a mill that grinds its own grain"] * 3, 270, [])
CONFIG = ModelConfig("llama", 272, 32, uniform_blocks(2, 4, 2, 8, 48), 64, init_std=0.2)
LORA = LoraConfig(rank=4, alpha=6.0)


def base_folder(folder: Path, seed: int = 0) -> Path:
    model = Transformer(CONFIG)
    model.init_weights(seed)
    save_model(model, TOKENIZER, folder)
    return folder


def trained(base: Path, lora: LoraConfig = LORA) -> Transformer:
    model, _ = load_base(base)
    add_adapters(model, lora, seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
            elif name.endswith("magnitude"):
                parameter.mul_(1.3)
    return model


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return base_folder(tmp_path / "base")


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    save_adapter(trained(base), LORA, tmp_path / "adapter", base=base, base_dtype="fp32")
    return tmp_path / "adapter"


def edit(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(folder: Path, change: Any) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})


@pytest.mark.parametrize("variant", [{}, {"rslora": True}, {"dora": True}, {"targets": ("k_proj", "gate_proj")}], ids=str)
def test_an_adapter_comes_back_merged_into_its_base(variant: dict[str, Any], base: Path, tmp_path: Path) -> None:
    lora = LoraConfig(rank=4, alpha=6.0, **variant)
    model = trained(base, lora)
    save_adapter(model, lora, tmp_path / "adapter", base=base, base_dtype="fp32")
    merged, _ = load_model(tmp_path / "adapter")
    views = hf_tensors(merged)
    for name, part in adapter_parts(model).items():
        torch.testing.assert_close(views[f"{name}.weight"], part.merged(load_file(base / "model.safetensors")[f"{name}.weight"]))
    assert merge_folder(tmp_path / "adapter", tmp_path / "merged")["update"].keys() == {n.rpartition(".")[2] for n in adapter_parts(model)}
    torch.testing.assert_close(load_base(tmp_path / "merged")[0].state_dict(), merged.state_dict(), rtol=0, atol=0)


def test_a_folder_has_the_names_and_shapes_of_peft(adapter: Path, base: Path) -> None:
    found = json.loads((adapter / CONFIG_FILE).read_text())
    assert {key: found[key] for key in ("peft_type", "task_type", "r", "lora_alpha", "bias", "use_rslora", "use_dora")} == {
        **{"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6, "bias": "none", "use_rslora": False, "use_dora": False}
    }
    assert found["base_model_name_or_path"] == str(base)
    assert found["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    tensors = load_file(adapter / WEIGHTS_FILE)
    assert len(tensors) == 2 * 7 * 2
    assert tensors["base_model.model.model.layers.1.self_attn.k_proj.lora_A.weight"].shape == (4, 32)
    assert tensors["base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"].shape == (32, 4)
    with safe_open(adapter / WEIGHTS_FILE, "pt") as file:
        assert file.metadata()["format"] == "pt"
    assert {path.name for path in adapter.iterdir()} == {CONFIG_FILE, WEIGHTS_FILE, FACTS_FILE}


def test_a_folder_as_peft_writes_it(base: Path, tmp_path: Path) -> None:
    """Keys of peft 0.21 with ranks and alphas by pattern; what it means is computed here."""
    generator = torch.Generator().manual_seed(0)
    folder = tmp_path / "peft"
    folder.mkdir()
    known = load_file(base / "model.safetensors")
    expected, tensors = {}, {}
    for layer in range(2):
        for module, rank, alpha in (("self_attn.q_proj", 6, 3.5), ("self_attn.v_proj", 4, 8), ("mlp.up_proj", 2 if layer else 4, 8)):
            name = f"model.layers.{layer}.{module}"
            weight = known[f"{name}.weight"]
            a, b = torch.randn(rank, 32, generator=generator), torch.randn(len(weight), rank, generator=generator)
            tensors |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b.half()}
            expected[name] = weight + alpha / rank * b.half().float() @ a
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    values = {"alora_invocation_tokens": None, "alpha_pattern": {"q_proj": 3.5}, "arrow_config": None, "auto_mapping": None}
    values |= {"base_model_name_or_path": str(base), "bias": "none", "fan_in_fan_out": False, "inference_mode": True, "loftq_config": {}}
    values |= {"init_lora_weights": True, "lora_alpha": 8, "lora_dropout": 0.1, "megatron_core": "megatron.core", "peft_type": "LORA"}
    values |= {"peft_version": "0.21.2", "qalora_group_size": 16, "r": 4, "task_type": "CAUSAL_LM", "use_dora": False, "use_rslora": False}
    values |= {"rank_pattern": {"^model.layers.1.mlp.up_proj": 2, r".*self_attn\.q.*": 6}, "target_modules": r".*\.(q|v|up)_proj"}
    (folder / CONFIG_FILE).write_text(json.dumps(values))
    views = hf_tensors(load_model(folder)[0])
    for name, weight in known.items():
        torch.testing.assert_close(views[name], expected.get(name.removesuffix(".weight"), weight))


def test_a_merged_model_can_be_stored_in_bf16(adapter: Path, tmp_path: Path) -> None:
    facts = merge_folder(adapter, tmp_path / "merged", dtype="bf16")
    whole, _ = load_model(adapter)
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(torch.equal(stored[name], view.bfloat16()) for name, view in hf_tensors(whole).items())  # merged in fp32, cast last
    assert all(0 < found["rounding"] < 0.2 for found in facts["update"].values())


def test_the_config_of_its_base_beside_an_adapter_makes_no_model_of_it(adapter: Path, base: Path) -> None:
    before, _ = load_model(adapter)
    shutil.copy(base / "config.json", adapter)
    torch.testing.assert_close(load_model(adapter)[0].state_dict(), before.state_dict(), rtol=0, atol=0)


def test_a_quantized_base_is_not_quantized_again(base: Path, tmp_path: Path) -> None:
    from gristmill.engine.load import load_engine

    model, tokenizer = load_base(base)
    small = tmp_path / "small"
    save_quantized(model, tokenizer, small, kind="int8")
    save_adapter(trained(small), LORA, tmp_path / "adapter", base=small, base_dtype="int8")
    whole, _ = load_model(tmp_path / "adapter")
    parts = adapter_parts(trained(small))
    views, before = hf_tensors(whole), hf_tensors(load_base(small)[0])
    for name, part in parts.items():
        torch.testing.assert_close(views[f"{name}.weight"], part.merged(before[f"{name}.weight"]))
    with pytest.raises(InputError, match="chat format"):  # further than reading it needs a chat format, which these tokens lack
        load_engine(tmp_path / "adapter")


def test_a_reward_adapter_has_its_head(base: Path, tmp_path: Path) -> None:
    reward = RewardModel(trained(base), [1.0, 0.5, 0.25, 0.0, -0.125], seed=3)
    save_adapter(reward, LORA, tmp_path / "adapter", base=base, base_dtype="fp32")
    found, _ = load_reward(tmp_path / "adapter")
    assert found.weights == reward.weights and torch.equal(found.head.weight, reward.head.weight)
    torch.testing.assert_close(found.backbone.state_dict(), load_reward(tmp_path / "adapter")[0].backbone.state_dict())
    with pytest.raises(InputError, match="adapter of a reward model"):
        load_model(tmp_path / "adapter")
    merge_folder(tmp_path / "adapter", tmp_path / "merged")
    torch.testing.assert_close(load_reward(tmp_path / "merged")[0].state_dict(), found.state_dict(), rtol=0, atol=0)


def test_another_base_is_told_by_its_fingerprint(adapter: Path, base: Path, tmp_path: Path) -> None:
    other = base_folder(tmp_path / "other", seed=5)
    with pytest.raises(InputError, match="other is another model"):
        merge_folder(adapter, tmp_path / "merged", base=other)
    shutil.move(base, tmp_path / "moved")
    with pytest.raises(InputError, match="Download the base .* is no model folder here"):
        load_model(adapter)
    merge_folder(adapter, tmp_path / "merged", base=tmp_path / "moved")


@pytest.mark.parametrize(
    ("layers", "hidden", "said"),
    [(1, 32, "changes model.layers.1.* which this model lacks"), (3, 32, "model.layers.2.* is not among"), (2, 64, "own base and rank")],
)
def test_a_base_of_another_shape_is_told_by_the_matrix(layers: int, hidden: int, said: str, adapter: Path, tmp_path: Path) -> None:
    config = ModelConfig("llama", 272, hidden, uniform_blocks(layers, 4, 2, 8, 48), 64)
    save_model(Transformer(config), TOKENIZER, tmp_path / "other")
    with pytest.raises(InputError, match=said):
        merge_folder(adapter, tmp_path / "merged", base=tmp_path / "other")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_type": "IA3"}, "peft_type .* 'IA3'"),
        ({"r": 5}, "own base and rank.* \\[4, 48\\], and here it is \\[5, 48\\]"),
        ({"r": 0}, "rank r from 1"),
        ({"r": True}, "rank r from 1"),
        ({"lora_alpha": -1}, "lora_alpha"),
        ({"lora_alpha": "x"}, "lora_alpha"),
        ({"use_dora": True}, "lacks .*lora_magnitude_vector"),
        ({"use_rslora": "yes"}, "use_rslora"),
        ({"bias": "all"}, "trained biases"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"modules_to_save": ["lm_head"]}, "whole modules"),
        ({"init_lora_weights": "pissa"}, "'pissa', which changes the base"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"a_key_of_tomorrow": 1}, "a_key_of_tomorrow"),
        ({"rank_pattern": {"q_proj": 9}}, "own base and rank"),
        ({"rank_pattern": {"(": 9}}, "no expression"),
        ({"alpha_pattern": {"q_proj": None}}, "lora_alpha"),
        ({"rank_pattern": [1]}, "as an object"),
        ({"target_modules": 5}, "list of names"),
        ({"base_model_name_or_path": 5}, "as a text"),
        ({"base_model_name_or_path": "org/name"}, "no model folder here"),
        ({"base_model_name_or_path": None}, "does not say itself"),
        ({"base_model_name_or_path": "."}, "an adapter itself"),
    ],
    ids=str,
)
def test_a_configuration_that_is_not_read_is_named(changes: dict[str, Any], said: str, adapter: Path) -> None:
    edit(adapter, **changes)
    with pytest.raises(InputError, match=said):
        load_model(adapter)


def test_an_expression_takes_no_time(adapter: Path) -> None:
    edit(adapter, alpha_pattern={"(([a-z_.0-9])+)+X": 3.0})
    load_model(adapter)  # a backtracking engine would not end


NAME = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(NAME), f"lacks {NAME}"),
        (lambda t: t.update({"base_model.model.lm_head.lora_A.weight": torch.ones(4, 32)}), "lacks .*lm_head.lora_B"),
        (
            lambda t: t.update({f"base_model.model.lm_head.lora_{x}.weight": torch.ones(4, 4) for x in "AB"}),
            "lm_head, and only the layers' matrices",
        ),
        (lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 4)}), "lora_embedding_A.*not supported"),
        (lambda t: t.update({"base_model.model.model.norm.weight": torch.ones(4)}), "norm.weight, which is not supported"),
        (lambda t: t.update({NAME: torch.ones(4, 31)}), "shape"),
        (lambda t: t.update({NAME: torch.ones(4, 32, dtype=torch.int8)}), "floating-point"),
        (lambda t: t.update({NAME: torch.full((4, 32), torch.nan)}), "not finite"),
        (lambda t: t.update({NAME: torch.full((4, 32), 1e6)}), "beyond what any training makes"),
        (lambda t: t.clear(), "has no tensors"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change: Any, said: str, adapter: Path) -> None:
    rewrite(adapter, change)
    with pytest.raises(InputError, match=said):
        load_model(adapter)


def test_damage_and_places(adapter: Path, base: Path, tmp_path: Path) -> None:
    for out in (adapter, base):
        with pytest.raises(InputError, match="would be replaced"):
            merge_folder(adapter, out)
    with pytest.raises(InputError, match="Give a folder with a LoRA adapter"):
        merge_folder(base, tmp_path / "merged")
    (adapter / WEIGHTS_FILE).write_bytes((adapter / WEIGHTS_FILE).read_bytes()[:-5])
    with pytest.raises(InputError, match="damaged"):
        load_model(adapter)
    (adapter / WEIGHTS_FILE).unlink()
    with pytest.raises(InputError, match="does not exist"):
        load_model(adapter)
