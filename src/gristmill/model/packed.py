"""Packed batches, the one layout of all models: where documents begin, what prefixes they share, how attention groups them.

Shapes: T tokens of all documents one after the other, N documents, X heads, d head_dim, C cells of all padded views together,
B documents of one view, L its length.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# A padded view closes when its next document would leave more than this share of its row empty.
MAX_EMPTY_SHARE = 0.25
# Documents of this many tokens or more keep the bf16 kernels on a CPU busy without others beside them.
LONG_DOCUMENT = 96

# A document of so many tokens shares only what is at least an eighth of it: attention to shared tokens has its own cost.
ALWAYS_SHARED_LENGTH, MIN_SHARED_DIVISOR = 1024, 8

Ids = Sequence[int] | np.ndarray


@dataclass(frozen=True, eq=False)
class Cells:
    """Padded grid of B rows of L cells, each with a token, and which of them are the row's own and which it shares with another row.

    The others are padding: they repeat a row's last token. Causal attention hides them from all real ones, and what they give is
    never read. span: where a single row's tokens lie if they are neighbours, which then need no copy.
    """

    tokens_BL: Tensor
    own_BL: Tensor
    shared_BL: Tensor
    span: slice | None = None

    @cached_property
    def _tokens_C(self) -> Tensor:
        return self.tokens_BL.flatten()

    @cached_property
    def _own(self) -> tuple[Tensor, Tensor]:
        """Own cells and their tokens."""
        own_R = self.own_BL.flatten().nonzero()[:, 0]
        return own_R, self._tokens_C[own_R]

    @cached_property
    def _shared(self) -> tuple[Tensor, Tensor]:
        """Shared cells and their tokens."""
        shared_S = self.shared_BL.flatten().nonzero()[:, 0]
        return shared_S, self._tokens_C[shared_S]

    def own_columns(self) -> "Cells":
        """Without the columns before any row's own cells; what is shared is padding now."""
        if not bool(self.shared_BL.any()):
            return self
        first = int(self.shared_BL.sum(1).min())
        return Cells(self.tokens_BL[:, first:], self.own_BL[:, first:], torch.zeros_like(self.shared_BL[:, first:]))

    def take(self, x_TXd: Tensor, *, own: bool = False) -> Tensor:
        """The cells [B, X, L, d] of tokens [T, X, d]; with ``own``, zero in all but a row's own."""
        if self.span is not None:
            part = x_TXd[self.span]
        elif own:
            part = x_TXd.new_zeros(self.tokens_BL.numel(), *x_TXd.shape[1:])
            cells_R, tokens_R = self._own
            part.index_copy_(0, cells_R, x_TXd.index_select(0, tokens_R))
        else:
            part = x_TXd.index_select(0, self._tokens_C)
        return part.unflatten(0, self.tokens_BL.shape).transpose(1, 2)

    def put(self, x_BXLd: Tensor, into_TXd: Tensor) -> None:
        """Write own cells to their tokens and add shared ones to what theirs hold already, in the type of the tokens."""
        part = x_BXLd.transpose(1, 2).flatten(0, 1)
        if self.span is not None:
            into_TXd[self.span] = part
            return
        cells_R, tokens_R = self._own
        into_TXd[tokens_R] = part[cells_R].to(into_TXd.dtype)
        cells_S, tokens_S = self._shared
        if len(cells_S):
            into_TXd.index_add_(0, tokens_S, part[cells_S].to(into_TXd.dtype))


@dataclass(frozen=True, eq=False)
class View:
    """Group of documents that go through attention together. Their queries are the last columns of their keys."""

    queries: Cells
    keys: Cells

    @property
    def num_earlier(self) -> int:
        """Keys before those of the queries."""
        return self.keys.tokens_BL.shape[1] - self.queries.tokens_BL.shape[1]


@dataclass(frozen=True, eq=False)
class PaddedPlan:
    """Gather and scatter indices between packed tokens and padded views of documents of similar length.

    token_C: the token of each cell. cell_T: the own cell of each token. shared_S: the shared cells. views: (B, L) of each.
    """

    token_C: Tensor
    cell_T: Tensor
    shared_S: Tensor
    views: list[tuple[int, int]]


