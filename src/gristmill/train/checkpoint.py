"""Checkpoints for exact resume: a training folder holds at most one complete one, replaced by an atomic rename.

A checkpoint is a folder of ``state.safetensors`` (every tensor, under a flat name) and ``state.json``, with
the size and hash of the former. It is written under a temporary name, synced, and renamed; a kill at any byte
leaves the previous one usable. A damaged one is passed over, with a word. Nothing is pickled.
"""

import hashlib
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from gristmill.core.echo import echo
from gristmill.core.errors import InputError
from gristmill.core.io import (
    STAMPS,
    DamagedFile,
    damaged,
    disk_errors,
    make_folder,
    read_json,
    reason,
    stamps,
    sweep,
    sync,
    write_json,
)
from gristmill.core.tensors import write_tensors

_NAME = re.compile(r"checkpoint-(\d{8})")
_TEMPORARY = "checkpoint.tmp"
_TENSORS, _INFO = "state.safetensors", "state.json"
LAYOUT = "qkv grouped by key-value head"  # of the tensors in a checkpoint


def fingerprint_model(model: nn.Module) -> str:
    """A hash of every name, shape, dtype and value of the model. 16 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def fingerprint_text(text: str) -> str:
    """A hash of a text. 16 hexadecimal digits."""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class Identity:
    """Fingerprints of what a run trains, on what, and how; a checkpoint is only continued by its equal."""

    model: str  # of the weights that training started from
    data: str
    settings: str


@dataclass(frozen=True)
class Checkpoint:
    """A saved state. ``info`` holds the JSON part, ``tensors`` the rest under flat names."""

    step: int
    finished: bool
    info: dict[str, Any]
    tensors: dict[str, Tensor]


class CheckpointStore:
    """The checkpoints of one training folder, for one run identity.

    Args:
        writes: False in all processes of a training but one.
    """

    def __init__(self, folder: Path, identity: Identity, *, writes: bool = True) -> None:
        self.folder = folder
        self._identity, self._writes = identity, writes
        if writes:
            with disk_errors(folder):
                make_folder(folder)
                sweep(folder)

    def _folders(self) -> list[Path]:
        if not self.folder.is_dir():  # the process that writes has not made it yet
            return []
        with disk_errors(self.folder):
            return sorted(path for path in self.folder.iterdir() if _NAME.fullmatch(path.name))

    def load(self) -> Checkpoint | None:
        """The latest checkpoint that is whole, or None where there is none: training then begins anew.

        Raises InputError when it was written by a run of another model, data set or settings.
        """
        for path in reversed(self._folders()):
            try:
                info = read_json(path / _INFO)
                if info.pop("layout", "") != LAYOUT:
                    raise InputError(
                        f"{self.folder} holds a training run of an earlier version, whose queries, keys and values lie in another order; "
                        "choose another folder, or delete this one to train anew"
                    )
                self._check(info.pop("identity"))
                if bad := damaged(path, info.pop(STAMPS, {})):
                    raise DamagedFile(f"{path / bad[0]} is not what was written")
                tensors = load_file(path / _TENSORS, backend="pread")  # mapped pages would be held beside their copies
                return Checkpoint(int(info.pop("step")), bool(info.pop("finished")), info, tensors)
            except (DamagedFile, OSError, LookupError, TypeError, AttributeError, ValueError, SafetensorError) as error:
                if isinstance(error, InputError) and not isinstance(error, DamagedFile):
                    raise
                echo(f"the checkpoint {path} is damaged ({reason(error)}): its steps are done again", err=True)
        return None

    def _check(self, saved: dict[str, str]) -> None:
        nouns = {"model": "another starting model", "data": "another data set", "settings": "other settings"}
        for key, noun in nouns.items():
            now = getattr(self._identity, key)
            if saved[key] != now:
                raise InputError(
                    f"{self.folder} holds a training run of {noun} (fingerprint {saved[key]}, now {now}); "
                    "choose another folder, or delete this one to train anew"
                )

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint, then remove the one before it. InputError when the disk is full."""
        if not self._writes:
            return
        temporary = self.folder / _TEMPORARY
        final = self.folder / f"checkpoint-{checkpoint.step:08d}"
        shutil.rmtree(temporary, ignore_errors=True)  # left behind by a kill
        head = {"step": checkpoint.step, "finished": checkpoint.finished, "layout": LAYOUT, "identity": vars(self._identity)}
        with disk_errors(self.folder):
            try:
                make_folder(temporary)
                write_tensors(temporary / _TENSORS, checkpoint.tensors)
                write_json(temporary / _INFO, head | {STAMPS: stamps(temporary, [_TENSORS])} | checkpoint.info)
                shutil.rmtree(final, ignore_errors=True)  # one that was damaged
                os.rename(temporary, final)
                sync(self.folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
            for path in self._folders():
                if path != final:
                    path.rename(temporary)  # half of it is not taken for the whole
                    shutil.rmtree(temporary)
