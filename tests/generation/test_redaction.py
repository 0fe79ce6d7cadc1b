"""The key is hidden in whatever form it comes back, and ordinary words stay."""

import base64
import html
import json
import random
import string
import urllib.parse

import pytest

from gristmill.generation.redaction import KeyRedactor

KEYS = ["sk-proj-9fK2mQ7zT4xW8bN1cV6pLr3dAa0Zq5Yt", "PLAINKEY-abc123XYZ", "nvapi-0123456789abcdefghij", "sk-quite-secret-words"]
FORMS = {
    "plain": lambda key: key,
    "upper": lambda key: key.upper(),
    "swapped": lambda key: key.swapcase(),
    "backwards": lambda key: key[::-1],
    "base64": lambda key: base64.b64encode(key.encode()).decode(),
    "base64 shifted once": lambda key: base64.b64encode(b"x" + key.encode() + b"yz").decode(),
    "base64 shifted twice": lambda key: base64.urlsafe_b64encode(b"xx" + key.encode() + b"y").decode(),
    "base64 in lines": lambda key: "\n".join(base64.b64encode(key.encode()).decode()[at : at + 7] for at in range(0, 80, 7)),
    "base32": lambda key: base64.b32encode(key.encode()).decode(),
    "hex": lambda key: key.encode().hex(":"),
    "url": lambda key: "".join(f"%{byte:02X}" for byte in key.encode()),
    "url twice": lambda key: urllib.parse.quote("".join(f"%{byte:02x}" for byte in key.encode())),
    "json": lambda key: "".join(f"\\u{ord(c):04x}" for c in key),
    "html": lambda key: "".join(f"&#{ord(c)};" for c in key),
    "spaces": lambda key: " ".join(key),
    "escaped lines": lambda key: "\\n".join(key),
    "zero width": lambda key: "\u200b".join(key),
    "full width": lambda key: "".join(chr(ord(c) + 0xFEE0) for c in key),
}


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_hidden(key: str, form: str) -> None:
    echo = FORMS[form](key)
    for words in (True, False):
        (text,) = KeyRedactor(key).redact([f"before {echo} after"], words=words)
        left = "".join(c for c in html.unescape(text).lower() if c.isalnum())
        flat = "".join(c for c in echo.lower() if c.isalnum())
        assert not any(flat[at : at + 9] in left for at in range(len(flat) - 8)), text
        assert text.startswith("before ") and text.endswith(" after")


@pytest.mark.parametrize("key", KEYS[:3])
def test_pieces_in_several_fields_are_hidden(key: str) -> None:
    half, third = len(key) // 2, len(key) // 3
    for fields in (
        {"a": key[:half], "b": key[half:]},
        {"a": key[:third], "middle": key[third : 2 * third], "b": key[2 * third :]},
    ):
        (text,) = KeyRedactor(key).redact([json.dumps(fields)])
        assert not any(len(part) > 6 and part in text for part in fields.values()), text
    texts = KeyRedactor(key).redact(["one " + key[:half], key[half:] + " two"], words=False)
    assert texts[0].startswith("one [key]") and texts[1].endswith("[key] two")


def test_what_only_looks_like_it_stays() -> None:
    words = "No API key is required here: say EMPTY or token, or sk-proj-something, and read the secret words of the manual. "
    for key in [*KEYS, "EMPTY", "none", "sk-no-key-required", "token-abc123", ""]:
        assert KeyRedactor(key).redact([words], words=False) == [words], key
    rng = random.Random(0)
    noise = ["".join(rng.choices(string.ascii_letters + string.digits, k=400)) for _ in range(200)]
    assert KeyRedactor(KEYS[0]).redact(noise, words=False) == noise
    assert KeyRedactor("EMPTY").redact(["the key EMPTY is wrong"]) == ["the key [key] is wrong"]


def test_texts_made_of_the_key_end() -> None:
    for text in ("9fk2" * 200_000, KEYS[0] * 20_000, "%25" * 200_000, "\\" * 500_000):
        assert KEYS[0] not in KeyRedactor(KEYS[0]).redact([text])[0]
