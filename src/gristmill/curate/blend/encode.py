"""Fast BPE encoding: tiktoken, four times as fast as `tokenizers` and equal to it, where a tokenizer allows.

Both split a text into pieces by a regular expression and merge the bytes of each piece. They are equal if

- the pieces are the same: one expression stands for the whole pre-tokenizer, made only of what both regex libraries read alike, and its
  classes (letters, digits, spaces) are spelt out as the code points that `tokenizers` counts to them: their Unicode versions may differ;
- the merges are the same. `tokenizers` merges the pairs that are listed, tiktoken any two whose bytes make a known token. If every
  token is what `tokenizers` makes of its own bytes, from parts that were listed before it, tiktoken never meets a pair that is not listed:
  the bytes of a token that nothing around has broken into merge as they would alone.

What does not fit is encoded by `tokenizers`, and the first documents by both.
"""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tokenizers import Regex, normalizers, pre_tokenizers
from tokenizers import Tokenizer as HFTokenizer

from gristmill.data.tokenizer import BYTE_NAMES, Tokenizer

CHECKED = 64  # documents that are encoded by both
EXACT_CHARACTERS = 4 << 20  # given to `tokenizers` at once: its results take some 30 bytes a character

# ByteLevel's own expression (GPT-2).
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Ours after digits are set apart, and the same without: there, text ends where a digit begins, which only the look ahead can see.
# The second is of tokenizers that were trained before marks stayed with their letters.
OURS = (r" ?[\p{L}\p{M}]+| ?[^\s\p{L}\p{M}\d]|\d|\s+(?!\S)|\s", r" ?\p{L}+| ?[^\s\p{L}\d]|\d|\s+(?!\S)|\s")

_ATOM = re.compile(
    r"(?P<kind>\\p\{[A-Z][a-z]?\}|\\[sSd])|(?P<open>\[\^?)|(?P<close>\])"
    r"|(?P<outside>\(\?(?:i?:|!)|[()|]|[?*+](?![?*+])|\{[0-9]+(?:,[0-9]*)?\}(?![?*+]))"
    r"|(?P<both>\\[rnt]|[\w \x27\"/<>=!,;:@%_`])"
)


