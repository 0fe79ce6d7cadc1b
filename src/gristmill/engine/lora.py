"""LoRA adapters in the engine: low-rank products beside the layers' own, for each adapter on those rows of a step that ask for it.

Shapes: T tokens of a step, D inputs of a product, N its outputs, r rank, R ranks of all parts of a merged projection.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gristmill.core.errors import InputError
from gristmill.model.adapters import Adapter
from gristmill.model.lora import matrices_by_layer
from gristmill.model.transformer import Transformer

MAX_ADAPTERS = 256  # loaded at once
_roots = itertools.count(-1, -1)


@dataclass(frozen=True)
class _Update:
    """Update of a linear layer: A of all its parts, and of each part its rows, its columns in A's product, and B times the scaling."""

    a_RD: Tensor
    parts: list[tuple[slice, slice, Tensor]]


class LoadedAdapter:
    """An adapter ready for the steps of an engine.

    Attributes:
        root: the prefix before its first block in the prefix cache: a number that no other has, so that nobody reads what it has computed.
    """

    def __init__(self, name: str, adapter: Adapter, model: Transformer, dtype: torch.dtype) -> None:
        if adapter.config.dora:
            raise InputError(f"Merge the adapter {name!r} and serve the model (`gristmill merge`): with DoRA rows are scaled as well.")
        if adapter.head:
            raise InputError(f"Serve a language model's adapter: {name!r} is the adapter of a reward model.")
        self.name, self.root = name, next(_roots)
        device = model.embedding.device
        self.layers: list[dict[str, _Update]] = []
        for linears in matrices_by_layer(model):
            updates = {}
            for linear, spans in linears.items():
                start = column = 0
                downs, parts = [], []
                for module, size in spans.items():
                    if (low := adapter.matrices.get(module)) is not None:
                        b_Nr = (low.lora_B.detach() * low.scaling).to(device, dtype)
                        parts.append((slice(start, start + size), slice(column, column + low.rank), b_Nr))
                        downs.append(low.lora_A.detach().to(device, dtype))
                        column += low.rank
                    start += size
                if parts:
                    updates[linear] = _Update(torch.cat(downs), parts)
            self.layers.append(updates)


class LoraRows:
    """The rows of a step that adapters change.

    Args:
        groups: adapters, each with its rows.
    """

    def __init__(self, groups: Sequence[tuple[LoadedAdapter, slice | Tensor]]) -> None:
        self.groups = groups

    @staticmethod
    def of(adapters: Sequence[LoadedAdapter | None], counts: Sequence[int], device: torch.device) -> "LoraRows | None":
        """Of sequences with their adapters and numbers of rows; None if no row has any."""
        groups: list[tuple[LoadedAdapter, slice | Tensor]] = []
        for adapter in dict.fromkeys(one for one in adapters if one is not None):
            rows = np.flatnonzero(np.repeat([one is adapter for one in adapters], counts))
            together = rows[-1] - rows[0] + 1 == len(rows)
            groups.append((adapter, slice(int(rows[0]), int(rows[-1]) + 1) if together else torch.from_numpy(rows).to(device)))
        return LoraRows(groups) if groups else None

    def add(self, layer: int, linear: str, x_TD: Tensor, out_TN: Tensor) -> None:
        """Add the updates of a layer's linear layer to its product, in place."""
        for adapter, rows in self.groups:
            update = adapter.layers[layer].get(linear)
            if update is None:
                continue
            low_TR = x_TD[rows] @ update.a_RD.T
            for outputs, columns, b_Nr in update.parts:
                if isinstance(rows, slice):
                    out_TN[rows, outputs].addmm_(low_TR[:, columns], b_Nr.T)
                else:
                    out_TN[:, outputs].index_add_(0, rows, low_TR[:, columns] @ b_Nr.T)
