"""Memory of training: an estimate before any weight is read, and the micro-batches and activation checkpointing that fit.

What training holds beside weights, gradients and optimizer states are the activations of a micro-batch. They are estimated from the
model's sizes alone (see docs/results.md for the estimate beside what was measured).
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from gristmill.core.device import free_memory
from gristmill.core.errors import InputError
from gristmill.core.io import read_json, write_json
from gristmill.core.threads import num_workers
from gristmill.model.attention import has_compiled_attention
from gristmill.model.config import ModelConfig
from gristmill.model.flops import (
    GRADIENT_BYTES,
    MASTER_BYTES,
    MOMENT_BYTES,
    activation_bytes_per_token,
    block_activation_bytes_per_token,
    block_matrix_parameters,
    loss_bytes,
)
from gristmill.model.kernels import library as kernels
from gristmill.model.lora import LoraLinear, LowRank
from gristmill.model.transformer import TRAINING_PRECISIONS
from gristmill.parallel.hardware import HARDWARE
from gristmill.parallel.layout import Layout, rank_blocks
from gristmill.parallel.lora_plan import LoraPlan, kept_values
from gristmill.parallel.memory import USABLE_SHARE, block_parameters, fits_into, memory, rank_weight_bytes, trained_parameters
from gristmill.parallel.mesh import Mesh
from gristmill.train.data import backbone
from gristmill.train.sharded import is_replicated

# Small operations need many tokens to be worth their start, large ones do not: so many parameters times tokens are enough on a CPU.
# Tile products (AMX) are soon done with them, but not what a micro-batch costs whatever its tokens, such as adding up gradients.
CPU_MICRO_BATCH_WORK, TILED_MICRO_BATCH_WORK = 3 * 2**34, 3 * 2**35
MIN_MICRO_BATCH, MAX_MICRO_BATCH = 384, 8192  # tokens of a micro-batch that is chosen
PROGRAM_BYTES = 300_000_000  # of Python, torch and the tokenizer
RECORD = "micro-batch.json"  # in a training folder: what its run has chosen


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory that training takes at its peak, in bytes. The loss counts to the activations."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    tokens: int  # that go through the model at once
    checkpointed: bool

    @property
    def total(self) -> int:
        return PROGRAM_BYTES + self.weights + self.gradients + self.optimizer + self.activations

    def __str__(self) -> str:
        parts = {"weights": self.weights, "gradients": self.gradients, "optimizer": self.optimizer, "activations": self.activations}
        named = ", ".join(f"{name} {_gigabytes(size)}" for name, size in parts.items())
        how = ", which are computed again in the backward pass" if self.checkpointed else ""
        return f"about {_gigabytes(self.total)} GB: {named} (of {self.tokens:,} tokens at once{how}), program {_gigabytes(PROGRAM_BYTES)}"


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f}" if size >= 5e7 else f"{size / 1e9:.2f}"


def estimate_memory(
    model: nn.Module,
    optimizer: str,
    *,
    precision: str,
    tokens: int,
    device: torch.device,
    checkpointed: bool = False,
    mesh: Mesh | None = None,
) -> MemoryEstimate:
    """Estimate what training takes with so many tokens in micro-batches at once. The model is whole, and may be on the meta device.

    Args:
        mesh: processes that share it out; the estimate is of the one that holds the most.
    """
    if mesh is not None and mesh.size > 1:
        return _of_one_process(model, optimizer, precision=precision, tokens=tokens, device=device, checkpointed=checkpointed, mesh=mesh)
    decoder = backbone(model)
    config, itemsize = decoder.config, TRAINING_PRECISIONS[precision].itemsize
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    count = sum(parameter.numel() for parameter in trained)
    hidden = sum(parameter.numel() for parameter in decoder.blocks.parameters() if parameter.requires_grad and parameter.ndim == 2)
    scales = [scale.nbytes for name, scale in model.named_buffers() if name.endswith("scale_N")]
    weights = sum(parameter.nbytes for parameter in model.parameters()) + sum(scales)
    workers = num_workers(model, device)
    options = {
        "adapted": any(name.endswith("mlp.down.parts.down_proj.lora_A") for name, _ in decoder.named_parameters()),
        "compiled": has_compiled_attention(device, TRAINING_PRECISIONS[precision]),
    }
    lora = lora_plan(model)
    if checkpointed:
        layers = config.num_layers * config.hidden_size * itemsize
        per_token = layers + max(block_activation_bytes_per_token(config, block, itemsize, **options) for block in config.blocks)
    else:
        per_token = activation_bytes_per_token(config, itemsize, **options)
        per_token += 0 if lora is None else int(sum(kept_values(config, block, lora, 1) for block in config.blocks) * itemsize)
    if itemsize < 4 and (workers == 1 or not checkpointed):
        # the weights in the type of the computation are kept for the step (by one worker), or for the backward pass
        weights += sum(p.numel() for p in decoder.blocks.parameters() if p.requires_grad) * itemsize
    head = workers * loss_bytes(-(-tokens // workers), config.vocab_size, config.hidden_size, itemsize)
    return MemoryEstimate(
        weights=weights,
        gradients=GRADIENT_BYTES * count * (1 if workers == 1 else 1 + workers),  # each worker makes its own before they are added up
        optimizer=MOMENT_BYTES * count - (MOMENT_BYTES // 2 * hidden if optimizer == "muon" else 0),
        activations=per_token * tokens + head,
        tokens=tokens,
        checkpointed=checkpointed,
    )


def lora_plan(model: nn.Module) -> LoraPlan | None:
    """A model's adapter as the planner knows it; None without one."""
    parts = {name: module for name, module in model.named_modules() if isinstance(module, LowRank)}
    if not parts:
        return None
    base = next(module for module in model.modules() if isinstance(module, LoraLinear)).weight.dtype
    targets = dict.fromkeys(name.rpartition(".")[2] for name in parts)
    first = next(iter(parts.values()))
    names = {torch.bfloat16: "bf16", torch.int8: "int8", torch.uint8: "nf4"}
    return LoraPlan(rank=first.rank, base=names.get(base, "fp32"), dora=first.magnitude is not None, targets=tuple(targets))


