"""The part of a model that one process of several trains, and the whole of it again."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gristmill.core.errors import InputError
from gristmill.core.threads import MAX_THREADED_PARAMETERS
from gristmill.model.config import ModelConfig
from gristmill.model.lora import LowRank, is_adapted
from gristmill.parallel.context import shard_context
from gristmill.parallel.mesh import Mesh, ParallelDims, part_of, skeleton, whole
from gristmill.parallel.pipeline import TIED, Pipeline, check_pipeline
from gristmill.parallel.shards import read_shards
from gristmill.parallel.tensor import check_tensor_parallel, shard_tensors
from gristmill.train.checkpoint import fingerprint_model

REPLICATED = MAX_THREADED_PARAMETERS  # parameters from which on weights are cut over data-parallel processes


def check_parallel(config: ModelConfig, dims: ParallelDims, *, bases: Iterable[str] = ()) -> None:
    """Raise InputError where a model cannot be shared out so; `bases`: types that it is frozen in beside adapters."""
    for base in ("", *bases):
        check_tensor_parallel(config, dims.tp, base)
    check_pipeline(config, dims)


def is_replicated(model: nn.Module, dims: ParallelDims) -> bool:
    """Whether processes that share out samples all have the same tensors: an adapter's, those of a small model, or by choice."""
    small = sum(parameter.numel() for parameter in model.parameters()) < REPLICATED
    return is_adapted(model) or ((small or dims.replicate) and dims.together == 1)


