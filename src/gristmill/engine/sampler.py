"""Sampler: temperature, top-k, top-p and min-p, with random numbers that belong to the request and not to the batch.

Shapes: B rows (responses in flight), V vocabulary.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gristmill.core.device import put
from gristmill.engine.kernels import library as kernels
from gristmill.generation.api import SamplingParams

# The nucleus of a trained model rarely has more tokens; rows for which it has are sorted in full.
NUCLEUS_GUESS = 64

# Constants of splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014), as
# signed integers.
_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


def sample_key(seed: int, request_id: str, sample: int) -> int:
    """64-bit (signed) key of the random stream of one response of one request."""
    digest = hashlib.blake2b(f"{seed}\0{sample}\0{request_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _shift(x_B: Tensor, bits: int) -> Tensor:
    # A logical right shift: torch has only the arithmetic one for int64.
    return (x_B >> bits) & ((1 << (64 - bits)) - 1)


def uniforms(keys_B: Tensor, positions_B: Tensor) -> Tensor:
    """Uniform numbers in [0, 1), a pure function of (key, position): splitmix64 of the counter.

    Args:
        keys_B: int64, from `sample_key`.
        positions_B: int64, index of the token within its response.

    Returns:
        float32 [B], multiples of 2**-23, so that `u * total` is below `total` after rounding.
    """
    x_B = keys_B + (positions_B + 1) * _GAMMA
    x_B = (x_B ^ _shift(x_B, 30)) * _MIX_1
    x_B = (x_B ^ _shift(x_B, 27)) * _MIX_2
    return _shift(x_B ^ _shift(x_B, 31), 41).to(torch.float32) * 2.0**-23


@dataclass(frozen=True)
class SamplingMetadata:
    """Sampling metadata of a batch: which steps of `sample` its rows need at all."""

    any_greedy: bool
    any_random: bool
    max_top_k: int
    any_top_p: bool
    any_min_p: bool = False

    @staticmethod
    def of(temperature_B: np.ndarray, top_p_B: np.ndarray, top_k_B: np.ndarray, *, min_p_B: np.ndarray) -> "SamplingMetadata":
        greedy_B = temperature_B == 0
        return SamplingMetadata(
            any_greedy=bool(greedy_B.any()),
            any_random=not bool(greedy_B.all()),
            max_top_k=int(top_k_B.max()),
            any_top_p=bool((top_p_B < 1).any()),
            any_min_p=bool((min_p_B > 0).any()),
        )


def penalise(logits_BV: Tensor, rows: list[int], histories: list[tuple[np.ndarray, np.ndarray]], params: list[SamplingParams]) -> None:
    """Repetition, presence and frequency penalties, in place, of all rows together.

    Args:
        rows: that have any.
        histories: tokens of prompt and response, of each of these.
        params: of each of these.
    """
    device = logits_BV.device

    def together(parts: list[np.ndarray], dtype: type) -> Tensor:
        return put(np.concatenate(parts).astype(dtype), device)

    seen = [np.unique(np.concatenate(history)) for history in histories]
    said = [np.unique(answer, return_counts=True) for _, answer in histories]
    less = [p.presence_penalty + p.frequency_penalty * counts for p, (_, counts) in zip(params, said, strict=True)]
    row_E, token_E = (
        together([np.full(len(tokens), row) for row, tokens in zip(rows, seen, strict=True)], np.int64),
        together(seen, np.int64),
    )
    by_E = together([np.full(len(tokens), p.repetition_penalty) for p, tokens in zip(params, seen, strict=True)], np.float32)
    there_E = logits_BV[row_E, token_E]
    logits_BV[row_E, token_E] = torch.where(there_E > 0, there_E / by_E, there_E * by_E)
    row_E = together([np.full(len(tokens), row) for row, (tokens, _) in zip(rows, said, strict=True)], np.int64)
    logits_BV[row_E, together([tokens for tokens, _ in said], np.int64)] -= together(less, np.float32)


def sample(
    logits_BV: Tensor,
    u_B: Tensor,
    temperature_B: Tensor,
    *,
    top_p_B: Tensor,
    top_k_B: Tensor,
    min_p_B: Tensor,
    metadata: SamplingMetadata,
    processed_BV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample one token a row by inverting the cumulative distribution at `u`.

    Of equally likely tokens at the edge of top_k or top_p all are kept.

    Args:
        logits_BV: float.
        u_B: uniform numbers in [0, 1).
        temperature_B: 0 takes the likeliest token.
        top_p_B, top_k_B, min_p_B: as in `SamplingParams`.
        metadata: at least what these rows need.
        processed_BV: what is sampled from instead of the logits: with penalties, biases and grammar masks.

    Returns:
        tokens int64 [B] and their log-probability float32 [B] under softmax(logits), untempered and
        unrestricted.
    """
    logits_BV = logits_BV.float()
    plain = processed_BV is None and not (metadata.max_top_k or metadata.any_top_p or metadata.any_min_p)
    if plain and logits_BV.device.type == "cpu" and (library := kernels.load()) is not None:
        logits_BV, u_B, temperature_B = logits_BV.contiguous(), u_B.contiguous(), temperature_B.contiguous()
        tokens_B, logprobs_B = torch.empty(len(u_B), dtype=torch.int64), torch.empty(len(u_B))
        at = (x.data_ptr() for x in (logits_BV, u_B, temperature_B, tokens_B, logprobs_B))
        library.gristmill_sample(*at, *logits_BV.shape)
        return tokens_B, logprobs_B
    target_BV = logits_BV if processed_BV is None else processed_BV
    if metadata.any_random:
        # Greedy rows go through with temperature 1; their choice is replaced below.
        divisor_B1 = torch.where(temperature_B == 0, 1.0, temperature_B)[:, None]
        probs_BV = torch.softmax(target_BV / divisor_B1, -1)
        if metadata.max_top_k:
            probs_BV = _keep_top_k(probs_BV, top_k_B, metadata.max_top_k)
        if metadata.any_top_p:
            probs_BV = _keep_top_p(probs_BV, top_p_B)
        if metadata.any_min_p:
            probs_BV = torch.where(probs_BV >= min_p_B[:, None] * probs_BV.amax(-1, keepdim=True), probs_BV, 0.0)
        cdf_BV = _cumulative(probs_BV)
        # right=True: the first token whose cumulative probability exceeds u, which is never one of
        # probability 0.
        tokens_B = torch.searchsorted(cdf_BV, u_B[:, None] * cdf_BV[:, -1:], right=True)[:, 0]
        if metadata.any_greedy:
            tokens_B = torch.where(temperature_B == 0, target_BV.argmax(-1), tokens_B)
    else:
        tokens_B = target_BV.argmax(-1)
    logprobs_B = logits_BV.gather(-1, tokens_B[:, None])[:, 0] - logits_BV.logsumexp(-1)
    return tokens_B, logprobs_B