class Encoder:
    """Documents to ids; never a control token (see `Tokenizer`)."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._fast = _tiktoken(json.loads(tokenizer.to_json()))
        self._unchecked = CHECKED

    @property
    def exact(self) -> bool:
        """Whether `tokenizers` does all of it."""
        return self._fast is None

    def __call__(self, texts: list[str]) -> list[np.ndarray]:
        """Ids of each text, int32 [tokens]."""
        if self._fast is None:
            return self._exactly(texts)
        out = [self._one(self._fast, text) for text in texts]
        first, self._unchecked = self._unchecked, max(0, self._unchecked - len(texts))
        if not all(map(np.array_equal, out[:first], self._exactly(texts[:first]))):
            self._fast = None
            return self._exactly(texts)
        return out

    def _one(self, fast: Callable[[str], np.ndarray | None], text: str) -> np.ndarray:
        ids = fast(text)
        return np.array(self._tokenizer.encode(text), np.int32) if ids is None else ids

    def _exactly(self, texts: list[str]) -> list[np.ndarray]:
        out: list[np.ndarray] = []
        waiting: list[str] = []
        size = 0
        for text in [*texts, None]:
            if waiting and (text is None or size + len(text) > EXACT_CHARACTERS):
                out += [np.array(ids, np.int32) for ids in self._tokenizer.encode_batch(waiting)]
                waiting, size = [], 0
            if text is not None:
                waiting.append(text)
                size += len(text)
        return out


def fast_encoder(tokenizer: Tokenizer) -> Encoder:
    """The fastest encoder whose ids are those of `tokenizer.encode_batch`."""
    return Encoder(tokenizer)


def _tiktoken(parts: dict[str, Any]) -> Callable[[str], np.ndarray | None] | None:
    """An encoder of one text from the parts of a tokenizer.json, or None; it gives None for a text that it must not encode."""
    try:
        import tiktoken
    except ImportError:
        return None
    expression = _expression(parts["pre_tokenizer"])
    ranks = _ranks(parts["model"], parts["added_tokens"])
    normalizer = parts["normalizer"]
    if expression is None or ranks is None or normalizer not in (None, {"type": "NFC"}):
        return None
    try:
        encoding = tiktoken.Encoding("text", pat_str=expression, mergeable_ranks={key: i for i, key in enumerate(ranks)}, special_tokens={})
    except ValueError:  # the expression means nothing to it
        return None
    id_of_rank = np.array(list(ranks.values()), np.int32)
    normalize = normalizers.NFC().normalize_str if normalizer else None
    # Added tokens that are not special are found in text too, by rules of their own.
    names = [token["content"] for token in parts["added_tokens"] if not token["special"]]
    added = re.compile("|".join(map(re.escape, names))) if names else None

    def encode(text: str) -> np.ndarray | None:
        if added is not None and added.search(text):
            return None
        if normalize is not None:
            text = normalize(text)
            if added is not None and added.search(text):
                return None
        try:
            return id_of_rank[encoding.encode_to_numpy(text, disallowed_special=())]
        except ValueError:  # its regex library gives up on runs of hundreds of thousands of spaces
            return None

    return encode


def _ranks(model: dict[str, Any], added: Sequence[dict[str, Any]]) -> dict[bytes, int] | None:
    """The id of every token, by its bytes, in the order of the merges; None if tiktoken would merge in another way."""
    vocab: dict[str, int] = model.get("vocab", {})
    plain = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
    if model.get("type", "BPE") != "BPE" or any(model.get(key) for key in plain) or model.get("byte_fallback"):
        return None
    order = dict.fromkeys(BYTE_NAMES)  # an ordered set
    merges: list[list[str]] = []
    last = ""
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        whole = left + right
        if left not in order or right not in order:  # such a pair never meets: its bytes have become `whole` before
            continue
        if whole in order and whole != last:  # several pairs of the same token must follow each other
            return None
        merges.append([left, right])
        order[whole] = None
        last = whole
    if not vocab.keys() >= order.keys():
        return None
    bare: dict[str, Any] = {"version": "1.0", "added_tokens": [], "model": {**model, "merges": merges, "ignore_merges": False}}
    for key in ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"):
        bare[key] = None
    alone = HFTokenizer.from_str(json.dumps(bare)).encode_batch(list(order), add_special_tokens=False)
    if any(one.ids != [vocab[name]] for one, name in zip(alone, order, strict=True)):
        return None
    if model.get("ignore_merges"):  # pieces that are tokens are never merged: such tokens need not be the result of any merge
        for name in vocab.keys() - order.keys():
            parts = ((name[:i], name[i:]) for i in range(1, len(name)))
            if any(a in vocab and b in vocab for a, b in parts) or not BYTE_NAMES.keys() >= set(name):
                return None
            order[name] = None
        if any(token["content"] in order for token in added):
            return None
    return {bytes(BYTE_NAMES[c] for c in name): vocab[name] for name in order}


def _expression(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """One regular expression that cuts a text as the pre-tokenizer does, or None."""
    if pre_tokenizer is None:
        return None
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    *splits, last = steps
    if last["type"] != "ByteLevel" or last["add_prefix_space"] or last["use_regex"] != (not splits):
        return None
    if not splits:
        return _translated(GPT2)
    if any(s["type"] != "Split" or s["behavior"] != "Isolated" or s["invert"] or "Regex" not in s["pattern"] for s in splits):
        return None
    expressions = [split["pattern"]["Regex"] for split in splits]
    if len(expressions) == 2 and expressions[0] == r"\d" and expressions[1] in OURS:
        return _translated(expressions[1].replace(r"(?!\S)", r"(?![^\s\d])"))
    if len(expressions) > 1 or (whole := _translated(expressions[0])) is None or re.compile(_rough(expressions[0])).match(""):
        return None
    return rf"{whole}|(?:(?!{whole})(?s:.))+"  # what lies between matches is a piece too


def _rough(expression: str) -> str:
    """The expression for Python's library, with other classes: enough to see whether it matches nothing."""
    return re.sub(r"\\p\{\w+\}", "x", expression)


def _translated(expression: str) -> str | None:
    """The expression with its classes spelt out, or None if it has parts that the two libraries may read in different ways."""
    if re.search(r"\(\?i:[^)]*[\\\[]", expression):  # classes and case
        return None
    out: list[str] = []
    place, inside = 0, False
    while place < len(expression):
        atom = _ATOM.match(expression, place)
        if atom is None:
            if not inside or expression[place] not in "?*+()|.":
                return None
            out.append("\\" + expression[place])
            place += 1
            continue
        text, place = atom.group(), atom.end()
        if atom["kind"]:
            if inside and text == r"\S":
                return None
            spelt = _spelt(text.lower() if text == r"\S" else text)
            out.append(spelt if inside else f"[^{spelt}]" if text == r"\S" else f"[{spelt}]")
        elif (atom["open"] and inside) or (atom["close"] and not inside):
            return None
        elif atom["outside"] and inside:
            out += [re.escape(c) for c in text]
        else:
            inside = inside != bool(atom["open"] or atom["close"])
            out.append(text)
    return "".join(out)


_SPELT: dict[str, str] = {}


def _spelt(kind: str) -> str:
    r"""The code points that `tokenizers` counts to a class, such as \p{L}, as ranges."""
    if kind not in _SPELT:
        # No Unicode version has letters, digits, marks or spaces elsewhere.
        points = [*range(0xD800), *range(0xE000, 0x40000), *range(0xE0000, 0xE1000)]
        pieces = pre_tokenizers.Split(Regex(f"{kind}+"), "isolated").pre_tokenize_str("".join(map(chr, points)))
        is_kind = pre_tokenizers.Split(Regex(kind), "removed").pre_tokenize_str
        ranges = [(points[begin], points[end - 1]) for _, (begin, end) in pieces if not is_kind(chr(points[begin]))]
        _SPELT[kind] = "".join(rf"\x{{{low:X}}}-\x{{{high:X}}}" for low, high in ranges)
    return _SPELT[kind]
