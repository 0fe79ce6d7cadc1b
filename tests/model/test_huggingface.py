"""Logits equal those of transformers, with weights exchanged in both directions."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from gristmill.data.chat import FORMATS, Conversation, Message
from gristmill.data.tokenizer import Tokenizer
from gristmill.model.config import ModelConfig, RopeScaling, uniform_blocks
from gristmill.model.hf import load_model, save_model
from gristmill.model.packed import PackedShape
from gristmill.model.transformer import Transformer

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


def assert_equal_logits(ours: Transformer, theirs: Any) -> None:
    """One packed pass of ours against one pass of theirs for each document."""
    ids_T = torch.randint(0, 272, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        packed_TV = ours(ids_T, PackedShape.from_lengths(LENGTHS))
        separate_TV = torch.cat([theirs(ids[None]).logits[0] for ids in ids_T.split(LENGTHS)])
    assert separate_TV.std() > 0.1  # not a comparison of zeros
    torch.testing.assert_close(packed_TV, separate_TV, atol=2e-5, rtol=0)


def randomise(model: torch.nn.Module) -> None:
    """Every vector a little off its start, so that each norm and bias is seen."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_reads_ours(name: str, tmp_path: Path) -> None:
    ours = Transformer(CONFIGS[name])
    randomise(ours)
    save_model(ours, TOKENIZER, tmp_path / "model", max_shard_bytes=50_000)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(report.values()), report
    assert type(theirs).__name__ == CONFIGS[name].parts.architecture
    assert_equal_logits(ours, theirs.float())
    read = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert read.encode("its own grain", add_special_tokens=False) == TOKENIZER.encode("its own grain")


@pytest.mark.parametrize("name", CONFIGS)
def test_we_read_transformers(name: str, tmp_path: Path) -> None:
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**CONFIGS[name].to_hf())).float()
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "model")
    TOKENIZER.save(tmp_path / "model")
    ours, _ = load_model(tmp_path / "model")
    assert ours.config == CONFIGS[name], json.loads((tmp_path / "model" / "config.json").read_text())
    assert_equal_logits(ours, theirs)


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
