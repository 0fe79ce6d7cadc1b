"""Byte-level BPE tokenizer on Hugging Face `tokenizers`: train, load, save.

Control tokens are reachable only through `special_id`; text typed by a user or written by a model is always encoded as text,
even when it spells the name of a control token.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as HFTokenizer

from gristmill.core.errors import InputError

EOS = "<|endoftext|>"


class Tokenizer:
    """Byte-level BPE tokenizer: text to ids and back.

    Args:
        backend: a Hugging Face tokenizer.
        eos: name of the end-of-document token.

    Raises:
        InputError: the end-of-document token is not in the vocabulary.
    """

    def __init__(self, backend: HFTokenizer, eos: str = EOS):
        self._backend = backend
        self._backend.encode_special_tokens = True  # text never becomes a control token
        self._backend.no_padding()
        self._backend.no_truncation()
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
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise InputError(f"{path} does not exist: a model folder needs its tokenizer.json.")
        try:
            backend = HFTokenizer.from_file(str(path))
        except Exception as e:  # the library raises bare Exception
            raise InputError(f"{path} cannot be read as a tokenizer ({e}): download or save it again.") from e
        config_path = path.with_name("tokenizer_config.json")
        try:
            config = json.loads(config_path.read_text(encoding="utf-8")) if config_path.is_file() else {}
            eos = config.get("eos_token") or EOS
            name = str(eos["content"] if isinstance(eos, dict) else eos)
        except (ValueError, AttributeError, KeyError) as e:
            raise InputError(f"{config_path} is not a tokenizer configuration ({e!r}): download it again.") from e
        return Tokenizer(backend, name)

    def save(self, folder: Path, chat_template: str = "") -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, readable by `transformers`, with a chat template for other programs."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._backend.save(str(folder / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self.eos, "clean_up_tokenization_spaces": False}
        config |= {"chat_template": chat_template} if chat_template else {}
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; never contains a control token."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` for many texts at once, on all cores."""
        return [e.ids for e in self._backend.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int], *, keep_special: bool = False) -> str:
        """Text of `ids`; control tokens are dropped unless `keep_special`."""
        return self._backend.decode(list(ids), skip_special_tokens=not keep_special)

    def token_bytes(self, token: int) -> bytes:
        """The bytes that one id stands for, which may be a part of a character."""
        name = self._backend.id_to_token(token) or ""
        if name and all(c in BYTE_NAMES for c in name) and self.decode([token]):
            return bytes(BYTE_NAMES[c] for c in name)
        return self.decode([token], keep_special=True).encode()

    def special_id(self, name: str) -> int:
        """Id of a control token.

        Raises:
            InputError: the vocabulary has no such token.
        """
        token = self._backend.token_to_id(name)
        if token is None:
            raise InputError(f"The tokenizer has no token {name!r}: choose the chat format that the model was made for.")
        return token

    def has(self, name: str) -> bool:
        """Whether `name` is one token of the vocabulary."""
        return self._backend.token_to_id(name) is not None

    def to_json(self) -> str:
        """The whole tokenizer, as in tokenizer.json."""
        return self._backend.to_str()

    def fingerprint(self) -> str:
        """Hash of the whole tokenizer, for caches and run folders."""
        return hashlib.blake2b(self._backend.to_str().encode(), digest_size=8).hexdigest()


def _byte_names() -> dict[str, int]:
    """How byte-level BPE writes bytes: printable ones as themselves, the others as letters from U+0100 on (GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_NAMES = _byte_names()
