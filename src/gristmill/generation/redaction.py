"""Redaction of an API key in what an endpoint says: whole or in pieces, in its own letters or encoded.

A text is read as its ASCII letters and digits alone, in one case, so that white space, quotes and signs between the pieces hide nothing;
and once more with its escapes (URL, JSON, HTML, compatibility forms) undone. What is looked for are the key, the key backwards, and its
base64, base32 and hexadecimal forms.
"""

import base64
import html
import re
import unicodedata
import urllib.parse
from collections.abc import Iterator, Sequence

MARK = "[key]"
WITHHELD = "[withheld: it holds the key]"
MIN_KEY = 8  # letters and digits; a shorter key ("none", "EMPTY") is no secret, and may be a word of any answer
MIN_PIECE = 8  # letters and digits of a piece of the key that give it away
MIN_ENCODED = 20  # of a piece of its encoded forms
MIN_HIDDEN = 4  # of the pieces that are hidden once the key was seen
MAX_FOUND = 1000  # pieces in a text; one that holds more is withheld
_ALNUM = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_OTHERS = bytes(set(range(256)) - set(_ALNUM))
_PUBLIC = re.compile(r"\A(?:eyJ[^.]*\.|(?:[A-Za-z0-9]{2,6}[-_]){1,3})")  # what all keys of a maker begin with
_ESCAPE = re.compile(r"\\(?:u([0-9A-Fa-f]{4})|x([0-9A-Fa-f]{2})|(.))", re.DOTALL)


class KeyRedactor:
    """Redactor of one key; "" for none."""

    def __init__(self, key: str):
        self.key = key
        raw, whole = key.encode(), _flat(key)
        self._short = len(whole) < MIN_KEY
        core = _flat(_PUBLIC.sub("", key))
        core = core if len(core) >= 12 else whole
        # the words of a key that is no random one, such as sk-no-key-required, may be anyone's: it must be there whole, or in one piece
        self._random = len(whole) >= 16 and sum(c in b"0123456789" for c in whole) >= 2
        piece = MIN_PIECE if self._random else max(10, len(whole) // 2)
        encoded = [raw.hex().encode(), _flat(base64.b32encode(raw).decode().rstrip("="))[:-1]]
        for offset, skip in ((0, 0), (1, 2), (2, 3)):  # what stands before the key shifts its base64
            text = base64.b64encode(b"\0" * offset + raw).decode().rstrip("=")
            encoded.append(_flat(text[skip : -1 if (offset + len(raw)) % 3 else None]))
        forms = [(form, min(MIN_ENCODED, len(form))) for form in encoded]
        whole_forms = [(whole, len(whole)), (whole[::-1], len(whole))]
        self._in_answers = _probes([*whole_forms, (core, piece), (core[::-1], piece), *forms])
        self._in_words = _probes([(form, max(MIN_HIDDEN, min(MIN_PIECE, len(whole) // 3))) for form in (whole, whole[::-1])] + forms)
        self._hidden_forms = _probes([(form, MIN_HIDDEN) for form in (whole, whole[::-1])] + [(form, MIN_PIECE) for form in encoded])

    def redact(self, texts: Sequence[str], *, words: bool = True) -> list[str]:
        """Texts without the key. Pieces of it may be in several of them.

        Args:
            words: False for what a model wrote: there a key too short to be a secret stays, as the word that it may be.
        """
        if not self.key:
            return list(texts)
        if self._short:
            return [text.replace(self.key, MARK) for text in texts] if words else list(texts)
        if not self._holds("\n".join(texts), words):
            return list(texts)
        return [self._hidden(text) for text in texts]

    def _holds(self, text: str, words: bool) -> bool:
        probes = self._in_words if words else self._in_answers
        for reading in _readings(text):
            flat = _flat(reading)
            for begin, end, form in _found(flat, probes):
                if words or self._random or end - begin == len(form) or _in_one(reading, begin, end):
                    return True
        return False

    def _hidden(self, text: str) -> str:
        for reading in _readings(text):
            spans = sorted((begin, end) for begin, end, _ in _found(_flat(reading), self._hidden_forms))
            if len(spans) > MAX_FOUND:
                return WITHHELD
            if not spans:
                continue
            places, pieces, at = _places(reading), [], 0
            for begin, end in spans:
                if places[begin] >= at:
                    pieces += [reading[at : places[begin]], MARK]
                at = max(at, places[end - 1] + 1)
            text = "".join([*pieces, reading[at:]])
        return WITHHELD if self._holds(text, True) else text


def _probes(forms: Sequence[tuple[bytes, int]]) -> list[tuple[bytes, int, bytes, int]]:
    """(form, smallest piece, probe, where it is in the form): every piece of that size holds one of the probes."""
    out = []
    for form, size in forms:
        width = (size + 1) // 2
        out += [(form, size, form[at : at + width], at) for at in range(0, len(form) - width + 1, size - width + 1)]
    return out


def _found(flat: bytes, probes: Sequence[tuple[bytes, int, bytes, int]]) -> Iterator[tuple[int, int, bytes]]:
    """Begin, end and form of pieces that are long enough, one more than `MAX_FOUND` at most."""
    num = 0
    for form, size, probe, offset in probes:
        at = flat.find(probe)
        while at >= 0 and num <= MAX_FOUND:
            begin, end, left, right = at, at + len(probe), offset, offset + len(probe)
            while begin and left and flat[begin - 1] == form[left - 1]:
                begin, left = begin - 1, left - 1
            while end < len(flat) and right < len(form) and flat[end] == form[right]:
                end, right = end + 1, right + 1
            if end - begin >= size:
                yield begin, end, form
                num += 1
            at = flat.find(probe, end)


def _flat(text: str) -> bytes:
    """The ASCII letters and digits of a text, in lower case."""
    return text.encode("ascii", "ignore").translate(None, _OTHERS).lower()


def _places(text: str) -> list[int]:
    """Where they are in it."""
    return [i for i, c in enumerate(text) if c.isascii() and c.isalnum()]


def _in_one(text: str, begin: int, end: int) -> bool:
    """Whether a span of a text's letters and digits has no space within."""
    places = _places(text)
    return not re.search(r"\s", text[places[begin] : places[end - 1]])


def _readings(text: str) -> Iterator[str]:
    """A text as it is, and with its escapes undone, if it has any, up to three times."""
    for _ in range(4):
        yield text
        plain = urllib.parse.unquote(text) if "%" in text else text
        if "\\" in plain:
            plain = _ESCAPE.sub(lambda m: chr(int(m[1] or m[2], 16)) if m[1] or m[2] else " " if m[3] in "nrtbf" else m[3], plain)
        if "&" in plain:
            plain = html.unescape(plain)
        if not plain.isascii():
            plain = unicodedata.normalize("NFKC", plain)
        if plain == text:
            return
        text = plain
