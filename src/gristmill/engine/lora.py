"""LoRA adapters in the engine: low-rank products beside the layers' own, for each adapter on those rows of a step that ask for it.

Shapes: T tokens of a step, D inputs of a product, N its outputs, r rank, R ranks of all parts of a merged projection, S slots, W the
ranks that a slot has room for.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gristmill.core.device import put
from gristmill.core.errors import InputError
from gristmill.model.adapters import Adapter
from gristmill.model.lora import block_diagonal, linears_by_layer
from gristmill.model.transformer import Transformer

MAX_ADAPTERS = 256  # loaded at once
_roots = itertools.count(-1, -1)


@dataclass(frozen=True)
class _Update:
    """Update of a linear layer: A of all its parts, and their B times the scaling, block-diagonal."""

    a_RD: Tensor
    b_NR: Tensor


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
        self.rank = max((low.rank for low in adapter.matrices.values()), default=1)
        device = model.embedding.device
        self.layers: list[dict[str, _Update]] = []
        for linears in linears_by_layer(model):
            updates = {}
            for linear, place in linears.items():
                parts = {name: low for name in place.spans if (low := adapter.matrices.get(place.prefix + name)) is not None}
                if parts:
                    a_RD = torch.cat([low.lora_A.detach() for low in parts.values()])
                    scaled = {name: low.lora_B.detach() * low.scaling for name, low in parts.items()}
                    b_NR = block_diagonal(scaled, place.spans, place.order_N)
                    updates[linear] = _Update(a_RD.to(device, dtype), b_NR.to(device, dtype))
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
            groups.append((adapter, slice(int(rows[0]), int(rows[-1]) + 1) if together else put(rows, device)))
        return LoraRows(groups) if groups else None

    def add(self, layer: int, linear: str, x_TD: Tensor, out_TN: Tensor) -> None:
        """Add the updates of a layer's linear layer to its product, in place."""
        for adapter, rows in self.groups:
            update = adapter.layers[layer].get(linear)
            if update is None:
                continue
            low_TR = x_TD[rows] @ update.a_RD.T
            if isinstance(rows, slice):
                out_TN[rows].addmm_(low_TR, update.b_NR.T)
            else:
                out_TN.index_add_(0, rows, low_TR @ update.b_NR.T)


class LoraSlots:
    """Adapters where CUDA graphs read them: stacked matrices that stay where they are, with a slot for each adapter of a step.

    Args:
        model: whose linear layers they change.
        rank: the largest of any part that a slot has room for.
    """

    def __init__(self, model: Transformer, count: int, rank: int, dtype: torch.dtype) -> None:
        self.count, self.rank = count, rank
        self.loaded: list[LoadedAdapter | None] = [None] * count
        device = model.embedding.device
        self.layers: list[dict[str, tuple[Tensor, Tensor]]] = []
        for linears in linears_by_layer(model):
            stacked = {}
            for linear, place in linears.items():
                width = rank * len(place.spans)
                a_SWD = torch.zeros(count, width, place.linear.in_features, dtype=dtype, device=device)
                stacked[linear] = a_SWD, torch.zeros(count, width, sum(place.spans.values()), dtype=dtype, device=device)
            self.layers.append(stacked)

    def load(self, adapters: Sequence[LoadedAdapter | None]) -> list[int]:
        """Slots of these adapters, which are copied into them unless they are there; -1 of none."""
        needed = dict.fromkeys(one for one in adapters if one is not None)
        free = [slot for slot, one in enumerate(self.loaded) if one not in needed]
        for adapter in needed:
            if adapter not in self.loaded:
                self._copy(free.pop(), adapter)
        return [-1 if one is None else self.loaded.index(one) for one in adapters]

    def _copy(self, slot: int, adapter: LoadedAdapter) -> None:
        self.loaded[slot] = adapter
        for stacked, updates in zip(self.layers, adapter.layers, strict=True):
            for linear, (a_SWD, b_SWN) in stacked.items():
                a_SWD[slot], b_SWN[slot] = 0, 0
                if (update := updates.get(linear)) is not None:
                    a_SWD[slot, : len(update.a_RD)] = update.a_RD
                    b_SWN[slot, : len(update.a_RD)] = update.b_NR.T


class SlotRows(LoraRows):
    """The same of rows whose slots are on the device: products with all slots, of which a row keeps its own. No shape depends on values.

    Args:
        slot_T: -1 of rows without an adapter.
    """

    def __init__(self, slots: LoraSlots, slot_T: Tensor) -> None:
        super().__init__(())
        self.slots = slots
        self.other_TS1 = (slot_T[:, None] != torch.arange(slots.count, device=slot_T.device))[..., None]

    def add(self, layer: int, linear: str, x_TD: Tensor, out_TN: Tensor) -> None:
        a_SWD, b_SWN = self.slots.layers[layer][linear]
        low_TSW = (x_TD @ a_SWD.flatten(0, 1).T).unflatten(1, a_SWD.shape[:2]).masked_fill_(self.other_TS1, 0.0)
        out_TN.addmm_(low_TSW.flatten(1), b_SWN.flatten(0, 1))
