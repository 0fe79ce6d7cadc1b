"""One forward pass over the tokens of a step.

Shapes: T tokens of the step, D hidden size, H query heads, K key-value heads, d head size, R tokens to draw, V vocabulary.
"""

import numpy as np
import torch
from torch import Tensor

from gristmill.engine import attention
from gristmill.engine.attention import Batch, Pool, TritonAttention
from gristmill.engine.cuda_graph import Graphs
from gristmill.engine.layers import Decoder
from gristmill.engine.scheduler import Step
from gristmill.engine.sequence import Slots

ROUND = 16  # rows


class Runner:
    """A decoder with the memory of its pages.

    Args:
        decoder: may be shared with other runners.
        slots: whose tokens and tables it reads.
        cache_dtype: of keys and values; int8 and float8_e4m3fn keep a scale for each head of a token.
    """

    def __init__(self, decoder: Decoder, slots: Slots, cache_dtype: torch.dtype) -> None:
        self.decoder, self.slots = decoder, slots
        self.device = decoder.device
        self.pool = Pool(decoder.config, cache_dtype, self.device)
        with torch.inference_mode():
            cos_LR, sin_LR = decoder.model.rope(torch.arange(decoder.config.max_positions, device=self.device))
        self.attention = attention.choose(decoder.config, self.pool, decoder.dtype, cos_LR, sin_LR)
        self.graphs: Graphs | None = None

    def allocate(self, count: int) -> None:
        """Make room for so many pages, and one more, which nobody reads: where graphs put what fills their rows up."""
        self.pool.allocate(count + 1)
        if isinstance(self.attention, TritonAttention):
            self.graphs = Graphs(
                self._logits, lambda: (self.decoder.layers, self.decoder.final_norm), self.attention, count, self.slots.table.shape[1]
            )

    def forget(self) -> None:
        """The decoder's weights are others now."""
        if self.graphs is not None:
            self.graphs.forget()

    @torch.inference_mode()
    def run(self, step: Step) -> Tensor:
        """Logits [R, V] after the tokens of `step.drawn`."""
        counts = np.array(step.counts)
        begin = np.zeros(len(counts) + 1, np.int32)
        np.cumsum(counts, out=begin[1:])
        slot = np.array([s.slot for s in step.sequences], np.int32)
        starts = np.array(step.starts, np.int64)
        positions = np.arange(begin[-1], dtype=np.int64) - np.repeat(begin[:-1] - starts, counts)
        ids = np.zeros(self._padded(len(positions)), np.int64)
        ids[: len(positions)] = self.slots.tokens[np.repeat(slot, counts), positions]
        batch = Batch(begin, (starts + counts).astype(np.int32), slot, self.slots.table, positions, step.decoding)
        drawn = list(dict.fromkeys(step.drawn))
        if self.graphs is not None and step.decoding == len(counts) and drawn == list(range(len(counts))):
            logits = self.graphs.run(ids, batch)
        else:
            self.attention.begin(batch)
            last_R = None
            if len(drawn) < len(positions):
                ends = [int(begin[place + 1]) - 1 for place in drawn]
                last_R = torch.tensor(ends + [0] * (self._padded(len(ends)) - len(ends)), dtype=torch.int64, device=self.device)
            logits = self._logits(torch.from_numpy(ids).to(self.device), last_R)
        place_of = {place: row for row, place in enumerate(drawn)}
        rows = [place_of[place] for place in step.drawn]
        return logits if rows == list(range(len(logits))) else logits[torch.tensor(rows, dtype=torch.int64, device=self.device)]

    def _logits(self, ids_T: Tensor, last_R: Tensor | None = None) -> Tensor:
        """Logits of the tokens at last_R, or of all; the attention knows the rest about the step."""
        layers = self.decoder.layers
        x_TD, delta_TD = self.decoder.embed(ids_T), None
        for number, layer in enumerate(layers):
            if layer.attention is not None:
                x_TD, qkv = layer.project(x_TD, delta_TD)
                attended = self.attention.attend(number, qkv).flatten(1)
                delta_TD = None
            else:
                attended = None
            if number == len(layers) - 1 and last_R is not None:  # from here on only what is drawn from is read
                x_TD = x_TD[last_R]
                delta_TD = None if delta_TD is None else delta_TD[last_R]
                attended = None if attended is None else attended[last_R]
            if attended is not None:
                delta_TD = layer.output(attended)
            x_TD, delta_TD = layer.feed(x_TD, delta_TD)
        _, normed_RD = self.decoder.final_norm(x_TD, delta_TD)
        return self.decoder.logits(normed_RD).float()

    def _padded(self, count: int) -> int:
        """Few different sizes, for which products are made ready once: libraries take as long to do so as to compute a small one. On a
        GPU at least two rounds, as the int8 product asks for."""
        if self.device.type == "cuda":
            return max(2, -(-count // ROUND)) * ROUND
        return count if count <= ROUND else -(-count // ROUND) * ROUND
