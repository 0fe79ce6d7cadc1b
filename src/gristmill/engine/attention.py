"""Attention over the pages of one step, behind one seam: a compiled kernel on CPUs, Triton's on GPUs, torch anywhere.

Shapes: T tokens of the step, H query heads, K key-value heads, d head size, e = d rounded up to whole vectors, N sequences, P pages of
the longest of them, L = P * PAGE_SIZE positions, G = H / K.
"""

import ctypes
import os
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gristmill.engine.block_manager import PAGE_SIZE
from gristmill.engine.kernels import library as kernels
from gristmill.engine.linear import known_to_kernels
from gristmill.model.config import ModelConfig
from gristmill.model.quantized import MAX_VALUES, scaled
from gristmill.model.transformer import rotate

LANES = 16  # floats of a vector, as in kernels.cpp
TILE_ROWS = 64  # (token, query head) pairs of a program on a GPU, where a sequence has more than one token


@dataclass
class Batch:
    """The sequences of a step: tokens begin[i]..begin[i+1] are the last of length[i] positions of the sequence in slot[i].

    Attributes:
        positions: int64, of the tokens.
        decoding: the first so many sequences have one token each.
        table: pages of all slots.
    """

    begin: np.ndarray
    length: np.ndarray
    slot: np.ndarray
    table: np.ndarray
    positions: np.ndarray
    decoding: int

    @property
    def num_tokens(self) -> int:
        """Tokens of the step; rows beyond them are padding."""
        return len(self.positions)


