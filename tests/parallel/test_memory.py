"""Memory of a layout: published facts, identities with the model's own sizes, and what each option shares out."""

from dataclasses import replace

import pytest

from gristmill.model.config import PRESETS
from gristmill.model.flops import num_parameters, saved_values
from gristmill.parallel.hardware import HARDWARE
from gristmill.parallel.layout import Layout, rank_blocks
from gristmill.parallel.memory import fits_into, memory, rank_parameters
from gristmill.parallel.models import MODELS

H100 = HARDWARE["h100"]
BIG = MODELS["nemotron4-340b"]
REPORT = Layout(tp=8, pp=12, vp=8, dp=64, batch_size=2304, seq_len=4096)


@pytest.mark.parametrize(("dp", "batch", "middle", "end"), [(16, 768, 21.7, 25.4), (32, 1536, 20.5, 24.0), (64, 2304, 19.9, 23.3)])
def test_states_of_the_report_s_340b(dp: int, batch: int, middle: float, end: float) -> None:
    # 2 + 4 + 12 / n bytes a parameter: bf16 weights, fp32 gradients, masters and moments
    found = memory(BIG, replace(REPORT, dp=dp, batch_size=batch), H100)
    states = {name: (rank.weights + rank.gradients + rank.optimizer) / 2**30 for name, rank in found.items()}
    assert states == pytest.approx({"first": end, "middle": middle, "last": end}, rel=0.01)


def test_parameters_of_the_report_s_340b() -> None:
    assert rank_parameters(BIG, REPORT, 5) == pytest.approx(3.454e9, rel=0.01)
    assert rank_parameters(BIG, REPORT, 0) - rank_parameters(BIG, REPORT, 5) == pytest.approx(0.590e9, rel=0.01)


def test_activations_of_the_report_s_340b() -> None:
    assert 2 * saved_values(BIG, BIG.blocks[0]) / BIG.hidden_size == pytest.approx(28.3, rel=0.01)
    assert 2 * saved_values(BIG, BIG.blocks[0], product=False) / BIG.hidden_size == pytest.approx(20.3, rel=0.01)
    first = memory(BIG, REPORT, H100)["first"]
    assert first.activations / 2**30 == pytest.approx(26.6, rel=0.01)
    assert fits_into(first.total, H100.memory_bytes)  # without recompute, as the report ran it


@pytest.mark.parametrize("name", MODELS)
def test_one_rank_holds_the_whole_model(name: str) -> None:
    config = MODELS[name]
    layout = Layout(batch_size=1, seq_len=512)
    # the last norm is left out
    assert rank_parameters(config, layout, 0) == pytest.approx(num_parameters(config), abs=2 * config.hidden_size)


@pytest.mark.parametrize(
    ("name", "pp", "vp"), [("nemotron4-340b", 12, 8), ("llama3-405b", 16, 8), ("llama3-405b", 16, 1), ("miniature", 1, 1)]
)
def test_ranks_share_out_all_layers(name: str, pp: int, vp: int) -> None:
    config = MODELS[name]
    layout = Layout(pp=pp, vp=vp, batch_size=pp, seq_len=512)
    sizes = [len(rank_blocks(config, layout, rank)) for rank in range(pp)]
    assert sum(sizes) == config.num_layers and max(sizes) - min(sizes) <= 1
    # what the middle ranks hold is more than a 12th or 16th of it only where the ends hold one layer fewer
    assert (sizes[0] == sizes[-1] == min(sizes)) and len(set(sizes[1:-1])) <= 1


def test_layers_that_differ_go_to_the_ranks_in_turn() -> None:
    config = PRESETS["miniature"]
    blocks = tuple(replace(block, ffn_size=100 + i) for i, block in enumerate(config.blocks))
    layout = Layout(pp=3, vp=2, batch_size=3, seq_len=8)
    found = [[b.ffn_size for b in rank_blocks(replace(config, blocks=blocks), layout, rank)] for rank in range(3)]
    assert found == [[100, 103], [101, 104], [102, 105]]


def test_zero_shares_out_optimizer_then_gradients_then_weights() -> None:
    config, layout = MODELS["llama3-8b"], Layout(dp=8, batch_size=8, seq_len=8192)
    found = [memory(config, replace(layout, zero=zero), H100)["first"] for zero in range(4)]
    assert [f.optimizer / found[0].optimizer for f in found] == pytest.approx([1, 1 / 8, 1 / 8, 1 / 8])
    assert [f.gradients / found[0].gradients for f in found] == pytest.approx([1, 1, 1 / 8, 1 / 8])
    assert found[2].weights == found[0].weights > 2 * found[3].weights > 2 * found[0].weights / 8
    assert len({f.activations for f in found}) == 1


def test_recompute_and_tp_and_cp_lower_activations() -> None:
    config, layout = MODELS["llama3-8b"], Layout(batch_size=1, seq_len=8192)
    kept = [memory(config, replace(layout, recompute=how), H100)["first"].activations for how in ("none", "selective", "full")]
    assert kept[0] > kept[1] > 4 * kept[2]
    split = [memory(config, replace(layout, **{way: 4}), H100)["first"].activations for way in ("tp", "cp")]  # type: ignore[arg-type]
    assert split == pytest.approx([kept[0] / 4] * 2)


def test_fp32_needs_no_second_copy() -> None:
    config, layout = MODELS["llama3-8b"], Layout(batch_size=1, seq_len=512)
    parts = [memory(config, replace(layout, precision=precision), H100)["first"] for precision in ("fp32", "bf16", "fp8")]
    count = rank_parameters(config, layout, 0)
    assert [(p.weights + p.gradients + p.optimizer) / count for p in parts] == pytest.approx([16, 18, 18])


def test_key_value_heads_are_repeated_where_tp_is_more() -> None:
    config = replace(MODELS["llama3-8b"], blocks=tuple(replace(b, num_kv_heads=2) for b in MODELS["llama3-8b"].blocks))
    eight = rank_parameters(config, Layout(tp=8, batch_size=1, seq_len=512), 0)
    block, share = config.blocks[0], (num_parameters(config) - (2 * 32 + 1) * config.hidden_size) / 8 + 64 * config.hidden_size
    assert eight - share == pytest.approx(32 * 2 * config.hidden_size * block.head_dim * (8 - 2) / 8)