def _of_one_process(
    model: nn.Module, optimizer: str, *, precision: str, tokens: int, device: torch.device, checkpointed: bool, mesh: Mesh
) -> MemoryEstimate:
    """Of the process that holds the most of a mesh, by the planner's sizes: matrices cut by TP, layers by PP, and what is trained by FSDP2,
    which gathers a block's weights, of a pipeline all of a stage's, and keeps gradients whole until the last micro-batch.
    """
    config, dims, lora = backbone(model).config, mesh.dims, lora_plan(model)
    dp = mesh.size // dims.together
    layout = Layout(
        **{name: getattr(dims, name) for name in ("tp", "cp", "pp", "vp", "schedule")},
        dp=dp,
        batch_size=4 * dp * dims.pp,
        seq_len=max(tokens, dims.cp),
        precision="fp32" if precision == "fp32" else "bf16",
        recompute="full" if checkpointed else "none",
        lora=lora,
    )
    hardware = replace(
        HARDWARE["h100"], kernels=has_compiled_attention(device, TRAINING_PRECISIONS[precision]), threads=int(device.type == "cpu")
    )
    ranks = memory(config, layout, hardware)
    activations = max(rank.activations + rank.loss for rank in ranks.values())
    held = [_states(config, layout, rank, muon=optimizer == "muon", replicated=is_replicated(model, dims)) for rank in {0, dims.pp - 1}]
    weights, gradients, moments = max(held, key=sum)
    return MemoryEstimate(int(weights), int(gradients), int(moments), int(activations), tokens, checkpointed)


def _states(config: ModelConfig, layout: Layout, rank: int, *, muon: bool, replicated: bool) -> tuple[float, float, float]:
    """Bytes of a rank's weights, gradients and optimizer states."""
    count, shards = trained_parameters(config, layout, rank), 1 if replicated else layout.num_shards
    blocks = rank_blocks(config, layout, rank)
    hidden = sum(block_matrix_parameters(config, block) for block in blocks) / layout.tp
    weights = rank_weight_bytes(config, layout, rank) / shards
    if layout.precision != "fp32" and layout.lora is None:  # kept in the type of the computation for the backward pass
        weights += 2 * hidden
    gradients = GRADIENT_BYTES * count
    if shards > 1:
        largest = max(block_parameters(config, block, layout.tp) for block in blocks)
        ends = count - sum(block_parameters(config, block, layout.tp) for block in blocks)
        weights += MASTER_BYTES * (count if layout.pp > 1 else largest + ends)
        gradients += GRADIENT_BYTES * count / shards
    return weights, gradients, (MOMENT_BYTES * count - MOMENT_BYTES / 2 * hidden * muon) / shards


