"""Losses against hand calculations, plain PyTorch, and the identities that define them."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gristmill.core.errors import InputError
from gristmill.model import fused
from gristmill.train import losses
from gristmill.train.losses import (
    cross_entropy_sum,
    kl_divergence_sum,
    masked_mse,
    preference_loss,
    token_logprobs,
    top_kl_divergence_sum,
)

# beta = 0.1: (d, g), then the loss under each name and d loss / d d of rpo_bwd_kl
TABLE = [
    ((3, 2), 0.224782, 0.296020, 2.89, 0.554355, 4.0, -0.030635),
    ((3, 0), 0.011208, 0.011125, 0.09, 0.554355, 4.0, 0.007444),
    ((-8, 0.5), 0.206221, 0.199943, 1.69, 1.171101, 169.0, -0.031243),
    ((20, 2), 0, 0, 0, 0.126928, 225.0, 0),
    ((0, 0), 0, 0, 0, 0.693147, 25.0, 0),
    ((0, 1), 0.110944, 0.120115, 1.0, 0.693147, 25.0, -0.023106),
]
RPO = ("rpo_bwd_kl", "rpo_fwd_kl", "rpo_sq")
margins = st.floats(-30, 30)


def double(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


def loss(name: str, d: float, g: float, beta: float = 0.1, **kwargs: float) -> float:
    return float(preference_loss(name, double(d), double(g), beta=beta, **kwargs))


def slope(name: str, d: float, g: float, beta: float = 0.1, **kwargs: float) -> float:
    d_1 = double(d).requires_grad_()
    preference_loss(name, d_1, double(g), beta=beta, **kwargs).sum().backward()
    assert d_1.grad is not None
    return float(d_1.grad)


@pytest.mark.parametrize("row", TABLE)
def test_table_of_losses(row: tuple) -> None:
    (d, g), *values, gradient = row
    for name, value in zip((*RPO, "dpo", "ipo"), values, strict=True):
        assert loss(name, float(d), float(g)) == pytest.approx(value, abs=6e-7)
    assert slope("rpo_bwd_kl", float(d), float(g)) == pytest.approx(gradient, abs=6e-7)
    assert loss("rpo", float(d), float(g)) == loss("rpo_bwd_kl", float(d), float(g))


@given(margins, st.floats(-5, 5), st.floats(0.01, 1), st.floats(0.1, 3))
def test_rpo_gradient_is_the_difference_of_sigmoids(d: float, gap: float, beta: float, eta: float) -> None:
    expected = beta * (torch.sigmoid(double(beta * d)) - torch.sigmoid(double(eta * gap)))
    assert slope("rpo", d, gap, beta, eta=eta) == pytest.approx(float(expected), abs=1e-12)


@given(margins, st.floats(0.01, 1))
def test_rpo_with_an_infinite_gap_is_dpo(d: float, beta: float) -> None:
    assert loss("rpo", d, 30.0, beta) == pytest.approx(loss("dpo", d, 0.0, beta), abs=1e-9)


@given(margins, st.floats(0.01, 1), st.floats(0.01, 0.49))
def test_rpo_with_a_constant_gap_is_cdpo_less_its_entropy(d: float, beta: float, smoothing: float) -> None:
    gap = math.log((1 - smoothing) / smoothing)
    entropy = -smoothing * math.log(smoothing) - (1 - smoothing) * math.log(1 - smoothing)
    cdpo = loss("cdpo", d, 0.0, beta, label_smoothing=smoothing)
    assert loss("rpo", d, gap, beta) == pytest.approx(cdpo - entropy, abs=1e-12)


@given(margins, st.floats(0.05, 1))
def test_rpo_sq_with_half_a_gap_is_scaled_ipo(d: float, beta: float) -> None:
    assert loss("rpo_sq", d, 0.5, beta) == pytest.approx(beta**2 * loss("ipo", d, 0.0, beta), rel=1e-12, abs=1e-12)


@given(margins, st.floats(-5, 5))
def test_swapping_the_responses_leaves_rpo_unchanged(d: float, g: float) -> None:
    for name in RPO:
        assert loss(name, d, g) == pytest.approx(loss(name, -d, -g), abs=1e-12)


@given(margins)
def test_equal_rewards_pull_the_margin_to_zero(d: float) -> None:
    for name in RPO:
        assert slope(name, d, 0.0) * d >= 0
        assert loss(name, 0.0, 0.0) == 0 <= loss(name, d, 0.0) + 1e-15


@given(st.floats(-3, 3))
def test_rpo_is_least_where_the_margin_is_the_gap(g: float) -> None:
    for name in RPO:
        assert abs(slope(name, g / 0.1, g)) < 1e-6
        assert loss(name, g / 0.1, g) < min(loss(name, g / 0.1 + 2, g), loss(name, g / 0.1 - 2, g))


@pytest.mark.parametrize("name", losses.PREFERENCE_LOSSES)
@pytest.mark.parametrize("d", [-100.0, -60.0, 0.0, 100.0])
@pytest.mark.parametrize("g", [-100.0, 0.0, 100.0])
def test_losses_and_slopes_are_finite_far_out(name: str, d: float, g: float) -> None:
    assert math.isfinite(loss(name, d, g, 1.0, label_smoothing=0.1))
    assert math.isfinite(slope(name, d, g, 1.0, label_smoothing=0.1))


def test_missing_rewards_aim_at_731() -> None:
    # chosen 1, rejected 0: the target probability is sigmoid(1), where the slope is zero
    assert torch.sigmoid(double(1.0)).item() == pytest.approx(0.731059, abs=1e-6)
    assert slope("rpo", 10.0, 1.0, 0.1) == pytest.approx(0, abs=1e-7)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(InputError, match="'dop'; choose one of dpo, cdpo"):
        loss("dop", 0.0, 0.0)


def test_missing_labels_count_nowhere() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]], requires_grad=True)
    labels = torch.tensor([[0.0, -100.0, 1.0, 4.0, -100.0], [-100.0] * 5])
    total, count = masked_mse(scores, labels)
    assert float(total.detach()) == 1 + 4 + 0 and int(count) == 3
    total.backward()
    assert scores.grad is not None
    assert scores.grad[labels == -100].abs().max() == 0 and scores.grad[0, 2] == 4.0


# Losses over a vocabulary


def inputs(rows: int, vocab: int, hidden: int = 12, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows + vocab)
    h = torch.randn(rows, hidden, generator=generator, dtype=dtype).requires_grad_()
    w = torch.randn(vocab, hidden, generator=generator).requires_grad_()
    return h, w, torch.randint(vocab, (rows,), generator=generator)


@pytest.fixture(params=[(1, 0), (7, 0), (7, 31), (31, 31)], ids=lambda rows: f"chunk {rows[0]} keep {rows[1]}")
def chunk_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK_LOGITS", request.param[0] * 50)
    monkeypatch.setattr(losses, "MIN_CHUNK_ROWS", 2 * request.param[0])
    monkeypatch.setattr(losses, "KEPT_LOGITS", request.param[1] * 50)


def logits(h: Tensor, w: Tensor, cap: float | None) -> Tensor:
    return h @ w.T if cap is None else cap * torch.tanh(h @ w.T / cap)


@pytest.mark.usefixtures("chunk_rows")
@pytest.mark.parametrize("cap", [None, 2.0])
def test_cross_entropy_is_pytorchs(cap: float | None) -> None:
    h, w, targets = inputs(31, 50)
    total, count = cross_entropy_sum(h, w, targets, cap=cap)
    (2.5 * total).backward()
    plain_h, plain_w = h.detach().requires_grad_(), w.detach().requires_grad_()
    plain = F.cross_entropy(logits(plain_h, plain_w, cap), targets, reduction="sum")
    (2.5 * plain).backward()
    assert count == 31
    torch.testing.assert_close(total, plain, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(h.grad, plain_h.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(w.grad, plain_w.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("chunk_rows")
@pytest.mark.parametrize("cap", [None, 2.0])
def test_token_logprobs_are_pytorchs(cap: float | None) -> None:
    h, w, targets = inputs(31, 50)
    weights = torch.linspace(-2, 3, 31)
    logp = token_logprobs(h, w, targets, cap=cap)
    (logp * weights).sum().backward()
    plain_h, plain_w = h.detach().requires_grad_(), w.detach().requires_grad_()
    plain = torch.log_softmax(logits(plain_h, plain_w, cap), -1).gather(1, targets[:, None])[:, 0]
    (plain * weights).sum().backward()
    torch.testing.assert_close(logp, plain, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(h.grad, plain_h.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(w.grad, plain_w.grad, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(token_logprobs(h, w, targets, cap=cap), logp)


def taught(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Distillation from a teacher that is sure of the targets: the sum of KL is the cross-entropy."""
    teacher_VE = 100.0 * torch.eye(len(weight), dtype=h.dtype)
    return kl_divergence_sum(h, weight, teacher_VE[targets], teacher_VE)


