"""Tensor parallelism: what is refused, and what a squared ReLU leaves of its input."""

from dataclasses import replace

import pytest
import torch

from gristmill.core.errors import InputError
from gristmill.model.config import ModelConfig, uniform_blocks
from gristmill.model.layers import activated
from gristmill.parallel.tensor import check_tensor_parallel

BLOCKS = uniform_blocks(num_layers=2, num_heads=6, num_kv_heads=3, head_dim=8, ffn_size=40)
CONFIG = ModelConfig("llama", 48, 48, BLOCKS, max_positions=64)
EVEN = tuple(replace(block, num_heads=4, num_kv_heads=1) for block in BLOCKS)


@pytest.mark.parametrize(
    ("config", "tp", "said"),
    [
        (CONFIG, 4, "divides the 6 attention heads"),
        (CONFIG, 2, "divides the 3 key-value heads of a layer, or is a multiple"),
        (CONFIG, 3, "divides the 40 columns of an MLP"),
        (
            replace(CONFIG, family="olmo2", blocks=tuple(replace(b, num_kv_heads=2) for b in BLOCKS)),
            2,
            "norms queries and keys over all heads",
        ),
        (replace(CONFIG, vocab_size=3, blocks=EVEN), 4, "a vocabulary of 3"),
    ],
)
def test_what_cannot_be_cut_is_refused(config: ModelConfig, tp: int, said: str) -> None:
    with pytest.raises(InputError, match=said):
        check_tensor_parallel(config, tp)
    check_tensor_parallel(config, 1)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_squared_relu_of_what_others_use_leaves_it(monkeypatch: pytest.MonkeyPatch, in_place: bool) -> None:
    monkeypatch.setattr("gristmill.model.kernels.library.library_for", lambda tensor: None)
    given = torch.linspace(-2, 2, 12).view(3, 4).requires_grad_()
    x = given * 1.0
    out = activated(x, None, ModelConfig("nemotron", 48, 48, BLOCKS, max_positions=64).parts, in_place=in_place)
    assert torch.equal(out, given.detach().clamp(min=0).square())
    assert torch.equal(x, given.detach().clamp(min=0) if in_place else given.detach())
    out.sum().backward()
    torch.testing.assert_close(given.grad, 2 * given.detach().clamp(min=0))
