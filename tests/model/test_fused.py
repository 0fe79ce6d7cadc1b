"""Compiled norms, activations, softmax and in-place gradients against torch in fp64."""

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gristmill.model import fused
from gristmill.model.kernels import library as kernels

pytestmark = pytest.mark.skipif(kernels.load() is None, reason="no compiler")
rows, widths = st.integers(0, 140), st.sampled_from([1, 3, 8, 16, 31, 64, 100])


def drawn(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).mul_(scale).requires_grad_()


def exact(*tensors: Tensor) -> list[Tensor]:
    return [x.detach().double().requires_grad_() for x in tensors]


def assert_same(ours: Any, plain: Any, inputs: list[Tensor], exact_inputs: list[Tensor]) -> None:
    """Values and gradients, a random gradient coming from above."""
    upstream = [torch.randn(x.shape, generator=torch.Generator().manual_seed(9)) for x in ours]
    grads = torch.autograd.grad(ours, inputs, upstream)
    plain_grads = torch.autograd.grad(plain, exact_inputs, [x.double() for x in upstream])
    for one, other in zip((*ours, *grads), (*plain, *plain_grads), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5 * max([1.0, *other.detach().abs().flatten().tolist()]))


@settings(max_examples=30, deadline=None)
@given(rows, widths, st.booleans(), st.booleans())
def test_a_norm_and_the_sum_before_it(count: int, width: int, centred: bool, adds: bool) -> None:
    inputs = [drawn(count, width, seed=0, scale=3.0), drawn(width, seed=1)]
    inputs += [drawn(width, seed=2)] if centred else []
    inputs += [drawn(count, width, seed=3)] if adds else []
    exacts = exact(*inputs)

    def of(x: Tensor, gain: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        total = x + rest[-1] if adds else x
        if centred:
            return total, F.layer_norm(total, (width,), gain, rest[0], 0.01)
        return total, F.rms_norm(total, (width,), gain, 0.01)

    bias, delta = inputs[2] if centred else None, inputs[-1] if adds else None
    if delta is None:
        ours, plain = [fused.norm(inputs[0], inputs[1], bias, eps=0.01)], of(*exacts)[1:]
    else:
        ours, plain = fused.add_norm(inputs[0], delta, inputs[1], bias, eps=0.01), of(*exacts)
    assert_same(ours, plain, inputs, exacts)


@settings(max_examples=30, deadline=None)
@given(rows, widths, st.sampled_from(["silu", "gelu", "squared_relu"]), st.booleans(), st.sampled_from([1.0, 30.0]))
def test_an_activation(count: int, width: int, kind: str, together: bool, scale: float) -> None:
    gated = kind != "squared_relu"
    inputs = [drawn(count, width * (2 if gated and together else 1), seed=0, scale=scale)]
    inputs += [drawn(count, width, seed=1)] if gated and not together else []
    exacts = exact(*inputs)
    gate, up = exacts[0].chunk(2, -1) if gated and together else (exacts[0], exacts[-1])
    plain = {"silu": F.silu(gate), "gelu": F.gelu(gate, approximate="tanh"), "squared_relu": F.relu(gate).square()}[kind]
    ours = fused.activation(inputs[0], inputs[1] if len(inputs) > 1 else None, kind)
    assert_same([ours], [plain * up if gated else plain], inputs, exacts)
    assert ours is not None
    upstream = torch.ones_like(ours)
    made = fused.activation_and_gradients(inputs[0].detach(), inputs[1].detach() if len(inputs) > 1 else None, upstream, kind)
    assert made is not None and torch.equal(made[0], ours)
    again = fused.activation(inputs[0], inputs[1] if len(inputs) > 1 else None, kind)
    assert again is not None
    for one, other in zip(made[1:], torch.autograd.grad(again, inputs, upstream), strict=False):
        assert torch.equal(one, other)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.sampled_from([1, 2, 15, 16, 17, 1000, 4099]), st.sampled_from([1.0, 100.0, 3e4]))
