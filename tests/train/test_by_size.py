"""Settings by size: what is given stays, what is not comes from the table, and few rows get smaller batches."""

import re
from pathlib import Path

import pytest
import torch

from gristmill.core import device as devices
from gristmill.train.by_size import TABLE, Kind, described, fill
from gristmill.train.settings import Lora, PreferenceTraining, Training

CPU = torch.device("cpu")
KINDS: tuple[Kind, ...] = ("demonstration_sft", "sft", "code_sft", "reward", "preference")


def section(kind: Kind) -> Training:
    return PreferenceTraining() if kind == "preference" else Training()


@pytest.mark.parametrize("kind", KINDS)
def test_larger_models_get_smaller_rates_and_no_gap_stays(kind: Kind) -> None:
    rates = []
    for size in (1e6, 135e6, 1.7e9, 8e9, 70e9, 340e9):
        found = fill(section(kind), kind, int(size), device=CPU)
        assert found.lr and found.batch_size and found.precision != "auto" and (found.steps is None) != (found.epochs is None)
        rates.append(found.lr)
    assert rates[1:] == sorted(rates[1:], reverse=True)


def test_what_is_given_stays() -> None:
    given = PreferenceTraining(lr=1.0, steps=3, batch_size=5, precision="bf16", sft_weight=0.5)
    assert fill(given, "preference", 10**9, device=CPU, num_rows=4) == given


def test_an_adapter_takes_a_larger_rate_unless_one_is_given() -> None:
    lora = Lora()
    for kind in KINDS:
        whole, adapter = (fill(section(kind).model_copy(update={"lora": one}), kind, 10**8, device=CPU) for one in (None, lora))
        assert whole.lr is not None and adapter.lr == pytest.approx(10 * whole.lr)
    assert fill(Training(lr=0.5, lora=lora), "sft", 10**8, device=CPU).lr == 0.5


def test_the_smallest_row_is_what_the_miniature_was_tuned_with() -> None:
    found = fill(Training(), "demonstration_sft", 10**6, device=CPU, num_rows=120)
    assert (found.lr, found.batch_size, found.epochs, found.warmup_ratio) == (1e-3, 16, 15, 0.1)


def test_few_rows_get_a_smaller_batch() -> None:
    sizes = [fill(Training(epochs=1), "sft", 8 * 10**9, device=CPU, num_rows=rows).batch_size for rows in (10, 1000, 4000, 10**6)]
    assert sizes == [8, 16, 64, 128]
    assert fill(Training(steps=9), "sft", 8 * 10**9, device=CPU, num_rows=10).batch_size == 128  # its length is as it was meant


@pytest.mark.parametrize(("instructions", "seconds", "want"), [(False, (1, 9), "fp32"), (True, (1, 9), "bf16"), (True, (9, 1), "fp32")])
def test_bf16_only_where_it_is_made_for_and_faster(
    instructions: bool, seconds: tuple[int, int], want: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "bf16_is_faster", devices.bf16_is_faster.__wrapped__)  # without what this process has measured
    monkeypatch.setattr(devices, "has_bf16_products", lambda: instructions)
    monkeypatch.setattr(devices, "_seconds_of_product", lambda dtype: seconds[dtype == torch.float32])
    assert fill(Training(), "sft", 1, device=CPU).precision == want


def test_a_gpu_computes_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert fill(Training(), "sft", 1, device=torch.device("cuda")).precision == "bf16"
    assert fill(Training(precision="fp32"), "sft", 1, device=torch.device("cuda")).precision == "fp32"


def test_one_line_tells_all() -> None:
    line = described(fill(PreferenceTraining(warmup_steps=4), "preference", 135 * 10**6, device=CPU))
    assert re.fullmatch("lr 4e-05, batch 8, 1 epochs, warm-up 4 steps, (fp32|bf16), beta 0.1, SFT weight 0.01", line)


def test_the_documented_table_is_the_one_in_use() -> None:
    text = (Path(__file__).parents[2] / "docs" / "settings.md").read_text()
    for largest, of_kind in TABLE:
        name = "more" if largest == float("inf") else f"{largest / 1e6:,.0f}M"
        line, _ = re.findall(rf"^\| {re.escape(name)} \|.*$", text, re.M)
        for kind, stage in of_kind.items():
            length = f"{stage.steps} steps" if stage.steps else f"{stage.epochs:g}"
            assert f"{stage.lr:g} / {stage.batch_size} / {length}" in line, (name, kind)
        assert line.rstrip(" |").endswith(f"{of_kind['preference'].sft_weight:g}")
