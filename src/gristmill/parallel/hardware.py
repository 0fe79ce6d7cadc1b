"""Hardware rows of the planner: peak, memory and links of a device, by name, and those that were measured on this machine."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gristmill.core.errors import InputError
from gristmill.core.io import write_json
from gristmill.core.untrusted import quoted, quoted_path, read_untrusted_json

PRECISIONS = ("bf16", "fp8", "fp32")
MAX_RATE = 1e20  # of anything a second


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """A device and what joins it to others; FLOP/s, bytes and bytes a second of one device.

    Attributes:
        flops: dense peak by precision.
        memory_bytes: of a device, all of it.
        memory_bandwidth: of its memory (HBM).
        link_bandwidth: to the other devices of its node, in one direction (NVLink).
        network_bandwidth: to other nodes, a device.
        gemm_efficiency: share of the peak that large matrix products reach.
        gemm_overhead: an M x N x K product takes 1 + gemm_overhead (1/M + 1/N + 1/K) times as long.
        attention_efficiency: share of the peak that causal attention reaches.
        exposed_tp: share of the traffic of tensor parallelism that no computation hides.
        exposed_dp: the same of data parallelism, at least.
        straggling: a step takes longer by this share for every doubling of the devices beyond 64.
        operation_seconds: what an operation costs beside its work; it counts where models are small.
        threads: of one process, where the device is a CPU (0: it is none).
        kernels: whether the CPU's kernels were there, which keep fewer activations.
    """

    name: str
    flops: Mapping[str, float]
    memory_bytes: float
    memory_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float
    devices_per_node: int = 8
    gemm_efficiency: float = 0.692
    gemm_overhead: float = 100.0
    attention_efficiency: float = 0.5
    exposed_tp: float = 0.10
    exposed_dp: float = 0.3
    straggling: float = 0.0287
    operation_seconds: float = 0.0
    threads: int = 0
    kernels: bool = False

    @property
    def is_cpu(self) -> bool:
        return self.threads > 0

    def peak(self, precision: str) -> float:
        """Peak FLOP/s in a precision.

        Raises:
            InputError: the device has no products in it.
        """
        if precision not in self.flops:
            raise InputError(f"Choose --precision {' or '.join(self.flops)}: {self.name} has no figure for {precision}.")
        return self.flops[precision]


def _gpu(name: str, bf16: float, fp8: float, fp32: float, **rest: float) -> Hardware:
    flops = {"bf16": bf16, "fp8": fp8, "fp32": fp32}
    return Hardware(name=name, flops={key: value * 1e12 for key, value in flops.items() if value}, **rest)  # type: ignore[arg-type]


# Data sheets of the SXM cards, dense; fp32 without TF32. The efficiencies were fitted on H100 alone. The GB of their names are GiB.
HARDWARE = {
    "h100": _gpu("H100", 989, 1979, 67, memory_bytes=80 * 2**30, memory_bandwidth=3.35e12, link_bandwidth=450e9, network_bandwidth=50e9),
    "h200": _gpu("H200", 989, 1979, 67, memory_bytes=140 * 2**30, memory_bandwidth=4.8e12, link_bandwidth=450e9, network_bandwidth=50e9),
    "a100": _gpu("A100", 312, 0, 19.5, memory_bytes=80 * 2**30, memory_bandwidth=2.04e12, link_bandwidth=300e9, network_bandwidth=25e9),
    "b200": _gpu("B200", 2250, 4500, 75, memory_bytes=179 * 2**30, memory_bandwidth=8e12, link_bandwidth=900e9, network_bandwidth=50e9),
}


def calibration_path(kind: str) -> Path:
    """File of the hardware row that `gristmill plan --calibrate` measures on this machine, of its cpu or its cuda device."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gristmill" / f"hardware-{kind}.json"


def find_hardware(name: str) -> Hardware:
    """A hardware row by name: of a card, "cpu" or "cuda" (this machine's, once calibrated), or a JSON file as calibration writes it.

    Raises:
        InputError: there is none of that name, or the file holds none.
    """
    if name.lower() in HARDWARE:
        return HARDWARE[name.lower()]
    if name in ("cpu", "cuda"):
        path = calibration_path(name)
        if not path.is_file():
            raise InputError(f"Measure this machine first with `gristmill plan --calibrate --gpu {name}`: there is no {path}.")
        return read_hardware(path)
    if name.endswith(".json"):
        return read_hardware(Path(name))
    raise InputError(f"Choose --gpu {', '.join(HARDWARE)}, cpu, cuda or a .json file of a hardware row: there is no {quoted(name)}.")


def write_hardware(path: Path, hardware: Hardware) -> None:
    """Write a hardware row as JSON."""
    write_json(path, asdict(hardware))


def read_hardware(path: Path) -> Hardware:
    """A hardware row from a JSON file that anybody may have written.

    Raises:
        InputError: a key is missing, unknown or no positive number.
    """
    values, fields = read_untrusted_json(path), Hardware.__dataclass_fields__
    shown = quoted_path(path)
    for key in values:
        if key not in fields:
            raise InputError(f"Take {quoted(key)} out of {shown}: a hardware row has the keys {', '.join(fields)}.")
    zero = ("operation_seconds", "straggling", "exposed_tp", "exposed_dp", "gemm_overhead", "threads")
    row: dict[str, Any] = {"name": path.stem} | values
    for key, spec in fields.items():
        if key not in row:
            if isinstance(spec.default, int | float | str | bool):
                continue
            raise InputError(f"Give the hardware row {shown} the key {key!r}.")
        if key == "flops":
            if not isinstance(row[key], dict) or not row[key] or not set(row[key]) <= set(PRECISIONS):
                raise InputError(f"Give flops in {shown} a peak for some of {', '.join(PRECISIONS)}: it is {quoted(row[key])}.")
            numbers = {f"flops.{name}": value for name, value in row[key].items()}
        elif key in ("name", "kernels"):
            if not isinstance(row[key], str if key == "name" else bool):
                raise InputError(f"Correct {key} in {shown}: it is {quoted(row[key])}.")
            continue
        else:
            numbers = {key: row[key]}
        whole = key in ("devices_per_node", "threads")
        for name, value in numbers.items():
            right = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
            if not right or not (0 if key in zero else 1e-9) <= value <= MAX_RATE:
                raise InputError(f"Give {name} in {shown} a {'whole ' if whole else ''}number above zero: it is {quoted(value)}.")
    row["name"] = row["name"] if row["name"].isprintable() else quoted(row["name"])
    return Hardware(**row)
