"""Checkpoints for exact resume: a training folder holds at most one complete one, replaced by an atomic rename.

A checkpoint is a folder of ``state.safetensors`` (every tensor, under a flat name), or of one such file of each process that has a part
of the model, and of ``state.json``, with the sizes and hashes of the others. It is written under a temporary name, synced, and renamed; a
kill at any byte leaves the previous one usable. A damaged one is passed over, with a word. Nothing is pickled.
"""

import hashlib
import os
import re
import shutil
from dataclasses import dataclass, replace
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
from gristmill.parallel.mesh import Mesh
from gristmill.parallel.shards import ShardWriter

_NAME = re.compile(r"checkpoint-(\d{8})")
_TEMPORARY = "checkpoint.tmp"
_TENSORS, _INFO = "state.safetensors", "state.json"
SHAPES = "shapes"  # in the JSON part: of all tensors, which several processes have written
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
    """A saved state. ``info`` holds the JSON part, ``tensors`` the rest under flat names; or ``shards`` is the folder that they are in."""

    step: int
    finished: bool
    info: dict[str, Any]
    tensors: dict[str, Tensor]
    shards: Path | None = None


class CheckpointStore:
    """The checkpoints of one training folder, for one run identity.

    Args:
        mesh: the processes of the training, of which the first writes, or all their parts.
    """

    def __init__(self, folder: Path, identity: Identity, *, mesh: Mesh | None = None) -> None:
        self.folder, self.mesh = folder, mesh or Mesh()
        self._identity, self._writes = identity, self.mesh.is_writer
        self._shards = ShardWriter(self.mesh) if self.mesh.size > 1 else None
        self._writing: Checkpoint | None = None  # by all processes, beside training
        writes = self._writes
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
                step, finished = int(info.pop("step")), bool(info.pop("finished"))
                if SHAPES in info:
                    return Checkpoint(step, finished, info, {}, path)
                tensors = load_file(path / _TENSORS, backend="pread")  # mapped pages would be held beside their copies
                return Checkpoint(step, finished, info, tensors)
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
        self.settle(wait=True)
        if not self._writes:
            return
        temporary = self._temporary()
        with disk_errors(self.folder):
            try:
                write_tensors(temporary / _TENSORS, checkpoint.tensors)
                self._complete(checkpoint)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)

    def begin(self, checkpoint: Checkpoint) -> None:
        """Let all processes write the parts of the tensors that they have, while training goes on (collective); see `settle`."""
        assert self._shards is not None
        self.settle(wait=True)
        temporary = self.mesh.first(str(self._temporary()) if self._writes else "")  # the folder is there when the others know it
        self._shards.begin(Path(temporary), checkpoint.tensors)
        self._writing = replace(checkpoint, tensors={})

    def settle(self, *, wait: bool = False) -> None:
        """Make a checkpoint of what all processes have written, when they have, or wait until then (collective)."""
        if self._writing is None or self._shards is None or not self._shards.finished(wait=wait):
            return
        if self._writes:
            with disk_errors(self.folder):
                self._complete(self._writing)
        self._writing = None

    def _temporary(self) -> Path:
        """An empty folder to write to."""
        temporary = self.folder / _TEMPORARY
        with disk_errors(self.folder):
            shutil.rmtree(temporary, ignore_errors=True)  # left behind by a kill
            make_folder(temporary)
        return temporary

    def _complete(self, checkpoint: Checkpoint) -> None:
        """Write what makes a checkpoint of the tensors in the temporary folder, and remove the one before it."""
        temporary, final = self.folder / _TEMPORARY, self.folder / f"checkpoint-{checkpoint.step:08d}"
        head = {"step": checkpoint.step, "finished": checkpoint.finished, "layout": LAYOUT, "identity": vars(self._identity)}
        write_json(temporary / _INFO, head | {STAMPS: stamps(temporary, ["*.safetensors"])} | checkpoint.info)
        shutil.rmtree(final, ignore_errors=True)  # one that was damaged
        os.rename(temporary, final)
        sync(self.folder)
        for path in self._folders():
            if path != final:
                path.rename(temporary)  # half of it is not taken for the whole
                shutil.rmtree(temporary)