def read_parts(folder: Path, shapes: Mapping[str, Sequence[int]], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Out of a sharded checkpoint, what this process has of the tensors of some parameters, as it has these, or of others whole.

    Args:
        shapes: of all tensors there, which are of parameters behind their bar.
    """
    found = {}
    for name, shape in shapes.items():
        parameter = name.split("|")[1]
        like = parameters.get(parameter, parameters.get(TIED) if parameter == "embedding" else None)
        if like is not None:
            same = list(like.shape) == list(shape)
            found[name] = torch.empty_like(like.detach()) if same else torch.empty(list(shape), dtype=like.dtype)
    read_shards(folder, found)
    return found


class ShardedModel:
    """A model cut over the processes of a mesh: layers over a pipeline, matrices over a tensor-parallel group, each weight over the others.

    Of an adapter, which is small, every process has all that its layers have, and the gradients are added up once a step. What is frozen
    beside it is cut over pipeline and tensor-parallel group alone. A small model of which only samples are shared out is trained so too
    (DDP): gathering its weights and tensors in parts took a fifth of a step.

    Args:
        model: the same on all processes.
        objective: from model and micro-batch to a loss sum, which the last stage of a pipeline computes.

    Attributes:
        local: what this process trains.
        skeleton: the whole model without memory for its weights.
        started_from: fingerprint of the whole model as it was.
        is_replicated: whether processes that share out samples have the same tensors: an adapter's, those of a small model, or by choice.
        is_padded: whether a parameter has rows that fill it up, which another mesh does not have.

    Raises:
        InputError: the processes have different models, or the model cannot be cut so.
    """

    def __init__(self, model: nn.Module, objective: Any, mesh: Mesh) -> None:
        self.started_from = fingerprint_model(model)
        mesh.agree(self.started_from, "starting weights")
        self._mesh, self.skeleton = mesh, skeleton(model)
        self.is_replicated = is_replicated(model, mesh.dims)
        self._names = set(dict(self.skeleton.named_parameters()))
        self.local = model if mesh.pipeline is None else Pipeline(model, objective, mesh)
        for part in self.local.each() if isinstance(self.local, Pipeline) else [model]:
            if not any(parameter.requires_grad for parameter in part.parameters()):
                raise InputError("Lower --pp or --vp: a stage of the pipeline would have nothing that is trained.")
            if mesh.tensor is not None:
                shard_tensors(getattr(part, "model", part), mesh.tensor)
            if mesh.context is not None:
                shard_context(getattr(part, "model", part), mesh.context)
            if not self.is_replicated:
                mesh.shard(part)
        own = [(f"|{name}", parameter) for name, parameter in self.local.named_parameters() if name in self._names]
        self.is_padded = any(mesh.gather(any(self._like(name, parameter) is not None for name, parameter in own)))

    def add_up_gradients(self) -> None:
        """Add up what FSDP2 does not (collective); to an adapter's gradients parts of matrices, too, give parts."""
        if not self.is_replicated:
            return
        trained = [parameter for parameter in self.local.parameters() if parameter.requires_grad]
        if self._mesh.tensor is not None:
            adapter = [module for module in self.local.modules() if isinstance(module, LowRank)]
            self._mesh.tensor.add_up_gradients([parameter for module in adapter for parameter in module.parameters()])
        self._mesh.shards.add_up_gradients(trained)

    def gathered(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Tensors of all processes, whole, one after another (collective); their names have a parameter's behind a bar."""
        own = {name: tensor for name, tensor in tensors.items() if self._parameter(name) in self._names}
        if (pipeline := self._mesh.pipeline) is None:
            yield from ((name, self._unpadded(name, whole(tensor))) for name, tensor in own.items())
            return
        facts = [(name, self._shape(name, tensor), str(tensor.dtype).removeprefix("torch.")) for name, tensor in own.items()]
        device = self._mesh.device
        for owner, others in enumerate(pipeline.gather(facts)):
            for name, shape, dtype in others:
                if owner == pipeline.rank:
                    tensor = self._unpadded(name, whole(own[name])).to(device)
                else:
                    tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
                yield name, pipeline.broadcast(tensor, owner)

    def own(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
        """Tensors but those of a tied embedding's copy, and the shapes of the tensors of all processes (collective)."""
        own = {name: tensor for name, tensor in tensors.items() if self._parameter(name) in self._names}
        shapes = {name: list(tensor.shape) for name, tensor in own.items()}
        for others in [] if self._mesh.pipeline is None else self._mesh.pipeline.gather(shapes):
            shapes |= others
        return own, shapes

    def assembled(self) -> nn.Module:
        """The whole model, in memory of its own (collective)."""
        parameters = {f"model|{name}": parameter.detach() for name, parameter in self.local.named_parameters()}
        state = self.skeleton.state_dict() | {self._parameter(name): tensor for name, tensor in self.gathered(parameters)}
        self.skeleton.load_state_dict(state, assign=True)
        return self.skeleton

    def restore(self, trained: Mapping[str, Tensor]) -> None:
        """Copy whole tensors, by their parameters' names, into the parts that are here."""
        parts = self.parts_of(trained)
        for name, parameter in self.local.named_parameters():
            if parameter.requires_grad:
                parameter.detach().copy_(parts[name])

    def parts_of(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of whole tensors, by their parameters' names, what this process has."""
        tensors = self.with_tied(tensors)
        return {name: part_of(tensors[name], parameter) for name, parameter in self.local.named_parameters() if parameter.requires_grad}

    def with_tied(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors, those of a tied embedding also under the name of the last stage's copy."""
        tied = TIED not in self._names
        copies = {TIED + name.removeprefix("embedding"): tensor for name, tensor in tensors.items() if name.startswith("embedding")}
        return {**tensors, **(copies if tied else {})}

    def _parameter(self, name: str) -> str:
        return name.split("|")[1]

    def _like(self, name: str, tensor: Tensor) -> Tensor | None:
        """The parameter whose shape a tensor has, which may be padded where several processes have parts of it (`parallel.tensor`)."""
        like = self.skeleton.get_parameter(self._parameter(name))
        return like if tensor.ndim == like.ndim and len(tensor) > len(like) else None

    def _shape(self, name: str, tensor: Tensor) -> list[int]:
        like = self._like(name, tensor)
        return list(tensor.shape if like is None else like.shape)

    def _unpadded(self, name: str, tensor: Tensor) -> Tensor:
        like = self._like(name, tensor)
        return tensor if like is None else tensor[: len(like)].clone()
