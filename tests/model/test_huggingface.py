"""Logits equal those of transformers, with weights exchanged in both directions."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers

from gristmill.data.chat import Conversation, Message
from gristmill.data.chat_format import FORMATS
from gristmill.data.tokenizer import Tokenizer
from gristmill.model.config import BlockConfig, ModelConfig, RopeScaling, uniform_blocks
from gristmill.model.hf import load_model
from gristmill.model.hf_config import to_hf
from gristmill.model.hf_save import save_model
from gristmill.model.hf_tensors import hf_tensors
from gristmill.model.packed import PackedShape
from gristmill.model.transformer import Transformer
from gristmill.train.losses import cross_entropy_sum

TOKENIZER = Tokenizer.train(["a mill that grinds its own grain"] * 3, 270, [])
LENGTHS = [7, 1, 33, 20]
BLOCKS = uniform_blocks(3, 6, 2, 16, 80)
LLAMA3_ROPE = RopeScaling(8.0, 1.0, 4.0, 16)

CONFIGS = {
    "nemotron": ModelConfig("nemotron", 272, 48, BLOCKS, 64, init_std=0.2),
    "llama": ModelConfig("llama", 272, 48, BLOCKS, 64, rotary_fraction=1.0, norm_eps=1e-6, init_std=0.2),
    "llama3": ModelConfig("llama", 272, 48, BLOCKS, 64, 1e-5, 1.0, 500.0, LLAMA3_ROPE, tie_embeddings=True, init_std=0.2),
    "qwen2": ModelConfig("qwen2", 272, 48, BLOCKS, 64, 1e-6, 1.0, 1e6, init_std=0.2),
    "qwen3": ModelConfig("qwen3", 272, 48, BLOCKS, 64, 1e-6, 1.0, 1e6, tie_embeddings=True, init_std=0.2),
}
FULL, WINDOW, NOPE, LOCAL = (
    BlockConfig(6, 2, 16, 80, *rest) for rest in ((), (8,), (0, "none"), (5, "local"))
)  # windows are smaller than the texts
THREE = tuple(BlockConfig(3, 1, 16, 40, 8) for _ in range(2))
YARN = RopeScaling(4.0, original_max_positions=16, kind="yarn")
LINEAR = RopeScaling(2.5, kind="linear")
LONG = RopeScaling(
    kind="longrope",
    short_factor=(1.0, 1.1, 1.2, 1.5, 2.0, 3.0),
    long_factor=(1.0, 2.0, 3.0, 4.0, 5.0, 9.0),
    original_max_positions=40,
    extended_max_positions=160,
)


def of(family: str, *blocks: BlockConfig, **rest: Any) -> ModelConfig:
    return ModelConfig(family, 272, 48, blocks, **{"max_positions": 64, "init_std": 0.2} | rest)


CONFIGS |= {
    "llama_biases": of("llama", FULL, FULL, attention_bias=True, mlp_bias=True, rope_scaling=LINEAR),
    "llama_dynamic": of("llama", FULL, FULL, rope_scaling=RopeScaling(4.0, kind="dynamic")),
    "llama_yarn": of("llama", FULL, FULL, rope_scaling=YARN, rope_theta=500.0),
    "nemotron_yarn": of("nemotron", FULL, FULL, rope_scaling=replace(YARN, attention_factor=1.3, beta_fast=4.0, truncate=False)),
    "qwen2_yarn": of("qwen2", FULL, WINDOW, WINDOW, rope_scaling=replace(YARN, mscale=0.7, mscale_all_dim=0.4, beta_slow=0.5)),
    "qwen3_windows": of("qwen3", WINDOW, FULL, WINDOW, attention_bias=True),
    "mistral": of("mistral", FULL, FULL),
    "mistral_windows": of("mistral", WINDOW, WINDOW, rope_scaling=LLAMA3_ROPE, tie_embeddings=True),
    "smollm3": of("smollm3", FULL, FULL, NOPE, FULL, tie_embeddings=True),
    "smollm3_windows": of("smollm3", FULL, replace(NOPE, window=8), WINDOW, NOPE, attention_bias=True, mlp_bias=True),
    "olmo2": of("olmo2", FULL, FULL, rope_scaling=YARN),
    "olmo2_bias": of("olmo2", *uniform_blocks(2, 3, 1, 20, 40), attention_bias=True, tie_embeddings=True),
    "granite": of(
        "granite", FULL, FULL, attention_scale=0.1, embedding_multiplier=12.0, residual_multiplier=0.22, logits_scaling=3.0, mlp_bias=True
    ),
    "phi3": of("phi3", FULL, FULL, rotary_fraction=0.75),
    "phi3_long": of("phi3", *THREE, rotary_fraction=0.75, rope_scaling=LONG, max_positions=40),
    "phi3_longer": of("phi3", *THREE, rotary_fraction=0.75, rope_scaling=replace(LONG, factor=8.0, attention_factor=1.4), max_positions=40),
    "gemma": of("gemma", FULL, FULL, tie_embeddings=True, attention_bias=True),
    "gemma2": of("gemma2", WINDOW, FULL, WINDOW, attention_scale=144**-0.5, attention_soft_cap=2.0, logits_soft_cap=3.0),
    "gemma2_uncapped": of("gemma2", *uniform_blocks(2, 3, 3, 20, 40), attention_scale=20**-0.5, rope_scaling=LINEAR),
    "gemma3": of("gemma3_text", LOCAL, LOCAL, FULL, attention_scale=24**-0.5, logits_soft_cap=4.0, rope_scaling=YARN, tie_embeddings=True),
    "gemma3_local": of("gemma3_text", LOCAL, FULL, local_rope_scaling=LINEAR, local_rope_theta=300.0, rope_theta=1e6, attention_bias=True),
}


def assert_equal_logits(ours: Transformer, theirs: Any) -> None:
    """One packed pass of ours against one pass of theirs for each document."""
    ids_T = torch.randint(0, 272, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        packed_TV = ours(ids_T, PackedShape.from_lengths(LENGTHS))
        separate_TV = torch.cat([theirs(ids[None]).logits[0] for ids in ids_T.split(LENGTHS)])
    assert separate_TV.std() > 0.1  # not a comparison of zeros
    # with these weights each of the two lies up to 4e-5 from what fp64 gives
    torch.testing.assert_close(packed_TV, separate_TV, atol=1e-4, rtol=0)


def randomise(model: torch.nn.Module) -> None:
    """Every vector far off its start, so that each norm and bias is seen."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.4 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_reads_ours(name: str, tmp_path: Path) -> None:
    ours = Transformer(CONFIGS[name])
    randomise(ours)
    save_model(ours, TOKENIZER, tmp_path / "model", max_shard_bytes=50_000)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    assert type(theirs).__name__ == CONFIGS[name].parts.architecture
    assert_equal_logits(ours, theirs.float())
    read = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert read.encode("its own grain", add_special_tokens=False) == TOKENIZER.encode("its own grain")


