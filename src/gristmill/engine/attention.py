"""Paged attention backends and the KV cache that they read: a compiled kernel on CPUs, Triton's on GPUs, torch anywhere.

Shapes: T tokens of the step, H query heads, K key-value heads, d head size, e = d rounded up to whole vectors, N sequences, P blocks of
the longest of them, L = P * BLOCK_SIZE positions, G = H / K.
"""

import ctypes
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gristmill.core.device import Arena, put
from gristmill.engine.block_manager import BLOCK_SIZE
from gristmill.engine.kernels import library as kernels
from gristmill.engine.linear import has_triton, supported_by_kernels
from gristmill.model.attention import ScoreMod, capped_attention
from gristmill.model.config import ModelConfig
from gristmill.model.quantized import MAX_VALUES, scaled
from gristmill.model.rotary import Angles, rotate_heads

LANES = 16  # floats of a vector, as in kernels.cpp
TILE_ROWS = 128  # most (token, query head) pairs of a program on a GPU, where a sequence has more than one token
SHARED_BYTES = 96 * 1024  # of a program: GPUs of compute capability 8.6 and 8.9 have 99 KiB, others more
MAX_SPLITS = 16  # programs that share the keys of a token
NUM_PROGRAMS = 264  # that decoding is split up to on a GPU: two for each processor of an H200


