"""A device without hardware: tensors that compute on the CPU but claim another device, and refuse the company of CPU tensors as a GPU's do.

It goes by the name "meta", the one device that autograd serves without a driver; but its tensors have values.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

OTHER = torch.device("meta")
CPU = torch.device("cpu")
# What a GPU's host waits for: numbers that it reads, and shapes that depend on values.
WAITS = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select, torch.ops.aten._unique2)
COPIES = (torch.ops.aten._to_copy, torch.ops.aten.to, torch.ops.aten.copy_)
# An index may lie on the CPU, as with a GPU; a scalar always may.
TAKE_CPU_INDICES = (torch.ops.aten.index, torch.ops.aten.index_put_, torch.ops.aten.index_put, torch.ops.aten._index_put_impl_)


class OtherTensor(torch.Tensor):
    """`inner`, a tensor of the CPU, on the other device."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "OtherTensor":
        strides, offset = inner.stride(), inner.storage_offset()
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=strides, storage_offset=offset, dtype=inner.dtype, device=OTHER
        )
        tensor.inner = inner
        return tensor

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        return _run(function, args, kwargs or {})


waits: list[str] = []  # since somebody emptied it


def _inner(x: Any) -> Any:
    """The same on the CPU."""
    return x.inner if isinstance(x, OtherTensor) else CPU if isinstance(x, torch.device) else x


def _run(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    kind = function.overloadpacket
    there = any(isinstance(x, OtherTensor) for x in tree_leaves((args, kwargs)))
    if there and kind not in COPIES:
        checked = (args[0], args[2:], kwargs) if kind in TAKE_CPU_INDICES else (args, kwargs)
        for x in tree_leaves(checked):
            if isinstance(x, torch.Tensor) and not isinstance(x, OtherTensor) and x.ndim:
                raise RuntimeError(f"{function} got a tensor {list(x.shape)} of the CPU beside one of the other device")
    devices = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.device)]
    if devices:
        there = devices[0] == OTHER
    elif kind is torch.ops.aten.copy_:
        there = isinstance(args[0], OtherTensor)
    if any(isinstance(x, OtherTensor) for x in tree_leaves((args, kwargs))) and (kind in WAITS or (kind in COPIES and not there)):
        waits.append(str(kind))
    result = function(*tree_map(_inner, args), **tree_map(_inner, kwargs))
    known = {id(_inner(x)): x for x in tree_leaves((args, kwargs)) if isinstance(x, OtherTensor)}

    def wrap(x: Any) -> Any:
        if not there or not isinstance(x, torch.Tensor):
            return x
        return known[id(x)] if id(x) in known else OtherTensor(x)  # an operation in place gives its argument back

    return tree_map(wrap, result)


class _OtherDevice(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        return _run(function, args, kwargs or {})


class _BelowDispatch(TorchFunctionMode):
    """`torch.tensor` and `tolist` work beneath dispatch: the one's tensor is made here and moved, the other's is moved here."""

    def __torch_function__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.tensor and kwargs.get("device") == OTHER:
            return torch.tensor(*args, **kwargs | {"device": CPU}).to(OTHER)
        if function is torch.Tensor.tolist:
            return args[0].cpu().numpy().tolist()
        return function(*args, **kwargs)


@contextmanager
def other_device() -> Iterator[torch.device]:
    """The other device, while it is there."""
    with pytest.MonkeyPatch.context() as patch, _OtherDevice(), _BelowDispatch():
        patch.setattr(sys.modules["torch.optim.optimizer"], "_get_fused_kernels_supported_devices", lambda: ["cpu", "meta"])
        yield OTHER
