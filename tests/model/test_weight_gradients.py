"""Gradients of matrices that wait: none before they are taken, then the bits that they have without waiting."""

import pytest
import torch

from gristmill.model import weight_gradients
from gristmill.model.config import ModelConfig, uniform_blocks
from gristmill.model.fp8 import computing_in_float8
from gristmill.model.packed import pack
from gristmill.model.transformer import Transformer


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize(("family", "checkpointed"), [("nemotron", False), ("llama", True), ("llama", False), ("phi3", False)])
def test_gradients_wait_and_do_not_change(family: str, precision: str, checkpointed: bool) -> None:
    model = Transformer(ModelConfig(family, 48, 48, uniform_blocks(3, 2, 1, 16, 32), max_positions=64))
    model.init_weights(0)
    model.compute_dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    model.checkpoint_activations = checkpointed
    ids_T, shape, _ = pack([[[1, 2, 3, 4, 5]], [[4, 5, 6]]], torch.device("cpu"))
    matrices = {name for name, parameter in model.blocks.named_parameters() if parameter.ndim == 2}

    def backward() -> None:
        model.states(ids_T, shape).float().square().sum().backward()

    with computing_in_float8([model], precision):
        backward()
        wanted = {name: parameter.grad for name, parameter in model.blocks.named_parameters()}
        model.zero_grad()
        with weight_gradients.deferring():
            backward()
            assert {name for name, parameter in model.blocks.named_parameters() if parameter.grad is None} == matrices
            first = weight_gradients.take()
            backward()
            for compute in (first, weight_gradients.take(), weight_gradients.take()):
                compute()
    for name, parameter in model.blocks.named_parameters():
        assert parameter.grad is not None and wanted[name] is not None
        assert torch.equal(parameter.grad, wanted[name] + wanted[name]), name