def taught_by_tokens(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return top_kl_divergence_sum(h, weight, targets[:, None], torch.zeros(len(targets), 1))


@pytest.mark.parametrize("function", [cross_entropy_sum, token_logprobs, taught, taught_by_tokens])
@pytest.mark.parametrize("unpadded", [True, False])
@pytest.mark.parametrize("vocab", [50, 128])  # the second with a gap behind each row of logits
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_added_in_place_are_pytorchs_in_fp64(
    function: object, unpadded: bool, vocab: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"CHUNK_LOGITS": 1, "MIN_CHUNK_ROWS": 14, "KEPT_LOGITS": 0}.items():
        monkeypatch.setattr(losses, name, value)
    monkeypatch.setattr(losses, "UNPADDED_WEIGHTS", 0 if unpadded else 2**24)
    weight = inputs(1, vocab)[1]
    exact_w = weight.detach().double().requires_grad_()
    with fused.accumulating_in_place([weight], {weight: torch.full_like(weight, math.nan)}):
        for number, rows in enumerate((5, 14, 31)):  # fewer than a chunk, one, and several
            h, _, targets = inputs(rows, vocab, dtype=dtype)
            exact_h = h.detach().double().requires_grad_()
            ours = function(h, weight, targets)  # type: ignore[operator]
            factor = 0.5 + number
            if function is not token_logprobs:
                (factor * (ours[0] if function is cross_entropy_sum else ours)).backward()
                (factor * F.cross_entropy(exact_h @ exact_w.T, targets, reduction="sum")).backward()
            else:
                slopes = torch.linspace(-2, 3, rows) * factor
                (ours * slopes).sum().backward()
                (-F.cross_entropy(exact_h @ exact_w.T, targets, reduction="none") * slopes.double()).sum().backward()
            for one, exact in ((h, exact_h), (weight, exact_w)):
                near = 1e-5 if dtype == torch.float32 else 0.03 * float(exact.grad.abs().max())
                torch.testing.assert_close(one.grad.double(), exact.grad, rtol=1e-5, atol=near)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_rows_give_a_zero_gradient_in_place(dtype: torch.dtype) -> None:
    h, weight, targets = inputs(0, 50, dtype=dtype)
    with fused.accumulating_in_place([weight]):
        cross_entropy_sum(h, weight, targets)[0].backward()
    assert weight.grad is not None and not weight.grad.any()


def test_bf16_states_give_fp32_losses_near_the_exact_ones() -> None:
    h, w, targets = inputs(64, 500, dtype=torch.bfloat16)
    total, _ = cross_entropy_sum(h, w, targets)
    exact = F.cross_entropy(h.detach().float() @ w.detach().T, targets, reduction="sum")
    assert total.dtype == torch.float32
    assert abs((total - exact).item()) / 64 < 0.02  # bf16 logits of size 4 are off by 2**-7 each
    total.backward()
    assert w.grad is not None and w.grad.dtype == torch.float32 and h.grad is not None


@pytest.mark.parametrize(("vocab", "min_rows"), [(1000, 1024), (1500, 1024), (16_000, 1), (20_000, 256)])
def test_the_loss_is_right_near_the_borders_of_chunks_and_slices(vocab: int, min_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # rows are padded to a multiple of 128, so that a chunk of 131 or 1398 rows may be followed by padding alone
    monkeypatch.setattr(losses, "MIN_CHUNK_ROWS", min_rows)
    chunk, step = losses._chunk_rows(vocab), losses.CHUNK_LOGITS // vocab
    borders = {1, 127, 129, step, step + 1, chunk - 1, chunk, chunk + 1, 2 * chunk - 1, 2 * chunk + 1}
    with torch.no_grad():
        h, w, targets = inputs(max(borders), vocab, hidden=2)
        exact_R = F.cross_entropy(h @ w.T, targets, reduction="none")
        for rows in borders:
            total, count = cross_entropy_sum(h[:rows], w, targets[:rows])
            assert count == rows and total.item() == pytest.approx(exact_R[:rows].sum().item(), rel=1e-5)
            torch.testing.assert_close(token_logprobs(h[:rows], w, targets[:rows]), -exact_R[:rows], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("function", [cross_entropy_sum, token_logprobs, taught, taught_by_tokens])
def test_a_frozen_output_matrix_has_no_gradient(function: object) -> None:
    h, w, targets = inputs(31, 50)
    frozen = w.detach()
    out = [function(h, matrix, targets) for matrix in (w, frozen)]  # type: ignore[operator]
    (whole, part) = ((one[0] if isinstance(one, tuple) else one.sum()) for one in out)
    assert torch.equal(torch.autograd.grad(whole, h)[0], torch.autograd.grad(part, h)[0]) and frozen.grad is None


def test_no_rows_give_zero_loss_and_zero_gradient() -> None:
    for function in (cross_entropy_sum, token_logprobs, taught, taught_by_tokens):
        h, w, targets = inputs(0, 50)
        out = function(h, w, targets)
        total = out[0] if isinstance(out, tuple) else out.sum()
        total.backward()
        assert total.item() == 0 and w.grad is not None and w.grad.abs().max() == 0


@pytest.mark.parametrize("function", [cross_entropy_sum, token_logprobs, taught_by_tokens])
def test_bytes_kept_for_backward_do_not_grow_with_rows_times_vocabulary(function: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 4000)
    monkeypatch.setattr(losses, "MIN_CHUNK_ROWS", 4)
    monkeypatch.setattr(losses, "KEPT_LOGITS", 4000)

    def saved_bytes(rows: int) -> int:
        h, w, targets = inputs(rows, 1000, hidden=4)
        sizes = []

        def pack(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel() * tensor.element_size())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = function(h, w, targets)  # type: ignore[operator]
        (out[0] if isinstance(out, tuple) else out.sum()).backward()
        return sum(sizes)

    growth = (saved_bytes(400) - saved_bytes(100)) / 300
    # a row costs its state or gradient (16 bytes) and target (8), never its 1000 logits (4000)
    assert 0 < growth <= 32
