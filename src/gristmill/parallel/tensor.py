"""Tensor and sequence parallelism (TP, SP): processes compute with parts of every matrix, and between them with their own tokens.

Parameters are stored as DTensors, so that optimizer, norms, FSDP2 and checkpoints know them; all computing is on local tensors.
Column-parallel layers have some rows of a weight, row-parallel ones some columns. Between them each process has the tokens of its stretch:
norms and residuals are cut by tokens. Gains of norms see these tokens alone, so that their gradients are added up.

Shapes: T tokens, P tokens of a process (T / tp, rounded up; what is too much is padding), S rows that the loss asks for, D hidden size, V
vocabulary. Sources: Megatron-LM (arXiv 1909.08053), sequence parallelism (2205.05198).
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gristmill.core.errors import InputError
from gristmill.model import weight_gradients
from gristmill.model.config import ModelConfig
from gristmill.model.layers import MLP, LayerNorm1P, Linear, Product, RMSNorm
from gristmill.model.lora import LoraLinear, is_adapted
from gristmill.model.transformer import Attention, Block, Transformer
from gristmill.parallel import layout
from gristmill.parallel.mesh import TensorGroup, local

# ---- what processes exchange ----


def _padded(x: Tensor, size: int) -> Tensor:
    """Rows and as many of zeros as make their number a multiple."""
    return F.pad(x, (0, 0) * (x.ndim - 1) + (0, -len(x) % size))


class _Gather(torch.autograd.Function):
    """All processes' rows; gradients, of which each process has a part, are added up."""

    @staticmethod
    def forward(ctx: Any, x_PD: Tensor, group: TensorGroup) -> Tensor:
        ctx.group = group
        return group.gather_rows(x_PD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.group.scatter(grads[0]), None


class _Scatter(torch.autograd.Function):
    """Own rows of the sum of what all processes have; with padding, if their number is no multiple."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, group: TensorGroup) -> Tensor:
        ctx.group, ctx.num_rows = group, len(x_TD)
        return group.scatter(_padded(x_TD, group.size))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.group.gather_rows(grads[0])[: ctx.num_rows], None


class _SumGrad(torch.autograd.Function):
    """The same tensor on all processes, that each uses for something else: gradients are added up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: TensorGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.group.sum(grads[0]), None


class _Whole(torch.autograd.Function):
    """All processes' rows, with which all compute the same: of the gradient, which all have whole, each keeps its own rows."""

    @staticmethod
    def forward(ctx: Any, x_PD: Tensor, num_rows: int, group: TensorGroup) -> Tensor:
        ctx.group = group
        return group.gather_rows(x_PD)[:num_rows]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        padded_TD = _padded(grads[0], ctx.group.size)
        return padded_TD.chunk(ctx.group.size)[ctx.group.rank], None, None


class _Columns(torch.autograd.Function):
    """Gathered rows times matrices, each with its `Product` or None and a bias or None behind it.

    Own rows are kept, and gathered again for the gradients of the matrices, which may wait.
    """

    @staticmethod
    def forward(
        ctx: Any, x_PD: Tensor, group: TensorGroup, products: list[Product | None], waiting: list[Tensor], *weights: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.group, ctx.products, ctx.waiting = group, products, waiting
        matrices = cast("tuple[Tensor, ...]", weights[::2])
        ctx.save_for_backward(x_PD, *matrices)
        x_TD, out = group.gather_rows(x_PD), []
        for matrix, bias, product in zip(matrices, weights[1::2], products, strict=True):
            if product is None:
                out.append(F.linear(x_TD, matrix, bias))
            else:
                out_TN = product.outputs(x_TD, matrix)
                out.append(out_TN if bias is None else out_TN + bias)
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_PD, *matrices = ctx.saved_tensors
        parts = [
            grad_TN @ matrix if product is None else product.input_gradient(grad_TN, matrix)
            for grad_TN, matrix, product in zip(grads, matrices, ctx.products, strict=True)
        ]
        grad_x_PD, group, x_PD = ctx.group.scatter(sum(parts[1:], parts[0])), ctx.group, x_PD.detach()

        def gradients() -> list[Tensor]:
            x_TD = group.gather_rows(x_PD)
            return [grad_TN.T @ x_TD for grad_TN in grads]

        found: list[Tensor | None] = [None] * (2 * len(grads))
        if ctx.waiting:
            weight_gradients.later(ctx.waiting, gradients)
        elif any(ctx.needs_input_grad[4::2]):  # else they are frozen
            found[::2] = gradients()
        found[1::2] = [grad_TN.sum(0) if needed else None for grad_TN, needed in zip(grads, ctx.needs_input_grad[5::2], strict=True)]
        return grad_x_PD, None, None, None, *found


class _OwnRows(torch.autograd.Function):
    """Some rows of a matrix that all processes have; gradients are added up."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, rows: Tensor, group: TensorGroup) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.group, ctx.shape = group, weight.shape
        return weight[rows]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (rows,) = ctx.saved_tensors
        return ctx.group.sum(grads[0].new_zeros(ctx.shape).index_copy_(0, rows, grads[0])), None, None


# ---- layers ----


class _Shared:
    """A parameter of which every process has all, and of whose gradient a part."""

    def __init__(self, group: TensorGroup) -> None:
        self.group = group

    def __call__(self, parameter: Tensor) -> Tensor:
        return _SumGrad.apply(local(parameter), self.group)


class ColumnLinear(Linear):
    """Column-parallel linear layer: own tokens in, some outputs of all tokens (and of padding) out.

    Args:
        rows: of the weight, where they are no stretch of it: then all processes keep all of them.
    """

    def __init__(self, linear: Linear, group: TensorGroup, rows: Tensor | None = None) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.group, self.rows = group, rows
        dim = 0 if rows is None else None
        self.weight = group.cut(linear.weight, dim)
        if linear.bias is not None:
            self.bias = group.cut(linear.bias, dim)

    def _own(self, parameter: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        if parameter is None:
            return None
        own = local(parameter)
        return (own if self.rows is None else _OwnRows.apply(own, self.rows, self.group)).to(dtype)

    def forward(self, input: Tensor) -> Tensor:
        (out,) = self._products(input, [self])
        return out

    def beside(self, input: Tensor, other: Linear) -> tuple[Tensor, Tensor]:
        if not isinstance(other, ColumnLinear):
            return super().beside(input, other)
        one, two = self._products(input, [self, other])
        return one, two

    def sides(self) -> tuple[int, int]:
        return self.out_features // self.group.size if self.rows is None else len(self.rows), self.in_features

    def _products(self, x_PD: Tensor, layers: "list[ColumnLinear]") -> tuple[Tensor, ...]:
        matrices = [cast(Tensor, one._own(one.weight, x_PD.dtype)) for one in layers]
        biases = [one._own(one.bias, x_PD.dtype) for one in layers]
        products = [one.product if x_PD.dtype == torch.bfloat16 else None for one in layers]
        waiting = matrices if weight_gradients.defers(x_PD, matrices[0]) else []
        used = [matrix.detach() for matrix in matrices] if waiting else matrices
        weights = [weight for pair in zip(used, biases, strict=True) for weight in pair]
        return cast("tuple[Tensor, ...]", _Columns.apply(x_PD, self.group, products, waiting, *weights))


class RowLinear(Linear):
    """Row-parallel linear layer: some inputs of all tokens in, own tokens out."""

    def __init__(self, linear: Linear, group: TensorGroup) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.group = group
        self.weight = group.cut(linear.weight, 1)
        if linear.bias is not None:
            self.bias = group.cut(linear.bias, None)

    def sides(self) -> tuple[int, int]:
        return self.out_features, self.in_features // self.group.size

    def forward(self, input: Tensor) -> Tensor:
        weight = local(self.weight).to(input.dtype)
        multiply: Any = weight_gradients.linear if weight_gradients.defers(input, weight) else F.linear
        if self.product is not None and input.dtype == torch.bfloat16:
            multiply = self.product
        out_PD: Tensor = _Scatter.apply(multiply(input, weight, None), self.group)
        return out_PD if self.bias is None else out_PD + _SumGrad.apply(local(self.bias), self.group).to(input.dtype)


class WholeLinear(Linear):
    """A linear layer that every process has and computes whole, all alike."""

    def __init__(self, linear: Linear, group: TensorGroup) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight = group.cut(linear.weight, None)
        if linear.bias is not None:
            self.bias = group.cut(linear.bias, None)

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else local(self.bias).to(input.dtype)
        return F.linear(input, local(self.weight).to(input.dtype), bias)


class ColumnLora(LoraLinear):
    """Column-parallel frozen linear layer and the adapter of all of it: own tokens in, some outputs of all tokens out.

    A is multiplied by own tokens, so that low-rank products are gathered, not states. All processes have A and B whole; the gradient
    of each is what its own tokens and outputs give.

    Args:
        rows: as of `ColumnLinear`.
    """

    def __init__(self, layer: LoraLinear, group: TensorGroup, rows: Tensor | None = None) -> None:
        super().__init__(layer, layer.spans, layer.order_N)
        self.parts, self.scale_N, self.group, self.is_cut = layer.parts, layer.scale_N, group, rows is None
        size = layer.out_features // group.size
        self.rows = torch.arange(size, device=layer.weight.device) + group.rank * size if rows is None else rows
        self.weight = group.cut(layer.weight, 0 if self.is_cut else None)
        if layer.bias is not None:
            self.bias = group.cut(layer.bias, 0 if self.is_cut else None)

    def _here(self, parameter: Tensor) -> Tensor:
        own = local(parameter)
        return own if self.is_cut else own[self.rows]

    def here(self) -> tuple[Tensor, Tensor | None]:
        return self._here(self.weight), None if self.scale_N is None else self.scale_N[self.rows]

    def own_bias(self, dtype: torch.dtype) -> Tensor | None:
        return None if self.bias is None else self._here(self.bias).to(dtype)

    def own_rows(self, x_N: Tensor) -> Tensor:
        return x_N[self.rows]

    def frozen(self, input: Tensor, bias_N: Tensor | None) -> Tensor:
        return super().frozen(_Gather.apply(input, self.group), bias_N)

    def low(self, input: Tensor, a_RD: Tensor) -> Tensor:
        return cast(Tensor, _Gather.apply(super().low(input, a_RD), self.group))

    def beside(self, input: Tensor, other: Linear) -> tuple[Tensor, Tensor]:
        if not isinstance(other, ColumnLora):
            return super().beside(input, other)
        x_TD = _Gather.apply(input, self.group)
        one, two = (LoraLinear.frozen(layer, x_TD, layer.own_bias(x_TD.dtype)) for layer in (self, other))
        return self.updated(input, one), other.updated(input, two)


class RowLora(LoraLinear):
    """Row-parallel frozen linear layer and the adapter of all of it: some inputs of all tokens in, own tokens out.

    What processes add up are the frozen matrix's outputs and low-rank products.
    """

    def __init__(self, layer: LoraLinear, group: TensorGroup) -> None:
        super().__init__(layer, layer.spans, layer.order_N)
        self.parts, self.scale_N, self.group = layer.parts, layer.scale_N, group
        size = layer.in_features // group.size
        self.columns = slice(group.rank * size, (group.rank + 1) * size)
        self.weight = group.cut(layer.weight, 1)
        if layer.bias is not None:
            self.bias = group.cut(layer.bias, None)

    def here(self) -> tuple[Tensor, Tensor | None]:
        return local(self.weight), self.scale_N

    def own_bias(self, dtype: torch.dtype) -> Tensor | None:
        return None if self.bias is None else local(self.bias).to(dtype)

    def own_columns(self, a_RD: Tensor) -> Tensor:
        return a_RD[:, self.columns]

    def frozen(self, input: Tensor, bias_N: Tensor | None) -> Tensor:
        out_PN: Tensor = _Scatter.apply(super().frozen(input, None), self.group)
        return out_PN if bias_N is None else out_PN + bias_N

    def low(self, input: Tensor, a_RD: Tensor) -> Tensor:
        return cast(Tensor, _Scatter.apply(super().low(input, self.own_columns(a_RD)), self.group))

    def lengths(self, updated_ND: Tensor) -> Tensor:
        return self.group.sum(super().lengths(updated_ND).square()).sqrt()


@dataclass(frozen=True)
class VocabularyShard:
    """Rows of an output matrix that this process has.

    Attributes:
        weight_VD: the rows, without padding.
        begin: number of the first.
        num_rows: that each process has room for.
    """

    weight_VD: Tensor
    begin: int
    num_rows: int
    group: TensorGroup

    def combined(self, statistics_C2: Tensor, own_C1: Tensor) -> tuple[Tensor, Tensor]:
        """Softmax of rows whose logits are cut over the processes: one exchange for each chunk.

        Args:
            statistics_C2: of own logits, the largest and the logarithm of the sum of exp(logit - largest).
            own_C1: logits of the targets that are among the own rows; 0 of others.

        Returns:
            The statistics over all logits, and the logits of all targets [C], both the same on all processes.
        """
        parts_GC3 = self.group.gather_rows(torch.cat([statistics_C2, own_C1], 1)).unflatten(0, (self.group.size, -1))
        largest_C = parts_GC3[..., 0].amax(0)
        sums_C = (parts_GC3[..., 0] - largest_C + parts_GC3[..., 1]).exp().sum(0)
        return torch.stack([largest_C, sums_C.log()], 1), parts_GC3[..., 2].sum(0)

    def targets(self, targets_R: Tensor) -> Tensor:
        """Numbers of targets among the own rows; -1 of others."""
        own_R = targets_R - self.begin
        return own_R.masked_fill((own_R < 0) | (own_R >= len(self.weight_VD)), -1)


class TensorParallel:
    """What a decoder does between its cut matrices."""

    def __init__(self, group: TensorGroup, vocab_size: int) -> None:
        self.group, self.vocab_size = group, vocab_size

    def vocabulary(self, weight_VD: Tensor) -> VocabularyShard:
        """The output matrix's rows of this process."""
        own_VD = local(weight_VD)
        begin = self.group.rank * len(own_VD)
        num_rows, real = len(own_VD), self.vocab_size - begin
        return VocabularyShard(own_VD if real >= num_rows else own_VD[:real], begin, num_rows, self.group)

    def embed(self, ids_T: Tensor, weight_VD: Tensor, dtype: torch.dtype) -> Tensor:
        """Embeddings [P, D] of own tokens, from those that are among the own rows of all processes."""
        shard = self.vocabulary(weight_VD)
        own_T = shard.targets(ids_T)
        rows_TD = F.embedding(own_T.clamp(min=0), shard.weight_VD).masked_fill((own_T < 0)[:, None], 0.0)
        return cast(Tensor, _Scatter.apply(rows_TD.to(dtype), self.group))

    def rows(self, x_PD: Tensor, rows_S: Tensor) -> Tensor:
        """This process's share of some rows of all."""
        padded_S = _padded(rows_S, self.group.size)
        return cast(Tensor, _Gather.apply(x_PD, self.group)[padded_S.chunk(self.group.size)[self.group.rank]])

    def whole(self, x_PD: Tensor, num_rows: int) -> Tensor:
        """All rows, without padding, for what all processes compute alike."""
        return cast(Tensor, _Whole.apply(x_PD, num_rows, self.group))


# ---- a model ----


def check_tensor_parallel(config: ModelConfig, tp: int, base: str = "") -> None:
    """Raise InputError where a model cannot be cut over so many processes; `base`: type of what is frozen beside an adapter."""
    if tp == 1:
        return
    if base == "nf4":
        raise InputError("Choose int8 as LoRA's base, or leave --tp out: a matrix in nf4 cannot be cut.")
    layout.check_tensor_parallel(config, tp)
    if config.parts.qk_norm == "projection":
        raise InputError("Leave --tp out: this model norms queries and keys over all heads, which lie on several processes.")
    if (tp - 1) * -(-config.vocab_size // tp) >= config.vocab_size:
        raise InputError(f"Choose a smaller --tp than {tp}: a vocabulary of {config.vocab_size} leaves a process without any of it.")


def shard_tensors(model: nn.Module, group: TensorGroup) -> None:
    """Cut a decoder, or a model with one as its backbone and a head, over the processes of a group, in place.

    Raises:
        InputError: it cannot be cut so (`check_tensor_parallel`).
    """
    decoder = cast(Transformer, getattr(model, "backbone", model))
    is_packed = any(isinstance(module, LoraLinear) and module.is_packed for module in decoder.modules())
    check_tensor_parallel(decoder.config, group.size, "nf4" if is_packed else "")
    decoder.sharding = TensorParallel(group, decoder.config.vocab_size)
    for block in decoder.blocks.values():
        assert isinstance(block, Block)
        block.sharding = decoder.sharding
        if block.attention is not None:
            _shard_attention(block.attention, group)
        if block.mlp is not None:
            _shard_mlp(block.mlp, group)
    for norm in decoder.modules():
        if isinstance(norm, LayerNorm1P | RMSNorm):
            norm.local = _Shared(group)
            for name, parameter in list(norm.named_parameters()):
                setattr(norm, name, group.cut(parameter, None))
    if decoder.embedding is not None:  # a later stage of a pipeline has none
        decoder.embedding = _vocabulary(decoder.embedding, group)
    if decoder.lm_head is not None:
        decoder.lm_head.weight = _vocabulary(decoder.lm_head.weight, group)
    if model is not decoder and not is_adapted(model):  # beside an adapter nothing that is trained is cut
        headed = cast(Any, model)
        headed.head = None if headed.head is None else WholeLinear(headed.head, group)


def _vocabulary(weight_VD: Tensor, group: TensorGroup) -> nn.Parameter:
    """A matrix with a row a token, padded so that all processes have as many."""
    return group.cut(_padded(weight_VD.detach(), group.size).requires_grad_(weight_VD.requires_grad), 0)


def _columns(linear: Linear, group: TensorGroup, rows: Tensor | None = None) -> Linear:
    return ColumnLora(linear, group, rows) if isinstance(linear, LoraLinear) else ColumnLinear(linear, group, rows)


def _rows(linear: Linear, group: TensorGroup) -> Linear:
    return RowLora(linear, group) if isinstance(linear, LoraLinear) else RowLinear(linear, group)


def _shard_attention(attention: Attention, group: TensorGroup) -> None:
    num_heads, num_kv_heads, size = attention.num_heads // group.size, attention.num_kv_heads, attention.head_dim
    rows: Tensor | None = None
    if num_kv_heads < group.size:  # several processes have one key-value head, each with others of its queries
        sharing = group.size // num_kv_heads
        first = group.rank // sharing * (attention.qkv.out_features // num_kv_heads)
        query = first + group.rank % sharing * num_heads * size
        key = first + sharing * num_heads * size
        rows = torch.cat([torch.arange(query, query + num_heads * size), torch.arange(key, key + 2 * size)])
        rows = rows.to(attention.qkv.weight.device)
    attention.qkv = _columns(attention.qkv, group, rows)
    attention.output = _rows(attention.output, group)
    attention.num_heads, attention.num_kv_heads = num_heads, max(1, num_kv_heads // group.size)


def _shard_mlp(mlp: MLP, group: TensorGroup) -> None:
    if mlp.gate_up is not None:  # rows of the gate, and those of up behind them
        halves = torch.arange(mlp.gate_up.out_features, device=mlp.gate_up.weight.device).view(2, group.size, -1)
        mlp.gate_up = _columns(mlp.gate_up, group, halves[:, group.rank].flatten())
    mlp.gate = None if mlp.gate is None else _columns(mlp.gate, group)
    mlp.up = None if mlp.up is None else _columns(mlp.up, group)
    mlp.down = _rows(mlp.down, group)
    mlp.in_place = False
