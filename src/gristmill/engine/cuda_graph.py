"""CUDA graphs of decode steps, captured once for each of a few batch sizes and replayed: a GPU computes a small step faster than Python
launches its kernels.

Shapes: N rows of a step, padding included.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gristmill.engine.attention import AttentionMetadata, TritonAttention


class CudaGraphs:
    """Captured decode graphs, and the tensors that they read.

    Args:
        forward: computes logits of token ids [N], after `attention` has got its inputs.
        weights: gives what `forward` reads: it must live as long as what is captured.
        attention: of the model runner.
        padding_block: takes the keys and values of rows that only pad.
        max_blocks: of a sequence.
    """

    def __init__(
        self,
        forward: Callable[[Tensor], Tensor],
        weights: Callable[[], object],
        attention: TritonAttention,
        *,
        padding_block: int,
        max_blocks: int,
    ) -> None:
        self.forward, self.weights, self.attention = forward, weights, attention
        self.padding_block, self.max_blocks = padding_block, max_blocks
        self.device = attention.kv_cache.device
        self.pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None
        self.reset()

    def reset(self) -> None:
        """Drop all graphs: weights are elsewhere."""
        self.captured: dict[int, tuple[dict[str, Tensor], Callable[[], Tensor], object]] = {}

    def run(self, ids: np.ndarray, metadata: AttentionMetadata) -> Tensor:
        """Logits [N, V] of a step.

        Args:
            ids: of the tokens, and zeros up to as many rows as are computed.
            metadata: of the step, without padding.
        """
        arrays = self._pad(ids, metadata)
        if len(ids) not in self.captured:
            self.captured[len(ids)] = (*self._capture(arrays), self.weights())
        tensors, replay, _ = self.captured[len(ids)]
        for name, array in arrays.items():
            tensors[name].copy_(torch.from_numpy(array), non_blocking=True)
        return replay()

    def _pad(self, ids: np.ndarray, metadata: AttentionMetadata) -> dict[str, np.ndarray]:
        """Inputs of as many sequences as there are ids: those beyond the batch have one token, at position 0 of the padding block."""
        count, padding = len(metadata.slots), len(ids) - len(metadata.slots)
        block_tables = np.full((len(ids), self.max_blocks), self.padding_block, np.int32)
        block_tables[:count] = metadata.block_tables[metadata.slots]
        positions = np.concatenate([metadata.positions, np.zeros(padding, np.int64)])
        seq_lens = np.concatenate([metadata.seq_lens, np.ones(padding, np.int32)])
        rows = np.arange(len(ids), dtype=np.int32)
        padded = AttentionMetadata(np.arange(len(ids) + 1, dtype=np.int32), seq_lens, rows, block_tables, positions, len(ids))
        return self.attention.build_inputs(padded) | {"block_tables": block_tables, "ids": ids}

    def _capture(self, arrays: dict[str, np.ndarray]) -> tuple[dict[str, Tensor], Callable[[], Tensor]]:
        tensors = {name: torch.from_numpy(array).to(self.device, copy=True) for name, array in arrays.items()}

        def compute() -> Tensor:
            self.attention.inputs = tensors
            return self.forward(tensors["ids"])

        if self.device.type != "cuda":  # nothing to capture with
            return tensors, compute
        warmup: Any = torch.cuda.Stream(self.device)
        warmup.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(warmup):  # what is made at the first call must not be captured
            compute()
        torch.cuda.current_stream(self.device).wait_stream(warmup)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):  # others may compute meanwhile
            out = compute()

        def replay() -> Tensor:
            graph.replay()
            return out

        return tensors, replay
