"""Sharded checkpoints (torch's DCP with safetensors files): every process writes what it has, beside training, and reads what it needs.

A tensor that was cut over some processes is read by others that cut it otherwise, or by one that has it whole.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gristmill.core.errors import InputError
from gristmill.parallel.mesh import Mesh, background_group


class ShardWriter:
    """Asynchronous checkpoint writer of the processes of a mesh. Every call is collective."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh, self._group = mesh, background_group(mesh)
        self._pending: Any = None

    @property
    def busy(self) -> bool:
        return self._pending is not None

    def begin(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """Copy the tensors, then write them while training goes on."""
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
        from torch.distributed.checkpoint.state_dict_saver import async_save

        assert not self.busy
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        self._pending = async_save(dict(tensors), storage_writer=writer, process_group=self._group)

    def finished(self, *, wait: bool) -> bool:
        """Whether all processes have written their part.

        Raises:
            InputError: one of them could not.
        """
        pending, fault = self._pending, ""
        if pending is None:
            return False
        if wait or pending.done():
            try:
                pending.result()
            except Exception as e:
                fault = str(e) or type(e).__name__
        states = self._mesh.gather([pending.done(), fault])
        if faults := [words for _, words in states if words]:
            raise InputError(f"The checkpoint cannot be written ({faults[0].strip()}): free some space or choose another place.")
        if not all(done for done, _ in states):
            return False
        self._pending = None
        return True


def read_shards(folder: Path, into: Mapping[str, Tensor]) -> None:
    """Read tensors, or this process's parts of them, by their names, into those that are given."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)  # each reads alone, as is meant
        load(dict(into), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
