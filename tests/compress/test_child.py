"""Children as models: they load, generate, train and quantize as others do; others refuse them; exports are the same function."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gristmill.compress.child import child_config, make_child
from gristmill.compress.export import export_folder, ffn_mult, nas_keys, nas_width, padded
from gristmill.compress.library import Library
from gristmill.compress.variants import Choice
from gristmill.core.errors import InputError
from gristmill.data.chat_format import FORMATS
from gristmill.data.tokenizer import Tokenizer
from gristmill.engine.engine import Engine
from gristmill.engine.parity import logprob_parity
from gristmill.generation.api import Request, SamplingParams
from gristmill.model.config import BlockConfig, ModelConfig, uniform_blocks
from gristmill.model.convert import quantize_folder
from gristmill.model.flops import kv_bytes_per_token
from gristmill.model.hf import load_model
from gristmill.model.hf_save import save_model
from gristmill.model.packed import PackedShape
from gristmill.model.transformer import Transformer
from gristmill.train.batches import Sample
from gristmill.train.objectives.next_token import next_token_objective
from gristmill.train.trainer import Trainer, TrainSettings

# Attention in the last layer alone, a layer without any, one without an MLP, and three widths.
MIXED = (BlockConfig(0, 0, 0, 24), BlockConfig(0, 0, 0, 8), BlockConfig(4, 2, 8, 0), BlockConfig(4, 1, 8, 40))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["a b c"], 300, FORMATS["chatml"].special_tokens)


def mixed(family: str, tokenizer: Tokenizer, blocks: tuple[BlockConfig, ...] = MIXED) -> Transformer:
    model = Transformer(ModelConfig(family, tokenizer.vocab_size, 32, blocks, 64, init_std=0.2)).requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return model


def logits(model: Transformer, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor(ids), PackedShape.from_lengths([len(ids)]))


@pytest.mark.parametrize("blocks", [MIXED, (*MIXED[2:], *MIXED[:2]), (BlockConfig(0, 0, 0, 16), BlockConfig(4, 2, 8, 16))])
def test_a_mixed_model_generates_what_training_computes(tokenizer: Tokenizer, tmp_path: Path, blocks: tuple[BlockConfig, ...]) -> None:
    save_model(mixed("nemotron", tokenizer, blocks), tokenizer, tmp_path / "model")
    model, loaded = load_model(tmp_path / "model")
    assert model.config.blocks == blocks
    engine = Engine(model, loaded, FORMATS["chatml"], name="mixed", max_batch=4)
    requests = [Request(str(i), (), SamplingParams(max_tokens=12, n=2), i, prompt_ids=(1, 2, 3 + i)) for i in range(3)]
    answered = list(engine.generate(requests))
    for request, outs in answered:
        for out in outs:
            ids_T = torch.tensor([*request.prompt_ids, *out.tokens])
            own_TV = model(ids_T, PackedShape.from_lengths([len(ids_T)])).log_softmax(-1)
            own_T = own_TV[2:-1].gather(1, ids_T[3:, None])[:, 0]
            torch.testing.assert_close(own_T, torch.tensor(out.logprobs), rtol=0, atol=1e-4)
    assert logprob_parity(engine, model, [])["tokens"] == 0


def test_the_cache_holds_what_layers_have(tokenizer: Tokenizer) -> None:
    engine = Engine(mixed("nemotron", tokenizer), tokenizer, FORMATS["chatml"], name="mixed", max_batch=4)
    bytes_per_token = engine.core().model_runner.kv_cache.bytes_per_block / 32
    assert bytes_per_token >= kv_bytes_per_token(engine.model.config, 4) == 2 * (2 + 1) * 8 * 4
    uniform = Engine(mixed("nemotron", tokenizer, uniform_blocks(4, 4, 2, 8, 40)), tokenizer, FORMATS["chatml"], name="u", max_batch=4)
    assert uniform.core().model_runner.kv_cache.bytes_per_block * 3 == engine.core().model_runner.kv_cache.bytes_per_block * 8


def test_a_mixed_model_trains_quantizes_and_is_refused_by_transformers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = mixed("nemotron", tokenizer).requires_grad_()
    samples = [Sample([1, 2, 3, 4, 5, 6] * 4, [True] * 24, "one")]
    trainer = Trainer(model, next_token_objective, TrainSettings(lr=1e-2, steps=8, batch_size=1, micro_batch_tokens=64))
    losses = [trainer.step(samples)["loss"] for _ in range(8)]
    assert losses[-1] < losses[0] - 0.5
    save_model(model, tokenizer, tmp_path / "model")
    with pytest.raises(ValueError, match="gristmill"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    quantize_folder(tmp_path / "model", tmp_path / "int8", "int8", dtype="fp32")
    small = load_model(tmp_path / "int8")[0]
    assert small.config == model.config
    whole_TV, small_TV = (logits(one, [1, 2, 3, 4]).log_softmax(-1) for one in (model, small))
    assert 0 < float((whole_TV.exp() * (whole_TV - small_TV)).sum(-1).mean()) < 0.02


def test_a_layer_without_both_halves_is_left_out(make_parent) -> None:  # type: ignore[no-untyped-def]
    parent = make_parent("nemotron", 3)
    choices = [Choice(2, 64), Choice(0, 0), Choice(2, 64)]
    child = make_child(Library(parent, Path()), choices)
    assert child.layers == (0, 2) and child.model.config.num_layers == 2
    ids = [3, 1, 4, 1, 5]
    x_TD = parent.embed(torch.tensor(ids))
    shape = PackedShape.from_lengths([5])
    for number in (0, 2):
        x_TD = parent.blocks[str(number)](x_TD, *parent.rope(shape.positions_T)["global"], shape)
    torch.testing.assert_close(logits(child.model, ids), parent.logits(parent.final_norm(x_TD)))
    with pytest.raises(InputError, match="A child needs a layer"):
        child_config(parent.config, [Choice(0, 0)] * 3)


@pytest.mark.parametrize("family", ["nemotron", "llama", "qwen3", "olmo2", "gemma2"])
def test_a_padded_model_is_the_same_function(tokenizer: Tokenizer, family: str) -> None:
    model = mixed(family, tokenizer)
    wide = padded(model)
    assert {(b.num_kv_heads, b.ffn_size) for b in wide.config.blocks} == {(2, 40)}
    torch.testing.assert_close(logits(wide, list(range(20))), logits(model, list(range(20))), rtol=1e-5, atol=1e-5)


def test_transformers_runs_the_padded_export(tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = mixed("nemotron", tokenizer)
    save_model(model, tokenizer, tmp_path / "model")
    facts = export_folder(tmp_path / "model", tmp_path / "padded", "padded")
    assert facts["parameters_written"] > facts["parameters"] == sum(p.numel() for p in model.parameters())
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "padded", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        theirs_TV = theirs(torch.arange(20)[None]).logits[0]
    torch.testing.assert_close(theirs_TV, logits(model, list(range(20))), rtol=0, atol=2e-4)


@pytest.mark.parametrize("hidden", [576, 960, 2048, 4096, 5120, 8192, 16_384])
def test_a_width_survives_the_rounding_of_other_readers(hidden: int) -> None:
    for width in range(256, 8 * hidden, 256):
        assert nas_width(ffn_mult(width, hidden), hidden) == width


def test_a_llama_is_written_as_decilm(tokenizer: Tokenizer, tmp_path: Path) -> None:
    blocks = (BlockConfig(4, 2, 8, 256), BlockConfig(0, 0, 0, 512), BlockConfig(4, 1, 8, 256), BlockConfig(0, 0, 0, 256))
    save_model(mixed("llama", tokenizer, blocks), tokenizer, tmp_path / "model")
    export_folder(tmp_path / "model", tmp_path / "nas", "nemotron-nas")
    config = json.loads((tmp_path / "nas" / "config.json").read_text())
    assert config["architectures"] == ["DeciLMForCausalLM"] and config["model_type"] == "nemotron-nas"
    groups = [one["attention"]["n_heads_in_group"] for one in config["block_configs"]]
    assert groups == [2, None, 4, None] and [one["attention"]["no_op"] for one in config["block_configs"]] == [False, True, False, True]
    assert [nas_width(one["ffn"]["ffn_mult"], 32) for one in config["block_configs"]] == [256, 512, 256, 256]
    assert config["per_layer_config"]["1"] == {"intermediate_size": 512, "skip": ["attention"]}


@pytest.mark.parametrize(
    ("family", "blocks", "words"),
    [
        ("nemotron", uniform_blocks(2, 4, 2, 8, 256), "children of the Llama family"),
        ("llama", (BlockConfig(0, 0, 0, 256), BlockConfig(4, 2, 8, 256)), "a first layer with attention"),
        ("llama", (BlockConfig(4, 2, 8, 256), BlockConfig(4, 2, 8, 0)), "an MLP in every layer"),
        ("llama", uniform_blocks(2, 4, 2, 8, 64), "multiples of 256"),
    ],
)
def test_what_decilm_cannot_hold_is_refused(family: str, blocks: tuple[BlockConfig, ...], words: str) -> None:
    config = ModelConfig(family, 96, 32, blocks, 64)
    with pytest.raises(InputError, match=f"nemotron-nas takes .*{words}"):
        nas_keys(replace(config))
