"""Checks of a stranger's tokenizer.json: texts stay as long as they are, have the same ids each time, and come back whole."""

import base64
import json
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as HFTokenizer

from gristmill.core.echo import silenced
from gristmill.core.errors import InputError
from gristmill.core.untrusted import quoted

# Pairs of texts that a tokenizer must tell apart, or it would lose what stands behind them.
LOSSES = (
    ("A", "a", "capital letters"),
    ("a\nb", "a b", "line breaks"),
    ("a\n\nb", "a\nb", "line breaks"),
    ("a\nb", "ab", "line breaks"),
    ("\na", "a", "line breaks at the beginning"),
    ("a\n", "a", "line breaks at the end"),
    ("a  b", "a b", "blanks beside blanks, and so every indentation"),
    ("\u00e9", "e", "accents"),
)
ASCII = "\n\t" + "".join(map(chr, range(32, 127)))  # characters of which none may become another, or nothing
SCRIPTS = "\u0301\u00e9\u0416\u05d0\u0639\u0915\u0e01\u1100\u3042\u4e2d\uac00\U0001f600\U00020000"  # and so must these, or be unknown
MAX_UNUSED_IDS = 1 << 16  # ids below the highest that no token has
UNKNOWN = "\uf8ff"  # a private-use character
MAX_GROWTH = 16.0  # of a text by a normalizer's replacements; published ones put one character for another


@contextmanager
def explained_damage(path: Path) -> Iterator[None]:
    """Turn whatever a damaged tokenizer.json makes the library raise into an InputError, which is all that is said of it."""
    try:
        with silenced(2):  # the library writes its panics there
            yield
    except (InputError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:  # the library raises bare Exception, and its panics are no Exception
        raise InputError(f"{path} cannot be read as a tokenizer ({quoted(str(e))[1:-1]}): download or save it again.") from None


def unless_panic(error: BaseException) -> BaseException:
    """The error, or an InputError for a panic of the library, such as a pattern that would search for ever."""
    if type(error).__name__ != "PanicException":
        return error
    return InputError(f"The tokenizer cannot encode a text ({quoted(str(error))[1:-1]}): correct the patterns in its tokenizer.json.")


def check_charsmap(data: bytes) -> None:
    """Raise `ValueError` where a SentencePiece charsmap says that it is longer than it is: the library would take that much memory."""
    if b"recompiled" not in data and rb"\u00" not in data:  # parsing a large file takes a moment
        return
    for step in _flat(json.loads(data).get("normalizer")):
        if step.get("type") == "Precompiled":
            charsmap = base64.b64decode(step["precompiled_charsmap"])
            if int.from_bytes(charsmap[:4], "little") > len(charsmap) - 4:
                raise ValueError("its precompiled_charsmap is cut off")


def check_ids(backend: HFTokenizer) -> int:
    """The highest id; raise `InputError` where two tokens share one, or where it is far beyond the number of tokens."""
    ids = backend.get_vocab(with_added_tokens=True).values()
    highest = max(ids, default=-1)
    if len(set(ids)) < len(ids):
        raise InputError("The tokenizer gives one id to several tokens: download or save its tokenizer.json again.")
    if highest >= len(ids) + MAX_UNUSED_IDS:
        raise InputError(f"The tokenizer has {len(ids)} tokens and an id {highest}: download or save its tokenizer.json again.")
    return highest


def check_steps(backend: HFTokenizer, path: Path) -> None:
    """Raise `InputError` for steps by which a text would grow without bound, or have other ids each time."""
    for part in (backend.normalizer, backend.decoder):
        growth = 1.0
        for step in _flat(part):
            content, pattern = step.get("content", ""), step.get("pattern") or {}
            replaced = len(pattern.get("String", ".")) or 1  # a regular expression may match one character
            growth *= max(1.0, len(content) / replaced if step["type"] == "Replace" else len(step.get("prepend", "")))
        if growth > MAX_GROWTH:
            raise InputError(f"{path} makes texts {growth:,.0f} times as long: download or save it again.")
    if getattr(backend.model, "dropout", None):
        raise InputError(f"Set dropout of the model in {path} to null: a text would have other tokens each time.")


def _flat(part: Any) -> list[dict[str, Any]]:
    """Steps of a normalizer, pre-tokenizer or decoder one after the other, as in tokenizer.json."""
    if not isinstance(part, dict):
        return [] if part is None else _flat(json.loads(part.__getstate__()))
    inner = part.get("normalizers", part.get("pretokenizers", part.get("decoders")))
    return [part] if inner is None else [one for step in inner for one in _flat(step)]


def check_losses(
    backend: HFTokenizer, encode_batch: Callable[[Sequence[str]], list[list[int]]], decode: Callable[[Sequence[int]], str], path: Path
) -> None:
    """Raise `InputError` where the tokenizer drops what texts consist of: an answer could never be given back as it was.

    Args:
        encode_batch, decode: of the tokenizer that is made of the backend.
        path: of its tokenizer.json, for the error.
    """

    def encode(text: str) -> list[int]:
        return encode_batch([text])[0]

    # what stands for a character that no vocabulary has: one token, or its bytes, of which no text below has any
    among = [{*encode(f"{left}{UNKNOWN}{right}")} for left, right in ("ab", "ba")]
    unknown = (among[0] & among[1]) - {id for text in ("a b", "b a", "a", "b") for id in encode(text)}
    found = [lost for text, other, lost in LOSSES if (ids := encode(text)) == encode(other) and not unknown & {*ids}]
    found += ["line breaks"] if unknown & {*encode("a\nb")} else []
    changed: list[str] = []
    seen: dict[tuple[int, ...], str] = {}
    texts = {character: f"a{character}b" for character in ASCII + SCRIPTS}
    for (character, text), ids in zip(texts.items(), encode_batch(list(texts.values())), strict=True):
        if unknown & {*ids}:
            continue
        if (other := seen.setdefault(tuple(ids), character)) != character:
            found.append(f"what tells {character!r} from {other!r}")
        elif _folded(said := decode(ids)) != _folded(text):
            changed.append(f"what {text!r} says, which comes back as {quoted(said)}")
    swallowing = [token for token in backend.get_added_tokens_decoder().values() if not token.special and (token.lstrip or token.rstrip)]
    for name in [token.content for token in swallowing if token.content.isalnum()]:  # a word, and no name of a control token
        if decode(encode(f"a {name} b")) != f"a {name} b":
            changed.append(f"blanks beside {quoted(name)}")
    removed = [step["pattern"] for step in _flat(backend.normalizer) if step["type"] == "Replace" and not step["content"]]
    splits = [step for step in _flat(backend.pre_tokenizer) if step["type"] == "Split" and step["behavior"] == "Removed"]
    removed += [step["pattern"] for step in splits if not step["invert"]]
    if found := found + changed + [f"{quoted(pattern)}, which it removes" for pattern in removed]:
        raise InputError(f"{path} loses {found[0]}: texts would come back changed. Use a model whose tokenizer keeps every text.")


def _folded(text: str) -> str:
    """What is left of a text by every normalization that published tokenizers do, but for capital letters."""
    return unicodedata.normalize("NFKC", text).strip()
