"""Model runner: one forward pass over the tokens of a step, as a CUDA graph where every sequence decodes, else in pieces.

Shapes: T tokens of the step, D hidden size, H query heads, K key-value heads, d head size, R tokens to sample, V vocabulary.
"""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from gristmill.core.device import put
from gristmill.engine.attention import AttentionMetadata, KVCache, TritonAttention, select_backend
from gristmill.engine.block_manager import BLOCK_SIZE
from gristmill.engine.compiled_decoder import CompiledDecoder
from gristmill.engine.cuda_graph import CudaGraphs, PiecewiseGraphs
from gristmill.engine.layers import Decoder
from gristmill.engine.lora import LoadedAdapter, LoraRows, LoraSlots
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
        self.slots: LoraSlots | None = None

    @torch.inference_mode()
    def allocate_kv_cache(self, num_blocks: int) -> None:
        """Make room for so many blocks, and one more, which nobody reads: where graphs put what pads their rows."""
        self.kv_cache.allocate(num_blocks + 1)
        if isinstance(self.attention, TritonAttention):
            max_blocks = self.batch_state.block_tables.shape[1]
            decode = lambda ids_T, lora: self._forward(ids_T, None, lora)  # noqa: E731
            self.cuda_graphs = CudaGraphs(decode, self.decoder, self.attention, padding_block=num_blocks, max_blocks=max_blocks)
            self.piecewise_graphs = PiecewiseGraphs(self.decoder, self.attention)
            self._record(self.cuda_graphs, self.piecewise_graphs)

    def _record(self, cuda_graphs: CudaGraphs, piecewise_graphs: PiecewiseGraphs) -> None:
        cuda_graphs.record([self._padded(count) for count in range(1, self.batch_state.num_slots + 1)])
        piecewise_graphs.record(PIECEWISE_SIZES)
        if self.device.type == "cuda":
            self._compile_prefill(cuda_graphs.attention, cuda_graphs.padding_block)

    def _compile_prefill(self, attention: TritonAttention, padding_block: int) -> None:
        """Attend from a prompt of every size of tile, so that none is compiled while requests wait."""
        rows = 16
        while rows <= attention.tile_rows:
            count = min(max(1, rows // attention.group), self.decoder.config.max_positions)
            table = np.full((1, -(-count // BLOCK_SIZE)), padding_block, np.int32)
            ends, slots = np.array([0, count], np.int32), np.zeros(1, np.int32)
            attention.prepare(AttentionMetadata(ends, ends[1:], slots, table, np.arange(count), 0))
            for number, block in enumerate(self.decoder.config.blocks):
                if block.has_attention:
                    heads = block.num_heads + 2 * block.num_kv_heads
                    attention.attend(number, torch.zeros(count, heads, block.head_dim, dtype=self.decoder.dtype, device=self.device))
            rows *= 2

    def release(self) -> None:
        """Let go of the cache and of graphs, which nobody needs any more."""
        self.cuda_graphs = self.piecewise_graphs = self.slots = None
        self.kv_cache.allocate(0)

    def reset_graphs(self) -> None:
        """Drop CUDA graphs: the decoder's weights are others now. They are captured again before the next step."""
        if self.cuda_graphs is not None:
            self.cuda_graphs.reset()
        if self.piecewise_graphs is not None:
            self.piecewise_graphs.reset()

    @torch.inference_mode()
    def run(self, step: SchedulerOutput) -> Tensor:
        """Logits [R, V] to sample from: after the last tokens of `step.sample_rows`, and after those before their drafts' tokens."""
        if self.cuda_graphs is not None and self.piecewise_graphs is not None and not self.cuda_graphs.captured:
            self._record(self.cuda_graphs, self.piecewise_graphs)
        counts = np.array(step.num_tokens)
        query_start = np.zeros(len(counts) + 1, np.int32)
        np.cumsum(counts, out=query_start[1:])
        slots = np.array([s.slot for s in step.sequences], np.int32)
        starts = np.array(step.starts, np.int64)
        positions = np.arange(query_start[-1], dtype=np.int64) - np.repeat(query_start[:-1] - starts, counts)
        ids = np.zeros(self._padded(len(positions)), np.int64)
        ids[: len(positions)] = self.batch_state.token_ids[np.repeat(slots, counts), positions]
        seq_lens = (starts + counts).astype(np.int32)
        decoding = step.num_decodes, step.num_drafted
        metadata = AttentionMetadata(query_start, seq_lens, slots, self.batch_state.block_tables, positions, *decoding)
        distinct = list(dict.fromkeys(step.sample_rows))  # siblings sample from the same row
        adapters = [s.state.adapter for s in step.sequences]
        num_rows = [1 + step.num_drafts[place] for place in distinct]
        if self.cuda_graphs is not None and step.num_decodes == len(counts) and distinct == list(range(len(counts))):
            logits = self.cuda_graphs.run(ids, metadata, self._adapted(adapters, counts))
        else:
            self.attention.prepare(metadata)
            in_pieces = self.piecewise_graphs is not None and self.piecewise_graphs.fits(len(positions))
            lora = LoraRows.of(adapters, step.num_tokens, self.device) if any(adapters) and not in_pieces else None
            last, last_R, last_lora = None, None, lora
            if sum(num_rows) < len(positions):
                ends = [int(query_start[place + 1]) - back for place, n in zip(distinct, num_rows, strict=True) for back in range(n, 0, -1)]
                last = np.array(ends, np.int32)
                last_R = put(np.array(ends + [0] * (self._padded(len(ends)) - len(ends)), np.int64), self.device)
                last_lora = lora and LoraRows.of([adapters[place] for place in distinct], num_rows, self.device)
            if lora is None and self.fits_compiled_decoder(len(positions)) and (last is None or len(last)):
                assert self.compiled_decoder is not None
                x_TD = self.decoder.embed(torch.from_numpy(ids[: len(positions)]))
                logits = self.decoder.logits(self.compiled_decoder.hidden(x_TD, last)).float()
            elif self.piecewise_graphs is not None and in_pieces:
                logits = self.piecewise_graphs.run(ids[: len(positions)], last_R, self._adapted(adapters, counts))
            else:
                logits = self._forward(put(ids, self.device), last_R, lora, last_lora)
        end_of = dict(zip(distinct, accumulate(num_rows), strict=True))
        rows = [row for place in step.sample_rows for row in range(end_of[place] - 1 - step.num_drafts[place], end_of[place])]
        return logits if rows == list(range(len(logits))) else logits[put(np.array(rows, np.int64), self.device)]

    def _adapted(self, adapters: Sequence[LoadedAdapter | None], counts: np.ndarray) -> tuple[LoraSlots, np.ndarray] | None:
        """Slots with these adapters, and that of each token; None where there are none. Others where they are too few or too narrow."""
        there = {one for one in adapters if one is not None}
        if not there:
            return None
        count, rank = len(there), max(one.rank for one in there)
        if self.slots is None or self.slots.count < count or self.slots.rank < rank:
            if self.slots is not None:
                count, rank = max(count, self.slots.count), max(rank, self.slots.rank)
            self.slots = LoraSlots(self.decoder.model, 1 << (count - 1).bit_length(), rank, self.decoder.dtype)
        return self.slots, np.repeat(np.array(self.slots.load(adapters), np.int64), counts)

    def fits_compiled_decoder(self, num_tokens: int) -> bool:
        """Whether so many tokens without adapters go through the compiled decoder."""
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
