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
    """Data-parallel group: every process has another share of each step's samples, and of each weight.

    Args:
        devices: the processes as `torch` knows them; None for one process alone.
    """

    def __init__(self, devices: "DeviceMesh | None" = None) -> None:
        self._devices = devices
        self.size = 1 if devices is None else devices.size()
        self.rank = 0 if devices is None else devices.get_rank()

    @property
    def is_writer(self) -> bool:
        """Whether this process alone writes files and talks to the user."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """The JSON values of all processes, in their order."""
        if self._devices is None:
            return [value]
        import torch.distributed as dist

        group, device = self._devices.get_group(), self._devices.device_type
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
        """Cut every weight over the processes, in place (FSDP2): a block's are gathered when it computes, its gradients are added up.

        Sums are never divided: the trainer's divisor counts the terms of all processes.
        """
        if self._devices is None:
            return
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        blocks = next(part for module in model.modules() if isinstance(part := getattr(module, "blocks", None), nn.ModuleList))
        for module in (*blocks, model):
            fully_shard(module, mesh=self._devices)
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no sum with a factor
        # the states of the trained rows may be a view of those with padding; nothing changes them in place
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor", category=UserWarning)
        if hasattr(model, "hidden"):
            register_fsdp_forward_method(model, "hidden")


def accumulate(model: nn.Module, *, last: bool) -> None:
    """Say whether the next backward pass is the step's last, after which gradients are added up over the processes."""
    if any(is_sharded(parameter) for parameter in model.parameters()):
        cast(Any, model).set_requires_gradient_sync(last)


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is cut over processes (torch's DTensor)."""
    return hasattr(tensor, "placements")


def whole(tensor: Tensor) -> Tensor:
    """A tensor with the parts of all processes (collective); one that is not cut is returned as it is."""
    return cast(Any, tensor).full_tensor() if is_sharded(tensor) else tensor


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, cut as another one is."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    cut = cast(Any, like)
    return distribute_tensor(tensor.to(like.device), cut.device_mesh, cut.placements, src_data_rank=None)


def skeleton(model: nn.Module) -> nn.Module:
    """A copy of a model without memory for its weights, which `load_state_dict(.., assign=True)` gives back."""
    memo = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, memo)


@contextmanager
def process_mesh(device: torch.device) -> Iterator[Mesh]:
    """The mesh of the processes that torchrun started (one process without it), until the end of the block.

    Args:
        device: where this process trains.

    Raises:
        InputError: torchrun's variables are not whole, or the device is the GPU of another process.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
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
        yield Mesh(init_device_mesh(device.type, (size,), mesh_dim_names=("dp",)))
        dist.barrier()  # nobody leaves while another still needs him
    finally:
        dist.destroy_process_group()
