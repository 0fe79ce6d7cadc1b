"""Safetensors files, written tensor by tensor and read piece by piece: what stands in memory already is not held a second time."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gristmill.core.io import replacing

# Names of types, in the order in which the format lays them out.
TYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in TYPES.items()}


def write_tensors(path: Path, tensors: Mapping[str, Tensor | list[Tensor]], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file atomically, as `replacing` does: the bytes that safetensors' own `save_file` gives.

    Tensors may be on any device, share memory and be views. A list is one tensor whose rows lie in several places.

    Raises:
        InputError: the disk is full or the place cannot be written.
    """
    order = list(TYPES)
    parts = {name: [tensor] if isinstance(tensor, Tensor) else tensor for name, tensor in tensors.items()}
    names = sorted(parts, key=lambda name: (order.index(parts[name][0].dtype), name.encode()))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        first, start, end = parts[name][0], end, end + sum(part.nbytes for part in parts[name])
        shape = list(first.shape) if len(parts[name]) == 1 else [sum(map(len, parts[name])), *first.shape[1:]]
        header[name] = {"dtype": TYPES[first.dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            for part in parts[name]:
                file.write(part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in a safetensors file."""

    path: Path
    dtype: torch.dtype
    start: int
    end: int

    def pieces(self, num_values: int) -> Iterator[Tensor]:
        """Read its values, so many at a time; each piece takes the place of the one before.

        Raises:
            ValueError: the file ends before.
        """
        buffer = bytearray(num_values * self.dtype.itemsize)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.start)
            for start in range(self.start, self.end, len(buffer)):
                wanted = memoryview(buffer)[: self.end - start]
                filled = 0
                while filled < len(wanted):
                    if not (more := file.readinto(wanted[filled:])):
                        raise ValueError("the file is cut off")
                    filled += more
                yield torch.frombuffer(wanted, dtype=self.dtype)


def places(path: Path) -> dict[str, Place]:
    """Where the tensors of a file lie, whose header safetensors has accepted; those of types that we do not know are left out."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    known = {name: one for name, one in header.items() if one["dtype"] in DTYPES}
    return {name: Place(path, DTYPES[one["dtype"]], *(8 + length + at for at in one["data_offsets"])) for name, one in known.items()}
