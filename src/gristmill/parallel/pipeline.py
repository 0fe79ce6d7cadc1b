"""Pipeline parallelism (PP): processes have other layers of one model, and micro-batches pass from stage to stage.

When a stage computes what, and what is sent, is for torch's schedules to say. All processes of a pipeline collate the same micro-batches,
so that nothing but states [T, D] travels. All micro-batches of a step have one number T of tokens, for which `fill` documents of one token.

In zero-bubble schedules gradients of matrices wait for bubbles (`model.weight_gradients`).

Sources: 1F1B and its interleaved form, Megatron-LM (arXiv 2104.04473); zero-bubble schedules (2401.10241).
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gristmill.core.errors import InputError
from gristmill.model import weight_gradients
from gristmill.model.config import ModelConfig
from gristmill.model.layers import Linear
from gristmill.model.packed import PackedShape
from gristmill.model.transformer import Transformer
from gristmill.parallel import layout
from gristmill.parallel.context import ContextParallel
from gristmill.parallel.mesh import Mesh, ParallelDims, local, whole

Objective = Callable[[Any, Any], Any]  # from model and micro-batch to what has a `sum`
TIED = "lm_head.weight"  # the last stage's copy of an embedding that is also the output matrix


def check_pipeline(config: ModelConfig, dims: ParallelDims) -> None:
    """Raise InputError where the layers of a model cannot be shared out over so many stages."""
    num_stages = dims.pp * dims.vp
    if num_stages == 1:
        return
    layout.check_stages(config.num_layers, num_stages)
    if not all(layout.stage_layers(config.num_layers, num_stages, stage) for stage in range(num_stages)):
        raise InputError(f"Lower --pp or --vp: {config.num_layers} layers leave a stage of {num_stages} without any.")


def num_micro_batches(wanted: int, dims: ParallelDims) -> int:
    """The least number of micro-batches of a pipeline's step that holds so many and that its schedule takes."""
    return max(wanted, dims.pp) if dims.vp == 1 or dims.schedule == "zbv" else -(-wanted // dims.pp) * dims.pp


class Stage(nn.Module):
    """Virtual stage: a model without the layers that other stages have.

    Args:
        model: a decoder, or one with a head; parameters are shared with it.
        number: of the stage, from the embedding on.
    """

    def __init__(self, model: nn.Module, number: int, num_stages: int) -> None:
        super().__init__()
        self.number, self.is_first, self.is_last = number, number == 0, number == num_stages - 1
        part = cast(Any, copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()}))
        decoder = getattr(part, "backbone", part)
        layers = layout.stage_layers(decoder.config.num_layers, num_stages, number)
        for name in list(decoder.blocks):
            if int(name) not in layers:
                del decoder.blocks[name]
        if self.is_last and decoder.lm_head is None and decoder is part:
            vocab_size, size = decoder.embedding.shape
            decoder.lm_head = Linear(size, vocab_size, bias=False, device="meta")
            decoder.lm_head.weight = nn.Parameter(decoder.embedding.detach().clone(), requires_grad=decoder.embedding.requires_grad)
        if not self.is_first:
            decoder.embedding = None
        if not self.is_last:
            decoder.lm_head = decoder.final_norm = None
            if decoder is not part:
                part.head = None
        self.model, self.decoder = part, [decoder]  # in a list, so that its parameters are not found twice
        self.work: Callable[[nn.Module, int], Tensor] | None = None  # what the last stage does with a micro-batch
        self.batches: Sequence[Any] = ()
        self.sent_rows = 0  # states of every micro-batch, as many for all: pieces of documents are not

    def forward(self, x: Tensor, number: int) -> Tensor:
        """States behind this stage's layers, or behind the last one the loss [1] of a micro-batch."""
        (decoder,), tokens = self.decoder, tokens_of(self.batches[number])
        decoder.incoming_TD = None if self.is_first else x[: self.num_rows(tokens.shape)]
        try:
            if self.is_last:
                assert self.work is not None
                return self.work(self.model, number).view(1)
            x_PD = decoder.states(tokens.ids_T, tokens.shape)
            return x_PD if len(x_PD) == self.sent_rows else F.pad(x_PD, (0, 0, 0, self.sent_rows - len(x_PD)))
        finally:
            decoder.incoming_TD = None

    def num_rows(self, shape: PackedShape, *, longest: bool = False) -> int:
        """States of a micro-batch that this process has, or that one which shares its tokens has at most."""
        (decoder,) = self.decoder
        num_tokens = shape.num_tokens
        if isinstance(decoder.context, ContextParallel):
            pieces = decoder.context.pieces(shape)
            num_tokens = pieces.share.longest if longest else len(pieces.own_P)
        return -(-num_tokens // (1 if decoder.sharding is None else decoder.sharding.group.size))


def tokens_of(batch: Any) -> Any:
    """What tells a micro-batch's tokens and their shape."""
    return getattr(batch, "tokens", batch)


class Pipeline(nn.Module):
    """This process's stages of a model, with the parameters under the names that they have in all of it.

    Args:
        model: the whole of it; what other processes' stages have is let go.
        objective: from model and micro-batch to a loss sum.
    """

    def __init__(self, model: nn.Module, objective: Objective, mesh: Mesh) -> None:
        super().__init__()
        assert mesh.pipeline is not None
        dims, rank = mesh.dims, mesh.pipeline.rank
        self.group, self.num_stages, self.schedule = mesh.pipeline, dims.pp * dims.vp, dims.schedule
        decoder = cast(Transformer, getattr(model, "backbone", model))
        self.config = decoder.config
        self.is_tied = decoder is model and decoder.lm_head is None  # a head has another output matrix
        check_pipeline(self.config, dims)
        self.objective = objective
        self.device = next(model.parameters()).device
        numbers = layout.stages_of(dims.schedule, dims.pp, dims.vp, rank)
        self.stages = nn.ModuleList(Stage(model, number, self.num_stages) for number in numbers)

    @property
    def decoders(self) -> list[Transformer]:
        """What its stages have of the decoder."""
        return [stage.decoder[0] for stage in self.each()]

    @property
    def blocks(self) -> nn.ModuleDict:
        """The layers that are here, by their numbers."""
        return nn.ModuleDict({name: block for decoder in self.decoders for name, block in decoder.blocks.items()})

    def each(self) -> list[Stage]:
        """Stages of this process, in their order."""
        return cast("list[Stage]", list(self.stages))

    def named_parameters(self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters of all stages by their names in the whole model."""
        for stage in self.each():
            yield from stage.model.named_parameters(prefix, recurse, remove_duplicate)

    def __setattr__(self, name: str, value: Any) -> None:
        """What says how a decoder computes is set on all of its stages."""
        if name in ("compute_dtype", "checkpoint_activations", "after_blocks"):
            for stage in self.each():
                setattr(stage.decoder[0], name, value)
        else:
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name == "compute_dtype":
            return self.each()[0].decoder[0].compute_dtype
        return super().__getattr__(name)

    def run(self, batches: Sequence[Any], num_fillers: int, count: int, *, backward: bool = True) -> list[Any]:
        """Compute the micro-batches of a step, and add their gradients up; what the objective gave for each, in the process that has the
        last stage, and nothing in the others.

        Args:
            num_fillers: of the micro-batches, the last ones, which count nothing.
            count: divides the loss sums.
        """
        outputs: list[Any] = []

        def last(model: nn.Module, number: int) -> Tensor:
            output = self.objective(model, batches[number])
            is_filler = number >= len(batches) - num_fillers
            outputs.extend([] if is_filler else [output])
            return cast(Tensor, output.sum * 0 if is_filler else output.sum / count)

        assert len({len(tokens_of(batch).ids_T) for batch in batches}) == 1, "buffers are of the first micro-batch's tokens"
        sent_rows = max(self.each()[0].num_rows(tokens_of(batch).shape, longest=True) for batch in batches)
        for stage in self.each():
            stage.batches, stage.work, stage.sent_rows = batches, last, sent_rows
        states = torch.empty(sent_rows, self.config.hidden_size, dtype=self.compute_dtype, device="meta", requires_grad=True)
        _run_schedule(self, batches, states, backward=backward)
        for stage in self.each():
            stage.batches, stage.work = (), None
        if backward:
            self._sum_tied()
        return outputs

    def _sum_tied(self) -> None:
        """Add up the gradients of an embedding that is also the output matrix: the first stage has one part, the last the other."""
        if not self.is_tied:
            return
        named = dict(self.named_parameters())
        mine = [local(grad) for name in ("embedding", TIED) if name in named and (grad := named[name].grad) is not None]
        if len(mine) == 2:  # this process has the first stage and the last one
            mine[1].copy_(mine[0].add_(mine[1]))
        elif mine:
            mine[0].add_(self.group.exchange(mine[0], self.group.size - 1 - self.group.rank))

    def grad_norm(self) -> float:
        """Norm of the gradients of all stages' parameters."""
        named = {name: parameter for name, parameter in self.named_parameters() if parameter.grad is not None}
        counted = [p.grad for name, p in named.items() if not (self.is_tied and name == TIED)]
        own = float(whole(nn.utils.get_total_norm(cast("list[Tensor]", counted)))) if counted else 0.0
        return math.sqrt(sum(other * other for other in self.group.gather(own)))


def _run_schedule(pipeline: Pipeline, batches: Sequence[Any], states: Tensor, *, backward: bool) -> None:
    """Run a schedule of torch's over micro-batches. Nothing else here knows its private interface (torch 2.13)."""
    from torch.distributed.pipelining import PipelineStage, schedules

    group, loss = pipeline.group, torch.empty(1, device="meta", requires_grad=True)
    waits = backward and pipeline.schedule != "1f1b"
    made = [
        PipelineStage(
            stage,
            stage.number,
            pipeline.num_stages,
            pipeline.device,
            # given both ways, nothing is computed to find them out, and the gradients of earlier micro-batches are not wiped
            input_args=torch.empty_like(tokens_of(batches[0]).ids_T, device="meta") if stage.is_first else states,
            output_args=loss if stage.is_last else states,
            group=group.process_group,
            dw_builder=weight_gradients.take if waits else None,
        )
        for stage in pipeline.each()
    ]
    options: dict[str, Any] = {"loss_fn": lambda loss, target: loss.sum(), "scale_grads": False}
    kinds = {"zero-bubble": schedules.ScheduleInterleavedZeroBubble, "zbv": schedules.ScheduleZBVZeroBubble}
    kind: Any = kinds.get(pipeline.schedule, schedules.ScheduleInterleaved1F1B)
    schedule: Any = schedules.Schedule1F1B(made[0], len(batches), **options) if len(made) == 1 else kind(made, len(batches), **options)
    if not backward and pipeline.schedule == "zbv":  # what passes between two stages of a process, it would take from a backward pass
        ahead = ("F", "SEND_F", "RECV_F", "UNSHARD", "RESHARD")
        orders = schedule.pipeline_order_with_comms
        orders[group.rank] = [action for action in orders[group.rank] if action.computation_type.value in ahead]
    schedule._has_backward = backward
    for stage in made:
        stage.has_backward = backward
    arguments = [(tokens_of(batch).ids_T,) for batch in batches]
    targets = [torch.empty(0)] * len(batches)
    with torch.set_grad_enabled(backward), weight_gradients.deferring() if waits else nullcontext():
        schedule._step_microbatches(arguments, [{"number": n} for n in range(len(batches))], targets, return_outputs=False)
