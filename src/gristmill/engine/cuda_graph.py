"""Steps in which every sequence says one token, recorded once for each of a few sizes and played again: a GPU computes a small step faster
than Python names its kernels.

Shapes: N rows of a step, filled up.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gristmill.engine.attention import Batch, TritonAttention


class Graphs:
    """CUDA graphs of decoding steps, and the tensors that they read.

    Args:
        logits: computes those of token ids [N], after `attention` has got its inputs.
        weights: gives what `logits` reads: it must live as long as what is recorded.
        spare_page: takes the keys and values of rows that only fill up.
        most_pages: of a sequence.
    """

    def __init__(
        self,
        logits: Callable[[Tensor], Tensor],
        weights: Callable[[], object],
        attention: TritonAttention,
        spare_page: int,
        most_pages: int,
    ) -> None:
        self.logits, self.weights, self.attention = logits, weights, attention
        self.spare_page, self.most_pages = spare_page, most_pages
        self.device = attention.pool.device
        self.memory = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None
        self.forget()

    def forget(self) -> None:
        """Weights are elsewhere: record anew."""
        self.recorded: dict[int, tuple[dict[str, Tensor], Callable[[], Tensor], object]] = {}

    def run(self, ids: np.ndarray, batch: Batch) -> Tensor:
        """Logits [N, V] of a step.

        Args:
            ids: of the tokens, and zeros up to as many rows as are computed.
        """
        arrays = self._filled_up(ids, batch)
        if len(ids) not in self.recorded:
            self.recorded[len(ids)] = (*self._record(arrays), self.weights())
        tensors, play, _ = self.recorded[len(ids)]
        for name, array in arrays.items():
            tensors[name].copy_(torch.from_numpy(array), non_blocking=True)
        return play()

    def _filled_up(self, ids: np.ndarray, batch: Batch) -> dict[str, np.ndarray]:
        """The inputs of as many sequences as there are ids: those beyond the batch have one token, at position 0 of the spare page."""
        count, more = len(batch.slot), len(ids) - len(batch.slot)
        table = np.full((len(ids), self.most_pages), self.spare_page, np.int32)
        table[:count] = batch.table[batch.slot]
        positions = np.concatenate([batch.positions, np.zeros(more, np.int64)])
        length = np.concatenate([batch.length, np.ones(more, np.int32)])
        rows = np.arange(len(ids), dtype=np.int32)
        filled = Batch(np.arange(len(ids) + 1, dtype=np.int32), length, rows, table, positions, len(ids))
        return self.attention.inputs_of(filled) | {"table": table, "ids": ids}

    def _record(self, arrays: dict[str, np.ndarray]) -> tuple[dict[str, Tensor], Callable[[], Tensor]]:
        tensors = {name: torch.from_numpy(array).to(self.device, copy=True) for name, array in arrays.items()}

        def compute() -> Tensor:
            self.attention.inputs = tensors
            return self.logits(tensors["ids"])

        if self.device.type != "cuda":  # nothing to record with
            return tensors, compute
        aside: Any = torch.cuda.Stream(self.device)
        aside.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(aside):  # what is made at the first call must not be recorded
            compute()
        torch.cuda.current_stream(self.device).wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.memory, capture_error_mode="thread_local"):  # others may compute meanwhile
            out = compute()

        def play() -> Tensor:
            graph.replay()
            return out

        return tensors, play
