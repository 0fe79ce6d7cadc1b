"""One forward pass over the tokens of a step.

Shapes: T tokens of the step, D hidden size, H query heads, K key-value heads, d head size, R tokens to draw, V vocabulary.
"""

import numpy as np
import torch
from torch import Tensor

from gristmill.engine import attention
from gristmill.engine.attention import Batch, Pool
from gristmill.engine.scheduler import Step
from gristmill.engine.sequence import Slots
from gristmill.model.transformer import Block, Transformer


class Runner:
    """A model with the memory of its pages.

    Args:
        model: in the type that it is to compute in.
        slots: whose tokens and tables it reads.
        cache_dtype: of keys and values.
    """

    def __init__(self, model: Transformer, slots: Slots, cache_dtype: torch.dtype) -> None:
        self.model, self.slots = model, slots
        self.device = model.embedding.device
        self.blocks = [block for block in model.blocks if isinstance(block, Block)]
        self.pool = Pool(model.config, cache_dtype, self.device)
        with torch.inference_mode():
            cos_LR, sin_LR = model.rope(torch.arange(model.config.max_positions, device=self.device))
        self.attention = attention.choose(model.config, self.pool, cos_LR, sin_LR)

    @torch.inference_mode()
    def run(self, step: Step) -> Tensor:
        """Logits [R, V] after the tokens of `step.drawn`."""
        counts = np.array(step.counts)
        begin = np.zeros(len(counts) + 1, np.int32)
        np.cumsum(counts, out=begin[1:])
        slot = np.array([s.slot for s in step.sequences], np.int32)
        starts = np.array(step.starts, np.int64)
        positions = np.arange(begin[-1]) - np.repeat(begin[:-1] - starts, counts)
        ids_T = torch.from_numpy(self.slots.tokens[np.repeat(slot, counts), positions].astype(np.int64)).to(self.device)
        positions_T = torch.from_numpy(positions.astype(np.int64)).to(self.device)
        length = (starts + counts).astype(np.int32)
        self.attention.begin(Batch(begin, length, slot, self.slots.table, positions_T, step.decoding))
        ends = [int(begin[place + 1]) - 1 for place in dict.fromkeys(step.drawn)]
        x_TD = self.model.embed(ids_T)
        last_R = torch.tensor(ends, device=self.device)
        for layer, block in enumerate(self.blocks):
            attended = None
            if block.attention is not None and block.attention_norm is not None:
                attended = self.attention.attend(layer, block.attention.project(block.attention_norm(x_TD)))
            if layer == len(self.blocks) - 1 and len(ends) < len(x_TD):  # from here on only what is drawn from is read
                x_TD = x_TD[last_R]
                attended = None if attended is None else attended[last_R]
            x_TD = block.finish(x_TD, attended)
        if not self.blocks:
            x_TD = x_TD[last_R]
        logits = self.model.logits(self.model.final_norm(x_TD)).float()
        place_of = {place: row for row, place in enumerate(dict.fromkeys(step.drawn))}
        rows = [place_of[place] for place in step.drawn]
        return logits if len(rows) == len(logits) else logits[torch.tensor(rows, device=self.device)]
