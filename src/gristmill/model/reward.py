"""Reward model: the decoder with a linear head on the state of the end-of-turn token.

Shapes: T tokens of all documents, D hidden size, N scored turns, 5 attributes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gristmill.core.errors import InputError
from gristmill.core.untrusted import quoted
from gristmill.data.rows import ATTRIBUTES
from gristmill.model.layers import Linear
from gristmill.model.packed import PackedShape
from gristmill.model.transformer import Transformer

# Weights that turn five attributes into one score: those of Nemotron-4-340B-Reward and of HelpSteer2's 70B
# reward model, and the "goodness" that HelpSteer2 (arXiv 2406.08673) used for training. The first two were
# searched on RewardBench, so a RewardBench figure computed with them is not out of sample.
REWARD_WEIGHTS: dict[str, tuple[float, ...]] = {
    "nemotron4-340b": (0.3, 0.74, 0.46, 0.47, -0.33),
    "llama3-70b": (0.65, 0.8, 0.45, 0.55, -0.4),
    "goodness": (0.65, 0.8, 0.45, 0.0, 0.0),
}

MAX_WEIGHT = 1e6  # absolute value of an aggregation weight


def new_head(backbone: Transformer, num_outputs: int, seed: int) -> Linear:
    """Linear head on a backbone's hidden states, initialised by the seed, unless the backbone is on the meta device."""
    device = backbone.embedding.device
    head = Linear(backbone.config.hidden_size, num_outputs, bias=True, device=device)
    if not head.weight.is_meta:
        generator = torch.Generator(device).manual_seed(seed)
        with torch.no_grad():
            head.weight.normal_(0.0, backbone.config.init_std, generator=generator)
            head.bias.zero_()
    return head


class RewardModel(nn.Module):
    """Five regression scores a turn; `weights` make one score of them.

    The head has a bias, is initialised like the backbone's matrices and computes in fp32. Source: HelpSteer2
    section 3; Nemotron-4 340B report, section 3.1.

    Args:
        backbone: the decoder whose states are scored; its output matrix stays unused.
        weights: aggregation weights in the order of ATTRIBUTES (see REWARD_WEIGHTS).

    Raises:
        InputError: `weights` does not hold one number an attribute.
    """

    def __init__(
        self,
        backbone: Transformer,
        weights: Sequence[float] = REWARD_WEIGHTS["nemotron4-340b"],
        seed: int = 0,
    ) -> None:
        super().__init__()
        numbers = isinstance(weights, list | tuple) and all(type(w) in (int, float) and abs(w) <= MAX_WEIGHT for w in weights)
        if not numbers or len(weights) != len(ATTRIBUTES):
            names = ", ".join(ATTRIBUTES)
            raise InputError(f"Give {len(ATTRIBUTES)} aggregation weights ({names}), not {quoted(weights)}.")
        self.backbone = backbone
        self.weights = tuple(float(weight) for weight in weights)
        self.head = new_head(backbone, len(ATTRIBUTES), seed)

    def forward(self, ids_T: Tensor, shape: PackedShape, ends_N: Tensor) -> Tensor:
        """Scores [N, 5] in fp32. `ends_N` are the indices in ids_T of the end-of-turn tokens to score."""
        return self.head(self.backbone.hidden(ids_T, shape, ends_N).float())
