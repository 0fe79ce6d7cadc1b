"""A tiny decoder and tiny samples, shared by the training tests."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from gristmill.model.config import ModelConfig, uniform_blocks
from gristmill.model.transformer import Transformer
from gristmill.train.batches import PairSample, Sample

VOCAB = 48


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def make_model() -> Callable[..., Transformer]:
    def make(seed: int = 0, init_std: float = 0.1) -> Transformer:
        blocks = uniform_blocks(num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, ffn_size=32)
        config = ModelConfig("nemotron", VOCAB, 16, blocks, max_positions=256, init_std=init_std)
        model = Transformer(config)
        model.init_weights(seed)
        return model

    return make


@pytest.fixture
def make_samples() -> Callable[..., list[Sample]]:
    def make(num: int, seed: int = 0, longest: int = 24) -> list[Sample]:
        rng = np.random.default_rng(seed)
        samples = []
        for number in range(num):
            length = int(rng.integers(4, longest + 1))
            mask = rng.random(length) < 0.6
            mask[-1] = True
            samples.append(Sample(rng.integers(0, VOCAB, length), mask, f"s{number}"))
        return samples

    return make


@pytest.fixture
def make_pairs() -> Callable[..., list[PairSample]]:
    def make(num: int, seed: int = 0) -> list[PairSample]:
        rng = np.random.default_rng(seed)
        pairs = []
        for number in range(num):
            prompt = rng.integers(0, VOCAB, int(rng.integers(2, 8)))
            sides = []
            for _ in range(2):
                response = rng.integers(0, VOCAB, int(rng.integers(1, 12)))
                mask = np.arange(len(prompt) + len(response)) >= len(prompt)
                sides.append(Sample(np.concatenate([prompt, response]), mask))
            gap = float(rng.uniform(0, 3))
            pairs.append(PairSample(sides[0], sides[1], chosen_reward=1.0 + gap, rejected_reward=1.0, id=f"p{number}"))
        return pairs

    return make
