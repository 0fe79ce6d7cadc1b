"""Compiled blocks: those of a small decoder in one call forward and one backward, by tile products in bf16 (`kernels/blocks.cpp`).

Called one by one, the operations of a small model take as long for Python, autograd and torch's dispatcher as they do for the processor.

Shapes: T tokens, S of them behind the last block, D hidden size.
"""

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gristmill.core.threads import MAX_THREADED_PARAMETERS, Map, alone
from gristmill.model import fused
from gristmill.model.attention import attention_call
from gristmill.model.kernels import library as kernels
from gristmill.model.packed import PackedShape
from gristmill.model.rotary import Angles

DEPTH = 32  # sizes are multiples of it


class Tiles:
    """Weights of blocks as the kernel reads them: matrices as tiles in bf16, gains in fp32.

    Args:
        each: workers that make them.

    Attributes:
        parameters: the model's, in the order of the kernel's table.
    """

    def __init__(self, blocks: Sequence[Any], each: Map = alone) -> None:
        self.blocks = blocks
        self.parameters = [parameter for block in blocks for parameter in _parameters(block)]
        self._held: list[Tensor] = []  # what the table's pointers point to
        self._layers = (kernels.Layer * len(blocks))(*each(self._layer, blocks))

    def table(self) -> "ctypes.Array[kernels.Layer]":
        """A copy of the kernel's table, without gradients and attention."""
        return (kernels.Layer * len(self.blocks)).from_buffer_copy(self._layers)

    def _layer(self, block: Any) -> kernels.Layer:
        layer = kernels.Layer(**{name: self._norm(norm) for name, norm in _norms(block).items()})
        layer.ffn = 0 if block.mlp is None else block.mlp.down.weight.shape[1]
        for name, weight in _matrices(block).items():
            setattr(layer, name, self._weight(weight))
        return layer

    def _norm(self, norm: Any) -> kernels.Norm:
        gain_D, bias_D = norm.gain().detach(), norm.shift().detach() if hasattr(norm, "shift") else None
        self._held += [gain_D] if bias_D is None else [gain_D, bias_D]
        return kernels.Norm(gain=gain_D.data_ptr(), bias=kernels.pointer_of(bias_D), eps=norm.eps, centred=bias_D is not None)

    def _weight(self, weight_NK: Tensor) -> kernels.Weight:
        library = kernels.load()
        assert library is not None
        tiles = torch.empty(2, weight_NK.numel(), dtype=torch.bfloat16)
        if weight_NK.dtype != torch.float32 or not weight_NK.is_contiguous():
            weight_NK = weight_NK.detach().float().contiguous()
        columns, rows = tiles.data_ptr(), tiles.data_ptr() + tiles.nbytes // 2
        library.gristmill_tiles_of(weight_NK.data_ptr(), *weight_NK.shape, columns, rows)
        self._held.append(tiles)
        return kernels.Weight(columns=columns, rows=rows)


def _norms(block: Any) -> dict[str, Any]:
    """By their names in the kernel's table; none of a half that the block has not."""
    norms = {"attention_norm": block.attention_norm, "mlp_norm": block.mlp_norm}
    return {name: norm for name, norm in norms.items() if norm is not None}


def _matrices(block: Any) -> dict[str, Tensor]:
    """By their names in the kernel's table; without a gate the up is called so."""
    attention, mlp = block.attention, block.mlp
    linears = {} if attention is None else {"qkv": attention.qkv, "output": attention.output}
    if mlp is not None:
        linears |= {"gate": mlp.up} if mlp.gate is None else {"gate": mlp.gate, "up": mlp.up}
        linears["down"] = mlp.down
    return {name: linear.weight for name, linear in linears.items()}


def _parameters(block: Any) -> list[Tensor]:
    norms = [parameter for norm in _norms(block).values() for parameter in (norm.weight, getattr(norm, "bias", None))]
    return [parameter for parameter in (*norms, *_matrices(block).values()) if parameter is not None]


def _set_gradients(block: Any, layer: kernels.Layer, gradients: Mapping[Tensor, Tensor], added: set[Tensor]) -> None:
    """Write where the gradients of some parameters go, and which of them are added to what is there."""
    for name, norm in _norms(block).items():
        into, bias = getattr(layer, name), getattr(norm, "bias", None)
        into.grad_gain, into.adds = kernels.pointer_of(gradients.get(norm.weight)), norm.weight in added
        into.grad_bias = None if bias is None else kernels.pointer_of(gradients.get(bias))
    for name, weight in _matrices(block).items():
        matrix = getattr(layer, name)
        matrix.grad, matrix.adds = kernels.pointer_of(gradients.get(weight)), weight in added


def freeze(decoder: Any, each: Map = alone) -> None:
    """The weights of a decoder will not change any more: their tiles are made once, by the workers of a map, and all threads read them."""
    decoder.tiles = Tiles(list(decoder.blocks.values()), each) if takes(decoder) else None


@contextmanager
def unchanged(decoder: Any, each: Map = alone) -> Iterator[None]:
    """As `freeze`, for as long as the context lasts."""
    freeze(decoder, each)
    try:
        yield
    finally:
        decoder.tiles = None


def takes(decoder: Any) -> bool:
    """Whether the kernel computes this decoder: it is small, in bf16 on a CPU with tile products, of plain blocks, and whole."""
    blocks = list(decoder.blocks.values())
    if not blocks or len(blocks) < decoder.config.num_layers:  # a stage of a pipeline, which may have no embedding
        return False
    if decoder.compute_dtype != torch.bfloat16 or decoder.embedding.device.type != "cpu" or not kernels.has_tiles():
        return False
    if decoder.sharding is not None or decoder.context is not None or decoder.checkpoint_activations:
        return False
    if sum(x.numel() for x in decoder.parameters()) > MAX_THREADED_PARAMETERS:
        return False
    if any(x.requires_grad and x.dtype != torch.float32 for block in blocks for x in block.parameters()):
        return False
    if not all(block.is_plain() for block in blocks) or decoder.config.hidden_size % DEPTH:
        return False
    return all(size % DEPTH == 0 for block in blocks for weight in _matrices(block).values() for size in weight.shape)


