"""Documents that are tokens already, read from files through a memory map: what `gristmill blend` writes and pretraining reads.

A folder holds `tokens-*.bin` (int32, little-endian, documents after each other), `ends.npy` (int64: where each document ends, counted over
all files) and `blend.json`, which is written last.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gristmill.errors import InputError
from gristmill.tokenizer import Tokenizer

if TYPE_CHECKING:
    from gristmill.train.packing import Sample

TOKEN = np.dtype("<i4")


class TokenStore:
    """The documents of a finished blend, through a memory map.

    Args:
        folder: what `blend` wrote.
        tokenizer: the model's, if it shall be checked that the blend was made with it.

    Raises:
        InputError: the folder holds no whole blend, or one of another tokenizer.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer | None = None) -> None:
        try:
            facts = json.loads((folder / "blend.json").read_text())
            self.ends_N: np.ndarray = np.load(folder / "ends.npy", mmap_mode="r")
            self.shards = [np.memmap(folder / shard["file"], TOKEN, "r") for shard in facts["shards"]]
        except (OSError, ValueError) as e:
            raise InputError(f"{folder} holds no finished blend ({e}): run `gristmill blend` with --out {folder}.") from e
        if [len(shard) for shard in self.shards] != [shard["tokens"] for shard in facts["shards"]]:
            raise InputError(f"The tokens in {folder} are not those that blend.json speaks of: copy the folder again, or blend again.")
        if tokenizer is not None and tokenizer.fingerprint() != facts["tokenizer"]["fingerprint"]:
            raise InputError(f"{folder} was made with another tokenizer than the model's: blend again with this one.")
        self.facts: dict[str, Any] = facts

    def samples(self, max_tokens: int, tokens: int | None = None) -> "list[Sample]":
        """The documents in their order, each cut into pieces of at most `max_tokens`; see `train.pretrain.token_samples`.

        Ids are int32 views of the map and masks are views of one array: neither is a copy.

        Args:
            tokens: no further document is given once there are so many.
        """
        from gristmill.train.packing import Sample  # loads torch, which the processes that encode do without

        mask = np.arange(max_tokens) > 0
        mask.flags.writeable = False
        out: list[Sample] = []
        number = first = 0
        for facts, shard in zip(self.facts["shards"], map(np.asarray, self.shards), strict=True):
            begin = 0
            for end in (self.ends_N[number : number + facts["documents"]] - first).tolist():
                if tokens is not None and first + begin >= tokens:
                    return out
                for start in range(begin, end, max_tokens):
                    name = f"document {number}" if end - begin <= max_tokens else f"document {number} from token {start - begin}"
                    ids = shard[start : min(start + max_tokens, end)]
                    out.append(Sample(ids, mask[: len(ids)], name))
                number += 1
                begin = end
            first += begin
        return out
