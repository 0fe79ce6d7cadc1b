"""Memory of training: an estimate before any weight is read, and the micro-batches and activation checkpointing that fit.

What training holds beside weights, gradients and optimizer states are the activations of a micro-batch. They are estimated from the
model's sizes alone (see docs/results.md for the estimate beside what was measured).
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from gristmill.core.device import free_memory
from gristmill.core.errors import InputError
from gristmill.core.io import read_json, write_json
from gristmill.core.threads import num_workers
from gristmill.model.attention import has_compiled_attention
from gristmill.model.flops import (
    GRADIENT_BYTES,
    MOMENT_BYTES,
    activation_bytes_per_token,
    block_activation_bytes_per_token,
    loss_bytes,
)
from gristmill.model.kernels import library as kernels
from gristmill.model.transformer import TRAINING_PRECISIONS
from gristmill.parallel.memory import USABLE_SHARE, fits_into
from gristmill.train.data import backbone

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
    model: nn.Module, optimizer: str, *, precision: str, tokens: int, device: torch.device, checkpointed: bool = False
) -> MemoryEstimate:
    """Estimate what training takes with so many tokens in micro-batches at once. The model may be on the meta device."""
    decoder = backbone(model)
    config, itemsize = decoder.config, TRAINING_PRECISIONS[precision].itemsize
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    count = sum(parameter.numel() for parameter in trained)
    hidden = sum(parameter.numel() for parameter in decoder.blocks.parameters() if parameter.requires_grad and parameter.ndim == 2)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    workers = num_workers(model, device)
    options = {
        "adapted": any(name.endswith("mlp.down.parts.down_proj.lora_A") for name, _ in decoder.named_parameters()),
        "compiled": has_compiled_attention(device, TRAINING_PRECISIONS[precision]),
    }
    if checkpointed:
        layers = config.num_layers * config.hidden_size * itemsize
        per_token = layers + max(block_activation_bytes_per_token(config, block, itemsize, **options) for block in config.blocks)
    else:
        per_token = activation_bytes_per_token(config, itemsize, **options)
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


def choose_micro_batch(model: nn.Module, optimizer: str, *, precision: str, device: torch.device, loaded: bool) -> int:
    """Tokens of a micro-batch: as many as pay, fewer where the free memory is short, but MIN_MICRO_BATCH.

    Args:
        loaded: the weights are in memory already.
    """
    parameters = sum(parameter.numel() for parameter in model.parameters())
    work = TILED_MICRO_BATCH_WORK if precision == "bf16" and kernels.has_tiles() else CPU_MICRO_BATCH_WORK
    paying = MAX_MICRO_BATCH if device.type != "cpu" else work // max(1, parameters)
    tokens = min(MAX_MICRO_BATCH, max(MIN_MICRO_BATCH, paying))
    while tokens > MIN_MICRO_BATCH:
        needed = estimate_memory(model, optimizer, precision=precision, tokens=tokens, device=device)
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
    return fits_into(needed.total - there, free_memory(device))


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
        needed = estimate_memory(model, optimizer, precision=precision, tokens=at_once, device=device, checkpointed=checkpointed)
        if fits(needed, device, loaded=loaded):
            return needed
    fixed = needed.total - needed.activations
    if fixed > USABLE_SHARE * free_memory(device):
        remedy = "train with LoRA, or take a smaller model or a machine with more memory"
    elif longest > tokens:
        remedy = f"leave out samples as long as {longest:,} tokens, or cut them"
    else:
        remedy = "lower micro_batch_tokens, or train with LoRA"
    raise InputError(f"training does not fit: it takes {needed}, and {_gigabytes(free_memory(device))} GB are free; {remedy}")


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