class Pool:
    """The memory of all pages: [pages, elements], a page's keys [K, d, PAGE_SIZE] and values [K, PAGE_SIZE, e] layer after layer.

    In int8 and float8_e4m3fn elements are bytes, and fp32 scales of the keys [K, PAGE_SIZE] and of the values [K, PAGE_SIZE] follow.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.scaled = dtype in MAX_VALUES
        self.offsets: list[tuple[int, int, int]] = []  # of keys, values and scales
        self.width = 0
        for block in config.blocks:
            padded = -(-block.head_dim // LANES) * LANES
            keys, values = block.num_kv_heads * block.head_dim * PAGE_SIZE, block.num_kv_heads * padded * PAGE_SIZE
            self.offsets.append((self.width, self.width + keys, self.width + keys + values))
            scales = 2 * block.num_kv_heads * PAGE_SIZE * torch.float32.itemsize if self.scaled else 0
            self.width += keys + values + scales if block.has_attention else 0
        self.width = max(torch.float32.itemsize, self.width)
        self.memory = torch.empty(0, self.width, dtype=torch.uint8 if self.scaled else dtype, device=device)

    @property
    def bytes_per_page(self) -> int:
        return self.width * self.memory.element_size()

    def allocate(self, count: int) -> None:
        """Room for so many pages. On a CPU it becomes real memory only where it is written."""
        self.memory = torch.empty(count, self.width, dtype=self.memory.dtype, device=self.device)

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


def choose(config: ModelConfig, pool: Pool, dtype: torch.dtype, cos_LR: Tensor, sin_LR: Tensor) -> Attention:
    """The best back-end there is for activations of this type: the compiled kernel on a CPU, Triton on a GPU, torch elsewhere."""
    if known_to_kernels(pool.device, dtype) and (library := kernels.load()) is not None:
        return CompiledAttention(library, config, pool, cos_LR, sin_LR)
    group = max([block.num_heads // block.num_kv_heads for block in config.blocks if block.has_attention], default=1)
    if pool.device.type == "cuda" and group <= TILE_ROWS and find_spec("triton") is not None and os.environ.get("GRISTMILL_KERNELS") != "0":
        return TritonAttention(config, pool, cos_LR, sin_LR)
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
        types = kernels.TYPES[qkv.dtype], kernels.CACHE_TYPES[self.pool.dtype]
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
        page_T = batch.table[np.repeat(batch.slot, counts), batch.positions // PAGE_SIZE]
        positions_T = torch.from_numpy(batch.positions).to(device)
        self.places = _Places(positions_T, torch.from_numpy(page_T.astype(np.int64)).to(device))
        self.batch = batch
        together = [slice(0, batch.decoding)] if batch.decoding else []
        self.groups = together + [slice(i, i + 1) for i in range(batch.decoding, len(batch.slot))]
        self.pages_NP, self.masks_NtL = [], []
        for group in self.groups:
            longest = -(-int(batch.length[group].max()) // PAGE_SIZE)
            self.pages_NP.append(torch.from_numpy(batch.table[batch.slot[group], :longest].astype(np.int64)).to(device))
            tokens = slice(int(batch.begin[group.start]), int(batch.begin[group.stop]))
            mine = positions_T[tokens].unflatten(0, (group.stop - group.start, -1))
            self.masks_NtL.append(torch.arange(longest * PAGE_SIZE, device=device) <= mine[..., None])

    def attend(self, layer: int, qkv: Tensor) -> Tensor:
        views = _Views(self.config, self.pool, layer)
        q_THd = views.store(qkv[: self.batch.num_tokens], self.places, self.cos_LR, self.sin_LR)
        heads, kv_heads, size = q_THd.shape[1], views.kv_heads, views.size
        out_THd = q_THd.new_zeros(len(qkv), heads, size)
        for group, pages_NP, mask_NtL in zip(self.groups, self.pages_NP, self.masks_NtL, strict=True):
            k_NKLd = views.keys[pages_NP].permute(0, 2, 1, 4, 3).flatten(2, 3)
            v_NKLd = views.values[pages_NP].transpose(1, 2).flatten(2, 3)[..., :size]
            if views.scales is not None:
                by_2NKL1 = views.scales[pages_NP].permute(2, 0, 3, 1, 4).flatten(3, 4)[..., None]
                k_NKLd, v_NKLd = (
                    x.contiguous().view(self.pool.dtype).float() * by for x, by in zip((k_NKLd, v_NKLd), by_2NKL1, strict=True)
                )
            tokens = slice(int(self.batch.begin[group.start]), int(self.batch.begin[group.stop]))
            q_NHtd = q_THd[tokens].unflatten(0, (len(pages_NP), -1)).transpose(1, 2)
            # what no token of the sequence has written may hold anything, and 0 * inf is no number
            k_NKLd, v_NKLd = (torch.where(mask_NtL[:, -1, :, None][:, None], x.to(q_THd.dtype), 0.0) for x in (k_NKLd, v_NKLd))
            attended = F.scaled_dot_product_attention(q_NHtd, k_NKLd, v_NKLd, mask_NtL[:, None], enable_gqa=heads != kv_heads)
            out_THd[tokens] = attended.transpose(1, 2).flatten(0, 1)
        return out_THd


class TritonAttention:
    """triton_kernels.py. What a step needs is in tensors alone (`inputs`), so that a CUDA graph of it can be played again."""

    name = "triton"

    def __init__(self, config: ModelConfig, pool: Pool, cos_LR: Tensor, sin_LR: Tensor) -> None:
        self.config, self.pool, self.cos_LR, self.sin_LR = config, pool, cos_LR, sin_LR
        self.group = max([block.num_heads // block.num_kv_heads for block in config.blocks if block.has_attention], default=1)

    def begin(self, batch: Batch) -> None:
        self.inputs = {name: torch.from_numpy(array).to(self.pool.device) for name, array in self.inputs_of(batch).items()}

    def inputs_of(self, batch: Batch) -> dict[str, np.ndarray]:
        """What the kernels read: positions and pages of the tokens, tiles of sequences with one token and of others, pages of sequences."""
        counts = np.diff(batch.begin).astype(np.int64)
        first = batch.length - counts
        decoding = np.stack(
            [np.arange(batch.decoding), batch.begin[: batch.decoding], first[: batch.decoding], counts[: batch.decoding]], 1
        )
        most = TILE_ROWS // self.group
        reading = [
            (i, batch.begin[i] + start, first[i] + start, min(most, counts[i] - start))
            for i in range(batch.decoding, len(counts))
            for start in range(0, counts[i], most)
        ]
        arrays = {
            "positions": batch.positions,
            "pages": batch.table[np.repeat(batch.slot, counts), batch.positions // PAGE_SIZE].astype(np.int64),
            "decoding": decoding.astype(np.int32),
            "reading": np.array(reading, np.int32).reshape(-1, 4),
            "table": batch.table[batch.slot, : -(-int(batch.length.max()) // PAGE_SIZE)].astype(np.int32),
        }
        return {name: np.ascontiguousarray(array) for name, array in arrays.items()}

    def attend(self, layer: int, qkv: Tensor) -> Tensor:
        from gristmill.engine.kernels.triton_attention import attend

        views, inputs = _Views(self.config, self.pool, layer), self.inputs
        q_THd = views.store(qkv[: len(inputs["positions"])], _Places(inputs["positions"], inputs["pages"]), self.cos_LR, self.sin_LR)
        out_THd = q_THd.new_zeros(len(qkv), *q_THd.shape[1:])
        memory = self.pool.memory.view(self.pool.dtype)
        scales = self.pool.memory.view(torch.float32) if self.pool.scaled else None
        for tiles, rows in ((inputs["decoding"], max(16, 1 << (self.group - 1).bit_length())), (inputs["reading"], TILE_ROWS)):
            if len(tiles):
                attend(q_THd.contiguous(), memory, scales, self.pool.offsets[layer], tiles, inputs["table"], out_THd, views.kv_heads, rows)
        return out_THd


@dataclass
class _Places:
    """Where the keys and values of a step's tokens belong."""

    positions_T: Tensor
    page_T: Tensor


