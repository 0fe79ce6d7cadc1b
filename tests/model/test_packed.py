"""Where documents lie in a packed batch."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from gristmill.model.packed import ALWAYS_SHARED_LENGTH, MAX_EMPTY_SHARE, PackedShape, num_shared, pack

lengths_strategy = st.lists(st.integers(1, 40), min_size=1, max_size=12)


@given(lengths_strategy)
def test_the_plan_holds_every_token_once_and_wastes_little(lengths: list[int]) -> None:
    shape = PackedShape.from_lengths(lengths)
    plan = shape.padded_plan
    assert torch.equal(plan.token_C[plan.cell_T], torch.arange(sum(lengths)))
    assert len(plan.cell_T.unique()) == sum(lengths)
    assert sum(rows * padded for rows, padded in plan.views) == len(plan.token_C)
    assert len(plan.token_C) * (1 - MAX_EMPTY_SHARE) <= sum(lengths)


def test_shape_of_three_documents() -> None:
    shape = PackedShape.from_lengths([2, 1, 3])
    assert shape.cu_seqlens.tolist() == [0, 2, 3, 6] and shape.cu_seqlens.dtype == torch.int32
    assert shape.positions_T.tolist() == [0, 1, 0, 0, 1, 2]
    assert (shape.num_tokens, shape.max_length, shape.lengths) == (6, 3, [2, 1, 3])


def test_shape_of_answers_that_share_a_prompt() -> None:
    # 0 1 2 3, then two answers that share two and one of its tokens, then a document of its own, shared by one more
    shape = PackedShape.from_lengths([4, 4, 2, 3, 4], shared=[0, 2, 1, 0, 3])
    assert shape.cu_seqlens.tolist() == [0, 4, 6, 7, 10, 11] and shape.num_tokens == 11
    assert shape.positions_T.tolist() == [0, 1, 2, 3, 2, 3, 1, 0, 1, 2, 3]
    keys = [part.tolist() for part in shape.keys_S.split(shape.lengths)]
    assert keys == [[0, 1, 2, 3], [0, 1, 4, 5], [0, 6], [7, 8, 9], [7, 8, 9, 10]]
    assert shape.cu_keys.tolist() == [0, 4, 8, 10, 13, 17] and shape.cu_keys.dtype == torch.int32


@given(st.lists(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=6), min_size=1, max_size=4), min_size=1, max_size=4))
def test_packed_groups_hold_every_document(groups: list[list[list[int]]]) -> None:
    ids_T, shape, num_tokens = pack(groups, torch.device("cpu"))
    documents = [document for group in groups for document in group]
    found = ids_T[shape.keys_S].split(shape.lengths)
    assert [part.tolist() for part in found[: len(documents)]] == documents
    assert num_tokens == sum(map(len, documents)) - sum((len(group) - 1) * num_shared(group) for group in groups if len(group) > 1)


def test_num_shared_leaves_every_document_a_token() -> None:
    assert num_shared([[1, 2, 3], [1, 2, 4, 5], [1, 2, 3, 6]]) == 2
    assert num_shared([[1, 2], [1, 2, 3]]) == 1 and num_shared([[1, 2], [1, 2]]) == 1
    # a few tokens of long documents are not worth it
    long = list(range(ALWAYS_SHARED_LENGTH))
    assert num_shared([[7, *long], [7, *long[::-1]]]) == 0 and num_shared([[*long, 1], [*long, 2]]) == ALWAYS_SHARED_LENGTH
    assert num_shared([[1], [1, 2]]) == 0 == num_shared([[1, 2], [3, 2]])
