"""Search space of Puzzle, and variants of a layer's halves made from the parent's weights without training.

A layer is attention and MLP. A variant replaces one of them: fewer key-value heads, fewer channels, or nothing at all. Half a layer is a
`Block` that lacks the other half, so that a layer is the MLP's block behind the attention's, and their parameters are those of the whole.
Source: Puzzle (arXiv 2411.19146), section 2 and appendix B. Shapes: K key-value heads, F channels, D hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from gristmill.core.errors import InputError
from gristmill.model.config import BlockConfig, ModelConfig
from gristmill.model.flops import block_matrix_parameters, block_vector_parameters
from gristmill.model.transformer import Block, Transformer

Half = Literal["attention", "mlp"]
HALVES: tuple[Half, Half] = ("attention", "mlp")


@dataclass(frozen=True, order=True)
class Variant:
    """Alternative of one half of a layer: attention with `size` key-value heads, or an MLP with `size` channels; 0 for none."""

    layer: int
    half: Half
    size: int

    @property
    def id(self) -> str:
        return f"{self.layer:03}-{self.half}-{self.size}"


@dataclass(frozen=True, order=True)
class Choice:
    """A whole layer: key-value heads and channels."""

    kv_heads: int
    ffn_size: int


def size_of(block: BlockConfig, half: Half) -> int:
    """Key-value heads or channels of a layer; 0 where it lacks this half."""
    return (block.num_kv_heads if block.has_attention else 0) if half == "attention" else block.ffn_size


def block_config(parent: BlockConfig, choice: Choice) -> BlockConfig:
    """Configuration of a layer with other sizes."""
    heads = (parent.num_heads, choice.kv_heads, parent.head_dim) if choice.kv_heads else (0, 0, 0)
    return replace(parent, num_heads=heads[0], num_kv_heads=heads[1], head_dim=heads[2], ffn_size=choice.ffn_size)


def half_config(parent: BlockConfig, variant: Variant) -> BlockConfig:
    """Configuration of half a layer."""
    return block_config(parent, Choice(variant.size, 0) if variant.half == "attention" else Choice(0, variant.size))


@dataclass(frozen=True)
class Space:
    """Search space: of every layer the sizes of each half, the parent's own first."""

    attention: tuple[tuple[int, ...], ...]
    mlp: tuple[tuple[int, ...], ...]

    @staticmethod
    def of(
        config: ModelConfig,
        *,
        kv_heads: Sequence[int] | None = None,
        widths: Sequence[float] = (0.75, 0.5, 0.25, 0.125),
        width_multiple: int = 32,
        no_attention: bool = True,
        no_mlp: bool = True,
        fixed_layers: Sequence[int] = (),
    ) -> "Space":
        """The space of a model.

        Args:
            kv_heads: numbers of key-value heads below the parent's; None for all that divide it.
            widths: of the MLP, as shares of the parent's.
            width_multiple: of which widths are multiples.
            no_attention, no_mlp: whether a half may be left out.
            fixed_layers: that stay as they are; -1 is the last.

        Raises:
            InputError: a width or a layer that is none, or nothing can change.
        """
        if wrong := [width for width in widths if not 0 < width < 1]:
            raise InputError(f"Give space.widths between 0 and 1, the share of the parent's channels: {wrong[0]} is not.")
        if wrong := [layer for layer in fixed_layers if not -config.num_layers <= layer < config.num_layers]:
            raise InputError(f"Give space.fixed_layers from 0 to {config.num_layers - 1}: there is no layer {wrong[0]}.")
        fixed = {layer % config.num_layers for layer in fixed_layers}
        there = sorted({size_of(block, "attention") for number, block in enumerate(config.blocks) if number not in fixed})
        if unfit := [k for k in kv_heads or () if not any(0 < k < own and own % k == 0 for own in there)]:
            raise InputError(f"Give space.kv_heads that divide the parent's ({', '.join(map(str, there))}): {unfit[0]} does not.")

        def heads(number: int, block: BlockConfig) -> tuple[int, ...]:
            own = size_of(block, "attention")
            if number in fixed or not own:
                return (own,)
            fewer = [k for k in range(own - 1, 0, -1) if own % k == 0 and (kv_heads is None or k in kv_heads)]
            return (own, *fewer, *([0] if no_attention else []))

        def channels(number: int, block: BlockConfig) -> tuple[int, ...]:
            own = block.ffn_size
            if number in fixed or not own:
                return (own,)
            sizes = {max(1, round(own * width / width_multiple)) * width_multiple for width in widths}
            return (own, *sorted((size for size in sizes if size < own), reverse=True), *([0] if no_mlp else []))

        numbered = list(enumerate(config.blocks))
        space = Space(tuple(heads(*one) for one in numbered), tuple(channels(*one) for one in numbered))
        if not space.variants():
            raise InputError("No layer of this model can change: widen space (kv_heads, widths, width_multiple, no_attention, no_mlp).")
        return space

    def sizes(self, half: Half) -> tuple[tuple[int, ...], ...]:
        """Of every layer, the sizes of one half."""
        return self.attention if half == "attention" else self.mlp

    def variants(self) -> list[Variant]:
        """All variants but the parent's own, layer by layer."""
        number = len(self.attention)
        return [Variant(layer, half, size) for layer in range(number) for half in HALVES for size in self.sizes(half)[layer][1:]]

    def choices(self, layer: int) -> list[Choice]:
        """All combinations of a layer's halves, the parent's own first."""
        return [Choice(kv, ffn) for kv in self.attention[layer] for ffn in self.mlp[layer]]

    @property
    def empty(self) -> tuple[int, ...]:
        """Of every layer the choice that leaves it out, or () where one must stay."""
        choices = [self.choices(layer) for layer in range(len(self.attention))]
        return tuple(one.index(Choice(0, 0)) for one in choices) if all(Choice(0, 0) in one for one in choices) else ()

    @property
    def num_architectures(self) -> int:
        """Children that the space holds."""
        total = 1
        for kv, ffn in zip(self.attention, self.mlp, strict=True):
            total *= len(kv) * len(ffn)
        return total


