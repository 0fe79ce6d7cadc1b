"""The fast encoder gives what the slow one gives, and the slow one is used where that is not certain."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as HFTokenizer

import gristmill.miniature
from gristmill.curate.blend import encode
from gristmill.curate.blend.encode import fast_encoder
from gristmill.data.tokenizer import EOS, Tokenizer

pytest.importorskip("tiktoken")

SPECIAL = ["<|im_start|>", "<extra_id_0>"]
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DOCUMENTS = [
    "the mill grinds 1234 sacks of wheat, don't stop\n\n  now  77 \t\t x\r\n",
    "def f(x):\n    return x + 10  # ten\n        " + " " * 40,
    "Größe, naïve, 漢字かな交じり文, Привет мир, 🙂🙂👍🏽 ２０２５ ௧௨ ́e\u0301",
    f"{EOS} {' '.join(SPECIAL)} <|im_start|><think></think>",
] * 8

# What is hard: digits of many scripts, spaces of many kinds, control characters, names of tokens, letters newer than some Unicode tables.
PARTS = st.sampled_from(
    [
        EOS,
        *SPECIAL,
        "<think>",
        "the",
        " the",
        "'S",
        "'ſ",
        "\u212a",
        "don't",
        " ",
        "  ",
        "\t",
        "\n",
        "\r\n",
        "\u00a0",
        "\u3000",
        "\u2028",
        "\x85",
    ]
    + [
        "\x1c",
        "\x00",
        "\x7f",
        "7",
        "42",
        "２",
        "௧",
        "²",
        "½",
        "Ⅷ",
        "e\u0301",
        "\u0301",
        "漢",
        "🙂",
        "👍🏽",
        "\u200d",
        "\ufeff",
        "\ue000",
        "\U00010940",
    ]
    + ["\U00031350", "\U0001e4d0", "\U0002ebf0", "\U00016d43", "\U0010ffff", "\u1c89", "aaaaaaaa", "        ", "_", "-", "…"]
)
ANY = st.lists(PARTS | st.text(max_size=5), max_size=14).map("".join)


def trained(pre: list[object] | object, *, normalizer: object = None, names: list[str] | None = None) -> Tokenizer:
    backend = HFTokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(pre) if isinstance(pre, list) else pre
    backend.decoder = decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    special = [AddedToken(t, special=True, normalized=False) for t in [EOS, *SPECIAL]]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(DOCUMENTS, trainer=trainer)
    backend.add_tokens([AddedToken(name, normalized=False) for name in names or []])
    return Tokenizer(backend)


def split(expression: str) -> list[object]:
    return [
        pre_tokenizers.Split(Regex(expression), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


def changed(tokenizer: Tokenizer, change: Callable[[dict], None]) -> Tokenizer:
    parts = json.loads(tokenizer.to_json())
    change(parts)
    return Tokenizer(HFTokenizer.from_str(json.dumps(parts)))


def all_pairs(parts: dict) -> None:
    """List every pair that makes a token, as conversions of Llama 3's vocabulary do, and let tokens be found whole."""
    vocab, merges = parts["model"]["vocab"], []
    for left, right in parts["model"]["merges"]:
        whole = left + right
        merges += [[whole[:i], whole[i:]] for i in range(1, len(whole)) if whole[:i] in vocab and whole[i:] in vocab]
    parts["model"] |= {"merges": merges, "ignore_merges": True}
    for token in parts["added_tokens"]:
        del vocab[token["content"]]
    parts["model"]["vocab"] = {name: i for i, name in enumerate(sorted(vocab, key=vocab.get))}  # control tokens come after all others
    for i, token in enumerate(parts["added_tokens"], len(vocab)):
        token["id"] = i


OWN = Tokenizer.train(DOCUMENTS, 600, SPECIAL)
LLAMA = trained(split(LLAMA3))
FAST = {
    "own": OWN,
    "miniature": Tokenizer.load(Path(gristmill.miniature.__file__).parent / "checkpoint"),
    "gpt2": trained(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)),
    "llama3": LLAMA,
    "llama3 as converted": changed(LLAMA, all_pairs),
    "qwen": trained(split(LLAMA3.replace("{1,3}", "")), normalizer=normalizers.NFC(), names=["<think>", "e\u0301"]),
    "o200k": trained(split(O200K)),
    "gaps": trained(split(r"\p{L}+|[\r\n]")),
}
ENCODERS = {name: fast_encoder(tokenizer) for name, tokenizer in FAST.items()}


