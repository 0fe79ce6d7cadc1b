"""Byte-level BPE tokenizer on Hugging Face `tokenizers`: train, load, save.

Control tokens are reachable only through `special_id`; text typed by a user or written by a model is always encoded as text,
even when it spells the name of a control token.
"""

import copy
import hashlib
import json
import math
import os
import re
from array import array
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as HFTokenizer

from gristmill.core.errors import InputError
from gristmill.core.io import DamagedFile, read_bytes, write_bytes, write_json, write_text
from gristmill.core.untrusted import existing_file, quoted, read_untrusted_json
from gristmill.data.tokenizer_checks import check_charsmap, check_ids, check_losses, check_steps, explained_damage, unless_panic

EOS = "<|endoftext|>"
SURROGATE = re.compile("[\ud800-\udfff]")  # half of a pair: JSON can spell it, and it is no text
# Control tokens by their names, for files that do not flag them: what opens and ends turns and documents.
CONTROL = (
    *("<|im_start|>", "<|im_end|>", "<|im_sep|>", "<extra_id_0>", "<extra_id_1>", "<start_of_turn>", "<end_of_turn>"),
    *("<|begin_of_text|>", "<|end_of_text|>", "<|endoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"),
    *(
        "<|system|>",
        "<|user|>",
        "<|assistant|>",
        "<|tool|>",
        "<|start|>",
        "<|end|>",
        "<|message|>",
        "<|channel|>",
        "<|return|>",
        "<|call|>",
    ),
)
NAMED = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")  # in tokenizer_config.json
# What chat formats write before the words of a turn. Elsewhere a chat template gives both as one text, which is cut here.
HEADERS = ("System\n", "User\n", "Assistant\n", "system\n", "user\n", "assistant\n", "\n\n")
CUT = r"\A(?:"  # how that cut begins in a saved tokenizer.json
BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")  # SentencePiece's name of a byte
PLAIN = ("NoneType", "NFC", "NFKC", "NFD", "NFKD", "Lowercase")  # normalizers that change each character for itself


MAX_ENCODED_ALONE = 20_000  # characters; for longer texts the library lets other threads run only in a batch
MAX_KEPT_LENGTH, MAX_KEPT = 400, 32_768  # characters and number of texts whose ids are kept: turns are rendered again and again
MAX_BYTES = 1 << 28  # of a tokenizer.json; the largest published ones have 40 MB
# What a model folder says about its tokenizer and its chat template. A folder that was loaded is saved with the same bytes.
FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "generation_config.json"),
)
LLAMAS = ("LlamaTokenizer", "LlamaTokenizerFast")  # classes that read a vocabulary as SentencePiece does
# Values of model_type with which transformers 5 reads tokenizer.json as it is, whatever class tokenizer_config.json names.
AS_WRITTEN = ("mistral", "phi3", "olmo2", "granite", "nemotron", "qwen2")
MAX_TEMPLATES = 64
TEMPLATES = "additional_chat_templates"  # a folder with further templates, NAME.jinja
PROBE = "A mill, 12.5 stones\n\n"


