"""Context parallelism: which process has which tokens, and what each sees of documents."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from gristmill.model.attention import varlen_attention
from gristmill.model.packed import PackedShape
from gristmill.parallel.context import owners, pieces_of

SHAPES = [
    PackedShape.from_lengths([1]),
    PackedShape.from_lengths(list(range(1, 18))),  # 1 to 2 cp + 1 tokens of all cp, and pieces without any
    PackedShape.from_lengths([40, 33, 35, 7, 12], shared=[0, 30, 30, 0, 5]),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [2, 3, 8])
def test_pieces_are_all_tokens_once_and_see_what_their_documents_saw(shape: PackedShape, size: int) -> None:
    pieces = [pieces_of(shape, rank, size) for rank in range(size)]
    assert torch.cat([piece.own_P for piece in pieces]).sort().values.tolist() == list(range(shape.num_tokens))
    torch.manual_seed(0)
    q, k, v = torch.randn(shape.num_tokens, 4, 8), torch.randn(shape.num_tokens, 2, 8), torch.randn(shape.num_tokens, 2, 8)
    whole = varlen_attention(q, k, v, shape)
    for rank, piece in enumerate(pieces):
        assert torch.equal(piece.shape.positions_T, shape.positions_T[piece.own_P]) and len(piece.own_P) <= piece.share.longest
        assert torch.equal(piece.share.own(rank), piece.own_P)
        own = replace(piece.shape, gather=lambda x: x)
        torch.testing.assert_close(varlen_attention(q[piece.own_P], k, v, own), whole[piece.own_P], rtol=1e-5, atol=1e-6)


def test_all_see_about_as_many_keys() -> None:
    shape = PackedShape.from_lengths([400, 800, 300])
    seen = np.bincount(owners(shape, 4), weights=shape.positions_T + 1)
    assert seen.max() / seen.min() < 1.01
    short = np.bincount(owners(PackedShape.from_lengths([1] * 40), 4))
    assert short.tolist() == [10] * 4  # documents of one token do not all fall to one process
