"""Text, bytes and offsets of tokens, with tokenizers that put a blank before the first word."""

import codecs
import itertools
import random
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, pre_tokenizers

from gristmill.data.tokenizer import EOS, Tokenizer
from gristmill.engine.engine import Engine
from gristmill.generation.api import Completion
from gristmill.server.protocol import CompletionRequest
from gristmill.server.responses import ChatResponseBuilder, CompletionResponseBuilder, IncrementalDetokenizer, TextOffsets

BLANK = "\u2581"
WORDS = [EOS, "<unk>", f"{BLANK}to", f"{BLANK}be", BLANK, "s", ",", "\u00e9", *(f"<0x{byte:02X}>" for byte in range(256))]


def engine(scheme: str) -> Engine:
    """What builders and detokenizers know of an engine: its tokenizer, of a decoder as Llama's, or of a Metaspace alone."""
    backend = HFTokenizer(models.BPE({word: n for n, word in enumerate(WORDS)}, [], unk_token="<unk>", byte_fallback=True))
    backend.add_special_tokens([EOS])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always" if scheme == "llama" else scheme)
    llama = decoders.Sequence([decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.decoder = llama if scheme == "llama" else decoders.Metaspace(prepend_scheme=scheme)
    fake = SimpleNamespace(tokenizer=Tokenizer(backend), chat_format=SimpleNamespace(close=""), name="m")
    return cast(Engine, fake)


def ids(*words: str) -> list[int]:
    return [WORDS.index(word) for word in words]


SAID = ids(f"{BLANK}to", "s", f"{BLANK}be", BLANK, ",", "\u00e9")


@pytest.mark.parametrize("scheme", ["llama", "always", "first", "never"])
def test_a_completion_goes_on_after_its_prompt(scheme: str) -> None:
    mill = engine(scheme)
    prompt = ids(f"{BLANK}be", ",")
    text = mill.tokenizer.decode(SAID, continued=True)
    assert text == " tos be ,\u00e9"
    for echo in (False, True):
        body = CompletionRequest.model_construct(echo=echo, logprobs=1, n=1, max_tokens=9)
        zeros = [0.0] * len(prompt[1:]), [()] * len(prompt[1:])
        builder = CompletionResponseBuilder(mill, body, [prompt], scored=[zeros] if echo else None, model="mill")
        out = Completion(text, len(SAID), (0.0,) * len(SAID), "stop", tuple(SAID), ((),) * len(SAID))
        choice: dict[str, Any] = builder._choice(0, 0, prompt, out)
        told = choice["logprobs"]
        assert "".join(told["tokens"]) == choice["text"] and len(told["tokens"]) == len(SAID) + 2 * echo
        assert all(choice["text"][at:].startswith(token) for token, at in zip(told["tokens"], told["text_offset"], strict=True))


@pytest.mark.parametrize("scheme", ["llama", "always", "first", "never"])
@pytest.mark.parametrize("continued", [False, True])
def test_bytes_of_a_chat_join_to_its_content(scheme: str, continued: bool) -> None:
    mill = engine(scheme)
    said = [*SAID, *ids("<0xE4>", "<0xBD>", "<0xA0>")] if scheme == "llama" else SAID
    text = mill.tokenizer.decode(said, continued=continued)
    assert text.startswith(" ") is (continued or scheme == "never")
    entries = ChatResponseBuilder(mill, True, model="mill", continued=continued)._entries(
        Completion(text, 0, (0.0,) * len(said), "stop", tuple(said))
    )
    assert bytes(byte for entry in entries for byte in entry["bytes"]).decode() == text
    detokenizer = IncrementalDetokenizer(mill, (), continued=continued)
    assert "".join(map(detokenizer.add, said)) + detokenizer.finish(text) == text


@pytest.mark.parametrize("scheme", ["llama", "first"])
def test_long_streams_keep_their_blanks(scheme: str) -> None:
    mill = engine(scheme)
    said = SAID[:3] * 60
    detokenizer = IncrementalDetokenizer(mill, ())
    text = mill.tokenizer.decode(said)
    assert "".join(map(detokenizer.add, said)) + detokenizer.finish(text) == text and detokenizer.start > 60


def places_of_bytes(data: bytes) -> list[int]:
    """Of each byte the number of its character, where bytes that are no text count as what replaces them."""
    wrong: dict[int, int] = {}

    def note(error: UnicodeError) -> tuple[str, int]:
        assert isinstance(error, UnicodeDecodeError)
        wrong[error.start] = error.end
        return "\ufffd", error.end

    codecs.register_error("note", note)
    data.decode(errors="note")
    places: list[int] = []
    while len(places) < len(data):
        at = len(places)
        length = wrong[at] - at if at in wrong else next(n for n, least in ((4, 0xF0), (3, 0xE0), (2, 0xC0), (1, 0)) if data[at] >= least)
        places += [places[-1] + 1 if places else 0] * length
    return places


def test_an_offset_is_the_place_of_the_character_that_has_a_tokens_first_byte() -> None:
    rng = random.Random(0)
    characters, parts = ("a", "\u00e9", "\u65e5", "\U0001f600", "\ufffd"), (0xDE, 0xE0, 0xE6, 0xF4, 0x80, 0x90, 0xA5, 0xFF)
    pieces = [*(one.encode() for one in characters), *(bytes([byte]) for byte in parts)]
    for _ in range(300):
        data = b"".join(rng.choices(pieces, k=6))
        cuts = [0, *sorted(rng.sample(range(1, len(data)), min(4, len(data) - 1))), len(data)]
        tokens = [data[start:end] for start, end in itertools.pairwise(cuts)]
        fake = SimpleNamespace(
            tokenizer=SimpleNamespace(token_bytes=lambda token, first, of=tokens: of[token], is_special=lambda token: False)
        )
        offsets = TextOffsets(cast(Engine, fake))
        found = [offsets.add(number, keep_special=False) for number in range(len(tokens))]
        assert found == [places_of_bytes(data)[start] for start in cuts[:-1]], (data, tokens)
