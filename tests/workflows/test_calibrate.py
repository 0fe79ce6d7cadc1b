"""Calibration: rates that are known come out of the fit, and a small one of this machine foretells a step of it."""

from collections.abc import Callable
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from gristmill.core.errors import InputError
from gristmill.parallel.hardware import Hardware, read_hardware
from gristmill.parallel.layout import Layout
from gristmill.parallel.step_time import gemm_seconds, step_time
from gristmill.workflows import calibrate as calibration

KNOWN = Hardware(
    name="known",
    flops={"fp32": 2e11},
    memory_bytes=8e9,
    memory_bandwidth=5e9,
    link_bandwidth=1e9,
    network_bandwidth=1e9,
    gemm_efficiency=1.0,
    gemm_overhead=20.0,
    attention_efficiency=0.4,
    exposed_tp=1.0,
    exposed_dp=1.0,
    operation_seconds=2e-5,
    threads=1,
)


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose times are those of the planner with known rates."""
    seconds: dict[tuple[int, ...], float] = {}

    def product(a: torch.Tensor, b: torch.Tensor) -> None:
        sides = (len(a), b.shape[1], a.shape[1])
        seconds[()] = gemm_seconds(sides, Layout(batch_size=1, seq_len=1, precision="fp32"), KNOWN)

    def timed(work: Callable[[], object], device: torch.device) -> float:
        work()
        return seconds[()]

    monkeypatch.setattr(torch, "mm", product)
    monkeypatch.setattr(calibration, "_seconds", timed)
    monkeypatch.setattr(calibration, "has_bf16_products", lambda: False)
    monkeypatch.setattr(calibration, "_all_reduce_bandwidth", lambda: 1e9)
    monkeypatch.setattr(calibration, "step_seconds", lambda config, layout, device: step_time(config, layout, KNOWN).total)


@pytest.mark.usefixtures("pretended")
def test_known_rates_come_out(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    row, path = calibration.calibrate("cpu")
    assert asdict(read_hardware(path)) == row
    for name in ("memory_bandwidth", "gemm_overhead", "operation_seconds", "attention_efficiency", "gemm_efficiency"):
        assert row[name] == pytest.approx(getattr(KNOWN, name), rel=1e-3), name
    assert row["flops"]["fp32"] == pytest.approx(2e11, rel=1e-3) and row["threads"] == torch.get_num_threads()


def test_a_rate_that_would_be_negative_is_left_out() -> None:
    rows = [([1.0, 1.0], 1.0), ([1.0, 2.0], 2.5), ([1.0, 4.0], 5.0)]
    found = calibration._fit(rows, [1.0] * 3)
    features = np.array([1.0, 2 / 2.5, 4 / 5])
    assert found == pytest.approx([0, features.sum() / (features @ features)])


def test_a_row_of_the_data_sheets_is_not_measured() -> None:
    with pytest.raises(InputError, match="--gpu cpu or --gpu cuda"):
        calibration.calibrate("h100")


def test_a_step_is_measured_with_the_trainer() -> None:
    config, layout = calibration._shape((16, 1, 2, 1, 32, 64, "llama", 16, 2), "fp32")
    device = torch.device("cpu")
    small = calibration.step_seconds(config, layout, device)
    large = calibration.step_seconds(config, replace(layout, batch_size=64), device)
    assert 0 < small < large
