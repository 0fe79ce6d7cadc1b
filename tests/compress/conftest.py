"""A small parent with random weights, and a text."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from gristmill.compress.activations import Piece, pieces_of
from gristmill.model.config import FAMILIES, ModelConfig, uniform_blocks
from gristmill.model.transformer import Transformer
from gristmill.train.batches import Sample

MakeParent = Callable[..., Transformer]


@pytest.fixture(scope="session")
def make_parent() -> MakeParent:
    """make_parent(family, num_layers): random weights, of which norms and biases too differ from how they begin."""

    def make(family: str = "nemotron", num_layers: int = 3) -> Transformer:
        biased = {"attention_bias", "mlp_bias"} & set(FAMILIES[family].optional_biases)
        blocks = uniform_blocks(num_layers, 4, 4 if family == "olmo2" else 2, 8, 64)
        config = ModelConfig(family, 96, 32, blocks, 64, init_std=0.15, **dict.fromkeys(biased, True))
        model = Transformer(config).requires_grad_(False)
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
        return model

    return make


@pytest.fixture(scope="session")
def samples() -> list[Sample]:
    rng = np.random.default_rng(0)
    return [Sample(rng.integers(0, 96, size=n), [True] * n, str(n)) for n in (17, 30, 23, 40, 11, 28)]


@pytest.fixture(scope="session")
def pieces(samples: list[Sample]) -> list[Piece]:
    return pieces_of(samples, 64, torch.device("cpu"))