@dataclass(frozen=True, eq=False)
class PackedShape:
    """Shape of a packed batch: where documents begin and end, and the prefixes they share.

    Answers to one prompt need not repeat it. A document whose first shared[n] tokens are also those of the last document before it
    that shares none lays out only the others; it sees the shared ones where they are. This changes no state, since a token sees
    nothing that comes after it.

    cu_seqlens: int32 [N + 1], starts of the documents' own tokens and, last, T. lengths: tokens of each document, the shared ones
    included. positions_T: int64, in the document. keys_S: the tokens of each document, the shared ones included, one document after
    another. gather: from keys and values of these tokens, those of all that keys_S counts, where other processes have them
    (`parallel.context`). What a backend derives from these is computed on first use and kept, so all layers use the same.
    """

    cu_seqlens: Tensor
    lengths: list[int]
    shared: list[int]
    positions_T: Tensor
    keys_S: Tensor
    gather: Callable[[Sequence[Tensor]], Sequence[Tensor]] | None = None

    @staticmethod
    def from_lengths(lengths: Sequence[int], device: torch.device | str = "cpu", *, shared: Sequence[int] = ()) -> "PackedShape":
        """The shape of documents with these lengths (each with a token of its own), in this order; by default nothing is shared."""
        assert not shared or (len(shared) == len(lengths) and shared[0] == 0), "the first document has no other to share with"
        # NumPy's operations on so few numbers take a third of torch's time, and do not hand Python's lock to another thread
        lengths_N, shared_N = np.array(lengths), np.array(shared or [0] * len(lengths))
        own_N = lengths_N - shared_N
        assert len(lengths) and own_N.min() > 0, "a packed batch holds documents of at least one token"
        holder_N = np.maximum.accumulate(np.where(shared_N == 0, np.arange(len(lengths)), 0))
        assert (shared_N <= lengths_N[holder_N]).all(), "a document cannot share more tokens than the other has"
        ends_N = own_N.cumsum()
        starts_N = ends_N - own_N
        positions_S = np.arange(lengths_N.sum()) - (lengths_N.cumsum() - lengths_N).repeat(lengths_N)
        is_shared_S = positions_S < shared_N.repeat(lengths_N)
        keys_S = positions_S + np.where(is_shared_S, starts_N[holder_N].repeat(lengths_N), (starts_N - shared_N).repeat(lengths_N))
        return PackedShape(
            torch.from_numpy(np.append(0, ends_N).astype(np.int32)).to(device),
            lengths_N.tolist(),
            shared_N.tolist(),
            torch.from_numpy(positions_S[~is_shared_S]).to(device),
            torch.from_numpy(keys_S).to(device),
        )

    @property
    def num_tokens(self) -> int:
        return self.positions_T.shape[0]

    @cached_property
    def max_length(self) -> int:
        return max(self.lengths, default=0)

    @cached_property
    def cu_keys(self) -> Tensor:
        """int32 [N + 1], where each document begins in keys_S, and last its size."""
        return F.pad(torch.tensor(self.lengths).cumsum(0), (1, 0)).to(self.cu_seqlens)

    @cached_property
    def documents(self) -> tuple[Tensor, Tensor]:
        """What the compiled kernels read, int32 on the CPU. [N, 4]: of each document its first own token, own tokens, shared tokens, and
        where those lie. [groups + 1]: where groups begin, each a document that shares nothing and those that share with it.
        """
        ends, shared_N = self.cu_seqlens.numpy(force=True), np.array(self.shared, dtype=np.int32)
        first_G = (shared_N == 0).nonzero()[0]
        group_N = (shared_N == 0).cumsum() - 1
        columns = ends[:-1], np.diff(ends), shared_N, ends[first_G[group_N]]
        return torch.from_numpy(np.stack(columns, 1)), torch.from_numpy(np.append(first_G, len(shared_N)).astype(np.int32))

    @cached_property
    def padded_plan(self) -> PaddedPlan:
        views = list(self._padded(range(len(self.lengths))))
        token_C, own_C, shared_C = (
            torch.cat([part.flatten() for part in parts])
            for parts in zip(*((view.tokens_BL, view.own_BL, view.shared_BL) for view in views), strict=True)
        )
        cell_R = own_C.nonzero()[:, 0]
        cell_T = torch.empty_like(cell_R).index_copy_(0, token_C[cell_R], cell_R)
        device = self.positions_T.device
        sizes = [(view.tokens_BL.shape[0], view.tokens_BL.shape[1]) for view in views]
        return PaddedPlan(token_C.to(device), cell_T.to(device), shared_C.nonzero()[:, 0].to(device), sizes)

    def _padded(self, documents: Iterable[int]) -> Iterator[Cells]:
        """Documents of similar length as rows."""
        starts_N, keys_S = self.cu_keys.cpu(), self.keys_S.cpu()
        ordered = sorted(documents, key=lambda number: self.lengths[number], reverse=True)
        while ordered:
            longest = self.lengths[ordered[0]]
            num_fit = sum(self.lengths[number] >= longest * (1 - MAX_EMPTY_SHARE) for number in ordered)
            rows, ordered = ordered[:num_fit], ordered[num_fit:]
            last_B1 = torch.tensor([[self.lengths[number] - 1] for number in rows])
            shared_B1 = torch.tensor([[self.shared[number]] for number in rows])
            position_L = torch.arange(longest)
            tokens_BL = keys_S[starts_N[rows][:, None] + torch.minimum(position_L, last_B1)]
            shared_BL = position_L < shared_B1
            yield Cells(tokens_BL, (position_L <= last_B1) & ~shared_BL, shared_BL)

    @cached_property
    def views(self) -> list[View]:
        """Long documents alone, the others in padded views. Those that share tokens come after those that hold them."""
        keys: list[Cells] = []
        starts = self.cu_seqlens.tolist()
        for is_sharing in (False, True):
            documents = [number for number, count in enumerate(self.shared) if bool(count) == is_sharing]
            for number in documents:
                if self.lengths[number] < LONG_DOCUMENT:
                    continue
                (cells,) = self._padded([number])
                span = slice(starts[number], starts[number + 1])
                keys.append(cells if is_sharing else replace(cells, span=span))
            keys.extend(self._padded(number for number in documents if self.lengths[number] < LONG_DOCUMENT))
        return [View(cells.own_columns(), cells) for cells in keys]


