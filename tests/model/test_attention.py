"""Packed attention against a plain softmax over each document."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gristmill.model.attention import LONG_DOCUMENT, MAX_EMPTY_SHARE, STRETCH, PackedShape, varlen_attention

lengths_strategy = st.lists(st.integers(1, 40), min_size=1, max_size=12)


def plain_attention(q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, lengths: list[int]) -> Tensor:
    """Softmax attention one document at a time, by the formula."""
    groups = q_THd.shape[1] // k_TKd.shape[1]
    outputs = []
    for q, k, v in zip(q_THd.split(lengths), k_TKd.split(lengths), v_TKd.split(lengths), strict=True):
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
        hidden = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v))
    return torch.cat(outputs)


def inputs(total: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(total)
    return [torch.randn(total, heads, 8, generator=generator, requires_grad=True) for heads in (4, 2, 2)]


@settings(max_examples=25, deadline=None)
@given(lengths_strategy)
def test_values_and_gradients_equal_the_formula(lengths: list[int]) -> None:
    qkv = inputs(sum(lengths))
    upstream = torch.randn(sum(lengths), 4, 8, generator=torch.Generator().manual_seed(1))
    ours = varlen_attention(*qkv, PackedShape.from_lengths(lengths))
    plain = plain_attention(*qkv, lengths)
    torch.testing.assert_close(ours, plain, atol=2e-6, rtol=1e-5)
    ours_grads = torch.autograd.grad(ours, qkv, upstream)
    plain_grads = torch.autograd.grad(plain, qkv, upstream)
    torch.testing.assert_close(ours_grads, plain_grads, atol=5e-6, rtol=1e-5)


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


def test_bf16_inputs_come_back_as_bf16_close_to_fp32() -> None:
    qkv = inputs(30)
    shape = PackedShape.from_lengths([20, 10])
    out = varlen_attention(*(x.bfloat16() for x in qkv), shape)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), varlen_attention(*qkv, shape), atol=3e-2, rtol=0)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.sampled_from([1, 2, 30, 36, LONG_DOCUMENT - 1, LONG_DOCUMENT, STRETCH + 1, 2 * STRETCH + 50]), min_size=1, max_size=6))
def test_bf16_values_and_gradients_are_near_the_formula(lengths: list[int]) -> None:
    qkv = [x.detach().bfloat16().requires_grad_() for x in inputs(sum(lengths))]
    exact_qkv = [x.detach().float().requires_grad_() for x in qkv]
    upstream = torch.randn(sum(lengths), 4, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    ours = varlen_attention(*qkv, PackedShape.from_lengths(lengths))
    plain = plain_attention(*exact_qkv, lengths)
    ours_grads = torch.autograd.grad(ours, qkv, upstream)
    plain_grads = torch.autograd.grad(plain, exact_qkv, upstream.float())
    for rough, exact in zip((ours, *ours_grads), (plain, *plain_grads), strict=True):
        assert rough.dtype == torch.bfloat16
        # half a unit in the last of 8 bits is 0.002 of a value; a result adds up a few such roundings
        assert (rough.float() - exact).abs().max() < 0.01 * exact.abs().max().clamp(min=1.0)
