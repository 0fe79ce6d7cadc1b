"""Context parallelism (CP): processes compute other tokens of the same documents, and gather the keys and values of all.

Every document is cut into 2 cp pieces, of which each process has one from the head and one from the tail, so that all see about as many
keys. Pieces may be unequal or empty. Positions, shared prompts and what a token sees are those of the whole document.

Shapes: T tokens of a micro-batch, P own tokens, K key-value heads, d head_dim, D hidden size, S rows that the loss asks for, R rows of it.
Source: Llama 3 (arXiv 2407.21783, section 3.3.2).
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gristmill.model.layers import Linear
from gristmill.model.packed import PackedShape
from gristmill.model.transformer import Transformer
from gristmill.parallel.mesh import TensorGroup, local

# ---- who has which tokens ----


@dataclass(frozen=True, eq=False)
class Share:
    """Which process has which of some rows, and where among its own.

    Attributes:
        owner_S, place_S: the process of each row, and its place there.
        longest: rows of the process that has most.
    """

    owner_S: Tensor
    place_S: Tensor
    longest: int

    @staticmethod
    def of(owner_S: Tensor, size: int) -> "Share":
        counts_SG = F.one_hot(owner_S, size).cumsum(0)
        return Share(owner_S, counts_SG.gather(1, owner_S[:, None])[:, 0] - 1, int(counts_SG[-1].max()))

    @property
    def order_S(self) -> Tensor:
        """Place of each row among those of all processes end to end, each padded to the longest."""
        return self.owner_S * self.longest + self.place_S

    def own(self, rank: int) -> Tensor:
        """Numbers of a process's rows."""
        return (self.owner_S == rank).nonzero()[:, 0]


@dataclass(frozen=True, eq=False)
class Pieces:
    """One process's pieces of a packed batch.

    Attributes:
        own_P: numbers of its tokens.
        shape: of its tokens, whose keys are those of all processes.
    """

    own_P: Tensor
    shape: PackedShape
    share: Share

    def rows(self, rows_S: Tensor, rank: int, size: int) -> tuple[Tensor, Share]:
        """Which of some tokens this process has, by their places here, padded to the longest; and who has the others."""
        share = Share.of(self.share.owner_S[rows_S], size)
        own = self.share.place_S[rows_S[share.own(rank)]]
        return F.pad(own, (0, share.longest - len(own))), share


def owners(shape: PackedShape, size: int) -> Tensor:
    """The process [T] of each token: of 2 cp pieces of a document the i-th and the i-th but last."""
    own_N = np.diff(shape.cu_seqlens.cpu().numpy())
    place_T = np.arange(shape.num_tokens) - np.repeat(shape.cu_seqlens[:-1].cpu().numpy(), own_N)
    piece_T = (2 * size * (place_T + 1) - 1) // np.repeat(own_N, own_N)
    owner_T = np.minimum(piece_T, 2 * size - 1 - piece_T)
    turn_T = np.repeat(np.arange(len(own_N)), own_N)  # short documents do not all fall to one process
    return torch.from_numpy((owner_T + turn_T) % size)


def pieces_of(shape: PackedShape, rank: int, size: int) -> Pieces:
    """A process's pieces of a packed batch. Neighbouring tokens of one document are one piece."""
    owner_T, device = owners(shape, size), shape.positions_T.device
    own_P = (owner_T == rank).nonzero()[:, 0]
    document_P = torch.repeat_interleave(torch.arange(len(shape.lengths)), shape.cu_seqlens.diff().cpu().long())[own_P]
    position_P = shape.positions_T.cpu()[own_P]
    begins_P = torch.ones(len(own_P), dtype=torch.bool)
    begins_P[1:] = (own_P.diff() != 1) | (document_P.diff() != 0)
    first_M = begins_P.nonzero()[:, 0]
    sizes_M = torch.cat([first_M[1:], torch.tensor([len(own_P)])]) - first_M
    document_M, begin_M = document_P[first_M], position_P[first_M]
    ends_M = begin_M + sizes_M
    starts_N, keys_S = shape.cu_keys.cpu().long(), shape.keys_S.cpu()
    within_S = torch.arange(int(ends_M.sum())) - torch.repeat_interleave(ends_M.cumsum(0) - ends_M, ends_M)
    keys_S = keys_S[torch.repeat_interleave(starts_N[document_M], ends_M) + within_S]
    local_shape = PackedShape(
        F.pad(sizes_M.cumsum(0), (1, 0)).to(device, torch.int32),
        ends_M.tolist(),
        begin_M.tolist(),
        position_P.to(device),
        keys_S.to(device),
    )
    share = Share.of(owner_T, size)
    return Pieces(own_P.to(device), local_shape, Share(share.owner_S.to(device), share.place_S.to(device), share.longest))


# ---- what processes exchange ----


class _GatherTokens(torch.autograd.Function):
    """Rows of all processes in their order; gradients, of which each process has a part, are added up."""

    @staticmethod
    def forward(ctx: Any, x_PX: Tensor, share: Share, group: TensorGroup) -> Tensor:
        ctx.group, ctx.share, ctx.num_own = group, share, len(x_PX)
        return _all_rows(x_PX, share, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad_TX,) = grads
        parts = grad_TX.new_zeros(ctx.group.size * ctx.share.longest, *grad_TX.shape[1:])
        return ctx.group.scatter(parts.index_copy_(0, ctx.share.order_S, grad_TX))[: ctx.num_own], None, None


def _all_rows(x_PX: Tensor, share: Share, group: TensorGroup) -> Tensor:
    padded = F.pad(x_PX, (0, 0) * (x_PX.ndim - 1) + (0, share.longest - len(x_PX)))
    return group.gather_rows(padded).index_select(0, share.order_S)


