"""Device mesh: the processes of one training, and the few operations that they share. With one process each is the identity.

No other module imports `torch.distributed`. Every operation is collective: all processes call it, in the same order.
"""

import copy
import json
import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from gristmill.core.errors import InputError
from gristmill.parallel.layout import check_schedule

if TYPE_CHECKING:  # one process does not pay for the import
    from torch.distributed.device_mesh import DeviceMesh

TIMEOUT = timedelta(minutes=10)  # of one collective operation: it waits for the slowest process, and for one that is gone

SIZE_BYTES, SHORT = 8, 1016  # of a text's length, and of what goes with it at once

BEAT = {"job": "wait"}  # no order: says that the first process is alive
AGAIN = "start them all again, and training goes on from its last checkpoint"

# what gloo says of a process that is gone, and of one that does not answer
_CLOSED = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed")
_SILENT = ("Timed out waiting", "Application timeout caused pair closure")


@dataclass(frozen=True)
class ParallelDims:
    """Ways of parallelism beside data parallel, which is what is left of the processes.

    Attributes:
        tp: processes that share out every matrix (tensor parallel).
        cp: processes that share out the tokens of every document (context parallel).
        pp: processes that share out the layers (pipeline parallel).
        vp: virtual stages of each of them: the schedule is 1F1B with 1, and interleaved above.
        schedule: of the pipeline, out of `layout.SCHEDULES`.
        replicate: what shares out samples has all weights, also of a large model (DDP, not FSDP2).
    """

    tp: int = 1
    cp: int = 1
    pp: int = 1
    vp: int = 1
    schedule: str = "1f1b"
    replicate: bool = False

    @property
    def together(self) -> int:
        """Processes that train on the same samples."""
        return self.tp * self.cp * self.pp

    def check(self) -> None:
        """Raise InputError where the options contradict each other."""
        if min(self.tp, self.cp, self.pp, self.vp) < 1:
            raise InputError(f"Give --tp, --cp, --pp and --vp numbers above zero: they are {self.tp}, {self.cp}, {self.pp} and {self.vp}.")
        if self.pp == 1 and self.vp > 1:
            raise InputError(f"Leave --vp out, or raise --pp: without a pipeline there are no virtual stages (--vp is {self.vp}).")
        check_schedule(self.schedule, self.vp)


