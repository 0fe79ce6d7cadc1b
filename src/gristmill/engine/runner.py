"""One forward pass over the tokens of a step.

Shapes: T tokens of the step, D hidden size, H query heads, K key-value heads, d head size, R tokens to draw, V vocabulary.
"""

import numpy as np
import torch
from torch import Tensor

from gristmill.engine import attention
from gristmill.engine.attention import Batch, Pool
from gristmill.engine.layers import Layer, Norm
from gristmill.engine.scheduler import Step
from gristmill.engine.sequence import Slots
from gristmill.model.transformer import Block, Transformer

ROUND = 16  # rows


class Runner:
    """A model with the memory of its pages.

    Args:
        model: in the type that it is to compute in.
        slots: whose tokens and tables it reads.
        cache_dtype: of keys and values.
        int8: compute the layers' products in int8.
    """

    def __init__(self, model: Transformer, slots: Slots, cache_dtype: torch.dtype, int8: bool = False) -> None:
        self.model, self.slots = model, slots
        self.device = model.embedding.device
        self.int8 = int8
        self.refresh()
        self.pool = Pool(model.config, cache_dtype, self.device)
        with torch.inference_mode():
            cos_LR, sin_LR = model.rope(torch.arange(model.config.max_positions, device=self.device))
        self.attention = attention.choose(model.config, self.pool, cos_LR, sin_LR)

    def refresh(self) -> None:
        """Make the weights ready as they are now."""
        dtype = self.model.compute_dtype
        self.layers = [Layer(block, dtype, self.int8) for block in self.model.blocks if isinstance(block, Block)]
        self.final_norm = Norm(self.model.final_norm)

    @torch.inference_mode()
    def run(self, step: Step) -> Tensor:
        """Logits [R, V] after the tokens of `step.drawn`."""
        counts = np.array(step.counts)
        begin = np.zeros(len(counts) + 1, np.int32)
        np.cumsum(counts, out=begin[1:])
        slot = np.array([s.slot for s in step.sequences], np.int32)
        starts = np.array(step.starts, np.int64)
        positions = np.arange(begin[-1]) - np.repeat(begin[:-1] - starts, counts)
        ids = np.zeros(self._padded(len(positions)), np.int64)
        ids[: len(positions)] = self.slots.tokens[np.repeat(slot, counts), positions]
        ids_T = torch.from_numpy(ids).to(self.device)
        positions_T = torch.from_numpy(positions.astype(np.int64)).to(self.device)
        length = (starts + counts).astype(np.int32)
        self.attention.begin(Batch(begin, length, slot, self.slots.table, positions_T, step.decoding))
        ends = [int(begin[place + 1]) - 1 for place in dict.fromkeys(step.drawn)]
        all_drawn = len(ends) == len(positions)
        ends += [0] * (self._padded(len(ends)) - len(ends))
        x_TD, delta_TD = self.model.embed(ids_T).clone(), None
        last_R = torch.tensor(ends, dtype=torch.int64, device=self.device)
        for number, layer in enumerate(self.layers):
            if layer.attention is not None:
                x_TD, qkv = layer.project(x_TD, delta_TD)
                attended = self.attention.attend(number, qkv).flatten(1)
                delta_TD = None
            else:
                attended = None
            if number == len(self.layers) - 1 and not all_drawn:  # from here on only what is drawn from is read
                x_TD = x_TD[last_R]
                delta_TD = None if delta_TD is None else delta_TD[last_R]
                attended = None if attended is None else attended[last_R]
            if attended is not None:
                delta_TD = layer.output(attended)
            x_TD, delta_TD = layer.feed(x_TD, delta_TD)
        if not self.layers:
            x_TD = x_TD[last_R]
        _, normed_RD = self.final_norm(x_TD, delta_TD)
        logits = self.model.logits(normed_RD).float()
        place_of = {place: row for row, place in enumerate(dict.fromkeys(step.drawn))}
        rows = [place_of[place] for place in step.drawn]
        return logits if rows == list(range(len(logits))) else logits[torch.tensor(rows, dtype=torch.int64, device=self.device)]

    def _padded(self, count: int) -> int:
        """Few different sizes, for which products are made ready once: libraries take as long to do so as to compute a small one. On a
        GPU at least two rounds, as the int8 product asks for."""
        if self.device.type == "cuda":
            return max(2, -(-count // ROUND)) * ROUND
        return count if count <= ROUND else -(-count // ROUND) * ROUND
