"""Device mesh: the processes of one training, and the few operations that they share. With one process each is the identity.

No other module imports `torch.distributed`. Every operation is collective: all processes call it, in the same order.
"""

import copy
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from gristmill.core.errors import InputError

if TYPE_CHECKING:  # one process does not pay for the import
    from torch.distributed.device_mesh import DeviceMesh

TIMEOUT = timedelta(minutes=10)  # of one collective operation: it waits for the slowest process, and for one that is gone


class Mesh:
    """Processes of one training, in groups: those with other shares of a step's samples, and those with other parts of its matrices.

    Args:
        devices: the processes as `torch` knows them, with an axis "dp" and, where it is more than one, "tp"; None for one process alone.

    Attributes:
        data: the data-parallel group: every process has another share of each step's samples, and of each weight.
        tensor: the tensor-parallel group; None where it is of one process.
    """

    def __init__(self, devices: "DeviceMesh | None" = None) -> None:
        self._devices = devices
        self.size = 1 if devices is None else devices.size()
        self.rank = 0 if devices is None else devices.get_local_rank() if devices.ndim == 1 else devices.get_rank()
        self.data, self.tensor = self, None
        if devices is not None and devices.ndim > 1:
            self.data, self.tensor = Mesh(devices["dp"]), TensorGroup(devices["tp"])

    @property
    def is_writer(self) -> bool:
        """Whether this process alone writes files and talks to the user."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """The JSON values of all processes, in their order."""
        if self._devices is None:
            return [value]
        import torch.distributed as dist

        group = self._devices.get_group() if self._devices.ndim == 1 else dist.group.WORLD
        device = self._devices.device_type
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
        sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(text)], device=device), group=group)
        longest = int(max(sizes))
        parts = [torch.zeros(longest, dtype=torch.uint8, device=device) for _ in range(self.size)]
        dist.all_gather(parts, nn.functional.pad(text, (0, longest - len(text))), group=group)
        return [json.loads(bytes(part[: int(size)].tolist())) for part, size in zip(parts, sizes, strict=True)]

    def first(self, value: Any) -> Any:
        """The JSON value of the first process: what depends on a clock or a disk is decided by it alone."""
        return self.gather(value)[0]

    def agree(self, value: Any, what: str) -> None:
        """Raise InputError on every process unless all have the same JSON value, described by `what`."""
        values = self.gather(value)
        if any(other != values[0] for other in values):
            raise InputError(f"The processes have different {what} ({values}): start them all with one command on the same files.")

    def shard(self, model: nn.Module) -> None:
        """Cut every weight over the data-parallel group, in place (FSDP2): a block's are gathered when it computes, its gradients added up.

        Sums are never divided: the trainer's divisor counts the terms of all processes.
        """
        devices = self.data._devices
        if devices is None or devices.size() == 1:
            return
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        blocks = next(part for module in model.modules() if isinstance(part := getattr(module, "blocks", None), nn.ModuleDict))
        for module in (*blocks.values(), model):
            sharded = cast(Any, fully_shard(module, mesh=devices))
            sharded.set_gradient_divide_factor(1.0)
            sharded.set_force_sum_reduction_for_comms(True)  # gloo has no sum with a factor
        # the states of the trained rows may be a view of those with padding; nothing changes them in place
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor", category=UserWarning)
        if hasattr(model, "hidden"):
            register_fsdp_forward_method(model, "hidden")


class TensorGroup:
    """Tensor-parallel group: its processes compute with parts of one matrix, on the same samples. First axes are the ones that are cut."""

    def __init__(self, devices: "DeviceMesh") -> None:
        self._devices = devices
        self.size, self.rank = devices.size(), devices.get_local_rank()

    def gather(self, x: Tensor) -> Tensor:
        """All processes' tensors of one shape, end to end."""
        import torch.distributed as dist

        out = x.new_empty(self.size * len(x), *x.shape[1:])
        dist.all_gather_into_tensor(out, x.contiguous(), group=self._devices.get_group())
        return out

    def scatter(self, x: Tensor) -> Tensor:
        """This process's part of the sum of all processes' tensors."""
        import torch.distributed as dist

        out = x.new_empty(len(x) // self.size, *x.shape[1:])
        dist.reduce_scatter_tensor(out, x.contiguous(), group=self._devices.get_group())
        return out

    def sum(self, x: Tensor) -> Tensor:
        """Sum of all processes' tensors."""
        import torch.distributed as dist

        out = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(out, group=self._devices.get_group())
        return out

    def cut(self, parameter: Tensor, dim: int | None) -> nn.Parameter:
        """A parameter that all have, of which each keeps its part along an axis, or all of it (None)."""
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor

        placement = Replicate() if dim is None else Shard(dim)
        return nn.Parameter(distribute_tensor(parameter.detach(), self._devices, [placement], src_data_rank=None))


def local(tensor: Tensor) -> Tensor:
    """The part that this process computes with; gradients flow through."""
    return cast(Any, tensor).to_local() if is_sharded(tensor) else tensor


def accumulate(model: nn.Module, *, last: bool) -> None:
    """Say whether the next backward pass is the step's last, after which gradients are added up over the data-parallel group."""
    if hasattr(model, "set_requires_gradient_sync"):
        cast(Any, model).set_requires_gradient_sync(last)


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is cut over processes (torch's DTensor)."""
    return hasattr(tensor, "placements")


def whole(tensor: Tensor) -> Tensor:
    """A tensor with the parts of all processes (collective); one that is not cut is returned as it is."""
    return cast(Any, tensor).full_tensor() if is_sharded(tensor) else tensor


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, cut as another one is; rows that it lacks are padding, and zero."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    cut = cast(Any, like)
    if tensor.ndim and len(tensor) < len(like):
        tensor = nn.functional.pad(tensor, (0,) * (2 * tensor.ndim - 1) + (len(like) - len(tensor),))
    return distribute_tensor(tensor.to(like.device), cut.device_mesh, cut.placements, src_data_rank=None)


def skeleton(model: nn.Module) -> nn.Module:
    """A copy of a model without memory for its weights, which `load_state_dict(.., assign=True)` gives back."""
    memo = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, memo)


@contextmanager
def process_mesh(device: torch.device, tp: int = 1) -> Iterator[Mesh]:
    """The mesh of the processes that torchrun started (one process without it), until the end of the block.

    Args:
        device: where this process trains.
        tp: neighbouring processes that share out the matrices; the others share out the samples.

    Raises:
        InputError: torchrun's variables are not whole, the processes are no multiple of `tp`, or the device is the GPU of another one.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if tp < 1 or size % tp:
        raise InputError(
            f"Start a multiple of --tp processes (`torchrun --nproc-per-node N -m gristmill ...`): there are {size}, and --tp is {tp}."
        )
    if size == 1:
        yield Mesh()
        return
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise InputError(
            f"WORLD_SIZE is {size} but {', '.join(missing)} not set: start with `torchrun --nproc-per-node N -m gristmill ...`."
        )
    if device.type == "cuda" and device.index != int(os.environ["LOCAL_RANK"]):
        raise InputError(f"device is {device}, and each process needs a GPU of its own: say cuda or auto, which share them out.")
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        shape, names = ((size,), ("dp",)) if tp == 1 else ((size // tp, tp), ("dp", "tp"))
        yield Mesh(init_device_mesh(device.type, shape, mesh_dim_names=names))
        dist.barrier()  # nobody leaves while another still needs him
    finally:
        dist.destroy_process_group()