class Tokenizer:
    """Byte-level BPE tokenizer: text to ids and back.

    Args:
        backend: a Hugging Face tokenizer.
        eos: name of the end-of-document token.
        control: names of further control tokens, beside those that are flagged so and those of `CONTROL`.

    Attributes:
        files: of the folder that it was loaded from, by name; none for a tokenizer that was made here.
        place: name of that folder, for errors, which a server tells to strangers.
        chat_templates: Jinja texts of that folder by name, "default" first of all.
        token_names: what a chat template may call its tokens: `bos_token` and so on.
        end_ids: tokens that end a text by the folder's generation_config.json, or by its config.json where that names none.
        cuts_headers: whether its files cut a turn's header from the words after it, see `with_chat_template`.
        control: names of the control tokens; control_ids: their ids.

    Raises:
        InputError: the end-of-document token is not in the vocabulary.
    """

    def __init__(self, backend: HFTokenizer, eos: str = EOS, control: Iterable[str] = ()):
        self.files: dict[str, bytes] = {}
        self.chat_templates: dict[str, str] = {}
        self.place = "the tokenizer"
        self.token_names: dict[str, str] = {"eos_token": eos}
        self.end_ids: tuple[int, ...] = ()
        self.cuts_headers = False
        self._prefix: Literal["", "first", "always", "never"] = ""  # see `_llamas_prefix`
        self._whole: HFTokenizer | None = None  # as other programs have it
        control = tuple(control)
        self.max_id = check_ids(backend)  # of all tokens; some vocabularies have unused ids below it
        self._backend = backend
        self._chat: HFTokenizer | None = None
        blank = any(step.get("add_prefix_space") or step["type"] == "Metaspace" for step in _steps(backend))
        self._apart = type(backend.normalizer).__name__ in PLAIN and not blank  # so that two texts have the ids of each
        flagged = [token.content for token in backend.get_added_tokens_decoder().values() if token.special]
        names = [n for n in dict.fromkeys((*flagged, eos, *control, *CONTROL)) if backend.token_to_id(n) is not None]
        self.control = tuple(names)
        self._named = (eos, *control)
        # which also makes them leave the white space around them alone
        backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
        _bar(backend, names)
        self._backend.encode_special_tokens = True  # text never becomes a control token
        self._special = {token for token, added in backend.get_added_tokens_decoder().items() if added.special}
        decoder = {} if backend.decoder is None else json.loads(backend.decoder.__getstate__())
        self._decoders = {step["type"] for step in decoder.get("decoders", [decoder] if decoder else [])}
        self._backend.no_padding()
        self._backend.no_truncation()
        self._kept: dict[str, array[int]] = {}
        self.control_ids = frozenset(self.special_id(name) for name in names)
        self.eos = eos
        self.eos_id = self.special_id(eos)

    @staticmethod
    def train(texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str]) -> "Tokenizer":
        """Train a BPE vocabulary: single digits, whitespace kept, combining marks in their words, every byte representable.

        Source: Nemotron-4 15B report, section 2 (tokenizer).

        Args:
            texts: training documents.
            vocab_size: number of ids, special tokens and the 256 bytes included.
            special_tokens: control tokens; `EOS` is added first when absent.
        """
        backend = HFTokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(r"\d"), behavior="isolated"),
                pre_tokenizers.Split(Regex(r" ?[\p{L}\p{M}]+| ?[^\s\p{L}\p{M}\d]|\d|\s+(?!\S)|\s"), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        names = [EOS, *(t for t in special_tokens if t != EOS)]
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[AddedToken(t, special=True, normalized=False) for t in names],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer=trainer)
        return Tokenizer(backend)

    @staticmethod
    def load(folder: Path) -> "Tokenizer":
        """Read `tokenizer.json` (and the names in `tokenizer_config.json`) from a model folder.

        Raises:
            InputError: the file is missing or unreadable, or names no end-of-document token.
        """
        convertible = any(os.path.lexists(Path(folder) / name) for name in ("tokenizer.model", "vocab.json", "spiece.model", "tekken.json"))
        how = " (transformers makes it of the other files: AutoTokenizer.from_pretrained, then save_pretrained)" if convertible else ""
        path = existing_file(Path(folder) / "tokenizer.json", f"A model folder needs its tokenizer.json{how}")
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"{path} cannot be read as a tokenizer (it is larger than {MAX_BYTES:,} bytes): download or save it again.")
        files = _read_files(Path(folder))
        with explained_damage(path):
            check_charsmap(files["tokenizer.json"])
            backend = HFTokenizer.from_buffer(files["tokenizer.json"])
            check_ids(backend)  # before it is written out, which a huge id would make long
            check_steps(backend, path)
        config_path = path.with_name("tokenizer_config.json")
        config = read_untrusted_json(config_path) if config_path.exists() else {}
        more_path = path.with_name("special_tokens_map.json")
        if more_path.exists() and "added_tokens_decoder" not in config:  # as in transformers
            config |= read_untrusted_json(more_path)
        about = read_untrusted_json(path.with_name("config.json")) if path.with_name("config.json").exists() else {}
        try:
            eos = config.get("eos_token") or EOS
            name = eos["content"] if isinstance(eos, dict) else eos
            others = [*map(config.get, NAMED), *(config.get("additional_special_tokens") or ())]
            others += [token for token in (config.get("added_tokens_decoder") or {}).values() if token.get("special")]
            control = [token["content"] if isinstance(token, dict) else token for token in others if token]
            if not all(isinstance(text, str) for text in (name, *control)):
                raise TypeError("a token's name is no text")
            templates = _templates(files, config.get("chat_template"))
        except (ValueError, AttributeError, KeyError, TypeError) as e:
            raise InputError(f"{config_path} is not a tokenizer configuration ({quoted(repr(e))[1:-1]}): download it again.") from e
        with explained_damage(path):
            cut, *rest = _steps(backend) or [{}]
            cut_here = cut.get("pattern", {}).get("Regex", "").startswith(CUT)
            if cut_here:  # it belongs to the template, see `with_chat_template`
                backend = _with(backend, rest[0] if rest else None)
            if prefix := _llamas_prefix(config, about, backend):
                _read_as_llamas(backend, prefix)
            tokenizer = Tokenizer(backend, name, control)
            tokenizer.decode(tokenizer.encode(PROBE))  # what is wrong within shows when it is used
            check_losses(backend, tokenizer.encode_batch, tokenizer.decode, path)
        tokenizer.files, tokenizer.chat_templates, tokenizer.place = files, templates, quoted(Path(folder).resolve().name)[1:-1]
        tokenizer.cuts_headers = cut_here
        tokenizer._prefix = prefix
        named = {k: v["content"] if isinstance(v, dict) and "content" in v else v for k, v in config.items() if k.endswith("_token")}
        tokenizer.token_names = {k: v for k, v in named.items() if isinstance(v, str)}
        ends = named_ends(tokenizer.generation_config()) or named_ends(about)  # as in transformers
        tokenizer.end_ids = tuple(end for end in ends if 0 <= end <= tokenizer.max_id)
        return tokenizer

    def generation_config(self) -> dict[str, Any]:
        """What the folder's generation_config.json says; nothing where it is no JSON object, which no generation here depends on."""
        try:
            found = json.loads(self.files.get("generation_config.json", b"{}"))
        except (ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def with_chat_template(self, template: str, *, cut: bool = False) -> "Tokenizer":
        """A copy whose folder says that this template is the one; for a model that is trained in another format than its folder's.

        Args:
            cut: make the tokenizer cut a turn's header from the words after it, as rendering piece by piece does; else a message that
                begins with a line break would have one token for the header's and its own.
        """
        changed = copy.copy(self)
        changed.chat_templates, changed._whole = {"default": template}, None
        config = json.loads(self.files.get("tokenizer_config.json", b"{}")) or self._config()
        config["chat_template"] = template
        changed.token_names = {"eos_token": self.eos} | self.token_names
        if not config.get("eos_token"):
            config["eos_token"] = self.eos
        changed.files = {name: data for name, data in self.files.items() if not name.endswith(".jinja")}
        changed.files["tokenizer_config.json"] = (json.dumps(config, indent=2) + "\n").encode()
        headers = [header for header in HEADERS if json.dumps(header)[1:-1] in template]
        if cut or not self.files:
            backend = _cut(self._backend, headers) if cut and headers else self._backend
            changed.cuts_headers = bool(cut and headers)
            changed.files["tokenizer.json"] = backend.to_str(pretty=True).encode()
            if self._prefix:  # the file says it now, and a class that passes over what it says would pass over the cut
                config = {k: v for k, v in config.items() if k not in ("legacy", "add_prefix_space")}
                config["tokenizer_class"], changed._prefix = "PreTrainedTokenizerFast", ""
                changed.files["tokenizer_config.json"] = (json.dumps(config, indent=2) + "\n").encode()
        return changed

    def with_tokens(self, names: Sequence[str], *, special: bool = True) -> "Tokenizer":
        """A copy with further tokens, whose ids follow those that there are. Those that it has already stay as they are.

        Args:
            special: they are control tokens, which no text becomes and no answer shows; else texts that are a token each, such as
                `<think>`.
        """
        whole = HFTokenizer.from_str(self.files.get("tokenizer.json", self._backend.to_str().encode()).decode())
        there = {token.content for token in whole.get_added_tokens_decoder().values() if token.special or not special}
        added = [AddedToken(name, special=special, normalized=False) for name in names if name not in there]
        (whole.add_special_tokens if special else whole.add_tokens)(added)
        files = self.files | {"tokenizer.json": whole.to_str(pretty=True).encode()}
        config = json.loads(self.files.get("tokenizer_config.json", b"{}")) or self._config()
        if isinstance(config.get("added_tokens_decoder"), dict):
            for token in added:
                told = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": special}
                config["added_tokens_decoder"][str(whole.token_to_id(token.content))] = {"content": token.content, **told}
        if not self._prefix and config.get("tokenizer_class") in LLAMAS:  # read as it is written, which its copy says itself
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
        files["tokenizer_config.json"] = (json.dumps(config, indent=2) + "\n").encode()
        with TemporaryDirectory() as folder:
            for name, data in files.items():
                write_bytes(Path(folder) / name, data)
            changed = Tokenizer.load(Path(folder))
        changed.end_ids = self.end_ids
        return changed

    def save(self, folder: Path, chat_template: str = "") -> None:
        """Write the files of the folder that it was loaded from, or, of one that was made here, those that `transformers` needs.

        Args:
            chat_template: see `with_chat_template`, with a cut; "" for the folder's own.
        """
        if chat_template and chat_template != self.chat_templates.get("default"):
            return self.with_chat_template(chat_template, cut=True).save(folder)
        folder = Path(folder)
        for name, data in self.files.items():
            write_bytes(folder / name, data)
        if not self.files:
            write_text(folder / "tokenizer.json", self._backend.to_str(pretty=True))
            write_json(folder / "tokenizer_config.json", self._config())

    def _config(self) -> dict[str, Any]:
        return {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self.eos, "clean_up_tokenization_spaces": False}

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; never contains a control token.

        Raises:
            InputError: the text holds half of a surrogate pair.
        """
        if len(text) > MAX_ENCODED_ALONE:
            return self.encode_batch([text])[0]
        if (kept := self._kept.get(text)) is not None:
            return kept.tolist()
        _check_text(text)
        try:
            ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        except BaseException as e:
            raise unless_panic(e) from None
        if len(text) <= MAX_KEPT_LENGTH:
            if len(self._kept) >= MAX_KEPT:
                self._kept.clear()
            self._kept[text] = array("I", ids)
        return ids

    def max_tokens(self, text: str) -> float:
        """At most how many ids a text has, without encoding it: its bytes where tokens are made of bytes and it is ASCII, else infinity."""
        return len(text) if self._apart and "ByteLevel" in self._decoders and text.isascii() else math.inf

    def encode_turn(self, header: str, text: str) -> tuple[list[int], list[int]]:
        """Ids of a turn's header and of the words after it, both as they are after a control token.

        Those of the header are the same whatever follows. SentencePiece puts a blank before the first word of a text: where the words
        are not the first, theirs has none.
        """
        if self._apart:
            return (self.encode(header) if header else []), (self.encode(text) if text else [])
        if self._chat is None:
            # after a control token no word is the first
            steps = [step | {"prepend_scheme": "never"} if _only_first(step) else step for step in _steps(self._backend)]
            self._chat = _cut(_with(self._backend, {"type": "Sequence", "pretokenizers": steps}), HEADERS)
        head, ids = (self._chat.encode(part, add_special_tokens=False).ids if part else [] for part in (header, header + text))
        if ids[: len(head)] != head:
            return head, self._chat.encode(text, add_special_tokens=False).ids
        return head, ids[len(head) :]

    def encode_template(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of what a chat template wrote, as other programs make them, names of control tokens included; and where each stands.

        Raises:
            InputError: as `encode`.
        """
        if self._whole is None:
            if "tokenizer.json" in self.files:
                self._whole = HFTokenizer.from_buffer(self.files["tokenizer.json"])
                known = {token.content for token in self._whole.get_added_tokens_decoder().values()}
                missing = [name for name in self._named if name in self.control and name not in known]
                self._whole.add_special_tokens([AddedToken(name, special=True) for name in missing])
                if self._prefix:
                    _read_as_llamas(self._whole, self._prefix)
                self._whole.no_padding()
                self._whole.no_truncation()
            else:
                self._whole = HFTokenizer.from_str(self._backend.to_str())
        _check_text(text)
        try:
            (found,) = self._whole.encode_batch([text], add_special_tokens=False)  # in a batch it lets other threads run
        except BaseException as e:
            raise unless_panic(e) from None
        return found.ids, found.offsets

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` for many texts at once, on all cores."""
        for text in texts:
            _check_text(text)
        try:
            return [e.ids for e in self._backend.encode_batch(list(texts), add_special_tokens=False)]
        except BaseException as e:
            raise unless_panic(e) from None

    def decode(self, ids: Sequence[int], *, keep_special: bool = False, continued: bool = False) -> str:
        """Text of `ids`; control tokens are dropped unless `keep_special`.

        Args:
            continued: the text goes on from another, so that a blank before its first word stays, which SentencePiece drops.
        """
        if not continued or "ByteLevel" in self._decoders:
            return self._backend.decode(list(ids), skip_special_tokens=not keep_special)
        names = (self._backend.id_to_token(token) for token in ids if keep_special or not self.is_special(token))
        return self._said([name for name in names if name], first=False)

    def token_bytes(self, token: int, *, first: bool = False) -> bytes:
        """The bytes that one id adds to a text, which may be a part of a character; or has at its beginning, if it is the `first`."""
        name = self._backend.id_to_token(token) or ""
        if self.is_special(token):
            return name.encode()
        if name and "ByteLevel" in self._decoders and all(c in BYTE_NAMES for c in name):
            return bytes(BYTE_NAMES[c] for c in name)
        byte = BYTE_PIECE.fullmatch(name) if "ByteFallback" in self._decoders else None
        if byte and int(byte[1], 16) >= 128:
            return bytes([int(byte[1], 16)])
        return self._said([name], first).encode()

    def is_special(self, token: int) -> bool:
        """Whether an id is a control token's."""
        return token in self._special

    def _said(self, names: list[str], first: bool) -> str:
        """Text of tokens by their names, at the beginning of a text or after others."""
        decoder = self._backend.decoder
        if decoder is None:
            return "".join(f" {name}" for name in names).removeprefix(" " if first else "")
        return str(decoder.decode(names) if first else decoder.decode(["a", *names])[1:])

    def special_id(self, name: str) -> int:
        """Id of a control token.

        Raises:
            InputError: the vocabulary has no such token.
        """
        token = self._backend.token_to_id(name)
        if token is None:
            raise InputError(f"The tokenizer has no token {name!r}: choose the chat format that the model was made for.")
        return token

    @cached_property
    def text_prefix(self) -> list[int]:
        """Ids that other programs put before every text: a beginning-of-text token, where tokenizer.json says so, which alone decides."""
        if "tokenizer.json" not in self.files:
            return []
        whole = HFTokenizer.from_buffer(self.files["tokenizer.json"])
        whole.no_truncation()
        with_added, plain = whole.encode("a").ids, whole.encode("a", add_special_tokens=False).ids
        places = [i for i in range(len(with_added) - len(plain) + 1) if with_added[i : i + len(plain)] == plain]
        return with_added[: places[0]] if plain and places else []

    @property
    def context_id(self) -> int:
        """The token that stands before a text where nothing else does: beginning of text, else end of text."""
        return self.special_ids().get("bos_token_id", self.eos_id)

    def special_ids(self) -> dict[str, int]:
        """Ids of the tokens that config.json may name, by its keys: `bos_token_id`, `pad_token_id` and so on."""
        found = {f"{name}_id": self._backend.token_to_id(self.token_names[name]) for name in NAMED[:3] if name in self.token_names}
        return {name: token for name, token in found.items() if token is not None}

    def name_of(self, token: int) -> str:
        """Name of a token, as in the vocabulary; "" if there is none of this id."""
        return self._backend.id_to_token(token) or ""

    def has(self, name: str) -> bool:
        """Whether `name` is one token of the vocabulary."""
        return self._backend.token_to_id(name) is not None

    def to_json(self) -> str:
        """The whole tokenizer, as in tokenizer.json."""
        return self._backend.to_str()

    def fingerprint(self) -> str:
        """Hash of the whole tokenizer, for caches and run folders."""
        return hashlib.blake2b(self._backend.to_str().encode(), digest_size=8).hexdigest()


def _llamas_prefix(config: Mapping[str, Any], about: Mapping[str, Any], backend: HFTokenizer) -> Literal["", "first", "always", "never"]:
    """Where transformers puts a blank before words, whatever tokenizer.json says, if it reads a folder by Llama's class; else "".

    Args:
        config: tokenizer_config.json.
        about: config.json.
    """
    named = config.get("tokenizer_class") in LLAMAS
    bytewise = type(backend.decoder).__name__ == "ByteLevel" or any(step["type"] == "ByteLevel" for step in _steps(backend))
    if not named or bytewise or about.get("model_type") in AS_WRITTEN:
        return ""
    return "never" if config.get("add_prefix_space") is False else "always" if config.get("legacy") else "first"


def _read_as_llamas(backend: HFTokenizer, prefix: Literal["first", "always", "never"]) -> None:
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", prepend_scheme=prefix, split=False)


def named_ends(values: Mapping[str, Any]) -> list[int]:
    """Ids that a config.json or generation_config.json names as ends of text."""
    ends = values.get("eos_token_id")
    return [end for end in (ends if isinstance(ends, list) else [ends]) if type(end) is int]


def _read_files(folder: Path) -> dict[str, bytes]:
    """The files of `FILES` that a folder has, and its further chat templates.

    Raises:
        InputError: one is no regular file, cannot be read, or is too large.
    """
    paths = [folder / name for name in FILES if os.path.lexists(folder / name)]
    more = folder / TEMPLATES
    if more.is_dir():
        paths += sorted(path for path in more.iterdir() if path.suffix == ".jinja")[:MAX_TEMPLATES]
    try:
        return {path.relative_to(folder).as_posix(): read_bytes(existing_file(path, "A file cannot be read")) for path in paths}
    except DamagedFile as e:
        raise InputError(f"{e} Download or save it again.") from e


def _templates(files: Mapping[str, bytes], configured: Any) -> dict[str, str]:
    """Chat templates by name: of the folder's .jinja files where there are any, else of tokenizer_config.json; as in transformers."""
    names = {name: "default" if name == "chat_template.jinja" else Path(name).stem for name in files if name.endswith(".jinja")}
    found = {names[name]: files[name].decode() for name in names}
    if not found and configured:
        several = [{"name": "default", "template": configured}] if isinstance(configured, str) else configured
        found = {one["name"]: one["template"] for one in several}
    if not all(isinstance(text, str) for pair in found.items() for text in pair):
        raise TypeError("a chat template is no text")
    return found


def _check_text(text: str) -> None:
    if not text.isascii() and SURROGATE.search(text):
        raise InputError("A text holds half of a surrogate pair, which is no text: mend or remove it.")


def _steps(backend: HFTokenizer) -> list[dict[str, Any]]:
    """Pre-tokenizers of a tokenizer, one after the other, as in tokenizer.json."""
    if backend.pre_tokenizer is None:
        return []
    found = json.loads(backend.pre_tokenizer.__getstate__())
    return list(found["pretokenizers"]) if found["type"] == "Sequence" else [found]


def _with(backend: HFTokenizer, pre_tokenizer: dict[str, Any] | None) -> HFTokenizer:
    """A copy with another pre-tokenizer, as in tokenizer.json."""
    copy = HFTokenizer.from_str(json.dumps(json.loads(backend.to_str()) | {"pre_tokenizer": pre_tokenizer}))
    copy.encode_special_tokens = backend.encode_special_tokens
    return copy


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _cut(backend: HFTokenizer, headers: Sequence[str]) -> HFTokenizer:
    """A copy that cuts headers from what follows them."""
    normalize = (lambda text: text) if backend.normalizer is None else backend.normalizer.normalize_str
    texts = dict.fromkeys(form for header in headers for form in (normalize(header), header) if form)
    whole = [] if backend.pre_tokenizer is None else [json.loads(backend.pre_tokenizer.__getstate__())]
    cut = _split(CUT + "|".join(map(_escape, texts)) + ")")
    return _with(backend, {"type": "Sequence", "pretokenizers": [cut, *whole]})


def _only_first(step: dict[str, Any]) -> bool:
    return step["type"] == "Metaspace" and step.get("prepend_scheme") == "first"


def _bar(backend: HFTokenizer, names: Sequence[str]) -> None:
    """Split the names of control tokens that the model itself could make of a text that spells them."""
    if not any(backend.model.token_to_id(name) is not None for name in names):
        return
    model = json.loads(backend.to_str())["model"]
    if model.get("type") == "BPE" and not model.get("ignore_merges"):
        made = {"".join(m) if isinstance(m, list) else m.replace(" ", "") for m in model["merges"]}
    else:
        made = {piece[0] if isinstance(piece, list) else piece for piece in model["vocab"]}
    made = {name for name in names if name in made}
    if made:
        pattern = "|".join(f"{_escape(name[0])}(?={_escape(name[1:])})" for name in sorted(made) if len(name) > 1)
        steps = _steps(backend)
        if _split(pattern) not in steps:
            carrier = pre_tokenizers.Sequence([])
            carrier.__setstate__(json.dumps({"type": "Sequence", "pretokenizers": [_split(pattern), *steps]}).encode())
            backend.pre_tokenizer = carrier


def _escape(text: str) -> str:
    return re.sub(r"([^\w\s])", r"\\\1", text)


def _byte_names() -> dict[str, int]:
    """How byte-level BPE writes bytes: printable ones as themselves, the others as letters from U+0100 on (GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_NAMES = _byte_names()