def choose_micro_batch(
    model: nn.Module, optimizer: str, *, precision: str, device: torch.device, loaded: bool, mesh: Mesh | None = None
) -> int:
    """Tokens of a micro-batch: as many as pay, fewer where the free memory is short, but MIN_MICRO_BATCH.

    Args:
        loaded: the weights are in memory already.
    """
    parameters = sum(parameter.numel() for parameter in model.parameters())
    work = TILED_MICRO_BATCH_WORK if precision == "bf16" and kernels.has_tiles() else CPU_MICRO_BATCH_WORK
    paying = MAX_MICRO_BATCH if device.type != "cpu" else work // max(1, parameters)
    tokens = min(MAX_MICRO_BATCH, max(MIN_MICRO_BATCH, paying))
    while tokens > MIN_MICRO_BATCH:
        needed = estimate_memory(model, optimizer, precision=precision, tokens=tokens, device=device, mesh=mesh)
        if fits(needed, device, loaded=loaded):
            break
        tokens = max(MIN_MICRO_BATCH, tokens // 2)
    return tokens


def always_checkpointed(checkpoint_activations: bool | str) -> bool | None:
    """Whether a setting means full activation checkpointing; None: where it is needed. Selective keeps two thirds, and counts as none."""
    return None if checkpoint_activations == "auto" else checkpoint_activations is True


def fits(needed: MemoryEstimate, device: torch.device, *, loaded: bool) -> bool:
    """Whether the device has that much memory free."""
    there = PROGRAM_BYTES + (needed.weights if loaded else 0)
    return fits_into(needed.total - there, free_share(device))


def free_share(device: torch.device) -> float:
    """Bytes that this process can still take: those that torchrun started on a machine share its memory, and have a GPU each."""
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if device.type == "cpu" else 1
    return free_memory(device) / sharing


def fitting(
    model: nn.Module,
    optimizer: str,
    *,
    precision: str,
    tokens: int,
    device: torch.device,
    loaded: bool,
    checkpoint: bool | None = None,
    longest: int = 0,
    mesh: Mesh | None = None,
) -> MemoryEstimate:
    """The estimate for micro-batches of so many tokens, with activation checkpointing where they do not fit without.

    Args:
        checkpoint: activation checkpointing always, never, or (None) where it is needed.
        longest: tokens of the longest sample, which may be more than a micro-batch.

    Raises:
        InputError: training does not fit into the memory that is free.
    """
    at_once = max(tokens, longest)
    ways = [False, True] if checkpoint is None else [checkpoint]
    for checkpointed in ways:
        needed = estimate_memory(model, optimizer, precision=precision, tokens=at_once, device=device, checkpointed=checkpointed, mesh=mesh)
        if fits(needed, device, loaded=loaded):
            return needed
    fixed = needed.total - needed.activations
    if fixed > USABLE_SHARE * free_share(device):
        more = "" if mesh is None or mesh.size == 1 else "share more out (--tp, --pp, more machines), "
        remedy = f"{more}train with LoRA, or take a smaller model or a machine with more memory"
    elif longest > tokens:
        remedy = f"leave out samples as long as {longest:,} tokens, or cut them"
    else:
        remedy = "lower micro_batch_tokens, or train with LoRA"
    each = "" if mesh is None or mesh.size == 1 else " each of the processes"
    raise InputError(f"training does not fit: it takes{each} {needed}, and {_gigabytes(free_share(device))} GB are free; {remedy}")


def recorded_micro_batch(folder: Path | None) -> int | None:
    """What the run of a training folder has chosen, since another number would not continue it bit for bit."""
    if folder is None:
        return None
    if (folder / RECORD).exists():
        tokens = read_json(folder / RECORD).get("tokens")
        if isinstance(tokens, int) and tokens > 0:
            return tokens
    # earlier versions wrote no record
    return MAX_MICRO_BATCH if folder.is_dir() and any(folder.glob("checkpoint-*")) else None


def record_micro_batch(folder: Path, tokens: int) -> None:
    """Remember the choice of a run."""
    if not (folder / RECORD).exists():
        write_json(folder / RECORD, {"tokens": tokens})