def test_softmax_over_the_vocabulary(count: int, vocab_size: int, scale: float) -> None:
    logits = drawn(count, vocab_size, seed=0, scale=scale).detach()
    targets, factor = torch.arange(count) * 7 % vocab_size, torch.linspace(-1, 2, count)
    statistics = fused.softmax_statistics(logits)
    assert statistics is not None
    (exact_logits,) = exact(logits)
    logp = exact_logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    ours = logits.gather(1, targets[:, None])[:, 0] - statistics[:, 0] - statistics[:, 1]
    torch.testing.assert_close(ours.double(), logp, rtol=1e-6, atol=2e-6)
    (gradient,) = torch.autograd.grad(-(logp * factor).sum(), exact_logits)
    out = torch.empty_like(logits)
    fused.softmax_gradient(logits, statistics, targets, factor, out_RV=out)
    torch.testing.assert_close(out.double(), gradient, rtol=1e-5, atol=1e-6)
    apart = torch.zeros(count, vocab_size + 3)[:, :vocab_size].copy_(logits)  # rows with a gap behind them
    assert torch.equal(statistics, fused.softmax_statistics(apart))
    for into in (apart, logits):
        fused.softmax_gradient(apart if into is apart else logits, statistics, targets, factor, out_RV=into)
        assert torch.equal(into, out)
    assert not apart._base[:, vocab_size:].any()  # and nothing is written into it


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 20), st.sampled_from([1, 2, 15, 16, 17, 1000, 4099]), st.sampled_from([1.0, 100.0]), st.sampled_from(list(kernels.TYPES))
)
def test_divergence_over_the_vocabulary(count: int, vocab_size: int, scale: float, dtype: torch.dtype) -> None:
    logits, teacher = (drawn(count, vocab_size, seed=seed, scale=scale).detach().to(dtype) for seed in (0, 1))
    exact_logits, exact_teacher = exact(logits, teacher)
    kl = F.kl_div(exact_logits.log_softmax(-1), exact_teacher.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    (gradient,) = torch.autograd.grad(kl.sum(), exact_logits)
    before, apart = logits.clone(), torch.zeros(count, vocab_size + 3, dtype=dtype)[:, :vocab_size].copy_(logits)
    alone = fused.kl_divergence(logits, teacher, keeps=False)
    assert alone is not None and torch.equal(logits, before)
    torch.testing.assert_close(alone.double(), kl, rtol=1e-5, atol=1e-5 * scale)
    for into in (apart, logits):
        found = fused.kl_divergence(into, teacher, keeps=True)
        assert found is not None and torch.equal(found, alone)
        torch.testing.assert_close(into.double(), gradient, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-6 * scale)
    assert not apart._base[:, vocab_size:].any()


def test_bf16_is_rounded_once() -> None:
    x, gain = drawn(40, 33, seed=0).bfloat16(), drawn(33, seed=1).detach()
    normed = fused.norm(x, gain, None, eps=0.01)
    assert normed is not None and torch.equal(normed, F.rms_norm(x.float(), (33,), gain, 0.01).bfloat16())
    squared = fused.activation(x, None, "squared_relu")
    assert squared is not None and torch.equal(squared, x.float().relu().square().bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_that_are_added_in_place_are_autograds(dtype: torch.dtype) -> None:
    tables, weights, biases = ([drawn(*shape, seed=5) for _ in range(2)] for shape in ((11, 6), (4, 6), (4,)))
    ids = torch.tensor([3, 3, 10, 0])

    def loss(number: int, *, in_place: bool) -> Tensor:
        table, weight, bias = tables[number], weights[number], biases[number]
        rows_TD = (fused.embedding(ids, table) if in_place else F.embedding(ids, table)).to(dtype)
        if in_place:
            assert fused.accumulates(weight) and not fused.accumulates(weight.detach())
            return fused.linear(rows_TD, weight, bias).float().square().sum()
        return F.linear(rows_TD, weight.to(dtype), bias.to(dtype)).float().square().sum()

    for _ in range(3):
        loss(0, in_place=False).backward()
    places = {tables[1]: torch.full_like(tables[1], math.nan), weights[1]: torch.full_like(weights[1], math.nan)}
    copies = {weights[1]: torch.full((2, 4, 6), math.nan, dtype=torch.bfloat16)[0]}
    with fused.accumulating_in_place([tables[1], weights[1], biases[1]], places, copies):
        for _ in range(3):
            loss(1, in_place=True).backward()
    assert all(weight.grad is place for weight, place in places.items())
    assert dtype == torch.float32 or torch.equal(copies[weights[1]], weights[1].bfloat16())
    assert not fused.accumulates(weights[1])
    for plain, ours in (tables, weights, biases):
        tolerance = 1e-5 if dtype == torch.float32 else 0.02
        torch.testing.assert_close(ours.grad, plain.grad, rtol=tolerance, atol=tolerance * float(plain.grad.abs().max()))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 29), min_size=1, max_size=20), min_size=1, max_size=4), st.booleans(), st.booleans())
