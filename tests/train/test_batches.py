"""Packing: no target crosses a document, and nothing is lost."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gristmill.core.errors import InputError
from gristmill.model.packed import filled_length
from gristmill.train.batches import (
    MAX_ANSWERS,
    PairSample,
    RatedGroup,
    RatedSample,
    Sample,
    collate_pairs,
    collate_rated,
    collate_tokens,
    fingerprint_samples,
    group_answers,
    split_micro_batches,
)
from gristmill.train.objectives.next_token import token_samples

CPU = torch.device("cpu")

documents = st.lists(st.lists(st.tuples(st.integers(0, 99), st.booleans()), min_size=1, max_size=9), min_size=1, max_size=6)


def as_sample(tokens: list[tuple[int, bool]], name: str = "") -> Sample:
    return Sample([token for token, _ in tokens], [trained for _, trained in tokens], name)


@given(documents)
def test_packed_input_target_pairs_are_the_separate_ones(docs: list[list[tuple[int, bool]]]) -> None:
    batch = collate_tokens([as_sample(doc) for doc in docs], CPU)
    expected = [
        (position, doc[position][0], doc[position + 1][0]) for doc in docs for position in range(len(doc) - 1) if doc[position + 1][1]
    ]
    positions = batch.shape.positions_T[batch.rows_R].tolist()
    found = list(zip(positions, batch.ids_T[batch.rows_R].tolist(), batch.targets_R.tolist(), strict=True))
    assert found == expected
    assert batch.count == len(expected) == sum(as_sample(doc).num_targets for doc in docs)
    assert batch.ids_T.tolist()[: batch.num_tokens] == [token for doc in docs for token, _ in doc]


@pytest.mark.parametrize("capacity", [8])
def test_documents_of_every_length_keep_their_tokens(capacity: int) -> None:
    texts = ["a" * (length - 1) for length in (capacity - 1, capacity, capacity + 1, 2 * capacity + 1, 2)]
    samples = token_samples(([*map(ord, text), 0] for text in texts), capacity)
    tokens = Counter(int(token) for sample in samples for token in sample.ids)
    assert tokens == Counter({ord("a"): sum(map(len, texts)), 0: len(texts)})
    assert max(sample.num_tokens for sample in samples) == capacity
    whole = samples[0]
    # the end of a document is an input and a target; its first token is only an input
    assert whole.ids[-1] == 0 and whole.mask.tolist() == [False] + [True] * (capacity - 2)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=30), st.integers(1, 40), st.integers(1, 4))
def test_micro_batches_hold_every_sample_within_their_limit(lengths: list[int], limit: int, num_workers: int) -> None:
    samples = [Sample([1] * length, [True] * length, str(n)) for n, length in enumerate(lengths)]
    groups = split_micro_batches(samples, limit, num_workers)
    assert sorted(int(s.id) for group in groups for s in group) == list(range(len(lengths)))
    assert all(len(group) == 1 or sum(s.num_tokens for s in group) <= limit // num_workers for group in groups)


def test_workers_get_equal_shares() -> None:
    samples = [Sample([1] * length, [True] * length) for length in range(1, 33)]
    shares = split_micro_batches(samples, 4 * 528, 4)
    tokens = [sum(s.num_tokens for s in share) for share in shares]
    assert len(shares) == 4 and max(tokens) - min(tokens) <= 1  # there and back: long ones to all alike


def test_pairs_interleave_and_rows_know_their_document() -> None:
    first = PairSample(Sample([1, 2, 3], [0, 1, 1]), Sample([4, 4], [0, 1]), chosen_reward=2.0, rejected_reward=0.5, ref_chosen=-1.0)
    second = PairSample(Sample([5, 6], [0, 1]), Sample([7, 7, 8], [0, 0, 1]))
    batch = collate_pairs([first, second], CPU)
    assert batch.tokens.ids_T.tolist() == [1, 2, 3, 4, 4, 5, 6, 7, 7, 8] and batch.num_tokens == 10
    assert batch.tokens.targets_R.tolist() == [2, 3, 4, 6, 8]
    assert batch.documents_R.tolist() == [0, 0, 1, 2, 3] and batch.lengths_N.tolist() == [2, 1, 1, 1]
    assert batch.rewards_P2.tolist() == [[2.0, 0.5], [1.0, 0.0]]
    assert batch.reference_P2 is None  # half a reference is none


def test_a_pair_lays_out_what_both_sides_begin_with_once() -> None:
    # prompt 1 2, answers 3 4 and 3 5 6: the last common token predicts another target for each side
    pair = PairSample(Sample([1, 2, 3, 4], [0, 0, 1, 1]), Sample([1, 2, 3, 5, 6], [0, 0, 1, 1, 1]))
    batch = collate_pairs([pair], CPU)
    assert batch.tokens.ids_T.tolist() == [1, 2, 3, 4, 5, 6] and batch.num_tokens == pair.num_tokens == 6
    assert batch.tokens.shape.positions_T.tolist() == [0, 1, 2, 3, 3, 4]
    assert batch.tokens.rows_R.tolist() == [1, 2, 1, 2, 4] and batch.tokens.targets_R.tolist() == [3, 4, 3, 5, 6]
    assert batch.documents_R.tolist() == [0, 0, 1, 1, 1] and batch.count == 1


@given(documents)
def test_a_pairs_targets_are_those_of_its_sides(docs: list[list[tuple[int, bool]]]) -> None:
    # every side after the same prompt, in pairs with the first
    sides = [as_sample([(1, False), (2, False), *doc]) for doc in docs]
    pairs = [PairSample(sides[0], side) for side in sides]
    batch, plain = collate_pairs(pairs, CPU), collate_tokens([side for pair in pairs for side in (pair.chosen, pair.rejected)], CPU)
    tokens = batch.tokens
    assert tokens.targets_R.tolist() == plain.targets_R.tolist()
    # what predicts them is the same too
    assert tokens.ids_T[tokens.rows_R].tolist() == plain.ids_T[plain.rows_R].tolist()
    assert tokens.shape.positions_T[tokens.rows_R].tolist() == plain.shape.positions_T[plain.rows_R].tolist()
    assert tokens.num_tokens == sum(pair.num_tokens for pair in pairs) < plain.num_tokens


def test_rated_ends_point_at_the_end_of_turn_tokens() -> None:
    samples = [RatedSample([9, 1, 7], 2, [4, 3, 2, 1, 0]), RatedSample([9, 7, 5, 5], 1, [1, -100, 1, 1, 1])]
    for groups, num_tokens in (([RatedGroup([sample]) for sample in samples], 7), ([RatedGroup(samples)], 6)):
        batch = collate_rated(groups, CPU)
        assert batch.ids_T[batch.ends_N].tolist() == [7, 7] and batch.shape.positions_T[batch.ends_N].tolist() == [2, 1]
        assert batch.count == 9 == sum(group.num_targets for group in groups)
        assert batch.num_tokens == sum(group.num_tokens for group in groups) == num_tokens
    with pytest.raises(InputError, match="scored at token 3"):
        RatedSample([1, 2, 3], 3, [0] * 5)


def test_answers_to_one_prompt_are_grouped_within_the_limits() -> None:
    prompts = ["a", "b", "a", "", "a", "", "b"]
    samples = [RatedSample([1, 2, number], 2, [0] * 5, id=str(number), prompt=prompt) for number, prompt in enumerate(prompts)]

    def names(max_answers: int, max_tokens: int) -> list[str]:
        return ["".join(answer.id for answer in group.answers) for group in group_answers(samples, max_answers, max_tokens)]  # type: ignore[union-attr]

    assert names(9, 99) == ["024", "16", "3", "5"]
    assert names(2, 99) == ["02", "16", "3", "4", "5"]
    assert names(9, 4) == ["02", "16", "3", "4", "5"]  # two answers of one prompt are four tokens
    assert names(9, 3) == list("0123456")
    plain = as_sample([(1, True)])
    assert group_answers([plain], 1, 1) == [plain]
    many = [RatedSample([1, 2, number], 2, [0] * 5, id=str(number), prompt="a") for number in range(2 * MAX_ANSWERS + 1)]
    assert [len(group.answers) for group in group_answers(many, 99, 999)] == [MAX_ANSWERS, MAX_ANSWERS, 1]  # type: ignore[union-attr]


def test_batches_come_in_few_sizes_and_count_real_tokens() -> None:
    sizes = {filled_length(length) for length in range(4096, 8193)}
    assert len(sizes) == 17 and min(sizes) == 4096 and max(sizes) == 8192
    assert all(length <= filled_length(length) <= 1.0625 * length for length in range(1, 5000))
    samples = [Sample([3] * 70, [True] * 70), Sample([5] * 41, [True] * 41)]
    batch = collate_tokens(samples, CPU)
    assert batch.num_tokens == 111 and len(batch.ids_T) == filled_length(111) == 112
    assert batch.count == 109 and batch.shape.lengths == [70, 41, 1]
    assert set(batch.targets_R.tolist()) == {3, 5}
    bare = collate_tokens(samples, CPU, fill=False)
    assert bare.num_tokens == len(bare.ids_T) == 111 and torch.equal(bare.rows_R, batch.rows_R)


def test_a_mask_of_another_length_is_refused() -> None:
    with pytest.raises(InputError, match="sample x has 2 tokens but a mask of 1"):
        Sample([1, 2], [True], "x")


def test_the_fingerprint_sees_tokens_masks_rewards_and_order() -> None:
    a, b = Sample([1, 2], [False, True]), Sample([1, 2], [True, True])
    variants = [
        [a, b],
        [b, a],
        [a],
        [Sample([1, 3], [False, True]), b],
        [PairSample(a, b, chosen_reward=1.0, rejected_reward=0.0)],
        [PairSample(a, b, chosen_reward=2.0, rejected_reward=0.0)],
        [PairSample(a, b, chosen_reward=1.0, rejected_reward=0.0, ref_chosen=-1.0)],
        [RatedSample([1, 2], 1, [0.0] * 5)],
        [RatedSample([1, 2], 1, [0.0] * 4 + [-100])],
        [RatedSample([1, 2], 1, [0.0] * 5)] * 2,
        [RatedGroup([RatedSample([1, 2], 1, [0.0] * 5)] * 2)],
    ]
    assert len({fingerprint_samples(samples) for samples in variants}) == len(variants)
    assert fingerprint_samples([a, b]) == fingerprint_samples([Sample(np.array([1, 2]), [0, 1]), b])