class Group:
    """Processes that exchange JSON values: all of a training, or those of one axis of its mesh.

    Args:
        devices: one axis of a mesh; None for one process alone.
    """

    def __init__(self, devices: "DeviceMesh | None" = None) -> None:
        self.devices = devices
        if devices is not None and devices.ndim == 1:
            from torch.distributed.distributed_c10d import _set_pg_timeout

            _set_pg_timeout(TIMEOUT, devices.get_group())  # torch gives groups of a mesh half an hour
        self.size = 1 if devices is None else devices.size()
        self.rank = 0 if devices is None else devices.get_local_rank() if devices.ndim == 1 else devices.get_rank()

    def _group(self) -> Any:
        assert self.devices is not None
        return self.devices.get_group()

    def gather(self, value: Any) -> list[Any]:
        """The JSON values of all processes, in their order."""
        return [json.loads(text) for text in self._texts(value)] if self.size > 1 and self.devices is not None else [value]

    def to_first(self, value: Any) -> list[Any]:
        """The JSON values of all processes for the first one, and nothing for the others, which need not read them."""
        if self.size == 1 or self.devices is None:
            return [value]
        texts = self._texts(value)
        return [json.loads(text) for text in texts] if self.rank == 0 else []

    def _texts(self, value: Any) -> list[bytes]:
        """The values of all as text: one exchange where all are short, since each costs more than what it carries."""
        import torch.distributed as dist

        assert self.devices is not None
        group, device = self._group(), self.devices.device_type
        text = json.dumps(value).encode()
        size = len(text).to_bytes(SIZE_BYTES, "little")

        def exchange(mine: bytes, length: int) -> list[bytes]:
            given = torch.frombuffer(bytearray(mine.ljust(length, b"\0")), dtype=torch.uint8).to(device)
            found = [torch.empty_like(given) for _ in range(self.size)]
            dist.all_gather(found, given, group=group)
            return [part.cpu().numpy().tobytes() for part in found]

        heads = exchange(size + text[:SHORT], SIZE_BYTES + SHORT)
        sizes = [int.from_bytes(head[:SIZE_BYTES], "little") for head in heads]
        rests = exchange(text[SHORT:], max(sizes) - SHORT) if max(sizes) > SHORT else [b""] * self.size
        return [(head[SIZE_BYTES:] + rest)[:length] for head, rest, length in zip(heads, rests, sizes, strict=True)]

    def first(self, value: Any) -> Any:
        """The JSON value of the first process: what depends on a clock or a disk is decided by it alone."""
        return self.gather(value)[0]

    def agree(self, value: Any, what: str) -> None:
        """Raise InputError on every process unless all have the same JSON value, described by `what`."""
        values = self.gather(value)
        if any(other != values[0] for other in values):
            raise InputError(f"The processes have different {what} ({values}): start them all with one command on the same files.")

    @property
    def device(self) -> torch.device:
        """Where tensors are that the processes exchange."""
        return torch.device("cpu" if self.devices is None else self.devices.device_type)

    def all_to_all(self, given: Sequence[Sequence[Tensor]], into: Sequence[Sequence[Tensor]], dtype: torch.dtype) -> None:
        """Give each process some tensors of a type, and copy what each gives into others of the same sizes."""
        import torch.distributed as dist

        places = [x for tensors in into for x in tensors]
        sent = torch.cat([torch.empty(0, dtype=dtype, device=self.device), *(x.flatten() for tensors in given for x in tensors)])
        got = sent.new_empty(sum(x.numel() for x in places))
        out_sizes, in_sizes = ([sum(x.nbytes for x in tensors) for tensors in side] for side in (into, given))
        dist.all_to_all_single(got.view(torch.uint8), sent.view(torch.uint8), out_sizes, in_sizes, group=self._group())
        for place, values in zip(places, got.split([x.numel() for x in places]), strict=True):
            place.copy_(values.view_as(place))

    def add_up_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Add gradients up over the processes, of parameters that all have whole; one without a gradient has zeros."""
        if self.size == 1 or not parameters:
            return
        import torch.distributed as dist

        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat, group=self._group())
        for parameter, grad, part in zip(parameters, grads, flat.split([grad.numel() for grad in grads]), strict=True):
            parameter.grad = grad.copy_(part.view_as(grad))


class Mesh(Group):
    """Processes of one training, in groups: those with other samples, other layers, other tokens, and other parts of matrices.

    Args:
        devices: the processes as `torch` knows them, with axes "pp", "dp", "cp" and "tp"; None for one process alone.
        dims: what the axes are made of.

    Attributes:
        data: the data-parallel group: every process has another share of each step's samples.
        shards: those with other samples or other tokens, over which a weight is cut beside tensor parallelism.
        pipeline, context, tensor: groups of the other ways; None where they are of one process.
    """

    def __init__(self, devices: "DeviceMesh | None" = None, dims: ParallelDims = ParallelDims()) -> None:
        super().__init__(devices)
        self.dims, self.data, self.shards = dims, Group(None), Group(None)
        self.pipeline: PipelineGroup | None = None
        self.context: TensorGroup | None = None
        self.tensor: TensorGroup | None = None
        if devices is not None:
            self.data = self.shards = Group(devices["dp"])
            if dims.cp > 1:
                self.shards = Group(devices["dp", "cp"]._flatten("dp_cp"))
            self.pipeline = PipelineGroup(devices["pp"]) if dims.pp > 1 else None
            self.context = TensorGroup(devices["cp"]) if dims.cp > 1 else None
            self.tensor = TensorGroup(devices["tp"]) if dims.tp > 1 else None

    def _group(self) -> Any:
        import torch.distributed as dist

        return dist.group.WORLD

    @property
    def is_writer(self) -> bool:
        """Whether this process alone writes files and talks to the user."""
        return self.rank == 0

    def gather_losses(self, value: Any) -> list[Any]:
        """The JSON values of processes with other samples, and of those of their pipelines: the last stage alone has losses."""
        values = self.data.gather(value)
        return values if self.pipeline is None else [one for part in self.pipeline.gather(values) for one in part]

    def layer_group(self) -> Group:
        """Processes that have parts of the same layers (collective)."""
        if self.devices is None or self.pipeline is None:
            return self
        return Group(self.devices["dp", "cp", "tp"]._flatten("layers"))

    def shard(self, model: nn.Module) -> None:
        """Cut every weight over the data-parallel and context-parallel groups, in place (FSDP2): a block's are gathered when it
        computes, its gradients added up.

        Sums are never divided: the trainer's divisor counts the terms of all processes.
        """
        if self.shards.size == 1:
            return
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        blocks = next(part for module in model.modules() if isinstance(part := getattr(module, "blocks", None), nn.ModuleDict))
        for module in (*blocks.values(), model):
            # a pipeline would gather a block's weights again for every micro-batch
            sharded = cast(
                Any, fully_shard(module, mesh=self.shards.devices, reshard_after_forward=None if self.pipeline is None else False)
            )
            sharded.set_gradient_divide_factor(1.0)
            sharded.set_force_sum_reduction_for_comms(True)  # gloo has no sum with a factor
        # the states of the trained rows may be a view of those with padding; nothing changes them in place
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor", category=UserWarning)
        if hasattr(model, "hidden"):
            register_fsdp_forward_method(model, "hidden")


def background_group(mesh: Mesh) -> Any:
    """All processes of a mesh once more, to exchange what lies in the memory of the CPU beside the training."""
    if mesh.size == 1:
        return None
    import torch.distributed as dist

    return dist.new_group(timeout=TIMEOUT, backend="gloo")


class Orders:
    """Orders, as JSON objects, from the first process to the others, which wait for the next one as long as the first is alive.

    While they wait, a thread of the first sends heartbeats, so that a process that is stopped is found out by the group's timeout.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._group = background_group(mesh)
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._listening = True  # the others, as far as the first process knows
        self._fault: BaseException | None = None
        if mesh.size > 1 and mesh.is_writer:
            threading.Thread(target=self._beat, args=(TIMEOUT.total_seconds() / 10,), daemon=True).start()

    def give(self, order: dict[str, Any]) -> None:
        """Tell all others, who do not listen until `done`.

        Raises:
            InputError: one of them has ended or does not answer.
        """
        with self._lock:
            self._listening = False
            if self._fault is None:
                self._send(order)
            if self._fault is not None:
                raise _lost(self._fault) or self._fault

    def done(self) -> None:
        """Say that what all did by an order is done."""
        self._listening = True

    def dismiss(self) -> None:
        """Tell all others, if they are still there, that there are no more orders."""
        self._ended.set()
        with suppress(InputError):
            self.give({})

    def take(self) -> dict[str, Any]:
        """The next order; empty when there is none any more.

        Raises:
            InputError: the first process has ended without one, or does not answer.
        """
        order: dict[str, Any] = BEAT
        try:
            while order == BEAT:
                size = int(self._broadcast(torch.zeros(1, dtype=torch.int64)))
                order = json.loads(self._broadcast(torch.zeros(size, dtype=torch.uint8)).numpy().tobytes())
        except RuntimeError as e:
            if any(sign in str(e) for sign in _SILENT):
                raise _silent("The first process of this run") from e
            raise InputError("The first process has ended: it says why.") from e
        return order

    def _beat(self, seconds: float) -> None:
        while self._fault is None and not self._ended.wait(seconds):
            with self._lock:
                if self._listening:
                    self._send(BEAT)

    def _send(self, order: dict[str, Any]) -> None:
        text = torch.frombuffer(bytearray(json.dumps(order).encode()), dtype=torch.uint8)
        try:
            self._broadcast(torch.tensor([len(text)]))
            self._broadcast(text)
        except RuntimeError as e:
            self._fault = e

    def _broadcast(self, x: Tensor) -> Tensor:
        import torch.distributed as dist

        dist.broadcast(x, group=self._group, group_src=0)
        return x