class _Views:
    """A layer's part of the pool: keys [pages, K, d, PAGE_SIZE], values [pages, K, PAGE_SIZE, e] and scales [pages, 2, K, PAGE_SIZE]."""

    def __init__(self, config: ModelConfig, pool: Pool, layer: int) -> None:
        block, (k_at, v_at, s_at) = config.blocks[layer], pool.offsets[layer]
        self.dtype, self.heads, self.kv_heads, self.size = pool.dtype, block.num_heads, block.num_kv_heads, block.head_dim
        padded = -(-self.size // LANES) * LANES
        self.keys = pool.memory[:, k_at:v_at].unflatten(1, (self.kv_heads, self.size, PAGE_SIZE))
        self.values = pool.memory[:, v_at : v_at + self.kv_heads * PAGE_SIZE * padded].unflatten(1, (self.kv_heads, PAGE_SIZE, padded))
        self.scales: Tensor | None = None
        if pool.scaled:
            scales = pool.memory[:, s_at : s_at + 2 * self.kv_heads * PAGE_SIZE * torch.float32.itemsize]
            self.scales = scales.view(torch.float32).unflatten(1, (2, self.kv_heads, PAGE_SIZE))

    def store(self, qkv: Tensor, places: _Places, cos_LR: Tensor, sin_LR: Tensor) -> Tensor:
        """Rotate [T, H + 2K, d], keep keys and values, and give back the queries [T, H, d]."""
        qk, v_TKd = qkv.split([self.heads + self.kv_heads, self.kv_heads], dim=1)
        rotated = rotate(qk, cos_LR[places.positions_T], sin_LR[places.positions_T])
        q_THd, k_TKd = rotated.split([self.heads, self.kv_heads], dim=1)
        page_T, place_T = places.page_T, places.positions_T % PAGE_SIZE
        if self.scales is not None:
            (k_TKd, k_scale_TK), (v_TKd, v_scale_TK) = scaled(k_TKd, self.dtype), scaled(v_TKd, self.dtype)
            k_TKd, v_TKd = k_TKd.view(torch.uint8), v_TKd.view(torch.uint8)
            self.scales[page_T, 0, :, place_T], self.scales[page_T, 1, :, place_T] = k_scale_TK, v_scale_TK
        self.keys[page_T, :, :, place_T] = k_TKd.to(self.keys.dtype)
        self.values[page_T, :, place_T, : self.size] = v_TKd.to(self.values.dtype)
        return q_THd
