"""Configurations: what a family fixes, and what its layers share."""

from dataclasses import replace

import pytest

from gristmill.core.errors import InputError
from gristmill.model.config import FAMILIES, BlockConfig, ModelConfig, uniform_blocks

BLOCKS = uniform_blocks(2, 4, 2, 16, 48)
LLAMA = ModelConfig("llama", 64, 32, BLOCKS, 128, rotary_fraction=1.0)


def test_rotation_is_partial_in_nemotron_and_phi3_alone() -> None:
    fractions = {family: ModelConfig(family, 64, 32, BLOCKS, 128).rotary_fraction for family in FAMILIES}
    assert fractions == {family: 0.5 if family == "nemotron" else 1.0 for family in FAMILIES}
    assert ModelConfig("phi3", 64, 32, BLOCKS, 128, rotary_fraction=0.75).rotary_dims == 12
    with pytest.raises(InputError, match="partial_rotary_factor"):
        replace(LLAMA, rotary_fraction=0.5)


def test_layers_share_one_head_dim() -> None:
    with pytest.raises(InputError, match="head_dim"):
        replace(LLAMA, blocks=(BlockConfig(4, 2, 16, 48), BlockConfig(4, 2, 8, 48)))
