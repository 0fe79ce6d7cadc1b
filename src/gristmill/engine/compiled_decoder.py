"""Compiled decoder: all layers of a step with few rows in one call of decode.cpp, from a table of pointers that is made once.

At one row a layer's kernels take less time than Python needs to call them. Shapes: T tokens of the step, D hidden size.
"""

import ctypes
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from gristmill.engine.attention import AttentionBackend, CompiledAttention
from gristmill.engine.kernels import library as kernels
from gristmill.engine.layers import Decoder, DecoderLayer, Norm
from gristmill.engine.linear import ANY_ROWS, Int8Linear, LinearMethod


class CompiledDecoder:
    """Decoder layers and final norm over the KV cache of an attention backend, by the same kernels that `layers` calls one by one.

    Attributes:
        layers: that it was made from.
        max_rows: up to which its products are the ones to take.
    """

    @staticmethod
    def of(decoder: Decoder, attention: AttentionBackend) -> "CompiledDecoder | None":
        """None where torch has a part: without the compiled attention, or with a matrix that linear.cpp does not multiply by."""
        if not isinstance(attention, CompiledAttention):
            return None
        if any(linear.compiled is None for layer in decoder.layers for linear in _linears(layer)):
            return None
        return CompiledDecoder(decoder, attention)

    def __init__(self, decoder: Decoder, attention: CompiledAttention) -> None:
        self.layers, self.attention, self.function = decoder.layers, attention, attention.library.gristmill_decode
        self.max_rows = min((linear.max_rows for layer in self.layers for linear in _linears(layer)), default=ANY_ROWS)
        self.held: list[object] = [decoder.final_norm]  # what the pointers point to, beside the layers
        self.blocks = (kernels.Block * len(self.layers))(*(self._block(layer) for layer in self.layers))
        types = kernels.TYPES[decoder.dtype], kernels.CACHE_TYPES[attention.kv_cache.dtype]
        sizes = len(self.layers), decoder.config.hidden_size
        self.table = kernels.Decoder(ctypes.addressof(self.blocks), _norm(decoder.final_norm), *sizes, *types)

    def _block(self, layer: DecoderLayer) -> kernels.Block:
        block = kernels.Block(multiplier=layer.residual_multiplier)
        if layer.attention is not None:
            block.attention = ctypes.addressof(self.attention.layers[layer.number])
            block.attention_norm, block.attention_post_norm = _norm(layer.attention_norm), _norm(layer.attention_post_norm)
            block.q_norm, block.k_norm = self._head_norm(layer.attention.q_norm), self._head_norm(layer.attention.k_norm)
            block.norms_whole = layer.attention.norms_whole
            block.qkv, block.output = _matrix(layer.qkv), _matrix(layer.output)
        if layer.mlp is not None:
            block.mlp_norm, block.mlp_post_norm = _norm(layer.mlp_norm), _norm(layer.mlp_post_norm)
            block.gate, block.up, block.down = _matrix(layer.gate_up or layer.gate), _matrix(layer.up), _matrix(layer.down)
            block.activation = kernels.ACTIVATIONS[layer.mlp.parts.activation]
        return block

    def _head_norm(self, module: nn.Module | None) -> kernels.Norm:
        norm = None if module is None else Norm(module)
        self.held.append(norm)
        return _norm(norm)

    def hidden(self, x_TD: Tensor, last_R: np.ndarray | None = None) -> Tensor:
        """States after the final norm of the step that attention was prepared for: [T, D], or [R, D] of the tokens at last_R.

        Args:
            x_TD: embeddings, of the step's tokens alone; they are overwritten.
            last_R: int32; the last layer computes no other tokens behind its attention.
        """
        out_RD = torch.empty_like(x_TD) if last_R is None else x_TD.new_empty(len(last_R), x_TD.shape[1])
        cache = self.attention.kv_cache.memory.data_ptr()
        last = None if last_R is None else last_R.ctypes.data
        self.function(self.table, self.attention.step, cache, x_TD.data_ptr(), out_RD.data_ptr(), len(x_TD), last, len(out_RD))
        return out_RD


def _linears(layer: DecoderLayer) -> Iterator[LinearMethod]:
    if layer.attention is not None:
        yield from (layer.qkv, layer.output)
    if layer.mlp is not None:
        yield from (linear for linear in (layer.gate_up, layer.gate, layer.up, layer.down) if linear is not None)


def _norm(norm: Norm | None) -> kernels.Norm:
    if norm is None:
        return kernels.Norm()
    return kernels.Norm(norm.gain_D.data_ptr(), None if norm.bias_D is None else norm.bias_D.data_ptr(), norm.eps, norm.centred)


def _matrix(linear: LinearMethod | None) -> kernels.Matrix:
    if linear is None:
        return kernels.Matrix()
    assert linear.compiled is not None
    product = linear.compiled
    return kernels.Matrix(*product.pointers, product.kind, product.num_outputs, product.width, isinstance(linear, Int8Linear))
