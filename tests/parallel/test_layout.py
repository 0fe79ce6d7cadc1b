"""Layouts that a model, a batch or the hardware cannot take end in one sentence."""

import re
from dataclasses import replace

import pytest

from gristmill.core.errors import InputError
from gristmill.parallel.hardware import HARDWARE
from gristmill.parallel.layout import MAX_DEVICES, Layout, check_layout, default_layout, warnings
from gristmill.parallel.models import MODELS

H100 = HARDWARE["h100"]
BIG, LLAMA = MODELS["nemotron4-340b"], MODELS["llama3-8b"]
REPORT = Layout(tp=8, pp=12, vp=8, dp=64, batch_size=2304, seq_len=4096)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tp": 0}, "--tp a whole number from 1"),
        ({"micro_batch": -1}, "--micro-batch a whole number"),
        ({"seq_len": 10**9}, "--seq-len a whole number from 1 to"),
        ({"tp": 2**20, "pp": 2**20}, "Plan at most"),
        ({"batch_size": 2305}, "a batch of a multiple of 64 sequences"),
        ({"batch_size": 64 * 11}, "at least as many micro-batches as it has stages: a step has 11 for --pp 12; raise --batch-size to 768"),
        ({"pp": 1}, "Leave --vp out, or raise --pp"),
        ({"pp": 9, "vp": 1}, "--pp times --vp that divides the 96 layers"),
        ({"vp": 16}, "--pp times --vp that divides the 96 layers"),
        ({"tp": 5, "seq_len": 4100}, "--tp that divides the 96 attention heads"),
        ({"tp": 64}, "--tp that divides the 96 attention heads"),
        ({"seq_len": 4100}, "--tp that divides the 4,100 tokens"),
        ({"cp": 3}, "--cp that divides the 4,096 tokens"),
        ({"zero": 3}, "--zero 2 with --pp"),
        ({"zero": 4}, "--zero 0, 1, 2 or 3"),
        ({"precision": "fp16"}, "--precision bf16 or fp8 or fp32"),
        ({"recompute": "some"}, "--recompute none, selective, full"),
    ],
)
def test_what_cannot_be_split_is_refused_in_one_sentence(changes: dict, words: str) -> None:
    check_layout(BIG, REPORT, H100)
    with pytest.raises(InputError, match=re.escape(words)) as error:
        check_layout(BIG, replace(REPORT, **changes), H100)
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


def test_products_in_fp8_need_sides_of_sixteen_and_a_card_that_has_them() -> None:
    config = replace(LLAMA, blocks=tuple(replace(b, ffn_size=14_344) for b in LLAMA.blocks))
    layout = Layout(tp=2, batch_size=1, seq_len=4096, precision="fp8")
    check_layout(LLAMA, layout, H100)
    with pytest.raises(InputError, match="sides that 16 divides"):
        check_layout(config, layout, H100)
    with pytest.raises(InputError, match="A100 has no figure for fp8"):
        check_layout(LLAMA, layout, HARDWARE["a100"])


def test_key_value_heads_divide_tp_or_the_other_way_round() -> None:
    layout = Layout(tp=16, batch_size=1, seq_len=4096)
    check_layout(LLAMA, layout, H100)
    notes = warnings(LLAMA, layout, H100)
    assert ["more than the 8 key-value heads" in notes[0], "beyond a node" in notes[1]] == [True, True]
    config = replace(LLAMA, blocks=tuple(replace(b, num_heads=24, num_kv_heads=3) for b in LLAMA.blocks))
    with pytest.raises(InputError, match="key-value heads of a layer, or is a multiple"):
        check_layout(config, replace(layout, tp=2), H100)


def test_ends_may_hold_a_layer_less() -> None:
    check_layout(MODELS["llama3-405b"], Layout(tp=8, pp=16, vp=8, dp=1, batch_size=16, seq_len=8192), H100)
    shallow = replace(LLAMA, blocks=LLAMA.blocks[:2])
    with pytest.raises(InputError, match="leave a rank of 4 without any"):
        check_layout(shallow, Layout(pp=4, batch_size=4, seq_len=8192), H100)


def test_what_is_allowed_and_rarely_meant_is_said() -> None:
    assert warnings(BIG, REPORT, H100) == []
    assert "no multiple of PP 12" in warnings(BIG, replace(REPORT, batch_size=64 * 37), H100)[0]
    assert "longer than the model's context of 4,096" in warnings(BIG, replace(REPORT, seq_len=8192), H100)[0]


def test_dp_is_what_is_left_of_the_devices() -> None:
    make = lambda ways, num: default_layout(BIG, ways, num_devices=num, precision="bf16", zero=1)  # noqa: E731
    assert make({"tp": 8, "pp": 12}, 6144) == Layout(tp=8, pp=12, dp=64, batch_size=64 * 48, seq_len=4096)
    assert make({"tp": 8, "dp": 4}, None).num_devices == 32
    for ways, num, words in (
        ({"tp": 8}, 12, "--gpus that is a multiple"),
        ({"tp": 8, "dp": 3}, 16, "Leave --dp or --gpus out"),
        ({"tp": 0}, 16, "--tp"),
        ({}, MAX_DEVICES + 1, "--gpus a whole"),
    ):
        with pytest.raises(InputError, match=words):
            make(ways, num)
