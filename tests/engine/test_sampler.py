"""Sampler: the distribution by definition, and random numbers of the request."""

from collections import Counter

import numpy as np
import pytest
import torch

from gristmill.engine.sampler import SamplingMetadata, _cumulative, penalise, sample, sample_key, uniforms
from gristmill.generation.api import SamplingParams

DRAWS = 20_000
LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, 1.0, -30.0, 0.2])


def draw(
    logits_V: torch.Tensor, temperature: float, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    keys = torch.full((DRAWS,), sample_key(1, "a", 0))
    rows = (torch.full((DRAWS,), temperature), torch.full((DRAWS,), top_p), torch.full((DRAWS,), top_k), torch.full((DRAWS,), min_p))
    return sample_rows(logits_V.expand(DRAWS, -1), uniforms(keys, torch.arange(DRAWS)), rows)


def sample_rows(logits_BV: torch.Tensor, u_B: torch.Tensor, rows: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    temperature_B, top_p_B, top_k_B, min_p_B = rows
    metadata = SamplingMetadata.of(temperature_B.numpy(), top_p_B.numpy(), top_k_B.numpy(), min_p_B=min_p_B.numpy())
    return sample(logits_BV, u_B, temperature_B, top_p_B=top_p_B, top_k_B=top_k_B, min_p_B=min_p_B, metadata=metadata)


def allowed(logits_V: torch.Tensor, temperature: float, top_p: float, top_k: int) -> torch.Tensor:
    """The distribution by definition: walk down the sorted list."""
    probs = torch.softmax(logits_V.double() / temperature, -1)
    order = probs.argsort(descending=True, stable=True).tolist()
    if top_k:
        order = order[:top_k]
    mass = sum(float(probs[i]) for i in order)
    kept, total = [], 0.0
    for i in order:
        if total < top_p * mass:
            kept.append(i)
        total += float(probs[i])
    out = torch.zeros_like(probs)
    out[kept] = probs[kept]
    return out / out.sum()


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"),
    [
        (1.0, 1.0, 0),
        (0.5, 1.0, 0),
        (2.0, 1.0, 0),
        (1.0, 0.6, 0),
        (1.0, 0.9, 0),
        (1.0, 1.0, 1),
        (1.0, 1.0, 4),
        (0.7, 0.8, 5),
    ],
)
def test_draws_follow_the_distribution(temperature: float, top_p: float, top_k: int) -> None:
    # No ties at the edges: the two tokens of logit 1.0 become distinct.
    logits = LOGITS + torch.arange(8) * 0.01
    expected = allowed(logits, temperature, top_p, top_k) * DRAWS
    counts = torch.bincount(draw(logits, temperature, top_p, top_k)[0], minlength=8).double()
    assert counts[expected == 0].sum() == 0
    usable = expected > 1e-6
    chi_square = float(((counts - expected)[usable] ** 2 / expected[usable]).sum())
    # The 0.9999 quantile of chi-square with 7 degrees of freedom is 29.9.
    assert chi_square < 29.9


def test_wide_nucleus_beyond_the_first_guess_is_exact() -> None:
    logits = torch.linspace(1.0, 0.0, 300)
    expected = allowed(logits, 1.0, 0.7, 0)
    tokens = draw(logits, 1.0, top_p=0.7)[0]
    assert int((expected > 0).sum()) > 64
    assert set(tokens.tolist()) == set(expected.nonzero()[:, 0].tolist())


def test_rows_keep_their_own_settings() -> None:
    logits = LOGITS.expand(3, -1)
    rows = (torch.tensor([0.0, 1.0, 1.0]), torch.tensor([1.0, 1.0, 1e-6]), torch.tensor([0, 1, 0]), torch.zeros(3))
    for u in (0.0, 0.5, 1 - 2**-23):
        tokens, _ = sample_rows(logits, torch.full((3,), u), rows)
        assert tokens.tolist() == [0, 0, 0]
    rows = (torch.tensor([0.0, 1.0, 1.0]), torch.ones(3), torch.tensor([0, 0, 2]), torch.zeros(3))
    tokens, _ = sample_rows(logits, torch.full((3,), 1 - 2**-23), rows)
    # The last token is the last of non-zero probability; with top_k = 2 (a tie keeps both) it is index 5.
    assert tokens.tolist() == [0, 7, 5]


def test_logprobs_are_untempered() -> None:
    tokens, logprobs = draw(LOGITS, 0.3, top_k=3)
    torch.testing.assert_close(logprobs, torch.log_softmax(LOGITS, -1)[tokens])


def test_uniforms_depend_on_key_and_position_only() -> None:
    keys = torch.tensor([sample_key(seed, name, n) for seed in (0, 1) for name in ("a", "b") for n in (0, 1)])
    assert len(set(keys.tolist())) == 8
    together = uniforms(keys, torch.full((8,), 3))
    alone = torch.cat([uniforms(keys[i : i + 1], torch.tensor([3])) for i in range(8)])
    assert torch.equal(together, alone)
    many = uniforms(keys[:1].expand(DRAWS), torch.arange(DRAWS))
    assert float(many.min()) >= 0 and float(many.max()) < 1
    assert abs(float(many.mean()) - 0.5) < 0.01
    # Neighbouring positions are uncorrelated.
    assert abs(float(torch.corrcoef(torch.stack([many[1:], many[:-1]]))[0, 1])) < 0.03


def test_uniforms_are_splitmix64() -> None:
    def reference(state: int) -> int:
        m = (1 << 64) - 1
        z = (state + 0x9E3779B97F4A7C15) & m
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & m
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & m
        return z ^ (z >> 31)

    # First output of splitmix64 for state 0, as published with the algorithm.
    assert reference(0) == 0xE220A8397B1DCDAF
    for key in (0, 5, -7, 2**63 - 1):
        want = (reference(key % 2**64) >> 41) * 2.0**-23
        assert float(uniforms(torch.tensor([key]), torch.tensor([0]))) == want


def test_penalties_of_all_rows_together_are_those_of_each() -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(5, 20)
    params = [
        SamplingParams(repetition_penalty=1.3),
        SamplingParams(presence_penalty=0.7, frequency_penalty=-0.1),
        SamplingParams(repetition_penalty=0.9, presence_penalty=-1.0, frequency_penalty=0.3),
    ]
    histories = [
        (np.array([3, 3, 5], np.int32), np.array([5, 7, 7, 7], np.int32)),
        (np.array([1], np.int32), np.array([1, 2, 2], np.int32)),
        (np.array([4], np.int32), np.array([], np.int32)),
    ]
    found, expected = logits.clone(), logits.clone()
    penalise(found, [0, 2, 3], histories, params)
    for row, (prompt, answer), p in zip([0, 2, 3], histories, params, strict=True):
        for token in {*prompt.tolist(), *answer.tolist()}:
            there = expected[row, token]
            expected[row, token] = there / p.repetition_penalty if there > 0 else there * p.repetition_penalty
        for token, count in Counter(answer.tolist()).items():
            expected[row, token] -= p.presence_penalty + p.frequency_penalty * count
    assert torch.equal(found, expected) and torch.equal(found[[1, 4]], logits[[1, 4]])


def test_a_single_row_is_summed_on_a_gpu_as_one_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu(torch.Tensor):
        is_cuda = True

    rows, cumsum = [], torch.Tensor.cumsum
    monkeypatch.setattr(torch.Tensor, "cumsum", lambda self, dim: (rows.append(len(self)), cumsum(self, dim))[1])
    sums = _cumulative(torch.tensor([[0.25, 0.5, 0.0, 0.25]]).as_subclass(OnGpu))
    assert set(rows) == {2} and sums.tolist() == [[0.25, 0.75, 0.75, 1.0]]
