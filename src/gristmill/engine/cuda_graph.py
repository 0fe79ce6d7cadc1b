"""CUDA graphs of decode steps, captured at the start for a list of batch sizes and replayed: a GPU computes a small step faster than
Python launches its kernels. Of other steps what lies between the attentions is captured.

Shapes: N rows of a step, padding included; T tokens of one; D hidden size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from gristmill.core.device import put
from gristmill.engine.attention import AttentionBackend, AttentionMetadata, TritonAttention
from gristmill.engine.block_manager import BLOCK_SIZE
from gristmill.engine.layers import Decoder
from gristmill.engine.lora import LoraRows, LoraSlots, SlotRows


class CudaGraphs:
    """Captured decode graphs, and the tensors that they read. Steps with adapters have graphs of their own, captured when they come up.

    Args:
        forward: computes logits of token ids [N], with rows that adapters change, after `attention` has got its inputs.
        decoder: what `forward` reads.
        attention: of the model runner.
        padding_block: takes the keys and values of rows that only pad.
        max_blocks: of a sequence.
    """

    def __init__(
        self,
        forward: Callable[[Tensor, LoraRows | None], Tensor],
        decoder: Decoder,
        attention: TritonAttention,
        *,
        padding_block: int,
        max_blocks: int,
    ) -> None:
        self.forward, self.decoder, self.attention = forward, decoder, attention
        self.padding_block, self.max_blocks = padding_block, max_blocks
        self.device = attention.kv_cache.device
        self.place = capture_place(self.device)
        self.reset()

    def reset(self) -> None:
        """Drop all graphs: weights are elsewhere."""
        self.captured: dict[tuple[int, LoraSlots | None], tuple[dict[str, Tensor], Callable[[], Tensor], object]] = {}

    def record(self, sizes: Sequence[int]) -> None:
        """Capture graphs of so many rows before there is anything to compute: none is then captured while requests wait. The largest comes
        first: those after it find room in its memory."""
        nothing = np.zeros(0, np.int32)
        empty = AttentionMetadata(
            np.zeros(1, np.int32), nothing, nothing, np.zeros((1, self.max_blocks), np.int32), np.zeros(0, np.int64), 0
        )
        for size in sorted(set(sizes), reverse=True):
            self.run(np.zeros(size, np.int64), empty)

    def run(self, ids: np.ndarray, metadata: AttentionMetadata, adapted: "tuple[LoraSlots, np.ndarray] | None" = None) -> Tensor:
        """Logits [N, V] of a step.

        Args:
            ids: of the tokens, and zeros up to as many rows as are computed.
            metadata: of the step, without padding.
            adapted: the slots of its adapters, and that of each token, where any has one.
        """
        arrays = self._pad(ids, metadata)
        slots = None if adapted is None else adapted[0]
        if adapted is not None:
            arrays["slots"] = _filled(adapted[1], len(ids))
        if (key := (len(ids), slots)) not in self.captured:
            self.captured = {other: kept for other, kept in self.captured.items() if other[1] in (None, slots)}
            self.captured[key] = (*self._capture(arrays, slots), (self.decoder.layers, self.decoder.final_norm))
        tensors, replay, _ = self.captured[key]
        for name, array in arrays.items():
            to = tensors[name][:, : array.shape[1]] if name == "block_tables" else tensors[name]
            to.copy_(put(array, self.device), non_blocking=True)
        return replay()

    def _pad(self, ids: np.ndarray, metadata: AttentionMetadata) -> dict[str, np.ndarray]:
        """Inputs of as many sequences as there are ids: those beyond the batch have one token, at position 0 of the padding block.

        Block tables are as wide as the longest sequence: what stands behind is not read, and would be megabytes with a long context.
        """
        count, padding = len(metadata.slots), len(ids) - len(metadata.slots)
        longest = -(-int(metadata.seq_lens.max(initial=1)) // BLOCK_SIZE)
        block_tables = np.full((len(ids), longest), self.padding_block, np.int32)
        block_tables[:count] = metadata.block_tables[metadata.slots, :longest]
        positions = np.concatenate([metadata.positions, np.zeros(padding, np.int64)])
        seq_lens = np.concatenate([metadata.seq_lens, np.ones(padding, np.int32)])
        rows = np.arange(len(ids), dtype=np.int32)
        padded = AttentionMetadata(np.arange(len(ids) + 1, dtype=np.int32), seq_lens, rows, block_tables, positions, len(ids))
        return self.attention.build_inputs(padded) | {"ids": ids}

    def _capture(self, arrays: dict[str, np.ndarray], slots: LoraSlots | None) -> tuple[dict[str, Tensor], Callable[[], Tensor]]:
        tensors = {name: torch.from_numpy(array).to(self.device, copy=True) for name, array in arrays.items()}
        tensors["block_tables"] = torch.zeros(len(arrays["ids"]), self.max_blocks, dtype=torch.int32, device=self.device)
        tensors["block_tables"][:, : arrays["block_tables"].shape[1]].copy_(put(arrays["block_tables"], self.device))

        def compute() -> Tensor:
            self.attention.inputs = tensors
            return self.forward(tensors["ids"], _rows(slots, tensors.get("slots")))

        replay, _ = capture(compute, self.device, self.place)
        return tensors, replay


class PiecewiseGraphs:
    """Captured graphs of steps with prompts: from the embeddings to an attention, and from there to the next one, for a list of numbers of
    tokens. Attention, whose tiles no two steps share, runs as it comes, and so does what follows the last one. Steps with adapters have
    graphs of their own, captured when they come up.

    Args:
        decoder: whose layers are captured.
        attention: of the model runner.
    """

    def __init__(self, decoder: Decoder, attention: AttentionBackend) -> None:
        self.decoder, self.attention, self.device = decoder, attention, decoder.device
        self.place = capture_place(self.device)
        self.reset()

    def reset(self) -> None:
        """Drop all graphs: weights are elsewhere."""
        self.captured: dict[tuple[int, LoraSlots | None], tuple[dict[str, Tensor], list[_Piece], object]] = {}

    def record(self, sizes: Sequence[int]) -> None:
        """Capture graphs for so many tokens, the largest first."""
        if any(layer.attention is not None for layer in self.decoder.layers):
            self.captured = {(size, None): self._capture(size, None) for size in sorted(set(sizes), reverse=True)}

    def fits(self, num_tokens: int) -> bool:
        """Whether there are graphs of at least so many tokens."""
        return num_tokens <= max((size for size, _ in self.captured), default=0)

    def run(self, ids: np.ndarray, last_R: Tensor | None, adapted: "tuple[LoraSlots, np.ndarray] | None" = None) -> Tensor:
        """Logits of the tokens at last_R, or of all and some padding, after `attention.prepare`.

        Args:
            ids: of the step's tokens.
            adapted: the slots of its adapters, and that of each token, where any has one.
        """
        size, slots = min(size for size, _ in self.captured if size >= len(ids)), None if adapted is None else adapted[0]
        if (key := (size, slots)) not in self.captured:
            self.captured = {other: kept for other, kept in self.captured.items() if other[1] in (None, slots)}
            self.captured[key] = self._capture(size, slots)
        tensors, pieces, _ = self.captured[key]
        tensors["ids"].copy_(put(_filled(ids, size, 0), self.device), non_blocking=True)
        if adapted is not None:
            tensors["slots"].copy_(put(_filled(adapted[1], size), self.device), non_blocking=True)
        for piece in pieces:
            x_TD, qkv = piece.replay()
            piece.attended.copy_(self.attention.attend(piece.layer, qkv).flatten(1))
        attended, slot_T = piece.attended, tensors.get("slots")
        if last_R is not None:  # from here on only what is sampled from is read
            x_TD, attended, slot_T = x_TD[last_R], attended[last_R], None if slot_T is None else slot_T[last_R]
        layers, lora = self.decoder.layers, _rows(slots, slot_T)
        x_RD, delta_RD = layers[piece.layer].feed_forward(x_TD, layers[piece.layer].project_output(attended, lora), lora)
        for layer in layers[piece.layer + 1 :]:
            x_RD, delta_RD = layer.feed_forward(x_RD, delta_RD, lora)
        return self.decoder.logits(self.decoder.final_norm(x_RD, delta_RD)[1]).float()

    def _capture(self, size: int, slots: LoraSlots | None) -> tuple[dict[str, Tensor], list["_Piece"], object]:
        layers = self.decoder.layers
        tensors = {"ids": torch.zeros(size, dtype=torch.int64, device=self.device)}
        if slots is not None:
            tensors["slots"] = torch.full((size,), -1, dtype=torch.int64, device=self.device)
        pieces: list[_Piece] = []
        before: tuple[int, Tensor, Tensor] | None = None
        for number, layer in enumerate(layers):
            if layer.attention is None:
                continue
            replay, (x_TD, qkv) = capture(partial(self._between, before, number, tensors, slots=slots), self.device, self.place)
            attended = qkv.new_zeros(size, layer.attention.num_heads * qkv.shape[2])
            pieces.append(_Piece(number, replay, attended))
            before = number, x_TD, attended
        return tensors, pieces, (layers, self.decoder.final_norm)

    def _between(
        self, before: tuple[int, Tensor, Tensor] | None, number: int, tensors: dict[str, Tensor], *, slots: LoraSlots | None
    ) -> tuple[Tensor, Tensor]:
        """Residual stream, and queries, keys and values of a layer, from the embeddings or from the attention of the one before."""
        layers, lora = self.decoder.layers, _rows(slots, tensors.get("slots"))
        delta_TD: Tensor | None = None
        if before is None:
            first, x_TD = 0, self.decoder.embed(tensors["ids"])
        else:
            last, x_TD, attended = before
            x_TD, delta_TD = layers[last].feed_forward(x_TD, layers[last].project_output(attended, lora), lora)
            first = last + 1
        for layer in layers[first:number]:
            x_TD, delta_TD = layer.feed_forward(x_TD, delta_TD, lora)
        return layers[number].project_qkv(x_TD, delta_TD, lora)


def _filled(values: np.ndarray, size: int, fill: int = -1) -> np.ndarray:
    """So many values, the last of which only pad."""
    return np.concatenate([values, np.full(size - len(values), fill, np.int64)])


def _rows(slots: LoraSlots | None, slot_T: Tensor | None) -> LoraRows | None:
    return None if slots is None or slot_T is None else SlotRows(slots, slot_T)


@dataclass
class _Piece:
    """What is computed up to the attention of a layer, and where that puts what it finds."""

    layer: int
    replay: Callable[[], tuple[Tensor, Tensor]]
    attended: Tensor


Result = TypeVar("Result")


def capture_place(device: torch.device) -> tuple[Any, Any]:
    """Memory pool and stream of graphs that are captured one after the other. cuBLAS keeps memory for each stream: one is enough."""
    return (torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)) if device.type == "cuda" else (None, None)


def capture(compute: Callable[[], Result], device: torch.device, place: tuple[Any, Any]) -> tuple[Callable[[], Result], Result]:
    """A CUDA graph of a computation: what replays it into the same tensors, and these. Elsewhere it is computed anew each time."""
    if device.type != "cuda":  # nothing to capture with

        def again() -> Result:
            for old, new in zip(_tensors(out), _tensors(compute()), strict=True):
                old.copy_(new)
            return out

        out = compute()
        return again, out
    pool, stream = place
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # what is made at the first call must not be captured
        compute()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # others may compute meanwhile; torch's own stream would be one of the GPU that first captured something
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        found = compute()

    def replay() -> Result:
        graph.replay()
        return found

    return replay, found


def _tensors(found: object) -> Sequence[Tensor]:
    return found if isinstance(found, tuple) else [found]  # type: ignore[list-item]