def test_a_sparse_gradient_of_an_embedding_is_the_dense_one(batches: list[list[int]], in_a_place: bool, tied: bool) -> None:
    tables = [torch.nn.Parameter(torch.randn(30, 4, generator=torch.Generator().manual_seed(0))) for _ in range(2)]
    for table, sparse in zip(tables, (False, True), strict=True):
        places = {table: torch.full((30, 4), math.nan)} if in_a_place else {}
        with fused.accumulating_in_place([table], places, sparse=sparse):
            for number, ids in enumerate(batches):
                rows_TD = fused.embedding(torch.tensor(ids), table)
                (rows_TD * torch.randn(rows_TD.shape, generator=torch.Generator().manual_seed(number))).sum().backward()
            num_rows = len(set(sum(batches, [])))
            assert table.grad.is_sparse == (sparse and num_rows <= 15), "sparse as long as it is small"
            if tied:
                fused.linear(torch.ones(2, 4), table, None).sum().backward()
                assert not table.grad.is_sparse
    assert torch.equal(tables[0].grad, tables[1].grad.to_dense()), "the order of the sum is the same"


def test_a_backward_pass_in_another_thread_adds_in_place_too() -> None:
    """A GPU's backward pass, which computes checkpointed activations again, is not in the thread that began it."""
    weight = drawn(4, 6, seed=0)
    with fused.accumulating_in_place([weight]), ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: fused.accumulates(weight)).result()
        pool.submit(lambda: fused.linear(torch.ones(2, 6), weight, None).sum().backward()).result()
    assert weight.grad is not None and torch.equal(weight.grad, torch.full((4, 6), 2.0))
    assert not fused.accumulates(weight)


@pytest.mark.skipif(not kernels.has_tiles(), reason="no AMX")
@settings(max_examples=20, deadline=None)
@given(st.integers(1, 70), st.sampled_from([32, 96, 160]), st.sampled_from([32, 544]), st.booleans(), st.sampled_from([1.0, 0.5]))
def test_a_bf16_product_is_added_up_in_fp32(count: int, outputs: int, inputs: int, adds: bool, factor: float) -> None:
    rows = 16 * count  # in pieces of 512
    left, right = (drawn(rows, size, seed=size).detach().bfloat16() for size in (outputs + 8, inputs))
    left, total = left[:, 8:], drawn(outputs, inputs, seed=2)  # rows apart
    expected = factor * left.double().T @ right.double() + (total.detach().double() if adds else 0)
    got = total.detach().clone()
    assert fused._tile_product(got, left, right, factor=factor, adds=adds)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-4)
    assert not fused._tile_product(got, left[1:], right[1:], factor=factor, adds=adds)
