"""The type that a model folder computes in for inference, where it is left to the checkpoint and the device."""

from functools import cache
from pathlib import Path
from typing import Literal, cast

import torch

from gristmill.core.device import check_dtype, pick_precision
from gristmill.core.echo import echo, sentence
from gristmill.core.untrusted import quoted_path
from gristmill.model.adapters import base_of, is_adapter
from gristmill.model.hf import stored_dtype
from gristmill.model.transformer import PRECISIONS

Precision = Literal["fp32", "bf16"]


def pick_dtype(dtype: str, folder: Path, device: torch.device, *, quiet: bool = False) -> Precision:
    """What inference computes in: "fp32" and "bf16" are what was asked for; "auto" is the checkpoint's own type, as in vLLM.

    A checkpoint in sixteen bits is bf16 where the device is made for it (`pick_precision`), else fp32. One in fp32 stays so on a CPU. A GPU
    computes in bf16 whatever is stored. Of an adapter the base counts. What "auto" became is said once a process, where it is not quiet.

    Raises:
        InputError: the GPU has no arithmetic of that type, or the folder holds no model.
    """
    picked = dtype
    if dtype == "auto":
        stored = stored_dtype(base_of(folder) if is_adapter(folder) else folder)
        picked = pick_precision(device) if device.type == "cuda" or stored.itemsize == 2 else "fp32"
        if not quiet:
            faster = "; bf16 is faster on this device" if picked != pick_precision(device) else ""
            _say(f"{quoted_path(folder)} is stored in {str(stored).removeprefix('torch.')} and computes in {picked} (dtype auto{faster}).")
    check_dtype(device, PRECISIONS[picked])
    return cast(Precision, picked)


@cache
def _say(line: str) -> None:
    echo(sentence(line), err=True)
