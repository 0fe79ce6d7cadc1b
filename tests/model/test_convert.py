"""What a saved model folder says of its tokenizer and chat template, and rows of embeddings for tokens of chats."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as HFTokenizer

from gristmill.core.errors import InputError
from gristmill.data.chat import Message
from gristmill.data.chat_format import FORMATS
from gristmill.data.find_format import guess_format
from gristmill.data.tokenizer import Tokenizer
from gristmill.model.config import ModelConfig, uniform_blocks
from gristmill.model.convert import add_chat_tokens, add_thinking_tokens
from gristmill.model.hf import load_model
from gristmill.model.hf_save import save_model
from gristmill.model.transformer import Transformer

TEMPLATE = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}{% endif %}{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def folder_of(folder: Path, names: list[str], *, tie: bool, padding: int = 0, template: str = "", generation: str = "") -> Path:
    """A random Llama with a foreign tokenizer."""
    backend = HFTokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = [AddedToken(name, special=True, normalized=False) for name in names]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["user assistant hello"] * 3, trainer)
    blocks = uniform_blocks(num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, ffn_size=32)
    decoder = Transformer(ModelConfig("llama", backend.get_vocab_size() + padding, 16, blocks, max_positions=256, tie_embeddings=tie))
    (folder / "t").mkdir(parents=True)
    backend.save(str(folder / "t" / "tokenizer.json"))
    config = {"pad_token": names[-1], "eos_token": names[0], "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "t" / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
    if template:
        (folder / "t" / "chat_template.jinja").write_text(template)
    if generation:
        (folder / "t" / "generation_config.json").write_text(generation)
    save_model(decoder, Tokenizer.load(folder / "t"), folder / "base")
    return folder / "base"


@pytest.mark.parametrize("ends", [[0, 2], [0], 2])
def test_a_saved_folder_holds_the_tokenizers_files_and_the_ends_that_are_due(tmp_path: Path, ends: object) -> None:
    generation = json.dumps({"temperature": 0.6, "eos_token_id": ends})
    base = folder_of(tmp_path, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], tie=True, template=TEMPLATE, generation=generation)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (base / name).read_bytes() == (tmp_path / "t" / name).read_bytes()
    saved = (base / "generation_config.json").read_text()
    assert (saved == generation) == (ends == [0, 2]) and json.loads(saved)["temperature"] == 0.6
    assert set(json.loads(saved)["eos_token_id"]) == {0, 2}, "the end of text, and of a turn by the template"
    model, tokenizer = load_model(base)
    assert json.loads((base / "config.json").read_text())["pad_token_id"] == 2
    for given in ({"temperature": 0.6}, None):  # then config.json says it, as in transformers
        (base / "generation_config.json").unlink()
        if given is not None:
            (base / "generation_config.json").write_text(json.dumps(given))
        (base / "config.json").write_text(json.dumps(json.loads((base / "config.json").read_text()) | {"eos_token_id": [5, 0]}))
        read = Tokenizer.load(base)
        assert read.end_ids == (5, 0) == read.with_tokens(["<|more|>"]).end_ids
        save_model(model, read, tmp_path / "again")
        assert json.loads((tmp_path / "again" / "generation_config.json").read_text()) == (given or {}) | {"eos_token_id": [5, 0, 2]}
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "other.jinja").write_text(TEMPLATE)
    save_model(model, tokenizer, base)  # such a folder may be replaced
    assert not (base / "additional_chat_templates").exists()
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "mine.txt").write_text("keep me")
    with pytest.raises(InputError, match="more than a saved model"):
        save_model(model, tokenizer, base)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("tie", "padding"), [(True, 0), (False, 0), (False, 1), (True, 40)])
def test_a_base_gets_tokens_and_rows_for_them(tmp_path: Path, name: str, tie: bool, padding: int) -> None:
    base = folder_of(tmp_path, ["</s>", "<pad>"], tie=tie, padding=padding)
    before, old = load_model(base)
    with pytest.raises(InputError, match=r"`plain`.*--add-chat-tokens"):
        guess_format(old)
    facts = add_chat_tokens(base, tmp_path / "chat", name)
    after, tokenizer = load_model(tmp_path / "chat")
    new = [tokenizer.special_id(token) for token in FORMATS[name].special_tokens]
    first = old.vocab_size
    assert sorted(new) == list(range(first, first + len(new))) and facts["added"] == len(new)
    assert after.config.vocab_size == max(first + padding, first + len(new))
    pairs = [(before.embedding, after.embedding), (before.unembedding(), after.unembedding())]
    for was, now in pairs:
        assert torch.equal(now[:first], was[:first])
        torch.testing.assert_close(now[new], was[:first].mean(0).expand(len(new), -1))
    assert guess_format(tokenizer) is FORMATS[name]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "chat")
    turns = [{"role": "user", "content": "\nHi"}]
    reference = list(theirs.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False))
    assert FORMATS[name].render_prompt([Message("user", "\nHi")], tokenizer) == reference
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "chat")
    logits = other(torch.tensor([reference])).logits
    assert logits.shape[-1] == after.config.vocab_size and torch.isfinite(logits).all()
    with pytest.raises(InputError, match="brings a chat template already"):
        add_chat_tokens(tmp_path / "chat", tmp_path / "again", "chatml")


def test_tokens_that_are_there_already_keep_their_rows(tmp_path: Path) -> None:
    base = folder_of(tmp_path, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], tie=True)
    facts = add_chat_tokens(base, tmp_path / "chat", "chatml")
    assert facts["added"] == 0 and torch.equal(load_model(base)[0].embedding, load_model(tmp_path / "chat")[0].embedding)
    for out, name, why in ((base, "chatml", "another --out"), (tmp_path / "x", "alpaca", "Unknown chat format")):
        with pytest.raises(InputError, match=why):
            add_chat_tokens(base, out, name)


def test_tags_of_thinking_that_are_control_tokens_are_refused(tmp_path: Path) -> None:
    """No answer would show them, and what they are spelt with keeps its embeddings."""
    folder = folder_of(tmp_path, ["<|endoftext|>", "<think>", "</think>"], tie=False)
    with pytest.raises(InputError, match="<think> is a control token there"):
        add_thinking_tokens(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
