"""Choice of a back-end, and of tiles that fit into a GPU."""

import pytest
import torch

from gristmill.engine import attention
from gristmill.engine.attention import KVCache, TorchAttention, TritonAttention, _tile_rows, select_backend
from gristmill.model.config import BlockConfig, ModelConfig


@pytest.mark.parametrize(
    ("head_dim", "dtype", "rows"),
    [(64, torch.bfloat16, 128), (128, torch.bfloat16, 128), (256, torch.bfloat16, 64), (80, torch.float32, 64), (256, torch.float32, 16)],
)
def test_tiles_fit_into_the_memory_of_a_program(head_dim: int, dtype: torch.dtype, rows: int) -> None:
    assert _tile_rows(head_dim, dtype) == rows


@pytest.mark.parametrize(("block", "kind"), [((4, 2, 256), TritonAttention), ((64, 2, 256), TorchAttention), ((4, 2, 512), TorchAttention)])
def test_heads_that_fit_no_tile_are_left_to_torch(block: tuple[int, ...], kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "has_triton", lambda device: True)
    monkeypatch.setattr(attention, "supported_by_kernels", lambda device, dtype: False)
    config = ModelConfig("llama", 10, 32, (BlockConfig(*block, 16),), 64)
    cache = KVCache(config, torch.float32, torch.device("cpu"))
    assert type(select_backend(config, cache, torch.float32, angles={})) is kind
