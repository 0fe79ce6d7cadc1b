"""Children: models put together from a library's variants, and how far they are from the parent.

Shapes: T tokens of a piece, R those that predict a trained target, D hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gristmill.compress.activations import Piece
from gristmill.compress.library import Library
from gristmill.compress.variants import Choice, block_config
from gristmill.core.errors import InputError
from gristmill.core.threads import num_workers, workers
from gristmill.model.config import ModelConfig
from gristmill.model.transformer import Transformer
from gristmill.train.losses import cross_entropy_sum, kl_divergence_sum


@dataclass(frozen=True)
class Child:
    """A child, in weights of its own.

    Attributes:
        layers: the parent's layer that each of its layers stands for. One without attention and MLP is the identity, and left out.
    """

    model: Transformer
    layers: tuple[int, ...]


def child_config(parent: ModelConfig, choices: Sequence[Choice]) -> tuple[ModelConfig, tuple[int, ...]]:
    """Configuration of the child with these layers, and the parent's layers that are left.

    Raises:
        InputError: none is.
    """
    kept = tuple(number for number, choice in enumerate(choices) if choice != Choice(0, 0))
    if not kept:
        raise InputError("A child needs a layer: each of these has neither attention nor MLP.")
    return replace(parent, blocks=tuple(block_config(parent.blocks[number], choices[number]) for number in kept)), kept


def make_child(library: Library, choices: Sequence[Choice]) -> Child:
    """Put a child together; its weights are copies, and trained ones."""
    parent = library.parent
    config, kept = child_config(parent.config, choices)
    with torch.device("meta"):
        model = Transformer(config)
    state = {name: tensor for name, tensor in parent.state_dict().items() if not name.startswith("blocks.")}
    for number, layer in enumerate(kept):
        halves = library.half(layer, "attention", choices[layer].kv_heads), library.half(layer, "mlp", choices[layer].ffn_size)
        state |= {f"blocks.{number}.{name}": tensor for half in halves for name, tensor in half.state_dict().items()}
    model.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
    return Child(model.requires_grad_(), kept)


def through(model: Transformer, x_TD: Tensor, first: int, end: int, piece: Piece) -> Tensor:
    """States behind the layers from `first` to before `end`, of what the first of them reads."""
    angles = model.rope(piece.shape.positions_T)
    for number in range(first, end):
        x_TD = model.blocks[str(number)](x_TD, *angles[model.config.blocks[number].rope], piece.shape)
    return x_TD


@dataclass(frozen=True)
class Distance:
    """How far a model is from the parent on some text: KL(parent || model) and the model's cross-entropy, nats a token."""

    kl: float
    lm_loss: float


class Reference:
    """The parent's distributions on validation text, in fp32: a model is compared with them token by token."""

    def __init__(self, parent: Transformer, pieces: Sequence[Piece]) -> None:
        self.parent, self.pieces = parent, pieces
        self.count = sum(len(piece.rows_R) for piece in pieces)
        with torch.no_grad(), workers(num_workers(parent)) as each:
            self._hidden = each(torch.no_grad()(lambda piece: parent.hidden(piece.ids_T, piece.shape, piece.rows_R)), pieces)

    def distance(self, model: Transformer) -> Distance:
        """Distance of a model from the parent; exactly 0 of the parent itself."""
        with workers(num_workers(model)) as each:
            found = each(torch.no_grad()(lambda piece: model.hidden(piece.ids_T, piece.shape, piece.rows_R)), self.pieces)
        return self.of_hidden(found, model)

    @torch.no_grad()
    def of_hidden(self, hidden: Sequence[Tensor], model: Transformer) -> Distance:
        """The same from the states [R, D] that a model comes to in each piece."""
        kl = lm = 0.0
        cap = self.parent.config.logits_soft_cap
        for piece, own_RD, parent_RD in zip(self.pieces, hidden, self._hidden, strict=True):
            heads = model.unembedding(), parent_RD.float(), self.parent.unembedding()
            kl += float(kl_divergence_sum(own_RD.float(), *heads, cap=cap, teacher_cap=cap))
            lm += float(cross_entropy_sum(own_RD.float(), model.unembedding(), piece.targets_R, cap=cap)[0])
        return Distance(kl / self.count, lm / self.count)
