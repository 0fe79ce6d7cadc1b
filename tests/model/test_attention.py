"""Packed attention against a plain softmax over each document."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gristmill.model import attention
from gristmill.model.attention import PLAIN, QUERY_CHUNK, ScoreMod, compiled_attention, split_heads, varlen_attention
from gristmill.model.kernels import library as kernels
from gristmill.model.packed import LONG_DOCUMENT, PackedShape


def plain_attention(q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, lengths: list[int], mod: ScoreMod = PLAIN) -> Tensor:
    """Softmax attention one document at a time, by the formula."""
    groups = q_THd.shape[1] // k_TKd.shape[1]
    outputs = []
    for q, k, v in zip(q_THd.split(lengths), k_TKd.split(lengths), v_TKd.split(lengths), strict=True):
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * (mod.scale or q.shape[-1] ** -0.5)
        scores = scores if mod.soft_cap is None else mod.soft_cap * torch.tanh(scores / mod.soft_cap)
        back = torch.arange(len(q))[:, None] - torch.arange(len(q))
        hidden = (back < 0) | (back >= (mod.window or len(q)))
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v))
    return torch.cat(outputs)


def document_lengths(draw: st.DrawFn, lengths: st.SearchStrategy[int]) -> tuple[list[int], list[int]]:
    """Lengths of documents, and how many tokens each shares with the last before it that shares none."""
    sizes = draw(st.lists(lengths, min_size=1, max_size=8))
    shared = [0]
    for length in sizes[1:]:
        holder = max(number for number, count in enumerate(shared) if not count)
        shared.append(draw(st.integers(0, min(length - 1, sizes[holder]))))
    return sizes, shared


short_documents = st.composite(document_lengths)(st.integers(1, 40))
LENGTHS = [1, 2, 30, 36, LONG_DOCUMENT - 1, LONG_DOCUMENT, QUERY_CHUNK + 1, 2 * QUERY_CHUNK + 50]
mods = st.builds(ScoreMod, st.sampled_from([0, 1, 5, 33, 200]), st.sampled_from([None, 0.2]), st.sampled_from([None, 0.5, 2.0]))
tiled_documents = st.composite(document_lengths)(st.sampled_from([1, 2, 17, 49, 130]))
odd_documents = st.composite(document_lengths)(st.sampled_from(LENGTHS))


def plain_shared(q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, shape: PackedShape, mod: ScoreMod = PLAIN) -> Tensor:
    """`plain_attention` of documents that each lay out all their tokens, cut back to those that are their own."""
    repeated = (x.index_select(0, shape.keys_S) for x in (q_THd, k_TKd, v_TKd))
    outputs = plain_attention(*repeated, shape.lengths, mod).split(shape.lengths)
    return torch.cat([out[count:] for out, count in zip(outputs, shape.shared, strict=True)])


def inputs(total: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(total)
    return [torch.randn(total, heads, 8, generator=generator, requires_grad=True) for heads in (4, 2, 2)]


@settings(max_examples=40, deadline=None)
@given(short_documents, mods)
def test_values_and_gradients_equal_the_formula(documents: tuple[list[int], list[int]], mod: ScoreMod) -> None:
    shape = PackedShape.from_lengths(documents[0], shared=documents[1])
    qkv = inputs(shape.num_tokens)
    upstream = torch.randn(shape.num_tokens, 4, 8, generator=torch.Generator().manual_seed(1))
    ours, plain = varlen_attention(*qkv, shape, mod=mod), plain_shared(*qkv, shape, mod)
    torch.testing.assert_close(ours, plain, atol=2e-6, rtol=1e-5)
    ours_grads = torch.autograd.grad(ours, qkv, upstream)
    plain_grads = torch.autograd.grad(plain, qkv, upstream)
    torch.testing.assert_close(ours_grads, plain_grads, atol=5e-6, rtol=1e-5)


def test_bf16_inputs_come_back_as_bf16_close_to_fp32() -> None:
    qkv = inputs(30)
    shape = PackedShape.from_lengths([20, 10])
    out = varlen_attention(*(x.bfloat16() for x in qkv), shape)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), varlen_attention(*qkv, shape), atol=3e-2, rtol=0)


@pytest.mark.parametrize("tiles", [False, pytest.param(True, marks=pytest.mark.skipif(not kernels.has_tiles(), reason="no AMX"))])
@settings(max_examples=25, deadline=None)
@given(odd_documents, mods)
def test_bf16_values_and_gradients_are_near_the_formula(tiles: bool, documents: tuple[list[int], list[int]], mod: ScoreMod) -> None:
    shape = PackedShape.from_lengths(documents[0], shared=documents[1])
    qkv = [x.detach().bfloat16().requires_grad_() for x in inputs(shape.num_tokens)]
    exact_qkv = [x.detach().float().requires_grad_() for x in qkv]
    upstream = torch.randn(shape.num_tokens, 4, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    with patch.object(kernels, "has_tiles", lambda: tiles):
        ours, plain = varlen_attention(*qkv, shape, mod=mod), plain_shared(*exact_qkv, shape, mod)
    ours_grads = torch.autograd.grad(ours, qkv, upstream)
    plain_grads = torch.autograd.grad(plain, exact_qkv, upstream.float())
    for rough, exact in zip((ours, *ours_grads), (plain, *plain_grads), strict=True):
        assert rough.dtype == torch.bfloat16
        # half a unit in the last of 8 bits is 0.002 of a value; a result adds up a few such roundings
        assert (rough.float() - exact).abs().max() < 0.01 * exact.abs().max().clamp(min=1.0)


@pytest.mark.parametrize("mod", [PLAIN, ScoreMod(window=40), ScoreMod(soft_cap=2.0), ScoreMod(window=100, scale=0.5, soft_cap=1.0)])
def test_a_mask_is_made_for_a_stretch_of_queries_at_a_time(mod: ScoreMod) -> None:
    shape = PackedShape.from_lengths([150, 300, 120], shared=[0, 100, 119])
    for dtype, far in ((torch.bfloat16, 1e-2), (torch.float32, 1e-5)):
        qkv = [x.detach().to(dtype) for x in inputs(shape.num_tokens)]
        with patch.object(kernels, "load", lambda: None):  # our kernels need no mask
            whole = varlen_attention(*qkv, shape, mod=mod)
            with patch.object(attention, "MASKED_QUERY_CHUNK", 64):
                torch.testing.assert_close(varlen_attention(*qkv, shape, mod=mod), whole, rtol=0, atol=far)


compiled = pytest.mark.skipif(kernels.load() is None, reason="no compiler")


@compiled
@settings(max_examples=20, deadline=None)
@given(tiled_documents, mods, st.sampled_from([(1, 1, 8, 4), (4, 2, 20, 3), (9, 3, 64, 32), (5, 1, 33, 0), (60, 1, 4, 2)]))
def test_the_kernel_rotates_as_torch_does(documents: tuple[list[int], list[int]], mod: ScoreMod, heads: tuple[int, int, int, int]) -> None:
    num_heads, num_kv_heads, size, pairs = heads
    shape = PackedShape.from_lengths(documents[0], shared=documents[1])
    generator = torch.Generator().manual_seed(3)
    total = num_heads + 2 * num_kv_heads
    qkv_TXd = torch.randn(shape.num_tokens, total, size, generator=generator, requires_grad=True)
    exact_TXd = qkv_TXd.detach().double().requires_grad_()
    angles_TR = shape.positions_T[:, None] * torch.rand(pairs, generator=generator)
    cos_TR, sin_TR = angles_TR.cos(), angles_TR.sin()
    ours_THd = compiled_attention(qkv_TXd, shape, num_heads=num_heads, angles=(cos_TR, sin_TR), mod=mod)
    assert ours_THd is not None
    first, second, rest = exact_TXd.split([pairs, pairs, size - 2 * pairs], -1)
    cos, sin = cos_TR[:, None].double(), sin_TR[:, None].double()
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)
    (q_THd, k_TKd, _), (_, _, v_TKd) = split_heads(turned, num_kv_heads), split_heads(exact_TXd, num_kv_heads)
    plain_THd = plain_shared(q_THd, k_TKd, v_TKd, shape, mod)
    torch.testing.assert_close(ours_THd.double(), plain_THd, atol=1e-5, rtol=1e-5)
    upstream = torch.randn(ours_THd.shape, generator=generator)
    (ours,), (plain,) = torch.autograd.grad(ours_THd, qkv_TXd, upstream), torch.autograd.grad(plain_THd, exact_TXd, upstream.double())
    torch.testing.assert_close(ours.double(), plain, atol=5e-6 * max(1.0, float(plain.abs().max())), rtol=1e-4)


@compiled
@settings(max_examples=20, deadline=None)
@given(tiled_documents, mods, st.sampled_from([(1, 1, 8, 4), (4, 2, 20, 3), (9, 3, 64, 32), (5, 1, 33, 0), (60, 1, 4, 2), (3, 1, 80, 20)]))
def test_bf16_differs_from_the_kernel_in_fp32_by_rounding(
    documents: tuple[list[int], list[int]], mod: ScoreMod, heads: tuple[int, int, int, int]
) -> None:
    num_heads, num_kv_heads, size, pairs = heads
    shape = PackedShape.from_lengths(documents[0], shared=documents[1])
    generator = torch.Generator().manual_seed(3)
    qkv_TXd = torch.randn(shape.num_tokens, num_heads + 2 * num_kv_heads, size, generator=generator).bfloat16()
    upstream = torch.randn(shape.num_tokens, num_heads, size, generator=generator).bfloat16()
    angles_TR = shape.positions_T[:, None] * torch.rand(pairs, generator=generator)
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        given_TXd = qkv_TXd.to(dtype, copy=True).requires_grad_()
        with patch.object(attention, "has_bf16_products", kernels.has_tiles):  # a kernel of ours wherever the tests run
            out_THd = compiled_attention(given_TXd, shape, num_heads=num_heads, angles=(angles_TR.cos(), angles_TR.sin()), mod=mod)
        assert out_THd is not None and out_THd.dtype == dtype
        results.append((out_THd, *torch.autograd.grad(out_THd, given_TXd, upstream.to(dtype))))
    for exact, rough in zip(*((x.detach() for x in result) for result in results), strict=True):
        assert float((rough.float() - exact).norm()) < 0.01 * float(exact.norm())
        assert float((rough.float() - exact).abs().max()) < 0.02 * max(1.0, float(exact.abs().max()))


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_change_no_bit(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "has_bf16_products", kernels.has_tiles)
    shape = PackedShape.from_lengths([150, 300, 1, 120, 40], shared=[0, 100, 0, 0, 39])
    qkv_TXd = torch.randn(shape.num_tokens, 12, 24, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    upstream = torch.randn(shape.num_tokens, 6, 24, generator=torch.Generator().manual_seed(1)).to(dtype)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        out = compiled_attention(qkv_TXd, shape, num_heads=6)
        assert out is not None
        results.append((out, *torch.autograd.grad(out, qkv_TXd, upstream)))
    torch.set_num_threads(before)
    assert all(torch.equal(one, other) for result in results for one, other in zip(result, results[0], strict=True))


@pytest.mark.parametrize(("head_dim", "takes"), [(16, True), (256, True), (20, False), (264, False)])
def test_flash_attention_gets_heads_that_it_takes(head_dim: int, takes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu(torch.Tensor):
        is_cuda = True

    called: list[int] = []
    monkeypatch.setattr(kernels, "library_for", lambda x: None)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", lambda q, *rest, **options: (called.append(q.shape[2]), q)[1])
    x = torch.randn(5, 2, head_dim).bfloat16().as_subclass(OnGpu)
    assert varlen_attention(x, x, x, PackedShape.from_lengths([5])).shape == x.shape
    assert called == [head_dim] * takes
