"""Activations of a parent on calibration text, one layer at a time, in memory-mapped files: they are never all in memory.

A layer needs three states of every token: what it reads, what lies between attention and MLP, and what it gives, which the next one
reads. Only these are on the disk. Shapes: T tokens of all documents, D hidden size.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gristmill.compress.variants import HALVES, ChannelContribution, half_of
from gristmill.core.errors import InputError
from gristmill.core.io import disk_errors, make_folder, replacing
from gristmill.model.packed import PackedShape
from gristmill.model.rotary import Angles
from gristmill.model.transformer import Transformer
from gristmill.train.batches import Sample

SPARE_BYTES = 64 << 20  # that stay free


@dataclass(frozen=True)
class Piece:
    """Documents of a packed batch: tokens from `start` to `end` of all."""

    start: int
    end: int
    shape: PackedShape
    ids_T: Tensor
    rows_R: Tensor  # that predict a trained target
    targets_R: Tensor

    @property
    def num_tokens(self) -> int:
        return self.end - self.start


def pieces_of(samples: Sequence[Sample], max_tokens: int, device: torch.device) -> list[Piece]:
    """Samples as packed batches of at most so many tokens (or a single longer one), in their order."""
    groups: list[list[Sample]] = [[]]
    for sample in samples:
        if groups[-1] and sum(one.num_tokens for one in groups[-1]) + sample.num_tokens > max_tokens:
            groups.append([])
        groups[-1].append(sample)
    found: list[Piece] = []
    start = 0
    for group in groups:
        ids_T = torch.from_numpy(np.concatenate([np.asarray(one.ids) for one in group]).astype(np.int64)).to(device)
        trained = [np.append(False, np.asarray(one.mask)[1:]) for one in group]
        targets_R = torch.from_numpy(np.flatnonzero(np.concatenate(trained))).to(device)
        shape = PackedShape.from_lengths([one.num_tokens for one in group], device)
        found.append(Piece(start, start + len(ids_T), shape, ids_T, targets_R - 1, ids_T[targets_R]))
        start += len(ids_T)
    return found


class Activations:
    """Residual stream of a parent around one layer at a time.

    Args:
        parent: its `compute_dtype` is the type of the states, on the disk too.
        pieces: the text, of which each read gives one.
        folder: for the files; what an earlier start has left in it is removed.

    Raises:
        InputError: the disk has no room for them, before anything is computed.
    """

    def __init__(self, parent: Transformer, pieces: Sequence[Piece], folder: Path) -> None:
        self.parent, self.pieces, self.folder = parent, pieces, folder
        self._layer = -1
        self.close()
        with disk_errors(folder):
            make_folder(folder)
            free = shutil.disk_usage(folder).free
        # the states that a layer gives are written while those that it reads, and those between, are there
        needed = 4 * pieces[-1].end * parent.config.hidden_size * parent.compute_dtype.itemsize + SPARE_BYTES
        if needed > free:
            raise InputError(
                f"The activations of {pieces[-1].end:,} tokens take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free at {folder}: "
                "free some space, choose another --out, or lower calibration.tokens."
            )

    def close(self) -> None:
        """Remove the files."""
        shutil.rmtree(self.folder, ignore_errors=True)

    @torch.no_grad()
    def advance(self, layer: int) -> Tensor | None:
        """Go on to a layer, through all before it; returns the contribution of its MLP's channels, if it has one."""
        contribution = None
        if self._layer < 0:
            with self._writing(self._states(0)) as states_TD:
                for piece in self.pieces:
                    states_TD[piece.start : piece.end] = self.parent.embed(piece.ids_T)
        for number in range(self._layer + 1, layer + 1):
            (self._states(number - 1)).unlink(missing_ok=True)
            self._layer = number
            contribution = self._compute()
        return contribution

    def _compute(self) -> Tensor | None:
        attention, mlp = (half_of(self.parent, self._layer, half) for half in HALVES)
        counter = None if mlp.mlp is None else ChannelContribution(mlp)
        with self._writing(self._middle) as middle_TD, self._writing(self._states(self._layer + 1)) as output_TD:
            for piece in self.pieces:
                angles = self.angles(piece)
                x_TD = attention(self.inputs(piece), *angles, piece.shape)
                middle_TD[piece.start : piece.end] = x_TD
                output_TD[piece.start : piece.end] = mlp(x_TD, *angles, piece.shape)
        return None if counter is None else counter.close()

    def angles(self, piece: Piece) -> Angles:
        """Rotary angles of the layer."""
        return self.parent.rope(piece.shape.positions_T)[self.parent.config.blocks[self._layer].rope]

    def inputs(self, piece: Piece) -> Tensor:
        """What the layer reads, [T, D]."""
        return self._read(self._states(self._layer), piece)

    def middles(self, piece: Piece) -> Tensor:
        """What lies between its attention and its MLP."""
        return self._read(self._middle, piece)

    def outputs(self, piece: Piece) -> Tensor:
        """What it gives."""
        return self._read(self._states(self._layer + 1), piece)

    def _states(self, layer: int) -> Path:
        return self.folder / f"states-{layer:03}.bin"

    @property
    def _middle(self) -> Path:
        return self.folder / "middle.bin"

    def _mapped(self, path: Path, shared: bool) -> Tensor:
        size, width = self.pieces[-1].end, self.parent.config.hidden_size
        return torch.from_file(str(path), shared=shared, size=size * width, dtype=self.parent.compute_dtype).view(size, width)

    def _read(self, path: Path, piece: Piece) -> Tensor:
        return self._mapped(path, False)[piece.start : piece.end].to(self.parent.embedding.device)

    @contextmanager
    def _writing(self, path: Path) -> Iterator[Tensor]:
        with disk_errors(self.folder), replacing(path) as temporary:
            size = self.pieces[-1].end * self.parent.config.hidden_size * self.parent.compute_dtype.itemsize
            with temporary.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, size)  # a disk that fills up is an error here, and a signal while pages are written
            yield self._mapped(temporary, True)
