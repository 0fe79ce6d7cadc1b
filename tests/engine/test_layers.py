"""Fused kernels and quantized linear layers beside torch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gristmill.core.device import Arena
from gristmill.engine.kernels import library as kernels
from gristmill.engine.layers import Norm
from gristmill.engine.linear import LINEARS, Int8Activations, Int8Linear
from gristmill.engine.sampler import SamplingMetadata, sample
from gristmill.model.layers import LayerNorm1P, Linear, RMSNorm

pytestmark = pytest.mark.skipif(kernels.load() is None, reason="no compiler")
sizes = st.tuples(st.integers(1, 20), st.sampled_from([1, 7, 16, 33, 64, 255, 300]), st.integers(0, 10**6))


def near(left: Tensor, right: Tensor, dtype: torch.dtype) -> bool:
    return torch.allclose(left.float(), right.float(), atol=2e-5 if dtype == torch.float32 else 0.04, rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [LayerNorm1P, RMSNorm])
@settings(deadline=None, max_examples=20)
@given(size=sizes)
def test_norms(kind: type, dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    rows, width, seed = size
    torch.manual_seed(seed)
    module = kind(width, 1e-5)
    for parameter in module.parameters():
        parameter.data.normal_()
    x_TD, more_TD = torch.randn(rows, width).to(dtype), torch.randn(rows, width).to(dtype)
    made = Norm(module)
    plain = Norm(module)
    plain.library = None
    for delta in (None, more_TD):
        stream, out = made(x_TD.clone(), delta)
        stream_2, out_2 = plain(x_TD.clone(), delta)
        assert near(stream, stream_2, dtype) and near(out, out_2, dtype)
        small = made.quantized(x_TD.clone(), delta)[1]
        back = small.values_TD.float() * small.scale_T[:, None]
        assert (back - out.float()).abs().max() <= 1.02 * small.scale_T.max() / 2 + (0 if dtype == torch.float32 else 0.04)


@settings(deadline=None, max_examples=20)
@given(size=sizes, outputs=st.sampled_from([1, 8, 48, 100]))
def test_int8_products(size: tuple[int, int, int], outputs: int) -> None:
    rows, width, seed = size
    torch.manual_seed(seed)
    linear = Linear(width, outputs, bias=bool(seed % 2))
    for parameter in linear.parameters():
        parameter.data.normal_()
    x_TD = torch.randn(rows, width)
    product = Int8Linear(linear, torch.float32, Arena())
    plain = Int8Linear(linear, torch.float32, Arena())
    plain.library = None
    quantized = Int8Activations.quantize(x_TD)
    assert torch.allclose(product.matmul(quantized), plain.matmul(quantized), atol=1e-4, rtol=1e-4)
    exact = linear(x_TD)
    assert (product(x_TD) - exact).norm() <= 0.05 * exact.norm() + 0.1
    squared, squared_2 = product.squared_relu(quantized), plain.squared_relu(quantized)
    values = [rows.values_TD.float() * rows.scale_T[:, None] for rows in (squared, squared_2)]
    assert (values[0] - values[1]).abs().max() <= 1.01 * squared.scale_T.max(), "one step of the scale at most"


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), vocabulary=st.sampled_from([1, 3, 256, 257, 1000]), temperature=st.sampled_from([0.0, 0.5, 1.0, 3.0]))
def test_sampling(seed: int, vocabulary: int, temperature: float) -> None:
    torch.manual_seed(seed)
    logits, u = torch.randn(9, vocabulary) * 3, torch.rand(9)
    temperatures = torch.full((9,), temperature)
    rest = {"top_p_B": torch.ones(9), "top_k_B": torch.zeros(9, dtype=torch.int64), "min_p_B": torch.zeros(9)}
    metadata = SamplingMetadata(any_greedy=temperature == 0, any_random=temperature > 0, max_top_k=0, any_top_p=False)
    tokens, logprobs = sample(logits, u, temperatures, **rest, metadata=metadata)
    plain_tokens, plain_logprobs = sample(
        logits, u, temperatures, **rest, metadata=metadata, processed_BV=logits
    )  # given processed logits, torch samples
    same = tokens == plain_tokens
    assert torch.allclose(logprobs, logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0], atol=1e-5)
    assert torch.allclose(logprobs[same], plain_logprobs[same], atol=1e-5)
    probs = (logits / (temperature or 1.0)).softmax(-1).cumsum(-1)
    for row in (~same).nonzero()[:, 0].tolist():  # only where u falls on the border between two tokens
        edges = [probs[row, min(int(tokens[row]), int(plain_tokens[row]))]]
        assert abs(float(edges[0]) - float(u[row])) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["int8", "int8-weight", "fp8"])
@pytest.mark.parametrize("rows", [1, 3, 8, 9, 40])
@pytest.mark.parametrize("width", [20, 40, 64, 72, 100])
def test_quantized_products_of_any_shape(width: int, rows: int, kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(width + rows)
    linear = Linear(width, 50, bias=rows % 2 == 0)
    for parameter in linear.parameters():
        parameter.data.normal_()
    x_TD = torch.randn(rows, width).to(dtype)
    exact = linear(x_TD.float())
    assert (LINEARS[kind](linear, dtype, Arena())(x_TD).float() - exact).norm() <= (0.06 if kind == "fp8" else 0.03) * exact.norm() + 0.05