def run(
    decoder: Any,
    x_TD: Tensor,
    angles: Mapping[str, Angles],
    shape: PackedShape,
    rows_S: Tensor | None,
    layers: list[Tensor] | None = None,
) -> Tensor | None:
    """States [T, D] behind the blocks, or [S, D] of the tokens at rows_S; None where the kernel does not compute this decoder.

    Args:
        layers: gets the states behind every block, those of the last as they are given back.
    """
    tiles = decoder.tiles
    if tiles is None:
        if not takes(decoder):
            return None
        tiles = Tiles(list(decoder.blocks.values()))
    if x_TD.dtype != torch.bfloat16:  # of a decoder that computes in another type since its tiles were made
        return None
    if shape.gather is not None or not len(x_TD) or (rows_S is not None and not len(rows_S)):
        return None
    in_place = [fused.accumulates(parameter) for parameter in tiles.parameters]
    given = (x_TD, tiles, angles, shape, rows_S, layers is not None, torch.is_grad_enabled(), in_place)
    *states, out_SD = _Blocks.apply(*given, *tiles.parameters)
    if layers is not None:
        layers += [*states, out_SD]
    return out_SD


class _Blocks(torch.autograd.Function):
    """Keeps what products and attention gave, and two numbers a row of each norm; norms and activations are made again."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        tiles: Tiles,
        angles: Mapping[str, Angles],
        shape: PackedShape,
        rows_S: Tensor | None,
        each: bool,
        keeps: bool,
        in_place: Sequence[bool],
        *parameters: Tensor,
    ) -> tuple[Tensor, ...]:
        library = kernels.load()
        assert library is not None
        x_TD, layers, calls = x_TD.contiguous(), tiles.table(), []
        states = [torch.empty_like(x_TD) for _ in tiles.blocks[1:]] if each else []
        for layer, state_TD in zip(layers, states, strict=False):
            layer.states = state_TD.data_ptr()
        for layer, block in zip(layers, tiles.blocks, strict=True):
            attention, config = block.attention, block.config
            if attention is None:
                continue
            heads = attention.num_heads, attention.num_kv_heads, attention.head_dim
            calls.append(attention_call(heads, angles[config.rope], shape=shape, mod=block.mod))
            layer.attention = ctypes.addressof(calls[-1])
        sizes = len(layers), len(x_TD), 0 if rows_S is None else len(rows_S), x_TD.shape[1]
        rows_S = None if rows_S is None else rows_S.contiguous()
        kind = next((kernels.ACTIVATIONS[block.mlp.activation_kind] for block in tiles.blocks if block.mlp is not None), 0)
        table = kernels.Blocks(ctypes.addressof(layers), kernels.pointer_of(rows_S), *sizes, kind, keeps, torch.get_num_threads())
        memory = torch.empty(library.gristmill_blocks_memory(table), dtype=torch.uint8)
        out = x_TD if rows_S is None else rows_S
        out_SD = x_TD.new_empty(len(out), x_TD.shape[1])
        library.gristmill_blocks_forward(table, x_TD.data_ptr(), out_SD.data_ptr(), memory.data_ptr())
        if keeps:
            ctx.save_for_backward(memory)
            ctx.table, ctx.tiles, ctx.in_place, ctx.num_tokens = table, tiles, in_place, len(x_TD)
            ctx.read = layers, calls, angles, shape, rows_S  # what the table points to
            ctx.shape_SD = out_SD.shape
            ctx.set_materialize_grads(False)  # most states have none
        return *states, out_SD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        library, parameters, (memory,) = kernels.load(), ctx.tiles.parameters, ctx.saved_tensors
        assert library is not None
        grad_SD = torch.zeros(ctx.shape_SD, dtype=torch.bfloat16) if grads[-1] is None else grads[-1].contiguous()
        of_states = [None if grad is None else grad.contiguous() for grad in grads[:-1]]
        for layer, grad_of_TD in zip(ctx.read[0], of_states, strict=False):
            layer.grad_states = kernels.pointer_of(grad_of_TD)
        needed = ctx.needs_input_grad[len(ctx.needs_input_grad) - len(parameters) :]
        due = [parameter for parameter, needs in zip(parameters, needed, strict=True) if needs]
        in_place = {parameter for parameter, here in zip(parameters, ctx.in_place, strict=True) if here}
        added = {parameter for parameter in in_place if parameter.grad is not None}
        for parameter in in_place - added:
            parameter.grad = fused.new_gradient(parameter)
        own = [parameter for parameter in due if parameter not in in_place]
        # in one call: each of torch's lets go of Python's lock, and another worker has it then
        parts = torch._utils._unflatten_dense_tensors(torch.empty(sum(parameter.numel() for parameter in own)), own)
        made = dict(zip(own, parts, strict=True))
        gradients = made | {parameter: parameter.grad for parameter in in_place}
        for block, layer in zip(ctx.tiles.blocks, ctx.read[0], strict=True):
            _set_gradients(block, layer, gradients, added)
        grad_TD = grad_SD.new_empty(ctx.num_tokens, grad_SD.shape[1])
        library.gristmill_blocks_backward(ctx.table, grad_SD.data_ptr(), grad_TD.data_ptr(), memory.data_ptr())
        return grad_TD, *(None,) * 7, *(made.get(parameter) for parameter in parameters)
