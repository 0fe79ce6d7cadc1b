"""A device by its name: one that is here, or a sentence that says what to do."""

import pytest
import torch

from gristmill.core.device import pick_device
from gristmill.core.errors import InputError


def gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(("count", "name", "device"), [(0, "auto", "cpu"), (2, "auto", "cuda"), (2, "cpu", "cpu"), (2, "cuda:1", "cuda:1")])
def test_a_device_that_is_here(monkeypatch: pytest.MonkeyPatch, count: int, name: str, device: str) -> None:
    gpus(monkeypatch, count)
    assert pick_device(name) == torch.device(device) == pick_device(torch.device(device))


@pytest.mark.parametrize(
    ("count", "name", "words"),
    [
        (0, "cuda", "finds no GPU here; choose cpu or auto"),
        (2, "cuda:2", "only 2 GPUs; choose one of cuda:0 to cuda:1"),
        (0, "gpu", "unknown device 'gpu'; choose one of auto, cpu, cuda"),
        (0, "meta", "unknown device 'meta'"),
    ],
)
def test_a_device_that_is_not(monkeypatch: pytest.MonkeyPatch, count: int, name: str, words: str) -> None:
    gpus(monkeypatch, count)
    with pytest.raises(InputError, match=words):
        pick_device(name)


def test_an_apple_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(InputError, match="no Apple GPU here"):
        pick_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("mps") == torch.device("mps")
