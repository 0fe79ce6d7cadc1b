"""Model runner: one forward pass over the tokens of a step, as a CUDA graph where every sequence decodes, else in pieces.

Shapes: T tokens of the step, D hidden size, H query heads, K key-value heads, d head size, R tokens to sample, V vocabulary.
"""

from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from gristmill.core.device import put
from gristmill.engine.attention import AttentionMetadata, KVCache, TritonAttention, select_backend
from gristmill.engine.compiled_decoder import CompiledDecoder
from gristmill.engine.cuda_graph import CudaGraphs, PiecewiseGraphs
from gristmill.engine.layers import Decoder
from gristmill.engine.lora import LoraRows
from gristmill.engine.scheduler import SchedulerOutput
from gristmill.engine.sequence import BatchState

PADDING_MULTIPLE = 16  # rows
PIECEWISE_SIZES = (32, 64, 128, 256, 512)  # tokens; larger steps compute for longer than their kernels take to launch


class ModelRunner:
    """A decoder with its KV cache and attention backend.

    Args:
        decoder: may be shared with other runners.
        batch_state: whose tokens and block tables it reads.
        cache_dtype: of keys and values; int8 and float8_e4m3fn keep a scale for each head of a token.
    """

    def __init__(self, decoder: Decoder, batch_state: BatchState, cache_dtype: torch.dtype) -> None:
        self.decoder, self.batch_state = decoder, batch_state
        self.device = decoder.device
        self.kv_cache = KVCache(decoder.config, cache_dtype, self.device)
        with torch.inference_mode():
            angles = decoder.model.rope(torch.arange(decoder.config.max_positions, device=self.device))
        self.attention = select_backend(decoder.config, self.kv_cache, decoder.dtype, angles=angles)
        self.compiled_decoder = CompiledDecoder.of(decoder, self.attention)
        self.cuda_graphs: CudaGraphs | None = None
        self.piecewise_graphs: PiecewiseGraphs | None = None

    def allocate_kv_cache(self, num_blocks: int) -> None:
        """Make room for so many blocks, and one more, which nobody reads: where graphs put what pads their rows."""
        self.kv_cache.allocate(num_blocks + 1)
        if isinstance(self.attention, TritonAttention):
            weights = lambda: (self.decoder.layers, self.decoder.final_norm)  # noqa: E731
            max_blocks = self.batch_state.block_tables.shape[1]
            self.cuda_graphs = CudaGraphs(self._forward, weights, self.attention, padding_block=num_blocks, max_blocks=max_blocks)
            with torch.inference_mode():
                self.cuda_graphs.record([self._padded(count) for count in range(1, self.batch_state.num_slots + 1)])
                self.piecewise_graphs = PiecewiseGraphs(self.decoder, self.attention)
                self.piecewise_graphs.record(PIECEWISE_SIZES)

    def reset_graphs(self) -> None:
        """Drop CUDA graphs: the decoder's weights are others now."""
        if self.cuda_graphs is not None:
            self.cuda_graphs.reset()
        if self.piecewise_graphs is not None:
            self.piecewise_graphs.reset()

    @torch.inference_mode()
    def run(self, step: SchedulerOutput) -> Tensor:
        """Logits [R, V] to sample from: after the last tokens of `step.sample_rows`, and after those before their drafts' tokens."""
        counts = np.array(step.num_tokens)
        query_start = np.zeros(len(counts) + 1, np.int32)
        np.cumsum(counts, out=query_start[1:])
        slots = np.array([s.slot for s in step.sequences], np.int32)
        starts = np.array(step.starts, np.int64)
        positions = np.arange(query_start[-1], dtype=np.int64) - np.repeat(query_start[:-1] - starts, counts)
        ids = np.zeros(self._padded(len(positions)), np.int64)
        ids[: len(positions)] = self.batch_state.token_ids[np.repeat(slots, counts), positions]
        seq_lens = (starts + counts).astype(np.int32)
        metadata = AttentionMetadata(query_start, seq_lens, slots, self.batch_state.block_tables, positions, step.num_decodes)
        distinct = list(dict.fromkeys(step.sample_rows))  # siblings sample from the same row
        adapters = [s.state.adapter for s in step.sequences]
        lora = LoraRows.of(adapters, step.num_tokens, self.device) if any(adapters) else None
        num_rows = [1 + step.num_drafts[place] for place in distinct]
        if lora is None and self.cuda_graphs is not None and step.num_decodes == len(counts) and distinct == list(range(len(counts))):
            logits = self.cuda_graphs.run(ids, metadata)
        else:
            self.attention.prepare(metadata)
            last_R, last_lora = None, lora
            if sum(num_rows) < len(positions):
                ends = [int(query_start[place + 1]) - back for place, n in zip(distinct, num_rows, strict=True) for back in range(n, 0, -1)]
                last_R = put(np.array(ends + [0] * (self._padded(len(ends)) - len(ends)), np.int64), self.device)
                last_lora = lora and LoraRows.of([adapters[place] for place in distinct], num_rows, self.device)
            if lora is None and last_R is None and self.fits_compiled_decoder(len(positions)):
                assert self.compiled_decoder is not None
                x_TD = self.decoder.embed(torch.from_numpy(ids[: len(positions)]))
                logits = self.decoder.logits(self.compiled_decoder.hidden(x_TD)).float()
            elif lora is None and self.piecewise_graphs is not None and self.piecewise_graphs.fits(len(positions)):
                logits = self.piecewise_graphs.run(ids[: len(positions)], last_R)
            else:
                logits = self._forward(put(ids, self.device), last_R, lora, last_lora)
        end_of = dict(zip(distinct, accumulate(num_rows), strict=True))
        rows = [row for place in step.sample_rows for row in range(end_of[place] - 1 - step.num_drafts[place], end_of[place])]
        return logits if rows == list(range(len(logits))) else logits[put(np.array(rows, np.int64), self.device)]

    def fits_compiled_decoder(self, num_tokens: int) -> bool:
        """Whether so many tokens without adapters, all sampled from, go through the compiled decoder."""
        if self.compiled_decoder is not None and self.compiled_decoder.layers is not self.decoder.layers:  # the weights are others now
            self.compiled_decoder = CompiledDecoder.of(self.decoder, self.attention)
        return self.compiled_decoder is not None and num_tokens <= self.compiled_decoder.max_rows

    def _forward(
        self, ids_T: Tensor, last_R: Tensor | None = None, lora: LoraRows | None = None, last_lora: LoraRows | None = None
    ) -> Tensor:
        """Logits of the tokens at last_R, or of all; the attention backend knows the rest about the step.

        Args:
            lora, last_lora: rows that adapters change, of all tokens, and of those at last_R.
        """
        layers = self.decoder.layers
        x_TD, delta_TD = self.decoder.embed(ids_T), None
        for number, layer in enumerate(layers):
            if layer.attention is not None:
                x_TD, qkv = layer.project_qkv(x_TD, delta_TD, lora)
                attended = self.attention.attend(number, qkv).flatten(1)
                delta_TD = None
            else:
                attended = None
            if number == len(layers) - 1 and last_R is not None:  # from here on only what is sampled from is read
                x_TD = x_TD[last_R]
                delta_TD = None if delta_TD is None else delta_TD[last_R]
                attended = None if attended is None else attended[last_R]
                lora = last_lora
            if attended is not None:
                delta_TD = layer.project_output(attended, lora)
            x_TD, delta_TD = layer.feed_forward(x_TD, delta_TD, lora)
        _, normed_RD = self.decoder.final_norm(x_TD, delta_TD)
        return self.decoder.logits(normed_RD).float()

    def _padded(self, count: int) -> int:
        """Row count with padding: few different sizes, for which libraries make products ready once, as long as a small one takes. On a
        GPU at least two multiples, as the int8 product asks for."""
        if self.device.type == "cuda":
            return max(2, -(-count // PADDING_MULTIPLE)) * PADDING_MULTIPLE
        return count if count <= PADDING_MULTIPLE or self.decoder.any_rows else -(-count // PADDING_MULTIPLE) * PADDING_MULTIPLE