def _cumulative(probs_BV: Tensor) -> Tensor:
    """Running sums of each row. CUDA gives a single row to another scan, whose sums may fall, also where nothing is added (a token of
    probability 0 would be drawn), and differ from call to call: two rows keep to the one that neither may.
    """
    if probs_BV.is_cuda and len(probs_BV) == 1:
        return probs_BV.expand(2, -1).cumsum(-1)[:1]
    return probs_BV.cumsum(-1)


def _keep_top_k(probs_BV: Tensor, top_k_B: Tensor, max_k: int) -> Tensor:
    vocab = probs_BV.shape[-1]
    best_BK = probs_BV.topk(min(max_k, vocab), -1).values
    edge_B1 = best_BK.gather(-1, (top_k_B.clamp(1, vocab) - 1)[:, None])
    edge_B1 = torch.where(top_k_B[:, None] == 0, 0.0, edge_B1)
    return torch.where(probs_BV >= edge_B1, probs_BV, 0.0)


def _keep_top_p(probs_BV: Tensor, top_p_B: Tensor) -> Tensor:
    # top_k may have removed mass: top_p is a share of what is left.
    target_B1 = top_p_B[:, None] * probs_BV.sum(-1, keepdim=True)
    vocab = probs_BV.shape[-1]
    best_BK = probs_BV.topk(min(NUCLEUS_GUESS, vocab), -1).values
    covered_B = (best_BK.sum(-1) >= target_B1[:, 0]) | (top_p_B >= 1)
    edge_B1 = _nucleus_edge(best_BK, target_B1)
    if not bool(covered_B.all()):
        rest = (~covered_B).nonzero()[:, 0]
        sorted_RV = probs_BV[rest].sort(-1, descending=True).values
        edge_B1[rest] = _nucleus_edge(sorted_RV, target_B1[rest])
    edge_B1 = torch.where(top_p_B[:, None] >= 1, 0.0, edge_B1)
    return torch.where(probs_BV >= edge_B1, probs_BV, 0.0)


def _nucleus_edge(best_BK: Tensor, target_B1: Tensor) -> Tensor:
    """Probability of the last token kept: the one at which the running sum first reaches the target."""
    before_BK = best_BK.cumsum(-1) - best_BK
    num_kept_B1 = (before_BK < target_B1).sum(-1, keepdim=True)
    return best_BK.gather(-1, (num_kept_B1 - 1).clamp(min=0))
