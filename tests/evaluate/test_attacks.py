"""Attack transformations: deterministic, composable, invertible where they say so, and without content of their own."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill.core.errors import InputError
from gristmill.evaluate.attacks import ATTACKS, CODECS, attack, decode, parse_attack

TEXT = "How do I open the old garden gate?"
ENCODED = st.text(st.characters(codec="utf-8"), max_size=60)


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_a_function_of_text_and_seed(name: str) -> None:
    first = attack(TEXT, name, 7)
    assert first == attack(TEXT, name, 7) != TEXT
    assert attack("", name, 0) is not None and attack("a {b} \\ %s \u00e9\n", name, 0)  # nothing in a prompt is a format


@pytest.mark.parametrize("name", sorted(set(ATTACKS) - set(CODECS) - {"random_case", "spaced", "zero_width", "homoglyphs"}))
def test_words_of_the_request_survive_frames(name: str) -> None:
    assert "gate" in attack(TEXT, name, 1) or name in ("typos", "no_vowels")


@pytest.mark.parametrize("name", [name for name, codec in CODECS.items() if codec.decode and name != "morse"])
@settings(max_examples=20)
@given(text=ENCODED)
def test_a_codec_is_undone(name: str, text: str) -> None:
    encoded = CODECS[name].encode(text)
    assert CODECS[name].decode is not None and CODECS[name].decode(encoded) == text  # type: ignore[misc]


def test_known_codes() -> None:
    assert attack(TEXT, "base64").endswith("SG93IGRvIEkgb3BlbiB0aGUgb2xkIGdhcmRlbiBnYXRlPw==")
    assert CODECS["rot13"].encode("Hello") == "Uryyb" and CODECS["atbash"].encode("abz") == "zya"
    assert CODECS["morse"].encode("SOS now") == "... --- ... / -. --- .--"
    assert decode("morse", CODECS["morse"].encode("sos now?")) == "sos now?"
    assert decode("hex", "  4869 ") == "Hi" and CODECS["leetspeak"].encode("leet") == "l337"


def test_chains_apply_left_to_right_and_the_seed_matters_where_chance_does() -> None:
    chained = attack(TEXT, "base64+role_play")
    assert chained == attack(attack(TEXT, "base64"), "role_play")
    assert attack(TEXT, "many_shot", 0) != attack(TEXT, "many_shot", 1)
    assert attack(TEXT, "payload_split", 0) != attack(TEXT, "payload_split", 1)


def test_tenses() -> None:
    assert attack("How do I bake bread?", "past_tense") == "How did people use to bake bread?"
    assert attack("Write a poem.", "future_tense") == "How will people of the future write a poem?"
    assert attack("Where is the mill?", "past_tense").endswith("Where is the mill?")


@pytest.mark.parametrize(
    ("spec", "part"),
    [("base46", "did you mean base64?"), ("", "choose from"), ("hex+", "no attack"), ("+".join(["hex"] * 5), "at most 4")],
)
def test_a_bad_chain_ends_in_one_sentence(spec: str, part: str) -> None:
    with pytest.raises(InputError, match=part.replace("?", r"\?")):
        parse_attack(spec)


def test_chains_that_grow_too_far_are_refused() -> None:
    with pytest.raises(InputError, match="chain fewer"):
        attack("x" * 2000, "binary+binary+binary")
    with pytest.raises(InputError, match="is no hexadecimal"):
        decode("hex", "xyz")
    with pytest.raises(InputError, match="cannot be undone"):
        decode("leetspeak", "l337")