def filled_length(num_tokens: int) -> int:
    """``num_tokens`` rounded up to one of sixteen sizes an octave (by 3 % on average).

    In bf16 the CPU library generates code for every new shape of a matrix and keeps about 1 MB for each: a
    run of 100 batches of different lengths grew to 2.4 GiB; with rounded lengths it stays at 0.7.
    """
    step = max(1, 2 ** (num_tokens.bit_length() - 5))
    return -(-num_tokens // step) * step


def num_shared(documents: Sequence[Ids]) -> int:
    """Tokens that all documents begin with and that are worth sharing: 0 where they are few of a long document's.

    Every document keeps a token of its own.
    """
    first, *others = [np.asarray(ids) for ids in documents]
    count = min(len(ids) for ids in documents) - 1
    for ids in others:
        differs = np.flatnonzero(ids[:count] != first[:count])
        count = int(differs[0]) if len(differs) else count
    longest = max(len(ids) for ids in documents)
    return count if longest < ALWAYS_SHARED_LENGTH or count * MIN_SHARED_DIVISOR >= longest else 0


def pack(groups: Sequence[Sequence[Ids]], device: torch.device, *, fill: bool | int = True) -> tuple[Tensor, PackedShape, int]:
    """Pack documents end to end: ids [T], shape, and the number of real tokens.

    Documents of a group share what all of them begin with.

    Args:
        fill: documents of one token fill the batch up, see `filled_length`; or up to so many tokens.
    """
    ids, lengths, shared = [], [], []
    for documents in groups:
        common = num_shared(documents) if len(documents) > 1 else 0
        for number, document in enumerate(documents):
            count = common if number else 0
            ids.append(document[count:])
            lengths.append(len(document))
            shared.append(count)
    num_tokens = sum(lengths) - sum(shared)
    size = fill if type(fill) is int else filled_length(num_tokens) if fill else num_tokens
    num_fill = size - num_tokens
    ids_T = np.concatenate([*ids, np.zeros(num_fill, dtype=np.int32)]).astype(np.int64)
    shape = PackedShape.from_lengths(lengths + [1] * num_fill, device, shared=shared + [0] * num_fill)
    return torch.from_numpy(ids_T).to(device), shape, num_tokens
