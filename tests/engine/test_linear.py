"""Compiled products beside torch's in fp64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gristmill.core.device import Arena
from gristmill.core.errors import InputError
from gristmill.engine import linear as linear_methods
from gristmill.engine.kernels import library as kernels
from gristmill.engine.linear import BF16, FP32, INT4, INT8, LINEARS, CompiledProduct, int4_blocks, int8_rows
from gristmill.model.layers import Linear
from gristmill.model.quantized import grouped, scaled

pytestmark = pytest.mark.skipif(kernels.load() is None, reason="no compiler")


def product_of(kind: int, weight_ND: Tensor, bias_N: Tensor | None = None) -> tuple[CompiledProduct, Tensor]:
    """A compiled product, and the matrix that it stands for in fp64."""
    shape = weight_ND.shape
    if kind in (FP32, BF16):
        weight_ND = weight_ND if kind == FP32 else weight_ND.bfloat16()
        return CompiledProduct(kind, weight_ND, None, bias_N, shape=shape), weight_ND.double()
    if kind == INT8:
        values_ND, scale_N = scaled(weight_ND, torch.int8)
        return CompiledProduct(kind, int8_rows(values_ND), scale_N, bias_N, shape=shape), values_ND.double() * scale_N.double()[:, None]
    values_ND, scale_NG = grouped(weight_ND, 32)
    whole_ND = (values_ND.double().unflatten(1, (-1, 32)) * scale_NG.double()[..., None]).flatten(1)
    return CompiledProduct(kind, *int4_blocks(values_ND, scale_NG), bias_N, shape=shape), whole_ND


widths = st.sampled_from([1, 7, 16, 31, 32, 33, 63, 64, 65, 100, 255, 256, 257, 300, 576, 1000])
sizes = st.tuples(st.sampled_from([*range(1, 18), 63, 64, 65, 70, 130]), widths, st.sampled_from([1, 2, 3, 4, 5, 12, 13, 50, 200]))


@pytest.mark.parametrize("kind", [FP32, BF16, INT8, INT4])
@settings(deadline=None, max_examples=60)
@given(size=sizes, seed=st.integers(0, 10**6), dtype=st.sampled_from([torch.float32, torch.bfloat16]), threads=st.integers(1, 2))
def test_products_equal_torchs(kind: int, size: tuple[int, int, int], seed: int, dtype: torch.dtype, threads: int) -> None:
    rows, width, outputs = size
    width = -(-width // 32) * 32 if kind == INT4 else width
    torch.manual_seed(seed)
    bias_N = torch.randn(outputs) if seed % 2 else None
    product, whole_ND = product_of(kind, torch.randn(outputs, width) * torch.rand(outputs, 1), bias_N)
    x_TD = (torch.randn(rows, width) * 10 ** (4 * torch.rand(rows, 1) - 2)).to(dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        out_TN = product(x_TD)
    finally:
        torch.set_num_threads(before)
    exact_TN = F.linear(x_TD.double(), whole_ND, None if bias_N is None else bias_N.double())
    # what the sums of all absolute products could lose
    bound_TN = F.linear(x_TD.double().abs(), whole_ND.abs()) * {FP32: 1e-6, BF16: 1e-6, INT8: 2e-5, INT4: 4e-3}[kind]
    if kind in (INT8, INT4):  # activations are rounded to a share of the largest beside them
        bound_TN += x_TD.double().abs().amax(1, keepdim=True) * whole_ND.abs().sum(1) * {INT8: 2e-5, INT4: 4e-3}[kind]
    assert out_TN.dtype == dtype and out_TN.shape == (rows, outputs)
    assert ((out_TN.double() - exact_TN).abs() <= bound_TN + exact_TN.abs() * (0.004 if dtype == torch.bfloat16 else 1e-6) + 1e-6).all()
    assert torch.equal(product(x_TD[:1]), product(x_TD[:1].clone())), "the same again"


@pytest.mark.skipif(not kernels.has_tiles(), reason="no AMX")
@pytest.mark.parametrize(("kind", "width", "fewest"), [(BF16, 200, 2), (INT8, 200, 7), (INT8, 336, 7), (INT4, 224, 6), (INT4, 320, 6)])
def test_tile_products_of_a_row_do_not_depend_on_the_others(kind: int, width: int, fewest: int) -> None:
    torch.manual_seed(0)
    product, _ = product_of(kind, torch.randn(70, width), torch.randn(70))
    x_TD = torch.randn(256, width).bfloat16()
    all_TN = product(x_TD)
    for first, last in ((5, 5 + fewest), (3, 20), (40, 256)):
        assert torch.equal(product(x_TD[first:last]), all_TN[first:last])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [FP32, BF16, INT8, INT4])
@pytest.mark.parametrize("strange", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_stays_in_its_row(kind: int, strange: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    product, _ = product_of(kind, torch.randn(50, 320))
    x_TD = torch.randn(9, 320).to(dtype)
    plain_TN = product(x_TD)
    for column in (0, 31, 255, 319):
        x_2 = x_TD.clone()
        x_2[4, column] = strange
        out_TN = product(x_2)
        others = [row for row in range(9) if row != 4]
        assert not out_TN[4].isfinite().any() and torch.equal(out_TN[others], plain_TN[others])
    assert torch.equal(product(torch.zeros(5, 320, dtype=dtype)), torch.zeros(5, 50, dtype=dtype))


@pytest.mark.parametrize("rows", [8, 64, 65, 73])
@pytest.mark.parametrize("width", [32, 96, 320, 1536])
def test_int4_with_many_rows_loses_less(width: int, rows: int) -> None:
    torch.manual_seed(width + rows)
    product, whole_ND = product_of(INT4, torch.randn(50, width) * torch.rand(50, 1))
    x_TD = torch.randn(rows, width)
    exact_TN = F.linear(x_TD.double(), whole_ND)
    few_TN = torch.cat([product(x_D[None]) for x_D in x_TD])
    many, few = ((out_TN.double() - exact_TN).norm() / exact_TN.norm() for out_TN in (product(x_TD), few_TN))
    assert many < 0.002 < few < 0.01


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 70))
def test_int8_activations_are_multiplied_exactly(seed: int, rows: int) -> None:
    torch.manual_seed(seed)
    values_ND, values_TD = torch.randint(-127, 128, (33, 300), dtype=torch.int8), torch.randint(-127, 128, (rows, 300), dtype=torch.int8)
    product = CompiledProduct(INT8, int8_rows(values_ND), torch.ones(33), None, shape=values_ND.shape)
    exact_TN = values_TD.double() @ values_ND.double().T
    assert torch.equal(product(values_TD, torch.float32, torch.ones(rows)).double(), exact_TN)


@pytest.mark.parametrize("kind", ["", "int8", "int8-weight", "int4"])
@pytest.mark.parametrize("most", [0, 3, 2**31])
def test_many_rows_go_to_torch(kind: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_methods, "max_rows", lambda kind, dtype=None, size=0: most)
    torch.manual_seed(0)
    linear = Linear(96, 40, bias=True).to(torch.bfloat16)
    for parameter in linear.parameters():
        parameter.data.normal_()
    made = LINEARS[kind](linear, torch.bfloat16, Arena())
    for rows in (1, 3, 4, 20):
        x_TD = torch.randn(rows, 96).bfloat16()
        exact_TN = F.linear(x_TD.double(), linear.weight.double(), linear.bias.double())
        assert (made(x_TD).double() - exact_TN).norm() <= (0.15 if kind == "int4" else 0.02) * exact_TN.norm()


def test_int4_of_a_width_that_is_no_whole_group() -> None:
    with pytest.raises(InputError, match="Quantize to int8-weight"):
        LINEARS["int4"](Linear(40, 8, bias=False), torch.float32, Arena())