@dataclass
class AttentionMetadata:
    """Ragged batch of a step: tokens query_start[i]..query_start[i+1] are the last of seq_lens[i] positions of the sequence in slots[i].

    Attributes:
        block_tables: of all slots.
        positions: int64, of the tokens.
        num_decodes: the first so many sequences have one token each.
        num_drafted: so many behind them decode too, and have drafts.
    """

    query_start: np.ndarray
    seq_lens: np.ndarray
    slots: np.ndarray
    block_tables: np.ndarray
    positions: np.ndarray
    num_decodes: int
    num_drafted: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of the step; rows beyond them are padding."""
        return len(self.positions)


class KVCache:
    """KV cache: [blocks, elements], a block's keys [K, d, BLOCK_SIZE] and values [K, BLOCK_SIZE, e] layer after layer.

    In int8 and float8_e4m3fn elements are bytes, and fp32 scales of the keys [K, BLOCK_SIZE] and of the values [K, BLOCK_SIZE] follow.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.scaled = dtype in MAX_VALUES
        self.offsets: list[tuple[int, int, int]] = []  # of keys, values and scales
        self.width = 0
        for block in config.blocks:
            padded = -(-block.head_dim // LANES) * LANES
            keys, values = block.num_kv_heads * block.head_dim * BLOCK_SIZE, block.num_kv_heads * padded * BLOCK_SIZE
            self.offsets.append((self.width, self.width + keys, self.width + keys + values))
            scales = 2 * block.num_kv_heads * BLOCK_SIZE * torch.float32.itemsize if self.scaled else 0
            self.width += keys + values + scales if block.has_attention else 0
        self.width = max(torch.float32.itemsize, self.width)
        self.memory = torch.empty(0, self.width, dtype=torch.uint8 if self.scaled else dtype, device=device)

    @property
    def bytes_per_block(self) -> int:
        return self.width * self.memory.element_size()

    def allocate(self, num_blocks: int) -> None:
        """Make room for so many blocks. On a CPU it becomes real memory only where it is written."""
        self.memory = Arena().zeros((num_blocks, self.width), self.memory.dtype, self.device)

    def copy(self, pairs: list[tuple[int, int]]) -> None:
        """Copy blocks: from, to."""
        source, to = (put(np.array(side, np.int64), self.device) for side in zip(*pairs, strict=True))
        self.memory[to] = self.memory[source]


class AttentionBackend(Protocol):
    """Attention backend: rotates and stores a step's keys and values, and attends: qkv [T, H + 2K, d] (`group_heads`) -> [T, H, d].

    Padding gives zeros.
    """

    name: str

    def prepare(self, metadata: AttentionMetadata) -> None:
        """Begin another step."""
        ...

    def attend(self, layer: int, qkv: Tensor) -> Tensor: ...


def select_backend(config: ModelConfig, kv_cache: KVCache, dtype: torch.dtype, *, angles: dict[str, Angles]) -> AttentionBackend:
    """The best attention backend for activations of this type: the compiled kernel on a CPU, Triton on a GPU, torch elsewhere.

    Args:
        angles: of the rotation, of all positions, for each kind of layer (`BlockConfig.rope`).
    """
    if supported_by_kernels(kv_cache.device, dtype) and (library := kernels.load()) is not None:
        return CompiledAttention(library, config, kv_cache, angles=angles)
    if has_triton(kv_cache.device):
        attention = TritonAttention(config, kv_cache, angles=angles, dtype=dtype)
        if attention.group <= attention.tile_rows:
            return attention
    return TorchAttention(config, kv_cache, angles=angles)


class CompiledAttention:
    """Compiled CPU backend, kernels.cpp."""

    name = "compiled"

    def __init__(self, library: ctypes.CDLL, config: ModelConfig, kv_cache: KVCache, *, angles: dict[str, Angles]) -> None:
        self.library, self.kv_cache = library, kv_cache
        self.angles = {kind: (cos_LR.contiguous(), sin_LR.contiguous()) for kind, (cos_LR, sin_LR) in angles.items()}
        self.layers = []
        for block, offsets in zip(config.blocks, kv_cache.offsets, strict=True):
            cos_LR, sin_LR = self.angles[block.rope]
            heads = block.num_heads, block.num_kv_heads, block.head_dim, cos_LR.shape[1], block.window
            # a scale of 0 is 1 / sqrt(head_dim), a cap of 0 none
            factors = config.attention_scale or 0.0, config.attention_soft_cap or 0.0
            self.layers.append(kernels.Layer(*offsets, *heads, *factors, 0, cos_LR.data_ptr(), sin_LR.data_ptr()))
        self.step = kernels.Step()

    def prepare(self, metadata: AttentionMetadata) -> None:
        self.metadata = metadata  # keeps the arrays alive that the step points to
        self.step = kernels.Step(
            len(metadata.slots),
            metadata.block_tables.shape[1],
            torch.get_num_threads(),
            metadata.num_decodes + metadata.num_drafted,
            self.kv_cache.width,
            metadata.query_start.ctypes.data,
            metadata.seq_lens.ctypes.data,
            metadata.slots.ctypes.data,
            metadata.block_tables.ctypes.data,
        )

    def attend(self, layer: int, qkv: Tensor) -> Tensor:
        shape, qkv = self.layers[layer], qkv.contiguous()
        out_THd = qkv.new_empty(qkv.shape[0], shape.heads, shape.head_dim)
        out_THd[self.metadata.num_tokens :] = 0
        types = kernels.TYPES[qkv.dtype], kernels.CACHE_TYPES[self.kv_cache.dtype]
        kv_cache = self.kv_cache.memory.data_ptr()
        self.library.gristmill_attend(shape, self.step, qkv.data_ptr(), types[0], kv_cache, types[1], out_THd.data_ptr())
        return out_THd


class TorchAttention:
    """Torch backend: blocks are gathered, sequences with one token together and others one by one."""

    name = "torch"

    def __init__(self, config: ModelConfig, kv_cache: KVCache, *, angles: dict[str, Angles]) -> None:
        self.config, self.kv_cache, self.angles = config, kv_cache, angles

    def prepare(self, metadata: AttentionMetadata) -> None:
        device, counts = self.kv_cache.device, np.diff(metadata.query_start)
        block_T = metadata.block_tables[np.repeat(metadata.slots, counts), metadata.positions // BLOCK_SIZE]
        positions_T = put(metadata.positions, device)
        self.slot_mapping = _SlotMapping(positions_T, put(block_T.astype(np.int64), device))
        self.metadata = metadata
        together = [slice(0, metadata.num_decodes)] if metadata.num_decodes else []
        self.groups = together + [slice(i, i + 1) for i in range(metadata.num_decodes, len(metadata.slots))]
        self.blocks_NP: list[Tensor] = []
        self.masks_NtL: list[dict[int, Tensor]] = []  # by window
        windows = {0} | {block.window for block in self.config.blocks}
        for group in self.groups:
            longest = -(-int(metadata.seq_lens[group].max()) // BLOCK_SIZE)
            self.blocks_NP.append(put(metadata.block_tables[metadata.slots[group], :longest].astype(np.int64), device))
            tokens = slice(int(metadata.query_start[group.start]), int(metadata.query_start[group.stop]))
            mine = positions_T[tokens].unflatten(0, (group.stop - group.start, -1))
            here_L = torch.arange(longest * BLOCK_SIZE, device=device)
            seen_NtL = here_L <= mine[..., None]
            self.masks_NtL.append({window: seen_NtL & (here_L > mine[..., None] - window) if window else seen_NtL for window in windows})

    def attend(self, layer: int, qkv: Tensor) -> Tensor:
        cache = _LayerCache(self.config, self.kv_cache, layer)
        block, scale, cap = self.config.blocks[layer], self.config.attention_scale, self.config.attention_soft_cap
        q_THd = cache.store(qkv[: self.metadata.num_tokens], self.slot_mapping, *self.angles[block.rope])
        heads, kv_heads, size = q_THd.shape[1], cache.kv_heads, cache.size
        out_THd = q_THd.new_zeros(len(qkv), heads, size)
        for group, blocks_NP, masks_NtL in zip(self.groups, self.blocks_NP, self.masks_NtL, strict=True):
            k_NKLd = cache.keys[blocks_NP].permute(0, 2, 1, 4, 3).flatten(2, 3)
            v_NKLd = cache.values[blocks_NP].transpose(1, 2).flatten(2, 3)[..., :size]
            if cache.scales is not None:
                by_2NKL1 = cache.scales[blocks_NP].permute(2, 0, 3, 1, 4).flatten(3, 4)[..., None]
                k_NKLd, v_NKLd = (
                    x.contiguous().view(self.kv_cache.dtype).float() * by for x, by in zip((k_NKLd, v_NKLd), by_2NKL1, strict=True)
                )
            tokens = slice(int(self.metadata.query_start[group.start]), int(self.metadata.query_start[group.stop]))
            q_NHtd = q_THd[tokens].unflatten(0, (len(blocks_NP), -1)).transpose(1, 2)
            # what no token of the sequence has written may hold anything, and 0 * inf is no number
            written_N1L1 = masks_NtL[0][:, -1, :, None][:, None]
            k_NKLd, v_NKLd = (torch.where(written_N1L1, x.to(q_THd.dtype), 0.0) for x in (k_NKLd, v_NKLd))
            args = q_NHtd, k_NKLd, v_NKLd, masks_NtL[block.window][:, None]
            if cap is None:
                attended = F.scaled_dot_product_attention(*args, scale=scale, enable_gqa=heads != kv_heads)
            else:
                attended = capped_attention(*args, ScoreMod(block.window, scale, cap))
            out_THd[tokens] = attended.transpose(1, 2).flatten(0, 1)
        return out_THd


class TritonAttention:
    """Triton GPU backend, triton_attention.py. What a step needs is in tensors alone (`inputs`), so that a CUDA graph can be replayed."""

    name = "triton"

    def __init__(self, config: ModelConfig, kv_cache: KVCache, *, angles: dict[str, Angles], dtype: torch.dtype = torch.float32) -> None:
        self.config, self.kv_cache, self.angles = config, kv_cache, angles
        blocks = [block for block in config.blocks if block.has_attention]
        self.group = max([block.num_heads // block.num_kv_heads for block in blocks], default=1)
        self.tile_rows = _tile_rows(max([block.head_dim for block in blocks], default=1), dtype)

    def prepare(self, metadata: AttentionMetadata) -> None:
        self.inputs = {name: put(array, self.kv_cache.device) for name, array in self.build_inputs(metadata).items()}

    def build_inputs(self, metadata: AttentionMetadata) -> dict[str, np.ndarray]:
        """Kernel inputs: positions and blocks of the tokens, tiles of sequences with one token and of others, block tables of sequences."""
        counts = np.diff(metadata.query_start).astype(np.int64)
        first = metadata.seq_lens - counts
        decodes = np.stack(
            [
                np.arange(metadata.num_decodes),
                metadata.query_start[: metadata.num_decodes],
                first[: metadata.num_decodes],
                counts[: metadata.num_decodes],
            ],
            1,
        )
        longest = int(counts[metadata.num_decodes :].max(initial=1))
        self.prefill_rows = min(self.tile_rows, _power_of_2(max(16, longest * self.group)))  # no more than the longest fills
        tile_tokens = self.prefill_rows // self.group
        prefills = [
            (i, metadata.query_start[i] + start, first[i] + start, min(tile_tokens, counts[i] - start))
            for i in range(metadata.num_decodes, len(counts))
            for start in range(0, counts[i], tile_tokens)
        ]
        arrays = {
            "positions": metadata.positions,
            "blocks": metadata.block_tables[np.repeat(metadata.slots, counts), metadata.positions // BLOCK_SIZE].astype(np.int64),
            "decodes": decodes.astype(np.int32),
            "prefills": np.array(prefills, np.int32).reshape(-1, 4),
            "block_tables": metadata.block_tables[metadata.slots, : -(-int(metadata.seq_lens.max()) // BLOCK_SIZE)].astype(np.int32),
        }
        return {name: np.ascontiguousarray(array) for name, array in arrays.items()}

    def _num_splits(self, num_programs: int) -> int:
        """Programs to share the keys of each token that decodes: a function of shapes alone, as a CUDA graph needs it."""
        wanted = min(MAX_SPLITS, NUM_PROGRAMS // max(1, num_programs), self.inputs["block_tables"].shape[1])
        return _power_of_2(max(1, wanted) // 2 + 1)  # at most as many

    def attend(self, layer: int, qkv: Tensor) -> Tensor:
        from gristmill.engine.kernels.triton_attention import attend, rotate_and_store

        inputs, block, offsets = self.inputs, self.config.blocks[layer], self.kv_cache.offsets[layer]
        memory = self.kv_cache.memory.view(self.kv_cache.dtype)
        scales = self.kv_cache.memory.view(torch.float32) if self.kv_cache.scaled else None
        q_THd = rotate_and_store(
            qkv,
            memory,
            scales,
            offsets=offsets,
            positions_T=inputs["positions"],
            blocks_T=inputs["blocks"],
            angles=self.angles[block.rope],
            kv_heads=block.num_kv_heads,
        )
        out_THd = q_THd.new_zeros(len(qkv), *q_THd.shape[1:])
        decodes, prefills = inputs["decodes"], inputs["prefills"]
        for tiles, rows, num_splits in (
            (decodes, _power_of_2(max(16, self.group)), self._num_splits(len(decodes) * block.num_kv_heads)),
            (prefills, self.prefill_rows, 1),
        ):
            if len(tiles):
                attend(
                    q_THd,
                    memory,
                    scales,
                    offsets=offsets,
                    tiles_N4=tiles,
                    block_tables_NP=inputs["block_tables"],
                    out_THd=out_THd,
                    kv_heads=block.num_kv_heads,
                    rows=rows,
                    mod=ScoreMod(block.window, self.config.attention_scale, self.config.attention_soft_cap),
                    num_splits=num_splits,
                )
        return out_THd


def _tile_rows(head_dim: int, dtype: torch.dtype) -> int:
    """Rows of the largest tile whose queries, weights, keys and values fit into the memory of a program; 0 where none does."""
    width, rows = max(16, _power_of_2(head_dim)), TILE_ROWS
    while rows >= 16 and ((rows + 2 * BLOCK_SIZE) * width + rows * BLOCK_SIZE) * dtype.itemsize > SHARED_BYTES:
        rows //= 2
    return rows if rows >= 16 else 0


def _power_of_2(number: int) -> int:
    """The smallest power of two that is no less."""
    return 1 << (number - 1).bit_length()


@dataclass
class _SlotMapping:
    """Slot mapping: where the keys and values of a step's tokens belong."""

    positions_T: Tensor
    block_T: Tensor


class _LayerCache:
    """KV cache of a layer: keys [blocks, K, d, BLOCK_SIZE], values [blocks, K, BLOCK_SIZE, e] and scales [blocks, 2, K, BLOCK_SIZE]."""

    def __init__(self, config: ModelConfig, kv_cache: KVCache, layer: int) -> None:
        block, (k_at, v_at, s_at) = config.blocks[layer], kv_cache.offsets[layer]
        self.dtype, self.heads, self.kv_heads, self.size = kv_cache.dtype, block.num_heads, block.num_kv_heads, block.head_dim
        padded = -(-self.size // LANES) * LANES
        self.keys = kv_cache.memory[:, k_at:v_at].unflatten(1, (self.kv_heads, self.size, BLOCK_SIZE))
        self.values = kv_cache.memory[:, v_at : v_at + self.kv_heads * BLOCK_SIZE * padded].unflatten(
            1, (self.kv_heads, BLOCK_SIZE, padded)
        )
        self.scales: Tensor | None = None
        if kv_cache.scaled:
            scales = kv_cache.memory[:, s_at : s_at + 2 * self.kv_heads * BLOCK_SIZE * torch.float32.itemsize]
            self.scales = scales.view(torch.float32).unflatten(1, (2, self.kv_heads, BLOCK_SIZE))

    def store(self, qkv: Tensor, slot_mapping: _SlotMapping, cos_LR: Tensor, sin_LR: Tensor) -> Tensor:
        """Rotate [T, H + 2K, d], keep keys and values, and give back the queries [T, H, d]."""
        angles = cos_LR[slot_mapping.positions_T], sin_LR[slot_mapping.positions_T]
        q_THd, k_TKd, v_TKd = rotate_heads(qkv, self.kv_heads, angles)
        block_T, place_T = slot_mapping.block_T, slot_mapping.positions_T % BLOCK_SIZE
        if self.scales is not None:
            (k_TKd, k_scale_TK), (v_TKd, v_scale_TK) = scaled(k_TKd, self.dtype), scaled(v_TKd, self.dtype)
            k_TKd, v_TKd = k_TKd.view(torch.uint8), v_TKd.view(torch.uint8)
            self.scales[block_T, 0, :, place_T], self.scales[block_T, 1, :, place_T] = k_scale_TK, v_scale_TK
        self.keys[block_T, :, :, place_T] = k_TKd.to(self.keys.dtype)
        self.values[block_T, :, place_T, : self.size] = v_TKd.to(self.values.dtype)
        return q_THd