class _WholeRows(torch.autograd.Function):
    """Rows of all processes, with which all compute the same: of the gradient, which all have whole, each keeps its own rows."""

    @staticmethod
    def forward(ctx: Any, x_PD: Tensor, share: Share, group: TensorGroup) -> Tensor:
        ctx.own, ctx.num_rows = share.own(group.rank), len(x_PD)
        return _all_rows(x_PD, share, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        own = grads[0].index_select(0, ctx.own)
        return F.pad(own, (0, 0, 0, ctx.num_rows - len(own))), None, None


class _OwnRows(torch.autograd.Function):
    """This process's share of rows that all have; all get the gradient of all rows."""

    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, rows: slice, group: TensorGroup) -> Tensor:
        ctx.rows, ctx.group, ctx.num_rows = rows, group, len(x_RD)
        return x_RD[rows].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        size = -(-ctx.num_rows // ctx.group.size)
        padded = F.pad(grads[0], (0, 0, 0, size - len(grads[0])))
        return ctx.group.gather_rows(padded)[: ctx.num_rows], None, None


class _Sum(torch.autograd.Function):
    """Sum over the processes, with which all compute the same."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: TensorGroup) -> Tensor:
        return group.sum(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Part(torch.autograd.Function):
    """A parameter with which all processes compute the same, and whose gradients are added up over them: each gives a part."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, size: int) -> Tensor:
        ctx.size = size
        return parameter.view_as(parameter)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] / ctx.size, None


# ---- a model ----


class CommonLinear(Linear):
    """A linear layer that all processes of a context-parallel group compute alike."""

    def __init__(self, linear: Linear, size: int) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.size, self.weight, self.bias = size, linear.weight, linear.bias

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else cast(Tensor, _Part.apply(local(self.bias), self.size)).to(input.dtype)
        return F.linear(input, cast(Tensor, _Part.apply(local(self.weight), self.size)).to(input.dtype), bias)


@dataclass(frozen=True)
class LossRows:
    """Output matrix of losses whose rows are shared out over a context-parallel group.

    Attributes:
        weight: the matrix, or this process's shard of the vocabulary (`parallel.tensor`).
    """

    weight: Any
    group: TensorGroup

    def own(self, hidden_RD: Tensor, targets_R: Tensor) -> tuple[Tensor, Tensor]:
        """This process's rows and targets."""
        size = -(-len(targets_R) // self.group.size)
        rows = slice(min(len(targets_R), self.group.rank * size), min(len(targets_R), (self.group.rank + 1) * size))
        return cast(Tensor, _OwnRows.apply(hidden_RD, rows, self.group)), targets_R[rows]

    def sum(self, total: Tensor) -> Tensor:
        """Sum of all processes' losses."""
        return cast(Tensor, _Sum.apply(total, self.group))

    def whole(self, own_R: Tensor, num_rows: int) -> Tensor:
        """Values [R] of all processes' rows."""
        size = -(-num_rows // self.group.size)
        owner_R = torch.arange(num_rows, device=own_R.device) // max(1, size)
        share = Share(owner_R, torch.arange(num_rows, device=own_R.device) - owner_R * size, size)
        return cast(Tensor, _WholeRows.apply(own_R[:, None], share, self.group))[:, 0]


class ContextParallel:
    """What a decoder does whose tokens are shared out over processes."""

    def __init__(self, group: TensorGroup) -> None:
        self.group = group
        self._pieces: weakref.WeakKeyDictionary[PackedShape, Pieces] = weakref.WeakKeyDictionary()

    def pieces(self, shape: PackedShape) -> Pieces:
        """This process's pieces of a batch, made once."""
        if (found := self._pieces.get(shape)) is None:
            found = pieces_of(shape, self.group.rank, self.group.size)
            found = replace(found, shape=replace(found.shape, gather=partial(self._gather, found.share)))
            self._pieces[shape] = found
        return found

    def _gather(self, share: Share, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Of keys and values of own tokens, those of all."""
        gathered = cast(Tensor, _GatherTokens.apply(torch.cat(list(tensors), 1), share, self.group))
        return gathered.split([x.shape[1] for x in tensors], 1)

    def tokens(self, ids_T: Tensor, shape: PackedShape, rows_S: Tensor | None) -> tuple[Tensor, PackedShape, Tensor | None]:
        """Own tokens, their shape, and which of them are among some rows."""
        pieces = self.pieces(shape)
        rows = None if rows_S is None else pieces.rows(rows_S, self.group.rank, self.group.size)[0]
        return ids_T[pieces.own_P], pieces.shape, rows

    def whole(self, h_PD: Tensor, shape: PackedShape, rows_S: Tensor | None) -> Tensor:
        """States of all tokens, or of some rows, for what all processes compute alike."""
        pieces = self.pieces(shape)
        share = pieces.share if rows_S is None else pieces.rows(rows_S, self.group.rank, self.group.size)[1]
        return cast(Tensor, _WholeRows.apply(h_PD, share, self.group))

    def vocabulary(self, weight: Any) -> LossRows:
        """The output matrix as the losses take it."""
        return LossRows(weight, self.group)


def shard_context(model: nn.Module, group: TensorGroup) -> None:
    """Let a decoder, or a model with one as its backbone and a head, compute own tokens of documents alone, in place."""
    decoder = cast(Transformer, getattr(model, "backbone", model))
    decoder.context = ContextParallel(group)
    if model is not decoder and (head := cast(Any, model).head) is not None:
        cast(Any, model).head = CommonLinear(head, group.size)
