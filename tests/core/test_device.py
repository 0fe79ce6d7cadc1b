"""A device by its name: one that is here, or a sentence that says what to do."""

import resource
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from gristmill.core.device import Arena, check_dtype, current_device, free_memory, pick_device
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


def test_a_gpu_without_bf16_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "An Old Card")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    check_dtype(torch.device("cpu"), torch.bfloat16)
    check_dtype(torch.device("cuda"), torch.float32)
    with pytest.raises(InputError, match=r"An Old Card does not compute in bf16: choose fp32\."):
        check_dtype(torch.device("cuda"), torch.bfloat16)


def test_free_memory_is_within_the_limit_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < (free := free_memory(torch.device("cpu"))) < 2**50
    size = resource.getpagesize() * int(Path("/proc/self/statm").read_text().split()[0])
    monkeypatch.setattr(resource, "getrlimit", lambda which: (size + free // 4, resource.RLIM_INFINITY))
    assert 0 < free_memory(torch.device("cpu")) <= free // 4 + 2**24
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1, 1))
    assert free_memory(torch.device("cpu")) == 0
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5, 19))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 8)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 6)
    assert free_memory(torch.device("cuda")) == 7, "what torch keeps for later too"


def test_a_gpu_is_the_current_one_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: asked.append(device) or nullcontext())
    with current_device(torch.device("cpu")):
        assert not asked
    with current_device(torch.device("cuda:1")):
        assert asked == [torch.device("cuda:1")]


def test_tensors_of_an_arena_are_apart_and_go_back_with_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Arena, "MAPPING", 4 << 20)
    arena = Arena()
    shapes = [((3, 5), torch.bfloat16), ((), torch.float32), ((0, 4), torch.int8), ((700_000,), torch.float32), ((1 << 21,), torch.float32)]
    tensors = [arena.zeros(shape, dtype) for shape, dtype in shapes]
    kept = arena.keep(torch.arange(12.0).view(3, 4).T)
    assert kept.is_contiguous() and torch.equal(kept, torch.arange(12.0).view(3, 4).T)
    for number, (tensor, (shape, dtype)) in enumerate(zip(tensors, shapes, strict=True)):
        assert (tuple(tensor.shape), tensor.dtype) == (shape, dtype) and not bool(tensor.any()), "nobody has written to it yet"
        assert not tensor.numel() or tensor.data_ptr() % 64 == 0
        tensor.fill_(number + 1)
    assert all(bool((tensor == number + 1).all()) for number, tensor in enumerate(tensors)) and kept[0, 1] == 4
    before = Path("/proc/self/statm").read_text().split()[1]
    del tensors, tensor, arena
    freed = (int(before) - int(Path("/proc/self/statm").read_text().split()[1])) * resource.getpagesize()
    assert freed > 7 << 20, "kept's mapping stays, the largest goes"
