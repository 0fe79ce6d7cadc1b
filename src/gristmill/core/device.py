"""Device selection: from what a recipe or a command says to a torch.device that exists here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gristmill.core.errors import InputError

if TYPE_CHECKING:
    import torch


def pick_device(name: str | torch.device = "auto") -> torch.device:
    """The device of that name: "auto" (a GPU where torch finds one, else the CPU), "cpu", "cuda", "cuda:1", "mps".

    Raises:
        InputError: no such device, or none here.
    """
    import torch

    if isinstance(name, torch.device):
        return name
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise InputError(f"unknown device {name!r}; choose one of auto, cpu, cuda, cuda:N, mps")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            raise InputError(f"device is {name!r} but torch finds no GPU here; choose cpu or auto, or install a build of torch with CUDA")
        if (device.index or 0) >= count:
            raise InputError(f"device is {name!r} but there are only {count} GPUs; choose one of cuda:0 to cuda:{count - 1}")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError(f"device is {name!r} but torch finds no Apple GPU here; choose cpu or auto")
    return device
