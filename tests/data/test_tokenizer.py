import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, models, pre_tokenizers, processors
from tokenizers import Tokenizer as HFTokenizer

from gristmill.core.errors import InputError
from gristmill.data.chat import FORMATS
from gristmill.data.tokenizer import EOS, Tokenizer

CONTROL = list(dict.fromkeys(t for f in FORMATS.values() for t in f.special_tokens))
# Documents that spell control tokens, so that merges inside their names are learnt.
DOCUMENTS = [
    "the mill grinds 1234 sacks of wheat, don't stop\n\n  now",
    *(f"{t}{t} {EOS}" for t in CONTROL),
] * 20
TOKENIZER = Tokenizer.train(DOCUMENTS, 500, CONTROL)
SPECIAL = {TOKENIZER.special_id(t) for t in [EOS, *CONTROL]}
SPELLING = st.lists(st.sampled_from([EOS, *CONTROL, "<", "|>", " ", "\n", "x"]) | st.text(max_size=4), max_size=8).map("".join)
ANY = st.text(max_size=60) | SPELLING


@given(ANY)
def test_text_round_trips(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text
    assert TOKENIZER.decode(TOKENIZER.encode(text), keep_special=True) == text


@given(st.binary(max_size=60))
def test_every_byte_string_that_is_text_round_trips(data: bytes) -> None:
    text = data.decode("utf-8", errors="replace")
    assert TOKENIZER.decode(TOKENIZER.encode(text)).encode() == text.encode()


def test_every_code_point_round_trips() -> None:
    text = "".join(chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000 and (c < 0x3000 or c % 37 == 0))
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@given(ANY)
def test_text_never_becomes_a_control_token(text: str) -> None:
    assert SPECIAL.isdisjoint(TOKENIZER.encode(text))
    assert [TOKENIZER.encode(text)] == TOKENIZER.encode_batch([text])


@pytest.mark.parametrize("name", [EOS, *CONTROL])
def test_the_name_of_a_control_token_is_plain_text(name: str) -> None:
    ids = TOKENIZER.encode(name)
    assert len(ids) > 1 and TOKENIZER.decode(ids) == name
    assert TOKENIZER.has(name)
    mixed = [*ids, TOKENIZER.special_id(name)]
    assert TOKENIZER.decode(mixed) == name
    assert TOKENIZER.decode(mixed, keep_special=True).replace(" ", "") == name * 2


@given(st.text(alphabet="0123456789 ab.,-\n", max_size=40))
def test_every_digit_is_a_token_of_its_own(text: str) -> None:
    pieces = [TOKENIZER.decode([i]) for i in TOKENIZER.encode(text)]
    assert "".join(pieces) == text
    assert all(len(p) == 1 for p in pieces if re.search(r"\d", p))


def test_no_token_of_the_vocabulary_joins_digits() -> None:
    digits = Tokenizer.train(["12345 67890 12 12 12 2024 2024 3.14"] * 50, 400, [])
    pieces = [digits.decode([i]) for i in range(digits.vocab_size)]
    assert [p for p in pieces if re.search(r"\d", p) and len(p) > 1] == []


def test_white_space_is_kept() -> None:
    for text in (" ", "  a", "a  ", "\n\n\n", "\t\tx = 1\n\n    y", "a \n b", "\u00a0x"):
        assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_training_counts_and_merges() -> None:
    assert TOKENIZER.vocab_size <= 500
    assert len(TOKENIZER.encode("the mill grinds")) < len("the mill grinds") / 2
    assert TOKENIZER.eos_id == TOKENIZER.special_id(EOS)
    again = Tokenizer.train(DOCUMENTS, 500, [*CONTROL, EOS, CONTROL[0]])
    assert again.fingerprint() == TOKENIZER.fingerprint(), "a repeated name changes nothing"


def test_save_and_load(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path / "new")
    loaded = Tokenizer.load(tmp_path / "new")
    assert loaded.fingerprint() == TOKENIZER.fingerprint()
    assert loaded.vocab_size == TOKENIZER.vocab_size and loaded.eos_id == TOKENIZER.eos_id
    for text in [*CONTROL, EOS, "the mill 12\n", "\u00e9\U0001f33e"]:
        assert loaded.encode(text) == TOKENIZER.encode(text)
    other = Tokenizer.train(DOCUMENTS, 300, CONTROL)
    assert other.fingerprint() != TOKENIZER.fingerprint()


def test_transformers_reads_what_is_saved(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    TOKENIZER.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token_id == TOKENIZER.eos_id
    for text in ("the mill grinds 1234 sacks", " a\n\nb ", "\u00e9\U0001f33e"):
        assert theirs.encode(text, add_special_tokens=False) == TOKENIZER.encode(text)
        assert theirs.decode(TOKENIZER.encode(text)) == text


def foreign(eos: str, *, bos: bool = False) -> HFTokenizer:
    """A tokenizer as others ship it: adds a start token, cuts and pads, by its own settings."""
    vocabulary = {c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    backend = HFTokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens([AddedToken(eos, special=True), AddedToken("<s>", special=True)])
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 257)])
        backend.enable_truncation(5)
        backend.enable_padding(length=12)
    return backend


def test_a_loaded_tokenizer_adds_cuts_and_pads_nothing(tmp_path: Path) -> None:
    foreign("</s>", bos=True).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    loaded = Tokenizer.load(tmp_path)
    assert len(loaded.encode("twelve bytes")) == 12 and loaded.encode_batch(["ab", "a"])[1] == loaded.encode("a")
    assert {256, 257}.isdisjoint(loaded.encode("<s>x</s>"))
    assert loaded.eos_id == 256


def test_bad_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read as a tokenizer"):
        Tokenizer.load(tmp_path)
    foreign("</s>").save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match=re.escape(EOS)):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("config", ["{", "[]", '{"eos_token": null}'])
def test_a_bad_tokenizer_config_is_named(config: str, tmp_path: Path) -> None:
    foreign("</s>").save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(InputError):
        Tokenizer.load(tmp_path)


def test_an_unknown_control_token_is_named() -> None:
    assert not TOKENIZER.has("<unheard>")
    with pytest.raises(InputError, match="<unheard>"):
        TOKENIZER.special_id("<unheard>")


def test_combining_marks_stay_in_their_words() -> None:
    words = ["\u0939\u093f\u0928\u094d\u0926\u0940", "\u0928\u0926\u0940", "\u0e19\u0e49\u0e33\u0e19\u0e35\u0e49", "e\u0301te\u0301"]
    tokenizer = Tokenizer.train([f" {word}" for word in words] * 50, 400, [])
    assert [len(tokenizer.encode(f" {word}")) for word in words] == [1, 1, 1, 1]
    assert tokenizer.decode(tokenizer.encode(" ".join(words))) == " ".join(words)
