"""Tokenized documents in files, read through a memory map: what `gristmill blend` writes and pretraining reads.

A folder holds `tokens-*.bin` (int32, little-endian, documents after each other), `ends.npy` (int64: where each document ends, counted over
all files) and `blend.json`, which is written last.
"""

from pathlib import Path
from typing import Any

import numpy as np

from gristmill.core.errors import InputError
from gristmill.core.io import read_json, reason
from gristmill.core.untrusted import existing_file, is_bare_name
from gristmill.data.tokenizer import Tokenizer

TOKEN = np.dtype("<i4")


class TokenStore:
    """Memory-mapped store of tokenized documents, as a finished blend leaves it.

    Args:
        folder: what `blend` wrote.
        tokenizer: the model's, if it shall be checked that the blend was made with it.

    Raises:
        InputError: the folder holds no whole blend, or one of another tokenizer.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer | None = None) -> None:
        try:
            facts = read_json(folder / "blend.json")
            if not all(is_bare_name(shard["file"]) for shard in facts["shards"]):
                raise ValueError("it names files outside of it")
            for name in ("ends.npy", *(shard["file"] for shard in facts["shards"])):
                existing_file(folder / name, "The blend is not whole")
            self.ends_N: np.ndarray = np.load(folder / "ends.npy", mmap_mode="r")
            self.shards = [np.memmap(folder / shard["file"], TOKEN, "r") for shard in facts["shards"]]
            sizes, made_with = [shard["tokens"] for shard in facts["shards"]], facts["tokenizer"]["fingerprint"]
        except (OSError, ValueError, TypeError, LookupError, EOFError) as e:
            raise InputError(f"{folder} holds no finished blend ({reason(e)}): run `gristmill blend` with --out {folder}.") from e
        if [len(shard) for shard in self.shards] != sizes or self.ends_N.dtype != np.int64 or self.ends_N[-1:].sum() != sum(sizes):
            raise InputError(f"The tokens in {folder} are not those that blend.json speaks of: copy the folder again, or blend again.")
        if tokenizer is not None and tokenizer.fingerprint() != made_with:
            raise InputError(f"{folder} was made with another tokenizer than the model's: blend again with this one.")
        if self.ends_N.ndim != 1 or (np.diff(self.ends_N, prepend=0) < 0).any():
            raise InputError(f"{folder} is damaged (where its documents end): copy the folder again, or blend again.")
        self.max_id = np.iinfo(TOKEN).max if tokenizer is None else tokenizer.max_id
        self.facts: dict[str, Any] = facts
