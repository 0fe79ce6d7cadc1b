"""Attention over the pages of one step, behind one seam: a compiled kernel on CPUs, torch anywhere.

Shapes: T tokens of the step, H query heads, K key-value heads, d head size, e = d rounded up to whole vectors, N sequences, P pages of
the longest of them, L = P * PAGE_SIZE positions, G = H / K.
"""

import ctypes
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gristmill.engine import kernels
from gristmill.engine.pages import PAGE_SIZE
from gristmill.model.config import ModelConfig
from gristmill.model.transformer import rotate

LANES = 16  # floats of a vector, as in kernels.cpp


@dataclass
class Batch:
    """The sequences of a step: tokens begin[i]..begin[i+1] are the last of length[i] positions of the sequence in slot[i].

    Attributes:
        positions_T: int64, on the device.
        decoding: the first so many sequences have one token each.
        table: pages of all slots.
    """

    begin: np.ndarray
    length: np.ndarray
    slot: np.ndarray
    table: np.ndarray
    positions_T: Tensor
    decoding: int

    @property
    def num_tokens(self) -> int:
        """Tokens of the step; rows beyond them are padding."""
        return len(self.positions_T)


class Pool:
    """The memory of all pages: [pages, elements], a page's keys [K, d, PAGE_SIZE] and values [K, PAGE_SIZE, e] layer after layer."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.offsets: list[tuple[int, int]] = []
        self.width = 0
        for block in config.blocks:
            padded = -(-block.head_dim // LANES) * LANES
            keys, values = block.num_kv_heads * block.head_dim * PAGE_SIZE, block.num_kv_heads * padded * PAGE_SIZE
            self.offsets.append((self.width, self.width + keys))
            self.width += keys + values if block.has_attention else 0
        self.width = max(1, self.width)
        self.memory = torch.empty(0, self.width, dtype=dtype, device=device)

    @property
    def bytes_per_page(self) -> int:
        return self.width * self.memory.element_size()

    def allocate(self, count: int) -> None:
        """Room for so many pages. On a CPU it becomes real memory only where it is written."""
        self.memory = torch.empty(count, self.width, dtype=self.dtype, device=self.device)

    def copy(self, pairs: list[tuple[int, int]]) -> None:
        """Copy pages: from, to."""
        source, to = (torch.tensor(side, device=self.device) for side in zip(*pairs, strict=True))
        self.memory[to] = self.memory[source]


class Attention(Protocol):
    """Rotates and stores the step's keys and values, and attends: qkv [T, H + 2K, d] -> [T, H, d]. Rows of padding give zeros."""

    name: str

    def begin(self, batch: Batch) -> None:
        """Another step."""
        ...

    def attend(self, layer: int, qkv: Tensor) -> Tensor: ...


def choose(config: ModelConfig, pool: Pool, cos_LR: Tensor, sin_LR: Tensor) -> Attention:
    """The best back-end there is: the compiled kernel for the types it knows on a CPU, torch elsewhere."""
    if pool.device.type == "cpu" and pool.dtype in kernels.TYPES and (library := kernels.load()) is not None:
        return CompiledAttention(library, config, pool, cos_LR, sin_LR)
    return TorchAttention(config, pool, cos_LR, sin_LR)


class CompiledAttention:
    """kernels.cpp."""

    name = "compiled"

    def __init__(self, library: ctypes.CDLL, config: ModelConfig, pool: Pool, cos_LR: Tensor, sin_LR: Tensor) -> None:
        self.library, self.pool = library, pool
        self.cos_LR, self.sin_LR = cos_LR.contiguous(), sin_LR.contiguous()
        pairs = cos_LR.shape[1]
        self.layers = [
            kernels.Layer(*offsets, block.num_heads, block.num_kv_heads, block.head_dim, pairs)
            for block, offsets in zip(config.blocks, pool.offsets, strict=True)
        ]
        self.step = kernels.Step()

    def begin(self, batch: Batch) -> None:
        self.batch = batch  # keeps the arrays alive that the step points to
        self.step = kernels.Step(
            len(batch.slot),
            batch.table.shape[1],
            torch.get_num_threads(),
            0,
            self.pool.width,
            batch.begin.ctypes.data,
            batch.length.ctypes.data,
            batch.slot.ctypes.data,
            batch.table.ctypes.data,
            self.cos_LR.data_ptr(),
            self.sin_LR.data_ptr(),
        )

    def attend(self, layer: int, qkv: Tensor) -> Tensor:
        shape, qkv = self.layers[layer], qkv.contiguous()
        out_THd = qkv.new_empty(qkv.shape[0], shape.heads, shape.head_dim)
        out_THd[self.batch.num_tokens :] = 0
        types = kernels.TYPES[qkv.dtype], kernels.TYPES[self.pool.dtype]
        pool = self.pool.memory.data_ptr()
        self.library.gristmill_attend(shape, self.step, qkv.data_ptr(), types[0], pool, types[1], out_THd.data_ptr())
        return out_THd


