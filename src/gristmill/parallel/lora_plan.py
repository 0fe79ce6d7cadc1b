"""LoRA in a plan: parameters, bytes and values that an adapter adds to a layer, and which products it has.

What is frozen is cut over TP and PP alone; of the adapter a rank has all that its layers have (docs/scale.md).

Shapes: N outputs and D inputs of a matrix, r rank. Source: LoRA (arXiv 2106.09685), DoRA (2402.09353).
"""

from dataclasses import dataclass

from gristmill.core.errors import InputError
from gristmill.model.config import BlockConfig, ModelConfig

BASE_BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "nf4": 0.516}  # a frozen value; NF4 of blocks of 64 with quantized scales
SCALE_BYTES = 4  # of a row in int8


@dataclass(frozen=True, kw_only=True)
class LoraPlan:
    """A LoRA adapter of every layer, beside frozen matrices of a type.

    Attributes:
        base: type of the frozen matrices, out of BASE_BYTES.
        dora: rows of the updated matrices have trained lengths.
        targets: names of the matrices that are adapted; none: all.
    """

    rank: int
    base: str = "bf16"
    dora: bool = False
    targets: tuple[str, ...] = ()


@dataclass(frozen=True)
class Matrix:
    """A matrix of a layer: [rows, columns], cut by rows (column-parallel) or by columns over TP."""

    name: str
    rows: int
    columns: int
    by_rows: bool


def matrices(config: ModelConfig, block: BlockConfig) -> list[Matrix]:
    """The matrices of a layer, by PEFT's names."""
    h, f, parts = config.hidden_size, block.ffn_size, config.parts
    queries, keys = block.num_heads * block.head_dim, block.num_kv_heads * block.head_dim
    found: list[Matrix] = []
    if block.has_attention and parts.fused:
        found.append(Matrix("qkv_proj", queries + 2 * keys, h, True))
    elif block.has_attention:
        found += [Matrix("q_proj", queries, h, True), Matrix("k_proj", keys, h, True), Matrix("v_proj", keys, h, True)]
    if block.has_attention:
        found.append(Matrix("o_proj", h, queries, False))
    if block.has_mlp and parts.fused:
        found.append(Matrix("gate_up_proj", 2 * f, h, True))
    elif block.has_mlp:
        found += [Matrix(name, f, h, True) for name in (("gate_proj", "up_proj") if parts.gated else ("up_proj",))]
    return [*found, Matrix("down_proj", h, f, False)] if block.has_mlp else found


def adapted(config: ModelConfig, block: BlockConfig, lora: LoraPlan) -> list[Matrix]:
    """The matrices of a layer that have an update."""
    return [matrix for matrix in matrices(config, block) if matrix.name in lora.targets or not lora.targets]


def adapter_parameters(config: ModelConfig, block: BlockConfig, lora: LoraPlan) -> int:
    """What is trained of a layer: A, B and with DoRA a length a row."""
    return sum(lora.rank * (one.rows + one.columns) + one.rows * lora.dora for one in adapted(config, block, lora))


def frozen_bytes(config: ModelConfig, block: BlockConfig, lora: LoraPlan, count: float) -> float:
    """Bytes of a layer's frozen matrices, of whose values a rank has so many; all ranks keep all scales of rows."""
    scales = sum(matrix.rows for matrix in matrices(config, block)) * SCALE_BYTES if lora.base == "int8" else 0
    return count * BASE_BYTES[lora.base] + scales


def kept_values(config: ModelConfig, block: BlockConfig, lora: LoraPlan, tp: int) -> float:
    """Values that an adapter keeps of one of a rank's T / tp tokens: low-rank products, of column-parallel layers for all T tokens, and
    with DoRA the outputs of the frozen matrix and of the update.
    """
    found = adapted(config, block, lora)
    return sum(lora.rank * (tp if one.by_rows else 1) + 2 * one.rows * lora.dora for one in found)


def check_lora(config: ModelConfig, lora: LoraPlan, tp: int) -> None:
    """Raise InputError where a model or a layout does not take an adapter, as training does."""
    if lora.base not in BASE_BYTES:
        raise InputError(f"Choose --lora-base {', '.join(BASE_BYTES)}, not {lora.base!r}.")
    if lora.base == "nf4" and tp > 1:
        raise InputError("Choose --lora-base int8, or leave --tp out: a matrix in nf4 cannot be cut.")
    names = [matrix.name for block in config.blocks[:1] for matrix in matrices(config, block)]
    if lacking := [name for name in lora.targets if name not in names]:
        raise InputError(f"Leave {lacking[0]} out of --lora-targets: the model has {', '.join(names)}.")
    smallest = min((side for block in config.blocks for one in adapted(config, block, lora) for side in (one.rows, one.columns)), default=0)
    if not 1 <= lora.rank <= smallest:
        raise InputError(f"Choose a --lora-rank from 1 to {smallest:,}, the smallest side of an adapted matrix: it is {lora.rank:,}.")