@pytest.mark.parametrize("name", FAST)
def test_these_are_encoded_fast(name: str) -> None:
    assert not ENCODERS[name].exact
    ids = ENCODERS[name](DOCUMENTS)
    assert [one.tolist() for one in ids] == FAST[name].encode_batch(DOCUMENTS)
    assert {one.dtype for one in ids} == {np.dtype(np.int32)} and not ENCODERS[name].exact


@given(ANY)
@example("a  7 \n 7  \n\n77\t8  ")
@example("x" + " " * 30 + "٣" + " " * 3)
def test_the_same_ids(text: str) -> None:
    for name, tokenizer in FAST.items():
        encoder = ENCODERS[name]
        encoder._unchecked = 0  # else the check would hide a difference
        assert encoder([text])[0].tolist() == tokenizer.encode(text), name


@given(st.text(max_size=30), st.sampled_from([EOS, *SPECIAL]))
def test_text_never_becomes_a_control_token(text: str, control: str) -> None:
    for name, tokenizer in FAST.items():
        if tokenizer.has(control):
            assert tokenizer.special_id(control) not in ENCODERS[name]([text + control + text])[0]


@pytest.mark.parametrize("name", ["own", "gpt2", "llama3"])
def test_every_code_point(name: str) -> None:
    points = "".join(chr(c) for c in range(0xF0000) if not 0xD800 <= c < 0xE000 and (c < 0x3400 or c % 11 == 0))
    ENCODERS[name]._unchecked = 0
    assert ENCODERS[name]([points])[0].tolist() == FAST[name].encode(points)


def test_a_text_that_the_regex_library_gives_up_on() -> None:
    text = "a" + " " * 300_000 + "b"
    assert ENCODERS["own"]([text])[0].tolist() == OWN.encode(text)


def merges_of_one_more(parts: dict) -> None:
    """A token of which one split is not listed, and that its own bytes do not make: tiktoken would make it, `tokenizers` does not."""
    vocab, merges = parts["model"]["vocab"], parts["model"]["merges"]
    for whole in ("xq", "qz", "xqz"):
        vocab[whole] = max(vocab.values()) + 1
    merges += [["q", "z"], ["x", "q"], ["xq", "z"]]


SLOW = {
    "a prefix space": trained(pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=True)),
    "another split": trained([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
    "no such expression": trained(split(r"\w+|\W")),
    "a count in a count": trained(split(r"\p{N}{1,2}+|\p{L}+")),
    "matches nothing": trained(split(r"\p{L}*")),
    "other normalisation": trained(split(LLAMA3), normalizer=normalizers.Lowercase()),
    "other merges": changed(OWN, merges_of_one_more),
    "dropout": changed(OWN, lambda parts: parts["model"].update(dropout=1e-9)),
}


@pytest.mark.parametrize("name", SLOW)
def test_these_are_encoded_by_the_slow_one(name: str) -> None:
    encoder = fast_encoder(SLOW[name])
    assert encoder.exact
    texts = [*DOCUMENTS, "", "xqz"]
    assert [one.tolist() for one in encoder(texts)] == SLOW[name].encode_batch(texts)


def test_without_tiktoken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tiktoken", None)
    assert fast_encoder(OWN).exact


def test_a_difference_in_the_first_documents_makes_it_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "CHECKED", 3)
    encoder = fast_encoder(OWN)
    right = encoder._fast
    encoder._fast = lambda text: np.zeros(1, np.int32) if text == "wrong" else right(text)
    assert [len(one) for one in encoder(["a", "b"])] == [1, 1] and not encoder.exact
    assert [one.tolist() for one in encoder(["wrong", "c"])] == OWN.encode_batch(["wrong", "c"])
    assert encoder.exact


def test_no_texts() -> None:
    assert fast_encoder(OWN)([]) == [] and fast_encoder(SLOW["dropout"])([]) == []


def test_the_slow_one_goes_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "EXACT_CHARACTERS", 50)
    assert [one.tolist() for one in fast_encoder(SLOW["dropout"])(DOCUMENTS)] == SLOW["dropout"].encode_batch(DOCUMENTS)
