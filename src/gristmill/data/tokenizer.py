"""Byte-level BPE tokenizer on Hugging Face `tokenizers`: train, load, save.

Control tokens are reachable only through `special_id`; text typed by a user or written by a model is always encoded as text,
even when it spells the name of a control token.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as HFTokenizer

from gristmill.core.errors import InputError
from gristmill.core.io import write_json, write_text
from gristmill.core.untrusted import existing_file, quoted, read_untrusted_json

EOS = "<|endoftext|>"
SURROGATE = re.compile("[\ud800-\udfff]")  # half of a pair: JSON can spell it, and it is no text


MAX_ENCODED_ALONE = 20_000  # characters; for longer texts the library lets other threads run only in a batch
MAX_BYTES = 1 << 28  # of a tokenizer.json; the largest published ones have 40 MB
MAX_UNUSED_IDS = 1 << 16  # ids below the highest that no token has
PROBE = "A mill, 12.5 stones\n\n"


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Turn whatever a damaged tokenizer.json makes the library raise into an InputError."""
    try:
        yield
    except (InputError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:  # the library raises bare Exception, and its panics are no Exception
        raise InputError(f"{path} cannot be read as a tokenizer ({quoted(str(e))[1:-1]}): download or save it again.") from None


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
        ids = backend.get_vocab(with_added_tokens=True).values()
        self.max_id = max(ids, default=-1)  # of all tokens; some vocabularies have unused ids below it
        if len(set(ids)) < len(ids):
            raise InputError("The tokenizer gives one id to several tokens: download or save its tokenizer.json again.")
        if self.max_id >= len(ids) + MAX_UNUSED_IDS:
            raise InputError(f"The tokenizer has {len(ids)} tokens and an id {self.max_id}: download or save its tokenizer.json again.")
        self.eos = eos
        self.eos_id = self.special_id(eos)

    @staticmethod
    def train(texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str]) -> "Tokenizer":
        """Train a BPE vocabulary: single digits, whitespace kept, every byte representable.

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
                pre_tokenizers.Split(Regex(r" ?\p{L}+| ?[^\s\p{L}\d]|\d|\s+(?!\S)|\s"), behavior="isolated"),
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
        path = existing_file(Path(folder) / "tokenizer.json", "A model folder needs its tokenizer.json")
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"{path} cannot be read as a tokenizer (it is larger than {MAX_BYTES:,} bytes): download or save it again.")
        with _damage(path):
            backend = HFTokenizer.from_file(str(path))
        config_path = path.with_name("tokenizer_config.json")
        config = read_untrusted_json(config_path) if config_path.exists() else {}
        eos = config.get("eos_token") or EOS
        name = eos.get("content") if isinstance(eos, dict) else eos
        if not isinstance(name, str):
            raise InputError(f"{config_path} is not a tokenizer configuration (eos_token is {quoted(eos)}): download it again.")
        with _damage(path):
            tokenizer = Tokenizer(backend, name)
            tokenizer.decode(tokenizer.encode(PROBE))  # what is wrong within shows when it is used
        return tokenizer

    def save(self, folder: Path, chat_template: str = "") -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, readable by `transformers`, with a chat template for other programs."""
        folder = Path(folder)
        write_text(folder / "tokenizer.json", self._backend.to_str(pretty=True))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self.eos, "clean_up_tokenization_spaces": False}
        config |= {"chat_template": chat_template} if chat_template else {}
        write_json(folder / "tokenizer_config.json", config)

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; never contains a control token."""
        if len(text) > MAX_ENCODED_ALONE:
            return self.encode_batch([text])[0]
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
