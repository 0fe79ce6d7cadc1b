"""Safetensors files: byte for byte what the library writes, and whole or not at all."""

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gristmill.core.errors import InputError
from gristmill.core.tensors import TYPES, places, write_tensors


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_the_bytes_are_those_of_the_library(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    tensors = {f"{name}.{number}": torch.arange(5 - number).to(dtype) for number in (1, 0) for dtype, name in TYPES.items()}
    tensors |= {"scalar": torch.tensor(1.5), "none": torch.zeros(0, 4), 'd\u00e9"\n': torch.ones(1), "B": torch.ones(2), "a": torch.ones(2)}
    save_file(tensors, tmp_path / "library", metadata=metadata)
    write_tensors(tmp_path / "ours", tensors, metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "library").read_bytes()


def test_views_and_parts_of_one_memory_are_written(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    views = {"rows": whole[1:], "columns": whole[:, 1:3], "turned": whole.T, "whole": whole}
    save_file({name: view.clone(memory_format=torch.contiguous_format) for name, view in views.items()}, tmp_path / "library")
    write_tensors(tmp_path / "ours", views)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "library").read_bytes()


def test_a_tensor_whose_rows_lie_in_several_places_is_written_as_one(tmp_path: Path) -> None:
    whole = torch.arange(24.0).view(6, 4)
    write_tensors(tmp_path / "whole", {"a": whole, "b": whole[:, 0]})
    write_tensors(tmp_path / "parts", {"a": [whole[:2], whole[2:3], whole[3:]], "b": [whole[:4, 0], whole[4:, 0]]})
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    write_tensors(path, {"a": torch.ones(2)})
    before = path.read_bytes()

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"model\.safetensors cannot be written .*the disk of .* is full"):
        write_tensors(path, {"a": torch.zeros(2)})
    assert path.read_bytes() == before and [one.name for one in tmp_path.iterdir()] == [path.name]


def test_tensors_are_read_in_pieces(tmp_path: Path) -> None:
    tensors = {"b": torch.randn(7, 5).bfloat16(), "a": torch.randn(3), "none": torch.zeros(0, 4), "long": torch.arange(9)}
    write_tensors(tmp_path / "file", tensors)
    found = places(tmp_path / "file")
    for name, tensor in tensors.items():
        pieces = [piece.clone() for piece in found[name].pieces(4)]
        assert [len(piece) for piece in pieces] == [len(part) for part in tensor.reshape(-1).split(4) if len(part)]
        assert torch.equal(torch.cat([torch.empty(0, dtype=tensor.dtype), *pieces]), tensor.reshape(-1))
    os.truncate(tmp_path / "file", (tmp_path / "file").stat().st_size - 2)
    with pytest.raises(ValueError, match="cut off"):
        list(found["b"].pieces(4))
