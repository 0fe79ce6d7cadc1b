"""Triton attention and CUDA graphs: on a GPU where there is one, else by Triton's interpreter, which knows no bfloat16."""

import os
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when it is imported
pytest.importorskip("triton")

from gristmill.engine import model_runner  # noqa: E402
from gristmill.engine.attention import TritonAttention  # noqa: E402
from gristmill.engine.core import Core  # noqa: E402
from gristmill.engine.kernels import library as kernels  # noqa: E402
from gristmill.engine.speculative import SpeculativeConfig  # noqa: E402
from tests.engine.test_core import compare, core_of, finish, model_of, states_of  # noqa: E402


@pytest.mark.parametrize("dtype", [torch.float32] if DEVICE == "cpu" else [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cache", list(kernels.CACHE_TYPES))
@settings(deadline=None, max_examples=5 if DEVICE == "cpu" else 50)
@given(seed=st.integers(0, 10**6))
def test_attention_equals_torchs(dtype: torch.dtype, cache: torch.dtype, seed: int) -> None:
    compare(TritonAttention, dtype, cache, seed, DEVICE)


@pytest.mark.parametrize("options", [{}, {"max_batch": 3, "blocks": 12}, {"speculative": SpeculativeConfig(prompt_lookup_min=1)}])
def test_captured_steps_give_the_same_answers(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    model = model_of().to(DEVICE)
    plain = finish(core_of(model, **options), states_of(6, answer=12))
    monkeypatch.setattr(model_runner, "select_backend", lambda config, cache, dtype, **angles: TritonAttention(config, cache, **angles))
    core: Core = core_of(model, **options)
    assert finish(core, states_of(6, answer=12)) == plain
    graphs = core.model_runner.cuda_graphs
    assert graphs is not None and graphs.captured, "steps of one token a sequence are captured"
    core.refresh()
    assert not graphs.captured