class TorchAttention:
    """Pages are gathered, sequences with one token together and others one by one."""

    name = "torch"

    def __init__(self, config: ModelConfig, pool: Pool, cos_LR: Tensor, sin_LR: Tensor) -> None:
        self.config, self.pool, self.cos_LR, self.sin_LR = config, pool, cos_LR, sin_LR

    def begin(self, batch: Batch) -> None:
        device, counts = self.pool.device, np.diff(batch.begin)
        positions = batch.positions_T.cpu().numpy()
        page_T = batch.table[np.repeat(batch.slot, counts), positions // PAGE_SIZE]
        self.page_T = torch.from_numpy(page_T.astype(np.int64)).to(device)
        self.place_T = batch.positions_T % PAGE_SIZE
        self.cos_TR, self.sin_TR = self.cos_LR[batch.positions_T], self.sin_LR[batch.positions_T]
        self.batch = batch
        together = [slice(0, batch.decoding)] if batch.decoding else []
        self.groups = together + [slice(i, i + 1) for i in range(batch.decoding, len(batch.slot))]
        self.pages_NP, self.masks_NtL = [], []
        for group in self.groups:
            longest = -(-int(batch.length[group].max()) // PAGE_SIZE)
            self.pages_NP.append(torch.from_numpy(batch.table[batch.slot[group], :longest].astype(np.int64)).to(device))
            tokens = slice(int(batch.begin[group.start]), int(batch.begin[group.stop]))
            mine = batch.positions_T[tokens].unflatten(0, (group.stop - group.start, -1))
            self.masks_NtL.append(torch.arange(longest * PAGE_SIZE, device=device) <= mine[..., None])

    def attend(self, layer: int, qkv: Tensor) -> Tensor:
        block, (k_at, v_at) = self.config.blocks[layer], self.pool.offsets[layer]
        heads, kv_heads, size = block.num_heads, block.num_kv_heads, block.head_dim
        padded = -(-size // LANES) * LANES
        num_tokens = self.batch.num_tokens
        qk, v_TKd = qkv[:num_tokens].split([heads + kv_heads, kv_heads], dim=1)
        q_THd, k_TKd = rotate(qk, self.cos_TR, self.sin_TR).split([heads, kv_heads], dim=1)
        memory = self.pool.memory
        keys = memory[:, k_at : k_at + kv_heads * size * PAGE_SIZE].unflatten(1, (kv_heads, size, PAGE_SIZE))
        values = memory[:, v_at : v_at + kv_heads * padded * PAGE_SIZE].unflatten(1, (kv_heads, PAGE_SIZE, padded))
        keys[self.page_T, :, :, self.place_T] = k_TKd.to(memory.dtype)
        values[self.page_T, :, self.place_T, :size] = v_TKd.to(memory.dtype)
        out_THd = q_THd.new_zeros(len(qkv), heads, size)
        for group, pages_NP, mask_NtL in zip(self.groups, self.pages_NP, self.masks_NtL, strict=True):
            k_NKLd = keys[pages_NP].permute(0, 2, 1, 4, 3).flatten(2, 3).to(q_THd.dtype)
            v_NKLd = values[pages_NP].transpose(1, 2).flatten(2, 3)[..., :size].to(q_THd.dtype)
            tokens = slice(int(self.batch.begin[group.start]), int(self.batch.begin[group.stop]))
            q_NHtd = q_THd[tokens].unflatten(0, (len(pages_NP), -1)).transpose(1, 2)
            # what no token of the sequence has written may hold anything, and 0 * inf is no number
            v_NKLd = torch.where(mask_NtL[:, -1, :, None][:, None], v_NKLd, 0.0)
            k_NKLd = torch.where(mask_NtL[:, -1, :, None][:, None], k_NKLd, 0.0)
            attended = F.scaled_dot_product_attention(q_NHtd, k_NKLd, v_NKLd, mask_NtL[:, None], enable_gqa=heads != kv_heads)
            out_THd[tokens] = attended.transpose(1, 2).flatten(0, 1)
        return out_THd
