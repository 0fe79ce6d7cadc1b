"""LoRA: low-rank updates beside frozen matrices, with rsLoRA's scaling and DoRA's magnitudes, switched off, and merged in fp32.

W' = W + s B A with s = alpha / r, rsLoRA alpha / sqrt(r); DoRA scales every row of W' to a length that is trained. B begins as zero, so
that the first step computes what the base does, bit for bit. A merged projection has an A and a B for each of its parts, as PEFT has.

Shapes: T tokens, D inputs of a matrix, N its outputs, r rank.
Sources: LoRA (arXiv 2106.09685), rsLoRA (2312.03732), LoRA+ (2402.12354), DoRA (2402.09353), QLoRA (2305.14314) for frozen NF4.
"""

import importlib
import itertools
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gristmill.core.errors import InputError
from gristmill.core.untrusted import quoted
from gristmill.model.layers import Linear
from gristmill.model.quantized import scaled
from gristmill.model.transformer import Block, Transformer

# By the names of Hugging Face's modules; those that hold several matrices in one are some families' own.
TARGETS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj")
OUTSIDE = ("lm_head", "embed_tokens")
BASES = ("fp32", "bf16", "int8", "nf4")
MAX_SCALE = 1e6  # of alpha, and of what it becomes

_ENABLED: ContextVar[bool] = ContextVar("_ENABLED", default=True)  # of this thread alone


@contextmanager
def adapters_disabled() -> Iterator[None]:
    """Compute what the base does, in this thread: a worker enters it itself, as it does `torch.no_grad`."""
    token = _ENABLED.set(False)
    try:
        yield
    finally:
        _ENABLED.reset(token)


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """LoRA configuration: rank, scaling and targets.

    Attributes:
        alpha: divided by the rank, or with `rslora` by its root, it scales the update.
        targets: names out of TARGETS; none: all that the model has.
        dora: rows of the updated matrix have trained lengths.

    Raises:
        InputError: a value out of its range, or a target that is not adapted.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = ()
    rslora: bool = False
    dora: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"Give LoRA a rank of at least 1: it is {quoted(self.rank)}.")
        if not 0 < self.alpha <= MAX_SCALE:
            raise InputError(f"Give LoRA an alpha above 0, {MAX_SCALE:g} at most: it is {quoted(self.alpha)}.")
        if outside := [name for name in self.targets if name in OUTSIDE]:
            raise InputError(
                f"Leave {outside[0]} out of LoRA's targets: only the layers' matrices are adapted, since embedding and output may be "
                "one matrix, which merging would part."
            )
        if wrong := [name for name in self.targets if name not in TARGETS]:
            raise InputError(f"Choose LoRA's targets among {', '.join(TARGETS)}: {quoted(wrong[0])} is none of them.")

    def scaling(self, rank: int, alpha: float) -> float:
        """Factor of the product B A of a rank and an alpha, which may be exceptions from the configuration's."""
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


class LowRank(nn.Module):
    """Low-rank update of one matrix: scaling * B A, and with DoRA the lengths of the updated matrix's rows."""

    scaling: Tensor

    def __init__(self, a_rD: Tensor, b_Nr: Tensor, scaling: float, magnitude_N: Tensor | None = None) -> None:
        super().__init__()
        self.lora_A, self.lora_B = nn.Parameter(a_rD), nn.Parameter(b_Nr)
        self.magnitude = None if magnitude_N is None else nn.Parameter(magnitude_N)
        self.register_buffer("scaling", torch.tensor(scaling, device=a_rD.device))  # among what a checkpoint is compared by

    @property
    def rank(self) -> int:
        return len(self.lora_A)

    def updated(self, weight_ND: Tensor) -> Tensor:
        """The updated matrix, before DoRA scales its rows, in fp32."""
        return weight_ND.float() + self.scaling.float() * (self.lora_B.float() @ self.lora_A.float())

    def merged(self, weight_ND: Tensor) -> Tensor:
        """The matrix that stands for both, in fp32."""
        updated_ND = self.updated(weight_ND)
        return updated_ND if self.magnitude is None else updated_ND * (self.magnitude.float() / row_lengths(updated_ND))[:, None]


