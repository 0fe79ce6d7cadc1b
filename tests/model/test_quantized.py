"""Quantized folders: written, read, and refused."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from gristmill.core.errors import InputError
from gristmill.data.chat import Message
from gristmill.data.chat_format import FORMATS
from gristmill.engine.engine import Engine
from gristmill.generation.api import Request, SamplingParams
from gristmill.model.convert import quantize_folder
from gristmill.model.hf import load_model, saved_as
from gristmill.model.hf_save import save_quantized
from gristmill.model.hf_tensors import hf_tensors
from gristmill.model.quantized import INT4_GROUPS, KINDS, MAX_VALUES, Quantize, compress, decompress, grouped, scaled

EIGHT_BITS: tuple[Quantize, ...] = ("int8", "int8-weight", "fp8")


@given(seed=st.integers(0, 10**6), rows=st.integers(1, 9), columns=st.integers(1, 40))
def test_what_is_quantized_again_is_the_same(seed: int, rows: int, columns: int) -> None:
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    for dtype, error in ((torch.int8, 0.5 / 127), (torch.float8_e4m3fn, 1 / 16)):
        values, scale = scaled(x, dtype)
        back = values.float() * scale[:, None]
        assert (back - x).abs().max() <= error * x.abs().max() * 1.001
        assert (values.float().abs().amax(-1) == MAX_VALUES[dtype]).all()
        assert torch.equal(scaled(back, dtype)[0].float(), values.float())
    for kind in EIGHT_BITS:
        parts = compress("a_proj.weight", x, kind)
        assert torch.equal(decompress("a_proj.weight", kind, parts.__getitem__), decompress("a_proj.weight", kind, parts.__getitem__))
        assert (decompress("a_proj.weight", kind, parts.__getitem__) - x).abs().max() <= x.abs().max() / (16 if kind == "fp8" else 250)


@given(seed=st.integers(0, 10**6), rows=st.integers(1, 4), groups=st.integers(1, 3), group=st.sampled_from(INT4_GROUPS))
def test_four_bits_have_a_scale_a_group(seed: int, rows: int, groups: int, group: int) -> None:
    x = torch.randn(rows, groups * group, generator=torch.Generator().manual_seed(seed)) * 10.0 ** (seed % 6 - 3)
    x[0, :group] = 0
    parts = compress("a_proj.weight", x, "int4", group=group)
    back = decompress("a_proj.weight", "int4", parts.__getitem__)
    scale = parts["a_proj.weight_scale"]
    assert scale.shape == (rows, groups) and scale.dtype == torch.bfloat16
    # column 8i + j is bits 4j to 4j + 3 of word i
    words = parts["a_proj.weight_packed"].to(torch.int64) & 0xFFFFFFFF
    nibbles = torch.stack([(words >> 4 * j) & 15 for j in range(8)], -1).flatten(1) - 8
    assert torch.equal((nibbles.unflatten(1, (groups, group)) * scale.float()[..., None]).flatten(1), back)
    plain = (x.unflatten(1, (groups, group)).abs().amax(-1, keepdim=True) / 7).clamp(min=1e-30)
    rounded = ((x.unflatten(1, (groups, group)) / plain).round() * plain).flatten(1)
    assert (back - x).square().sum() <= (rounded - x).square().sum() * 1.02, "no worse than rounding to the largest"
    values, scales = grouped(back, 32)
    assert torch.equal((values.float().unflatten(1, (-1, 32)) * scales[..., None]).flatten(1), back), "again, in other groups"


def test_four_bits_where_columns_are_no_whole_groups(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Quantize to int8-weight: int4 has a scale for each 32 columns, and a matrix has 40"):
        compress("a_proj.weight", torch.ones(2, 40), "int4")
    with pytest.raises(InputError, match="or take smaller groups"):
        compress("a_proj.weight", torch.ones(2, 96), "int4", group=64)
    with pytest.raises(InputError, match="Choose a --group"):
        quantize_folder(tiny_base, tmp_path / "x", "int4", dtype="bf16", group=48)
    with pytest.raises(InputError, match="for each 128 columns"):
        quantize_folder(tiny_base, tmp_path / "x", "int4", dtype="bf16", group=128)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_answers_as_one_quantized_when_it_is_loaded(tiny_base: Path, tmp_path: Path, kind: Quantize) -> None:
    model, tokenizer = load_model(tiny_base)
    assert saved_as(tiny_base) == ""
    save_quantized(model, tokenizer, tmp_path / "small", kind=kind, max_shard_bytes=20_000)
    assert saved_as(tmp_path / "small") == kind
    again, _ = load_model(tmp_path / "small")
    for name, tensor in hf_tensors(again).items():
        exact = hf_tensors(model)[name]
        assert torch.equal(tensor, exact) != name.endswith("_proj.weight") and torch.allclose(
            tensor, exact, atol=0.3 if kind == "int4" else 0.05
        )
    requests = [Request(str(i), (Message("user", f"Name a land. {i}"),), SamplingParams(max_tokens=12), seed=i) for i in range(3)]
    said = [
        dict(
            (r.id, outs[0].text)
            for r, outs in Engine(one, tokenizer, FORMATS["nemotron"], name="x", max_batch=8, quantize=kind).generate(requests)
        )
        for one in (model, again)
    ]
    assert said[0] == said[1]


def test_integers_without_scales_are_refused(tiny_base: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(tiny_base)
    save_quantized(model, tokenizer, tmp_path, kind="int8")
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(name for name in tensors if name.endswith("up_proj.weight_scale"))
    for wrong in (None, tensors[name][:1]):
        save_file({k: v for k, v in (tensors | {name: wrong}).items() if v is not None}, tmp_path / "model.safetensors")
        with pytest.raises(InputError):
            load_model(tmp_path)


def test_other_quantizations_are_refused(tiny_base: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(tiny_base)
    save_quantized(model, tokenizer, tmp_path / "small", kind="int8")
    path = tmp_path / "small" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = 3
    for found in (
        config["quantization_config"],
        {"quant_method": "gptq", "bits": 4},
        [1],
        {"config_groups": [1]},
        {"config_groups": {"g": "x"}},
    ):
        path.write_text(json.dumps(config | {"quantization_config": found}))
        with pytest.raises(InputError, match="before it was quantized"):
            load_model(tmp_path / "small")