def num_block_parameters(config: ModelConfig, block: BlockConfig) -> int:
    """Parameters of a layer."""
    return block_matrix_parameters(config, block) + block_vector_parameters(config, block)


def kv_values_per_token(block: BlockConfig) -> int:
    """Keys and values that a token leaves in a layer's cache."""
    return 2 * block.num_kv_heads * block.head_dim


# ---- initialisation ----


def half_of(parent: Transformer, layer: int, half: Half) -> Block:
    """Half a layer of the parent, which shares its parameters."""
    block = parent.get_submodule(f"blocks.{layer}")
    assert isinstance(block, Block)
    with torch.device("meta"):
        found = Block(parent.config, half_config(block.config, Variant(layer, half, size_of(block.config, half))))
    own = dict(block.named_parameters())
    for name, _ in list(found.named_parameters()):
        module, _, leaf = name.rpartition(".")
        setattr(found.get_submodule(module), leaf, own[name])
    return found


def initial(parent: Transformer, variant: Variant, contribution_F: Tensor | None) -> Block:
    """A variant from the parent's weights: key and value heads are averaged, the channels that contribute most are kept.

    Args:
        contribution_F: of each of the parent's channels (`ChannelContribution`); None for attention and for no MLP.
    """
    source = half_of(parent, variant.layer, variant.half)
    block = parent.config.blocks[variant.layer]
    with torch.device(parent.embedding.device):
        found = Block(parent.config, half_config(block, variant))
    with torch.no_grad():
        if variant.half == "attention" and variant.size:
            found.load_state_dict(_pooled(source, variant.size))
        elif variant.size:
            assert contribution_F is not None
            kept_F = contribution_F.topk(variant.size).indices.sort().values
            found.load_state_dict(_narrowed(source, kept_F))
    return found


def _pooled(source: Block, kv_heads: int) -> dict[str, Tensor]:
    """Attention with fewer key-value heads, each the mean of those that it stands for; queries, and their order, stay."""
    attention = source.attention
    assert attention is not None
    state = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    for name in ("weight", "bias"):
        if (rows_X := getattr(attention.qkv, name)) is None:
            continue
        q, k, v = attention.parts(rows_X)  # [K, rows of each, ..]
        q = q.reshape(kv_heads, -1, *q.shape[2:])
        k, v = (part.unflatten(0, (kv_heads, -1)).mean(1) for part in (k, v))
        state[f"attention.qkv.{name}"] = torch.cat([q, k, v], dim=1).flatten(0, 1)
    if attention.norms_whole and attention.k_norm is not None:  # a gain for each key head
        gain = state["attention.k_norm.weight"].view(kv_heads, -1, attention.head_dim)
        state["attention.k_norm.weight"] = gain.mean(1).flatten()
    return state


def _narrowed(source: Block, kept_F: Tensor) -> dict[str, Tensor]:
    """An MLP with some of its channels."""
    mlp = source.mlp
    assert mlp is not None
    state = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    both = torch.cat([kept_F, kept_F + mlp.down.weight.shape[1]])  # rows of `gate_up`: the gate's, then those of up
    for name in list(state):
        if name.startswith(("mlp.up.", "mlp.gate.")):
            state[name] = state[name][kept_F]
        elif name.startswith("mlp.gate_up."):
            state[name] = state[name][both]
        elif name == "mlp.down.weight":
            state[name] = state[name][:, kept_F]
    return state


class ChannelContribution:
    """Channel contribution of an MLP: |x_i| times the norm of column i of the last matrix, x what it multiplies, over all tokens.

    It counts the tokens of every forward pass of the half without gradients, until it is closed.
    """

    def __init__(self, half: Block) -> None:
        assert half.mlp is not None
        self._down = half.mlp.down
        size, device = self._down.weight.shape[1], self._down.weight.device
        self._sum_F = torch.zeros(size, dtype=torch.float64, device=device)
        self._hook = self._down.register_forward_pre_hook(self._count)

    def _count(self, module: nn.Module, given: tuple[Tensor, ...]) -> None:
        self._sum_F += given[0].abs().double().sum(0)

    def close(self) -> Tensor:
        """The contribution of each channel."""
        self._hook.remove()
        return self._sum_F * self._down.weight.detach().double().norm(dim=0)