def row_lengths(weight_ND: Tensor) -> Tensor:
    """Euclidean lengths of a matrix's rows, never zero."""
    return torch.linalg.vector_norm(weight_ND, dim=1).clamp(min=torch.finfo(torch.float32).tiny)


class LoraLinear(Linear):
    """A frozen linear layer and the low-rank updates of its parts.

    Args:
        linear: gives its weight, as it is or made small by `freeze`, and bias.
        spans: names of the parts and their numbers of rows, in order; one but for a merged projection.
        order_N: for each row of the layer its number among the parts' rows, end to end; None where they are in this order.
    """

    takes_product = False
    scale_N: Tensor | None
    order_N: Tensor | None

    def __init__(self, linear: Linear, spans: dict[str, int], order_N: Tensor | None = None) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.spans, self.parts = spans, nn.ModuleDict()
        self.register_buffer("scale_N", None)
        self.register_buffer("order_N", None if order_N is None else order_N.to(linear.weight.device), persistent=False)
        self._state: Any = None  # bitsandbytes' of NF4

    def _apply(self, fn: Any, recurse: bool = True) -> "LoraLinear":
        super()._apply(fn, recurse)
        if self._state is not None:  # no tensor that a module knows of
            self._state.to(self.weight.device)
        return self

    def freeze(self, base: str) -> None:
        """Keep the weight in another type."""
        weight_ND = self.weight.detach()
        if base == "bf16":
            weight_ND = weight_ND.bfloat16()
        elif base == "int8":
            weight_ND, self.scale_N = scaled(weight_ND, torch.int8)
        elif base == "nf4" and weight_ND.is_meta:  # for its size alone
            weight_ND = torch.empty(weight_ND.numel() // 2, 1, dtype=torch.uint8, device="meta")
        elif base == "nf4":
            quantize = _bitsandbytes().quantize_4bit
            weight_ND, self._state = quantize(weight_ND.float(), blocksize=64, compress_statistics=True, quant_type="nf4")
        self.weight = nn.Parameter(weight_ND, requires_grad=False)

    @property
    def is_packed(self) -> bool:
        """Whether the frozen weight is in nf4, whose values have no rows."""
        return self._state is not None

    def here(self) -> tuple[Tensor, Tensor | None]:
        """What this process has of the frozen weight, and the scales of its rows."""
        return self.weight, self.scale_N

    def dense(self, dtype: torch.dtype) -> Tensor:
        """What this process has of the frozen weight [N, D], in a floating-point type."""
        if self._state is not None:
            return cast(Tensor, _bitsandbytes().dequantize_4bit(self.weight, self._state).to(dtype))
        weight_ND, scale_N = self.here()
        return weight_ND.to(dtype) if scale_N is None else (weight_ND.float() * scale_N[:, None]).to(dtype)

    def forward(self, input: Tensor) -> Tensor:
        return self.updated(input, self.frozen(input, self.own_bias(input.dtype)))

    def frozen(self, input: Tensor, bias_N: Tensor | None) -> Tensor:
        """Product with the frozen weight."""
        weight_ND, _ = self.here()
        same = weight_ND.dtype == input.dtype
        return F.linear(input, weight_ND, bias_N) if same else _FrozenProduct.apply(input, bias_N, self)

    def updated(self, input: Tensor, out_TN: Tensor) -> Tensor:
        """Outputs of the updated matrix, from those of the frozen one."""
        if not self.parts or not _ENABLED.get():
            return out_TN
        parts = cast("dict[str, LowRank]", dict(self.parts.items()))
        a_RD = torch.cat([part.lora_A for part in parts.values()])
        b_NR = self.own_rows(block_diagonal({name: part.lora_B for name, part in parts.items()}, self.spans, self.order_N))
        scalings = {name: part.scaling for name, part in parts.items()}
        scale = self._rowwise(scalings) if len(self.spans) > 1 else next(iter(scalings.values()))
        delta_TN = (F.linear(self.low(input, a_RD.to(input.dtype)), b_NR.to(input.dtype)) * scale).to(input.dtype)
        magnitudes = {name: part.magnitude for name, part in parts.items() if part.magnitude is not None}
        if not magnitudes:
            return out_TN + delta_TN
        with torch.no_grad():  # the lengths count as constants in the backward pass (DoRA, section 4.3)
            update_ND = b_NR.float() @ self.own_columns(a_RD).float()
            lengths_N = self.lengths(self.dense(torch.float32) + (scale[:, None] if scale.ndim else scale).float() * update_ND)
            trained_N = self._rowwise(dict.fromkeys(magnitudes, lengths_N.new_zeros(()))) == 0
        gain_N = self._rowwise(magnitudes) / torch.where(trained_N, lengths_N, 1.0)
        bias_N = self.own_bias(input.dtype)
        plain_TN = out_TN if bias_N is None else out_TN - bias_N
        # in this form a gain of 1 changes no bit
        return out_TN + (gain_N - 1.0).to(out_TN.dtype) * plain_TN + gain_N.to(out_TN.dtype) * delta_TN

    # What follows is otherwise where processes have parts of the frozen matrix (`parallel.tensor`).

    def own_bias(self, dtype: torch.dtype) -> Tensor | None:
        """Bias of the outputs that are here."""
        return None if self.bias is None else self.bias.to(dtype)

    def own_rows(self, x_N: Tensor) -> Tensor:
        """Of what has an entry for each of the layer's outputs, those of the frozen weight that is here."""
        return x_N

    def own_columns(self, a_RD: Tensor) -> Tensor:
        """Columns of A for the inputs that are here."""
        return a_RD

    def low(self, input: Tensor, a_RD: Tensor) -> Tensor:
        """Low-rank products [T, R] of all inputs."""
        return F.linear(input, a_RD)

    def lengths(self, updated_ND: Tensor) -> Tensor:
        """Lengths of the rows of the updated matrix."""
        return row_lengths(updated_ND)

    def _rowwise(self, values: Mapping[str, Tensor]) -> Tensor:
        """A number for each own row, from one of each part or of each of its rows; 1 in parts that are not adapted."""
        one = next(iter(values.values())).new_ones(())
        rows_N = torch.cat([values.get(name, one).expand(size) for name, size in self.spans.items()])
        return self.own_rows(rows_N if self.order_N is None else rows_N[self.order_N])


def places_of(spans: dict[str, int], order_N: Tensor | None) -> dict[str, slice | Tensor]:
    """Where a layer has the rows of each part, in the part's order; arguments as of `LoraLinear`."""
    ends = list(itertools.accumulate(spans.values()))
    if order_N is None:
        return {name: slice(end - spans[name], end) for name, end in zip(spans, ends, strict=True)}
    return dict(zip(spans, order_N.argsort().split(list(spans.values())), strict=True))


def block_diagonal(b_matrices: dict[str, Tensor], spans: dict[str, int], order_N: Tensor | None) -> Tensor:
    """B [N, ranks of all parts] of a whole layer, from those of its adapted parts."""
    if list(b_matrices) == list(spans) and len(spans) == 1:
        (b_NR,) = b_matrices.values()
    else:
        none = next(iter(b_matrices.values())).new_zeros(1)
        b_NR = torch.block_diag(*(b_matrices.get(name, none.expand(size, 1)[:, :0]) for name, size in spans.items()))
    return b_NR if order_N is None else b_NR[order_N]


class _FrozenProduct(torch.autograd.Function):
    """x W^T + b of a frozen weight in another type, made dense in each pass anew, where autograd would keep the dense copy."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, bias_N: Tensor | None, layer: LoraLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x_TD, layer.dense(x_TD.dtype), bias_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0] @ ctx.layer.dense(grads[0].dtype), None, None


def _bitsandbytes() -> Any:
    try:
        return importlib.import_module("bitsandbytes.functional")  # where a user has it: nothing else needs it
    except ImportError:
        raise InputError("Install bitsandbytes for a LoRA base in nf4, or choose int8: there is no bitsandbytes here.") from None


# ---- a model's matrices ----


@dataclass(frozen=True)
class LinearPlace:
    """A linear layer in a model, and its parts; `spans` and `order_N` as of `LoraLinear`."""

    prefix: str  # of its parts' Hugging Face names
    parent: nn.Module
    attribute: str
    spans: dict[str, int]
    order_N: Tensor | None = None

    @property
    def linear(self) -> Linear:
        return cast(Linear, getattr(self.parent, self.attribute))


def _places(model: Transformer) -> Iterator[LinearPlace]:
    """All linear layers inside the blocks."""
    for number, block in model.blocks.items():
        assert isinstance(block, Block)
        if (attention := block.attention) is not None:
            prefix = f"model.layers.{number}.self_attn."
            rows = [part.flatten() for part in attention.parts(torch.arange(attention.qkv.out_features, device="cpu"))]
            parts = dict(zip(("q_proj", "k_proj", "v_proj"), map(len, rows), strict=True))
            parts = {"qkv_proj": attention.qkv.out_features} if model.config.parts.fused else parts
            order_N = None if attention.num_kv_heads == 1 else torch.cat(rows).argsort()
            yield LinearPlace(prefix, attention, "qkv", parts, order_N)
            yield LinearPlace(prefix, attention, "output", {"o_proj": attention.output.out_features})
        if block.mlp is not None:
            for name in ("gate_up", "gate", "up", "down"):
                if (linear := getattr(block.mlp, name)) is not None:
                    yield LinearPlace(f"model.layers.{number}.mlp.", block.mlp, name, {f"{name}_proj": linear.out_features})


def matrix_shapes(model: Transformer) -> dict[str, tuple[int, int]]:
    """Shapes [N, D] of all matrices that can be adapted, by their Hugging Face module names."""
    return {place.prefix + name: (rows, place.linear.in_features) for place in _places(model) for name, rows in place.spans.items()}


def linears_by_layer(model: Transformer) -> list[dict[str, LinearPlace]]:
    """Of each layer, the linear layers by attribute."""
    layers: list[dict[str, LinearPlace]] = [{} for _ in model.blocks]
    for place in _places(model):
        layers[int(place.prefix.split(".")[2])][place.attribute] = place
    return layers


def check_adapters(model: Transformer, config: LoraConfig, *, base: str = "fp32") -> tuple[str, ...]:
    """The targets that a configuration means with this model.

    Raises:
        InputError: a target that the model lacks, a rank that is more than a matrix has, or no bitsandbytes for nf4.
    """
    shapes = matrix_shapes(model)
    there = {name.rpartition(".")[2] for name in shapes}
    if lacking := [name for name in config.targets if name not in there]:
        raise InputError(f"Leave {lacking[0]} out of LoRA's targets: the model has {', '.join(n for n in TARGETS if n in there)}.")
    targets = config.targets or tuple(name for name in TARGETS if name in there)
    adapted = {name: shape for name, shape in shapes.items() if name.rpartition(".")[2] in targets}
    largest = min((min(shape) for shape in adapted.values()), default=0)
    if config.rank > largest:
        name, (rows, columns) = next((name, shape) for name, shape in adapted.items() if min(shape) == largest)
        raise InputError(f"Choose a LoRA rank of at most {largest}, not {config.rank}: {name} has {rows} rows and {columns} columns.")
    if base == "nf4":
        _bitsandbytes()
    return targets


def add_adapters(model: Transformer, config: LoraConfig, *, seed: int, base: str = "fp32") -> None:
    """Freeze a model and put a fresh adapter into it: A ~ U(-1/sqrt(D), 1/sqrt(D)) (Kaiming with a = sqrt(5)), B zero.

    Args:
        base: type of the frozen matrices: fp32, bf16, int8 with a scale a row, or nf4.

    Raises:
        InputError: as `check_adapters`.
    """
    targets = check_adapters(model, config, base=base)
    generator = torch.Generator().manual_seed(seed)  # on the CPU, so that it is the same on every device
    _freeze_outside(model, base)
    for place in _places(model):
        chosen = [name for name in place.spans if name in targets]
        if not chosen and base == "fp32":
            continue
        layer = LoraLinear(place.linear, place.spans, place.order_N)
        layer.freeze(base)
        device = layer.weight.device
        dense_ND = layer.dense(torch.float32) if config.dora and chosen else None
        pieces = {} if dense_ND is None else {name: dense_ND[rows] for name, rows in places_of(place.spans, place.order_N).items()}
        for name in chosen:
            a_rD = torch.empty(config.rank, layer.in_features).uniform_(-1, 1, generator=generator) / math.sqrt(layer.in_features)
            b_Nr = torch.zeros(place.spans[name], config.rank, device=device)
            part = LowRank(a_rD.to(device), b_Nr, config.scaling(config.rank, config.alpha))
            if name in pieces:
                part.magnitude = nn.Parameter(row_lengths(part.updated(pieces[name]).detach()))
            layer.parts[name] = part
        setattr(place.parent, place.attribute, layer)


def _freeze_outside(model: Transformer, base: str) -> None:
    model.requires_grad_(False)
    if base != "fp32":  # as `gristmill quantize` keeps them
        for matrix in (model.embedding, None if model.lm_head is None else model.lm_head.weight):
            if matrix is not None:
                matrix.data = matrix.data.bfloat16()


def attach_adapter(model: Transformer, matrices: dict[str, LowRank], *, base: str = "fp32") -> None:
    """Freeze a model and put stored updates, by the names of their matrices, beside its matrices; `base` as in `add_adapters`."""
    _freeze_outside(model, base)
    for place in _places(model):
        parts = {name: matrices[place.prefix + name] for name in place.spans if place.prefix + name in matrices}
        if parts or base != "fp32":
            layer = LoraLinear(place.linear, place.spans, place.order_N)
            layer.freeze(base)
            layer.parts.update(parts)
            setattr(place.parent, place.attribute, layer)


def is_adapted(model: nn.Module) -> bool:
    """Whether a model, or a part of one, is frozen but for an adapter, and maybe a head."""
    return any(not parameter.requires_grad for parameter in model.parameters())


def adapter_parts(model: Transformer) -> dict[str, LowRank]:
    """Updates of a model's matrices, by the Hugging Face names of their modules."""
    return {
        place.prefix + name: cast(LowRank, part)
        for place in _places(model)
        if isinstance(place.linear, LoraLinear)
        for name, part in place.linear.parts.items()
    }


@torch.no_grad()
def merge_adapter(
    model: Transformer, matrices: dict[str, LowRank], *, stored_as: torch.dtype = torch.float32
) -> dict[str, dict[str, float]]:
    """Merge updates into a model in fp32.

    Args:
        stored_as: type in which the model is going to be stored, for the figures alone.

    Returns:
        For each kind of matrix: update, |D| / |W| over all layers; rounding, the share of |D| that the stored type changes; unmoved, the
        share of weights that are stored as they were before.
    """
    sums: dict[str, Tensor] = {}
    for place in _places(model):
        for name, rows in places_of(place.spans, place.order_N).items():
            if (part := matrices.get(place.prefix + name)) is None:
                continue
            weight_ND = place.linear.weight.detach()[rows]
            merged_ND = part.to(weight_ND.device).merged(weight_ND)
            kept_ND = merged_ND.to(stored_as)
            parts = [weight_ND.double().square().sum(), (merged_ND - weight_ND).double().square().sum()]
            parts += [(kept_ND.float() - merged_ND).double().square().sum(), (kept_ND == weight_ND.to(stored_as)).double().sum()]
            parts.append(torch.tensor(float(weight_ND.numel()), dtype=torch.float64, device=weight_ND.device))
            sums[name] = sums.get(name, 0.0) + torch.stack(parts)
            place.linear.weight.detach()[rows] = merged_ND
    found = {}
    for name in TARGETS:
        if name in sums:
            base, update, lost, unmoved, count = sums[name].tolist()
            rounding = math.sqrt(lost / update) if update else 0.0
            found[name] = {"update": math.sqrt(update / base) if base else 0.0, "rounding": rounding, "unmoved": unmoved / count}
    return found