@pytest.mark.parametrize("name", CONFIGS)
def test_we_read_transformers(name: str, tmp_path: Path) -> None:
    config = transformers.AutoConfig.for_model(**to_hf(CONFIGS[name]), eos_token_id=TOKENIZER.eos_id)
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "model")
    TOKENIZER.save(tmp_path / "model")
    ours, _ = load_model(tmp_path / "model")
    assert ours.config == CONFIGS[name], json.loads((tmp_path / "model" / "config.json").read_text())
    assert_equal_logits(ours, theirs)


@pytest.mark.parametrize("name", ["mistral_windows", "smollm3_windows", "olmo2_bias", "granite", "phi3_long", "gemma2", "gemma3"])
def test_gradients_are_transformers(name: str, tmp_path: Path) -> None:
    ours = Transformer(CONFIGS[name])
    randomise(ours)
    save_model(ours, TOKENIZER, tmp_path / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager")
    ids_T = torch.randint(0, 272, (53,), generator=torch.Generator().manual_seed(0))
    h_TD = ours.hidden(ids_T, PackedShape.from_lengths([33, 20]))
    rows_R = torch.tensor([*range(32), *range(33, 52)])
    cross_entropy_sum(h_TD[rows_R], ours.unembedding(), ids_T[rows_R + 1], cap=ours.config.logits_soft_cap)[0].backward()
    for ids in ids_T.split([33, 20]):
        F.cross_entropy(theirs(ids[None]).logits[0, :-1], ids[1:], reduction="sum").backward()
    for parameter in ours.parameters():
        assert parameter.grad is not None
        parameter.data = parameter.grad  # so that the gradients get Hugging Face's names
    mine = hf_tensors(ours)
    for key, parameter in theirs.named_parameters():
        assert parameter.grad is not None and (mine[key] - parameter.grad).norm() <= 1e-4 * parameter.grad.norm() + 1e-5, key


SYSTEM, SAID = Message("system", "Be kind."), Message("assistant", "A mill.")
ASKED, MORE = Message("user", "Who's there?\nSay it."), Message("user", "So?")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("talk", [(ASKED,), (SYSTEM, ASKED), (ASKED, SAID, MORE), (SYSTEM, ASKED, SAID, MORE, SAID, MORE)])
def test_other_programs_write_conversations_as_we_do(name: str, talk: Conversation, tmp_path: Path) -> None:
    form = FORMATS[name]
    tokenizer = Tokenizer.train(["Who's there?\nSay it. So? A mill. Be kind. User\nAssistant\nSystem\n"] * 3, 320, form.special_tokens)
    save_model(Transformer(ModelConfig("llama", tokenizer.vocab_size, 48, BLOCKS, 64)), tokenizer, tmp_path / "model")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    turns = [{"role": m.role, "content": m.content} for m in talk]
    asked = theirs.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert theirs.encode(asked, add_special_tokens=False) == form.render_prompt(talk, tokenizer)
    whole = theirs.apply_chat_template([*turns, {"role": "assistant", "content": "Yes."}], tokenize=False)
    assert theirs.encode(whole, add_special_tokens=False) == form.render((*talk, Message("assistant", "Yes.")), tokenizer).ids
    stops = transformers.GenerationConfig.from_pretrained(tmp_path / "model").eos_token_id
    assert stops == [tokenizer.eos_id, form.end_of_turn_id(tokenizer)]
