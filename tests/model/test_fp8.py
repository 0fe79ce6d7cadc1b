"""Products in 8 bits: scales, errors of products and gradients, which matrices, and where they are refused."""

from dataclasses import replace

import pytest
import torch

from gristmill.core.errors import InputError
from gristmill.model.config import ModelConfig, uniform_blocks
from gristmill.model.fp8 import check_float8, computing_in_float8, float8_linears, quantize_float8, scaled_product
from gristmill.model.transformer import Transformer
from gristmill.train.batches import Sample, collate_tokens
from gristmill.train.objectives.next_token import next_token_objective
from gristmill.train.trainer import Trainer, TrainSettings, compute_precision

BLOCKS = uniform_blocks(num_layers=3, num_heads=4, num_kv_heads=2, head_dim=16, ffn_size=96)
CONFIG = ModelConfig("llama", 64, 64, BLOCKS, max_positions=64, init_std=0.1)
SAMPLES = [Sample(torch.arange(i, i + 20).numpy() % 64, [True] * 20) for i in range(0, 60, 5)]


@pytest.mark.parametrize("rowwise", [True, False])
def test_a_product_is_that_of_the_values_in_8_bits(rowwise: bool) -> None:
    torch.manual_seed(0)
    left, right = torch.randn(16, 32), torch.randn(32, 48)
    left[3], left[5] = 0.0, left[5] * 1e5  # a row of zeros has a scale; a large one costs the others nothing where each has its own
    dims = (1, 0) if rowwise else (None, None)
    eights = [quantize_float8(x, dim, torch.float8_e4m3fn) for x, dim in zip((left, right), dims, strict=True)]
    values = [eight.float() * scale for eight, scale in eights]
    product = scaled_product(left, right, rowwise=rowwise)
    torch.testing.assert_close(product, values[0] @ values[1], rtol=1e-2, atol=1e-2)
    assert product.isfinite().all() and (product[3] == 0).all()
    others = [0, 1, 2, 4]
    error = (product - left @ right)[others].norm() / (left @ right)[others].norm()
    assert error < 0.05 if rowwise else error > 0.05


@pytest.mark.parametrize("precision", ["fp8", "fp8_tensorwise"])
def test_gradients_are_near_those_in_bf16(precision: str) -> None:
    batch, found = collate_tokens(SAMPLES, torch.device("cpu")), {}
    for name in ("bf16", precision):
        model = Transformer(CONFIG)
        with compute_precision(model, name):
            output = next_token_objective(model, batch)
            (output.sum / output.count).backward()
        found[name] = (float(output.sum.detach()), {key: p.grad for key, p in model.named_parameters()})
    assert found[precision][0] == pytest.approx(found["bf16"][0], rel=2e-2)
    for name, gradient in found["bf16"][1].items():
        error = (found[precision][1][name] - gradient).norm() / gradient.norm()
        assert 0 < error < 0.2, name  # it computes otherwise, and not much


def test_first_and_last_layer_and_the_head_keep_bf16() -> None:
    model = Transformer(CONFIG)
    inner = float8_linears(model)
    assert len(inner) == 5 and all(any(linear is one for one in model.blocks["1"].modules()) for linear in inner)
    with computing_in_float8([model], "fp8"):
        assert [linear.product is not None for linear in inner] == [True] * 5 and model.blocks["0"].mlp.up.product is None
    assert all(linear.product is None for linear in inner)
    with computing_in_float8([model], "bf16"):
        assert inner[0].product is None


def test_training_lowers_the_loss_as_in_bf16() -> None:
    losses = {}
    for precision in ("bf16", "fp8"):
        trainer = Trainer(Transformer(CONFIG), next_token_objective, TrainSettings(steps=8, batch_size=12, lr=3e-3, precision=precision))
        losses[precision] = [trainer.step(SAMPLES)["loss"] for _ in range(8)]
    assert losses["fp8"][-1] < 0.9 * losses["fp8"][0]
    assert losses["fp8"] == pytest.approx(losses["bf16"], rel=2e-2) and losses["fp8"] != losses["bf16"]


def test_where_there_are_no_such_products_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(InputError, match="and there are none"),
        computing_in_float8([Transformer(replace(CONFIG, blocks=BLOCKS[:2]))], "fp8"),
    ):
        pass
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    with pytest.raises(InputError, match="A100 has no products in FP8"):
        check_float8(torch.device("cuda:0"), "fp8")
    check_float8(torch.device("cuda:0"), "bf16")
    with pytest.raises(InputError, match="mps has no products"):
        check_float8(torch.device("mps"), "fp8_tensorwise")
