"""Children: models put together from a library's variants, and how far they are from the parent.

Shapes: T tokens of a piece, R those that predict a trained target, D hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from gristmill.compress.activations import Piece
from gristmill.compress.library import Library
from gristmill.compress.variants import Choice, block_config
from gristmill.core.errors import InputError
from gristmill.core.threads import num_workers, workers
from gristmill.model.config import ModelConfig
from gristmill.model.transformer import Transformer, soft_cap

MAX_LOGITS = 2**23  # that are compared at once, of each model


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
        return self.distances([found], model.unembedding())[0]

    def distances(self, hidden: Sequence[Sequence[Tensor]], unembedding_VD: Tensor) -> list[Distance]:
        """The same of several models with one output matrix, from the states [R, D] that each comes to in each piece.

        Products with the output matrix are most of the work: the parent's distributions are made once for all models.
        """
        step = max(1, MAX_LOGITS // len(unembedding_VD))
        chunks = [
            (number, slice(start, start + step)) for number, piece in enumerate(self.pieces) for start in range(0, len(piece.rows_R), step)
        ]

        @torch.no_grad()
        def of_chunk(chunk: tuple[int, slice]) -> list[tuple[float, float]]:
            number, rows = chunk
            parent_CV = self._log_probs(self._hidden[number][rows], self.parent.unembedding())
            probs_CV, targets_C1 = parent_CV.exp(), self.pieces[number].targets_R[rows, None]
            sums = []
            for model in hidden:
                own_CV = self._log_probs(model[number][rows], unembedding_VD)
                loss = -float(own_CV.gather(1, targets_C1).sum())
                sums.append((float(own_CV.neg_().add_(parent_CV).mul_(probs_CV).sum()), loss))
            return sums

        with workers(num_workers(self.parent)) as each:
            found = each(of_chunk, chunks)
        return [Distance(*(sum(column) / self.count for column in zip(*of_model, strict=True))) for of_model in zip(*found, strict=True)]

    def _log_probs(self, hidden_CD: Tensor, unembedding_VD: Tensor) -> Tensor:
        return soft_cap(F.linear(hidden_CD.float(), unembedding_VD), self.parent.config.logits_soft_cap).log_softmax(1)