class PipelineGroup(Group):
    """Pipeline-parallel group: its processes have other layers of one model."""

    def __init__(self, devices: "DeviceMesh") -> None:
        super().__init__(devices)
        self.process_group = devices.get_group()

    def broadcast(self, x: Tensor, owner: int) -> Tensor:
        """The tensor of one process, for all; what the others give has its shape and is overwritten."""
        import torch.distributed as dist

        x = x.contiguous()
        dist.broadcast(x, group=self.process_group, group_src=owner)
        return x

    def exchange(self, x: Tensor, peer: int) -> Tensor:
        """The tensor that another process gives for this one."""
        import torch.distributed as dist

        got = torch.empty_like(x, memory_format=torch.contiguous_format)
        ways = ((dist.isend, x.contiguous()), (dist.irecv, got))
        works = dist.batch_isend_irecv([dist.P2POp(way, y, group=self.process_group, group_peer=peer) for way, y in ways])
        for work in works:
            work.wait()
        return got


class TensorGroup(Group):
    """Group of tensor or context parallelism: its processes compute with parts of one matrix, or of documents, on the same samples.

    First axes are the ones that are cut.
    """

    def gather_rows(self, x: Tensor) -> Tensor:
        """All processes' tensors of one shape, end to end."""
        assert self.devices is not None
        import torch.distributed as dist

        out = x.new_empty(self.size * len(x), *x.shape[1:])
        dist.all_gather_into_tensor(out, x.contiguous(), group=self._group())
        return out

    def scatter(self, x: Tensor) -> Tensor:
        """This process's part of the sum of all processes' tensors."""
        import torch.distributed as dist

        assert self.devices is not None
        out = x.new_empty(len(x) // self.size, *x.shape[1:])
        dist.reduce_scatter_tensor(out, x.contiguous(), group=self._group())
        return out

    def sum(self, x: Tensor) -> Tensor:
        """Sum of all processes' tensors."""
        import torch.distributed as dist

        assert self.devices is not None
        out = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(out, group=self._group())
        return out

    def cut(self, parameter: Tensor, dim: int | None) -> nn.Parameter:
        """A parameter that all have, of which each keeps its part along an axis, or all of it (None)."""
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor

        placement = Replicate() if dim is None else Shard(dim)
        cut = distribute_tensor(parameter.detach(), self.devices, [placement], src_data_rank=None)
        return nn.Parameter(cut, requires_grad=parameter.requires_grad)


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


def place_of(tensor: Tensor) -> list[tuple[int, int]]:
    """Where this process's part of a tensor begins and ends on each axis."""
    if not is_sharded(tensor):
        return [(0, size) for size in tensor.shape]
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    cut = cast(Any, tensor)
    sizes, begins = compute_local_shape_and_global_offset(tensor.shape, cut.device_mesh, cut.placements)
    return [(begin, begin + size) for begin, size in zip(begins, sizes, strict=True)]


def whole(tensor: Tensor) -> Tensor:
    """A tensor with the parts of all processes (collective); one that is not cut is returned as it is."""
    return cast(Any, tensor).full_tensor() if is_sharded(tensor) else tensor


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, cut as another one is, unless it is already; rows that it lacks are padding, and zero."""
    if not is_sharded(like) or is_sharded(tensor):
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


def _silent(who: str) -> InputError:
    return InputError(f"{who} has not answered for {TIMEOUT.total_seconds() / 60:g} minutes, it may be stopped: {AGAIN}.")


def _lost(error: BaseException | None) -> InputError | None:
    """What an operation's failure says of another process; None where it is another fault."""
    while error is not None:
        words = str(error)
        if any(sign in words for sign in _CLOSED):
            return InputError(f"Another process of this training has ended, and says why unless it was killed: {AGAIN}.")
        if any(sign in words for sign in _SILENT):
            return _silent("Another process of this training")
        error = error.__cause__
    return None


def new_mesh(device: torch.device, size: int, dims: ParallelDims) -> Mesh:
    """A mesh of processes that are connected already."""
    from torch.distributed.device_mesh import init_device_mesh

    shape = (dims.pp, size // dims.together, dims.cp, dims.tp)
    return Mesh(init_device_mesh(device.type, shape, mesh_dim_names=("pp", "dp", "cp", "tp")), dims)


@contextmanager
def process_mesh(device: torch.device, dims: ParallelDims = ParallelDims()) -> Iterator[Mesh]:
    """The mesh of the processes that torchrun started (one process without it), until the end of the block.

    Args:
        device: where this process trains.
        dims: what neighbouring processes share out beside the samples.

    Raises:
        InputError: torchrun's variables are not whole, the processes are no multiple of the ways, the device is the GPU of another one, or
            within the block another process has ended or does not answer.
    """
    dims.check()
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size % dims.together:
        ways = [(name, getattr(dims, name)) for name in ("pp", "cp", "tp") if getattr(dims, name) > 1]
        named, numbers = " x ".join(f"--{name}" for name, _ in ways), " x ".join(str(number) for _, number in ways)
        raise InputError(
            f"Start a multiple of {named} processes (`torchrun --nproc-per-node N -m gristmill ...`): there are {size}, "
            f"and {named} is {numbers}."
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

    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    except RuntimeError as e:
        raise InputError(
            f"The {size} processes of this training have not found each other ({str(e).splitlines()[0]}): see which of them has ended, "
            "or cannot reach MASTER_ADDR and MASTER_PORT, and start them all again."
        ) from e
    try:
        yield new_mesh(device, size, dims)
        dist.barrier()  # nobody leaves while another still needs him
    except RuntimeError as e:
        if (fault := _lost(e)) is None:
            raise
        raise fault from e
    finally:
        dist.destroy_process_group()
